"""A figure as SVG inside an HTML page, beside others."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree as ET

from markupsafe import Markup

_POINTS_TO_PIXELS = 96 / 72
_ENLARGED = 1.2  # a figure drawn for paper is read from further away on a screen
_DROPPED = frozenset({"metadata", "style", "script", "title", "desc"})
_COORDINATES = frozenset({"d", "points", "x", "y"})
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def inline_svg(rendered: bytes, *, prefix: str, label: str) -> Markup:
    """Return one ``<svg>`` element of the figure that Matplotlib rendered.

    Prolog, document type, comments, metadata, style sheet and namespaces are left
    out. Ids that nothing refers to go as well, the others get ``prefix`` in front, so
    that no two figures of a page share one. Coordinates keep two decimals of a point.

    Args:
        rendered: Bytes of an SVG file.
        prefix: Put before every id; unique on the page.
        label: Text for screen readers.
    """
    root = ET.fromstring(rendered)
    used = set(_references(root))
    for element in root.iter():
        _tidy(element, used=used, prefix=prefix)
    _frame(root, label)
    return Markup(ET.tostring(root, encoding="unicode"))  # escaped by ElementTree


def _references(root: ET.Element) -> Iterator[str]:
    for element in root.iter():
        for name, value in element.attrib.items():
            yield from _REFERENCE.findall(value)
            if _local(name) == "href" and value.startswith("#"):
                yield value[1:]


def _tidy(element: ET.Element, *, used: set[str], prefix: str) -> None:
    element.tag = _local(element.tag)
    for child in [child for child in element if _local(child.tag) in _DROPPED]:
        element.remove(child)
    if not (element.text or "").strip():
        element.text = None
    element.tail = None
    kept = {}
    for name, value in element.attrib.items():
        attribute = _attribute(_local(name), value, used=used, prefix=prefix)
        if attribute is not None:
            kept[_local(name)] = attribute
    element.attrib.clear()
    element.attrib.update(kept)


def _attribute(name: str, value: str, *, used: set[str], prefix: str) -> str | None:
    """Return what an attribute becomes, ``None`` if it is left out."""
    if name == "id":
        return f"{prefix}{value}" if value in used else None
    if name == "href":
        if value.startswith("#"):
            return f"#{prefix}{value[1:]}"
        return value if value.startswith("data:image/") else None
    if name in _COORDINATES:
        return _LONG_NUMBER.sub(_rounded, " ".join(value.split()))
    return _REFERENCE.sub(rf"url(#{prefix}\1)", value)


def _frame(root: ET.Element, label: str) -> None:
    """Leave the width to the page, and say at which size the text reads well."""
    *_, width, height = (float(part) for part in root.attrib["viewBox"].split())
    pixels = width * _POINTS_TO_PIXELS * _ENLARGED
    root.attrib.clear()
    root.attrib.update(
        {
            "viewBox": f"0 0 {width:g} {height:g}",
            "role": "img",
            "aria-label": label,
            "style": f"--full:{pixels:.0f}px",
        }
    )


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _local(name: str) -> str:
    return name.rpartition("}")[2]

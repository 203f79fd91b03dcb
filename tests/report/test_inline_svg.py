"""A figure inside a page."""

from noisekit.report.inline_svg import inline_svg
from tests.report.samples import PageReader, ids_in, plot

RAW = b"""<?xml version="1.0" encoding="utf-8" standalone="no"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/svg11.dtd">
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="100pt" height="50pt"
 viewBox="0 0 100 50" xmlns="http://www.w3.org/2000/svg" version="1.1">
 <metadata>about</metadata>
 <defs><style type="text/css">*{stroke-linejoin: round}</style></defs>
 <!-- a comment -->
 <script>alert(1)</script>
 <g id="unused"><path id="mark" d="M 0.123456 1
L -2.000000 3.5" style="fill: url(#shade)"/></g>
 <clipPath id="clip"><rect x="1.23456" y="2" width="9" height="9"/></clipPath>
 <linearGradient id="shade"/>
 <use xlink:href="#mark" x="5" clip-path="url(#clip)"/>
 <image xlink:href="http://elsewhere/x.png"/>
 <image xlink:href="data:image/png;base64,AA=="/>
 <text>&lt;b&gt; &amp; c</text>
</svg>"""


def test_only_what_draws_is_left() -> None:
    """Catches: a style sheet that reaches the whole page, namespaces, scripts."""
    svg = inline_svg(RAW, prefix="f1-", label='A "label" <of> it')
    assert svg.startswith("<svg ")
    for gone in ("<?xml", "DOCTYPE", "xmlns", "xlink", "metadata", "style>", "script"):
        assert gone not in svg, gone
    for gone in ("comment", "http", "unused", "\n"):
        assert gone not in svg, gone
    page = PageReader(svg)
    assert page.values("aria-label") == ['A "label" <of> it']
    assert page.values("role") == ["img"]
    assert "&lt;b&gt; &amp; c" in svg


def test_ids_and_what_refers_to_them_change_together() -> None:
    """Catches: references in ``style``, ``clip-path`` or ``xlink:href`` left as is."""
    ids, targets = ids_in(inline_svg(RAW, prefix="f1-", label=""))
    assert ids == targets == {"f1-mark", "f1-clip", "f1-shade"}


def test_pictures_come_from_the_page_itself() -> None:
    """Catches: an image fetched from elsewhere, and an embedded one lost."""
    page = PageReader(inline_svg(RAW, prefix="f1-", label=""))
    assert page.values("href") == ["#f1-mark", "data:image/png;base64,AA=="]


def test_coordinates_keep_two_decimals() -> None:
    """Catches: megabytes of digits that no screen shows."""
    page = PageReader(inline_svg(RAW, prefix="f1-", label=""))
    assert page.values("d") == ["M 0.12 1 L -2 3.5"]
    assert page.values("x")[0] == "1.23"


def test_the_page_decides_on_the_width() -> None:
    """Catches: a fixed size in points, which a phone cannot shrink."""
    svg = inline_svg(plot().rendered("svg"), prefix="f1-", label="")
    root = svg[: svg.index(">")]
    assert " width=" not in root
    assert " height=" not in root
    assert "viewBox" in root
    assert "--full:" in root

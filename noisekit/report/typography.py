"""Numbers, symbols and names as they are set on a page."""

import math
import re
import unicodedata

from markupsafe import Markup, escape

NO_VALUE = "–"
_MINUS = "−"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SMALLEST, _LARGEST = 1e-4, 1e7  # outside, powers of ten are easier to read

_UPRIGHT = {
    "max": "max",
    "min": "min",
    "log": "log",
    "sum": "∑",
    "|": "‖",
    ",": "\u2009",
    "cdot": "·",
    "times": "×",
    "nabla": "∇",
    "cos": "cos",
    "leq": "≤",
    "parallel": "∥",
    "top": "⊤",
}
_NAMES = ("Hessian", "Fisher")
_ACCENTS = {"bar": "\u0304", "hat": "\u0302", "tilde": "\u0303"}
_POWER = re.compile(r"(?<![\w.])([-−]?\d+(?:\.\d+)?)e([+-]\d+)(?!\w)")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)


def number(value: float, *, digits: int = 3, pad: bool = False) -> str:
    """Return a number with ``digits`` significant digits and a true minus sign.

    Args:
        value: The number; NaN becomes a dash.
        digits: Significant digits.
        pad: Keep zeros at the end, so that the numbers of a row look alike.
    """
    if math.isnan(value):
        return NO_VALUE
    sign = _MINUS if value < 0 else ""
    size = abs(value)
    if math.isinf(size):
        return f"{sign}∞"
    if size and not _SMALLEST <= size < _LARGEST:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        return typeset(f"{sign}{mantissa if pad else _bare(mantissa)}e{exponent}")
    places = max(0, digits - 1 - math.floor(math.log10(size))) if size else 0
    text = f"{size:,.{places}f}"
    return f"{sign}{text if pad else _bare(text)}"


def fixed(value: float, places: int) -> str:
    """Return a number with its sign and ``places`` decimals."""
    return f"{value:+,.{places}f}".replace("-", _MINUS)


def typeset(text: str) -> str:
    """Return ``text`` with true minus signs and powers of ten, which do not break."""
    powers = _POWER.sub(_power_of_ten, text)
    return re.sub(r"(?<![\w.\-/])-(?=\.?\d)", _MINUS, powers)


def spaced(name: str) -> str:
    """Return a name from a table or recipe as words."""
    return name.replace("_", " ")


def sentence_case(text: str) -> str:
    """Return ``text`` with its first letter as a capital; a symbol stays as it is."""
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def lower_first(text: str) -> str:
    """Return ``text`` as written inside a sentence; names keep their capital."""
    word = text.split(" ", 1)[0]
    is_name = not word[1:].islower() or word in _NAMES
    return text if is_name else text[:1].lower() + text[1:]


def symbol(mathtext: str) -> Markup:
    """Return the HTML of a symbol of the vocabulary, empty if it cannot be set.

    Knows what the vocabulary needs of mathtext: Greek and Latin letters, indices and
    exponents, upright words and accents.
    """
    tokens = _TOKEN.findall(mathtext)
    try:
        return _group(tokens, closing=False)
    except (KeyError, IndexError):
        return Markup()


def _power_of_ten(match: re.Match[str]) -> str:
    if not float(match[1].replace(_MINUS, "-")):
        return "0"
    power = str(int(match[2])).translate(_SUPERSCRIPTS)
    return f"{match[1]}\u202f×\u202f10{power}"


def _bare(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _group(tokens: list[str], *, closing: bool) -> Markup:
    """Set tokens up to the brace that closes the group, or to the end."""
    parts = []
    while tokens:
        if tokens[0] == "}":
            break
        parts.append(_atom(tokens))
    if closing:
        tokens.pop(0)
    return Markup().join(parts)


def _atom(tokens: list[str]) -> Markup:
    token = tokens.pop(0)
    if token == "{":
        return _group(tokens, closing=True)
    if token in ("_", "^"):
        inner = _atom(tokens)
        tag = Markup("<sub>{}</sub>" if token == "_" else "<sup>{}</sup>")
        return tag.format(inner)
    if token.startswith("\\"):
        return _command(token[1:], tokens)
    if token.isalpha():
        return Markup("<i>{}</i>").format(token)
    return escape(_MINUS if token == "-" else token)


def _command(name: str, tokens: list[str]) -> Markup:
    if name in ("mathrm", "mathcal"):
        inner = _atom(tokens)
        return escape(inner.striptags()) if name == "mathrm" else inner
    if name in _ACCENTS:
        return Markup("<i>{}{}</i>").format(_atom(tokens).striptags(), _ACCENTS[name])
    if name in _UPRIGHT:
        return escape(_UPRIGHT[name])
    case, letter = (
        ("SMALL", Markup("<i>{}</i>")) if name.islower() else ("CAPITAL", "{}")
    )
    spelt = name.upper().replace("LAMBDA", "LAMDA")  # as Unicode has it
    return Markup(letter).format(unicodedata.lookup(f"GREEK {case} LETTER {spelt}"))

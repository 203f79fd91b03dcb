"""Text of unknown origin, made safe for terminals."""

import unicodedata

_LINE_BREAKS = "\n\t"
_ACTIVE = frozenset({"Cc", "Cf", "Cs"})
"""Unicode categories that act on a terminal: control, format, lone surrogates."""


def printable(text: str) -> str:
    r"""Return ``text`` with what a terminal would act on shown as an escape.

    Example:
        >>> printable("red \x1b[31m")
        'red \\x1b[31m'
    """
    return "".join(
        ascii(char)[1:-1]
        if char not in _LINE_BREAKS and unicodedata.category(char) in _ACTIVE
        else char
        for char in text
    )

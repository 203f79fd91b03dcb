"""Text of unknown origin, made safe for terminals and for file names."""

import re
import unicodedata

_KEPT = "\n\t"
_ACTIVE = frozenset({"Cc", "Cf", "Cs"})
"""Unicode categories that act on a terminal: control, format, lone surrogates."""

_NOT_IN_NAMES = re.compile(r"[^\w.+=@-]+")
_LONGEST_STEM = 100


def printable(text: str) -> str:
    r"""Return ``text`` with what a terminal would act on shown as an escape.

    Example:
        >>> printable("red \x1b[31m")
        'red \\x1b[31m'
    """
    return "".join(
        ascii(char)[1:-1]
        if char not in _KEPT and unicodedata.category(char) in _ACTIVE
        else char
        for char in text
    )


def file_stem(text: str) -> str:
    """Return ``text`` as the stem of one file: no separators, not hidden, not too long.

    Example:
        >>> file_stem("../loss: train/test")
        'loss-train-test'
    """
    stem = _NOT_IN_NAMES.sub("-", text).strip("-.")
    return stem[:_LONGEST_STEM] or "unnamed"

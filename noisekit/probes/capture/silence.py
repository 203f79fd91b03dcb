"""Keeps probes from recording what a measurement does with their model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Silence:
    """Who may record now; one for the process, since backward passes change threads."""

    def __init__(self) -> None:
        self.imposed = False
        self.exempt: object | None = None


_SILENCE = _Silence()


@contextmanager
def silence(exempt: object | None = None) -> Iterator[None]:
    """Let only ``exempt`` record, or nobody."""
    before = (_SILENCE.imposed, _SILENCE.exempt)
    _SILENCE.imposed, _SILENCE.exempt = True, exempt
    try:
        yield
    finally:
        _SILENCE.imposed, _SILENCE.exempt = before


def silenced(recorder: object) -> bool:
    """Whether ``recorder`` must not record now, or is being traced by a compiler."""
    if torch.compiler.is_compiling():
        return True
    return _SILENCE.imposed and _SILENCE.exempt is not recorder

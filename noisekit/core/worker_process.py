"""Worker processes that end with their parent, also while they are still importing.

The standard library alone is imported here: a worker comes by this module first, and
importing PyTorch may take longer than a killed parent's run may stay locked.
"""

import multiprocessing
import os
import signal
import threading
from importlib import import_module
from multiprocessing.connection import wait


def run_while_parent_lives(target: str, *arguments: object) -> None:
    """Call ``target``, written ``module:function``, and end when the parent does."""
    # Ctrl-C reaches the whole group; the parent decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, function = target.partition(":")
    getattr(import_module(module), function)(*arguments)


def _end_with_parent() -> None:
    """End at once when the parent has: an orphan would keep its run locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

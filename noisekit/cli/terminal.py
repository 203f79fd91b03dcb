"""What the command line prints, and how it ends when it is told to stop.

Names, paths and errors hold text of users and files: it is printed as it is, without
rich's markup, and with control characters shown as escapes.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.text import Text

from noisekit.core.text import printable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; not a ``KeyboardInterrupt``, which typer keeps to itself.

    Attributes:
        exit_code: 128 plus the signal, as shells have it: 130 or 143.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number

    def describe(self) -> str:
        """Return what happened, what is kept, and how to go on."""
        how = "by Ctrl-C" if self.exit_code == 130 else "by SIGTERM"
        return "\n".join([f"Stopped {how}.", *getattr(self, "__notes__", [])])


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into ``Stopped``; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = {number: signal.signal(number, _stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    raise Stopped(number)


@contextmanager
def kept_runs(directory: Path) -> Iterator[None]:
    """Where the work is stopped, let ``Stopped`` say what of it is kept."""
    try:
        yield
    except Stopped as stop:
        stop.add_note(_what_is_kept(directory))
        raise


def _what_is_kept(directory: Path) -> str:
    from noisekit.core.errors import RunDirectoryError
    from noisekit.records import Manifest

    complete = begun = 0
    for path in (directory / "runs").glob("*/manifest.json"):
        try:
            status = Manifest.read(path).status
        except RunDirectoryError:
            continue
        begun += 1
        complete += status.complete
    if not begun:
        return "No run had begun."
    return (
        f"{complete} of {begun} runs are complete; the others are kept up to their "
        f"last checkpoint. Go on with `noisekit resume {directory}`."
    )


def say(text: object = "") -> None:
    """Print a line of text to the output."""
    typer.echo(printable(str(text)))


def warn(text: object) -> None:
    """Print a line of text to the errors, in front of which stands ``Warning``."""
    _to_stderr("Warning:", "yellow", str(text))


def complain(text: object) -> None:
    """Print a line of text to the errors, in front of which stands ``Error``."""
    _to_stderr("Error:", "bold red", str(text))


def cell(value: object) -> Text:
    """Return a value as a table's cell or title."""
    return Text(printable(str(value)))


def _to_stderr(label: str, style: str, text: str) -> None:
    line = Text.assemble((label, style), " ", printable(text))
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)

"""Ctrl-C and SIGTERM: exit codes, what is kept, how to go on, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from noisekit.records import Manifest

TINY = Path(__file__).parents[1] / "train" / "tiny.toml"
GONE_WITHIN = 5.0
START = 120.0


def begin(out: Path, *, workers: int) -> subprocess.Popen[str]:
    """Start a sweep without end, in a process group of its own."""
    command = [sys.executable, "-m", "noisekit.cli.main", "run", str(TINY)]
    command += ["--out", str(out), "--workers", str(workers)]
    command += ["--set", "training.stop.updates=100000000"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def group_of(leader: int) -> list[int]:
    """Return the living processes of a group, by the kernel's own table."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if fields[0] != "Z" and int(fields[2]) == leader:
            members.append(int(stat.parent.name))
    return members


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_training(out: Path) -> bool:
    path = out / "runs" / "slow-seed0" / "manifest.json"
    return path.exists() and Manifest.read(path).status == "running"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "how"),
    [(signal.SIGINT, 130, "by Ctrl-C"), (signal.SIGTERM, 143, "by SIGTERM")],
)
def test_a_stopped_sweep_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int, how: str
) -> None:
    """The signal comes while a run trains, to the whole group as a terminal sends it.

    Catches: an exit without a word; another exit code; workers that train on.
    """
    out = tmp_path / "set"
    with begin(out, workers=1) as parent:
        assert wait_until(lambda: is_training(out), START)
        os.killpg(parent.pid, number) if code == 130 else parent.send_signal(number)
        _, errors = parent.communicate(timeout=START)
        assert parent.returncode == code
        assert wait_until(lambda: not group_of(parent.pid), GONE_WITHIN)
    told = " ".join(errors.split())
    assert f"Stopped {how}. 0 of 4 runs are complete" in told
    assert f"Go on with `noisekit resume {out}`." in told
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_that_still_import_end_with_their_parent(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The signal comes as soon as the first worker is there.

    Catches: a worker that looks for its parent only once it has imported PyTorch.
    """
    with begin(tmp_path / "set", workers=2) as parent:
        # The parent, multiprocessing's resource tracker, and a worker.
        assert wait_until(lambda: len(group_of(parent.pid)) > 2, START)
        parent.send_signal(number)
        parent.wait(timeout=START)
        assert wait_until(lambda: not group_of(parent.pid), GONE_WITHIN)
        parent.communicate()

"""Every odd value of every argument of every public function and method."""

from pathlib import Path

import pytest

from tests import odd_arguments


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.filterwarnings("ignore")
def test_every_odd_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of calls: each works, or says what it needs, what it got, what to do.

    Catches: a value that the sample in the suite does not meet.
    """
    monkeypatch.chdir(tmp_path)
    calls = list(odd_arguments.calls())
    faults = [fault for fault in map(odd_arguments.fault_of, calls) if fault]
    print(f"{len(calls)} calls, {len(faults)} refused badly")
    assert faults == []

"""Sets whose files are harmed at random; ``tests/soak`` does it a thousand times."""

import shutil
from pathlib import Path

import pytest

from tests import corruption

NUM_CASES = 60


@pytest.mark.slow
def test_harmed_sets_are_never_silently_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits flipped, files cut, removed and exchanged, in done and in half-done sets.

    Catches: values read from files that are not as they were written; tracebacks of
    the libraries below; one run's damage that costs the others; advice that leads
    nowhere.
    """
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    bases = corruption.Bases.make(tmp_path)
    for seed in range(NUM_CASES):
        folder = tmp_path / "case"
        bases.check(seed, folder, way_out=seed % 4 == seed // 16 % 4)
        shutil.rmtree(folder)

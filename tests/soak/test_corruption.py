"""A thousand harms to finished and half-finished sets of runs."""

import collections
import shutil
from pathlib import Path

import pytest

from tests import corruption

NUM_CASES = 1000


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_a_thousand_harms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case also follows the advice to complete runs with the same bits.

    Catches: what sixty cases do not meet, such as a bit of a format number or a key.
    """
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    bases = corruption.Bases.make(tmp_path)
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(NUM_CASES):
        folder = tmp_path / "case"
        outcomes[bases.check(seed, folder, way_out=True)] += 1
        shutil.rmtree(folder)
    print(f"{NUM_CASES} harms: {dict(outcomes)}")

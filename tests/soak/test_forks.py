"""Sweeps of runs that start one from the other, killed at each single event."""

from pathlib import Path

import pytest

from tests.resume.test_forks import kill_sweeps


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_sweep_killed_at_every_event(tmp_path: Path) -> None:
    """Catches: a moment that one in seventeen does not meet."""
    moments = kill_sweeps(tmp_path, every=1)
    assert len(moments) > 50

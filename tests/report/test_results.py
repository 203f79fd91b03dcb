"""What an analysis hands over."""

from pathlib import Path

import pandas as pd
import pytest

from noisekit.core.errors import StorageError
from noisekit.report import Rule, Table
from tests.report.samples import result


def test_a_table_is_written_twice_with_the_same_content(tmp_path: Path) -> None:
    """Catches: an index column, or files by another name."""
    frame = pd.DataFrame({"arm": ["small", "large"], "value": [0.1, float("nan")]})
    paths = Table("noise", frame, "Noise.").save(tmp_path / "new" / "folder")
    assert [path.name for path in paths.values()] == ["noise.csv", "noise.parquet"]
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), frame)
    pd.testing.assert_frame_equal(pd.read_parquet(paths["parquet"]), frame)


def test_a_table_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    """Catches: a bare OSError without the table's name and what to do."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    table = Table("noise", pd.DataFrame({"a": [1]}), "Noise.")
    with pytest.raises(
        StorageError,
        match=r"table 'noise' needs a folder that can be written, got .*file.*"
        "Free some space or name another folder",
    ):
        table.save(blocked / "below")


def test_broken_rules_are_those_that_are_not_met() -> None:
    """Catches: the rules that are met."""
    rules = (Rule("a", True, ""), Rule("b", False, "why"), Rule("c", False, ""))
    assert [rule.name for rule in result(rules=rules).broken_rules] == ["b", "c"]

"""Readings as text, read back by somebody else's parser."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from noisekit.core.errors import StorageError
from noisekit.records import CsvSink, JsonLinesSink


@dataclass
class Reading:
    step: int
    more: dict[str, float | str | None] = field(default_factory=dict)

    def row(self) -> dict[str, float | str | None]:
        return {"step": self.step, "grad_sq_norm": self.step / 3, **self.more}


def test_csv_is_read_back_without_loss(tmp_path: Path) -> None:
    """Catches: a header per row, numbers cut to a few digits."""
    with CsvSink(tmp_path / "a.csv") as sink:
        for step in range(5):
            sink(Reading(step, {"note": 'a "quoted", odd\nnote'}))
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["grad_sq_norm"]) for row in rows] == [
        step / 3 for step in range(5)
    ]
    assert {row["note"] for row in rows} == {'a "quoted", odd\nnote'}


def test_lines_are_there_before_the_sink_is_closed(tmp_path: Path) -> None:
    """Catches: a buffer that a killed process takes with it."""
    sink = JsonLinesSink(tmp_path / "a.jsonl")
    sink(Reading(1))
    assert json.loads((tmp_path / "a.jsonl").read_text())["step"] == 1
    sink.close()


@pytest.mark.parametrize("kind", [CsvSink, JsonLinesSink])
def test_a_file_is_continued(
    tmp_path: Path, kind: type[CsvSink] | type[JsonLinesSink]
) -> None:
    """Catches: a second session that overwrites, or writes a second header."""
    for step in range(3):
        with kind(tmp_path / "a") as sink:
            sink(Reading(step))
    lines = (tmp_path / "a").read_text().splitlines()
    assert len(lines) == (4 if kind is CsvSink else 3)


def test_an_unfinished_line_is_dropped(tmp_path: Path) -> None:
    """Catches: a new row glued to half of an old one."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"st')
    with JsonLinesSink(path) as sink:
        sink(Reading(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        1,
        2,
    ]


def test_json_stays_json_where_there_is_no_number(tmp_path: Path) -> None:
    """Catches: NaN and Infinity, which strict parsers refuse."""
    with JsonLinesSink(tmp_path / "a.jsonl") as sink:
        sink(Reading(0, {"scale": math.nan, "other": math.inf}))
    text = (tmp_path / "a.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["scale"] is None


def test_csv_refuses_columns_that_come_later(tmp_path: Path) -> None:
    """Catches: values in the wrong columns, or silently left out."""
    with CsvSink(tmp_path / "a.csv") as sink:
        sink(Reading(0))
        with pytest.raises(StorageError, match="got also noise; write to another file"):
            sink(Reading(1, {"noise": 2.0}))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="name another file"):
        CsvSink(tmp_path)

"""Cells of tables and entries of the glossary, in the words and units of a reader."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from markupsafe import Markup
from pandas import DataFrame

from noisekit.core.vocabulary import QUANTITIES, Quantity
from noisekit.figures.theme import snapshot_words
from noisekit.report.results import AnalysisResult
from noisekit.report.typography import (
    NO_VALUE,
    number,
    sentence_case,
    spaced,
    symbol,
    typeset,
)

_WIDE = 36  # characters
_NUMERIC = re.compile(r"\s*[-+−<>×]?\s*[\[(]?[-+−]?[\d.]+")
_NAMED_COLUMNS = ("arm", "claim", "quantity", "treatment", "reference")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    numeric: bool

    @property
    def style(self) -> str:
        """Class of the cell: numbers to the right, long text over several lines."""
        return "num" if self.numeric else "wide" if len(self.text) > _WIDE else ""


def table_cells(
    frame: DataFrame, arms: Mapping[str, str]
) -> tuple[list[Cell], list[list[Cell]]]:
    """Return head and rows of a table; numbers are aligned to the right."""
    columns = [_column(frame, name, arms) for name in frame.columns]
    numeric = [all(_numeric(text) for text in column) for column in columns]
    head = [
        Cell(_heading(str(name)), is_numeric)
        for name, is_numeric in zip(frame.columns, numeric, strict=True)
    ]
    rows = [
        [Cell(text, right) for text, right in zip(row, numeric, strict=True)]
        for row in zip(*columns, strict=True)
    ]
    return head, rows


def glossary(results: Iterable[AnalysisResult]) -> list[tuple[Quantity, Markup]]:
    """Return the quantities that claims, figures and tables name."""
    named: set[str] = set()
    for result in results:
        named |= {
            name for item in result.claims for name in item.claim.statistic.quantities
        }
        for plot in result.plots:
            named |= _mentioned(plot.name, plot.table)
        for table in result.tables:
            named |= _mentioned(table.name, table.frame)
    return [
        (quantity, symbol(quantity.symbol))
        for name, quantity in QUANTITIES.items()
        if name in named
    ]


def _mentioned(name: str, frame: DataFrame) -> set[str]:
    words = {name, *(str(column) for column in frame.columns)}
    for column in frame.select_dtypes(exclude=["number", "bool"]):
        words.update(str(value) for value in frame[column].unique())
    return {re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in words}


def _arm(name: str, arms: Mapping[str, str]) -> str:
    return arms.get(name, spaced(name))


def _column(frame: DataFrame, name: str, arms: Mapping[str, str]) -> list[str]:
    values = frame[name].tolist()
    if name == "snapshot":
        return [snapshot_words(str(value)) for value in values]
    if name in _NAMED_COLUMNS:
        return [_named(str(value), arms) for value in values]
    return [_cell(value) for value in values]


def _named(name: str, arms: Mapping[str, str]) -> str:
    if name in QUANTITIES:
        return QUANTITIES[name].label
    return _arm(name, arms)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return number(value, digits=max(4, len(str(abs(value)))))
    if isinstance(value, float):
        return number(value, digits=4)
    if value is None:
        return NO_VALUE
    return typeset(str(value))


def _heading(name: str) -> str:
    known = QUANTITIES.get(name)
    if known is None:
        return sentence_case(spaced(name))
    return f"{known.label} [{known.unit}]" if known.unit else known.label


def _numeric(text: str) -> bool:
    return text == NO_VALUE or _NUMERIC.match(text) is not None

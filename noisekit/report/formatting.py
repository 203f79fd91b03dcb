"""Contrasts and table cells in the words and units of a reader."""

import math
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
    fixed,
    number,
    p_value,
    sentence_case,
    spaced,
    symbol,
    typeset,
)
from noisekit.stats import Contrast, ContrastResult

_WIDE = 36  # characters
_NUMERIC = re.compile(r"\s*[-+−<>×]?\s*[\[(]?[-+−]?[\d.]+")
_TIMES = "\u202f×"
_NAMED_COLUMNS = ("arm", "contrast", "quantity", "treatment", "reference")


@dataclass(frozen=True, slots=True)
class ContrastRow:
    """One line of the table of contrasts, all in words."""

    title: str
    quantity: str
    symbol: Markup
    treatment: str
    reference: str
    snapshot: str
    effect: str
    interval: str
    pairs: str
    margin: str
    verdict: str
    reason: str
    p_adjusted: str
    paper: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    numeric: bool

    @property
    def style(self) -> str:
        """Class of the cell: numbers to the right, long text over several lines."""
        return "num" if self.numeric else "wide" if len(self.text) > _WIDE else ""


def contrast_row(result: ContrastResult, arms: Mapping[str, str]) -> ContrastRow:
    """Return a contrast as a line of the table.

    Args:
        result: The contrast with its effect and verdict.
        arms: How text calls each arm.
    """
    contrast = result.contrast
    known = QUANTITIES.get(contrast.quantity)
    return ContrastRow(
        title=sentence_case(contrast.description or spaced(contrast.name)),
        quantity=known.label if known else spaced(contrast.quantity),
        symbol=symbol(known.symbol) if known else Markup(),
        treatment=_arm(contrast.treatment, arms),
        reference=_arm(contrast.reference, arms),
        snapshot=snapshot_words(contrast.snapshot),
        effect=_effect(result),
        interval=_interval(result),
        pairs=_pairs(result),
        margin=_margin(contrast),
        verdict=str(result.verdict),
        reason=typeset(result.reason),
        p_adjusted=p_value(result.p_adjusted),
        paper=typeset(contrast.paper),
        sentence=sentence_case(typeset(result.describe())),
    )


def table_cells(
    frame: DataFrame, arms: Mapping[str, str]
) -> tuple[list[Cell], list[list[Cell]]]:
    """Return head and rows of a table; what is a number stands to the right."""
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


def in_words(text: str, names: Mapping[str, str]) -> str:
    """Return ``text`` with each whole word that is a name replaced by what it means."""
    if not names:
        return typeset(text)
    pattern = rf"(?<![\w-])({'|'.join(map(re.escape, names))})(?![\w-])"
    return typeset(re.sub(pattern, lambda match: names[match[0]], text))


def names_of(
    results: Iterable[AnalysisResult], arms: Mapping[str, str]
) -> dict[str, str]:
    """Return what names of arms, contrasts, snapshots and quantities stand for."""
    names = {
        name: quantity.label for name, quantity in QUANTITIES.items() if "_" in name
    }
    for result in results:
        for item in result.contrasts:
            names[item.contrast.name] = f"“{spaced(item.contrast.name)}”"
            names[item.contrast.snapshot] = snapshot_words(item.contrast.snapshot)
    return names | {name: label for name, label in arms.items() if name}


def glossary(results: Iterable[AnalysisResult]) -> list[tuple[Quantity, Markup]]:
    """Return the quantities that contrasts, figures and tables speak of."""
    found: set[str] = set()
    for result in results:
        found |= {item.contrast.quantity for item in result.contrasts}
        for plot in result.plots:
            found |= _mentioned(plot.name, plot.table)
        for table in result.tables:
            found |= _mentioned(table.name, table.frame)
    return [
        (quantity, symbol(quantity.symbol))
        for name, quantity in QUANTITIES.items()
        if name in found
    ]


def _mentioned(name: str, frame: DataFrame) -> set[str]:
    words = {name, *(str(column) for column in frame.columns)}
    for column in frame.select_dtypes(exclude=["number", "bool"]):
        words.update(str(value) for value in frame[column].unique())
    return {re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in words}


def _arm(name: str, arms: Mapping[str, str]) -> str:
    return arms.get(name, spaced(name))


def _effect(result: ContrastResult) -> str:
    if math.isnan(result.effect):
        return NO_VALUE
    if result.contrast.scale == "ratio":
        return f"{number(result.effect, pad=True)}{_TIMES}"
    factor, unit = _unit(result.contrast)
    return f"{fixed(factor * result.effect, _places(result))} {unit}".rstrip()


def _interval(result: ContrastResult) -> str:
    if not result.interval.bounded:
        return NO_VALUE
    ends = result.interval.low, result.interval.high
    if result.contrast.scale == "ratio":
        low, high = (number(end, pad=True) for end in ends)
    else:
        factor, places = _unit(result.contrast)[0], _places(result)
        low, high = (fixed(factor * end, places) for end in ends)
    return f"{low} to {high}"


def _places(result: ContrastResult) -> int:
    """Return decimals that leave two digits of the interval's half-width."""
    half = _unit(result.contrast)[0] * (result.interval.high - result.interval.low) / 2
    if not (math.isfinite(half) and half > 0):
        return 2
    return min(6, max(0, 1 - math.floor(math.log10(half))))


def _margin(contrast: Contrast) -> str:
    if contrast.scale == "ratio":
        return f"{number(contrast.margin)}{_TIMES}"
    factor, unit = _unit(contrast)
    return f"{number(factor * contrast.margin)} {unit}".rstrip()


def _unit(contrast: Contrast) -> tuple[float, str]:
    known = QUANTITIES.get(contrast.quantity)
    unit = known.unit if known else ""
    return (100.0, "points") if unit == "fraction" else (1.0, unit)


def _pairs(result: ContrastResult) -> str:
    missing = f", {result.num_missing} missing" if result.num_missing else ""
    noun = "pair" if result.num_pairs == 1 else "pairs"
    return f"{result.num_pairs} {noun}{missing}"


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

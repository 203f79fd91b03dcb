"""Results of an audit: one row for each package and quantity."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from noisekit.auditing.known_defects import Explanation

if TYPE_CHECKING:
    import pandas as pd


class AuditVerdict(StrEnum):
    """How an answer compares with the reference."""

    REFERENCE = "reference"
    AGREES = "agrees"
    EXPLAINED = "explained"
    """It differs, and a known defect gives the same number."""
    UNEXPLAINED = "unexplained"
    FAILED = "failed"
    ABSENT = "not installed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One package's answer to one question.

    Attributes:
        quantity: What was asked.
        source: Who answered.
        verdict: How the answer compares with the reference.
        value: The answer; NaN where there is none.
        deviation: Relative difference from the reference; NaN where there is none.
        allowed: Largest difference that counts as agreement, relative.
        explanations: Known defects that give this very number.
        num_passes: Times that the data were gone through.
        seconds: Wall time [s].
        note: What else is to be known: an exception, how to install, a flag.
    """

    quantity: str
    source: str
    verdict: AuditVerdict
    value: float
    deviation: float
    allowed: float
    explanations: tuple[Explanation, ...]
    num_passes: int
    seconds: float
    note: str

    @property
    def reason(self) -> str:
        """Explanations and note as one text."""
        remarks = [
            f"{e.sentence} (recomputed: {e.recomputed:.5g})" for e in self.explanations
        ]
        return "; ".join([*remarks, *([self.note] if self.note else [])])


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Answers of several packages to the same questions.

    Attributes:
        rows: One for each package and quantity.
        num_params: Parameters measured.
        num_examples: Examples behind the loss.
        num_batches: Their batches.
    """

    rows: tuple[AuditRow, ...] = field(repr=False)
    num_params: int
    num_examples: int
    num_batches: int

    @property
    def unexplained(self) -> tuple[AuditRow, ...]:
        """Answers that differ from the reference for no known reason."""
        return tuple(r for r in self.rows if r.verdict is AuditVerdict.UNEXPLAINED)

    def frame(self) -> "pd.DataFrame":
        """Return a table with a row for each answer."""
        import pandas as pd

        return pd.DataFrame(
            {
                "quantity": row.quantity,
                "source": row.source,
                "value": row.value,
                "deviation": row.deviation,
                "verdict": str(row.verdict),
                "num_passes": row.num_passes,
                "seconds": row.seconds,
                "reason": row.reason,
            }
            for row in self.rows
        )

    def __str__(self) -> str:
        """Write the table, with the reasons below the rows that have one."""
        lines = [
            f"{self.num_params} parameters, {self.num_examples} examples in "
            f"{self.num_batches} batches",
            f"{'quantity':11s} {'by':28s} {'value':>11s} {'off by':>8s} "
            f"{'passes':>6s} {'seconds':>8s}  verdict",
        ]
        for row in self.rows:
            lines.append(
                f"{row.quantity:11s} {row.source:28s} {_number(row.value, '.5g', 11)} "
                f"{_number(100 * row.deviation, '.3g', 7, '%')} {row.num_passes:6d} "
                f"{row.seconds:8.3f}  {row.verdict}"
            )
            if row.reason:
                lines.append(f"{'':12s}{row.reason}")
        return "\n".join(lines)


def _number(value: float, form: str, width: int, unit: str = "") -> str:
    """A number in a column, blank where there is none."""
    known = value == value
    return (f"{value:{form}}" if known else "").rjust(width) + (
        unit if known else " " * len(unit)
    )

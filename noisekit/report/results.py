"""Results of an analysis, and the provenance of the runs behind it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pandas import DataFrame

from noisekit.figures import Plot, writable_folder, write_table
from noisekit.report.claim_words import sentence
from noisekit.stats import ClaimResult


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a fair test.

    Attributes:
        name: The rule, as a statement that should hold.
        met: Whether it does.
        detail: The evidence.
    """

    name: str
    met: bool
    detail: str


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table and what to write above it.

    Attributes:
        name: Stem of its files.
        frame: The numbers.
        caption: What they are and how they were made.
    """

    name: str
    frame: DataFrame
    caption: str

    def save(self, directory: Path | str) -> dict[str, Path]:
        """Write CSV and Parquet and return their paths by ending.

        Raises:
            StorageError: If the folder cannot be written to.
        """
        with writable_folder(directory, what=f"table {self.name!r}") as folder:
            return write_table(self.frame, folder, self.name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnalysisResult:
    """The result of one analysis.

    Attributes:
        name: Name of the analysis.
        question: What was asked.
        answer: The answer, a line a statement; a statement too where there is none.
        rules: Rules of a fair test, met or broken.
        claims: Claims with effects and verdicts.
        arms: The name under which each arm is shown.
        plots: Figures, the most telling first.
        tables: Tables.
        warnings: What a reader must know before using the numbers.
    """

    name: str
    question: str
    answer: str
    rules: tuple[Rule, ...] = ()
    claims: tuple[ClaimResult, ...] = ()
    arms: Mapping[str, str] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """Each claim with its interval and verdict in a sentence."""
        return tuple(sentence(result, self.arms) for result in self.claims)

    @property
    def broken_rules(self) -> tuple[Rule, ...]:
        """The rules that do not hold."""
        return tuple(rule for rule in self.rules if not rule.met)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Provenance:
    """Where the numbers of a report come from.

    Attributes:
        title: Name of the experiment and profile, or of the directory.
        arms: How figures and text call each arm.
        runs: One row per run, with its status.
        recipe: The recipe, as text.
        source: The papers that the experiment rests on, as the recipe names them.
        data: What is known of the data: name, origin, digest.
        versions: Versions of the software.
        host: Facts of the machine.
        costs: Kind of cost and amount, in words.
        commands: How to reproduce the report, one command a line.
        faults: What could not be read, or should not be trusted.
    """

    title: str
    arms: Mapping[str, str] = field(default_factory=dict)
    runs: Table | None = None
    recipe: str = ""
    source: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    host: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

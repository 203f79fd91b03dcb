"""One self-contained HTML page: its content in order, and the file."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from noisekit.core.errors import StorageError
from noisekit.core.vocabulary import Quantity
from noisekit.figures import FORMATS
from noisekit.records.files import write_bytes_atomic
from noisekit.report.claim_words import ClaimRow, broken, claim_rows, failed_check
from noisekit.report.formatting import Cell, glossary, table_cells
from noisekit.report.inline_svg import inline_svg
from noisekit.report.methods import method_sentences, references
from noisekit.report.results import AnalysisResult, Provenance, Rule, Table
from noisekit.report.typography import typeset
from noisekit.stats import Claim

_LONG_TABLE = 24  # rows; a longer one scrolls inside its frame
_WIDEST = 40  # characters of a cell, beyond which its text breaks
_SCREENS = ((110, "any-screen"), (80, "medium-screen"), (36, "small-screen"))
"""Width of a table in characters, and the screens on which it then scrolls."""


@dataclass(frozen=True, slots=True)
class Link:
    """A file beside the report."""

    label: str
    href: str


@dataclass(frozen=True, slots=True)
class FigureView:
    """A figure of the page."""

    anchor: str
    number: int
    caption: str
    svg: Markup
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class TableView:
    """A table of the page."""

    anchor: str
    number: int | None
    caption: str
    head: list[Cell]
    rows: list[list[Cell]]
    long: bool
    hint: str
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Article:
    """One analysis of the page."""

    anchor: str
    question: str
    answer: tuple[str, ...]
    rules: tuple[Rule, ...]
    warnings: tuple[str, ...]
    alarms: tuple[str, ...]
    primary: tuple[ClaimRow, ...]
    descriptive: tuple[ClaimRow, ...]
    checks: tuple[ClaimRow, ...]
    figures: tuple[FigureView, ...]
    tables: tuple[TableView, ...]

    @property
    def broken(self) -> tuple[Rule, ...]:
        """The rules that do not hold."""
        return tuple(rule for rule in self.rules if not rule.met)

    @property
    def met(self) -> tuple[Rule, ...]:
        """The rules that hold."""
        return tuple(rule for rule in self.rules if rule.met)

    @property
    def claims(self) -> tuple[ClaimRow, ...]:
        """All claims, the primary ones first, checks of the instrument last."""
        return self.primary + self.descriptive + self.checks


@dataclass(frozen=True, slots=True)
class Page:
    """All that the template shows."""

    articles: tuple[Article, ...]
    provenance: Provenance
    faults: tuple[str, ...]
    runs: TableView | None
    methods: tuple[str, ...]
    glossary: list[tuple[Quantity, Markup]]
    references: str


def build_report(
    results: Sequence[AnalysisResult], provenance: Provenance, out: Path | str
) -> Path:
    """Write the report as one HTML file and return its path.

    The first result leads the page, the others follow in order. Figures are part of
    the file; links to files under ``analyses/<name>/`` beside it are made for those
    that are there. Whatever came from a file is escaped.

    Args:
        results: Results of the analyses; none for runs that claim nothing.
        provenance: Where the numbers come from.
        out: The file; one that is there is replaced as a whole.

    Raises:
        StorageError: If the file cannot be written; one that was there stays.
    """
    path = Path(out)
    page = page_of(results, provenance, beside=path.parent)
    return write_page("template.html.j2", page, path)


def write_page(template: str, page: object, path: Path) -> Path:
    """Write a template, filled with a page, as a file, and return its path.

    Raises:
        StorageError: If the file cannot be written; one that was there stays.
    """
    text = _environment().get_template(template).render(page=page)
    try:
        write_bytes_atomic(path, text.encode())
    except StorageError as error:
        raise StorageError(
            f"the report needs a file that can be written, got {path}: "
            f"{error.__cause__}. Free some space or name another file."
        ) from error
    return path


def page_of(
    results: Sequence[AnalysisResult], provenance: Provenance, *, beside: Path
) -> Page:
    """Return all that the template shows.

    Args:
        results: Results of the analyses.
        provenance: Where the numbers come from.
        beside: Folder of the report, in which linked files are looked for.
    """
    figures, tables = count(1), count(1)
    articles = tuple(
        Article(
            anchor=f"analysis-{place}",
            question=result.question or result.name,
            answer=tuple(map(typeset, result.answer.splitlines())),
            rules=tuple(map(_rule, result.rules)),
            warnings=tuple(map(typeset, result.warnings)),
            alarms=_alarms(result, provenance),
            primary=_claims(result, provenance, "primary", _prefix(place)),
            descriptive=_claims(result, provenance, "descriptive", _prefix(place)),
            checks=_claims(result, provenance, "check", _prefix(place)),
            figures=tuple(_figures(result, figures, beside)),
            tables=tuple(_tables(result, tables, provenance, beside)),
        )
        for place, result in enumerate(results, start=1)
    )
    terms = glossary(results)
    quantities = [quantity for quantity, _ in terms]
    shown = {warning for result in results for warning in result.warnings}
    return Page(
        articles=articles,
        provenance=provenance,
        faults=tuple(fault for fault in provenance.faults if fault not in shown),
        runs=_table(provenance.runs, "runs", provenance) if provenance.runs else None,
        methods=method_sentences(results, quantities),
        glossary=terms,
        references=references(provenance, quantities),
    )


def _rule(rule: Rule) -> Rule:
    return Rule(typeset(rule.name), rule.met, typeset(rule.detail))


def _claims(
    result: AnalysisResult, provenance: Provenance, family: str, prefix: str
) -> tuple[ClaimRow, ...]:
    rows = claim_rows(result.claims, provenance.arms, prefix=prefix)
    return tuple(
        row
        for row, item in zip(rows, result.claims, strict=True)
        if _family(item.claim) == family
    )


def _prefix(place: int) -> str:
    """Return what tells apart the anchors of a claim that a second analysis shows."""
    return "claim-" if place == 1 else f"analysis-{place}-claim-"


def _family(claim: Claim) -> str:
    if claim.kind != "claim":
        return "check"
    return "primary" if claim.primary else "descriptive"


def _alarms(result: AnalysisResult, provenance: Provenance) -> tuple[str, ...]:
    """Return the checks of the instrument that did not come out as they must."""
    return tuple(
        failed_check(item, provenance.arms) for item in result.claims if broken(item)
    )


def _figures(
    result: AnalysisResult, numbers: Iterator[int], beside: Path
) -> Iterator[FigureView]:
    for plot, number in zip(result.plots, numbers, strict=False):
        anchor = f"figure-{number}"
        yield FigureView(
            anchor=anchor,
            number=number,
            caption=typeset(plot.caption),
            svg=inline_svg(
                plot.rendered("svg"), prefix=f"{anchor}-", label=plot.caption
            ),
            links=_links(result.name, plot.name, FORMATS, beside),
        )


def _tables(
    result: AnalysisResult,
    numbers: Iterator[int],
    provenance: Provenance,
    beside: Path,
) -> Iterator[TableView]:
    for table, number in zip(result.tables, numbers, strict=False):
        links = _links(result.name, table.name, ("csv", "parquet"), beside)
        yield _table(table, f"table-{number}", provenance, number=number, links=links)


def _table(
    table: Table,
    anchor: str,
    provenance: Provenance,
    *,
    number: int | None = None,
    links: tuple[Link, ...] = (),
) -> TableView:
    head, rows = table_cells(table.frame, provenance.arms)
    return TableView(
        anchor=anchor,
        number=number,
        caption=typeset(table.caption),
        head=head,
        rows=rows,
        long=len(rows) > _LONG_TABLE,
        hint=_scroll_hint(head, rows),
        links=links,
    )


def _scroll_hint(head: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> str:
    """Return on which screens the table is wider than the page, for its hint."""
    widths = [
        max(min(len(cell.text), _WIDEST) for cell in column)
        for column in zip(head, *rows, strict=True)
    ]
    width = sum(widths) + 2 * len(widths)  # characters, gaps included
    return next((name for least, name in _SCREENS if width > least), "")


def _links(
    analysis: str, stem: str, endings: Iterable[str], beside: Path
) -> tuple[Link, ...]:
    """Return links to those files of a figure or table that are there."""
    folder = Path("analyses") / analysis
    paths = {ending: folder / f"{stem}.{ending}" for ending in endings}
    return tuple(
        Link(
            ending.upper() if len(ending) < 4 else ending.capitalize(), quote(str(path))
        )
        for ending, path in paths.items()
        if (beside / path).is_file()
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("noisekit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

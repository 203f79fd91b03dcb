"""What a recipe plans, shown before anything runs: changes, their figure, and power."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from rich.table import Table
from rich.text import Text

from noisekit import figures
from noisekit.cli.terminal import cell
from noisekit.records import Runs, factor_cell, open_runs
from noisekit.records.files import make_directory
from noisekit.report.comparability import spread_of
from noisekit.report.recipe_view import stated_claims
from noisekit.stats import Claim, half_width, pairs_needed
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.timeline import Change, curve, timeline

_UNKNOWN = "-"
_PLACES = ("update", "examples", "epoch")
_COLUMNS = (*_PLACES, "batch", "rate", "momentum", "microbatch")
_LEVEL = 0.95


def timeline_tables(recipe: Recipe) -> Iterator[Table]:
    """Yield a table of the changes of each arm, and one of the arms without any.

    Arms with the same changes share a table.
    """
    sharing: dict[tuple[Change, ...], list[str]] = {}
    for spec in _one_seed(recipe):
        sharing.setdefault(tuple(timeline(spec)), []).append(spec.arm)
    constant = []
    for changes, arms in sharing.items():
        if _nothing_changes(changes):
            constant += [(changes[-1], arm) for arm in arms]
        else:
            rows = [(change, change.reason) for change in changes]
            yield _compact_table(", ".join(arms), rows, "what changes")
    if constant:
        yield _compact_table("Nothing changes in these arms", constant, "arm")


def _nothing_changes(changes: Sequence[Change]) -> bool:
    """Whether there are but a start and an end, both known, and equal.

    A rate that changes continuously, and a batch size that follows readings, have no
    row of their own between the two.
    """
    settings = {_cells(change)[len(_PLACES) :] for change in changes}
    known = changes[0].batch_size is not None
    return len(changes) == 2 and len(settings) == 1 and known


def _compact_table(title: str, rows: Sequence[tuple[Change, str]], last: str) -> Table:
    """Return a table of changes, each with a word; numbers are never cut.

    Columns that are the same in every row are in the title, and a microbatch that is
    the batch is left out.
    """
    cells = [_cells(change) for change, _ in rows]
    values = dict(zip(_COLUMNS, zip(*cells, strict=True), strict=True))
    if values["microbatch"] == values["batch"]:
        del values["microbatch"]
    same = [
        f"{name} {column[0]}"
        for name, column in values.items()
        if name not in _PLACES and len(set(column)) == 1
    ]
    shown = [
        name
        for name, column in values.items()
        if name in _PLACES or len(set(column)) > 1
    ]
    heading = f"{title}: {', '.join(same)}" if same else title
    table = Table(title=Text(heading), title_justify="left")
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last, overflow="fold")
    for number, (_, word) in enumerate(rows):
        table.add_row(*(cell(values[name][number]) for name in shown), cell(word))
    return table


def timeline_figure(recipe: Recipe, folder: Path) -> list[Path]:
    """Draw what the arms plan and return the paths of the PNG, SVG and PDF."""
    specs = list(_one_seed(recipe))
    settings = pd.DataFrame(
        {"arm": spec.arm, **asdict(row)} for spec in specs for row in curve(spec)
    ).rename(columns={"update": "step"})
    styles = figures.arm_styles(
        pd.DataFrame(
            {
                **{name: factor_cell(value) for name, value in spec.factors.items()},
                "run_id": spec.run_id,
                "arm": spec.arm,
            }
            for spec in specs
        )
    )
    make_directory(folder)
    paths = figures.timeline(settings, styles=styles).save(folder)
    return [paths[ending] for ending in ("png", "svg", "pdf")]


def power_table(recipe: Recipe, spread_from: Path | None) -> Table:
    """Return how narrow each claim's interval will be, against its margin.

    Identities and controls are left out: they pass or fail.

    Args:
        recipe: The experiment.
        spread_from: A recorded set of runs whose spread over seeds stands for the
            spread of those to come; unknown without one.
    """
    runs = None if spread_from is None else open_runs(spread_from)
    table = Table(title="Power", title_justify="left")
    table.add_column("claim")
    table.add_column("quantity")
    for column in ("seeds", "spread", "half width", "margin"):
        table.add_column(column, justify="right")
    table.add_column("so", overflow="fold")
    claims = [claim for claim in recipe.stated_claims() if claim.kind == "claim"]
    primary = sum(claim.primary for claim in claims)
    for claim in claims:
        level = 1 - (1 - _LEVEL) / (primary if claim.primary else 1)
        seeds = recipe.num_seeds(claim)
        spread, source = _spread(runs, claim)
        name = f"{claim.name} (primary)" if claim.primary else claim.name
        row = (name.replace("_", " "), claim.quantity.replace("_", " "), str(seeds))
        numbers = _power_cells(claim, spread, seeds=seeds, level=level)
        table.add_row(*map(cell, (*row, *numbers[:-1], f"{numbers[-1]}{source}")))
    return table


def _one_seed(recipe: Recipe) -> Iterator[RunSpec]:
    """Yield one run of each arm: seeds do not differ in what is planned."""
    known = set()
    for spec in recipe.run_specs():
        if spec.arm not in known:
            known.add(spec.arm)
            yield spec


def _cells(change: Change) -> tuple[str, ...]:
    """Return the numbers of a change, in the order of the columns."""
    return (
        _number(change.update, ",.0f"),
        _number(change.examples, ",.0f"),
        _number(change.epoch, ".6g"),
        _number(change.batch_size, ",.0f"),
        _number(change.learning_rate, ".6g"),
        _number(change.momentum, ".6g"),
        _number(change.microbatch, ",.0f"),
    )


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def _spread(runs: Runs | None, claim: Claim) -> tuple[float | None, str]:
    """Return the spread of a claim in recorded runs, and where it was taken."""
    if runs is None:
        return None, ""
    own = spread_of(runs, claim)
    if own is not None:
        return own, ""
    for other in stated_claims(runs):
        alike = (other.quantity, other.scale, other.statistic.name) == (
            claim.quantity,
            claim.scale,
            claim.statistic.name,
        )
        spread = spread_of(runs, other) if alike else None
        if spread is not None:
            return spread, f" (spread of {other.name!r})"
    return None, ""


def _power_cells(
    claim: Claim, spread: float | None, *, seeds: int, level: float
) -> tuple[str, str, str, str]:
    """Return spread, half width and margin, and what follows, in words."""
    ratio = claim.scale == "ratio"
    margin = math.log(claim.margin) if ratio else claim.margin

    def shown(value: float) -> str:
        return f"x{math.exp(value):.3g}" if ratio else f"{value:.3g}"

    if spread is None:
        return _UNKNOWN, _UNKNOWN, shown(margin), "unknown: no spread is stated"
    width = half_width(spread, seeds, level=level)
    if not math.isfinite(width):
        words = "no interval: it needs two seeds"
        return shown(spread), _UNKNOWN, shown(margin), words
    words = "resolves the margin"
    if width > margin:
        needed = pairs_needed(spread, margin, level=level)
        fewest = "more than 100,000" if needed is None else f"{needed:,}"
        words = f"wider than the margin: {fewest} seeds would resolve it"
    return shown(spread), shown(width), shown(margin), words

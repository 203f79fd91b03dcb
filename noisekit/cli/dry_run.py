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

    Arms with the same changes share a table. What stays the same throughout an arm
    stands in the table's title.
    """
    sharing: dict[tuple[Change, ...], list[str]] = {}
    for spec in _one_seed(recipe):
        sharing.setdefault(tuple(timeline(spec)), []).append(spec.arm)
    constant = {changes: arms for changes, arms in sharing.items() if len(changes) == 2}
    for changes, arms in sharing.items():
        if changes not in constant:
            yield _changes_table(changes, ", ".join(arms))
    if constant:
        table = _table("Nothing changes in these arms", [*_COLUMNS, "arm"])
        for (_, end), arms in constant.items():
            for arm in arms:
                table.add_row(*map(cell, (*_cells(end), arm)))
        yield table


def _changes_table(changes: Sequence[Change], arms: str) -> Table:
    rows = [_cells(change) for change in changes]
    values = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True))
    hidden = {"microbatch"} if values["microbatch"] == values["batch"] else set()
    shown = [
        name
        for name in _COLUMNS
        if name in _PLACES or (len(set(values[name])) > 1 and name not in hidden)
    ]
    rest = [name for name in _COLUMNS if name not in shown and name not in hidden]
    same = [f"{name} {values[name][0]}" for name in rest]
    title = f"{arms}: {', '.join(same)}" if same else arms
    table = _table(title, [*shown, "what changes"])
    for change, *numbers in zip(
        changes, *(values[name] for name in shown), strict=True
    ):
        table.add_row(*map(cell, (*numbers, change.reason)))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    """Return a table of numbers, which are never cut, and one last column of words."""
    table = Table(title=Text(title), title_justify="left")
    for column in columns[:-1]:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
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

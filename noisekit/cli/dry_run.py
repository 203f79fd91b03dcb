"""What a recipe plans, shown before anything runs: changes, their figure, and power."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from rich.table import Table

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
_LEVEL = 0.95


def timeline_table(recipe: Recipe) -> Table:
    """Return every change of each arm; arms with the same ones are listed once."""
    table = Table(title="Timeline", title_justify="left")
    table.add_column("arm", overflow="fold")
    for column in ("update", "examples", "epoch", "batch", "rate", "momentum"):
        table.add_column(column, justify="right")
    table.add_column("microbatch", justify="right")
    table.add_column("what changes", overflow="fold")
    sharing: dict[tuple[Change, ...], list[str]] = {}
    for spec in _one_seed(recipe):
        sharing.setdefault(tuple(timeline(spec)), []).append(spec.arm)
    for changes, arms in sharing.items():
        name = "\n".join(arms)
        for number, change in enumerate(changes):
            table.add_row(cell("" if number else name), *map(cell, _cells(change)))
        table.add_section()
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
    for column in ("claim", "quantity", "seeds", "spread", "half width", "margin"):
        table.add_column(column, overflow="fold")
    table.add_column("so", overflow="fold")
    claims = [claim for claim in recipe.stated_claims() if claim.kind == "claim"]
    primary = sum(claim.primary for claim in claims)
    for claim in claims:
        level = 1 - (1 - _LEVEL) / (primary if claim.primary else 1)
        seeds = recipe.num_seeds(claim)
        spread, source = _spread(runs, claim)
        name = f"{claim.name} (primary)" if claim.primary else claim.name
        row = (name, claim.quantity, str(seeds))
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
    return (
        _number(change.update, ",.0f"),
        _number(change.examples, ",.0f"),
        _number(change.epoch, ".6g"),
        _number(change.batch_size, ",.0f"),
        _number(change.learning_rate, ".6g"),
        _number(change.momentum, ".6g"),
        _number(change.microbatch, ",.0f"),
        change.reason,
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

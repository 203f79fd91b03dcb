"""The runs behind a report: what made them and what they cost."""

from collections.abc import Mapping
from datetime import datetime

import tomli_w

from noisekit.figures import arm_styles
from noisekit.records import Runs
from noisekit.report.recipe_view import title
from noisekit.report.results import Provenance, Table

_COSTS = {
    "train_seconds": ("training, summed over runs", "s"),
    "measure_seconds": ("measuring, summed over runs", "s"),
    "updates": ("updates", ""),
    "num_grads": ("gradient evaluations of the risk", ""),
    "num_matvecs": ("Hessian-vector products", ""),
}


def provenance_of(runs: Runs, *, analysis_seconds: float | None = None) -> Provenance:
    """Return where the numbers of a set of runs come from.

    Args:
        runs: The runs.
        analysis_seconds: Wall time of analysing and drawing [s], if measured.
    """
    first = runs.directories[0].manifest
    return Provenance(
        title=title(runs),
        arms={arm: style.label for arm, style in arm_styles(runs.runs).items()},
        runs=_run_table(runs),
        recipe=tomli_w.dumps(_without_none(runs.recipe)) if runs.recipe else "",
        source=str(runs.recipe.get("source", "")),
        data=dict(first.data),
        versions=dict(first.versions),
        host=dict(first.host),
        costs=_costs(runs, analysis_seconds),
        commands=_commands(runs.recipe.get("name"), runs.recipe.get("profile")),
        faults=tuple(runs.faults),
    )


def _run_table(runs: Runs) -> Table:
    """Return each run with its status and how far it got."""
    table = runs.runs[["run_id", "arm", "seed", "status", "reason"]]
    reached = runs.evaluations.groupby("run_id")[["epoch", "step"]].max()
    steps = runs.steps.groupby("run_id")["step"].max()
    reached["step"] = reached["step"].combine(steps, max, fill_value=0)
    frame = table.join(reached, on="run_id").dropna(axis="columns", how="all")
    return Table("runs", frame, "The runs, how far each got, and why it ended there.")


def _costs(runs: Runs, analysis_seconds: float | None) -> dict[str, str]:
    table = runs.runs
    result = {"runs": f"{len(table)}"}
    for column, (words, unit) in _COSTS.items():
        if column in table.columns:
            result[words] = f"{table[column].sum():,.0f} {unit}".rstrip()
    if not runs.recipe:
        result["wall time of the loop"] = f"{_loop_seconds(runs):,.0f} s"
    if analysis_seconds is not None:
        result["analysing and drawing"] = f"{analysis_seconds:,.0f} s"
    return result


def _loop_seconds(runs: Runs) -> float:
    """Return seconds from the first to the last write, summed over recorded loops."""
    manifests = [run.manifest for run in runs.directories]
    spans = [
        datetime.fromisoformat(m.updated) - datetime.fromisoformat(m.created)
        for m in manifests
    ]
    return sum(span.total_seconds() for span in spans)


def _commands(name: object, profile: object) -> tuple[str, ...]:
    if not name:
        return ("noisekit report DIR",)
    chosen = f" --profile {profile}" if profile else ""
    return (
        f"noisekit run {name}{chosen} --out DIR",
        "noisekit report DIR",
    )


def _without_none(value: object) -> dict[str, object]:
    """Return a recipe without its empty keys, which TOML cannot write."""
    assert isinstance(value, Mapping)
    return {key: _written(item) for key, item in value.items() if item is not None}


def _written(value: object) -> object:
    if isinstance(value, Mapping):
        return _without_none(value)
    if isinstance(value, list | tuple):
        return [_written(item) for item in value if item is not None]
    return value

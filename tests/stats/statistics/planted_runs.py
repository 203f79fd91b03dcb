"""Tables of runs whose statistics are known."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from noisekit.stats import RunTables

Height = Callable[[dict[str, float], int], Mapping[str, float]]
"""Quantities of a run at its end, by its factors and its seed."""
Curve = Callable[[dict[str, float], int], Mapping[str, np.ndarray]]
"""Columns along a run, by its factors and its seed."""


def grid(
    factors: Mapping[str, Sequence[float]],
    height: Height,
    *,
    seeds: int = 5,
    curve: Curve | None = None,
    diverged: Callable[[dict[str, float], int], bool] = lambda settings, seed: False,
) -> RunTables:
    """Return runs of every combination at every seed; a diverged run has no end."""
    runs, ends, along = [], [], []
    for seed in range(seeds):
        for values in itertools.product(*factors.values()):
            settings = dict(zip(factors, map(float, values), strict=True))
            arm = "/".join(f"{key}={value:g}" for key, value in settings.items())
            blown_up = diverged(settings, seed)
            where = {"run_id": f"{arm}-{seed}", "arm": arm, "seed": seed}
            status = "diverged" if blown_up else "done"
            runs.append({**settings, **where, "status": status})
            if not blown_up:
                ends.append({**where, "snapshot": "final", **height(settings, seed)})
            if curve is not None:
                along.append((where, curve(settings, seed)))
    return RunTables(
        pd.DataFrame(runs), pd.DataFrame(ends), evaluations=_below_each_other(along)
    )


def _below_each_other(
    parts: Sequence[tuple[Mapping[str, object], Mapping[str, np.ndarray]]],
) -> pd.DataFrame:
    """Return the curves of all runs as one table."""
    if not parts:
        return pd.DataFrame()
    names = list(parts[0][1])
    counts = [len(columns[names[0]]) for _, columns in parts]
    table = {name: np.concatenate([c[name] for _, c in parts]) for name in names}
    for key in ("run_id", "arm", "seed"):
        table[key] = np.repeat([where[key] for where, _ in parts], counts)
    return pd.DataFrame(table)

"""Tables that check the instrument, or an interval by another way."""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from noisekit.core.results import Interval
from noisekit.records import Runs
from noisekit.report.comparability import correct_answers
from noisekit.stats import (
    Contrast,
    contrast_titles,
    crossed_difference,
    hierarchical_bootstrap,
    paired_effect,
)


def image_error_table(runs: Runs, contrasts: Iterable[Contrast]) -> pd.DataFrame:
    """Return differences of error rates with intervals over seeds, and over images.

    One row a contrast of which each image's outcome was recorded: the paired
    t-interval over seeds, the crossed analysis of seeds and images, and a bootstrap
    over both.
    """
    contrasts = tuple(contrasts)
    return pd.DataFrame(_image_error_rows(runs, contrasts))


def _image_error_rows(
    runs: Runs, contrasts: tuple[Contrast, ...]
) -> Iterator[dict[str, object]]:
    titles = contrast_titles(contrasts)
    for contrast in contrasts:
        answers = correct_answers(runs, contrast)
        if answers is None or contrast.scale != "difference":
            continue
        errors = [1 - correct.mean(axis=1) for correct in answers]
        crossed = crossed_difference(*answers)
        resampled = hierarchical_bootstrap(*answers, generator=np.random.default_rng(0))
        yield {
            "contrast": titles[contrast.name],
            "difference [points]": f"{100 * crossed.value:+.2f}",
            "seeds": _in_points(paired_effect(*errors).interval()),
            "seeds and images, crossed": _in_points(crossed.interval()),
            "seeds and images, bootstrap": _in_points(resampled.interval),
            "seeds x images": " x ".join(map(str, answers[0].shape)),
        }


def agreement_table(runs: Runs, ours: str, theirs: str) -> pd.DataFrame:
    """Return a second measurement of the same quantity over the first, and their cost.

    Args:
        runs: The runs.
        ours: Quantity below the line.
        theirs: The same quantity by another program, above the line.
    """
    table = runs.measurements
    keys = ["run_id", "arm", "snapshot"]
    first, second = (
        table.loc[table["quantity"] == name, [*keys, "value", "num_matvecs"]]
        for name in (ours, theirs)
    )
    both = first.merge(second, on=keys, suffixes=("", "_other"))
    both["ratio"] = both["value_other"] / both["value"]
    return pd.DataFrame(
        {
            "snapshot": snapshot,
            "arm": arm,
            "ratio": f"{rows['ratio'].median():.5f} "
            f"({rows['ratio'].min():.5f} to {rows['ratio'].max():.5f})",
            "products, noisekit": f"{rows['num_matvecs'].median():.0f}",
            "products, other": f"{rows['num_matvecs_other'].median():.0f}",
        }
        for (snapshot, arm), rows in both.groupby(["snapshot", "arm"], sort=False)
    )


def _in_points(ends: Interval) -> str:
    return f"[{100 * ends.low:+.2f}, {100 * ends.high:+.2f}]"

"""Squared gradient norms against batch size: an identity, to the last digit."""

import itertools
import math

import numpy as np
import pytest
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.core.vocabulary import quantity
from noisekit.figures import grad_sq_norm_against_batch_size
from tests.figures import samples


def every_batch(grads: np.ndarray) -> tuple[DataFrame, DataFrame]:
    """Return all batches without replacement of a few gradients, and their moments."""
    rows = [
        {"arm": "a", "batch_size": size, "grad_sq_norm": (mean**2).sum()}
        for size in range(1, len(grads) + 1)
        for chosen in itertools.combinations(range(len(grads)), size)
        for mean in [grads[list(chosen)].mean(axis=0)]
    ]
    full = grads.mean(axis=0)
    moments = {
        "arm": "a",
        "grad_sq_norm": (full**2).sum(),
        "variance_trace": grads.var(axis=0, ddof=1).sum(),
    }
    return DataFrame(rows), DataFrame([moments])


def test_the_line_is_the_mean_over_all_batches() -> None:
    """Catches: a debiased squared norm, or n in the covariance's denominator.

    Also: no correction for drawing without replacement.
    """
    grads = np.random.default_rng(0).normal(0.3, 1.0, size=(6, 3))
    draws, moments = every_batch(grads)
    table = grad_sq_norm_against_batch_size(draws, moments, num_examples=6).table
    means = table[table["kind"] == "mean"]
    line = table[table["kind"] == "expected"]
    for size, value in means[["batch_size", "value"]].to_numpy():
        if size in (1.0, 6.0):  # the line's own points
            at = line[np.isclose(line["batch_size"], size)]
            assert at["value"].to_numpy() == pytest.approx([value], rel=1e-12)
    inner = np.interp(
        1 / means["batch_size"][1:5], 1 / line["batch_size"][::-1], line["value"][::-1]
    )
    assert inner == pytest.approx(means["value"][1:5].to_numpy(), rel=1e-9)


def test_a_gradient_of_zero_counts_in_the_mean() -> None:
    """Catches: zeros dropped for the log axis, which raises the mean."""
    draws, moments = samples.batch_draws(num_draws=4)
    first = draws.query("arm == 'start' and batch_size == 8").index
    draws.loc[first, "grad_sq_norm"] = [0.0, 0.0, 0.0, 4.0]
    plot = grad_sq_norm_against_batch_size(draws, moments, num_examples=1024)
    [mean] = plot.table.query("kind == 'mean' and arm == 'start' and batch_size == 8")[
        "value"
    ]
    assert mean == 1.0
    assert "Left out" not in plot.caption


def test_the_summed_loss_is_the_mean_loss_times_the_square() -> None:
    """Catches: B instead of B squared."""
    draws, moments = samples.batch_draws()
    plot = grad_sq_norm_against_batch_size(draws, moments, num_examples=1024)
    left, right = plot.figure.axes
    for mean, summed in zip(left.lines, right.lines, strict=True):
        sizes = np.asarray(mean.get_xdata())
        want = sizes**2 * np.asarray(mean.get_ydata())
        assert np.asarray(summed.get_ydata()) == pytest.approx(want)


def test_labels_and_ticks() -> None:
    """Catches: labels by hand; ticks at 10 and 100 for batches of 8 and 16."""
    draws, moments = samples.batch_draws()
    plot = grad_sq_norm_against_batch_size(draws, moments, num_examples=1024)
    left, _ = plot.figure.axes
    assert left.get_xlabel() == quantity("batch_size").axis_label
    assert left.get_ylabel().replace("\n", " ") == quantity("grad_sq_norm").axis_label
    assert list(left.xaxis.get_major_locator()()) == sorted(set(draws["batch_size"]))


def test_the_caption_counts_draws_that_overflowed() -> None:
    """Catches: draws dropped in silence."""
    draws, moments = samples.batch_draws()
    draws.loc[:1, "grad_sq_norm"] = [math.inf, math.nan]
    plot = grad_sq_norm_against_batch_size(draws, moments, num_examples=1024)
    assert "Left out: 2 draws" in plot.caption


def test_an_arm_without_moments_is_refused() -> None:
    """Catches: dots without the line that they should follow."""
    draws, moments = samples.batch_draws()
    with pytest.raises(UsageError, match=r"moments of every arm .* got none of start"):
        grad_sq_norm_against_batch_size(draws, moments.iloc[1:], num_examples=1024)
    with pytest.raises(UsageError, match="without grad_sq_norm"):
        grad_sq_norm_against_batch_size(
            draws, moments.drop(columns="grad_sq_norm"), num_examples=1024
        )


def test_more_examples_drawn_than_there_are_is_refused() -> None:
    """Catches: a negative variance beyond the size of the data."""
    draws, moments = samples.batch_draws()
    with pytest.raises(UsageError, match="from 1000 examples, got one of 1024"):
        grad_sq_norm_against_batch_size(draws, moments, num_examples=1000)


def test_tables_that_cannot_be_drawn_are_refused() -> None:
    """Catches: blank panels."""
    draws, moments = samples.batch_draws()
    with pytest.raises(EmptyDataError, match="got an empty table"):
        grad_sq_norm_against_batch_size(draws.iloc[:0], moments, num_examples=1024)
    with pytest.raises(EmptyDataError, match="needs finite values of batch_size"):
        grad_sq_norm_against_batch_size(
            draws.assign(grad_sq_norm=math.nan), moments, num_examples=1024
        )

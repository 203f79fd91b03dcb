"""The noise analysis: drawn batches must follow what all examples predict."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import noisekit as nk
from noisekit import report
from tests.analyses.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the analysis as a module."""
    return load_script("gradient_noise")


def test_expected_norm_is_the_finite_population_identity() -> None:
    """The prediction equals the exact mean over all pairs of a tiny population.

    Catches: a missing finite-population factor; a biased variance.
    """
    grads = np.random.default_rng(0).normal(size=(6, 3)) + 1.0
    pairs = [
        np.square((grads[i] + grads[j]) / 2).sum()
        for i in range(6)
        for j in range(6)
        if i < j
    ]
    squared = np.square(grads.mean(0)).sum()
    variance = grads.var(axis=0, ddof=1).sum()
    got = report.expected_sq_norm(squared, variance, 2, 6)
    assert got == pytest.approx(np.mean(pairs))


def test_drawn_batches_follow_the_prediction(
    script: ModuleType, smoke_runs: Path
) -> None:
    """Means of drawn norms lie within five standard errors of the identity.

    Catches: noise of the wrong batch size, a sum taken for a mean.
    """
    runs = nk.open_runs(smoke_runs)
    draws, moments, num_examples = script.drawn_norms(runs, "equal_updates")
    assert report.norm_deviations(draws, moments, num_examples).max() < script.SLACK


def test_wrong_moments_do_not_check_out(script: ModuleType, smoke_runs: Path) -> None:
    """Catches: an instrument check that cannot fail."""
    runs = nk.open_runs(smoke_runs)
    draws, moments, num_examples = script.drawn_norms(runs, "equal_updates")
    wrong = moments.assign(variance_trace=2 * moments["variance_trace"])
    assert "does not check" in script.answer(
        draws, wrong, num_examples, "equal_updates"
    )


def test_analysis_draws_noise_norms_and_histograms(
    script: ModuleType, smoke_runs: Path
) -> None:
    """Catches: a figure of the issue that is missing."""
    result = script.analyse(nk.open_runs(smoke_runs))
    assert {plot.name for plot in result.plots} == {
        "example_norm_histograms",
        "grad_sq_norm_against_batch_size",
        "noise_over_training",
    }
    assert "checks the instrument" in result.answer
    assert set(result.tables[0].frame["quantity"]) >= {"variance_trace"}

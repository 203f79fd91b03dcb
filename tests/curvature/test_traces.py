"""Traces and diagonals, and that their standard errors mean what they say."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.curvature import HessianOperator, diagonal, trace, weighted_trace
from tests.cases import CASES, Case
from tests.reference.curvature import symmetric_with_spectrum

MATRIX = torch.from_numpy(
    symmetric_with_spectrum([8.0, 4.0, 1.0, *np.linspace(-0.5, 0.5, 30)])
)
NEGATIVE = MATRIX - torch.eye(33).double()
WEIGHTS = torch.linspace(-2.0, 2.0, 33).double()


def seeded_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_traces_of_every_case(case: Case) -> None:
    """Catches: wrong weights of batches, weights ``w`` used once instead of twice."""
    H = HessianOperator(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    entries = H.to_dense().diagonal()
    w = H.risk.vector()
    plain = trace(H, num_matvecs=100, generator=seeded_generator(0))
    weighted = weighted_trace(H, w, num_matvecs=100, generator=seeded_generator(1))
    assert abs(plain.value - float(entries.sum())) < 4 * plain.stderr
    assert abs(weighted.value - float((w**2 * entries).sum())) < 4 * weighted.stderr
    assert plain.num_matvecs == plain.num_samples == 100


@pytest.mark.parametrize("matrix", [MATRIX, NEGATIVE], ids=["positive", "negative"])
@pytest.mark.parametrize("num_matvecs", [8, 32])
def test_intervals_cover_the_trace(matrix: torch.Tensor, num_matvecs: int) -> None:
    """Of 400 intervals at 95 %, 380 cover on average, 362 at the least.

    A negative trace too, where a rule that divides by the signed trace stops at once.

    Catches: a variance over n, an error of one probe instead of the mean's, normal
    quantiles for 8 probes, a stopping rule.
    """
    truth = float(matrix.trace())
    covered = sum(
        trace(matrix, num_matvecs=num_matvecs, generator=seeded_generator(seed))
        .interval(0.95)
        .contains(truth)
        for seed in range(400)
    )
    assert 362 <= covered <= 397


def test_weighted_intervals_cover() -> None:
    truth = float((WEIGHTS**2 * MATRIX.diagonal()).sum())
    estimates = [
        weighted_trace(
            MATRIX, WEIGHTS, num_matvecs=16, generator=seeded_generator(seed)
        )
        for seed in range(400)
    ]
    covered = sum(e.interval(0.95).contains(truth) for e in estimates)
    assert 362 <= covered <= 397
    mean = np.mean([e.value for e in estimates])
    assert mean == pytest.approx(truth, abs=4 * estimates[0].stderr / math.sqrt(400))


def test_signs_have_the_smallest_variance() -> None:
    """With signs a diagonal matrix has no error at all; with normal probes it has.

    Catches: Gaussian probes.
    """
    estimate = trace(torch.diag(WEIGHTS), num_matvecs=4)
    assert estimate.value == pytest.approx(float(WEIGHTS.sum()), abs=1e-12)
    assert estimate.stderr == pytest.approx(0.0, abs=1e-12)


def test_rescaling_two_layers_leaves_the_weighted_trace() -> None:
    """``w_i`` times a factor goes with ``H_ii`` over its square.

    Catches: the plain trace under another name.
    """
    factors = torch.linspace(0.5, 3.0, 33).double()
    rescaled = MATRIX / factors[:, None] / factors[None, :]
    before = weighted_trace(MATRIX, WEIGHTS, generator=seeded_generator(0))
    after = weighted_trace(rescaled, WEIGHTS * factors, generator=seeded_generator(0))
    assert after.value == pytest.approx(before.value, rel=1e-10)


def test_diagonal_with_its_error() -> None:
    """Standardised errors over all entries are of unit size.

    Catches: the variance of one probe given for that of the mean.
    """
    want = MATRIX.diagonal()
    result = diagonal(MATRIX, num_matvecs=400, generator=seeded_generator(0))
    scores = (result.values - want) / result.stderr
    assert float(scores.abs().max()) < 4.5
    assert 0.6 < float(scores.pow(2).mean()) < 1.6
    assert result.num_matvecs == 400
    exact = diagonal(torch.diag(WEIGHTS), num_matvecs=2)
    assert_close(exact.values, WEIGHTS)


def test_estimates_say_where_their_error_is_from() -> None:
    estimate = trace(MATRIX, num_matvecs=8, generator=seeded_generator(0))
    assert estimate.error_source is ErrorSource.PROBES
    assert estimate.dof == 7
    assert estimate.bound is None


def test_none_is_fresh_entropy_and_a_generator_repeats() -> None:
    """Catches: a fixed seed behind ``None``, the global random state."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    free = {trace(MATRIX, num_matvecs=2).value for _ in range(4)}
    fixed = {trace(MATRIX, generator=seeded_generator(1)).value for _ in range(2)}
    assert len(free) > 1
    assert len(fixed) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_products_that_are_not_finite_give_diverged() -> None:
    broken = MATRIX * torch.inf
    assert trace(broken.nan_to_num(nan=torch.inf)).status is Status.DIVERGED


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match="at least 2 for an error estimate, got 1"):
        trace(MATRIX, num_matvecs=1)
    with pytest.raises(UsageError, match="at least 2"):
        diagonal(MATRIX, num_matvecs=1)
    with pytest.raises(UsageError, match="'hutchinson', got 'exact'"):
        trace(MATRIX, method="exact")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"needs shape \(33,\), got \(3,\)"):
        weighted_trace(MATRIX, torch.ones(3))

"""Traces and diagonals, and that their standard errors mean what they say."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.curvature import (
    HessianOperator,
    Target,
    diagonal,
    trace,
    weighted_trace,
)
from tests.cases import CASES, Case
from tests.randomness import seeded
from tests.reference.curvature import symmetric_with_spectrum

MATRIX = torch.from_numpy(
    symmetric_with_spectrum([8.0, 4.0, 1.0, *np.linspace(-0.5, 0.5, 30)])
)
NEGATIVE = MATRIX - torch.eye(33).double()
WEIGHTS = torch.linspace(-2.0, 2.0, 33).double()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_traces_of_every_case(case: Case) -> None:
    """Catches: wrong weights of batches, weights ``w`` used once instead of twice."""
    H = HessianOperator(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    entries = H.to_dense().diagonal()
    w = H.risk.vector()
    plain = trace(H, num_matvecs=100, method="hutchinson", generator=seeded(0))
    weighted = weighted_trace(H, w, num_matvecs=100, generator=seeded(1))
    assert abs(plain.value - float(entries.sum())) < 4 * plain.stderr
    assert abs(weighted.value - float((w**2 * entries).sum())) < 4 * weighted.stderr
    assert plain.num_matvecs == plain.num_samples == 100


@pytest.mark.parametrize("matrix", [MATRIX, NEGATIVE], ids=["positive", "negative"])
@pytest.mark.parametrize("probe", ["rademacher", "normal"])
@pytest.mark.parametrize(
    ("method", "num_matvecs"), [("hutchinson", 18), ("hutch++", 9)]
)
def test_intervals_cover_the_trace(
    matrix: torch.Tensor, probe: str, method: str, num_matvecs: int
) -> None:
    """Of 1,000 intervals at 95 %, 900 or more cover, and the mean is right.

    A negative trace too, where a rule that divides by the signed trace stops at once.
    Few sums of squares are not quite normal: 90 to 96 % is what is measured.

    Catches: a variance over n, an error of one probe instead of the mean's, normal
    quantiles for three probes, probes that see the sketch's directions again.
    """
    truth = float(matrix.trace())
    generator = torch.Generator()
    found = [
        trace(
            matrix,
            num_matvecs=num_matvecs,
            method=method,
            probe=probe,
            generator=generator.manual_seed(seed),
        )
        for seed in range(1000)
    ]
    covered = sum(e.interval(0.95).contains(truth) for e in found)
    values = np.array([e.value for e in found])
    assert 885 <= covered <= 975
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(1000)


@pytest.mark.parametrize("num_matvecs", [9, 20])
def test_intervals_of_xtrace_cover_more_than_they_need(num_matvecs: int) -> None:
    """The jackknife is on the large side, never on the small.

    Catches: the spread of the leave-one-out terms as the error of their mean, which
    covered 77 to 92 %.
    """
    truth = float(NEGATIVE.trace())
    found = [
        trace(
            NEGATIVE,
            num_matvecs=num_matvecs,
            method="xtrace",
            generator=seeded(seed),
        )
        for seed in range(300)
    ]
    covered = sum(e.interval(0.95).contains(truth) for e in found)
    values = np.array([e.value for e in found])
    assert covered >= 285
    assert np.mean([e.stderr for e in found]) < 3 * values.std()
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(300)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_is_exact(method: str) -> None:
    """Rank three: the sketch holds everything, and only rounding is left.

    Catches: a singular triangular factor inverted; an error of exactly zero.
    """
    values = [5.0, -3.0, 1.0, *[0.0] * 60]
    for dtype, digits in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        matrix = torch.from_numpy(symmetric_with_spectrum(values)).to(dtype)
        found = trace(matrix, num_matvecs=18, method=method, generator=seeded(0))
        assert found.value == pytest.approx(3.0, abs=digits)
        assert found.interval().contains(3.0)
        assert found.stderr < 1e4 * digits


def test_dominant_directions_save_most_of_the_error() -> None:
    """Three values hold the trace: with as many products the error is a third.

    Catches: a sketch that is not orthogonalized, or not taken out of the probes.
    """
    spread = {}
    for method in ("hutchinson", "hutch++", "xtrace"):
        values = [
            trace(
                MATRIX,
                num_matvecs=18,
                method=method,
                generator=seeded(seed),
            ).value
            for seed in range(200)
        ]
        spread[method] = float(np.std(values))
    assert spread["hutch++"] < 0.35 * spread["hutchinson"]
    assert spread["xtrace"] < spread["hutch++"]


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_a_target_is_reached_and_its_intervals_cover(method: str) -> None:
    """The number of probes is fixed by a first round, not by luck along the way.

    Catches: stopping when the running mean looks steady; the spread of all samples,
    whose number depends on it, as the error.
    """
    truth = float(NEGATIVE.trace())
    found = [
        trace(
            NEGATIVE,
            num_matvecs=2000,
            method=method,
            target=Target(0.8, relative=False),
            generator=seeded(seed),
        )
        for seed in range(200)
    ]
    assert sum(e.interval().contains(truth) for e in found) >= 178
    assert all(e.stderr <= 0.8 * 1.001 for e in found if e.status is Status.OK)
    assert len({e.num_matvecs for e in found}) > 20
    assert float(np.std([e.value for e in found])) < 1.2


def test_a_relative_target_and_the_most_products() -> None:
    """Catches: a relative error of the signed trace; a silent stop at the maximum."""
    loose = trace(NEGATIVE, num_matvecs=500, target=Target(0.1), generator=seeded(0))
    assert loose.status is Status.OK
    assert loose.stderr <= 0.1 * abs(loose.value) * 1.2
    tight = trace(NEGATIVE, num_matvecs=40, target=Target(1e-4), generator=seeded(0))
    assert tight.status is Status.NOT_CONVERGED
    assert tight.num_matvecs == 40
    flat = trace(
        torch.eye(50), num_matvecs=60, target=Target(1e-3), method="hutchinson"
    )
    assert flat.status is Status.OK
    assert flat.num_matvecs < 60


def test_weighted_intervals_cover() -> None:
    truth = float((WEIGHTS**2 * MATRIX.diagonal()).sum())
    estimates = [
        weighted_trace(MATRIX, WEIGHTS, num_matvecs=16, generator=seeded(seed))
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
    diagonal_matrix = torch.diag(WEIGHTS)
    estimate = trace(diagonal_matrix, num_matvecs=4, method="hutchinson")
    normal = trace(diagonal_matrix, num_matvecs=4, method="hutchinson", probe="normal")
    assert normal.stderr > 0.01
    assert estimate.value == pytest.approx(float(WEIGHTS.sum()), abs=1e-12)
    assert estimate.stderr == pytest.approx(0.0, abs=1e-12)


def test_rescaling_two_layers_leaves_the_weighted_trace() -> None:
    """``w_i`` times a factor goes with ``H_ii`` over its square.

    Catches: the plain trace under another name.
    """
    factors = torch.linspace(0.5, 3.0, 33).double()
    rescaled = MATRIX / factors[:, None] / factors[None, :]
    before = weighted_trace(MATRIX, WEIGHTS, generator=seeded(0))
    after = weighted_trace(rescaled, WEIGHTS * factors, generator=seeded(0))
    assert after.value == pytest.approx(before.value, rel=1e-10)


def test_diagonal_with_its_error() -> None:
    """Standardised errors over all entries are of unit size.

    Catches: the variance of one probe given for that of the mean.
    """
    want = MATRIX.diagonal()
    result = diagonal(MATRIX, num_matvecs=400, generator=seeded(0))
    scores = (result.values - want) / result.stderr
    assert float(scores.abs().max()) < 4.5
    assert 0.6 < float(scores.pow(2).mean()) < 1.6
    assert result.num_matvecs == 400
    exact = diagonal(torch.diag(WEIGHTS), num_matvecs=2)
    assert_close(exact.values, WEIGHTS)


def test_estimates_say_where_their_error_is_from() -> None:
    estimate = trace(MATRIX, num_matvecs=18, generator=seeded(0))
    assert estimate.error_source is ErrorSource.PROBES
    assert estimate.dof == 5  # a third of the products are probes
    assert estimate.num_matvecs == 18
    assert estimate.bound is None


def test_none_is_fresh_entropy_and_a_generator_repeats() -> None:
    """Catches: a fixed seed behind ``None``, the global random state."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    free = {trace(MATRIX, num_matvecs=6).value for _ in range(4)}
    fixed = {trace(MATRIX, generator=seeded(1)).value for _ in range(2)}
    assert len(free) > 1
    assert len(fixed) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_products_that_are_not_finite_give_diverged() -> None:
    broken = (MATRIX * torch.inf).nan_to_num(nan=torch.inf)
    for method in ("hutchinson", "hutch++", "xtrace"):
        assert trace(broken, method=method).status is Status.DIVERGED


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match=r"at least 6 .* by 'hutch.*', got 5"):
        trace(MATRIX, num_matvecs=5)
    with pytest.raises(UsageError, match=r"at least 2 for an error estimate, got 1"):
        trace(MATRIX, num_matvecs=1, method="hutchinson")
    with pytest.raises(UsageError, match=r"probe needs .*'normal', got 'sphere'"):
        trace(MATRIX, probe="sphere")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"a target needs method .* got 'xtrace'"):
        trace(MATRIX, method="xtrace", target=Target(0.1))
    with pytest.raises(UsageError, match=r"stderr needs to be positive .* got 0"):
        trace(MATRIX, target=Target(0.0))
    with pytest.raises(UsageError, match="at least 2"):
        diagonal(MATRIX, num_matvecs=1)
    with pytest.raises(UsageError, match=r"'hutch.*', 'xtrace', got 'exact'"):
        trace(MATRIX, method="exact")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"needs shape \(33,\), got \(3,\)"):
        weighted_trace(MATRIX, torch.ones(3))


def test_printed_a_diagonal_is_a_line() -> None:
    """Catches: every entry on the screen."""
    found = diagonal(MATRIX, num_matvecs=8, generator=seeded(0))
    low, high = float(found.values.min()), float(found.values.max())
    assert str(found).startswith(
        f"diagonal of 33 entries from {low:.4g} to {high:.4g}, median error "
    )
    assert str(found).endswith("8 products")
    assert repr(found) == "DiagonalEstimate(num_matvecs=8)"

"""Criteria from one step's sums, against per-example gradients written out."""

import pytest
import torch
from torch import Tensor

from noisekit.noise import (
    SampleTest,
    inner_product_statistic,
    inner_product_test,
    norm_statistic,
    norm_test,
    orthogonality_statistic,
    orthogonality_test,
    signal_ratios,
)
from tests.reference import noise as reference


@pytest.fixture
def rows() -> Tensor:
    """Gradients of 12 examples, 7 parameters, with a mean of their own."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    return noise + torch.linspace(-0.5, 1, 7, dtype=torch.float64)


def sums(rows: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """``sum |u_i|²``, ``<u_i, u>`` and ``|u|²`` of ``u_i = factor g_i``."""
    parts = factor * rows
    whole = parts.sum(0)
    return parts.square().sum(), parts @ whole, whole.square().sum()


@pytest.mark.parametrize("factor", [1.0, 1 / 12, 65536.0 / 12])
def test_statistics_are_those_of_the_rules(rows: Tensor, factor: float) -> None:
    """Whatever all contributions are multiplied by.

    Catches: the denominator n for n - 1, a statistic that changes with reduction.
    """
    sq_sum, products, whole = sums(rows, factor)
    share = 1 / len(rows)
    found = (
        norm_statistic(sq_sum, whole, share),
        inner_product_statistic(products, share),
        orthogonality_statistic(sq_sum, products, share),
    )
    wanted = (
        reference.norm_test(rows),
        reference.inner_product_test(rows),
        reference.orthogonality_test(rows),
    )
    assert [float(value) for value in found] == pytest.approx(wanted, rel=1e-12)


def test_functions_of_numbers_agree(rows: Tensor) -> None:
    """Catches: two definitions of one rule in this package."""
    sq_sum, products, whole = sums(rows, 1.0)
    n, mean = len(rows), rows.mean(0)
    by_norms = norm_test(float(sq_sum) / n, float(mean @ mean), n)
    by_products = inner_product_test(rows @ mean)
    across = orthogonality_test(rows.square().sum(1), rows @ mean)
    share = 1 / n
    assert by_norms.statistic == pytest.approx(
        float(norm_statistic(sq_sum, whole, share))
    )
    assert by_products.statistic == pytest.approx(
        float(inner_product_statistic(products, share))
    )
    assert across.statistic == pytest.approx(
        float(orthogonality_statistic(sq_sum, products, share))
    )
    again = SampleTest.of_statistic(by_norms.statistic, n, limit=by_norms.limit)
    assert again.passed == by_norms.passed
    assert again.batch_size == pytest.approx(by_norms.batch_size)


def test_along_and_across_make_up_the_whole(rows: Tensor) -> None:
    """Squares of the two parts' statistics add up to the norm test's, by layer too."""
    parts = rows / len(rows)
    products = torch.stack([parts @ parts.sum(0), parts[:, :3] @ parts[:, :3].sum(0)])
    squares = torch.stack([parts.square().sum(), parts[:, :3].square().sum()])
    share = 1 / len(rows)
    along = inner_product_statistic(products, share)
    across = orthogonality_statistic(squares, products, share)
    whole = norm_statistic(squares, products.sum(1), share)
    torch.testing.assert_close(
        along.square() + across.square(), whole.square(), rtol=1e-12, atol=0
    )


def test_weighted_examples_give_the_right_error_on_average() -> None:
    """Known Gaussian gradients, of which one half weighs three times the other.

    Catches: 1/n for the sum of squared weights, which understates the error.
    """
    generator = torch.Generator().manual_seed(0)
    n, draws = 8, 4_000
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(n // 2)
    weights = weights / weights.sum()
    share = float(weights.square().sum())
    truth = torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    noise = torch.randn(draws, n, 4, generator=generator, dtype=torch.float64)
    parts = weights[:, None] * (truth + noise)
    whole = parts.sum(1).square().sum(1)
    statistic = norm_statistic(parts.square().sum((1, 2)), whole, share)
    errors = statistic.square() * whole  # estimates of tr Σ sum w²
    spread = float(errors.std()) / draws**0.5
    assert abs(float(errors.mean()) - 4 * share) < 4 * spread
    assert abs(4 / n - 4 * share) > 20 * spread


def test_ratios_leave_out_what_does_not_vary(rows: Tensor) -> None:
    """Dead and constant parameters have no ratio, also where rounding gives them one.

    Catches: a variance of 1e-17 that makes a ratio of 1e17; a sum over dead units.
    """
    dead, constant = torch.zeros(12, 2), torch.linspace(0.1, 3, 200).expand(12, -1)
    padded = torch.cat([rows, dead.double(), constant.double()], 1)
    for dtype in (torch.float64, torch.float32):
        parts = padded.to(dtype) / 12
        total, count = signal_ratios(parts.sum(0), parts.square().sum(0), 1 / 12)
        assert int(count) == rows.shape[1]
        wanted = reference.signal_to_noise(rows)
        assert float(total / count) == pytest.approx(wanted, rel=1e-4)


def test_a_mean_gradient_of_zero_fails_every_test() -> None:
    """Catches: a division by zero that looks like a batch that is large enough."""
    parts = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    statistic = norm_statistic(parts.square().sum(), parts.sum(0).square().sum(), 0.5)
    assert float(statistic) == float("inf")


def test_peers_denominators_bias_the_ratios() -> None:
    """1/n variances and 1e-5 in the denominator, as in Cockpit, against the truth.

    Of 4 Gaussian gradients of variance 1e-6 around zero, where n times the ratio is
    (n - 1) / (n - 3) = 3 on average.
    """
    generator = torch.Generator().manual_seed(1)
    n = 4
    rows = 1e-3 * torch.randn(n, 400_000, generator=generator, dtype=torch.float64)
    mean, squares = rows.mean(0), rows.square().mean(0)
    total, count = signal_ratios(mean, squares / n, 1 / n)
    ours = float(n * total / count)
    biased = float(n * (mean.square() / (squares - mean.square())).mean())
    padded = float(n * (mean.square() / (squares - mean.square() + 1e-5)).mean())
    assert ours == pytest.approx(3.0, rel=0.1)
    assert biased == pytest.approx(4 / 3 * ours, rel=1e-9)
    assert padded < 0.1 * ours

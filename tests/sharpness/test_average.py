"""Average-case sharpness against traces that are known."""

import math

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.measures.average import average_sharpness
from tests.randomness import seeded
from tests.sharpness.networks import LOSS, classes, rectified, state_of
from tests.sharpness.quadratics import Point, Quadratic, at_rest, coupled


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_quadratic_gives_half_the_trace(eta: float | None) -> None:
    """The mean is ``sigma^2 sum_i T_i^2 H_ii / 2``, within its error.

    Catches: sigma squared taken as the deviation; units that are not squared; a
    factor of two; noise that is not centred.
    """
    hessian, weights = coupled(6, 0)
    got = average_sharpness(
        Point(weights),
        Quadratic(hessian),
        at_rest(weights),
        sigma=0.3,
        adaptive=eta is not None,
        eta=eta or 0.0,
        num_draws=600,
        generator=seeded(),
    )
    unit = torch.ones(6).double() if eta is None else weights.abs() + eta
    want = 0.3**2 * float(unit**2 @ hessian.diag()) / 2
    assert abs(got.value - want) < 4 * got.estimate.stderr
    assert 8 * got.estimate.stderr < want
    assert got.estimate.error_source is ErrorSource.PROBES
    assert got.estimate.num_samples == 600
    assert got.estimate.dof == 599
    assert got.num_evaluations == 1201


def test_sigma_is_a_standard_deviation() -> None:
    """Twice the sigma makes exactly four times the value of a quadratic.

    Catches: a variance passed as the deviation, which makes it sixteen times.
    """
    hessian, weights = coupled(6, 0)
    small, large = (
        average_sharpness(
            Point(weights),
            Quadratic(hessian),
            at_rest(weights),
            sigma=sigma,
            num_draws=4,
            generator=seeded(),
        )
        for sigma in (0.2, 0.4)
    )
    assert large.value == pytest.approx(4 * small.value, rel=1e-9)


def test_opposite_draws_take_the_gradient_out() -> None:
    """A linear loss has no average sharpness, and with opposites no error either.

    Catches: opposites that are counted as independent draws; a sign that is lost.
    """

    def linear(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).sum(1).mean()

    weights = torch.linspace(1, 2, 5, dtype=torch.float64)
    results = {
        antithetic: average_sharpness(
            Point(weights),
            linear,
            at_rest(weights),
            sigma=0.1,
            num_draws=50,
            antithetic=antithetic,
            generator=seeded(),
        )
        for antithetic in (True, False)
    }
    assert abs(results[True].value) < 1e-15
    assert results[True].estimate.stderr < 1e-15
    plain = results[False].estimate
    assert plain.stderr == pytest.approx(0.1 * math.sqrt(5 / 50), rel=0.3)
    assert abs(plain.value) < 4 * plain.stderr
    assert results[False].num_evaluations == 51


def test_intervals_over_draws_cover_as_often_as_they_say() -> None:
    """Of 95 % intervals about 95 in a hundred hold the truth.

    Catches: the spread of draws in place of the error of their mean; pairs counted
    as two draws, which makes the error too small by the root of two.
    """
    hessian, weights = coupled(8, 1)
    risk = EmpiricalRisk(Point(weights), Quadratic(hessian), at_rest(weights))
    want = 0.2**2 * float(hessian.trace()) / 2
    generator = seeded(7)
    covered = sum(
        average_sharpness(risk, sigma=0.2, num_draws=16, generator=generator)
        .estimate.interval()
        .contains(want)
        for _ in range(300)
    )
    assert 0.90 <= covered / 300 <= 0.985


class Slopes(nn.Module):
    """Linear regression, whose loss rises by ``mean (x . delta)^2 / 2``."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).double())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weights


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2


def regression(num_examples: int, generator: torch.Generator) -> list:
    """Inputs of unit variance in batches of unequal size, fitted perfectly."""
    inputs = torch.randn(num_examples, 3, generator=generator).double()
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5]).double()
    sizes = [7 if i % 2 else 13 for i in range(num_examples // 10)]
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def test_intervals_over_data_cover_as_often_as_they_say() -> None:
    """The error over batches is that of other data under the same draws.

    Catches: equal weights for batches of unequal size; the spread over draws.
    """

    def measured(batches: list) -> tuple[float, float]:
        risk = EmpiricalRisk(Slopes(), half_squares, batches, check=False)
        got = average_sharpness(risk, sigma=0.1, num_draws=3, generator=seeded(3))
        assert got.data_stderr is not None
        return got.value, got.data_stderr

    want, _ = measured(regression(40_000, seeded(1)))
    generator = seeded(2)
    quantile = 2.093  # of Student's t with 19 degrees of freedom
    covered = 0
    for _ in range(300):
        value, stderr = measured(regression(200, generator))
        covered += abs(value - want) <= quantile * stderr
    assert 0.90 <= covered / 300 <= 0.985


def test_one_batch_has_no_error_over_data() -> None:
    got = average_sharpness(rectified(), LOSS, [classes(20)], num_draws=2)
    assert got.data_stderr is None


def test_rescaled_layers_change_the_plain_value_only() -> None:
    """A twin of the same function has the same adaptive value, draw by draw.

    Catches: noise in proportion to a layer's norm, which is not invariant to neurons.
    """
    model, twin = rectified(), rectified()
    factors = torch.tensor([4.0, 0.25, 2.0, 8.0, 1.0, 0.5]).double()
    with torch.no_grad():
        twin[0].weight.mul_(factors[:, None])
        twin[0].bias.mul_(factors)
        twin[2].weight.div_(factors)
    data = [classes(30)]
    for adaptive in (True, False):
        values = [
            average_sharpness(
                m, LOSS, data, sigma=0.1, adaptive=adaptive, generator=seeded()
            ).value
            for m in (model, twin)
        ]
        same = values[0] == pytest.approx(values[1], rel=1e-9)
        assert same is adaptive


def test_losses_that_are_not_finite_are_told() -> None:
    """Catches: a mean over the draws that happened to be finite."""

    def logarithm(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets).log().mean()

    weights = torch.full((2,), 0.1, dtype=torch.float64)
    data = at_rest(torch.zeros(2, dtype=torch.float64))
    got = average_sharpness(Point(weights), logarithm, data, sigma=1.0)
    assert got.value == math.inf
    assert got.estimate.status is Status.NOT_RESOLVED
    assert got.data_stderr is None
    risk = EmpiricalRisk(Point(-weights), logarithm, data, check=False)
    got = average_sharpness(risk, sigma=0.01)
    assert math.isnan(got.value)
    assert got.estimate.status is Status.DIVERGED


def test_model_and_random_state_are_given_back() -> None:
    model = rectified(norm=True).train()
    before = state_of(model)
    random = torch.random.get_rng_state()
    average_sharpness(model, LOSS, [classes(20)], adaptive=True, generator=seeded())
    assert state_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma needs to be positive and finite, got 0.0"),
        ({"num_draws": 1}, "num_draws needs to be at least 2 .* got 1"),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        average_sharpness(rectified(), LOSS, [classes(8)], **options)

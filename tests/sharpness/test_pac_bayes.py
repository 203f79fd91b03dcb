"""PAC-Bayes flatness against sizes that are known."""

import itertools
import math

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream
from noisekit.core.results import ErrorSource, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature.random_vectors import normal_vector
from noisekit.sharpness.data_error import data_stderr
from noisekit.sharpness.measures.pac_bayes import (
    pac_bayes_flatness,
    pac_bayes_sharpness,
)
from noisekit.sharpness.search.bracket import bracketed
from noisekit.sharpness.search.criterion import CriterionIncrease
from tests.randomness import seeded
from tests.sharpness.networks import LOSS, classes, rectified, state_of
from tests.sharpness.quadratics import Point, Quadratic, at_rest, coupled


def quadratic(dims: int = 6) -> tuple[Tensor, Tensor]:
    """Curvature and weights, with weights large beside the floor of the noise."""
    hessian, weights = coupled(dims, 0)
    return hessian, weights + weights.sign()


@pytest.mark.parametrize("aware", [False, True])
def test_quadratic_stands_noise_by_its_trace(aware: bool) -> None:
    """``sigma^2 tr H / 2`` is the target, and with magnitudes what is left of it.

    Catches: sigma squared given as the size; a floor that is not squared; one over
    sigma in place of one over its square.
    """
    hessian, weights = quadratic()
    got = pac_bayes_flatness(
        Point(weights),
        Quadratic(hessian),
        at_rest(weights),
        target=0.1,
        criterion="loss",
        magnitude_aware=aware,
        num_draws=300,
        generator=seeded(),
    )
    trace = float(hessian.trace())
    want = trace / (2 * 0.1)
    if aware:
        want = float(weights**2 @ hessian.diag()) / (2 * 0.1 - 1e-6 * trace)
    assert abs(got.value - want) < 4 * got.estimate.stderr
    assert 6 * got.estimate.stderr < want
    assert got.value == pytest.approx(1 / got.radius**2, rel=1e-12)
    assert got.estimate.bound < 0.02 * want
    assert got.estimate.error_source is ErrorSource.PROBES
    assert got.start == pytest.approx(0.3)


class Sign(nn.Module):
    """Says class 0 where its weight is positive, whatever the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        score = self.weight.expand(len(inputs))
        return torch.stack([score, torch.zeros_like(score)], 1)


def test_error_rate_is_that_of_the_flipped_sign() -> None:
    """One weight of 1 turns negative with the probability of a normal tail.

    Catches: the loss in place of the error; a target that is not above the start.
    """
    data = [(torch.zeros(4, 1).double(), torch.zeros(4, dtype=torch.long))]
    got = pac_bayes_flatness(Sign(), LOSS, data, num_draws=500, generator=seeded())
    want = norm.ppf(0.9) ** 2
    assert got.start == 0.0
    assert got.criterion == "error"
    assert abs(got.value - want) < 4 * got.estimate.stderr
    assert got.estimate.stderr < 0.2 * want


def test_intervals_cover_as_often_as_they_say() -> None:
    """The error of the size is that of the rise over its slope.

    Catches: the slope in sigma taken for that in log sigma; a factor of two.
    """
    hessian, weights = quadratic(8)
    risk = EmpiricalRisk(Point(weights), Quadratic(hessian), at_rest(weights))
    want = float(hessian.trace()) / (2 * 0.1)
    generator = seeded(3)
    covered = sum(
        pac_bayes_flatness(
            risk, criterion="loss", num_draws=12, tol=0.02, generator=generator
        )
        .estimate.interval()
        .contains(want)
        for _ in range(60)
    )
    assert covered / 60 >= 0.86


def test_error_over_data_is_that_of_the_rise_at_the_size_found() -> None:
    """On a quadratic one over the squared size is linear in each batch's curvature.

    Catches: a slope that is taken too coarsely; other draws, or another displacement,
    than the value is of; batches of unequal size that count alike; the loss at the
    weights themselves, which differs from batch to batch, taken for a rise.
    """
    generator = seeded(1)
    inputs = torch.randn(40, 3, generator=generator).double()
    parts = inputs.split([7, 13, 20])
    model = nn.Linear(3, 1, bias=False).double()
    batches = [
        (part, torch.cat([model(part).detach(), part[:, :1].square()], 1))
        for part in parts
    ]
    shares = torch.tensor([7.0, 13.0, 20.0]).double() / 40

    def fitted_but_for_offsets(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets[:, :1]).square() + targets[:, 1:]).mean()

    def expected(directions: Tensor) -> float:
        along = torch.stack([(part @ directions.T).square().mean(0) for part in parts])
        return data_stderr(shares * along.mean(1), shares) / 0.1

    options = {"criterion": "loss", "tol": 1e-4, "generator": seeded(2)}
    problem = (model, fitted_but_for_offsets, batches)
    noise = pac_bayes_flatness(*problem, num_draws=4, **options)
    bits = torch.randint(2**62, (), generator=seeded(2))
    draws = [
        normal_vector(3, stream(int(bits), "draw", i), (torch.double, inputs.device))
        for i in range(4)
    ]
    want = expected(torch.stack(draws))
    assert noise.data_stderr == pytest.approx(want, rel=1e-3)

    options["generator"] = seeded(2)
    worst = pac_bayes_sharpness(*problem, restarts=4, **options)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3))).double()
    rises = (inputs @ corners.T).square().mean(0)
    want = expected(corners[rises.argmax()][None])
    assert worst.data_stderr == pytest.approx(want, rel=1e-3)
    assert worst.estimate.side == "lower"


def test_batches_have_their_parts_of_the_error_rate() -> None:
    """They add up to the share of misclassified targets that count.

    Catches: ignored targets that count; averages of batch averages.
    """
    inputs, targets = classes(30)
    targets[::4] = -100
    batches = list(zip(inputs.split([7, 23]), targets.split([7, 23]), strict=True))
    risk = EmpiricalRisk(rectified(), LOSS, batches)
    with risk.evaluating():
        trial = CriterionIncrease(risk, "error", False, seeded())
        parts = trial.parts_at(None)
        shares = trial.shares()
    valid = targets >= 0
    wrong = valid & (rectified()(inputs).argmax(1) != targets)
    counts = torch.stack([part.sum() for part in wrong.split([7, 23])])
    torch.testing.assert_close(parts, counts.double() / valid.sum())
    want = torch.stack([part.sum() for part in valid.split([7, 23])]) / valid.sum()
    torch.testing.assert_close(shares, want.double(), rtol=1e-6, atol=0)
    assert float(parts.sum()) == pytest.approx(trial.start)


@pytest.mark.parametrize("aware", [False, True])
def test_quadratic_stands_displacements_by_its_box(aware: bool) -> None:
    """Of a diagonal one every corner is the maximum, and its size is the target's.

    Catches: a ball in place of a box; a floor that is left out; the error of the
    origin counted twice.
    """
    curvature = torch.tensor([4.0, 1.0, 0.5]).double()
    weights = torch.tensor([1.0, -2.0, 0.3]).double()
    got = pac_bayes_sharpness(
        Point(weights),
        Quadratic(torch.diag(curvature)),
        at_rest(weights),
        target=0.2,
        criterion="loss",
        magnitude_aware=aware,
        tol=1e-4,
        generator=seeded(),
    )

    def rise(alpha: float) -> float:
        radius = alpha * weights.abs() + 1e-3 if aware else torch.full((3,), alpha)
        return float(curvature @ radius.double() ** 2) / 2 - 0.2

    alpha = brentq(rise, 1e-6, 10)
    assert got.radius == pytest.approx(alpha, rel=1e-4)
    assert got.value == pytest.approx(1 / alpha**2, rel=2e-4)
    assert abs(got.value - 1 / alpha**2) <= 2 * got.estimate.bound
    assert got.estimate.side == "lower"
    assert got.estimate.error_source is ErrorSource.SOLVER
    assert got.estimate.num_grads > 0


def test_ascent_breaks_a_classifier_sooner_than_noise() -> None:
    """On a network the worst displacement is smaller than the noise it stands.

    Catches: both twins computed by the same search.
    """
    model = rectified()
    inputs, _ = classes(60)
    data = [(inputs, model(inputs).argmax(1))]
    noise = pac_bayes_flatness(model, LOSS, data, generator=seeded())
    ascent = pac_bayes_sharpness(model, LOSS, data, generator=seeded())
    assert noise.start == ascent.start == 0.0
    assert ascent.radius < 0.5 * noise.radius
    assert ascent.value > 4 * noise.value


def test_targets_out_of_reach_are_told() -> None:
    """A loss that never rises so far has no size, and a floor may be too much.

    Catches: the end of the search range given as a result.
    """
    hessian, weights = quadratic()

    def bounded(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1).tanh().mean()

    never = pac_bayes_flatness(
        Point(weights), bounded, at_rest(weights), target=2.0, criterion="loss"
    )
    always = pac_bayes_flatness(
        Point(weights),
        Quadratic(1e6 * hessian),
        at_rest(weights),
        criterion="loss",
        magnitude_aware=True,
    )
    for got, detail in ((never, "no size up to"), (always, "no size down to")):
        assert math.isnan(got.value)
        assert got.estimate.status is Status.NOT_RESOLVED
        assert got.detail.startswith(detail)
        assert got.estimate.stderr is None


@pytest.mark.parametrize("crossing", [3e-6, 0.01, 0.4, 5e3])
def test_bracket_holds_the_crossing(crossing: float) -> None:
    """Of any scale, to the tolerance asked for.

    Catches: a fixed range of sizes; a bisection that ends at a fixed count.
    """
    found = bracketed(lambda size: size / crossing, 1.0, tol=1e-3)
    assert found.resolved
    assert found.low <= crossing <= found.high
    assert found.high / found.low <= 1.001
    assert found.detail == ""


def test_model_and_random_state_are_given_back() -> None:
    model = rectified(norm=True).train()
    before = state_of(model)
    random = torch.random.get_rng_state()
    pac_bayes_flatness(model, LOSS, [classes(20)], num_draws=2, generator=seeded())
    pac_bayes_sharpness(model, LOSS, [classes(20)], steps=2, generator=seeded())
    assert state_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": 0.0},
            "target needs to be positive and finite, got 0.0; 0.1 is usual",
        ),
        ({"tol": 1.0}, "tol needs to be between 0 and 1, got 1.0"),
        ({"num_draws": 1}, "num_draws needs to be at least 2 .* got 1"),
        ({"criterion": "accuracy"}, "'error' or 'loss', got 'accuracy'"),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pac_bayes_flatness(rectified(), LOSS, [classes(8)], **options)


def test_regression_has_no_error_rate() -> None:
    hessian, weights = quadratic()
    with pytest.raises(UsageError, match="got others; use criterion='loss'"):
        pac_bayes_flatness(Point(weights), Quadratic(hessian), at_rest(weights))

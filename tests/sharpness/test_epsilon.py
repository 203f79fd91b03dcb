"""Epsilon-sharpness against boxes whose highest point is known."""

import math

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.results import Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.measures.epsilon import (
    epsilon_sharpness,
)
from noisekit.sharpness.search.box_search import SearchMethod
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.quadratics import (
    CURVATURES,
    MINIMIZER,
    Point,
    Quadratic,
    at_rest,
    coupled,
)

METHODS: tuple[SearchMethod, ...] = ("vertex", "lbfgsb")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
def test_quadratic_at_its_minimizer(method: SearchMethod, epsilon: float) -> None:
    """Where the gradient is exactly zero the value is that of the highest corner.

    Catches: stopping at the start because the gradient vanishes, which gives 0; a box
    of radius epsilon |x| without the one; a denominator without the one.
    """
    got = epsilon_sharpness(
        Point(MINIMIZER),
        Quadratic(torch.diag(CURVATURES)),
        at_rest(MINIMIZER),
        epsilon=epsilon,
        method=method,
        restarts=2,
        generator=seeded(),
    )
    radius = epsilon * (MINIMIZER.abs() + 1)
    want = reference.keskar(float((CURVATURES * radius**2).sum()) / 2, 0.3)
    assert got.value == pytest.approx(want, rel=1e-9)
    assert got.first_order_share == 0.0
    assert got.grad_norm == 0.0
    assert got.detail == ""
    assert got.displacement_norm == pytest.approx(float(radius.norm()), rel=1e-12)
    assert got.estimate.side == "lower"


@pytest.mark.parametrize("method", METHODS)
def test_linear_loss_is_all_first_order(method: SearchMethod) -> None:
    """A linear loss has a known maximum, and all of it comes from the gradient.

    Catches: the share taken without the box's widths; calling such a point a minimum.
    """
    slope = torch.tensor([3.0, -1.0, 0.5, 2.0, -0.1], dtype=torch.float64)

    def linear(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1 + (outputs * slope).sum(1).mean()

    got = epsilon_sharpness(Point(MINIMIZER), linear, at_rest(MINIMIZER), method=method)
    loss = float(1 + slope @ MINIMIZER)
    rise = float((slope.abs() * 1e-3 * (MINIMIZER.abs() + 1)).sum())
    assert got.loss == pytest.approx(loss, rel=1e-12)
    assert got.value == pytest.approx(reference.keskar(rise, loss), rel=1e-9)
    assert got.first_order_share == pytest.approx(1.0, rel=1e-9)
    assert got.grad_norm == pytest.approx(float(slope.norm()), rel=1e-12)
    assert "iterate, not a minimizer" in got.detail
    assert "100 %" in got.detail


def test_share_is_at_most_one() -> None:
    """Where the loss bends down, the gradient alone would give more than there is.

    Catches: a share of several hundred per cent.
    """

    def bending(outputs: Tensor, targets: Tensor) -> Tensor:
        moved = (outputs - targets).sum(1)
        return 1 + (moved - 30 * moved**2).mean()

    got = epsilon_sharpness(Point(MINIMIZER), bending, at_rest(MINIMIZER))
    assert got.value > 0
    assert got.first_order_share == 1.0


def test_share_of_a_known_mixture() -> None:
    """Slope and curvature of equal size share the rise by their own amounts.

    Catches: a share relative to the loss instead of the rise.
    """
    hessian = torch.diag(CURVATURES)
    shift = 2e-3 * (MINIMIZER.abs() + 1)
    got = epsilon_sharpness(
        Point(MINIMIZER + shift), Quadratic(hessian), at_rest(MINIMIZER)
    )
    radius = 1e-3 * ((MINIMIZER + shift).abs() + 1)
    linear = float((CURVATURES * shift * radius).sum())
    second = float((CURVATURES * radius**2).sum()) / 2
    assert got.first_order_share == pytest.approx(linear / (linear + second), rel=1e-6)


def test_ragged_batches_count_by_examples() -> None:
    """The loss that is maximized is the mean over examples, not over batches.

    Catches: averages of batch averages.
    """
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    loss_fn = nn.MSELoss()
    parts = (slice(0, 7), slice(7, 9))
    batches = [(inputs[part], targets[part]) for part in parts]
    got = epsilon_sharpness(model, loss_fn, batches, restarts=20, generator=seeded())
    loss = reference.flat_loss(model, loss_fn, inputs, targets)
    origin = reference.flat_weights(model)
    radius = 1e-3 * (origin.abs() + 1)
    top = reference.highest_corner(loss, origin, torch.eye(8).double(), radius)
    start = float(loss(origin))
    assert got.value == pytest.approx(reference.keskar(top - start, start), rel=1e-8)


def test_intervals_over_data_cover_as_often_as_they_say() -> None:
    """The error over batches is that of the whole ratio, denominator included.

    Catches: the error of the rise alone, which leaves out that of ``1 + f``.
    """
    curvatures = torch.diag(CURVATURES[:2])

    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        height = targets[:, 0].exp()  # the loss itself, and with it the curvature
        return (height * (1 + (outputs @ curvatures * outputs).sum(1))).mean()

    def measured(num_examples: int, seed: int) -> tuple[float, float]:
        targets = 0.7 * torch.randn(num_examples, 1, generator=seeded(seed)).double()
        parts = targets.split([5, 11] * (num_examples // 16))
        model = Point(torch.zeros(2, dtype=torch.float64))
        batches = [(part, part) for part in parts]
        risk = EmpiricalRisk(model, noisy, batches, check=False)
        got = epsilon_sharpness(risk, epsilon=0.3, max_iter=1, generator=seeded())
        assert got.data_stderr is not None
        return got.value, got.data_stderr

    want, _ = measured(16_000, 1)
    covered = 0
    for seed in range(200):
        value, stderr = measured(320, 100 + seed)
        covered += abs(value - want) <= 2.0227 * stderr
    assert 0.88 <= covered / 200 <= 0.99


def test_check_reports_what_lbfgsb_found() -> None:
    """The check is a second number, from the same start, and its cost is counted.

    Catches: a check that runs the vertex search twice.
    """
    hessian, point = coupled(40, 2)
    risk = EmpiricalRisk(Point(point + 1e-3), Quadratic(hessian), at_rest(point))
    plain = epsilon_sharpness(risk, max_iter=1, generator=seeded())
    checked = epsilon_sharpness(risk, max_iter=1, check=True, generator=seeded())
    paper = epsilon_sharpness(risk, max_iter=1, method="lbfgsb", generator=seeded())
    assert plain.check_value is None
    assert checked.value == plain.value
    assert checked.check_value == pytest.approx(paper.value, rel=0.05)
    assert checked.check_value != pytest.approx(plain.value, rel=0.05)
    assert checked.num_grads > plain.num_grads


def test_generator_decides_and_is_recorded() -> None:
    """The same seed gives the same columns, another seed others; the seed is kept.

    Catches: global randomness; a subspace that no one can draw again.
    """
    hessian, point = coupled(30, 0)
    risk = EmpiricalRisk(Point(point), Quadratic(hessian), at_rest(point))

    def measured(seed: int) -> float:
        got = epsilon_sharpness(risk, subspace_dim=4, generator=seeded(seed))
        assert got.seed == seed
        assert got.subspace_dim == 4
        assert got.column_scaling == "standard normal"
        return got.value

    before = torch.get_rng_state()
    assert measured(1) == measured(1)
    assert measured(1) != measured(2)
    fresh = [epsilon_sharpness(risk, subspace_dim=4).seed for _ in range(2)]
    assert fresh[0] != fresh[1]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("subspace_dim", [None, 5])
def test_subspace_and_full_space_in_single_precision(subspace_dim: int | None) -> None:
    """A float32 model gives the value of its float64 twin to four digits.

    Catches: columns that depend on the precision; sums in half the digits.
    """
    hessian, point = coupled(30, 4)
    values = [
        epsilon_sharpness(
            Point(point.to(dtype) + 0.01),
            Quadratic(hessian.to(dtype)),
            at_rest(point.to(dtype)),
            subspace_dim=subspace_dim,
            generator=seeded(),
        ).value
        for dtype in (torch.float32, torch.float64)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


class Cliff(Quadratic):
    """A quadratic that is not finite once the first weight has moved."""

    def __init__(self, beyond: float, edge: float = 5e-4) -> None:
        super().__init__(torch.eye(5, dtype=torch.float64))
        self.beyond, self.edge = beyond, edge

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        fell = (outputs[:, 0] - MINIMIZER[0]).abs().max() > self.edge
        return super().__call__(outputs, targets) + (self.beyond if fell else 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_loss_that_is_not_finite_in_the_box(
    method: SearchMethod, beyond: float
) -> None:
    """A visited point without a finite loss makes the value infinite, and says so.

    Catches: NaN that loses every comparison and leaves a small value behind;
    searching on for more than infinity.
    """
    model = Point(MINIMIZER)
    got = epsilon_sharpness(
        model, Cliff(beyond), at_rest(MINIMIZER), method=method, restarts=50
    )
    assert got.num_grads < 20
    assert got.value == math.inf
    assert got.estimate.status is Status.NOT_RESOLVED
    assert "not finite" in got.detail
    assert torch.equal(model.weights, MINIMIZER)


def test_loss_that_is_not_finite_at_the_point() -> None:
    """A diverged model has no sharpness: NaN, with a status.

    Catches: a sharpness of 0 for a model whose loss is NaN.
    """
    weights = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    hessian = torch.eye(2, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    risk = EmpiricalRisk(Point(weights), Quadratic(hessian), at_rest(ones), check=False)
    got = epsilon_sharpness(risk)
    assert math.isnan(got.value)
    assert got.estimate.status is Status.DIVERGED
    assert "at the point itself" in got.detail
    assert got.num_grads == 1


class Failing(Quadratic):
    """A quadratic that raises after a number of calls."""

    def __init__(self, calls: int) -> None:
        super().__init__(torch.eye(5, dtype=torch.float64))
        self.calls = calls

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("the loss failed")
        return super().__call__(outputs, targets)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("subspace_dim", [None, 2])
def test_model_is_given_back_also_after_an_exception(
    method: SearchMethod, subspace_dim: int | None
) -> None:
    """Weights, gradient and mode are the same bits afterwards, whatever happens.

    Catches: restoring by subtracting the displacement, which rounds; a model that is
    left at the last corner when the loss raises.
    """
    weights = torch.full((5,), 0.1, dtype=torch.float64) + MINIMIZER
    model = Point(weights).train()
    model.weights.grad = torch.ones(5, dtype=torch.float64)
    storage = model.weights.data_ptr()
    whole = Quadratic(torch.eye(5, dtype=torch.float64))
    batches = at_rest(MINIMIZER)
    epsilon_sharpness(model, whole, batches, method=method, subspace_dim=subspace_dim)
    risk = EmpiricalRisk(model, Failing(3), batches, check=False)
    with pytest.raises(RuntimeError, match="the loss failed"):
        epsilon_sharpness(risk, method=method, subspace_dim=subspace_dim)
    assert torch.equal(model.weights, weights)
    assert model.weights.data_ptr() == storage
    assert torch.equal(model.weights.grad, torch.ones(5, dtype=torch.float64))
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon needs to be positive and finite, got 0\.0"),
        ({"epsilon": math.inf}, "positive and finite, got inf"),
        ({"max_iter": 0}, "max_iter needs to be at least 1, got 0; the paper uses 10"),
        ({"restarts": -1}, "restarts needs to be at least 0, got -1"),
        ({"extra_iterations": -2}, "extra_iterations needs to be at least 0, got -2"),
        ({"method": "newton"}, "needs to be 'vertex' or 'lbfgsb', got 'newton'"),
        ({"subspace_dim": 0}, "subspace_dim needs to be at least 1, got 0"),
        ({"subspace_dim": 6}, "from 1 to the 5 parameters, got 6; leave it out"),
        (
            {"check": True, "method": "lbfgsb"},
            "check compares the vertex search with L-BFGS-B and needs method='vertex'",
        ),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, object], message: str) -> None:
    """What is out of range is refused with what was given and what would do.

    Catches: a silent clamp.
    """
    loss_fn = Quadratic(torch.diag(CURVATURES))
    with pytest.raises(UsageError, match=message):
        epsilon_sharpness(Point(MINIMIZER), loss_fn, at_rest(MINIMIZER), **arguments)


def test_low_losses_are_refused() -> None:
    """A loss of -1 or less is refused.

    Catches: a division by zero, or a sign that flips.
    """
    low = Quadratic(torch.diag(CURVATURES), offset=-1.5)
    with pytest.raises(UsageError, match=r"a loss above -1, got -1\.5; add a constant"):
        epsilon_sharpness(Point(MINIMIZER), low, at_rest(MINIMIZER))

"""Worst-case sharpness against maxima that are known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.measures.worst_case import (
    worst_case_sharpness,
)
from noisekit.sharpness.search.regions import BallNorm
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, classes, rectified, state_of
from tests.sharpness.quadratics import (
    CURVATURES,
    MINIMIZER,
    Point,
    Quadratic,
    at_rest,
    coupled,
)


def slope_and_curvature(dims: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, Hessian and weights of a convex quadratic away from its minimum."""
    hessian, minimizer = coupled(dims, seed)
    weights = minimizer + 0.3 * torch.randn(dims, generator=seeded(seed)).double()
    return hessian @ (weights - minimizer), hessian, weights


def measured(weights: Tensor, hessian: Tensor, gradient: Tensor, **options):
    """Sharpness of the quadratic with that gradient at the weights."""
    minimizer = weights - torch.linalg.solve(hessian, gradient)
    return worst_case_sharpness(
        Point(weights),
        Quadratic(hessian),
        at_rest(minimizer),
        generator=seeded(),
        **options,
    )


@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_step_is_that_of_sam_and_asam(norm: BallNorm, eta: float | None) -> None:
    """The rise at ``rho T^2 g / |T g|`` or ``rho T sign(g)``, by hand.

    Catches: ``T`` once in place of twice; a step that the radius is not reached with;
    the gradient of one batch only.
    """
    gradient, hessian, weights = slope_and_curvature(6, 0)
    got = measured(
        weights,
        hessian,
        gradient,
        rho=0.3,
        norm=norm,
        adaptive=eta is not None,
        eta=eta or 0.0,
    )
    unit = torch.ones(6).double() if eta is None else weights.abs() + eta
    if norm == "l2":
        step = 0.3 * unit**2 * gradient / (unit * gradient).norm()
    else:
        step = 0.3 * unit * gradient.sign()
    want = float(gradient @ step + step @ hessian @ step / 2)
    assert got.value == pytest.approx(want, rel=1e-10)
    torch.testing.assert_close(got.displacement, step, rtol=1e-10, atol=1e-12)
    assert got.estimate.num_grads == 1
    assert got.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-10)
    dual = (unit * gradient).norm(p=2 if norm == "l2" else 1)
    share = 0.3 * float(dual) / want
    assert got.first_order_share == pytest.approx(share, rel=1e-10)
    assert "iterate, not a minimizer" in got.detail


@pytest.mark.parametrize("adaptive", [False, True])
def test_many_steps_reach_the_maximum_over_the_euclidean_ball(adaptive: bool) -> None:
    """On quadratics it is that of the secular equation, from below.

    Catches: an ascent that stays where the first step led; a projection in the units
    of the weights where the ball is in others.
    """
    for seed in range(4):
        gradient, hessian, weights = slope_and_curvature(6, seed)
        unit = weights.abs() if adaptive else torch.ones(6).double()
        want = reference.highest_in_ball(
            (unit * gradient).numpy(),
            (unit[:, None] * hessian * unit).numpy(),
            0.5,
        )
        one, many = (
            measured(
                weights, hessian, gradient, rho=0.5, adaptive=adaptive, steps=steps
            )
            for steps in (1, 40)
        )
        assert many.value == pytest.approx(want, rel=1e-6)
        assert one.value <= many.value <= want * (1 + 1e-9)
        inside = many.displacement / unit
        assert float(inside.norm()) <= 0.5 * (1 + 1e-9)


def test_many_steps_reach_the_highest_corner_of_the_cube() -> None:
    """With restarts the best of all corners is found, in adaptive units too.

    Catches: a Euclidean projection; restarts that are not kept apart.
    """
    for adaptive in (False, True):
        gradient, hessian, weights = slope_and_curvature(6, 2)
        unit = weights.abs() if adaptive else torch.ones(6).double()
        want = max(
            float(gradient @ step + step @ hessian @ step / 2)
            for step in reference.corners(0.5 * unit)
        )
        got = measured(
            weights,
            hessian,
            gradient,
            rho=0.5,
            norm="linf",
            adaptive=adaptive,
            steps=6,
            restarts=12,
        )
        assert got.value == pytest.approx(want, rel=1e-9)


def test_top_eigenvalue_decides_at_a_minimizer() -> None:
    """Where the gradient is exactly zero, steps find ``rho^2 lambda_max / 2``.

    Catches: 0/0 at a minimizer, which gives NaN or no rise at all.
    """
    got = worst_case_sharpness(
        Point(MINIMIZER),
        Quadratic(torch.diag(CURVATURES)),
        at_rest(MINIMIZER),
        rho=0.1,
        steps=30,
        generator=seeded(),
    )
    assert got.value == pytest.approx(0.1**2 * 4 / 2, rel=1e-6)
    assert got.grad_norm == 0.0
    assert got.first_order_share == 0.0
    assert got.detail == ""
    assert got.estimate.side == "lower"
    assert got.estimate.interval().low == got.value
    assert got.estimate.interval().high == math.inf


def test_weights_of_zero_stay_at_rest_and_hurt_nobody() -> None:
    """Adaptive values with zero weights are those of the others alone.

    Catches: 0/0 in the ratio of displacement and weight; NaN that compares as inside
    the ball, so that the projection is skipped and the radius exceeded.
    """
    gradient, hessian, weights = slope_and_curvature(6, 1)
    weights[2] = weights[4] = 0.0
    moving = weights != 0
    for norm in ("l2", "linf"):
        got = measured(
            weights, hessian, gradient, rho=0.5, norm=norm, adaptive=True, steps=20
        )
        few = measured(
            weights[moving],
            hessian[moving][:, moving],
            gradient[moving],
            rho=0.5,
            norm=norm,
            adaptive=True,
            steps=20,
        )
        assert math.isfinite(got.value)
        assert got.value == pytest.approx(few.value, rel=1e-9)
        assert got.num_fixed == 2
        assert not got.displacement[~moving].any()
        power = 2 if norm == "l2" else math.inf
        length = (got.displacement[moving] / weights[moving]).norm(p=power)
        assert float(length) <= 0.5 * (1 + 1e-9)


class Hills(nn.Module):
    """A loss with many hills, on which a long step often leads down."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (3 * outputs).sin().sum(1).mean() + 0.1 * outputs.square().sum(1).mean()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_displacement_is_where_the_value_is(norm: BallNorm) -> None:
    """After refused steps, too, the loss at the displacement returned is the value's.

    Catches: a displacement that goes on from a refused step while the weights were
    set back to the best; a last point in place of the best.
    """
    _, weights = coupled(5, 3)
    model, data = Point(weights), at_rest(weights)
    before = EmpiricalRisk(model, Hills(), data).value()
    values = []
    for steps in (1, 2, 5, 12, 30):
        got = worst_case_sharpness(
            model, Hills(), data, rho=2.0, norm=norm, steps=steps, generator=seeded()
        )
        moved = EmpiricalRisk(Point(weights + got.displacement), Hills(), data)
        assert got.value == pytest.approx(moved.value() - before, abs=1e-12)
        values.append(got.value)
    assert min(values) >= 0
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_value_is_never_below_the_start() -> None:
    """At a maximum there is no rise, and it says 0.

    Catches: the rise at the point reached, which is negative.
    """
    got = worst_case_sharpness(
        Point(MINIMIZER),
        Quadratic(-torch.diag(CURVATURES)),
        at_rest(MINIMIZER),
        rho=0.5,
        steps=4,
        restarts=2,
        generator=seeded(),
    )
    assert got.value == 0.0
    assert math.isnan(got.first_order_share)
    assert not got.displacement.any()


def test_groups_are_searched_one_by_one_and_averaged() -> None:
    """m-sharpness is the mean of each group's own maximum, by its examples.

    Catches: one displacement for all groups; a ragged group that weighs as much as
    the others; groups of the sum loss that are not divided by their examples.
    """
    inputs, targets = classes(23)
    model = rectified()
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        batches = [(inputs[:13], targets[:13]), (inputs[13:], targets[13:])]
        got = worst_case_sharpness(
            model, loss, batches, rho=0.1, batch_size=5, generator=seeded()
        )
        rises, sizes = [], []
        for start, stop in ((0, 5), (5, 10), (10, 13), (13, 18), (18, 23)):
            part = [(inputs[start:stop], targets[start:stop])]
            rises.append(worst_case_sharpness(model, LOSS, part, rho=0.1).value)
            sizes.append(stop - start)
        want = np.average(rises, weights=sizes)
        assert got.value == pytest.approx(want, rel=1e-10)
        residuals = np.array(sizes) / 23 * (np.array(rises) - want)
        error = math.sqrt(5 / 4 * (residuals**2).sum())
        assert got.estimate.stderr == pytest.approx(error, rel=1e-10)
        assert got.estimate.error_source is ErrorSource.DATA
        assert got.estimate.dof == 4
        assert got.displacement is None
        assert got.estimate.interval().low < got.value
        assert got.estimate.interval().high == math.inf
    whole = worst_case_sharpness(model, LOSS, batches, rho=0.1)
    assert got.value > whole.value


def test_error_over_batches_is_of_the_displacement_found() -> None:
    """It is the linearised error of the mean of the batches' rises there.

    Catches: the spread of losses in place of that of rises; equal weights.
    """
    inputs, targets = classes(40)
    parts = (slice(0, 16), slice(16, 28), slice(28, 40))
    batches = [(inputs[part], targets[part]) for part in parts]
    model = rectified()
    got = worst_case_sharpness(model, LOSS, batches, rho=0.2, steps=3)
    loss = [reference.flat_loss(model, LOSS, *batch) for batch in batches]
    at = reference.flat_weights(model)
    rises = np.array([float(f(at + got.displacement) - f(at)) for f in loss])
    shares = np.array([0.4, 0.3, 0.3])
    assert got.value == pytest.approx(shares @ rises, rel=1e-10)
    residuals = shares * (rises - shares @ rises)
    want = math.sqrt(3 / 2 * (residuals**2).sum())
    assert got.data_stderr == pytest.approx(want, rel=1e-8)
    assert worst_case_sharpness(model, LOSS, batches[:1]).data_stderr is None


def test_larger_outputs_do_not_change_normalised_values() -> None:
    """A last layer ten times as large leaves the loss of normalised logits alone.

    Catches: logits that are not centred before they are divided; a norm over examples.
    """
    model, larger = rectified(), rectified()
    with torch.no_grad():
        larger[-1].weight.mul_(10)
        larger[-1].bias.mul_(10)
    data = [classes(20)]
    for logits, scale in (("unit_norm", 1.0), ("unit_std", math.sqrt(3))):
        values = [
            worst_case_sharpness(
                m, LOSS, data, rho=0.3, adaptive=True, logits=logits, steps=5
            )
            for m in (model, larger)
        ]
        assert values[0].value == pytest.approx(values[1].value, rel=1e-9)
        inputs, targets = data[0]
        outputs = model(inputs).detach()
        outputs -= outputs.mean(1, keepdim=True)
        outputs *= scale / outputs.norm(dim=1, keepdim=True)
        assert values[0].loss == pytest.approx(float(LOSS(outputs, targets)), rel=1e-12)
        assert values[0].logits == logits


def test_equal_logits_are_no_division_by_zero() -> None:
    """A network whose outputs are all the same has normalised logits of zero.

    Catches: 0/0 for the first network anybody tries, one that starts at zero.
    """
    model = rectified()
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    got = worst_case_sharpness(model, LOSS, [classes(20)], rho=0.1, logits="unit_norm")
    assert math.isfinite(got.value)
    assert got.loss == pytest.approx(math.log(3), rel=1e-12)


@pytest.mark.parametrize("rho", [1e-3, 0.05])
def test_single_precision_agrees_with_double(rho: float) -> None:
    """Catches: gradients whose squares underflow."""
    wide, narrow = rectified(), rectified().float()
    inputs, targets = classes(30)
    want = worst_case_sharpness(wide, LOSS, [(inputs, targets)], rho=rho, steps=3)
    got = worst_case_sharpness(
        narrow, LOSS, [(inputs.float(), targets)], rho=rho, steps=3
    )
    assert got.value == pytest.approx(want.value, rel=1e-3)


def test_losses_that_are_not_finite_are_told() -> None:
    """Infinite in the ball: infinite and not resolved; at the weights: diverged.

    Catches: NaN that loses every comparison and comes out as no rise.
    """

    def logarithm(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets).log().mean()

    weights = torch.full((2,), 0.1, dtype=torch.float64)
    data = at_rest(torch.zeros(2, dtype=torch.float64))
    got = worst_case_sharpness(Point(weights), logarithm, data, rho=0.5)
    assert got.value == math.inf
    assert got.estimate.status is Status.NOT_RESOLVED
    assert got.detail == "the loss is not finite at a point of the ball"
    risk = EmpiricalRisk(Point(-weights), logarithm, data, check=False)
    got = worst_case_sharpness(risk, rho=0.5)
    assert math.isnan(got.value)
    assert got.estimate.status is Status.DIVERGED
    assert got.detail == "the loss at the point itself is nan"


def test_model_is_given_back() -> None:
    """Weights, statistics, modes, gradients and the global random state.

    Catches: weights left where the ascent ended.
    """
    model = rectified(norm=True).train()
    before = state_of(model)
    random = torch.random.get_rng_state()
    for options in ({"batch_size": 7}, {"norm": "linf", "restarts": 1}):
        worst_case_sharpness(
            model, LOSS, [classes(20)], steps=2, generator=seeded(), **options
        )
    assert state_of(model) == before
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho needs to be positive and finite, got 0.0; SAM uses 0.05"),
        ({"norm": "l1"}, "norm needs to be 'l2' or 'linf', got 'l1'"),
        ({"steps": 0}, "steps needs to be at least 1, got 0"),
        ({"restarts": -1}, "restarts needs to be at least 0, got -1"),
        ({"eta": 0.01}, "goes with adaptive=True, got eta=0.01 and adaptive=False"),
        (
            {"eta": -1.0, "adaptive": True},
            "eta needs to be at least 0 and finite",
        ),
        ({"batch_size": 0}, "batch_size needs to be at least 1, got 0"),
        ({"batch_size": 9}, "got at most 8; pass larger batches, or a smaller batch_"),
        ({"logits": "std"}, "one of 'raw', 'unit_norm', 'unit_std', got 'std'"),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        worst_case_sharpness(rectified(), LOSS, [classes(8)], **options)


def test_networks_without_weights_or_logits_are_refused() -> None:
    """Nothing but zeros cannot be moved in proportion; one output has no logits."""
    nothing = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(UsageError, match="got only zeros; set eta= above 0"):
        worst_case_sharpness(
            Point(nothing),
            Quadratic(torch.eye(3).double()),
            at_rest(nothing),
            adaptive=True,
        )
    model = nn.Linear(5, 1).double()
    inputs, _ = classes(8)
    with pytest.raises(UsageError, match=r"at least 2 classes, got shape \(8, 1\)"):
        worst_case_sharpness(
            model, nn.MSELoss(), [(inputs, inputs[:, :1])], logits="unit_std"
        )

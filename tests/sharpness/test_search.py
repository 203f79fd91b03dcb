"""The search for the highest point of a box, against trying every corner."""

import pytest
import torch
from torch import Tensor

from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.measures.epsilon import (
    EpsilonSharpnessResult,
    epsilon_sharpness,
)
from noisekit.sharpness.search.box_search import SearchMethod
from noisekit.sharpness.search.subspace import RandomSubspace
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.quadratics import MINIMIZER, Point, Quadratic, at_rest, coupled

METHODS: tuple[SearchMethod, ...] = ("vertex", "lbfgsb")
ORIGIN = torch.zeros(1, dtype=torch.float64)


def test_lbfgsb_goes_on_where_the_gradient_is_below_its_usual_tolerance() -> None:
    """A gradient below 1e-5 everywhere does not end L-BFGS-B at once.

    Catches: SciPy's default projected-gradient tolerance, with which the search stays
    at its start.
    """
    curvatures = torch.full((5,), 0.02, dtype=torch.float64)
    got = epsilon_sharpness(
        Point(MINIMIZER + 1e-6),
        Quadratic(torch.diag(curvatures)),
        at_rest(MINIMIZER),
        method="lbfgsb",
        generator=seeded(),
    )
    radius = 1e-3 * (MINIMIZER.abs() + 1)
    want = reference.keskar(float((curvatures * radius**2).sum()) / 2, 0.3)
    assert 0 < got.grad_norm < 1e-5
    assert got.value == pytest.approx(want, rel=0.1)


def test_weights_at_rest_move_too() -> None:
    """A weight without a gradient but with curvature counts, beside one that has both.

    Catches: the sign of zero, which leaves such weights where they are for ever.
    """
    offset = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    rest = MINIMIZER[:2]
    got = epsilon_sharpness(
        Point(rest + offset),
        Quadratic(torch.eye(2, dtype=torch.float64)),
        at_rest(rest),
        max_iter=1,
    )
    radius = 1e-3 * ((rest + offset).abs() + 1)
    loss = 0.3 + float(offset @ offset) / 2
    rise = float(offset @ radius) + float(radius @ radius) / 2
    assert got.value == pytest.approx(reference.keskar(rise, loss), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_coupled_quadratic_reaches_the_highest_of_all_corners(
    method: SearchMethod, seed: int
) -> None:
    """With enough restarts the search finds what trying every corner finds.

    Catches: climbing along the gradient of another point; a best point that is the
    last instead of the highest.
    """
    hessian, point = coupled(8, seed)
    loss_fn = Quadratic(hessian)
    got = epsilon_sharpness(
        Point(point),
        loss_fn,
        at_rest(point),
        method=method,
        restarts=30,
        generator=seeded(),
    )
    radius = 1e-3 * (point.abs() + 1)

    def loss(x: Tensor) -> Tensor:
        return loss_fn(x[None], point[None])

    top = reference.highest_corner(loss, point, torch.eye(8).double(), radius)
    assert got.value == pytest.approx(reference.keskar(top - 0.3, 0.3), rel=1e-9)


def test_iterations_left_at_a_local_maximum_are_spent_elsewhere() -> None:
    """Enough iterations of one search find the highest corner as well.

    Catches: staying for ever at the first corner that points to itself.
    """
    hessian, point = coupled(10, 0)
    risk = EmpiricalRisk(Point(point), Quadratic(hessian), at_rest(point))
    few = epsilon_sharpness(risk, max_iter=4, generator=seeded())
    many = epsilon_sharpness(risk, max_iter=300, generator=seeded())
    top = reference.highest_corner(
        lambda x: Quadratic(hessian)(x[None], point[None]),
        point,
        torch.eye(10).double(),
        1e-3 * (point.abs() + 1),
    )
    want = reference.keskar(top - 0.3, 0.3)
    assert few.value < 0.9 * want
    assert many.value == pytest.approx(want, rel=1e-9)


def test_no_point_is_evaluated_twice() -> None:
    """Of many iterations each looks at another point.

    Catches: jumping again and again to the corner where the search is.
    """
    hessian, point = coupled(60, 1)
    quadratic = Quadratic(hessian)
    visited = []

    def watching(outputs: Tensor, targets: Tensor) -> Tensor:
        visited.append(tuple(outputs[0].tolist()))
        return quadratic(outputs, targets)

    batches = [(point[None], point[None])]
    risk = EmpiricalRisk(Point(point), watching, batches, check=False)
    epsilon_sharpness(risk, max_iter=40, generator=seeded())
    assert len(visited) == len(set(visited)) == 41


def test_a_jump_that_goes_too_far_is_cut() -> None:
    """A maximum between two corners that point to each other is found.

    Catches: going back and forth between the corners; a jump compared with the loss
    at the start.
    """

    def between(outputs: Tensor, targets: Tensor) -> Tensor:
        t = outputs.mean() / 1e-3
        return 1 + 1.5 * t + 2.15 * t**2 - 1.45 * t**3 - 2 * t**4

    risk = EmpiricalRisk(Point(ORIGIN), between, at_rest(ORIGIN))
    got = epsilon_sharpness(risk, generator=seeded())
    assert got.value >= 100 * 0.98 / 2


def test_a_dead_end_is_left() -> None:
    """Where the loss bends down at once, the search goes on elsewhere.

    Catches: cutting the same jump into ever smaller pieces.
    """

    def ridge(outputs: Tensor, targets: Tensor) -> Tensor:
        moved = outputs.mean()
        return 1 + moved - 1e6 * moved**2 + 10 * (moved < -8e-4)

    risk = EmpiricalRisk(Point(ORIGIN), ridge, at_rest(ORIGIN))
    got = epsilon_sharpness(risk, max_iter=10, generator=seeded())
    assert got.value > 400


@pytest.mark.parametrize("method", METHODS)
def test_subspace_reaches_the_highest_of_its_corners(method: SearchMethod) -> None:
    """In the span of the columns too, trying every corner finds no higher point.

    Catches: a gradient that is not brought into the subspace; the length of another
    point than the best one.
    """
    hessian, point = coupled(20, 6)
    loss_fn = Quadratic(hessian)
    got = epsilon_sharpness(
        Point(point),
        loss_fn,
        at_rest(point),
        subspace_dim=5,
        method=method,
        restarts=20,
        generator=seeded(7),
    )
    seed = int(torch.randint(2**62, (), generator=seeded(7)))
    box = RandomSubspace(point, 1e-3, num_dims=5, seed=seed)
    units = torch.eye(5, dtype=torch.float64)
    columns = torch.stack([box.displacement(unit) for unit in units], dim=1)
    heights = {
        float((columns @ y).norm()): float(loss_fn((point + columns @ y)[None], point))
        for y in reference.corners(box.radius)
    }
    top = max(heights.values())
    assert got.value == pytest.approx(reference.keskar(top - 0.3, 0.3), rel=1e-9)
    assert heights[min(heights, key=lambda n: abs(n - got.displacement_norm))] == (
        pytest.approx(top, rel=1e-9)
    )


@pytest.mark.parametrize("method", METHODS)
def test_max_iter_is_the_budget_and_extra_iterations_only_tell(
    method: SearchMethod,
) -> None:
    """The value is that of ``max_iter`` iterations; what more would find stands apart.

    Catches: extra iterations that leak into the value; a shortfall that is never
    computed.
    """
    hessian, point = coupled(60, 1)
    risk = EmpiricalRisk(Point(point), Quadratic(hessian), at_rest(point))

    def measured(extra_iterations: int) -> EpsilonSharpnessResult:
        return epsilon_sharpness(
            risk,
            method=method,
            max_iter=1,
            extra_iterations=extra_iterations,
            generator=seeded(),
        )

    short, told = measured(0), measured(12)
    assert short.shortfall is None
    assert told.value == short.value
    assert told.shortfall is not None
    assert told.shortfall > 0.1 * told.value
    assert told.num_grads > short.num_grads


def test_vertex_search_costs_one_gradient_per_iteration() -> None:
    """Ten iterations cost eleven gradient evaluations, the one at the point included.

    Catches: evaluating a point twice; not counting the first.
    """
    hessian, point = coupled(6, 0)
    risk = EmpiricalRisk(Point(point), Quadratic(hessian), at_rest(point))
    assert epsilon_sharpness(risk).num_grads == 11
    assert epsilon_sharpness(risk, restarts=2).num_grads == 11 + 2 * 11

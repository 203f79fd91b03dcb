"""Curves of low loss between two solutions."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.sharpness.landscape.curves import (
    ConnectingCurve,
    CurveTraining,
    connecting_curve,
)
from tests.randomness import seeded
from tests.sharpness.quadratics import Point

ANGLE = 2.0


def ring(outputs: Tensor, targets: Tensor) -> Tensor:
    """A valley along the unit circle: ``(|w|^2 - 1)^2``."""
    return ((outputs.square().sum(1) - 1) ** 2).mean()


def on_the_ring(angle: float) -> dict[str, Tensor]:
    place = [math.cos(angle), math.sin(angle)]
    return {"weights": torch.tensor(place, dtype=torch.float64)}


def along_the_ring(**arguments: object) -> ConnectingCurve:
    rows = torch.zeros(3, 2, dtype=torch.float64)
    options = {"start": on_the_ring(0.0), "end": on_the_ring(ANGLE)}
    trained = {"num_steps": arguments.pop("num_steps", 150)}
    if "learning_rate" in arguments:
        trained["learning_rate"] = arguments.pop("learning_rate")
    options |= {"training": CurveTraining(generator=seeded(), **trained)} | arguments
    return connecting_curve(Point(rows[0]), ring, [(rows, rows)], **options)


@pytest.mark.parametrize("shape", ["bezier", "polychain"])
def test_the_curve_goes_round_where_the_straight_line_goes_over(shape: str) -> None:
    """The straight barrier is the chord's; the curve's is a small part of it.

    The chord's middle is at a distance ``cos(angle / 2)`` of the centre. Catches: a
    bend that is never trained; a gradient of the wrong sign.
    """
    got = along_the_ring(shape=shape)
    middle = (math.cos(ANGLE / 2) ** 2 - 1) ** 2
    assert got.straight.barrier == pytest.approx(middle, rel=1e-9)
    assert 0.0 <= got.barrier < 0.25 * middle
    assert got.curve.path == shape
    assert got.num_grads == 150


@pytest.mark.parametrize("shape", ["bezier", "polychain"])
def test_points_lie_on_the_curve_of_the_bend(shape: str) -> None:
    """Every loss is that of the formula with the returned bend.

    Catches: a polychain of unequal speed; a Bezier curve through its control point.
    """
    got = along_the_ring(shape=shape, num_steps=20, num_points=9)
    start, bend, end = (
        state["weights"] for state in (on_the_ring(0.0), got.bend, on_the_ring(ANGLE))
    )
    for t, loss in zip(got.curve.alphas, got.curve.losses, strict=True):
        if shape == "bezier":
            first, second = torch.lerp(start, bend, t), torch.lerp(bend, end, t)
            place = torch.lerp(first, second, t)
        elif t <= 0.5:
            place = torch.lerp(start, bend, 2 * t)
        else:
            place = torch.lerp(bend, end, 2 * t - 1)
        want = float(ring(place[None], place[None]))
        assert loss == pytest.approx(want, rel=1e-9, abs=1e-15)
    assert got.curve.alphas == got.straight.alphas


def test_training_starts_in_the_middle() -> None:
    """Without steps the curve is the straight line.

    Catches: a nudge that stays when nothing is trained.
    """
    got = along_the_ring(num_steps=0)
    assert got.curve.losses == pytest.approx(got.straight.losses, rel=1e-12)
    want = (on_the_ring(0.0)["weights"] + on_the_ring(ANGLE)["weights"]) / 2
    torch.testing.assert_close(got.bend["weights"], want)


def test_opposite_ends_leave_the_ridge() -> None:
    """From the very top there is no slope to either side; the nudge breaks the tie.

    Catches: a search that stays on the ridge for ever.
    """
    end = {"weights": torch.tensor([-1.0, 0.0], dtype=torch.float64)}
    got = along_the_ring(end=end, num_steps=400)
    assert got.straight.barrier == pytest.approx(1.0)
    assert got.barrier < 0.6


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        ).double()
        model(torch.randn(16, 4, dtype=torch.float64))
    return model


@pytest.mark.parametrize("bn", ["running", "recalibrated"])
def test_ends_are_exact_and_the_model_is_given_back(bn: str) -> None:
    """Losses at both ends are the solutions'; no bit of the model changes.

    Catches: a model left at the last trained point; statistics that move along.
    """
    inputs = torch.randn(30, 4, generator=seeded(1), dtype=torch.float64)
    targets = torch.randint(3, (30,), generator=seeded(2))
    model = network(1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ends = [copy.deepcopy(network(seed).state_dict()) for seed in (2, 3)]
    state = torch.get_rng_state()
    got = connecting_curve(
        model,
        nn.CrossEntropyLoss(),
        [(inputs, targets)],
        start=ends[0],
        end=ends[1],
        training=CurveTraining(num_steps=30),
        num_points=5,
        bn=bn,
    )
    assert got.curve.losses[0] == got.straight.losses[0]
    assert got.curve.losses[-1] == got.straight.losses[-1]
    assert got.curve.bn == bn
    assert got.curve.losses[2] < got.straight.losses[2]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    twin = network(1)
    twin.load_state_dict(dict(got.bend))
    assert set(got.bend) == set(twin.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "spline"}, "'bezier' or 'polychain', got 'spline'"),
        ({"num_steps": -1}, "num_steps needs to be at least 0, got -1"),
        (
            {"learning_rate": 0.0},
            "learning_rate needs to be positive and finite",
        ),
        ({"num_points": 2}, "num_points needs to be at least 3, got 2"),
        ({"end": {}}, "end needs to be a state dict of this model, got no weights"),
    ],
)
def test_curves_that_are_refused(arguments: dict[str, object], message: str) -> None:
    """Catches: a curve with nothing between its ends."""
    with pytest.raises(UsageError) as caught:
        along_the_ring(**arguments)
    assert message in str(caught.value)

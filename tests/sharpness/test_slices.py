"""Slices of the loss: the grid, its directions, and many points at a time."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.landscape.directions import (
    DirectionSpec,
    directions_for,
    filter_numbers,
)
from noisekit.sharpness.landscape.points import values_at
from noisekit.sharpness.landscape.slices import LossSlice, loss_slice
from tests.cases import CASES, Case
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, FailsAfter, built


def network() -> nn.Sequential:
    return built(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)
    )


def images() -> nn.Sequential:
    return built(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 4, 2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 3),
    )


def data(num_examples: int = 20) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(num_examples, 4, generator=seeded(9), dtype=torch.float64)
    return inputs, torch.randint(3, (num_examples,), generator=seeded(8))


def ragged() -> list[tuple[Tensor, Tensor]]:
    inputs, targets = data()
    return [(inputs[:13], targets[:13]), (inputs[13:], targets[13:])]


def loss_at(model: nn.Module, vector: Tensor) -> float:
    """The loss over all data of a copy with these weights."""
    twin = copy.deepcopy(model).eval()
    loss = reference.flat_loss(twin, LOSS, *data())
    return float(loss(vector).detach())


@pytest.mark.parametrize("build", [network, images])
@pytest.mark.parametrize("kind", ["filter_normalised", "random", "eigenvectors"])
def test_every_grid_point_is_that_of_a_moved_copy(
    build: Callable[[], nn.Sequential], kind: str
) -> None:
    """Losses on the plane equal those of copies moved by both steps, on ragged data.

    Catches: the two axes exchanged; a grid whose second axis never moves; averages of
    batch averages; dropout; weights that keep the previous point's step.
    """
    model = build()
    got = loss_slice(
        model,
        LOSS,
        ragged(),
        directions=DirectionSpec(kind, generator=seeded()),
        num_points=4,
    )
    start = reference.flat_weights(model)
    first, second = got.directions.vectors.unbind(1)
    for i, a in enumerate(got.coordinates[0]):
        for j, b in enumerate(got.coordinates[1]):
            want = loss_at(model, start + a * first + b * second)
            assert got.losses[i, j] == pytest.approx(want, rel=1e-9)
    assert got.num_batched == got.losses.size - 1
    assert got.loop_reason == ""
    assert np.ptp(got.losses, axis=0).max() > 0
    assert np.ptp(got.losses, axis=1).max() > 0


def test_the_middle_is_the_model_itself() -> None:
    """Zero is on each axis once, and its loss is bit for bit the model's.

    Catches: a grid that steps over the minimum; a middle that was rounded.
    """
    model = network().float()
    batches = [(x.float(), y) for x, y in ragged()]
    want = EmpiricalRisk(model, LOSS, batches).value()
    for num_points, size in ((5, 5), (6, 7)):
        got = loss_slice(
            model,
            LOSS,
            batches,
            num_points=num_points,
            extent=0.3,
            directions=DirectionSpec(generator=seeded()),
        )
        assert got.middle_loss == want
        assert got.losses.shape == (size, size)
        for axis in got.coordinates:
            assert list(axis).count(0.0) == 1
            assert (axis[0], axis[-1]) == pytest.approx((-0.3, 0.3))


@pytest.mark.parametrize("one_dimensional", ["fixed", "scaled"])
def test_filters_of_a_direction_have_the_weights_norms(one_dimensional: str) -> None:
    """Per filter, both directions are as long as the weights and at right angles.

    Rows of linear layers, first axis of convolutions, second axis of transposed ones
    within its group. Catches: a norm per layer; the absolute weights as a bias's
    direction, which both axes then share; transposed filters taken by rows; an angle
    that scaling the filters spoils.
    """
    model = images()
    risk = EmpiricalRisk(model, LOSS, ragged())
    found = directions_for(
        risk, DirectionSpec(one_dimensional=one_dimensional, generator=seeded()), 2
    )
    split = [risk.layout.split(v.contiguous()) for v in found.vectors.unbind(1)]
    named = dict(zip(risk.layout.names, zip(*split, strict=True), strict=True))
    for name, weight in model.named_parameters():
        first, second = named[name]
        if weight.ndim == 1:
            size = 0.0 if one_dimensional == "fixed" else float(weight.detach().norm())
            assert float(first.norm()) == pytest.approx(size)
            assert float(second.norm()) == pytest.approx(size)
            continue
        if name == "3.weight":  # (4, 3, 2, 2) in two groups: six filters of eight
            first, second, weight = (
                t.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1).flatten(1)
                for t in (first, second, weight)
            )
        rows = [t.detach().flatten(1) for t in (first, second, weight)]
        want = rows[2].norm(dim=1)
        torch.testing.assert_close(rows[0].norm(dim=1), want)
        torch.testing.assert_close(rows[1].norm(dim=1), want)
        products = (rows[0] * rows[1]).sum(1) / want**2
        torch.testing.assert_close(products, torch.zeros_like(products))
    assert abs(found.cosine) < 1e-12


def test_filters_of_one_weight_leave_an_angle_and_it_is_reported() -> None:
    """Where no right angle exists the cosine says so.

    Catches: a second direction of zeros; 0 / 0.
    """
    model = built(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = data()
    risk = EmpiricalRisk(model, LOSS, [(inputs[:, :1], targets)])
    found = directions_for(risk, DirectionSpec(generator=seeded(3)), 2)
    first, second = found.vectors.unbind(1)
    assert bool(torch.isfinite(found.vectors).all())
    want = float(first @ second / (first.norm() * second.norm()))
    assert found.cosine == pytest.approx(want)
    assert abs(found.cosine) > 1e-3
    torch.testing.assert_close(second[:8].abs(), model[0].weight.detach()[:, 0].abs())


def test_random_directions_are_isotropic_and_as_long_as_the_weights() -> None:
    """Orthogonal, signed, and with a mean of zero.

    Catches: uniform positive numbers, whose directions are nearly collinear.
    """
    risk = EmpiricalRisk(images(), LOSS, ragged())
    found = directions_for(risk, DirectionSpec("random", generator=seeded()), 2)
    norm = float(risk.vector().norm())
    assert found.lengths == pytest.approx((norm, norm))
    assert abs(found.cosine) < 1e-12
    means = found.vectors.mean(0) * len(found.vectors) ** 0.5 / norm * 4
    assert float(means.abs().max()) < 12  # three standard errors
    assert float((found.vectors > 0).double().mean()) == pytest.approx(0.5, abs=0.08)


def test_a_larger_extent_goes_farther() -> None:
    """The step at the end of an axis is the extent times the direction.

    Catches: a distance that is divided by, so that 0.1 moves ten lengths.
    """
    model = built(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    start = reference.flat_weights(model)
    for extent in (0.1, 3.0):
        got = loss_slice(
            model,
            LOSS,
            ragged(),
            directions=DirectionSpec("random", generator=seeded()),
            dims=1,
            extent=extent,
            num_points=3,
        )
        step = extent * got.directions.vectors[:, 0]
        assert float(step.norm() / start.norm()) == pytest.approx(extent)
        assert got.losses[-1] == pytest.approx(loss_at(model, start + step), rel=1e-9)


def test_eigenvector_directions_bend_by_their_eigenvalues() -> None:
    """The second difference along each axis is its eigenvalue, the largest two.

    Catches: eigenvalues by magnitude; ascending order; directions that are not unit.
    """
    model = built(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    got = loss_slice(
        model,
        LOSS,
        ragged(),
        directions=DirectionSpec("eigenvectors", generator=seeded()),
        extent=1e-3,
        num_points=3,
    )
    loss = reference.flat_loss(model, LOSS, *data())
    hessian = reference.dense_hessian(loss, reference.flat_weights(model))
    want = torch.linalg.eigvalsh(hessian).flip(0)[:2].tolist()
    bend = [
        (got.losses[0, 1] - 2 * got.losses[1, 1] + got.losses[2, 1]) / 1e-6,
        (got.losses[1, 0] - 2 * got.losses[1, 1] + got.losses[1, 2]) / 1e-6,
    ]
    assert bend == pytest.approx(want, rel=5e-3)
    assert f"eigenvalues {want[0]:.3f}" in got.directions.scale


def test_given_directions_are_taken_as_they_are() -> None:
    """Neither scaled nor turned; their angle is told.

    Catches: a second direction that is made orthogonal without a word.
    """
    model = network()
    size = sum(p.numel() for p in model.parameters())
    first, second = torch.ones(size).double(), torch.linspace(0, 1, size).double()
    got = loss_slice(model, LOSS, ragged(), directions=[first, second], num_points=3)
    assert torch.equal(got.directions.vectors, torch.stack([first, second], 1))
    want = float(first @ second / (first.norm() * second.norm()))
    assert got.directions.cosine == pytest.approx(want)
    line = loss_slice(model, LOSS, ragged(), directions=[second], dims=1, num_points=3)
    assert line.losses == pytest.approx(got.losses[1])


def test_only_chosen_parameters_move() -> None:
    """Catches: ``params=`` that selects the norm but not what moves."""
    model = network()
    got = loss_slice(
        model,
        LOSS,
        ragged(),
        dims=1,
        num_points=3,
        params="4.*",
        directions=DirectionSpec(generator=seeded()),
    )
    assert len(got.directions.vectors) == 6 * 3 + 3
    start = reference.flat_weights(model)
    moved = start.clone()
    moved[-21:] -= got.directions.vectors[:, 0]
    assert got.losses[0] == pytest.approx(loss_at(model, moved), rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_together_and_one_by_one_are_the_same(case: Case) -> None:
    """On every case of the table, and what cannot be stacked says why.

    Catches: class weights or ignored tokens lost in the stack; a shared weight moved
    under one of its names; a sum divided twice.
    """
    risk = EmpiricalRisk(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    chosen = directions_for(risk, DirectionSpec("random", generator=seeded()), 1)
    got = loss_slice(risk, directions=chosen, extent=0.3, num_points=4)
    if case.name == "recurrent":
        assert got.loop_reason
        assert got.num_batched == 0
    else:
        assert got.num_batched == 4
    for a, loss, error in zip(got.coordinates[0], got.losses, got.errors, strict=True):
        want = risk.evaluate(risk.vector() + a * chosen.vectors[:, 0])
        assert loss == pytest.approx(want.loss, rel=1e-9)
        if want.error is None:
            assert math.isnan(error)
        else:
            assert error == pytest.approx(want.error, abs=1e-12)


def test_small_memory_means_small_stacks() -> None:
    """Stacks shrink, one point goes through the model, and the losses stay.

    Catches: a budget that is not kept; a chunk that is dropped.
    """
    risk = EmpiricalRisk(network(), LOSS, ragged())
    chosen = directions_for(risk, DirectionSpec("random", generator=seeded()), 2)
    calls: list[int] = []
    plain = risk.loss_fn

    def counting(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return plain(outputs, targets)

    found, counts, reasons = [], [], []
    for budget in (1, 30_000, 2**30):
        calls.clear()
        risk.loss_fn = counting
        risk.memory_budget = budget
        got = loss_slice(risk, directions=chosen, num_points=5)
        found.append(got.losses)
        reasons.append(got.loop_reason)
        counts.append(len(calls))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-12)
    assert counts[0] > counts[1] > counts[2]
    assert counts[0] == 1 + 2 * 25  # measured once, two batches a point
    assert reasons == ["memory_budget=1 holds one point at a time", "", ""]


def test_recalibrated_statistics_go_one_by_one() -> None:
    """Statistics are those of each point, and the reason is given.

    Catches: a stack evaluated with the statistics of the middle.
    """
    model = network()
    inputs, targets = data()
    got = loss_slice(
        model,
        LOSS,
        [(inputs, targets)],
        dims=1,
        num_points=3,
        bn="recalibrated",
        directions=DirectionSpec(generator=seeded()),
    )
    assert got.loop_reason.startswith("bn='recalibrated' recomputes statistics")
    twin = copy.deepcopy(model)
    moved = reference.flat_weights(model) + got.directions.vectors[:, 0]
    torch.nn.utils.vector_to_parameters(moved, twin.parameters())
    twin[1].momentum = 1.0
    twin[3].p = 0.0
    twin.train()(inputs)
    with torch.no_grad():
        want = float(LOSS(twin.eval()(inputs), targets))
    assert got.losses[-1] == pytest.approx(want, rel=1e-9)


class Lies(nn.Module):
    """Gives another output under vmap than alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        stacked = torch._C._functorch.is_batchedtensor(self.layer.weight)
        return self.layer(inputs) * (2.0 if stacked else 1.0)


def test_a_stack_that_gives_other_losses_is_not_used() -> None:
    """Catches: trusting vmap without a look at a point that is known."""
    model = Lies()
    got = loss_slice(
        model,
        LOSS,
        ragged(),
        dims=1,
        num_points=3,
        directions=DirectionSpec(generator=seeded()),
    )
    assert got.num_batched == 0
    assert got.loop_reason.startswith("evaluated together the loss at a known point is")
    moved = reference.flat_weights(model) + got.directions.vectors[:, 0]
    assert got.losses[-1] == pytest.approx(loss_at(model, moved), rel=1e-9)


@pytest.mark.parametrize("calls", [math.inf, 4])
@pytest.mark.parametrize("bn", ["running", "recalibrated", "batch"])
def test_model_is_given_back_bit_for_bit(bn: str, calls: float) -> None:
    """Weights, gradients, statistics, modes and random state, also after an error.

    Catches: a model left at a corner of the grid, or without ``requires_grad``.
    """
    model = network().train()
    model[0].eval()
    model[0].weight.data[0, 0] = -0.0
    LOSS(model(data()[0]), data()[1]).backward()
    grads = [p.grad for p in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    risk = EmpiricalRisk(model, LOSS, ragged(), bn=bn)
    chosen = directions_for(risk, DirectionSpec("random", generator=seeded()), 2)
    risk.loss_fn = FailsAfter(calls)
    if calls == math.inf:
        loss_slice(risk, directions=chosen, num_points=4)
    else:
        with pytest.raises(RuntimeError, match="the loss failed"):
            loss_slice(risk, directions=chosen, num_points=4)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert math.copysign(1, float(model[0].weight.detach()[0, 0])) == -1
    assert all(
        p.grad is g and p.requires_grad
        for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert [m.training for m in model.modules()] == [True, False, *[True] * 4]
    assert torch.equal(torch.get_rng_state(), state)


def test_table_has_a_row_for_each_point() -> None:
    """Catches: losses in the order of the other axis."""
    got = loss_slice(
        network(),
        LOSS,
        ragged(),
        num_points=3,
        directions=DirectionSpec(generator=seeded()),
    )
    table = got.frame()
    assert list(table.columns) == ["first", "second", "loss", "error"]
    row = table[(table["first"] == 1.0) & (table["second"] == -1.0)]
    assert row["loss"].tolist() == [got.losses[2, 0]]
    line = loss_slice(network(), LOSS, ragged(), dims=1, num_points=3)
    assert list(line.frame().columns) == ["first", "loss", "error"]


def line(**arguments: object) -> LossSlice:
    return loss_slice(network(), LOSS, ragged(), **({"dims": 1} | arguments))


def test_an_unknown_treatment_of_one_axis_is_refused() -> None:
    with pytest.raises(UsageError, match="needs to be 'fixed' or 'scaled', got 'free'"):
        DirectionSpec(one_dimensional="free")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": 3}, "dims needs to be from 1 to 2, got 3"),
        ({"extent": 0.0}, r"extent needs to be positive and finite, got 0\.0"),
        ({"num_points": 1}, "num_points needs to be at least 2, got 1"),
        ({"directions": "flat"}, "directions needs to be one of 'filter_.* got 'flat'"),
        (
            {"directions": [torch.ones(3)]},
            r"needs 1 directions of shape \(63,\), got \(3,\); flatten them",
        ),
        ({"directions": []}, r"needs 1 directions of shape \(63,\), got none"),
        (
            {"directions": [torch.zeros(63)]},
            r"finite numbers that are not all zero, got norms \[0\.0\]",
        ),
        (
            {"params": "*.bias"},
            "needs weights with two or more axes .* got 0.bias, 1.bias, 4.bias; pass",
        ),
    ],
)
def test_slices_that_are_refused(arguments: dict[str, object], message: str) -> None:
    """Catches: an empty direction, which draws a constant."""
    with pytest.raises(UsageError, match=message):
        line(**arguments)


def test_filter_numbers_of_parameters_without_filters() -> None:
    """Biases and norms are left out, or are one filter each.

    Catches: all biases sharing one number.
    """
    risk = EmpiricalRisk(network(), LOSS, ragged())
    fixed = filter_numbers(risk)
    assert fixed.tolist() == [
        *[i for i in range(6) for _ in range(4)],
        *[-1] * 18,
        *[6 + i for i in range(3) for _ in range(6)],
        *[-1] * 3,
    ]
    scaled = filter_numbers(risk, "scaled")
    assert len(scaled.unique()) == 6 + 3 + 4


def test_points_are_all_there_when_all_are_exact() -> None:
    """Catches: an empty stack that raises."""
    risk = EmpiricalRisk(network(), LOSS, ragged())
    got = values_at(risk, lambda _: {}, 2, exact=[0, 1])
    assert got.losses[0] == got.losses[1] == risk.value()
    assert got.num_batched == 0
    assert got.loop_reason == ""

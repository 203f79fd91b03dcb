"""Which of the field's measures change where the function does not, reproduced.

A trained ReLU network of 8, 12 and 3 units in double precision, whole layers scaled by
2, 4 and 8, and single neurons by powers of their own.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator, top_eigenpairs, weight_scaled
from noisekit.sharpness import (
    SHARPNESS_MEASURES,
    Invariance,
    InvarianceReport,
    average_sharpness,
    check_invariance,
    epsilon_sharpness,
    fisher_rao_norm,
    lambda_max,
    worst_case_sharpness,
)
from noisekit.sharpness.landscape.directions import DirectionSpec, directions_for
from tests.randomness import seeded
from tests.reference import sharpness as reference

LOSS = nn.CrossEntropyLoss()
Batches = Iterable[tuple[Tensor, Tensor]]


@cache
def data() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(60, 8, generator=seeded(2), dtype=torch.float64)
    truth = torch.randn(8, 3, generator=seeded(3), dtype=torch.float64)
    noise = torch.randn(60, 3, generator=seeded(4), dtype=torch.float64)
    return inputs, (inputs @ truth + 0.5 * noise).argmax(1)


def network(*, steps: int = 150) -> nn.Sequential:
    """Trained until the loss is about 0.02."""
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    generator = seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, targets = data()
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(inputs), targets).backward()
        optimizer.step()
    return model


def hessian(model: nn.Module) -> Tensor:
    loss = reference.flat_loss(model, LOSS, *data())
    return torch.func.jacrev(torch.func.jacrev(loss))(reference.flat_weights(model))


def dense(of: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., float]:
    """A measure from the model and its dense Hessian."""
    return lambda model, loss_fn, batches: float(of(model, hessian(model)))


def filter_normalised(model: nn.Module, matrix: Tensor) -> Tensor:
    """The mean of ``d' H d`` over filter-normalised directions, in closed form.

    A filter of ``n`` weights and norm ``r`` gives a direction of covariance
    ``r^2 / n``, and different filters are independent.
    """
    total, first = torch.zeros((), dtype=torch.float64), 0
    for parameter in model.parameters():
        part = matrix.diag()[first : first + parameter.numel()].view_as(parameter)
        first += parameter.numel()
        if parameter.ndim == 2:
            rows = zip(parameter.detach(), part, strict=True)
            total = total + sum(row @ row / len(row) * bend.sum() for row, bend in rows)
    return total


def relative_flatness(model: nn.Module, matrix: Tensor, *, layer: int) -> float:
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    index = names.index(f"{layer}.weight")
    first, size = sum(sizes[:index]), sizes[index]
    block = matrix[first : first + size, first : first + size]
    weight = model.get_parameter(f"{layer}.weight").detach()
    return reference.relative_flatness_of_matrix(weight, block)


def preconditioned(model: nn.Module, loss_fn: Callable, batches: Batches) -> Estimate:
    with HessianOperator(model, loss_fn, batches) as operator:
        scaled = weight_scaled(operator)
        return top_eigenpairs(scaled, tol=1e-8, generator=seeded()).estimate()


def adaptive(measure: Callable[..., Any], **options: float) -> Callable[..., Any]:
    """The same random numbers on each call."""

    def measured(model: nn.Module, loss_fn: Callable, batches: Batches) -> object:
        given = {"adaptive": True, "generator": seeded()} | options
        return measure(model, loss_fn, batches, **given)

    return measured


def gaussian(model: nn.Module, loss_fn: Callable, batches: Batches) -> object:
    return average_sharpness(model, loss_fn, batches, sigma=0.02, generator=seeded())


def by_lanczos(model: nn.Module, loss_fn: Callable, batches: Batches) -> object:
    return lambda_max(model, loss_fn, batches, tol=1e-4, generator=seeded())


MEASURES: dict[str, Callable[..., Any]] = {
    "lambda_max": by_lanczos,
    "trace": dense(lambda model, matrix: matrix.trace()),
    "keskar": partial(epsilon_sharpness, epsilon=1e-3),
    "sam": partial(worst_case_sharpness, rho=0.05),
    "gaussian": gaussian,
    "filter_normalised": dense(filter_normalised),
    "relative_flatness_1": dense(partial(relative_flatness, layer=0)),
    "relative_flatness_2": dense(partial(relative_flatness, layer=2)),
    "fisher_rao": fisher_rao_norm,
    "weighted_trace": dense(
        lambda model, matrix: reference.flat_weights(model) ** 2 @ matrix.diag()
    ),
    "preconditioned": preconditioned,
    "adaptive_worst_case": adaptive(worst_case_sharpness, rho=0.05),
    "adaptive_average": adaptive(average_sharpness, sigma=0.05),
    "asam": adaptive(worst_case_sharpness, rho=0.5, eta=0.01),
}


@cache
def report(name: str) -> InvarianceReport:
    return check_invariance(
        MEASURES[name], network(), LOSS, [data()], generator=seeded(5)
    )


@pytest.mark.parametrize(
    "name",
    [
        "fisher_rao",
        "weighted_trace",
        "preconditioned",
        "adaptive_worst_case",
        "adaptive_average",
        "relative_flatness_1",
    ],
)
def test_measures_in_units_of_the_weights_stay_exactly(name: str) -> None:
    """Under layers and under neurons, to a millionth.

    Catches: a measure in which a bias, or the rounding of its noise, is left out of
    the units.
    """
    got = report(name)
    assert got.verdict is Invariance.INVARIANT
    for effect in got.effects:
        assert effect.ratios == pytest.approx((1, 1, 1), abs=1e-6)
        assert abs(effect.exponent) < 1e-6


@pytest.mark.parametrize("name", ["lambda_max", "trace", "gaussian"])
def test_raw_curvature_grows_as_the_factor_squared(name: str) -> None:
    """At first slower, since what is multiplied becomes flatter; in the end squared.

    Noise of a finite size sees more than the curvature, so its exponent is not exact.

    Catches: a Hessian with respect to the weights before they were rescaled.
    """
    got = report(name)
    layers = got["layers"]
    assert got.verdict is Invariance.NOT_INVARIANT
    assert not layers.is_power_law
    exact = 0.2 if name == "gaussian" else 0.05
    assert layers.last_exponent == pytest.approx(2.0, abs=exact)
    assert layers.ratios[2] > 3 * layers.ratios[1]
    assert got["neurons"].verdict is Invariance.NOT_INVARIANT


def test_bounded_steps_grow_slower() -> None:
    """SAM's step and Keskar's box see less of it, and are not invariant either.

    Catches: a box or a ball in units of the weights.
    """
    sam, keskar = report("sam")["layers"], report("keskar")["layers"]
    assert sam.verdict is keskar.verdict is Invariance.NOT_INVARIANT
    assert 3 < sam.ratios[2] < report("lambda_max")["layers"].ratios[2]
    assert 1.2 < keskar.ratios[2] < sam.ratios[2]
    assert abs(keskar.ratios[0] - 1) < 0.2


@pytest.mark.parametrize("name", ["filter_normalised", "relative_flatness_2"])
def test_normalising_filters_is_safe_for_layers_and_not_for_neurons(
    name: str,
) -> None:
    """Exactly one for whole layers; far from one where a row's columns are scaled.

    Catches: *invariant* after a test with whole layers only.
    """
    got = report(name)
    assert got["layers"].ratios == pytest.approx((1, 1, 1), abs=1e-9)
    assert got["layers"].verdict is Invariance.INVARIANT
    assert got["neurons"].verdict is Invariance.NOT_INVARIANT
    assert got["neurons"].ratios[2] > 10
    assert got.verdict is Invariance.NOT_INVARIANT


def test_what_asam_adds_to_the_units_breaks_exactness() -> None:
    """A little at factor 8, and nothing at all without it.

    Catches: an ``eta`` that is not used.
    """
    got = report("asam")
    off = [abs(ratio - 1) for effect in got.effects for ratio in effect.ratios]
    assert 1e-4 < max(off) < 0.1
    exact = report("adaptive_worst_case")
    assert max(abs(r - 1) for e in exact.effects for r in e.ratios) < 1e-9


def test_filter_normalised_directions_have_the_closed_form() -> None:
    """The mean of ``d' H d`` over drawn directions is the formula's, within 4 errors.

    Catches: directions that are scaled per layer, per weight, or not at all.
    """
    model = network()
    matrix = hessian(model)
    risk = EmpiricalRisk(model, LOSS, [data()])
    spec, draws = DirectionSpec("filter_normalised", generator=seeded(7)), []
    for _ in range(200):
        d = directions_for(risk, spec, 1).vectors
        draws.append(float(d[:, 0] @ matrix @ d[:, 0]))
    values = torch.tensor(draws, dtype=torch.float64)
    stderr = float(values.std()) / math.sqrt(len(values))
    want = float(filter_normalised(model, matrix))
    assert abs(float(values.mean()) - want) < 4 * stderr
    assert stderr < 0.1 * want


REGISTERED = [
    "lambda_max",
    "hessian_trace",
    "weighted_hessian_trace",
    "fisher_rao_norm",
    "epsilon_sharpness",
    "worst_case_sharpness",
    "adaptive_worst_case_sharpness",
    "logit_normalised_worst_case_sharpness",
    "average_sharpness",
    "adaptive_average_sharpness",
    "grad_norm",
]


@pytest.mark.parametrize("name", REGISTERED)
def test_measures_are_as_invariant_as_they_claim(name: str) -> None:
    """What the vocabulary says of a measure is what the check finds, by its name.

    Catches: a claim that nobody tried; a measure that draws anew on each call.
    """
    got = check_invariance(
        name, network(), LOSS, [data()], factors=(2, 8), generator=seeded(5)
    )
    assert got.measure == name
    assert got.repeatable
    if SHARPNESS_MEASURES[name][0].invariance == "neurons":
        assert got.verdict is Invariance.INVARIANT
    else:
        assert got["layers"].verdict is Invariance.NOT_INVARIANT

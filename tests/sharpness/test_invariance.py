"""What rescalings that keep the function do to a measure, and what is said of it."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.invariance import as_estimate, check_invariance
from noisekit.sharpness.invariance_report import Invariance, InvarianceReport
from noisekit.sharpness.measures.eigenvalues import lambda_max
from noisekit.sharpness.measures.traces import weighted_hessian_trace
from noisekit.sharpness.rescaling.free_rescalings import free_rescalings
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, built

FACTORS = (2.0, 4.0, 8.0)


def perceptron() -> nn.Sequential:
    return built(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


class Residual(nn.Module):
    """A BatchNorm network that is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(inputs)))
        return self.head(hidden + hidden.flip(1))


def residual() -> nn.Module:
    model = Residual().double()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1, generator=seeded(2))
        model.norm.running_var.uniform_(0.5, 2, generator=seeded(3))
    return model


def data(num_examples: int = 20) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(num_examples, 5, generator=seeded(9), dtype=torch.float64)
    return inputs, torch.randint(3, (num_examples,), generator=seeded(8))


def ragged() -> list[tuple[Tensor, Tensor]]:
    inputs, targets = data()
    return [(inputs[:13], targets[:13]), (inputs[13:], targets[13:])]


def dense_hessian(model: nn.Module) -> Tensor:
    loss = reference.flat_loss(model.eval(), LOSS, *data())
    twice = torch.func.jacrev(torch.func.jacrev(loss))
    return twice(reference.flat_weights(model))


def largest(model: nn.Module, loss_fn: object, batches: object) -> float:
    return float(torch.linalg.eigvalsh(dense_hessian(model))[-1])


def training_loss(
    model: nn.Module, loss_fn: Callable, batches: Iterable[tuple[Tensor, Tensor]]
) -> float:
    return EmpiricalRisk(model, loss_fn, batches).value()


def first_norm(model: nn.Module, loss_fn: object, batches: object) -> Tensor:
    return next(model.parameters()).detach().norm()


def check(measure: object, **arguments: object) -> InvarianceReport:
    model = arguments.pop("model", None) or perceptron()
    given = {"generator": seeded()} | arguments
    return check_invariance(measure, model, LOSS, ragged(), **given)


def test_ratios_are_those_of_rescaled_hessians() -> None:
    """At each factor the ratio is that of ``D H D`` with ``D`` written out by hand.

    Catches: factors on the wrong side; a copy rescaled on top of the last one; the
    second layer's bias divided.
    """
    model = perceptron()
    hessian = dense_hessian(model)
    want = []
    for factor in FACTORS:
        d = torch.ones(len(hessian), dtype=torch.float64)
        d[: 5 * 7 + 7] = 1 / factor
        d[5 * 7 + 7 : -3] = factor
        scaled = d[:, None] * hessian * d
        want.append(
            torch.linalg.eigvalsh(scaled)[-1] / torch.linalg.eigvalsh(hessian)[-1]
        )
    got = check(largest)["layers"]
    assert got.ratios == pytest.approx([float(w) for w in want], rel=1e-8)
    assert all(i.low == i.high for i in got.intervals)
    assert max(got.function_changes) < 1e-12
    assert got.verdict is Invariance.NOT_INVARIANT


def test_exponents_of_a_pure_power_and_of_a_sum_of_powers() -> None:
    """A power is found and called one; a sum is not, and its end is told.

    Catches: a fit with an intercept, which forgets that factor 1 gives ratio 1; a
    slope of ratios instead of logarithms.
    """
    pure = check(first_norm)["layers"]
    assert pure.exponent == pytest.approx(1.0, abs=1e-9)
    assert pure.is_power_law
    assert "factor^1.00" in str(pure)
    mixed = check(lambda m, f, b: 20 + first_norm(m, f, b) ** 2)["layers"]
    assert not mixed.is_power_law
    assert mixed.exponent < mixed.last_exponent < 2
    x, y = np.log(FACTORS), np.log(mixed.ratios)
    [slope], *_ = np.linalg.lstsq(x[:, None], y, rcond=None)
    assert mixed.exponent == pytest.approx(slope)
    assert mixed.misfit == pytest.approx(np.abs(y - slope * x).max())
    assert "no single power" in str(mixed)
    far = check(lambda m, f, b: 20 + first_norm(m, f, b) ** 2, factors=(64, 32, 2))
    assert far["layers"].last_exponent == pytest.approx(2.0, abs=0.02)


def test_largest_eigenvalue_grows_as_the_factor_squared_in_the_end() -> None:
    """The law of Dinh et al.: the inverse square of the divided weights.

    Catches: an exponent that is only about the factors that were tried first.
    """
    got = check(largest, factors=(2.0, 8.0, 64.0, 128.0))["layers"]
    assert got.last_exponent == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("labels", ["true", "random"])
def test_the_training_loss_comes_out_invariant(labels: str) -> None:
    """The negative control, whatever the labels say; the eigenvalue is not.

    Catches: a verdict that depends on what is to be predicted; a check that calls
    everything not invariant.
    """
    inputs, targets = data()
    if labels == "random":
        targets = targets[torch.randperm(len(targets), generator=seeded(5))]
    for measure, verdict in (
        (training_loss, Invariance.INVARIANT),
        (largest, Invariance.NOT_INVARIANT),
    ):
        got = check_invariance(
            measure, perceptron(), LOSS, [(inputs, targets)], generator=seeded()
        )
        assert got.verdict is verdict
        assert [e.name for e in got.effects] == ["layers", "neurons"]
        assert max(max(e.loss_changes) for e in got.effects) < 1e-12


def test_batch_norm_in_any_model_scales_curvature_by_the_inverse_square() -> None:
    """Weights before a BatchNorm have a trace that goes as factor to the minus two.

    Catches: running statistics that stay behind; a residual network refused though
    its BatchNorm gives it a free scale.
    """

    def trace_before_norm(model: nn.Module, loss_fn: object, batches: object) -> float:
        return float(dense_hessian(model).diag()[: 5 * 7 + 7].sum())

    got = check(trace_before_norm, model=residual())
    assert [effect.name for effect in got.effects] == ["batch_norm"]
    assert got["batch_norm"].exponent == pytest.approx(-2.0, abs=1e-6)
    assert got["batch_norm"].is_power_law


def test_a_noisy_measure_is_not_resolved_unless_it_repeats_itself() -> None:
    """With fresh probes the error hides the ratio; with the same ones it cancels.

    Catches: a ratio of two noisy numbers called not invariant; one called invariant
    by luck.
    """
    ongoing = seeded(1)

    def probes(model: nn.Module, generator: torch.Generator) -> Estimate:
        risk = EmpiricalRisk(model, LOSS, ragged())
        return weighted_hessian_trace(risk, num_matvecs=16, generator=generator)

    fresh = check(lambda m, f, b: probes(m, ongoing))
    assert not fresh.repeatable
    assert fresh.verdict is Invariance.NOT_RESOLVED
    assert all(not i.bounded or i.high > 1.2 * i.low for i in fresh["layers"].intervals)
    same = check(lambda m, f, b: probes(m, seeded(3)))
    assert same.repeatable
    assert same.verdict is Invariance.INVARIANT
    assert same["neurons"].ratios == pytest.approx((1, 1, 1), rel=1e-9)


def test_the_global_random_state_is_the_same_for_each_call() -> None:
    """A measure that draws from it repeats itself, and the user's state stays.

    Catches: noise between calls that a common start would cancel.
    """
    model = perceptron()
    torch.manual_seed(3)
    state = torch.get_rng_state()

    def noisy(model: nn.Module, loss_fn: object, batches: object) -> float:
        return 1.0 + float(torch.rand(()))

    got = check(noisy, model=model)
    assert got.repeatable
    assert got.verdict is Invariance.INVARIANT
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_that_scatter_are_not_resolved() -> None:
    """Two calls that differ stand for an error that was not stated.

    Catches: a bare float taken as exact.
    """
    generator = seeded(1)

    def scattered(model: nn.Module, loss_fn: object, batches: object) -> float:
        return 1.0 + 0.2 * float(torch.rand((), generator=generator))

    got = check(scattered)
    assert not got.repeatable
    assert got.verdict is Invariance.NOT_RESOLVED


@pytest.mark.parametrize(
    ("estimate", "share"),
    [
        # The normal quantile of 95 % over six ratios.
        (Estimate(2.0, stderr=0.02), math.sqrt(2) * 2.638 * 0.01),
        (Estimate(2.0, bound=0.1), 2 * 0.05),
        (Estimate(2.0, side="lower"), 0.0),
        (Estimate(2.0, stderr=0.0, status=Status.NOT_CONVERGED), math.inf),
        (Estimate(2.0, stderr=0.0, status=Status.DIVERGED), math.inf),
        (Estimate(2.0, stderr=2.0), math.inf),
    ],
)
def test_errors_of_a_ratio(estimate: Estimate, share: float) -> None:
    """Both sides' relative errors count; a value not to be relied on has none.

    Catches: one side's error only; a bound taken for a standard error; a finite
    interval where the denominator may be zero.
    """
    got = check(lambda m, f, b: estimate)
    [interval] = set(got["layers"].intervals)
    if share == math.inf:
        assert not interval.bounded
    else:
        want = (1 / (1 + share), 1 / (1 - share))
        assert (interval.low, interval.high) == pytest.approx(want, rel=1e-3)


def test_a_ratio_of_one_within_a_large_error_is_not_resolved() -> None:
    """Close to one by luck is not invariant while the error is larger.

    Catches: a verdict from the ratios alone.
    """
    values = iter(1 + 1e-5 * np.arange(20))
    got = check(lambda m, f, b: Estimate(float(next(values)), stderr=0.02))
    assert all(abs(ratio - 1) < 1e-3 for ratio in got["layers"].ratios)
    assert got.verdict is Invariance.NOT_RESOLVED
    values = iter(1 + 1e-5 * np.arange(20))
    sure = check(lambda m, f, b: Estimate(float(next(values)), stderr=0.001))
    assert sure.verdict is Invariance.INVARIANT


def test_noise_alone_is_rarely_called_a_change() -> None:
    """Of checks of an invariant measure with a right error, few say otherwise.

    Six ratios share one denominator; at 95 % each, one check in five would be wrong.
    Catches: intervals that hold one by one but not together.
    """
    generator, wrong = seeded(6), 0
    model = perceptron()

    def noisy(model: nn.Module, loss_fn: object, batches: object) -> Estimate:
        scatter = 0.05 * float(torch.randn((), generator=generator))
        return Estimate(1 + scatter, stderr=0.05)

    for _ in range(60):
        got = check(noisy, model=model)
        wrong += got.verdict is Invariance.NOT_INVARIANT
        assert got.verdict is not Invariance.INVARIANT
    assert wrong <= 7  # 3 expected; more than 7 has a chance of one percent


def test_a_change_that_is_larger_than_its_error_is_seen() -> None:
    """Noise does not hide a factor of sixteen.

    Catches: *not resolved* wherever there is any error.
    """

    def noisy(model: nn.Module, loss_fn: object, batches: object) -> Estimate:
        value = float(first_norm(model, loss_fn, batches)) ** 2
        scatter = 1 + 0.01 * float(torch.rand((), generator=generator))
        return Estimate(value * scatter, stderr=0.01 * value)

    generator = seeded()
    assert check(noisy)["layers"].verdict is Invariance.NOT_INVARIANT


def test_values_without_a_ratio() -> None:
    """At zero there is no ratio, and below zero no power.

    Catches: division by zero; the logarithm of a negative ratio.
    """
    nothing = check(lambda m, f, b: 0.0)
    assert nothing.verdict is Invariance.NOT_RESOLVED
    assert math.isnan(nothing["layers"].ratios[0])
    assert math.isnan(nothing["layers"].exponent)
    first = float(perceptron()[0].weight.detach().norm())
    crossing = check(lambda m, f, b: float(first_norm(m, f, b)) - 3 * first)
    assert crossing["layers"].ratios[0] == pytest.approx(0.5)
    assert math.isnan(crossing["layers"].exponent)
    assert crossing.verdict is Invariance.NOT_INVARIANT


def own_state(copy: nn.Module, factor: float) -> Mapping[str, Tensor]:
    state = {key: value.clone() for key, value in copy.state_dict().items()}
    state["0.weight"] *= factor
    state["0.bias"] *= factor
    state["2.weight"] /= factor
    return state


def own_model(copy: nn.Module, factor: float) -> nn.Module:
    twin = perceptron()
    twin.load_state_dict(own_state(copy, factor))
    return twin


def own_change(copy: nn.Module, factor: float) -> None:
    copy.load_state_dict(own_state(copy, factor))


def test_the_users_own_rescalings_do_the_same() -> None:
    """In place, as a state dict or as a model.

    Catches: a returned state that is thrown away; factors that accumulate.
    """
    want = check(largest)["layers"].ratios
    model = perceptron()
    got = check(
        largest,
        model=model,
        rescalings={"place": own_change, "state": own_state, "model": own_model},
    )
    assert [effect.name for effect in got.effects] == ["place", "state", "model"]
    for effect in got.effects:
        assert effect.ratios == pytest.approx(want, rel=1e-10)


def scale_one_layer(copy: nn.Module, factor: float) -> None:
    copy[0].weight.data *= factor


def only_on_the_first_batch(copy: nn.Module, factor: float) -> None:
    """Changes a weight that the first batch, whose feature is zero, does not see."""
    with torch.no_grad():
        copy[0].weight[:, 4] *= factor


@pytest.mark.parametrize(
    ("rescale", "message"),
    [
        (scale_one_layer, "needs to keep the function, got outputs that differ by"),
        (
            lambda m, f: None,
            "needs to change weights, got a copy with the same ones at",
        ),
        (lambda m, f: 3, "to return nothing, a state dict or a model, got a int"),
        (only_on_the_first_batch, "one of what 'own' rescales reaches the output"),
    ],
)
def test_rescalings_that_are_refused(rescale: Callable, message: str) -> None:
    """What changes the function on any batch, or nothing at all, is no test.

    Catches: a look at the first batch only; *invariant* of a copy that is the same.
    """
    inputs, targets = data()
    inputs[:13, 4] = 0.0
    batches = [(inputs[:13], targets[:13]), (inputs[13:], targets[13:])]
    with pytest.raises(UsageError, match=message):
        check_invariance(
            largest, perceptron(), LOSS, batches, rescalings={"own": rescale}
        )


def test_model_and_gradients_stay_whatever_the_measure_does() -> None:
    """The measure gets copies, and may spoil them.

    Catches: a measure that leaves its gradients, its mode or its step behind.
    """
    model = perceptron().train()
    LOSS(model(data()[0]), data()[1]).backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]

    def vandal(model: nn.Module, loss_fn: object, batches: object) -> float:
        model.eval()
        model.zero_grad()
        value = float(first_norm(model, loss_fn, batches))
        next(model.parameters()).data.zero_()
        return value

    got = check(vandal, model=model)
    assert got["layers"].exponent == pytest.approx(1.0)
    assert model.training
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_reports_read_well() -> None:
    """The table has a row for each factor, the text a line for each family.

    Catches: families mixed up in the table.
    """
    got = check(largest)
    table = got.frame()
    assert len(table) == 6
    rows = table[table["rescaling"] == "neurons"]
    assert tuple(rows["ratio"]) == got["neurons"].ratios
    assert tuple(rows["factor"]) == FACTORS
    text = str(got)
    assert text.startswith("largest: not invariant (ratios at factors 2, 4, 8)")
    assert len(text.splitlines()) == 3
    with pytest.raises(
        KeyError, match="no rescaling 'all'; there are: layers, neurons"
    ):
        got["all"]


@dataclass
class HasEstimate:
    estimate: object


def test_what_a_measure_may_return() -> None:
    """Estimates, numbers, tensors, and results that have an estimate.

    Catches: the method itself taken for the estimate.
    """
    estimate = Estimate(2.0, stderr=0.1, error_source=ErrorSource.DATA)
    assert as_estimate(estimate) is estimate
    assert as_estimate(HasEstimate(estimate)) is estimate
    assert as_estimate(HasEstimate(lambda: estimate)) is estimate
    assert as_estimate(torch.tensor(3.0)).value == 3.0
    with pytest.raises(UsageError, match=r"result with \.estimate, got a NoneType"):
        as_estimate(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": (2.0,)}, "factors needs at least two different ones .* got 2"),
        ({"factors": (2.0, 1.0)}, "that are not 1, got 2, 1"),
        ({"factors": (2.0, -4.0)}, "above 0 that are not 1, got 2, -4"),
        ({"rescalings": {}}, "rescalings needs at least one function, got none"),
        ({"tolerance": 0.0}, r"tolerance needs to be between 0 and 1, got 0\.0"),
        (
            {"model": built(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))},
            r"Linear, GELU, Linear; .* Or pass rescalings=\{name: function\}",
        ),
    ],
)
def test_checks_that_are_refused(arguments: dict[str, object], message: str) -> None:
    """Catches: a slope from one factor; GELU taken for ReLU."""
    with pytest.raises(UsageError, match=message):
        check(largest, **arguments)


def test_neurons_keep_their_exponents_over_the_factors() -> None:
    """The exponents are drawn once, between minus one and one.

    Catches: new random factors at each factor, which have no exponent to fit.
    """
    model, generator = perceptron(), seeded(4)
    rescale = free_rescalings(model, data(), generator=generator)["neurons"]
    found = []
    for factor in (2.0, 8.0):
        copy = perceptron()
        rescale(copy, factor)
        ratio = (copy[0].bias / model[0].bias).detach().log()
        found.append(ratio / math.log(factor))
    torch.testing.assert_close(found[0], found[1])
    assert 0.3 < float(found[0].abs().max()) <= 1
    assert float(found[0].min()) < 0 < float(found[0].max())


def test_a_measure_by_its_residual_bound() -> None:
    """Lanczos' own bound is enough to see that the eigenvalue is not invariant.

    Catches: a residual read as no error at all.
    """

    def by_lanczos(model: nn.Module, loss_fn: Callable, batches: object) -> Estimate:
        return lambda_max(EmpiricalRisk(model, loss_fn, batches), tol=1e-3)

    got = check(by_lanczos)
    assert got.verdict is Invariance.NOT_INVARIANT
    assert got["layers"].ratios == pytest.approx(
        check(largest)["layers"].ratios, rel=0.01
    )


def test_measures_by_their_names() -> None:
    """One of noisekit's own, with the same random numbers on each call.

    Catches: an unknown name found out after the first measurement; a measure that
    cannot be had reported as not resolved.
    """
    got = check("lambda_max", factors=(2, 4))
    assert got.measure == "lambda_max"
    assert got.repeatable
    want = check(largest, factors=(2, 4))["layers"].ratios
    assert got["layers"].ratios == pytest.approx(want, rel=0.01)
    with pytest.raises(UsageError, match="got sharpest; there are: lambda_max"):
        check("sharpest")
    with pytest.raises(
        UsageError,
        match="gauge_fixed_lambda_max needs weights whose output goes straight into a "
        "BatchNorm, got none in Sequential; use lambda_max",
    ):
        check("gauge_fixed_lambda_max")

"""What every measure of the table has to hold, and a user's own beside them."""

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import noisekit as nk
from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.core.vocabulary import QUANTITIES, quantity
from noisekit.sharpness import Invariance, Measure, Measurement, MeasurementContext
from noisekit.sharpness.measures import MEASURES
from tests.randomness import seeded
from tests.sharpness.networks import LOSS, state_of
from tests.sharpness.own_measure import LargestWeight

CASES = [measure for usual in MEASURES.values() for measure in usual]
CASES.append(LargestWeight())
RULE = nk.SGDRule(lr=0.1)

# Cheap enough for a test, and tight enough to tell a ratio of 1 from any other.
EFFORT = {"num_matvecs": 12, "num_draws": 4, "num_probes": 4, "tol": 1e-3}


def labelled(measure: Measure) -> str:
    settings = ",".join(f"{k}={v}" for k, v in measure.settings.items() if v)
    return f"{measure.name}({settings})"


def cheap(measure: Measure) -> Measure:
    """The measure with less effort, and groups that fit into the batches here."""
    less = EFFORT | ({"batch_size": 10} if measure.name == "m_sharpness" else {})
    return replace(measure, **{k: v for k, v in less.items() if k in measure.settings})


every_measure = pytest.mark.parametrize(
    "measure", [cheap(measure) for measure in CASES], ids=labelled
)


@cache
def data() -> list[tuple[Tensor, Tensor]]:
    """Three random batches that a small network can fit."""
    inputs = torch.randn(60, 6, generator=seeded(2), dtype=torch.float64)
    truth = torch.randn(6, 3, generator=seeded(3), dtype=torch.float64)
    noise = torch.randn(60, 3, generator=seeded(4), dtype=torch.float64)
    targets = (inputs @ truth + 0.3 * noise).argmax(1)
    return list(zip(inputs.split(20), targets.split(20), strict=True))


@cache
def trained(loss: float, *, norm: bool = False, seed: int = 1) -> nn.Sequential:
    """A ReLU network trained by gradient descent down to a loss, in evaluation mode."""
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(8))
    model = nn.Sequential(*layers).double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, targets = (torch.cat(part) for part in zip(*data(), strict=True))
    for _ in range(20_000):
        value = LOSS(model(inputs), targets)
        if value.item() <= loss:
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() <= loss
    return model.eval()


def network_for(measure: Measure) -> nn.Sequential:
    return trained(0.2, norm=measure.invariance == "norms")


def taken(
    measure: Measure, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[Measurement]:
    """All that a measure gives, with random numbers that depend on nothing else."""
    risk = EmpiricalRisk(model, LOSS, batches)
    with MeasurementContext(
        risk, stream=lambda *names: seeded(len(str(names))), update_rule=RULE
    ) as context:
        return list(measure.measure(context))


def first_of(measure: Measure) -> Callable[..., Estimate]:
    """The measure as a function, as ``check_invariance`` takes one."""
    return lambda model, loss_fn, batches: taken(measure, model, batches)[0].estimate


@every_measure
def test_declared_invariance_is_what_rescaling_finds(measure: Measure) -> None:
    """By layers, by neurons, or before a BatchNorm, and by no more than is declared.

    Catches: an invariance that nobody tried; one that the settings take away.
    """
    got = nk.check_invariance(
        first_of(measure),
        network_for(measure),
        LOSS,
        data(),
        factors=(2, 8),
        generator=seeded(5),
    )
    kept = {
        "raw": set(),
        "layers": {"layers"},
        "neurons": {"layers", "neurons"},
        "norms": {"batch_norm"},
    }[measure.invariance]
    for effect in got.effects:
        if getattr(measure, "magnitude_aware", False):
            continue  # all but a floor of 1e-3 is in proportion to the weights
        if measure.invariance == "norms" and effect.name != "batch_norm":
            continue  # weights after the BatchNorm are not declared either way
        declared = effect.name in kept
        assert (effect.verdict is Invariance.INVARIANT) is declared, str(effect)


LOSSES = (0.4, 0.1, 0.01)


@cache
def values_by_loss() -> dict[str, list[list[float]]]:
    """Of each quantity, its values at falling losses of two networks, per variant."""
    measures = [cheap(measure) for measure in CASES if measure.invariance != "norms"]
    cards = {
        (seed, loss): nk.measure(
            trained(loss, seed=seed),
            LOSS,
            data(),
            measures=measures,
            optimizer=RULE,
            data_error=False,
            generator=seeded(),
        )
        for seed in (1, 2)
        for loss in LOSSES
    }
    table: dict[str, list[list[float]]] = {}
    for i, row in enumerate(cards[1, LOSSES[0]].rows):
        pairs = [
            [cards[seed, loss].rows[i].estimate.value for seed in (1, 2)]
            for loss in LOSSES
        ]
        means = [math.sqrt(abs(math.prod(pair))) for pair in pairs]
        table.setdefault(row.quantity, []).append(means)
    return table


@pytest.mark.parametrize(
    "name", [*MEASURES, "first_order_share", "batch_sharpness_ratio_of_means"]
)
def test_what_moves_with_the_training_loss_is_declared(name: str) -> None:
    """Over losses from 0.4 to 0.01 a value moves by a quarter exactly where declared.

    Catches: a verdict on a measure at unmatched training loss; a measure that nobody
    may compare for no reason.
    """
    rows = values_by_loss().get(name, [])
    if name == "gauge_fixed_lambda_max":
        measure = cheap(*MEASURES[name])
        models = [trained(loss, norm=True) for loss in LOSSES]
        rows = [[taken(measure, model, data())[0].estimate.value for model in models]]
    moved = any(max(values) > 1.25 * min(values) for values in rows)
    assert moved is quantity(name).fades_with_loss, rows


@pytest.mark.parametrize("eta", [0.0, 0.01])
@every_measure
def test_rows_state_what_breaks_the_invariance(measure: Measure, eta: float) -> None:
    """A report knows a measure by its quantity and variant alone.

    Catches: an adaptive measure with ``eta``, counted as invariant by its name.
    """
    if eta and not getattr(measure, "adaptive", False):
        return
    chosen = replace(measure, eta=eta) if eta else measure
    known = quantity(chosen.name) if chosen.name in QUANTITIES else chosen.quantity
    assert chosen.invariance == (known.invariance_in(chosen.variant) or "raw")
    assert not eta or chosen.invariance == "raw"


def bad_values(measure: Measure) -> list[tuple[str, object]]:
    """Values of each setting that nothing can be done with."""
    bad: list[tuple[str, object]] = []
    for field in fields(measure):
        value = getattr(measure, field.name)
        bad.append((field.name, object()))
        if isinstance(value, bool):
            bad += [(field.name, "yes"), (field.name, 1)]
        elif isinstance(value, int):
            bad += [(field.name, -1), (field.name, 1.5), (field.name, True)]
        elif isinstance(value, float):
            bad += [(field.name, float("nan")), (field.name, -1.0), (field.name, "1")]
        elif isinstance(value, str):
            bad.append((field.name, "anything"))
    return bad


@every_measure
def test_bad_settings_are_named_with_what_they_need_and_got(measure: Measure) -> None:
    """When the object is made, not after an hour of measuring.

    Catches: a setting that is stored unchecked; NaN, which no comparison catches; an
    error that does not say which setting.
    """
    for name, value in bad_values(measure):
        with pytest.raises(UsageError) as caught:
            replace(measure, **{name: value})
        text = str(caught.value)
        assert text.startswith(f"{name} needs "), text
        got = "an object" if type(value) is object else repr(value)
        assert f"got {got}" in text
    with pytest.raises(TypeError, match="no_such_setting"):
        type(measure)(no_such_setting=1)


@every_measure
def test_settings_survive_json(measure: Measure) -> None:
    """Catches: a setting that is no plain value, so that no file can hold it."""
    read = json.loads(json.dumps(measure.settings))
    assert type(measure)(**read) == measure
    assert hash(type(measure)(**read)) == hash(measure)


@every_measure
def test_cost_is_a_bound_on_what_is_spent(measure: Measure) -> None:
    """A gradient counts as one, a loss as a third, a product as one to two.

    Catches: a setting that costs and that the bound forgets, such as the draws.
    """
    model = copy.deepcopy(network_for(measure))
    spent = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        nonlocal spent
        share = len(inputs[0]) / 60
        spent += share if torch.is_grad_enabled() else share / 3

    risk = EmpiricalRisk(model, LOSS, data())
    with (
        MeasurementContext(
            risk, stream=lambda *_: seeded(), update_rule=RULE
        ) as context,
        model.register_forward_hook(count),
    ):
        found = list(measure.measure(context))
    spent += sum(item.estimate.num_matvecs for item in found)
    assert 0.99 * spent <= measure.cost() <= 200 * spent + 1
    assert measure.typical_cost() <= measure.cost()


@every_measure
def test_first_quantity_is_the_one_it_is_named_after(measure: Measure) -> None:
    """Its row has its name, a status that can be relied on, and no other's variant.

    Catches: a measure under another's name; two rows that cannot be told apart.
    """
    found = taken(measure, network_for(measure), data())
    assert found[0].quantity == measure.name
    assert found[0].estimate.status in {Status.OK, Status.NOT_RESOLVED}
    labels = [(item.quantity, item.variant) for item in found]
    assert len(set(labels)) == len(labels)
    for item in found:
        json.dumps(item.detail)
        assert len(str(item.estimate).splitlines()) == 1


@every_measure
def test_other_measures_change_no_number(measure: Measure) -> None:
    """Alone or after all of them, the same bits; and the model as it was.

    Catches: one generator for all; a shared result that depends on who asked first.
    """
    model = network_for(measure)
    before = state_of(model)
    alone = nk.measure(
        model, LOSS, data(), measures=measure, optimizer=RULE, generator=seeded()
    )
    beside = nk.measure(
        model,
        LOSS,
        data(),
        measures=["hessian_trace", "lambda_max", "worst_case_sharpness", measure],
        optimizer=RULE,
        generator=seeded(),
    )
    assert state_of(model) == before
    own = [row for row in beside.rows if row.measured_by == measure]
    wanted = [row for row in alone.rows if row.measured_by == measure]
    assert len(own) == len(wanted) > 0
    for got, want in zip(own, wanted, strict=True):
        assert got.estimate.value == want.estimate.value or got.estimate.value != (
            got.estimate.value
        )
        assert got.estimate.stderr == want.estimate.stderr


FUNCTIONS = {
    name: getattr(nk, name)
    for name in MEASURES
    if hasattr(nk, name) and name != "edge_of_stability_ratio"
}
SHARED = {
    "model",
    "loss_fn",
    "batches",
    "generator",
    "data_error",
    "bn",
    "normaliser",
    "params",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_settings_of_its_measure(name: str) -> None:
    """By the same names, with the same defaults, and with every shared argument.

    Catches: a default that is stated twice and drifts; a setting that only one has.
    """
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    kind = type(MEASURES[name][0])
    settings = {key: p.default for key, p in parameters.items() if key not in SHARED}
    assert settings == {field.name: field.default for field in fields(kind)}
    assert {"model", "loss_fn", "batches", "bn", "normaliser", "params"} <= set(
        parameters
    )


class CountedLoader:
    """Counts the passes over the data."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(data())


def test_a_risk_built_once_serves_every_function() -> None:
    """Its data are read in one pass, and values are those of model, loss and data.

    Catches: a function that builds a risk of its own from the risk's parts.
    """
    loader = CountedLoader()
    model = trained(0.2, norm=True)
    risk = EmpiricalRisk(model, LOSS, loader)
    for name in ("lambda_max", "hessian_trace", "average_sharpness", "batch_sharpness"):
        got = FUNCTIONS[name](risk, generator=seeded())
        want = FUNCTIONS[name](
            trained(0.2, norm=True), LOSS, data(), generator=seeded()
        )
        assert float(got) == float(want)
    nk.measure(risk, measures=["fisher_rao_norm", "worst_case_sharpness"])
    assert loader.passes == 1


def test_own_measure_works_wherever_ours_do() -> None:
    """On a card, in several settings; its invariance is found, and none is assumed.

    Catches: a table that every measure has to be entered into.
    """
    model = trained(0.2)
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    own = [LargestWeight(), LargestWeight(power=2)]
    card = nk.measure(model, LOSS, data(), measures=["grad_norm", *own])
    assert card["largest_weight[power=1]"].value == largest
    assert card["largest_weight[power=2]"].value == largest**2
    assert card.row("largest_weight[power=1]").invariance == "raw"
    assert "the largest absolute weight" in card.methods()
    json.loads(card.to_json())
    report = nk.check_invariance(
        LargestWeight(), model, LOSS, data(), generator=seeded(5)
    )
    assert report.measure == "largest_weight"
    assert report.verdict is Invariance.NOT_INVARIANT


def test_several_settings_of_one_measure_are_several_rows() -> None:
    """Told apart by their variant, also by settings that it does not state.

    Catches: rows of one label; a label that changes because of another row.
    """
    card = nk.measure(
        trained(0.2),
        LOSS,
        data(),
        measures=[
            nk.WorstCase(rho=0.1, steps=20),
            nk.WorstCase(rho=0.05),
            nk.WorstCase(rho=0.05, norm="linf"),
            nk.HessianTrace(num_matvecs=12),
            "hessian_trace",
        ],
        generator=seeded(),
    )
    labels = [row.label for row in card.rows]
    assert labels[1:] == [
        "hessian_trace[num_matvecs=12]",
        "hessian_trace",
        "worst_case_sharpness[rho=0.1,steps=20]",
        "worst_case_sharpness[rho=0.05,steps=1]",
        "worst_case_sharpness[rho=0.05,steps=1,norm=linf]",
        "grad_norm",
    ]


def test_a_sum_loss_has_the_card_of_its_mean() -> None:
    """Every value is that of the mean loss, and the card says so.

    Catches: batch sharpness of the sum beside an eigenvalue of the mean.
    """
    chosen = [cheap(measure) for measure in CASES if measure.invariance != "norms"]
    cards = [
        nk.measure(
            trained(0.2),
            nn.CrossEntropyLoss(reduction=reduction),
            data(),
            measures=chosen,
            optimizer=RULE,
            generator=seeded(),
        )
        for reduction in ("mean", "sum")
    ]
    values = [[row.estimate.value for row in card.rows] for card in cards]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert "the sum that loss_fn returns over the number of examples" in str(cards[1])
    assert "sum" not in str(cards[0]).splitlines()[1]

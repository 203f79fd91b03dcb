"""The sharpness card: many measures on the same data, and nothing lost."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.citations import CITATIONS
from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.core.vocabulary import INVARIANCES, QUANTITIES
from noisekit.curvature import HessianOperator
from noisekit.sharpness import (
    AverageCase,
    EpsilonSharpness,
    FisherRaoNorm,
    Measure,
    Measurement,
    MeasurementContext,
    PacBayesFlatness,
    SGDRule,
    SharpnessCard,
    epsilon_sharpness,
    fisher_rao_norm,
    lambda_max,
    measure,
    worst_case_sharpness,
)
from noisekit.sharpness.data_error import curvature_parts, data_stderr
from noisekit.sharpness.measures import MEASURES, chosen_measures
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, classes, quick, ragged, rectified, state_of

QUICK = [
    *quick([name for name in MEASURES if "sharpness" not in name], num_matvecs=8),
    *quick(["pac_bayes_sharpness"], steps=3),
    *quick([name for name in MEASURES if "average" in name], num_draws=4),
    *quick([name for name in MEASURES if "worst_case" in name], steps=3),
    *quick([name for name in MEASURES if "worst_case" in name], steps=1),
    *quick(["m_sharpness"], batch_size=5),
    *quick(["epsilon_sharpness", "batch_sharpness"]),
    EpsilonSharpness(subspace_dim=4),
]
SMALL_BATCHES = [tuple(part[i : i + 10] for part in classes(30)) for i in (0, 10, 20)]


@pytest.fixture(scope="module")
def everything() -> SharpnessCard:
    """A card with every measure that there is."""
    return measure(
        rectified(norm=True),
        LOSS,
        SMALL_BATCHES,
        measures=QUICK,
        optimizer=SGDRule(lr=0.1, momentum=0.5),
        generator=seeded(),
    )


def test_every_measure_gives_a_row_with_a_quantity(everything: SharpnessCard) -> None:
    """Each is in the vocabulary, states its invariance and its cost.

    Catches: a measure that nobody can name in a recipe; a quantity without meaning.
    """
    assert {row.measure for row in everything.rows} == set(MEASURES)
    for row in everything.rows:
        assert row.quantity in QUANTITIES, row.label
        assert row.invariance in INVARIANCES
        assert row.seconds >= 0
        resolved = row.estimate.status in {Status.OK, Status.NOT_RESOLVED}
        assert resolved, (row.label, row.reason)
    labels = [row.label for row in everything.rows]
    assert len(labels) == len(set(labels))
    assert everything.num_matvecs > 0
    assert everything.num_grads > 0
    assert everything.seconds > 0


def test_values_are_those_of_the_functions(everything: SharpnessCard) -> None:
    """What is shared between measures changes none of them.

    Catches: a measure of another model state; settings that are not passed on.
    """
    model = rectified(norm=True)
    for name, want in (
        ("lambda_max", lambda_max(model, LOSS, SMALL_BATCHES).value),
        ("fisher_rao_norm", fisher_rao_norm(model, LOSS, SMALL_BATCHES).value),
        (
            "worst_case_sharpness[rho=0.05,steps=3]",
            worst_case_sharpness(model, LOSS, SMALL_BATCHES, steps=3).value,
        ),
        (
            "epsilon_sharpness[epsilon=0.0005]",
            epsilon_sharpness(model, LOSS, SMALL_BATCHES, epsilon=5e-4).value,
        ),
    ):
        assert everything[name].value == pytest.approx(want, rel=1e-3), name
    top = everything["lambda_max"]
    ratio = everything["edge_of_stability_ratio"]
    assert ratio.value == pytest.approx(top.value * 0.1 / 3, rel=1e-12)
    assert ratio.num_matvecs == 0
    assert top.num_matvecs > 0


def test_conditions_say_where_it_was_measured(everything: SharpnessCard) -> None:
    """Loss, error, gradient, data and policy stand on the card.

    Catches: the loss of the last perturbed weights; a hash of something else.
    """
    at = everything.conditions
    model = rectified(norm=True)
    risk = EmpiricalRisk(model, LOSS, SMALL_BATCHES)
    loss, gradient = risk.value_and_grad()
    assert at.loss == pytest.approx(loss, rel=1e-12)
    assert at.error == risk.evaluate().error
    assert at.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert at.weight_norm == pytest.approx(float(risk.vector().norm()), rel=1e-12)
    assert at.data_hash == risk.data_hash
    assert (at.num_params, at.num_examples, at.num_batches) == (69, 30, 3)
    assert (at.bn, at.reduction, at.dtype) == ("running", "mean", "float64")
    assert (at.model, at.loss_fn) == ("Sequential", "CrossEntropyLoss")


def test_gradient_and_smallest_eigenvalue_are_on_every_card() -> None:
    """Without them nobody can tell whether the point is a minimum."""
    card = measure(rectified(), LOSS, ragged(), measures="average_sharpness")
    assert {row.measure for row in card.rows} == {
        "average_sharpness",
        "lambda_min",
        "grad_norm",
    }
    assert card["lambda_min"].value < 0


def test_asking_for_more_changes_nothing() -> None:
    """Each measure has a stream of its own, whatever stands beside it.

    Catches: one generator that all measures draw from in turn.
    """
    few, many = (
        measure(
            rectified(),
            LOSS,
            ragged(),
            measures=quick(names, num_matvecs=8, num_draws=4),
            generator=seeded(),
        )
        for names in (
            ["average_sharpness"],
            ["hessian_trace", "average_sharpness", "pac_bayes_flatness"],
        )
    )
    assert few["average_sharpness"] == many["average_sharpness"]
    other = measure(rectified(), LOSS, ragged(), measures="average_sharpness")
    assert other["average_sharpness"] != few["average_sharpness"]


class NoSecondDerivative(torch.autograd.Function):
    """Doubles, and cannot be differentiated twice."""

    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        return 2 * inputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


class Once(nn.Module):
    """A layer without second derivative."""

    def forward(self, inputs: Tensor) -> Tensor:
        return NoSecondDerivative.apply(inputs)


def test_what_cannot_be_had_says_why_and_the_rest_comes() -> None:
    """No BatchNorm, no update rule, no second derivative: rows with a reason.

    Catches: one refusal that takes everything else down.
    """
    card = measure(
        rectified(),
        LOSS,
        ragged(),
        measures=["gauge_fixed_lambda_max", "edge_of_stability_ratio", "lambda_max"],
    )
    for name, reason in (
        ("gauge_fixed_lambda_max", "got none in Sequential; use lambda_max"),
        ("edge_of_stability_ratio", "update rule of SGD, got none; pass optimizer="),
    ):
        row = card.row(name)
        assert math.isnan(row.estimate.value)
        assert row.estimate.status is Status.UNAVAILABLE
        assert reason in row.reason
    assert card["lambda_max"].status is Status.OK

    adam = torch.optim.Adam(rectified().parameters())
    card = measure(
        rectified(),
        LOSS,
        ragged(),
        measures="edge_of_stability_ratio",
        optimizer=adam,
    )
    assert "got Adam" in card.row("edge_of_stability_ratio").reason

    by_sum = partial(measure, rectified(), nn.CrossEntropyLoss(reduction="sum"))
    steps = torch.optim.SGD(rectified().parameters(), lr=0.1)
    asked = by_sum(ragged(), measures="edge_of_stability_ratio", optimizer=steps)
    assert "got a sum loss" in asked.row("edge_of_stability_ratio").reason
    rule = SGDRule(lr=0.1 * 30)
    stated = by_sum(ragged(), measures="edge_of_stability_ratio", optimizer=rule)
    top = lambda_max(rectified(), LOSS, ragged()).value
    ratio = stated["edge_of_stability_ratio"].value
    assert ratio == pytest.approx(1.5 * top, rel=1e-3)

    model = nn.Sequential(rectified(), Once())
    card = measure(model, LOSS, ragged(), measures=["lambda_max", "average_sharpness"])
    assert card["average_sharpness"].status is Status.OK


@dataclass(frozen=True, kw_only=True)
class FailsAfterOne(Measure):
    """Gives a first quantity, and then no second."""

    name = "grad_norm"
    error: type[Exception] = UsageError

    def cost(self) -> int:
        return 0

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        yield self.measured(Estimate(3.0))
        raise self.error("there is no second")


@pytest.mark.parametrize("error", [UsageError, RuntimeError, KeyError])
def test_what_a_measure_gave_before_it_failed_is_kept(error: type[Exception]) -> None:
    """The first quantity is there, another row says what is wrong, and the rest comes.

    Catches: results that are thrown away together with the error; a fault of a
    measure of one's own that takes the card down.
    """
    card = measure(
        rectified(), LOSS, ragged(), measures=[FailsAfterOne(error=error), "lambda_max"]
    )
    first, second = [row for row in card.rows if row.measure == "grad_norm"]
    assert first.estimate.value == 3.0
    assert second.estimate.status is Status.UNAVAILABLE
    assert "there is no second" in second.reason
    assert card["lambda_max"].status is Status.OK


def test_eta_takes_the_invariance_away() -> None:
    """Catches: an invariance that is the quantity's own whatever the settings."""
    for eta, invariance in ((0.0, "neurons"), (0.01, "raw")):
        noise = AverageCase(adaptive=True, num_draws=2, eta=eta)
        card = measure(rectified(), LOSS, ragged(), measures=noise)
        assert card.row("adaptive_average_sharpness").invariance == invariance


def test_unknown_measures_are_answered_with_all_there_are() -> None:
    """Before anything is computed."""
    with pytest.raises(UsageError) as caught:
        measure(rectified(), LOSS, ragged(), measures=["lambda_max", "flatness"])
    text = str(caught.value)
    assert "got flatness; there are: lambda_max, lambda_min" in text
    assert all(name in text for name in MEASURES)
    with pytest.raises(UsageError, match="got none; there are"):
        measure(rectified(), LOSS, ragged(), measures=[])


def test_rows_are_found_by_quantity_or_label(everything: SharpnessCard) -> None:
    """Several variants ask for the whole label."""
    assert everything["lambda_max"] is everything.row("lambda_max").estimate
    with pytest.raises(UsageError, match=r"got 'epsilon_sharpness'; there are: .*=0.0"):
        everything["epsilon_sharpness"]
    with pytest.raises(UsageError, match=r"got 'sharpness'; there are: lambda_max, "):
        everything["sharpness"]


def test_table_has_a_row_per_quantity(everything: SharpnessCard) -> None:
    """Values, errors, units and invariances as columns."""
    frame = everything.frame()
    assert len(frame) == len(everything.rows)
    top = frame.set_index("quantity").loc["lambda_max"]
    estimate = everything["lambda_max"]
    assert top["value"] == estimate.value
    assert top["bound"] == estimate.bound
    assert top["unit"] == "loss/param²"
    assert top["invariance"] == "raw"
    assert top["data_stderr"] > 0
    lower = frame[frame["side"] == "lower"]
    assert math.isinf(lower["high"].iloc[0])


OWN_ERROR_OVER_DATA = {
    "m_sharpness",
    "fisher_rao_norm",
    "batch_sharpness",
    "batch_sharpness_ratio_of_means",
}
NO_ERROR_OVER_DATA = {"lambda_max_pyhessian", "first_order_share"}


def test_every_value_has_its_error_over_data(everything: SharpnessCard) -> None:
    """Beside the error over probes and the solver's bound, and counted in by one word.

    Catches: a measure that states how sure it is of these examples only.
    """
    for row in everything.rows:
        whole = row.over_data
        if row.quantity in OWN_ERROR_OVER_DATA:
            assert row.estimate.error_source is ErrorSource.DATA
        elif row.quantity in NO_ERROR_OVER_DATA or math.isnan(row.estimate.value):
            assert row.data_stderr is None
        else:
            assert row.data_stderr is not None, row.label
            assert row.data_stderr > 0, row.label
            own = row.estimate.stderr or 0.0
            assert whole.stderr == pytest.approx(math.hypot(own, row.data_stderr))
            assert whole.num_samples == 3
            source = ErrorSource.DATA_AND_PROBES if own else ErrorSource.DATA
            assert whole.error_source is source
        assert whole.value == row.estimate.value or math.isnan(whole.value)
    trace = everything.frame().set_index("quantity").loc["hessian_trace"]
    interval = everything.row("hessian_trace").over_data.interval()
    assert (trace["low"], trace["high"]) == (interval.low, interval.high)


def test_errors_over_data_that_cost_can_be_left_out() -> None:
    """Those that come with the same products stay; values are the same bits.

    Catches: products that are spent and not told; draws that move the values.
    """
    names = [
        "lambda_max",
        "edge_of_stability_ratio",
        "hessian_trace",
        "hessian_frobenius_norm",
        "effective_dimension",
        "grad_norm",
    ]
    spent = []
    inner = HessianOperator._matmat

    def counted(self, block):
        spent.append(block.shape[1])
        return inner(self, block)

    cards = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HessianOperator, "_matmat", counted)
        for wanted in (True, False):
            cards[wanted] = measure(
                rectified(),
                LOSS,
                ragged(),
                measures=quick(names, num_matvecs=8),
                optimizer=SGDRule(lr=0.1),
                data_error=wanted,
                generator=seeded(),
            )
            told = sum(
                row.estimate.num_matvecs
                for row in cards[wanted].rows
                if row.quantity != "effective_dimension"  # of another matrix
            )
            # One product each for two eigenvectors is made batch by batch.
            assert told == sum(spent) + 2 * wanted
            spent.clear()
    for with_error, without in zip(cards[True].rows, cards[False].rows, strict=True):
        assert with_error.estimate.value == without.estimate.value
        assert with_error.data_stderr is not None
        free = without.quantity == "hessian_trace"
        assert (without.data_stderr is not None) is free
    rows = [cards[wanted].row("grad_norm").estimate for wanted in (True, False)]
    assert [row.num_grads for row in rows] == [2, 1]
    edge = cards[True].row("edge_of_stability_ratio")
    assert edge.estimate.num_matvecs == 0


def test_text_shows_value_invariance_and_conditions(everything: SharpnessCard) -> None:
    """Catches: a solver's bound printed as plus-minus; a lower bound without sign."""
    text = str(everything)
    assert text.startswith("Sharpness of Sequential (69 parameters, float64) on 30")
    assert "BatchNorm running" in text
    line = next(x for x in text.splitlines() if x.startswith("lambda_max "))
    assert re.search(r"\(residual .*loss/param² +raw +± .* over data", line)
    line = next(x for x in text.splitlines() if x.startswith("worst_case_sharpness"))
    assert "≥" in line
    assert "first-order share" in line
    assert "neurons: unchanged when layers or neurons" in text
    assert text.splitlines()[-1].endswith(" s")
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_json_holds_everything(everything: SharpnessCard) -> None:
    """Finite numbers only, since JSON knows no infinity."""
    text = everything.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    content = json.loads(text)
    assert content["conditions"]["data_hash"] == everything.conditions.data_hash
    settings = [x["settings"] for x in content["measures"] if "rho" in x["settings"]]
    assert settings[0] == {
        "rho": 0.05,
        "norm": "l2",
        "adaptive": False,
        "eta": 0.0,
        "steps": 3,
        "restarts": 0,
        "batch_size": None,
        "logits": "raw",
    }
    assert len(content["rows"]) == len(everything.rows)
    assert content["rows"][0]["value"] == everything.rows[0].estimate.value
    assert content["methods"] == everything.methods()


def test_methods_and_references_are_of_what_was_measured() -> None:
    """Catches: a paragraph that claims measures which were not had."""
    card = measure(
        rectified(),
        LOSS,
        ragged(),
        measures=["epsilon_sharpness", "gauge_fixed_lambda_max"],
    )
    text = card.methods()
    assert "30 examples in 2 batches" in text
    assert "epsilon-sharpness, the largest relative increase" in text
    assert "BatchNorm at unit norm" not in text
    assert "running" not in text  # without BatchNorm there is no policy
    entries = re.findall(r"@\w+{(\w+),", card.bibtex())
    assert entries == ["keskar2017large", "wu2000thick"]


def test_citations_are_complete() -> None:
    """Every source of a measure is an entry, and every entry has its fields."""
    used = {key for item in chosen_measures(MEASURES) for key in item.sources}
    assert used <= set(CITATIONS)
    for citation in CITATIONS.values():
        entry = citation.bibtex
        assert entry.count("{") == entry.count("}")
        assert citation.venue or citation.arxiv
        assert str(citation.year) in citation.key
        for field in ("author", "title", "year"):
            assert f"  {field} = {{" in entry


def test_model_is_given_back() -> None:
    """After all measures, weights, statistics, modes and random state are as before.

    Catches: hooks or gradients that one of them leaves behind.
    """
    model = rectified(norm=True).train()
    before = state_of(model)
    random = torch.random.get_rng_state()
    risk = EmpiricalRisk(model, LOSS, SMALL_BATCHES)
    measure(risk, measures=QUICK, generator=seeded())
    assert state_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("bn", ["batch", "recalibrated"])
def test_every_measure_follows_the_policy_for_batch_norm(bn: str) -> None:
    """Nothing is refused, and training goes on with its own statistics.

    Catches: a measure that calls the model in a mode of its own.
    """
    model = rectified(norm=True).train()
    before = state_of(model)
    card = measure(
        model,
        LOSS,
        SMALL_BATCHES,
        measures=QUICK,
        optimizer=SGDRule(lr=0.1),
        bn=bn,
        generator=seeded(),
    )
    refused = [r.label for r in card.rows if r.estimate.status is Status.UNAVAILABLE]
    assert refused == []
    assert card.conditions.bn == bn
    assert state_of(model) == before


def test_data_that_are_read_again_have_values_but_no_error_over_batches() -> None:
    """A shuffling loader makes other batches on each pass, which cannot be paired.

    Catches: differences of losses of different examples.
    """
    rows = torch.utils.data.TensorDataset(*classes(30))
    loader = torch.utils.data.DataLoader(rows, batch_size=10, shuffle=True)
    risk = EmpiricalRisk(rectified(), LOSS, loader, memory_budget=100)
    names = ["lambda_max", "worst_case_sharpness", "average_sharpness"]
    chosen = quick(names, num_draws=4, steps=3)
    got, want = (
        measure(data, measures=chosen, generator=seeded())
        for data in (risk, EmpiricalRisk(rectified(), LOSS, SMALL_BATCHES))
    )
    for row, other in zip(got.rows, want.rows, strict=True):
        assert row.estimate.value == pytest.approx(other.estimate.value, rel=1e-6)
        assert row.data_stderr is None
    assert want.row("lambda_max").data_stderr > 0


def test_error_of_an_eigenvalue_over_data_covers_as_often_as_it_says() -> None:
    """Per-batch curvature along the top eigenvector tells how the data move it.

    Catches: the spread over batches in place of the error of their mean; a vector
    that is not of unit norm.
    """
    spread = torch.tensor([3.0, 1.0, 0.5]).double()

    def inputs_of(seed: int) -> Tensor:
        return torch.randn(400, 3, generator=seeded(seed)).double() * spread

    def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean() / 2

    model = nn.Linear(3, 1, bias=False).double()
    covered = 0
    for seed in range(200):
        inputs = inputs_of(seed)
        parts = inputs.split([15, 25] * 10)
        batches = [(part, part[:, :1]) for part in parts]
        risk = EmpiricalRisk(model, half_squares, batches, check=False)
        values, vectors = torch.linalg.eigh(inputs.T @ inputs / 400)
        along = curvature_parts(risk, vectors[:, -1])
        assert float(along.sum()) == pytest.approx(float(values[-1]), rel=1e-10)
        shares = torch.tensor([15.0, 25.0] * 10).double() / 400
        stderr = data_stderr(along, shares)
        covered += abs(float(values[-1]) - 9) <= 2.093 * stderr
    assert 0.88 <= covered / 200 <= 0.99


def test_parts_of_curvature_are_those_of_the_batches() -> None:
    """Each is its share times the batch's own ``v' H v``.

    Catches: weights that are applied twice.
    """
    model = rectified()
    vector = torch.randn(57, generator=seeded()).double()
    parts = curvature_parts(EmpiricalRisk(model, LOSS, ragged()), vector)
    for part, (inputs, targets) in zip(parts, ragged(), strict=True):
        loss = reference.flat_loss(model, LOSS, inputs, targets)
        dense = reference.dense_hessian(loss, reference.flat_weights(model))
        want = len(targets) / 30 * float(vector @ dense @ vector)
        assert float(part) == pytest.approx(want, rel=1e-9)


def test_settings_say_what_a_loss_of_ones_own_does_not() -> None:
    """A likelihood and a criterion make two rows available on such a card.

    Catches: measures that only the single functions can take.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(2, 8, 3).double(), torch.randn(2, 8, 2).double()

    def loss_fn(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).square().sum(1).mean() / 2

    names = ["fisher_rao_norm", "pac_bayes_flatness"]
    batches = list(zip(inputs, targets, strict=True))
    without = measure(model, loss_fn, batches, measures=names)
    stated = measure(
        model,
        loss_fn,
        batches,
        measures=[
            FisherRaoNorm(likelihood="gaussian"),
            PacBayesFlatness(criterion="loss"),
        ],
    )
    rows = {row.label: row.estimate.status for row in without.rows}
    assert rows["fisher_rao_norm"] is rows["pac_bayes_flatness"] is Status.UNAVAILABLE
    rows = {row.label: row.estimate.status for row in stated.rows}
    assert rows["fisher_rao_norm"] is rows["pac_bayes_flatness"] is Status.OK
    alone = fisher_rao_norm(model, loss_fn, batches, likelihood="gaussian")
    assert stated["fisher_rao_norm"].value == alone.value

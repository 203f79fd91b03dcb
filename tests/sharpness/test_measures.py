"""What the registry says of its measures is true of them."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from noisekit.sharpness import SGDRule, SharpnessCard, WorstCase, measure
from noisekit.sharpness.measures import MEASURES, chosen_measures
from tests.randomness import seeded
from tests.sharpness.networks import LOSS, classes, quick, rectified

SETTINGS = [
    *quick([name for name in MEASURES if name != "m_sharpness"], num_draws=6),
    *quick(["m_sharpness"], batch_size=5),
]


def fitted() -> list[tuple[Tensor, Tensor]]:
    """Data that the network classifies without an error, in equal batches."""
    inputs, _ = classes(60)
    targets = rectified()(inputs).argmax(1)
    return list(zip(inputs.split(20), targets.split(20), strict=True))


def card_of(factors: Tensor) -> SharpnessCard:
    """Every measure of the network with its neurons multiplied by the factors."""
    model = rectified()
    with torch.no_grad():
        model[0].weight.mul_(factors[:, None])
        model[0].bias.mul_(factors)
        model[2].weight.div_(factors)
    return measure(
        model,
        LOSS,
        fitted(),
        measures=SETTINGS,
        optimizer=SGDRule(lr=0.1),
        generator=seeded(),
    )


@pytest.fixture(scope="module")
def cards() -> dict[str, SharpnessCard]:
    """The network, and twins of the same function by layer and by neuron."""
    return {
        "plain": card_of(torch.ones(6).double()),
        "layers": card_of(torch.full((6,), 4.0).double()),
        "neurons": card_of(torch.tensor([4.0, 0.25, 2.0, 8.0, 1.0, 0.5]).double()),
    }


@pytest.mark.parametrize("name", MEASURES)
def test_invariance_is_what_rescaling_finds(
    name: str, cards: dict[str, SharpnessCard]
) -> None:
    """A twin of the same function has the same value exactly where that is claimed.

    Catches: a measure called invariant that is not; one called raw for no reason.
    """
    invariance = MEASURES[name][0].invariance
    if invariance == "norms":
        assert cards["plain"][name].status == "unavailable"
        return  # it needs a BatchNorm, and is tested with one
    kept = {"raw": (), "layers": ("layers",), "neurons": ("layers", "neurons")}[
        invariance
    ]
    for twin in ("layers", "neurons"):
        values = [
            [
                row.estimate.value
                for row in cards[which].rows
                if row.quantity == name and row.variant != "magnitude_aware"
            ]
            for which in ("plain", twin)
        ]
        assert values[0]
        assert all(math.isfinite(value) for value in values[0])
        same = values[1] == pytest.approx(values[0], rel=1e-6)
        assert same is (twin in kept), (twin, values)


def test_half_precision_is_measured_in_single() -> None:
    """A bfloat16 network has the values of its float32 copy, and keeps its type.

    Catches: displacements that round away, so that nothing rises; products or
    gradients in eight bits.
    """
    narrow = rectified().bfloat16()
    wide = copy.deepcopy(narrow).float()
    inputs, targets = classes(60)
    cards = []
    for model, rows in ((narrow, inputs.bfloat16()), (wide, inputs.bfloat16().float())):
        data = list(zip(rows.split(20), targets.split(20), strict=True))
        chosen = [item for item in SETTINGS if item.name != "lambda_max_pyhessian"]
        cards.append(
            measure(
                model,
                LOSS,
                data,
                measures=chosen,
                generator=seeded(),
            )
        )
    got, want = ({row.label: row.estimate.value for row in card.rows} for card in cards)
    assert got == pytest.approx(want, rel=1e-5, nan_ok=True)
    assert sum(math.isfinite(value) for value in got.values()) > 20
    assert all(p.dtype is torch.bfloat16 for p in narrow.parameters())
    assert cards[0].conditions.dtype == "bfloat16"


def test_descriptions_are_clauses_of_a_methods_section() -> None:
    """Catches: a sentence, or nothing, where a clause belongs."""
    for name, measures in MEASURES.items():
        for item in measures:
            text = item.description
            assert text[0].islower() or text.startswith(("PAC", "PyH")), name
            assert not text.endswith("."), name


def test_measures_come_in_the_order_of_the_table_and_once() -> None:
    """Catches: an eigenvalue computed again for each name that asks for it."""
    found = chosen_measures(["grad_norm", "lambda_max", "grad_norm"])
    assert [item.name for item in found] == ["lambda_max", "grad_norm"]
    assert chosen_measures("lambda_max")[0].name == "lambda_max"
    wide = WorstCase(rho=0.1, steps=20)
    found = chosen_measures([wide, "grad_norm", "worst_case_sharpness", wide])
    assert found == (
        wide,
        WorstCase(steps=1),
        WorstCase(steps=10),
        *MEASURES["grad_norm"],
    )


def test_needs_are_told_where_they_are_missing() -> None:
    """Regression has no classes: what needs them says so, the others are there."""
    inputs, _ = classes(20)
    card = measure(
        nn.Linear(5, 2).double(),
        nn.MSELoss(),
        [(inputs[:10], inputs[:10, :2]), (inputs[10:], inputs[10:, :2])],
        measures=[item for item in SETTINGS if "class" in item.needs],
    )
    flatness = card.row("pac_bayes_flatness")
    assert flatness.estimate.status == "unavailable"
    assert "needs outputs (n, classes)" in flatness.reason

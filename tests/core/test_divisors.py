"""What a loss divides by is established on all data, or asked for."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import noisekit as nk
from noisekit.core.errors import NormaliserError
from noisekit.core.known_losses import known_loss
from noisekit.core.risk import EmpiricalRisk
from tests.cases import CLASS_WEIGHTS, RAGGED, mlp, seeded

INPUTS = torch.cat([x for x, _ in RAGGED])
CLASSES = torch.cat([y for _, y in RAGGED])


class Streamed:
    """Batches beyond the memory budget."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        """Yield them again."""
        return iter(self.batches)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, weight=CLASS_WEIGHTS)


def ignoring(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


class Halved(nn.CrossEntropyLoss):
    """A subclass that divides by the examples, whatever the weights."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return half of a mean over examples."""
        losses = functional.cross_entropy(outputs, targets, reduction="none")
        return 0.5 * (losses * self.weight[targets]).mean()


def singles(targets: Tensor) -> list[Any]:
    return [(INPUTS[i : i + 1], targets[i : i + 1]) for i in range(10)]


def sorted_by_class() -> list[Any]:
    return [(INPUTS[k == CLASSES], CLASSES[k == CLASSES]) for k in range(3)]


def one_ignored(at: int) -> Tensor:
    targets = CLASSES.clone()
    targets[at] = -100
    return targets


HIDDEN = {
    "weights, one example each": (weighted, singles(CLASSES)),
    "weights, class by class": (weighted, sorted_by_class()),
    "ignored, one example each": (ignoring, singles(one_ignored(4))),
    "all of a batch but one ignored": (
        ignoring,
        [
            (INPUTS[:4], CLASSES[:4]),
            (INPUTS[4:8], torch.tensor([-100, 1, -100, -100])),
            (INPUTS[8:], CLASSES[8:]),
        ],
    ),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", HIDDEN)
def test_a_divisor_that_no_batch_shows_by_itself(case: str, streamed: bool) -> None:
    """With the normaliser that is asked for, the loss is that of all data at once.

    Catches: a check within batches only, or of the first batch where data are read
    again on each pass.
    """
    loss, batches = HIDDEN[case]
    options: dict[str, Any] = {"memory_budget": 1} if streamed else {}
    data = Streamed(batches) if streamed else batches
    with pytest.raises(NormaliserError, match="needs normaliser=lambda targets"):
        EmpiricalRisk(seeded(mlp)(), loss, data, **options)
    counts: Callable[[Tensor], Tensor] = lambda t: (t != -100).sum()  # noqa: E731
    if loss is weighted:
        counts = lambda t: CLASS_WEIGHTS[t].sum()  # noqa: E731
    risk = EmpiricalRisk(seeded(mlp)(), loss, data, normaliser=counts, **options)
    model = seeded(mlp)().eval()
    x, y = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    want = float(loss(model(x), y).detach())
    assert risk.value() == pytest.approx(want, rel=1e-12)


def test_a_rare_label_in_the_middle_of_one_batch() -> None:
    """Label maps that ignore 255 in a batch that is neither first, last nor lowest.

    Catches: looking for the lowest class only.
    """
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(3, (6, 4, 4), generator=generator)
    maps[2, :, 1:], maps[3, :, 1:] = 255, 255
    images = torch.randn(6, 2, 4, 4, generator=generator).double()
    images[2:4] *= 0.1
    batches = [(images[i : i + 2], maps[i : i + 2]) for i in (0, 2, 4)]
    model = seeded(lambda: nn.Conv2d(2, 3, 1))()
    own = lambda o, t: functional.cross_entropy(o, t, ignore_index=255)  # noqa: E731
    with pytest.raises(NormaliserError, match="needs normaliser=lambda targets"):
        EmpiricalRisk(model, own, batches)
    known = partial(functional.cross_entropy, ignore_index=255)
    whole = float(known(model(images), maps).detach())
    risk = EmpiricalRisk(model, known, batches)
    assert risk.normalisers == [32.0, 8.0, 32.0]
    assert risk.value() == pytest.approx(whole, rel=1e-12)


def test_a_subclass_is_a_loss_of_its_own() -> None:
    """Catches: class weights taken for the divisor of whatever inherits."""
    loss = Halved(weight=CLASS_WEIGHTS)
    risk = EmpiricalRisk(seeded(mlp)(), loss, singles(CLASSES))
    model = seeded(mlp)().eval()
    want = float(loss(model(INPUTS), CLASSES).detach())
    assert risk.value() == pytest.approx(want, rel=1e-12)


def test_batches_of_one_example_pass_with_the_right_divisor() -> None:
    """Catches: a check between batches that refuses what is right."""
    own = lambda o, t: functional.cross_entropy(o, t)  # noqa: E731
    risk = EmpiricalRisk(seeded(mlp)(), own, singles(CLASSES))
    assert risk.checked
    assert risk.function == "mean loss over 10 examples"


def test_known_losses() -> None:
    """Catches: keywords of a partial, or a replaced ``forward``, overlooked."""
    assert known_loss(lambda o, t: o) is None
    assert known_loss(Halved(weight=CLASS_WEIGHTS)) is None
    changed = nn.CrossEntropyLoss()
    changed.forward = lambda o, t: o.mean()
    assert known_loss(changed) is None
    cross = known_loss(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=1))
    assert cross is not None
    assert cross.likelihood == "categorical"
    targets = torch.tensor([0, 1, 2, 2])
    assert float(cross.divisor(targets)) == pytest.approx(0.2 + 3.0 + 3.0)
    by_keyword = known_loss(partial(functional.cross_entropy, ignore_index=2))
    assert by_keyword is not None
    assert float(by_keyword.divisor(targets)) == 2.0
    squares = known_loss(functional.mse_loss)
    assert squares is not None
    assert (squares.likelihood, squares.divisor(torch.zeros(4, 3))) == ("gaussian", 12)
    assert squares.target_weights(targets) is None


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (nn.CrossEntropyLoss(), "mean loss over 10 examples"),
        (
            nn.CrossEntropyLoss(reduction="sum"),
            "sum of the losses over 10 examples, divided by 10",
        ),
        (
            nn.CrossEntropyLoss(weight=2 * torch.ones(3).double()),
            "mean loss over 20 targets of 10 examples",
        ),
    ],
)
def test_a_risk_says_which_function_it_is(loss: nn.Module, text: str) -> None:
    """Catches: a sum loss that is divided by the examples without a word."""
    risk = EmpiricalRisk(seeded(mlp)(), loss, RAGGED)
    assert risk.function == text
    assert repr(risk) == f"EmpiricalRisk(Sequential, 43 parameters, F = {text}, " + (
        "bn='running')"
    )
    unchecked = EmpiricalRisk(seeded(mlp)(), loss, RAGGED, check=False)
    assert unchecked.function == f"{text} (not checked)"


def test_the_way_out_leads_out() -> None:
    """A loss that couples examples is measured as the refusal says.

    Catches: advice that the function which was called does not take.
    """

    def spread(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - outputs.mean(0)).pow(2).mean()

    model = seeded(mlp)()
    with pytest.raises(NormaliserError, match="check=False"):
        nk.lambda_max(model, spread, RAGGED)
    risk = nk.EmpiricalRisk(model, spread, RAGGED, normaliser=len, check=False)
    assert nk.lambda_max(risk).value > 0.0

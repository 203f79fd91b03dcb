"""Losses: each by hand in double precision, over examples and over positions."""

import math

import pytest
import torch
from torch import Tensor

from noisekit.train.losses import LOSSES, find_loss

POSITIONS = {"one target": (), "a target per position": (3,)}


def problem(positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 4, *positions, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (5, *positions), generator=generator)
    return outputs, targets


def by_hand(name: str, logits: list[float], target: int, smoothing: float) -> float:
    """The loss of one row of logits, in plain Python."""
    if name == "cross_entropy":
        total = sum(math.exp(z) for z in logits)
        each = [math.log(total) - z for z in logits]
        return (1 - smoothing) * each[target] + smoothing * sum(each) / len(each)
    wanted = [float(k == target) for k in range(len(logits))]
    if name == "binary_cross_entropy":
        return sum(
            math.log1p(math.exp(-z)) if y else math.log1p(math.exp(z))
            for z, y in zip(logits, wanted, strict=True)
        )
    squared = sum((z - y) ** 2 for z, y in zip(logits, wanted, strict=True))
    return squared if name == "squared_error" else squared / 2


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize(
    ("name", "smoothing"), [*((name, 0.0) for name in LOSSES), ("cross_entropy", 0.3)]
)
def test_losses_are_what_they_say(name, smoothing, positions) -> None:
    """Per example, and their mean; errors count positions.

    Catches: a mean over classes; a half too many; a sum over positions; an argmax over
    the wrong axis.
    """
    outputs, targets = problem(positions)
    loss = find_loss(name, label_smoothing=smoothing)
    rows = outputs.reshape(5, 4, -1).transpose(1, 2)  # (n, positions, classes)
    wanted, wrong = [], []
    for example, labels in zip(rows.tolist(), targets.reshape(5, -1), strict=True):
        pairs = list(zip(example, labels.tolist(), strict=True))
        wanted.append(
            sum(by_hand(name, z, y, smoothing) for z, y in pairs) / len(pairs)
        )
        wrong.append(sum(z.index(max(z)) != y for z, y in pairs) / len(pairs))
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(loss.per_example(outputs, targets), expected)
    torch.testing.assert_close(loss.mean(outputs, targets), expected.mean())
    found = loss.wrong(outputs, targets).double()
    torch.testing.assert_close(found, torch.tensor(wrong).double())


def test_single_output_is_the_logit_of_class_one() -> None:
    """Binary classification with one output: the sign decides.

    Catches: an argmax over one output, which is always class 0.
    """
    outputs = torch.tensor([[2.0], [-1.0], [0.5]], dtype=torch.float64)
    targets = torch.tensor([1, 0, 0])
    loss = find_loss("binary_cross_entropy")
    expected = torch.tensor([2.0, 1.0, -0.5]).double().neg().exp().log1p()
    torch.testing.assert_close(loss.per_example(outputs, targets), expected)
    assert loss.wrong(outputs, targets).tolist() == [False, False, True]

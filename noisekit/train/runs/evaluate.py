"""Loss and error over whole data sets, and where the weights are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from noisekit.core.params import flatten
from noisekit.train.data.datasets import TensorPair
from noisekit.train.recipes.run_spec import RunSpec


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        scores: ``train_loss``, ``train_error`` and so on for each part of the data,
            ``weight_norm`` and ``distance_from_start``.
    """

    scores: Mapping[str, float]

    @property
    def train_loss(self) -> float:
        """Mean loss over the training data [loss]."""
        return self.scores["train_loss"]

    @property
    def finite(self) -> bool:
        """Whether the training loss is a number."""
        return math.isfinite(self.train_loss)


def evaluation_steps(spec: RunSpec) -> frozenset[int]:
    """Return the updates after which the whole data are evaluated, 0 included."""
    last, every = spec.max_updates, spec.evaluation.every_updates
    if every is not None:
        return frozenset(range(0, last + 1, every))
    epochs = spec.evaluation.every_epochs
    assert epochs is not None  # the recipe's check: one of the two is given
    count = int(last / (epochs * spec.updates_per_epoch)) + 1
    steps = (spec.updates_at(i * epochs) for i in range(count + 1))
    return frozenset(step for step in steps if step <= last)


def evaluate(
    model: nn.Module,
    splits: Mapping[str, TensorPair],
    *,
    start: Tensor,
    batch_size: int,
) -> Evaluation:
    """Evaluate ``model`` in evaluation mode on every split, and give its mode back.

    Losses are summed in double precision over examples, so that the batch size of
    the evaluation does not weigh ragged batches wrongly.

    Args:
        model: The model.
        splits: The data, by name.
        start: The initial parameters as one vector.
        batch_size: Examples per forward pass.
    """
    training = model.training
    model.eval()
    names: list[str] = []
    values: list[Tensor] = []
    with torch.no_grad():
        for name, data in splits.items():
            names += [f"{name}_loss", f"{name}_error"]
            values += _loss_and_error(model, data, batch_size)
        weights = flatten(p.detach() for p in model.parameters())
        names += ["weight_norm", "distance_from_start"]
        values += [_norm(weights), _norm(weights - start)]
        # One transfer from the device for all of them.
        listed: list[float] = torch.stack(values).tolist()
    model.train(training)
    return Evaluation(dict(zip(names, listed, strict=True)))


def correct_examples(
    model: nn.Module, data: TensorPair, *, batch_size: int
) -> list[bool]:
    """Return for each example whether the model classifies it correctly."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [
            model(inputs).argmax(1) == targets
            for inputs, targets in _chunks(data, batch_size)
        ]
    model.train(training)
    flags: list[bool] = torch.cat(parts).tolist()
    return flags


def _loss_and_error(
    model: nn.Module, data: TensorPair, batch_size: int
) -> tuple[Tensor, Tensor]:
    wide = _wide(data.inputs)
    loss = torch.zeros((), dtype=wide, device=data.inputs.device)
    wrong = torch.zeros((), dtype=wide, device=data.inputs.device)
    for inputs, targets in _chunks(data, batch_size):
        outputs = model(inputs)
        loss += cross_entropy(outputs, targets, reduction="none").sum(dtype=wide)
        wrong += (outputs.argmax(1) != targets).sum()
    return loss / len(data), wrong / len(data)


def _chunks(data: TensorPair, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(
        zip(
            torch.split(data.inputs, size),
            torch.split(data.targets, size),
            strict=True,
        )
    )


def _norm(vector: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vector, dtype=_wide(vector))
    return norm


def _wide(tensor: Tensor) -> torch.dtype:
    # Apple's GPUs have no double precision.
    return torch.float32 if tensor.device.type == "mps" else torch.float64

"""Loss and error over whole data sets, and where the weights are."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noisekit.core.params import flatten
from noisekit.train.data.section import TensorPair
from noisekit.train.losses import Loss
from noisekit.train.recipes.sections import SPLITS


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        scores: ``train_loss``, ``train_error`` and so on for each part of the data,
            ``weight_norm`` and the distances.
    """

    scores: Mapping[str, float]

    @property
    def train_loss(self) -> float:
        """Mean loss over the training data [loss]."""
        return self.scores["train_loss"]

    def of(self, splits: Iterable[str]) -> "Evaluation":
        """Return the evaluation on some parts of the data."""
        others = set(SPLITS) - set(splits)
        left_out = {f"{name}_{kind}" for name in others for kind in ("loss", "error")}
        return Evaluation({k: v for k, v in self.scores.items() if k not in left_out})

    @property
    def headline(self) -> str:
        """The training loss in words; without it, the first loss that is known."""
        name = "train_loss" if "train_loss" in self.scores else next(iter(self.scores))
        split = "training" if name == "train_loss" else name.removesuffix("_loss")
        return f"{split} loss {self.scores[name]:.3g}"

    @property
    def fault(self) -> str:
        """What is no number, in words; empty where the training loss is one.

        Without a training loss, it is the weights that are looked at.
        """
        name = "train_loss" if "train_loss" in self.scores else "weight_norm"
        value = self.scores[name]
        if math.isfinite(value):
            return ""
        what = "the training loss" if name == "train_loss" else "the weights' norm"
        return f"{what} was {value}"


def evaluate(
    model: nn.Module,
    splits: Mapping[str, TensorPair],
    loss: Loss,
    *,
    starts: Mapping[str, Tensor],
    batch_size: int,
) -> Evaluation:
    """Evaluate ``model`` in evaluation mode on every split, and give its mode back.

    Losses are summed in double precision over examples, so that the batch size of
    the evaluation does not weigh ragged batches wrongly.

    Args:
        model: The model.
        splits: The data, by name.
        loss: What is summed, and what counts as an error.
        starts: Parameters that distances are measured from, each as one vector, by
            the distance's name, such as ``distance_from_start``.
        batch_size: Examples per forward pass.
    """
    training = model.training
    model.eval()
    names: list[str] = []
    values: list[Tensor] = []
    with torch.no_grad():
        for name, data in splits.items():
            names += [f"{name}_loss", f"{name}_error"]
            values += _loss_and_error(model, data, loss, batch_size)
        weights = flatten(p.detach() for p in model.parameters())
        names += ["weight_norm", *starts]
        values += [
            _norm(weights),
            *(_norm(weights - start) for start in starts.values()),
        ]
        # One transfer from the device for all of them.
        listed: list[float] = torch.stack(values).tolist()
    model.train(training)
    return Evaluation(dict(zip(names, listed, strict=True)))


def errors_of_examples(
    model: nn.Module, data: TensorPair, loss: Loss, *, batch_size: int
) -> list[float]:
    """Return the error of each example: 0 or 1, or the share of its positions."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [
            loss.wrong(model(inputs), targets).double()
            for inputs, targets in _chunks(data, batch_size)
        ]
    model.train(training)
    errors: list[float] = torch.cat(parts).tolist()
    return errors


def _loss_and_error(
    model: nn.Module, data: TensorPair, loss: Loss, batch_size: int
) -> tuple[Tensor, Tensor]:
    wide = _wide(data.inputs)
    total = torch.zeros((), dtype=wide, device=data.inputs.device)
    wrong = torch.zeros((), dtype=wide, device=data.inputs.device)
    for inputs, targets in _chunks(data, batch_size):
        outputs = model(inputs)
        total += loss.per_example(outputs, targets).sum(dtype=wide)
        wrong += loss.wrong(outputs, targets).sum()
    return total / len(data), wrong / len(data)


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

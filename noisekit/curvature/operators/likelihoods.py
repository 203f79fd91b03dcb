"""Likelihoods of Fisher matrices, in the space of a model's outputs."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from noisekit.core.batches import Batch, count_examples
from noisekit.core.errors import UsageError
from noisekit.core.known_losses import known_loss
from noisekit.core.normalisation import Normaliser, normaliser_value
from noisekit.core.randomness import stream
from noisekit.core.risk import EmpiricalRisk

Likelihood = Literal["categorical", "gaussian"]

# Of its magnitudes, the part that rounding leaves of a sum that is zero.
_NO_SLOPE = 1e-3


def likelihood_of(loss_fn: object) -> Likelihood | None:
    """Return the likelihood of a PyTorch loss, ``None`` of any other."""
    known = known_loss(loss_fn)
    return None if known is None else known.likelihood


def class_axis(risk: EmpiricalRisk, outputs: Tensor, batch: Batch) -> int:
    """Return the axis of the classes of a categorical likelihood.

    PyTorch's cross-entropy takes the second. Another loss is asked: a probability does
    not change where a constant is added to all logits of a target, so that along the
    classes, and along no other axis, the loss's gradient adds up to zero.

    Args:
        risk: Held as measured.
        outputs: Of the batch, ``(n, classes)``, ``(n, classes, ...)`` or
            ``(n, ..., classes)``.
        batch: Has the targets.

    Raises:
        UsageError: If no axis, or more than one, is that of classes.
    """
    if outputs.ndim < 3 or likelihood_of(risk.loss_fn) == "categorical":
        check_outputs(outputs, "categorical")
        return 1
    drawn = torch.randn(outputs.shape, generator=stream(0, "class axis"))
    point = (outputs.detach() + drawn.to(outputs)).requires_grad_()
    loss = risk.loss_at(point, batch[1])
    (slope,) = torch.autograd.grad(loss, point, materialize_grads=True)
    axes = [
        axis
        for axis in range(1, outputs.ndim)
        if float(slope.sum(axis).norm())
        <= _NO_SLOPE * float(slope.abs().sum(axis).norm())
    ]
    if len(axes) != 1:
        result = ", ".join(map(str, axes)) or "none"
        raise UsageError(
            "likelihood='categorical' needs one axis of classes, along which the "
            f"loss's gradient adds up to zero, got axes {result} of outputs of shape "
            f"{tuple(outputs.shape)}; let the model return (n, classes, ...) and take "
            "nn.CrossEntropyLoss(), or use GGNOperator, which needs no classes."
        )
    return axes[0]


def check_outputs(outputs: Tensor, likelihood: Likelihood) -> None:
    """Refuse outputs that are no parameters of the likelihood.

    Raises:
        UsageError: If there is no axis of classes.
    """
    if likelihood == "categorical" and (outputs.ndim < 2 or outputs.shape[1] < 2):
        raise UsageError(
            "likelihood='categorical' needs logits (n, classes, ...) with at least 2 "
            f"classes on the second axis, got outputs of shape {tuple(outputs.shape)}; "
            "give a binary model two logits, or use likelihood='gaussian'."
        )


def target_weights(
    outputs: Tensor, batch: Batch, normaliser: Normaliser | None
) -> Tensor:
    """Return the weight of each target of a categorical likelihood, ``(n, ...)``.

    A target's weight is what the loss divides by for it alone: 0 where it is ignored,
    its class weight where there are any. Without a normaliser each example
    counts 1, spread over its targets.

    Raises:
        UsageError: If the weights of single targets do not add up to what the loss
            of the batch is divided by, so that they cannot be distinguished.
    """
    targets = batch[1]
    shape = outputs.shape[:1] + outputs.shape[2:]
    total = normaliser_value(batch, normaliser)
    weights = outputs.new_zeros(shape)
    if not _are_classes(targets, shape):
        return weights + total / weights.numel()
    if normaliser is None:
        return weights + count_examples(batch) / weights.numel()
    for value in torch.unique(targets):
        single = value.reshape([1] * targets.ndim)
        weight = normaliser_value((batch[0], single), normaliser)
        weights = weights.where(targets != value, weight)
    if not abs(float(weights.sum()) - total) <= 1e-4 * total:
        raise UsageError(
            "a Fisher matrix needs a normaliser that adds up over targets, got "
            f"{float(weights.sum()):.6g} from single targets and {total:.6g} from a "
            "batch; use GGNOperator, which needs no weights."
        )
    return weights


def sampled_classes(
    probabilities: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Return classes drawn from each distribution on axis 1, ``(samples, n, ...)``.

    The uniform numbers behind them do not depend on the device or the probabilities.
    """
    rows = probabilities.movedim(1, -1)
    uniform = torch.rand(
        (num_samples, *rows.shape[:-1]), generator=generator, device=generator.device
    ).to(rows.device, rows.dtype)
    below = rows.cumsum(-1)[..., :-1] <= uniform.unsqueeze(-1)
    return below.sum(-1)


def observed_classes(outputs: Tensor, targets: Any) -> Tensor:
    """Return the observed distributions on axis 1: one-hot, or as they are given.

    Raises:
        UsageError: If targets are neither classes nor probabilities of the outputs.
    """
    if _are_classes(targets, outputs.shape[:1] + outputs.shape[2:]):
        classes = targets.clamp(0, outputs.shape[1] - 1)  # ignored: weight 0
        return one_hot(classes, outputs)
    return same_shape(outputs, targets)


def one_hot(classes: Tensor, like: Tensor) -> Tensor:
    """Return indicators of ``classes`` with the class axis where ``like`` has it."""
    spread = functional.one_hot(classes, like.shape[1]).to(like.dtype)
    return spread.movedim(-1, classes.ndim - like.ndim + 2)


def same_shape(outputs: Tensor, targets: Any) -> Tensor:
    """Return targets that are values of the outputs themselves.

    Raises:
        UsageError: If they are of another shape.
    """
    if isinstance(targets, Tensor) and targets.shape == outputs.shape:
        return targets.to(outputs.dtype)
    shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets)
    raise UsageError(
        "the empirical Fisher matrix needs targets of the likelihood, classes "
        f"(n, ...) or values of the shape of the outputs {tuple(outputs.shape)}, got "
        f"{shape}; use GradientCovarianceOperator(centred=False) for another loss."
    )


def _are_classes(targets: Any, shape: torch.Size) -> bool:
    return (
        isinstance(targets, Tensor)
        and not targets.is_floating_point()
        and targets.shape == shape
    )

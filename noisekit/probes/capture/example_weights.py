"""What each example counts in a loss's mean: class weights, ignored targets, its own.

A loss that weighs its targets averages over fewer effective examples,
``n_eff = 1 / sum w_i²``, than the batch has.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from noisekit.core.errors import NormaliserError
from noisekit.core.known_losses import known_loss

# Takes a batch's targets, in whatever form the loader gives them.
ExampleWeights = Callable[[Any], Tensor]


def example_weights(
    given: ExampleWeights | None, loss_fn: object, targets: Any, num_examples: int
) -> Tensor | None:
    """Return what each example counts, ``(n,)``; ``None`` where all count alike.

    Args:
        given: The user's own function of the targets.
        loss_fn: PyTorch's cross-entropies are known: an example counts the sum of
            the class weights of its targets that are not ignored.
        targets: Of one micro-batch.
        num_examples: Its examples.

    Raises:
        NormaliserError: If ``given`` does not return one number per example.
    """
    if given is not None:
        return per_example("example_weights", given(targets), num_examples)
    weights = target_weights(loss_fn, targets)
    if weights is None or weights.numel() % num_examples:
        return None
    return weights.reshape(num_examples, -1).sum(1)


def per_example(name: str, values: object, num_examples: int) -> Tensor:
    """Return what a user's function of the targets gave, in float64.

    Raises:
        NormaliserError: If it is not one number per example.
    """
    if not isinstance(values, Tensor) or values.shape != (num_examples,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else values
        raise NormaliserError(
            f"{name} needs to return a tensor of shape ({num_examples},), one number "
            f"per example, got {shape}."
        )
    return values.detach().double()


def target_weights(loss_fn: object, targets: Any) -> Tensor | None:
    """Return what each target counts in a known loss's mean; ``None`` of others."""
    known = known_loss(loss_fn)
    weights = None if known is None else known.target_weights(targets)
    return None if weights is None else weights.double()


def tells_targets(loss_fn: object) -> bool:
    """Whether a loss is one of those whose counting of targets is known."""
    known = known_loss(loss_fn)
    return known is not None and known.kind == "classes"

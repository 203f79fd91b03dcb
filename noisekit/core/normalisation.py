"""What a loss divides by, and the check that it really does."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from torch import Tensor

from noisekit.core.arguments import call_given
from noisekit.core.batches import Batch, count_examples
from noisekit.core.covering_examples import CoveringExamples
from noisekit.core.errors import NormaliserError
from noisekit.core.known_losses import known_loss

Reduction = Literal["mean", "sum"]
# Takes a batch's targets, in whatever form the loader gives them.
Normaliser = Callable[[Any], Tensor | float]


def known_normaliser(loss_fn: object) -> Normaliser | None:
    """Return what a loss of PyTorch divides by, or ``None`` for other losses."""
    known = known_loss(loss_fn)
    return None if known is None else known.divisor


def normaliser_values(
    batches: Iterable[Batch], normaliser: Normaliser | None
) -> list[float]:
    """Return what each batch's loss is divided by: its examples by default.

    Raises:
        NormaliserError: If a value is negative or not finite, or all are zero.
    """
    values = [normaliser_value(batch, normaliser) for batch in batches]
    if sum(values) <= 0:
        raise NormaliserError(
            "normaliser needs to be positive for at least one batch, got zero for all "
            f"{len(values)}; are all targets ignored?"
        )
    return values


def normaliser_value(batch: Batch, normaliser: Normaliser | None) -> float:
    """Return what the loss of ``batch`` is divided by.

    Raises:
        NormaliserError: If it is negative or not finite.
    """
    if normaliser is None:
        return float(count_examples(batch))
    value = call_given(
        "normaliser",
        lambda targets: float(normaliser(targets)),
        batch[1],
        takes="a batch's targets and returns a number",
    )
    if not 0.0 <= value < float("inf"):
        raise NormaliserError(
            f"normaliser needs to return a finite number of at least 0, got {value}; "
            "it is called with the targets of one batch and counts what its loss is "
            "divided by."
        )
    return value


def divisors_of(
    batches: Iterable[Batch], normaliser: Normaliser | None, covering: CoveringExamples
) -> list[float]:
    """Return what each batch's loss is divided by, and collect the covering examples.

    Raises:
        NormaliserError: If a value is negative or not finite, or all are zero.
    """

    def noted() -> Iterator[Batch]:
        for batch in batches:
            covering.add(batch)
            yield batch

    return normaliser_values(noted(), normaliser)

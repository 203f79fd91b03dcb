"""What a loss divides by, and the check that it really does."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.batches import Batch, count_examples, take_examples, tensors_in
from noisekit.core.data import HeldBatches, StreamedBatches
from noisekit.core.errors import NormaliserError, UsageError

Reduction = Literal["mean", "sum"]
# Takes a batch's targets, in whatever form the loader gives them.
Normaliser = Callable[[Any], Tensor | float]

_PROBE_EXAMPLES = 64
_ELEMENTWISE_MODULES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
)
_ELEMENTWISE_FUNCTIONS: tuple[object, ...] = (
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
)


def known_normaliser(loss_fn: object) -> Normaliser | None:
    """Return what a loss of PyTorch divides by, or ``None`` for other losses.

    Cross-entropy divides by the targets that are not ignored, each counted with its
    class weight; losses over elements divide by the number of elements.
    """
    if isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss):
        weight, ignored = loss_fn.weight, loss_fn.ignore_index
        return lambda targets: _class_weight_sum(targets, weight, ignored)
    if loss_fn is functional.cross_entropy or loss_fn is functional.nll_loss:
        return lambda targets: _class_weight_sum(targets, None, -100)
    if isinstance(loss_fn, _ELEMENTWISE_MODULES):
        return lambda targets: float(targets.numel())
    if any(loss_fn is function for function in _ELEMENTWISE_FUNCTIONS):
        return lambda targets: float(targets.numel())
    return None


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
    value = float(normaliser(batch[1]))
    if not 0.0 <= value < float("inf"):
        raise NormaliserError(
            f"normaliser needs to return a finite number of at least 0, got {value}; "
            "it is called with the targets of one batch and counts what its loss is "
            "divided by."
        )
    return value


def check_targets_alike(batches: Iterable[Batch]) -> None:
    """Refuse a loss of unknown divisor on batches of differing target lengths.

    Raises:
        NormaliserError: If some batches have more targets per example than others.
    """
    counts = set()
    for batch in batches:
        elements = sum(t.numel() for t in tensors_in(batch[1]))
        counts.add(elements / max(count_examples(batch), 1))
    if len(counts) > 1:
        raise NormaliserError(
            "a loss of your own needs normaliser= where batches differ in targets per "
            f"example, got {min(counts):g} to {max(counts):g}; pass normaliser=lambda "
            "targets: ... with the number that the loss divides by, such as the "
            "non-padding tokens."
        )


def checked_reduction(
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    normaliser: Normaliser | None,
    declared: str | None,
    separable: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Reduction:
    """Return whether a loss is a mean or a sum, and check what it is divided by.

    A batch given twice leaves a mean as it is and doubles a sum. The parts of a
    split batch add up to the whole only with the right normaliser; examples are
    sorted by target before the split, since ignored and weighted classes show best
    where the two parts differ in them.

    Args:
        loss_of: The loss of a batch.
        batches: Where to check.
        normaliser: What the loss is thought to be divided by.
        declared: The loss's own ``reduction``, for where losses are zero.
        separable: Whether an example's outputs do not depend on the others.
        dtype: Type of the model's parameters, which rounds as the data's do.

    Raises:
        NormaliserError: If the loss is neither, or divides by something else.
        UsageError: If two evaluations of the same batch differ.
    """
    found: set[Reduction] = set()
    for batch in batches:
        probe = _probe(batch)
        try:
            whole, twice = _whole_and_twice(loss_of, probe)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, UsageError):
                raise
            raise NormaliserError(
                "the check of the loss needs to evaluate parts and repeats of a "
                f"batch, got {type(error).__name__}: {error}; if examples cannot be "
                "taken apart, pass normaliser= and check=False."
            ) from error
        if whole == 0.0 or not abs(whole) < float("inf"):
            continue
        tolerance = _tolerance(probe, dtype)
        reduction = _reduction_from(twice / whole, tolerance)
        if separable:
            _check_split(loss_of, probe, whole, normaliser, reduction, tolerance)
        found.add(reduction)
    if len(found) > 1:
        raise NormaliserError(
            "the loss needs one reduction, got a mean on one batch and a sum on "
            "another; pass normaliser= and check=False if that is meant."
        )
    if found:
        return found.pop()
    return "sum" if declared == "sum" else "mean"


def telling_batches(
    batches: HeldBatches | StreamedBatches, normaliser: Normaliser | None
) -> list[Batch]:
    """Return the batches on which to check what the loss divides by.

    Raises:
        NormaliserError: If targets per example differ and no normaliser counts them.
    """
    if not isinstance(batches, HeldBatches):
        return [next(iter(batches))]
    if normaliser is None:
        check_targets_alike(batches)
    return most_telling(batches)


def most_telling(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first batch, the last, and the one of the lowest class, often -100."""
    lowest = [
        min((int(t.min()) for t in _class_tensors(batch)), default=0)
        for batch in batches
    ]
    chosen = {0, len(batches) - 1, lowest.index(min(lowest))}
    return [batches[i] for i in sorted(chosen)]


def _class_weight_sum(
    targets: Tensor, weight: Tensor | None, ignored: int
) -> Tensor | float:
    if targets.is_floating_point():  # class probabilities: weights do not divide
        return targets.numel() / targets.shape[min(1, targets.ndim - 1)]
    counted = targets != ignored
    if weight is None:
        return counted.sum()
    weights = weight.to(targets.device)[targets.where(counted, 0)]
    return (weights * counted).sum(dtype=torch.float64)


def _class_tensors(batch: Batch) -> list[Tensor]:
    return [t for t in tensors_in(batch[1]) if t.numel() and not t.is_floating_point()]


def _probe(batch: Batch) -> Batch:
    """A few examples of ``batch``, sorted by target where targets are classes."""
    count = count_examples(batch)
    order = torch.arange(count)
    targets = next((t for t in tensors_in(batch[1]) if t.ndim), None)
    if targets is not None and targets.shape[0] % count == 0:
        keys = targets.detach().reshape(count, -1).double().mean(1).cpu()
        order = keys.argsort(stable=True)
    spread = torch.linspace(0, count - 1, min(count, _PROBE_EXAMPLES)).round().long()
    return take_examples(batch, order[spread])


def _whole_and_twice(
    loss_of: Callable[[Batch], Tensor], probe: Batch
) -> tuple[float, float]:
    index = torch.arange(count_examples(probe))
    whole, again = loss_of(probe), loss_of(probe)
    if not torch.equal(whole.nan_to_num(), again.nan_to_num()):
        raise UsageError(
            "a measurement needs the same loss for the same data, got "
            f"{float(whole):.8g} and then {float(again):.8g} in evaluation mode; does "
            "the model or the loss draw random numbers, such as functional dropout "
            "without training=self.training? Switch that off."
        )
    return float(whole), float(loss_of(take_examples(probe, torch.cat([index, index]))))


def _reduction_from(ratio: float, tolerance: float) -> Reduction:
    if abs(ratio - 1) <= tolerance:
        return "mean"
    if abs(ratio - 2) <= 2 * tolerance:
        return "sum"
    raise NormaliserError(
        "the loss needs to be a mean or a sum over examples, got "
        f"{ratio:.6g} times the loss for a batch given twice (a mean gives 1, a sum "
        "2); if it is meant so, pass normaliser= and check=False."
    )


def _check_split(
    loss_of: Callable[[Batch], Tensor],
    probe: Batch,
    whole: float,
    normaliser: Normaliser | None,
    reduction: Reduction,
    tolerance: float,
) -> None:
    """Compare the parts with the whole, cut in the middle and after the first."""
    index = torch.arange(count_examples(probe))
    for cut in {1, len(index) // 2} - {0, len(index)}:
        parts = [take_examples(probe, part) for part in (index[:cut], index[cut:])]
        counts = [normaliser_value(part, normaliser) for part in parts]
        kept = [(c, p) for c, p in zip(counts, parts, strict=True) if c > 0]
        losses = [(c, float(loss_of(part))) for c, part in kept]
        if reduction == "mean":
            got = sum(c * value for c, value in losses) / sum(counts)
        else:
            got = sum(value for _, value in losses)
        scale = max(abs(whole), *(abs(value) for _, value in losses))
        if not abs(got - whole) <= tolerance * scale:
            raise NormaliserError(_split_text(got, whole, normaliser is None))


def _split_text(got: float, whole: float, by_default: bool) -> str:
    what = "its number of examples" if by_default else "the normaliser"
    return (
        f"the loss needs to be divided by {what} for batches to be combined, got "
        f"{got:.8g} from two parts of a batch and {whole:.8g} from the whole; a loss "
        "that ignores or weights targets needs normaliser=lambda targets: (what it "
        "divides by); one that couples examples needs normaliser= and check=False."
    )


def _tolerance(probe: Batch, dtype: torch.dtype) -> float:
    """Rounding to expect, by the coarsest floating type of data and parameters."""
    dtypes = [t.dtype for t in tensors_in(probe) if t.is_floating_point()]
    coarsest = max((torch.finfo(d).eps for d in dtypes), default=2**-23)
    coarsest = max(coarsest, torch.finfo(dtype).eps)
    return {2**-52: 1e-9, 2**-23: 1e-4}.get(coarsest, 3e-2)

"""The check of what a loss divides by, on parts, repeats and unions of batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from noisekit.core.batches import Batch, count_examples, take_examples, tensors_in
from noisekit.core.covering_examples import CoveringExamples
from noisekit.core.data import HeldBatches, StreamedBatches
from noisekit.core.errors import NoisekitError, NormaliserError, UsageError
from noisekit.core.normalisation import (
    Normaliser,
    Reduction,
    divisors_of,
    normaliser_value,
)

_PROBE_EXAMPLES = 64
_HALF = (torch.float16, torch.bfloat16)
_BY_HAND = (
    "build nk.EmpiricalRisk(model, loss_fn, batches, normaliser=..., check=False) and "
    "pass it in place of the three"
)


class NotSeparableError(Exception):
    """A model or a loss cannot be evaluated on parts or repeats of a batch."""


@dataclass(frozen=True, slots=True)
class DivisorCheck:
    r"""The check that :math:`\sum_b c_b L_b / \sum_b c_b` does not depend on batching.

    A batch given twice leaves a mean as it is and doubles a sum. The parts of a
    split batch add up to the whole only with the right normaliser; examples are
    sorted by target before the split, since ignored and weighted classes show best
    where the two parts differ in them.

    Attributes:
        loss_of: The loss of a batch.
        normaliser: What the loss is thought to be divided by; ``None`` for examples.
        separable: Whether an example's outputs do not depend on the others.
        dtype: Coarsest type of the model's tensors, which rounds as the data's do.
    """

    loss_of: Callable[[Batch], Tensor]
    normaliser: Normaliser | None
    separable: bool = True
    dtype: torch.dtype = torch.float64

    def reduction(
        self, batches: Iterable[Batch], covering: CoveringExamples, declared: object
    ) -> Reduction:
        """Return whether the loss is a mean or a sum, once the check has passed.

        Args:
            batches: Where to check within batches.
            covering: Examples of all batches, to check between them.
            declared: The loss's own ``reduction``, for where losses are zero.

        Raises:
            NotSeparableError: If no part or repeat of a batch can be evaluated.
            NormaliserError: If the loss is neither, or divides by something else.
            UsageError: If two evaluations of the same batch differ, or the model
                cannot be evaluated on its data or in their precision.
        """
        batches = list(batches)
        reduction = self._reduction(batches, covering, declared)
        self._check_precision(_probe(batches[0]))
        return reduction

    def _reduction(
        self, batches: Sequence[Batch], covering: CoveringExamples, declared: object
    ) -> Reduction:
        result: set[Reduction] = set()
        for batch in batches:
            probe = _probe(batch)
            try:
                reduction = self._reduction_of(probe)
            except NoisekitError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                self._check_evaluates(batch)
                raise NotSeparableError(f"{type(error).__name__}: {error}") from error
            if reduction is not None:
                result.add(reduction)
        if len(result) > 1:
            raise NormaliserError(
                "the loss needs one reduction, got a mean on one batch and a sum on "
                f"another; if that is meant, {_BY_HAND}."
            )
        reduction = result.pop() if result else ("sum" if declared == "sum" else "mean")
        if self.separable:
            self._check_joined(covering, reduction)
        return reduction

    def _reduction_of(self, probe: Batch) -> Reduction | None:
        """The reduction on one batch; ``None`` where its loss is zero or no number."""
        index = torch.arange(count_examples(probe))
        whole = self._repeatable_loss(probe)
        twice = float(self.loss_of(take_examples(probe, torch.cat([index, index]))))
        if whole == 0.0 or not abs(whole) < float("inf"):
            return None
        tolerance = _tolerance(probe, self.dtype)
        reduction = _reduction_from(twice / whole, tolerance)
        if self.separable:
            for cut in {1, len(index) // 2} - {0, len(index)}:
                self._check_cut(probe, cut, whole, reduction)
        return reduction

    def _repeatable_loss(self, probe: Batch) -> float:
        whole, again = self.loss_of(probe), self.loss_of(probe)
        if not torch.equal(whole.nan_to_num(), again.nan_to_num()):
            raise UsageError(
                "a measurement needs the same loss for the same data, got "
                f"{float(whole):.8g} and then {float(again):.8g} in evaluation mode; "
                "does the model or the loss draw random numbers, such as functional "
                "dropout without training=self.training? Switch that off."
            )
        return float(whole)

    def _check_joined(self, covering: CoveringExamples, reduction: Reduction) -> None:
        """Compare examples of several batches with their union."""
        for joined, cuts in covering.joined():
            try:
                whole = float(self.loss_of(joined))
                if whole != 0.0 and abs(whole) < float("inf"):
                    for cut in cuts:
                        self._check_cut(joined, cut, whole, reduction)
            except NoisekitError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue  # examples of different batches do not go together

    def _check_cut(
        self, probe: Batch, cut: int, whole: float, reduction: Reduction
    ) -> None:
        """Compare the two parts of a batch with the whole."""
        index = torch.arange(count_examples(probe))
        parts = [take_examples(probe, part) for part in (index[:cut], index[cut:])]
        counts = [normaliser_value(part, self.normaliser) for part in parts]
        kept = [(c, p) for c, p in zip(counts, parts, strict=True) if c > 0]
        losses = [(c, float(self.loss_of(part))) for c, part in kept]
        if reduction == "mean":
            got = sum(c * value for c, value in losses) / sum(counts)
        else:
            got = sum(value for _, value in losses)
        scale = max(abs(whole), *(abs(value) for _, value in losses))
        if not abs(got - whole) <= _tolerance(probe, self.dtype) * scale:
            raise NormaliserError(_split_text(got, whole, self.normaliser is None))

    def _check_evaluates(self, batch: Batch) -> None:
        """Say so if the model cannot even be evaluated on a batch as it is.

        Raises:
            UsageError: With the error of the model or of the loss.
        """
        try:
            self.loss_of(batch)
        except NoisekitError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            types = {t.dtype for t in tensors_in(batch) if t.is_floating_point()}
            named = ", ".join(sorted(map(str, types))) or "no floating-point data"
            hint = "call it as model(inputs) by hand to see why."
            if types - {self.dtype}:
                hint = f"convert the data, as by x.to({self.dtype})."
            raise UsageError(
                "a measurement needs a model and a loss that take the batches as they "
                f"are, got {type(error).__name__}: {error} (parameters of "
                f"{self.dtype}, data of {named}); {hint}"
            ) from error

    def _check_precision(self, batch: Batch) -> None:
        """Say so if the model rounds more than its parameters do.

        Raises:
            UsageError: If an operation of the model is computed in half precision.
        """
        data = {t.dtype for t in tensors_in(batch)}
        if self.dtype in _HALF or data & set(_HALF):
            return
        with _PrecisionSpy() as spy:  # type: ignore[no-untyped-call]
            self.loss_of(batch)
        if spy.half is not None:
            raise UsageError(
                f"a measurement needs a model computed in the {self.dtype} of its "
                f"parameters, got one that casts to {spy.half} in its forward pass "
                "(torch.autocast?), where derivatives are lost in rounding; leave the "
                "cast out, since autocast around the training step is not measured, "
                f"or else {_BY_HAND}."
            )


@dataclass(frozen=True, slots=True)
class Divisor:
    """What a loss divides by on some data.

    Attributes:
        normaliser: What gives it from the targets; ``None`` counts examples.
        values: That of each batch.
        reduction: Whether the loss is a mean or a sum.
        checked: Whether that was checked, on parts and repeats of batches.
    """

    normaliser: Normaliser | None
    values: list[float]
    reduction: Reduction
    checked: bool


def established(
    loss_of: Callable[[Batch], Tensor],
    batches: HeldBatches | StreamedBatches,
    candidates: Sequence[Normaliser | None],
    *,
    declared: object,
    separable: bool,
    dtype: torch.dtype,
    check: bool,
) -> Divisor:
    """Return the first of the candidates that passes the check.

    Args:
        loss_of: The loss of a batch.
        batches: All data.
        candidates: What the loss may be divided by.
        declared: The loss's own ``reduction``.
        separable: Whether an example's outputs do not depend on the others.
        dtype: Coarsest type of the model's tensors.
        check: Whether to check; else the first is taken.

    Raises:
        NormaliserError: As of the first, if none passes.
        UsageError: If the model cannot be measured on the data.
    """
    stated: Reduction = "sum" if declared == "sum" else "mean"
    refusals: list[NormaliserError] = []
    for normaliser in candidates:
        covering = CoveringExamples()
        try:
            values = divisors_of(batches, normaliser, covering)
            if not check:
                return Divisor(normaliser, values, stated, False)
            chosen = batches_to_check(batches, normaliser)
            divisor = DivisorCheck(loss_of, normaliser, separable, dtype)
            reduction = divisor.reduction(chosen, covering, declared)
            return Divisor(normaliser, values, reduction, True)
        except NormaliserError as error:
            refusals.append(error)
        except NotSeparableError as error:
            if normaliser is not None:  # each batch counts as a whole
                return Divisor(normaliser, values, stated, False)
            raise NormaliserError(
                "a loss of your own needs normaliser= where a batch cannot be taken "
                f"apart, got {error}; pass normaliser=lambda targets: (what the loss "
                "divides by), so that each batch is measured as a whole."
            ) from error
    raise refusals[0]


class _PrecisionSpy(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operation gives half-precision numbers."""

    half: torch.dtype | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.dtype in _HALF:
                self.half = leaf.dtype
        return outputs


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


def extreme_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first batch, the last, and the one of the lowest class, often -100."""
    lowest = [
        min((int(t.min()) for t in _class_tensors(batch)), default=0)
        for batch in batches
    ]
    chosen = {0, len(batches) - 1, lowest.index(min(lowest))}
    return [batches[i] for i in sorted(chosen)]


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


def _reduction_from(ratio: float, tolerance: float) -> Reduction:
    if abs(ratio - 1) <= tolerance:
        return "mean"
    if abs(ratio - 2) <= 2 * tolerance:
        return "sum"
    raise NormaliserError(
        "the loss needs to be a mean or a sum over examples, got "
        f"{ratio:.6g} times the loss for a batch given twice (a mean gives 1, a sum "
        f"2); if it is meant so, {_BY_HAND}."
    )


def _split_text(got: float, whole: float, by_default: bool) -> str:
    what = "its number of examples" if by_default else "the normaliser"
    return (
        f"the loss needs to be divided by {what} for batches to be combined, got "
        f"{got:.8g} from two parts of a batch and {whole:.8g} from the whole; a loss "
        "that ignores or weights targets needs normaliser=lambda targets: (what it "
        "divides by); where a batch's examples act on each other, in the loss or in "
        f"the model, {_BY_HAND}."
    )


def _tolerance(probe: Batch, dtype: torch.dtype) -> float:
    """Rounding to expect, by the coarsest floating type of data and parameters."""
    dtypes = [t.dtype for t in tensors_in(probe) if t.is_floating_point()]
    coarsest = max((torch.finfo(d).eps for d in dtypes), default=2**-23)
    coarsest = max(coarsest, torch.finfo(dtype).eps)
    return {2**-52: 1e-9, 2**-23: 1e-4}.get(coarsest, 3e-2)


def batches_to_check(
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
    return extreme_batches(batches)

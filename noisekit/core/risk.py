"""The empirical risk: one model, one loss, all batches, weighted as they must be."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch, count_examples, tensors_in
from noisekit.core.errors import (
    BatchSizeError,
    DataChangedError,
    DeviceMismatchError,
    LossShapeError,
)
from noisekit.core.frozen import (
    MEMORY_BUDGET,
    FrozenBatches,
    StreamedBatches,
    freeze,
    read_batches,
)
from noisekit.core.mode import (
    BatchNormPolicy,
    batch_norms,
    call_model,
    check_policy,
    evaluation_mode,
    recalibrated,
    unwrap_compiled,
)
from noisekit.core.normalisers import (
    Normaliser,
    Reduction,
    check_targets_alike,
    checked_reduction,
    known_normaliser,
    most_telling,
    normaliser_value,
    normaliser_values,
)
from noisekit.core.params import (
    ParameterPatterns,
    flatten,
    layout_of,
    select_parameters,
)

__all__ = [
    "MEMORY_BUDGET",
    "Batch",
    "BatchNormPolicy",
    "EmpiricalRisk",
    "FrozenBatches",
    "LossFn",
    "Normaliser",
    "RiskValue",
    "call_model",
    "freeze",
    "unwrap_compiled",
]

# Outputs and targets are whatever the model returns and the loader gives.
LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True)
class RiskValue:
    """The risk at one point.

    Attributes:
        loss: ``F`` [loss].
        error: Share of examples that are misclassified, where outputs are
            ``(n, classes)`` and targets are classes ``(n,)``; else ``None``.
    """

    loss: float
    error: float | None


class EmpiricalRisk:
    r"""A model's loss over all batches, as a function of chosen parameters.

    .. math:: F(w) = \sum_b c_b L_b(w) / \sum_b c_b \quad\text{(mean losses)}, \qquad
              F(w) = \sum_b L_b(w) / \sum_b c_b \quad\text{(sum losses)}

    ``L_b`` is what the loss returns for a batch and ``c_b`` what it divides by:
    examples, or for PyTorch's own losses the targets that count with their class
    weights, or what ``normaliser`` says. Which holds is checked once.

    Every method leaves the model as it was: modes, buffers, ``.grad``,
    ``requires_grad`` and random state, bit for bit, also after an exception.

    Attributes:
        model: The model, without the wrapper of ``torch.compile``.
        layout: How the chosen parameters lie in a flat vector.
        parameters: The chosen parameters.
        batches: The data: frozen in memory, or read again where too large.
        normalisers: ``c_b`` of each batch.
        num_examples: Examples over all batches.
        reduction: ``"mean"`` or ``"sum"``, as found by the check.
        checked: Whether that was checked, on parts and repeats of a batch.
        bn: The BatchNorm policy.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Batch],
        *,
        bn: BatchNormPolicy = "running",
        normaliser: Normaliser | None = None,
        params: ParameterPatterns = None,
        memory_budget: int = MEMORY_BUDGET,
        check: bool = True,
    ) -> None:
        """Read the data and check that they, the loss and the model fit together.

        Args:
            model: Evaluated without dropout, whatever its mode.
            loss_fn: Called with outputs and targets; returns a scalar.
            batches: Yields ``(inputs, targets)``; inputs may be a tensor, a tuple or
                a mapping of arguments.
            bn: ``"running"`` uses BatchNorm's statistics as they are,
                ``"recalibrated"`` those of the data at the present weights,
                ``"batch"`` each batch's own.
            normaliser: What the loss of a batch is divided by, given its targets.
            params: Names or patterns of the parameters to measure; all by default.
            memory_budget: Most memory for the data [bytes]; larger data are read
                again on each pass and compared.
            check: Whether to check the normaliser and that the loss is not random.

        Raises:
            EmptyDataError: If there is no example.
            NoParametersError: If there is nothing to differentiate.
            LossShapeError: If the loss is not one floating-point number.
            NormaliserError: If the loss is not divided by what is assumed.
            DeviceMismatchError: If model and data are on different devices.
            DataChangedError: If the data cannot be read again but would have to be.
            UsageError: If ``bn`` or ``batches`` are not as described, or the loss
                is random.
        """
        self.model = unwrap_compiled(model)
        self.loss_fn = loss_fn
        self.bn: BatchNormPolicy = bn
        check_policy(self.model, bn)
        named = select_parameters(self.model, params)
        self.layout = layout_of(named)
        self.parameters = tuple(named.values())
        self._normaliser = normaliser or known_normaliser(loss_fn)
        self._depth = 0
        self.batches = self._read(batches, memory_budget)
        self.normalisers = normaliser_values(self.batches, self._normaliser)
        self._total = sum(self.normalisers)
        self.num_examples = self.batches.num_examples
        self.num_batches = len(self.normalisers)
        declared = getattr(loss_fn, "reduction", None)
        self.reduction: Reduction = "sum" if declared == "sum" else "mean"
        self.checked = check
        if check:
            self.reduction = self._check(declared)

    @property
    def data_hash(self) -> str:
        """Hash of the examples; their order and batching do not change it."""
        return self.batches.data_hash()

    def vector(self) -> Tensor:
        """Return a copy of the chosen parameters as one flat vector."""
        return flatten(p.detach() for p in self.parameters)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hold the model as it is measured; on exit everything is given back.

        May be nested; the outermost decides. With ``bn="recalibrated"`` statistics
        are those of the weights at entry.
        """
        if self._depth:
            yield
            return
        self._depth += 1
        try:
            with ExitStack() as stack:
                stack.enter_context(evaluation_mode(self.model, self.bn))
                if self.bn == "recalibrated":
                    batches = (batch for _, batch in self.weighted_batches())
                    stack.enter_context(recalibrated(self.model, batches))
                yield
        finally:
            self._depth -= 1

    @contextmanager
    def at(self, vector: Tensor | None) -> Iterator[None]:
        """Hold the model as measured, with its chosen parameters at ``vector``.

        The parameters' own memory is set aside, not overwritten, so that they come
        back without rounding. ``None`` leaves them where they are.

        Raises:
            UsageError: If ``vector`` has the wrong length.
        """
        if vector is None:
            with self.evaluating():
                yield
            return
        parts = self.layout.split(vector.detach())
        own = [p.data for p in self.parameters]
        try:
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.data = part.to(parameter.device, parameter.dtype)
            with self.evaluating():
                yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data

    def batch_losses(self) -> Iterator[tuple[float, Tensor]]:
        """Yield each batch's weight and loss; ``F`` is the sum of their products.

        To be used inside ``evaluating()``. A batch whose targets are all ignored is
        left out, since a mean over nothing is not a number.

        Raises:
            LossShapeError: If a loss is not one floating-point number.
            DeviceMismatchError: If a batch is on another device.
        """
        for weight, loss, _, _ in self._evaluated():
            yield weight, loss

    def weighted_batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield each batch with the factor of its loss in ``F``, those of 0 left out.

        Raises:
            DeviceMismatchError: If a batch is on another device.
        """
        frozen = isinstance(self.batches, FrozenBatches)
        for i, batch in enumerate(self.batches):
            if frozen:
                count = self.normalisers[i]
            else:
                # A shuffling loader puts other examples together on each pass.
                count = normaliser_value(batch, self._normaliser)
                self._check_batch(batch)
            if count > 0:
                factor = count if self.reduction == "mean" else 1.0
                yield factor / self._total, batch

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the loss of one batch, checked to be a scalar.

        Raises:
            LossShapeError: If it is not one floating-point number.
        """
        return self._outputs_and_loss(batch)[1]

    def value(self, vector: Tensor | None = None) -> float:
        """Return ``F`` at ``vector``, or at the present parameters [loss]."""
        return self.evaluate(vector, error=False).loss

    def evaluate(
        self, vector: Tensor | None = None, *, error: bool = True
    ) -> RiskValue:
        """Return ``F`` and, where it exists, the share of misclassified examples."""
        classified = error
        with self.at(vector), torch.no_grad():
            total, wrong, counted = (_zero(self.layout.device) for _ in range(3))
            for weight, loss, outputs, targets in self._evaluated():
                total += weight * loss.to(total.dtype)
                classified = classified and _is_classified(outputs, targets)
                if classified:
                    valid = targets >= 0  # negative classes mean "ignore"
                    counted += valid.sum()
                    wrong += (valid & (outputs.argmax(1) != targets)).sum()
        share = float(wrong / counted) if classified else None
        return RiskValue(float(total), share)

    def value_and_grad(self, vector: Tensor | None = None) -> tuple[float, Tensor]:
        """Return ``F`` and its flat gradient at ``vector``."""
        dtype = torch.promote_types(self.layout.dtype, torch.float32)
        with self.at(vector):
            total = _zero(self.layout.device)
            gradient = torch.zeros(
                self.layout.num_params, dtype=dtype, device=self.layout.device
            )
            for weight, loss in self.batch_losses():
                total += weight * loss.detach().to(total.dtype)
                gradient += weight * flatten(self.gradients(loss)).to(dtype)
        return float(total), gradient.to(self.layout.dtype)

    def gradients(
        self, loss: Tensor, *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the gradient of ``loss``, zero for parameters that it does not use."""
        if not loss.requires_grad:
            return tuple(torch.zeros_like(p) for p in self.parameters)
        return torch.autograd.grad(
            loss,
            self.parameters,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )

    def _evaluated(self) -> Iterator[tuple[float, Tensor, Any, Any]]:
        for weight, batch in self.weighted_batches():
            outputs, loss = self._outputs_and_loss(batch)
            yield weight, loss, outputs, batch[1]

    def _outputs_and_loss(self, batch: Batch) -> tuple[Any, Tensor]:
        inputs, targets = batch
        outputs = call_model(self.model, inputs)
        loss = self.loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            raise LossShapeError(
                f"loss_fn needs to return one floating-point number, got "
                f"{_describe(loss)}; reduce it with .mean() or .sum()."
            )
        return outputs, loss

    def _read(
        self, batches: Iterable[Batch], memory_budget: int
    ) -> FrozenBatches | StreamedBatches:
        frozen, complete = read_batches(batches, memory_budget=memory_budget)
        for batch in frozen:
            self._check_batch(batch)
        if complete:
            return frozen
        if isinstance(batches, Iterator):
            raise DataChangedError(
                "data beyond the memory budget need to be read more than once, got an "
                f"iterator ({type(batches).__name__}), which can be read once; pass "
                "the DataLoader itself, or a larger memory_budget=."
            )
        return StreamedBatches(batches, ordered=self.bn == "batch")

    def _check_batch(self, batch: Batch) -> None:
        coupled = self.bn != "running" and bool(batch_norms(self.model))
        if coupled and count_examples(batch) == 1:
            raise BatchSizeError(
                f"bn={self.bn!r} needs at least 2 examples in each batch, got a batch "
                "of 1, which has no variance; use another batch size, drop_last=True "
                "or bn='running'."
            )
        for tensor in tensors_in(batch):
            if tensor.ndim and tensor.device != self.layout.device:
                raise DeviceMismatchError(
                    f"model and data need one device, got parameters on "
                    f"{self.layout.device} and a batch on {tensor.device}; move the "
                    "model with .to(), or wrap the loader: [(x.to(device), "
                    "y.to(device)) for x, y in loader]."
                )

    def _check(self, declared: str | None) -> Reduction:
        if isinstance(self.batches, FrozenBatches):
            if self._normaliser is None:
                check_targets_alike(self.batches)
            probed = most_telling(self.batches)
        else:
            probed = [next(iter(self.batches))]
        norms = batch_norms(self.model)
        with evaluation_mode(self.model, "running"), torch.no_grad():
            return checked_reduction(
                self.loss_of,
                probed,
                normaliser=self._normaliser,
                declared=declared,
                separable=all(layer.running_mean is not None for layer in norms),
            )


def _zero(device: torch.device) -> Tensor:
    """Start of a sum, in double precision wherever the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros((), dtype=dtype, device=device)


def _is_classified(outputs: object, targets: object) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.ndim == 2
        and targets.ndim == 1
        and outputs.shape[0] == targets.shape[0]
        and outputs.shape[1] > 1
        and not targets.is_floating_point()
        and not targets.is_complex()
    )


def _describe(loss: object) -> str:
    if isinstance(loss, Tensor):
        return f"a tensor of shape {tuple(loss.shape)} and type {loss.dtype}"
    return f"a {type(loss).__name__}"

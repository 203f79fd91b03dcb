"""The empirical risk: one model, one loss, all batches, weighted as they must be."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch, ModelBatches
from noisekit.core.data import MEMORY_BUDGET, DataRules, HeldBatches
from noisekit.core.distributed import (
    Ranks,
    counts_over_ranks,
    hash_over_ranks,
    ranks_of,
    sum_over_ranks,
    unwrap_model,
)
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import (
    BatchNormPolicy,
    batch_norms,
    check_policy,
    recalibrated,
)
from noisekit.core.graph_check import check_followed
from noisekit.core.held_model import HeldModel
from noisekit.core.known_losses import (
    ModelLoss,
    declared_reduction,
    own_loss_normalisers,
)
from noisekit.core.normalisation import (
    Normaliser,
    Reduction,
    known_normaliser,
    normaliser_value,
    normaliser_values,
)
from noisekit.core.normalisation_check import established
from noisekit.core.params import (
    ParameterPatterns,
    flatten,
    layout_of,
    select_parameters,
)
from noisekit.core.precision import Precision, coarsest_dtype, is_narrower, widened
from noisekit.core.restorable import TensorContent
from noisekit.core.risk_arguments import check_arguments
from noisekit.core.risk_value import RiskSums, RiskValue, scalar_loss, zero
from noisekit.core.settings import Count

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Outputs and targets are whatever the model returns and the loader gives.
LossFn = Callable[[Any, Any], Tensor]


class EmpiricalRisk:
    r"""A model's loss over all batches, as a function of chosen parameters.

    .. math:: F(w) = \sum_b c_b L_b(w) / \sum_b c_b \quad\text{(mean losses)}, \qquad
              F(w) = \sum_b L_b(w) / \sum_b c_b \quad\text{(sum losses)}

    ``L_b`` is what the loss returns for a batch and ``c_b`` what it divides by:
    examples, or for PyTorch's own losses the targets that count with their class
    weights, or what ``normaliser`` returns. Which holds is checked once.

    Every method leaves the model as it was: modes, buffers, ``.grad``,
    ``requires_grad`` and random state, bit for bit, also after an exception.

    Attributes:
        model: The model, without the wrappers of ``torch.compile`` and of
            ``DistributedDataParallel``.
        layout: How the chosen parameters lie in a flat vector.
        parameters: The chosen parameters.
        batches: The data: frozen in memory, or read again where too large.
        normaliser: What gives ``c_b``; ``None`` counts examples.
        normalisers: ``c_b`` of each batch.
        total: Sum of ``c_b`` over all batches and processes.
        num_examples: Examples over all batches and processes.
        memory_budget: Most memory for what is computed, such as kept graphs [bytes].
        verified: Kinds of derivatives that were checked against differences.
        reduction: ``"mean"`` or ``"sum"``, as found by the check.
        checked: Whether that was checked, on parts and repeats of a batch.
        bn: The BatchNorm policy.
        ranks: The processes that hold a share of the data each.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> risk = nk.EmpiricalRisk(model, loss_fn, batches)
        >>> risk.value()
        2.5
        >>> loss, gradient = risk.value_and_grad()
        >>> gradient
        tensor([1., 4.])
        >>> round(float(nk.lambda_max(risk)), 4)  # the data are not read again
        4.0
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | Literal["model"],
        batches: Iterable[Any],  # pairs, or what a model with a loss of its own takes
        *,
        bn: BatchNormPolicy = "running",
        normaliser: Normaliser | None = None,
        params: ParameterPatterns = None,
        memory_budget: Count = MEMORY_BUDGET,
        check: bool = True,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        """Read the data and check that they, the loss and the model fit together.

        Args:
            model: Evaluated without dropout, whatever its mode.
            loss_fn: Called with outputs and targets; returns a scalar. ``"model"`` is
                for a model that takes whole batches and returns its loss.
            batches: Yields ``(inputs, targets)``; inputs may be a tensor, a tuple or
                a mapping of arguments, or what else the model takes as one.
            bn: ``"running"`` uses BatchNorm's statistics as they are,
                ``"recalibrated"`` those of the data at the present weights,
                ``"batch"`` each batch's own.
            normaliser: What the loss of a batch is divided by, given its targets.
            params: Names or patterns of the parameters to measure; all by default.
            memory_budget: Most memory for the data, and again for what is computed
                from them, such as kept graphs [bytes]; larger data are read again on
                each pass and compared.
            check: Whether to check the normaliser and that the loss is not random.
            process_group: Processes that each hold a share of the data and make every
                call; by default those of a model in ``DistributedDataParallel``.

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
        whole = loss_fn == "model"
        loss_fn = ModelLoss() if loss_fn == "model" else loss_fn
        check_arguments(model, loss_fn, batches)
        batches = ModelBatches(batches) if whole else batches
        candidates = [normaliser or known_normaliser(loss_fn)]
        if isinstance(loss_fn, ModelLoss) and normaliser is None:
            candidates = own_loss_normalisers()
        self.ranks = ranks_of(model if process_group is None else process_group)
        self.model = unwrap_model(model)
        self.loss_fn: LossFn = loss_fn
        self.bn: BatchNormPolicy = bn
        self.memory_budget = memory_budget
        check_policy(self.model, bn)
        named = select_parameters(self.model, params)
        self.layout = layout_of(named)
        self.parameters = tuple(named.values())
        # Both are shared with the risks derived from this one.
        self._held = HeldModel(self.model, bn, Precision())
        self.verified: set[str] = set()
        self._rules = DataRules.of(self.model, bn, self.layout.device)
        self.batches = self._rules.read(batches, memory_budget)
        self._followed = False
        self._establish(candidates, check)
        self.total, self.num_examples = counts_over_ranks(
            (sum(self.normalisers), self.batches.num_examples),
            self.ranks,
            self.layout.device,
        )
        self.num_batches = len(self.normalisers)

    def __repr__(self) -> str:
        """Name the model and the function of its parameters."""
        return (
            f"EmpiricalRisk({type(self.model).__name__}, {self.layout.num_params:,} "
            f"parameters, F = {self.function}, bn={self.bn!r})"
        )

    @property
    def function(self) -> str:
        """``F`` as text, such as "mean loss over 1,000 examples"."""
        over = f"{self.num_examples:,} examples"
        if self.total != self.num_examples:
            over = f"{self.total:,.10g} targets of {over}"
        if self.reduction == "mean":
            text = f"mean loss over {over}"
        else:
            text = f"sum of the losses over {over}, divided by {self.total:,.10g}"
        return text if self.checked else f"{text} (not checked)"

    @property
    def data_hash(self) -> str:
        """Hash of the examples; their order and batching do not change it."""
        return hash_over_ranks(self.batches.data_hash(), self.ranks, self.layout.device)

    def vector(self) -> Tensor:
        """Return a copy of the chosen parameters as one flat vector."""
        return flatten(widened(p.detach(), self.layout.dtype) for p in self.parameters)

    @property
    def leaves(self) -> tuple[nn.Parameter, ...]:
        """The parameters, or their wide copies, that derivatives are taken of."""
        return self._held.precision.leaves_of(self.parameters)

    @checked
    def restricted_to(self, params: ParameterPatterns) -> "EmpiricalRisk":
        """Return the same risk as a function of some of the model's parameters.

        Raises:
            NoParametersError: If a pattern matches none of the model's.
        """
        part = copy.copy(self)
        named = select_parameters(self.model, params)
        part._followed = False
        part.layout = layout_of(named, self._held.precision.dtype)
        part.parameters = tuple(named.values())
        return part

    @checked
    def in_precision(self, dtype: torch.dtype) -> "EmpiricalRisk":
        """Return the same risk, computed in ``dtype`` where the model is narrower.

        Copies replace narrower parameters and buffers then, and data
        are converted: the weights are the model's, only the arithmetic differs.
        """
        tensors = (*self.model.parameters(), *self.model.buffers())
        narrow = any(is_narrower(tensor, dtype) for tensor in tensors)
        if self._held.precision.dtype == dtype or not narrow:
            return self
        wide = copy.copy(self)
        wide._held = HeldModel(self.model, self.bn, Precision(dtype))
        named = dict(zip(self.layout.names, self.parameters, strict=True))
        wide.layout = layout_of(named, dtype)
        return wide

    def at_given_statistics(self, dtype: torch.dtype) -> "EmpiricalRisk":
        """Return the same risk in ``dtype``, with BatchNorm's statistics as they are.

        Nothing is recalibrated, for checks of derivatives, which hold at any of them.
        """
        fixed = copy.copy(self.in_precision(dtype))
        policy: BatchNormPolicy = "batch" if self.bn == "batch" else "running"
        fixed._held = HeldModel(self.model, policy, Precision(dtype))
        return fixed

    def on(self, batches: Iterable[Batch]) -> "EmpiricalRisk":
        """Return the risk over other batches, such as a part of this process's data.

        Within ``evaluating()`` the model stays held as it is, so that parts are
        measured with the BatchNorm statistics of the whole.

        Raises:
            NormaliserError: If no target of theirs counts.
        """
        part = copy.copy(self)
        part.batches = HeldBatches(batches)
        part.normalisers = normaliser_values(part.batches, self.normaliser)
        part.ranks = Ranks()
        part.total = sum(part.normalisers)
        part.num_examples = part.batches.num_examples
        part.num_batches = len(part.normalisers)
        return part

    def with_loss(self, loss_fn: LossFn) -> "EmpiricalRisk":
        """Return the risk of another loss, which divides by the same as this one's."""
        other = copy.copy(self)
        other.loss_fn, other._followed, other.verified = loss_fn, False, set()
        return other

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hold the model as it is measured; on exit everything is restored.

        May be nested; the outermost decides. With ``bn="recalibrated"`` statistics
        are those of the weights at entry.
        """
        with self.at(None):
            yield

    @contextmanager
    def model_converted(self) -> Iterator[None]:
        """Hold the model's tensors in the precision that is computed in, no more."""
        with self._held.precision.held(self.model, self.loss_fn):
            yield

    @checked
    @contextmanager
    def at(self, vector: Tensor | None) -> Iterator[None]:
        """Hold the model as measured, with its chosen parameters at ``vector``.

        The parameters' own memory is set aside, not overwritten, so that they come
        back without rounding. ``None`` leaves them where they are.

        Raises:
            UsageError: If ``vector`` has the wrong length.
        """
        moved: list[tuple[nn.Parameter, Tensor]] = []
        if vector is not None:
            parts = self.layout.split(vector.detach())
            moved = list(zip(self.parameters, parts, strict=True))
        with self._held.held(
            self.loss_fn, moved=moved, recalibrating=self._recalibrated
        ):
            yield

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Hold back hooks on the parameters, for derivatives of graphs that are kept.

        Within ``evaluating()`` that is so already.
        """
        contents = [TensorContent(parameter) for parameter in self.parameters]
        try:
            for content in contents:
                content.hold_hooks()
            yield
        finally:
            for content in contents:
                content.restore_hooks()

    @contextmanager
    def _recalibrated(self) -> Iterator[None]:
        if self._held.bn != "recalibrated":
            yield
            return
        batches = (batch for _, batch in self.weighted_batches())
        summed = partial(sum_over_ranks, ranks=self.ranks)
        with recalibrated(self.model, batches, summed):
            yield

    def batch_losses(self) -> Iterator[tuple[float, Tensor]]:
        """Yield each batch's weight and loss; ``F`` is the sum of their products.

        To be used inside ``evaluating()``. A batch whose targets are all ignored is
        left out, since a mean over nothing is not a number.

        Raises:
            LossShapeError: If a loss is not one floating-point number.
            DeviceMismatchError: If a batch is on another device.
        """
        yield from ((weight, loss) for weight, loss, _, _ in self._evaluated())

    def weighted_batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield each batch with the factor of its loss in ``F``, those of 0 left out.

        Raises:
            DeviceMismatchError: If a batch is on another device.
        """
        frozen = isinstance(self.batches, HeldBatches)
        for i, batch in enumerate(self.batches):
            if frozen:
                count = self.normalisers[i]
            else:
                # A shuffling loader puts other examples together on each pass.
                count = normaliser_value(batch, self.normaliser)
                self._rules.check(batch)
            if count > 0:
                factor = count if self.reduction == "mean" else 1.0
                yield factor / self.total, batch

    def share_of(self, weight: float, batch: Batch) -> float:
        """Return ``c_b`` over its sum, from the weight that the batch came with."""
        if self.reduction == "mean":
            return weight
        return normaliser_value(batch, self.normaliser) / self.total

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the loss of one batch, checked to be a scalar.

        Raises:
            LossShapeError: If it is not one floating-point number.
            UsageError: If gradients are on and autograd cannot follow the loss.
        """
        return self._outputs_and_loss(batch)[1]

    def check_followed(self, batch: Batch) -> None:
        """Refuse a loss that autograd cannot follow, once; within ``evaluating()``.

        Raises:
            UsageError: Naming the parameters that it depends on behind a cut.
        """
        if not self._followed:
            self.loss_of(batch)

    def _outputs_and_loss(self, batch: Batch) -> tuple[Any, Tensor]:
        follow = torch.is_grad_enabled()
        with torch.set_grad_enabled(follow or self._held.needs_graph):
            try:
                outputs = self.outputs_of(batch)
                loss = self.loss_at(outputs, batch[1])
            except RuntimeError:
                if torch.is_grad_enabled():
                    raise
                # Physics-informed models and losses differentiate by themselves.
                with torch.enable_grad():
                    outputs = self.outputs_of(batch)
                    loss = self.loss_at(outputs, batch[1])
                self._held.needs_graph = True
        if follow and not self._followed:
            self._followed = True  # first, since the check evaluates the loss too
            try:
                check_followed(self, batch, outputs, loss)
            except UsageError:  # as it is the next time
                self._followed = False
                raise
        return outputs, loss

    @checked
    def value(self, vector: Tensor | None = None) -> float:
        """Return ``F`` at ``vector``, or at the present parameters [loss]."""
        return self.evaluate(vector, error=False).loss

    @checked
    def evaluate(
        self, vector: Tensor | None = None, *, error: bool = True
    ) -> RiskValue:
        """Return ``F`` and, where it exists, the share of misclassified examples."""
        sums = RiskSums(self.layout.device, classified=error)
        with self.at(vector), torch.no_grad():
            for weight, loss, outputs, targets in self._evaluated():
                sums.add(loss, outputs, targets, weight=weight)
        return sums.over(self.ranks)

    @checked
    def value_and_grad(self, vector: Tensor | None = None) -> tuple[float, Tensor]:
        """Return ``F`` and its flat gradient at ``vector``."""
        dtype = torch.promote_types(self.layout.dtype, torch.float32)
        with self.at(vector):
            total = zero(self.layout.device)
            gradient = torch.zeros(
                self.layout.num_params, dtype=dtype, device=self.layout.device
            )
            for weight, loss in self.batch_losses():
                total += weight * loss.detach().to(total.dtype)
                gradient += weight * flatten(self.gradients(loss)).to(dtype)
        total = sum_over_ranks(total, self.ranks)
        gradient = sum_over_ranks(gradient, self.ranks)
        return float(total), gradient.to(self.layout.dtype)

    def gradients(
        self, loss: Tensor, *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the gradient of ``loss``, zero for parameters that it does not use."""
        if not loss.requires_grad:
            return tuple(torch.zeros_like(p) for p in self.leaves)
        return torch.autograd.grad(
            loss,
            self.leaves,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )

    @property
    def graphs_last(self) -> bool:
        """Whether a batch's graph stays valid when other batches are evaluated.

        Not where forward passes write to tensors of the model.
        """
        return not self._held.writes

    def outputs_of(
        self, batch: Batch, tensors: Mapping[str, Tensor] | None = None
    ) -> Any:
        """Return what the model returns for one batch; within ``evaluating()``.

        Args:
            batch: Whose inputs.
            tensors: Tensors in the place of the model's parameters and buffers of
                these names, as for ``torch.func.functional_call``.

        Raises:
            UsageError: If a forward pass writes to the measured parameters.
        """
        inputs = self.converted(batch[0])
        return self._held.outputs(inputs, constant=self.leaves, tensors=tensors)

    def converted(self, value: Any) -> Any:  # any nesting a loader yields
        """Return data in the precision that is computed in."""
        return self._held.precision.convert(value)

    def loss_at(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of outputs, checked to be a scalar.

        Raises:
            LossShapeError: If it is not one floating-point number.
        """
        return scalar_loss(self.loss_fn(outputs, self.converted(targets)))

    def _evaluated(self) -> Iterator[tuple[float, Tensor, Any, Any]]:
        for weight, batch in self.weighted_batches():
            outputs, loss = self._outputs_and_loss(batch)
            yield weight, loss, outputs, batch[1]

    def _establish(self, candidates: Sequence[Normaliser | None], check: bool) -> None:
        """Take the first normaliser that passes the check, and the reduction."""
        norms = batch_norms(self.model)
        # BatchNorm's own statistics, since the parts of a batch have others.
        plain = copy.copy(self)
        plain._held = HeldModel(self.model, "running", Precision())
        with plain.evaluating(), torch.no_grad():
            result = established(
                lambda batch: plain.loss_of(batch).detach(),
                self.batches,
                candidates,
                declared=declared_reduction(self.loss_fn),
                separable=all(layer.running_mean is not None for layer in norms),
                dtype=coarsest_dtype(self.model),
                check=check,
            )
        self.normaliser = result.normaliser
        self.normalisers = result.values
        self.reduction: Reduction = result.reduction
        self.checked = result.checked


@checked
def as_risk(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | Literal["model"] | None = None,
    batches: Iterable[Any] | None = None,
    *,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    memory_budget: Count | None = None,
) -> EmpiricalRisk:
    """Return the risk of a model on data, or the risk that was passed in its place.

    Every function that needs a loss over data takes these arguments, so that a risk
    built once serves many of them without reading or checking the data again.

    Args:
        model: The model, or an :class:`EmpiricalRisk`; with a risk, ``loss_fn`` and
            ``batches`` are left out.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar.
        batches: Pairs ``(inputs, targets)``; the loss is that over all of them.
        bn: What BatchNorm normalises with; ``"running"`` by default.
        normaliser: What ``loss_fn`` divides by, where it is not the example count.
        params: Names or patterns of the parameters; all by default, or those of the
            risk.
        memory_budget: Most memory for the data, and again for what is computed from
            them [bytes]; of a risk, whose data are read, for the latter alone.

    Raises:
        UsageError: If something is missing, or is stated beside a risk that has it.
    """
    if isinstance(model, EmpiricalRisk):
        stated = {
            "loss_fn": loss_fn,
            "batches": batches,
            "bn": bn,
            "normaliser": normaliser,
        }
        surplus = [f"{name}=" for name, value in stated.items() if value is not None]
        if surplus:
            raise UsageError(
                "an EmpiricalRisk has its own loss, data and settings, got "
                f"{', '.join(surplus)} beside it; state them where the risk is built."
            )
        risk = model if params is None else model.restricted_to(params)
        if memory_budget is not None:
            risk = copy.copy(risk)
            risk.memory_budget = memory_budget
        return risk
    if loss_fn is None or batches is None:
        missing = "loss_fn" if loss_fn is None else "batches"
        raise UsageError(
            f"(model, loss_fn, batches) or an EmpiricalRisk is needed, got a "
            f"{type(model).__name__} without {missing}."
        )
    return EmpiricalRisk(
        model,
        loss_fn,
        batches,
        bn="running" if bn is None else bn,
        normaliser=normaliser,
        params=params,
        memory_budget=MEMORY_BUDGET if memory_budget is None else memory_budget,
    )

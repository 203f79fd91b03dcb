"""Base of the operators of an empirical risk: data, precision, graph cache, ranks."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.data import HeldBatches
from noisekit.core.distributed import Ranks, sum_over_ranks
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.operators.derivative_check import MEASURED_EXAMPLES
from noisekit.curvature.operators.graph_cache import (
    explain_missing_derivatives,
    graph_bytes,
    model_state,
)
from noisekit.curvature.operators.operator import SymmetricOperator
from noisekit.curvature.operators.weight_decay import (
    WeightDecay,
    decay_by_parameter,
    decay_vector,
)

Product = Callable[[Tensor], Tensor]
"""The product of a matrix with a vector ``(P,)``."""

Note = Callable[[Tensor, Tensor], Tensor]
"""What to note of a vector and its product with one batch's part."""

Blocks = Literal["layer", "tensor"]

# Below this loss, rounding in single precision may exceed the usual tolerance of 1e-3.
_NEARLY_FITTED = 1e-3


class RiskOperator(SymmetricOperator):
    r"""A symmetric matrix that is a sum over the batches of a risk.

    Each batch adds its share. What its products need, graphs of the forward and of
    the backward pass, is kept for as many batches as the memory budget allows and
    built anew for the rest, once for all columns of a block.

    The operator follows the model: where parameters or buffers were changed since
    the last product, everything is built again. ``close()``, or the end of a
    ``with`` block, frees what is kept. Models narrower than float32 are measured in
    float32: copies of their weights stand in their place during a product.

    With data over several processes each has its own share; a product takes one
    all-reduce, in which all have to take part, and is the same on all.

    Attributes:
        risk: What is measured, in the precision that it is measured in.
        weight_decay: Factor ``λ`` of the penalty ``λ/2 |w|²`` that is part of the
            operator, by parameter; the loss itself is without.
        num_kept_batches: Batches whose graphs are kept; 0 before the first product.
    """

    risk: EmpiricalRisk
    weight_decay: dict[str, float]
    num_kept_batches: int

    def __init__(
        self,
        model: nn.Module | EmpiricalRisk,
        loss_fn: LossFn | None = None,
        batches: Iterable[Batch] | None = None,
        *,
        bn: BatchNormPolicy | None = None,
        normaliser: Normaliser | None = None,
        params: ParameterPatterns = None,
        memory_budget: int | None = None,
        weight_decay: WeightDecay = 0.0,
    ) -> None:
        """Check model, loss and data as :class:`EmpiricalRisk` does.

        Args:
            model: The model, or an :class:`EmpiricalRisk` in place of it, of
                ``loss_fn`` and of ``batches``; see there for these arguments.
            loss_fn: ``loss_fn(outputs, targets)``, a scalar.
            batches: Pairs ``(inputs, targets)``.
            bn: What BatchNorm normalises by; its statistics are held constant.
            normaliser: What ``loss_fn`` divides by, where it is not the example count.
            params: Names or patterns of parameters; gives a diagonal block.
            memory_budget: Most memory for the data, and again for kept graphs
                [bytes]; 1 GiB, or that of the risk.
            weight_decay: Adds ``λ`` to the diagonal: one for all parameters, or those
                of an optimiser's parameter groups.

        Raises:
            UsageError: If ``weight_decay`` is negative or no term of a risk.
        """
        risk = as_risk(
            model,
            loss_fn,
            batches,
            bn=bn,
            normaliser=normaliser,
            params=params,
            memory_budget=memory_budget,
        )
        self._decay_source = weight_decay
        self._whole: EmpiricalRisk | None = None
        self._first_index = 0
        self._rebase(risk, torch.promote_types(risk.layout.dtype, torch.float32))

    def _rebase(self, risk: EmpiricalRisk, dtype: torch.dtype) -> None:
        """Measure ``risk`` from now on, with nothing kept of another."""
        self.weight_decay = decay_by_parameter(self._decay_source, risk)
        self._decay = decay_vector(self.weight_decay, risk.layout, dtype)
        self._dtype = dtype
        self.risk = risk.in_precision(self._precision(dtype))
        self.num_matvecs = 0
        self._kept: list[tuple[float, Product]] = []
        self._note: Note | None = None
        self._noted: list[Tensor] = []
        self._state: tuple[object, ...] = ()
        self.num_kept_batches = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Number of chosen parameters, twice."""
        return self.risk.layout.num_params, self.risk.layout.num_params

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, or float32 where that is narrower."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.risk.layout.device

    @property
    def ranks(self) -> Ranks:
        """The processes that hold a share of the data."""
        return self.risk.ranks

    def close(self) -> None:
        """Free what is kept; a later product builds it again."""
        self._kept = []
        self._state = ()
        self.num_kept_batches = 0

    def __enter__(self) -> Self:
        """Return the operator."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free what is kept."""
        self.close()

    def restricted_to(self, params: ParameterPatterns) -> Self:
        """Return the diagonal block of some parameters, over the same data."""
        return self._like(self.risk.restricted_to(params))

    def blocks(self, by: Blocks = "layer") -> Iterator[tuple[str, Self]]:
        """Yield the diagonal block of each layer, or of each parameter tensor.

        Raises:
            UsageError: If ``by`` is neither.
        """
        if by not in get_args(Blocks):
            raise UsageError(f"by needs to be 'layer' or 'tensor', got {by!r}.")
        groups: dict[str, list[str]] = {}
        for name in self.risk.layout.names:
            owner = name.rpartition(".")[0] if by == "layer" else name
            groups.setdefault(owner, []).append(name)
        for owner, names in groups.items():
            yield owner, self.restricted_to(names)

    def batch_operators(self) -> Iterator[tuple[float, Self]]:
        """Yield each batch's weight and its own operator, as of its own loss.

        Only the data of this process; the operator itself is the sum of all products
        of weight and operator, where it is linear in the batches, as the Hessian is.
        BatchNorm statistics, where recalibrated, are those of all data.
        """
        risk = self.risk
        for i, (weight, batch) in enumerate(risk.weighted_batches()):
            part = self._like(risk.on([batch]))
            part._whole = self._whole or risk
            part._first_index = i
            yield risk.share_of(weight, batch), part

    def batch_forms(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return each batch's weight and its form :math:`v^\top H_b v`, ``(B,)`` each.

        Only of this process's batches; costs one product with a vector.
        """
        self.risk.layout.split(vector)  # refuses another length
        row = vector.to(self.device, self.dtype)
        weights: list[float] = []
        forms: list[Tensor] = []

        def note(part: float, share: Product) -> None:
            weights.append(part)
            forms.append(row.double() @ share(row).double() / part)

        self._visit(note)
        self.num_matvecs += 1
        return torch.tensor(weights, dtype=torch.float64), torch.stack(forms)

    def products_in_double(self, block: Tensor) -> Tensor | None:
        """Return products in double precision where the loss is nearly zero.

        A probability of nearly one is rounded by ``eps``, so that what is missing to
        it, about the loss, has a relative error of ``eps`` over the loss, and the
        Hessian as well. It is the same in each product and so shows in no scatter.
        Costs a forward pass of one batch, and the products where they are made.
        """
        if self._dtype == torch.float64 or not self._is_nearly_fitted():
            return None
        wide = copy.copy(self)
        wide._rebase(self.risk, torch.float64)
        wide.risk = as_risk(wide.risk, memory_budget=1)
        try:
            return wide @ block.double()
        except (RuntimeError, TypeError, UsageError):  # no double precision here
            return None

    def _is_nearly_fitted(self) -> bool:
        with self._evaluating(), torch.no_grad():
            for _, batch in self.risk.weighted_batches():
                return float(self.risk.loss_of(batch)) < _NEARLY_FITTED
        return False

    @contextmanager
    def noting(self, note: Note) -> Iterator[list[Tensor]]:
        r"""Note something of each batch's part of products, while they are made.

        Within the context each product with a vector ``v`` appends one tensor, with
        ``note(v, c_b H_b v)`` of each of this process's batches as its rows. So
        quadratic forms by batch cost no more products.

        Args:
            note: Called with the vector and the batch's part of the product.

        Yields:
            The list that grows.
        """
        noted: list[Tensor] = []
        before = self._note, self._noted
        self._note, self._noted = note, noted
        try:
            yield noted
        finally:
            self._note, self._noted = before

    @abstractmethod
    def _share(self, index: int, weight: float, batch: Batch) -> Product:
        """Return what the batch of that index adds to products, for many vectors.

        Called within ``risk.evaluating()``; what it returns works outside as well.
        """

    def _precision(self, dtype: torch.dtype) -> torch.dtype:
        """Type to compute in, for products in ``dtype``."""
        return dtype

    def _passing_share(self, index: int, weight: float, batch: Batch) -> Product:
        """Return the share for one pass; its graph is as large as a kept one."""
        return self._share(index, weight, batch)

    def _check_derivatives(self) -> None:
        """Check once per risk that autograd can take the derivatives of products."""

    def _prepare(self) -> None:
        """Do what has to be done once at each new state of the model."""

    def _completed(self, product: Tensor, rows: Tensor) -> Tensor:
        """Return the product after what is not a sum over batches, ``(k, P)`` each."""
        return product

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._matmat(vector.unsqueeze(1))[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        """Products with each of the columns, by one graph per batch."""
        # Each with memory of its own: kernels round by how their operands lie.
        columns = [c.clone(memory_format=torch.contiguous_format) for c in block.T]
        rows = torch.stack(columns)  # (k, P)
        total = torch.zeros_like(rows)

        noted: list[list[Tensor]] = [[] for _ in columns]

        def add(part: float, share: Product) -> None:
            for i, column in enumerate(columns):
                piece = share(column)  # (P,), c_b H_b v / sum c
                total[i] += piece
                if self._note is not None:
                    noted[i].append(self._note(column, piece))

        self._visit(add)
        self._noted.extend(torch.stack(parts) for parts in noted if parts)
        # One all-reduce for the whole block, then what is no sum over batches.
        product = self._completed(sum_over_ranks(total, self.risk.ranks), rows)
        return (product if self._decay is None else product + self._decay * rows).T

    def _visit(self, use: Callable[[float, Product], None]) -> None:
        """Call ``use`` with each batch's part of the data and its product."""
        with explain_missing_derivatives(), self.risk.without_hooks():
            self._follow_model()
            for part, share in self._kept:
                use(part, share)
            if self.num_kept_batches == self._num_used_batches:
                return
            with self._evaluating():
                for i, (weight, batch) in enumerate(self.risk.weighted_batches()):
                    if i >= self.num_kept_batches:
                        part = self.risk.share_of(weight, batch)
                        index = self._first_index + i
                        use(part, self._passing_share(index, weight, batch))

    @property
    def _num_used_batches(self) -> int:
        return sum(count > 0 for count in self.risk.normalisers)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Hold the model as measured; a batch of a whole as the whole has it."""
        with (self._whole or self.risk).evaluating(), self.risk.evaluating():
            yield

    def _follow_model(self) -> None:
        """Keep what the budget allows, unless that is there and of these weights."""
        state = model_state(self.risk.model, self.risk.vector())
        if self._state == state:
            return
        self.close()
        self._check_derivatives()
        self._prepare()
        room = self._room()
        with self._evaluating():
            for i, (weight, batch) in enumerate(self.risk.weighted_batches()):
                room -= count_examples(batch)
                if room < 0:
                    break
                part = self.risk.share_of(weight, batch)
                share = self._share(self._first_index + i, weight, batch)
                self._kept.append((part, share))
                self.num_kept_batches += 1
        self._state = state

    def _room(self) -> float:
        """Number of examples whose graphs fit into the budget."""
        if not isinstance(self.risk.batches, HeldBatches):
            return 0.0
        with self._evaluating():
            weight, batch = next(self.risk.weighted_batches())
            count = count_examples(batch)
            if self.risk.checked:  # so examples can be taken apart
                count = min(count, MEASURED_EXAMPLES)
                batch = take_examples(batch, torch.arange(count))
            size = self._share_bytes(weight, batch)
            if not self.risk.graphs_last:
                return 0.0
            return self.risk.memory_budget / max(size / count, 1.0)

    def _share_bytes(self, weight: float, batch: Batch) -> int:
        """Memory that the graphs of one batch's share hold [bytes]."""
        build = partial(self._passing_share, 0, weight, batch)
        return graph_bytes(build, self.risk.model)

    def _like(self, risk: EmpiricalRisk) -> Self:
        """Return this operator with the same options for another risk."""
        other = copy.copy(self)
        other._rebase(risk, self._dtype)
        return other

"""Base of the operators of an empirical risk: data, precision, graph cache, ranks."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
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
"""Summary of a vector ``v`` and one batch's term of its product."""

Blocks = Literal["layer", "tensor"]

# 1 - p has an absolute error of eps32 = 1e-7, relative to a loss of 1e-3 about 1e-4:
# below this loss, rounding of products may exceed the usual tolerance of 1e-3.
_NEARLY_FITTED = 1e-3


class RiskOperator(SymmetricOperator):
    r"""A symmetric matrix that is a sum over the batches of a risk.

    .. math:: H v = \sum_b c_b H_b v \Big/ \sum_b c_b + \lambda v

    The autograd graphs that the products of a batch need, of its forward and backward
    pass, are cached for as many batches as the memory budget allows; for the others
    they are rebuilt on each pass, once for all columns of a block.

    The cache is invalidated when parameters or buffers have changed since the last
    product. ``close()``, or the end of a ``with`` block, frees it. Models narrower than
    float32 are measured in float32: widened copies replace their weights during a
    product.

    With data spread over several processes, a product takes one all-reduce, in which
    every process has to take part, and is the same on all.

    Attributes:
        risk: What is measured, in the precision that it is measured in.
        weight_decay: Factor ``λ`` of the penalty ``λ/2 |w|²`` that is part of the
            operator, by parameter; the loss itself is without.
        num_kept_batches: Batches whose graphs are cached; 0 before the first product.
    """

    risk: EmpiricalRisk
    weight_decay: dict[str, float]
    num_kept_batches: int

    @checked
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
            memory_budget: Most memory for the data, and again for cached graphs
                [bytes]; 1 GiB, or that of the risk.
            weight_decay: Adds ``λ`` to the diagonal: one for all parameters, or those
                of an optimizer's parameter groups.

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
        """Measure ``risk`` from now on, with an empty cache."""
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
        """Free the cached graphs; a later product rebuilds them."""
        self._kept = []
        self._state = ()
        self.num_kept_batches = 0

    def __enter__(self) -> Self:
        """Return the operator."""
        return self

    def __exit__(self, *error: object) -> None:
        """Free the cached graphs."""
        self.close()

    @checked
    def restricted_to(self, params: ParameterPatterns) -> Self:
        """Return the diagonal block of some parameters, over the same data."""
        return self._like(self.risk.restricted_to(params))

    @checked
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
        """Yield each batch's weight ``c_b / sum c`` and the operator of its own loss.

        Of this process's batches only. Where the operator is linear in the batches, as
        the Hessian is, it is the sum of weight times operator. Recalibrated BatchNorm
        statistics are those of all data.
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
            # The share's product includes c_b / sum c, which the form is without.
            forms.append(row.double() @ share(row).double() / part)

        self._visit(note)
        self.num_matvecs += 1
        return torch.tensor(weights, dtype=torch.float64), torch.stack(forms)

    def products_in_double(self, block: Tensor) -> Tensor | None:
        """Return products in double precision where the loss is nearly zero.

        A probability ``p`` near one is rounded by ``eps``, so that ``1 - p``, about the
        loss, has a relative error of ``eps`` over the loss, and so has the Hessian of a
        cross-entropy, ``p (1 - p)`` in the logits. The error is the same in each
        product, so that their scatter does not show it. Costs a forward pass of one
        batch, and the products where they are made.
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
        r"""Record ``note(v, c_b H_b v / sum c)`` per batch of every product.

        Within the context each product with a vector ``v`` appends one tensor, whose
        rows are the notes of this process's batches. Quadratic forms by batch so cost
        no further products.

        Args:
            note: Called with the vector and the batch's term of the product.

        Yields:
            The list that the products append to.
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
        """Return the map ``v -> c_b H_b v / sum c`` of one batch, for many vectors.

        Called within ``risk.evaluating()``; the map can be applied outside as well.
        """

    def _precision(self, dtype: torch.dtype) -> torch.dtype:
        """Type to compute in, for products in ``dtype``."""
        return dtype

    def _passing_share(self, index: int, weight: float, batch: Batch) -> Product:
        """Return the share for one pass; its graph is as large as a cached one."""
        return self._share(index, weight, batch)

    def _check_derivatives(self) -> None:
        """Check once per risk that autograd can take the derivatives of products."""

    def _prepare(self) -> None:
        """Prepare for a new state of the model, before its graphs are built."""

    def _completed(self, product: Tensor, rows: Tensor) -> Tensor:
        """Add the terms that are not sums over batches; ``(k, P)`` each."""
        return product

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._matmat(vector.unsqueeze(1))[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        """Products with each of the columns, by one graph per batch."""
        # Contiguous, so that a column of a block has the bits of a single product: the
        # rounding of a kernel depends on the strides of its operands.
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
        # One all-reduce for the whole block, then the terms that are no sum over
        # batches: added before it, every process would contribute them.
        product = self._completed(sum_over_ranks(total, self.risk.ranks), rows)
        return (product if self._decay is None else product + self._decay * rows).T

    def _visit(self, use: Callable[[float, Product], None]) -> None:
        """Call ``use`` with each batch's weight ``c_b / sum c`` and its product map."""
        with explain_missing_derivatives(), self.risk.without_hooks():
            self._follow_model()
            for part, share in self._kept:
                use(part, share)
            if self.num_kept_batches == self._num_used_batches:
                return
            # The others' graphs live for this pass only. Evaluation mode is entered
            # just for them: cached graphs no longer depend on the model's state.
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
        """Evaluation mode; a single batch's operator uses that of the whole data."""
        with (self._whole or self.risk).evaluating(), self.risk.evaluating():
            yield

    def _follow_model(self) -> None:
        """Rebuild the cache within the budget, unless it is of the present state."""
        state = model_state(self.risk.model, self.risk.vector())
        if self._state == state:
            return
        self.close()
        self._check_derivatives()
        self._prepare()
        room = self._room()
        with self._evaluating():
            # The first batches rather than the smallest: which ones are cached must not
            # depend on anything but the order of the data, since it decides the order
            # of summation and so the rounding.
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
        """Number of examples whose graphs fit into the memory budget."""
        if not isinstance(self.risk.batches, HeldBatches):
            return 0.0  # a loader may group examples differently on each pass
        with self._evaluating():
            weight, batch = next(self.risk.weighted_batches())
            count = count_examples(batch)
            # Graphs grow linearly in the examples, so that a few of them give the size.
            if self.risk.checked:  # a loss of fewer examples is known to be defined
                count = min(count, MEASURED_EXAMPLES)
                batch = take_examples(batch, torch.arange(count))
            size = self._share_bytes(weight, batch)
            if not self.risk.graphs_last:
                return 0.0  # a forward pass writes to tensors that graphs refer to
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

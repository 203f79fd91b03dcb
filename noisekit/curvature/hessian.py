"""The Hessian of the empirical risk, by its products with vectors."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.errors import UsageError
from noisekit.core.frozen import FrozenBatches
from noisekit.core.params import ParameterPatterns, flatten
from noisekit.core.risk import (
    MEMORY_BUDGET,
    BatchNormPolicy,
    EmpiricalRisk,
    LossFn,
    Normaliser,
)
from noisekit.curvature.operator import SymmetricOperator

ProductForm = Literal["auto", "kept", "rebuilt"]
_MEASURED_EXAMPLES = 8


class HessianOperator(SymmetricOperator):
    r"""Products with the Hessian of ``F(w) = \sum_b c_b L_b(w) / \sum_b c_b``.

    A product differentiates ``<grad F, v>`` once more. The graph of the gradient is
    kept for as many batches as the memory budget allows, which makes a product cost
    about two gradients, and built anew for the rest, about three to four.

    The operator follows the model: where parameters were changed since the last
    product, the graph is built again at the new ones. ``close()``, or the end of a
    ``with`` block, frees the graph.

    Attributes:
        risk: What is differentiated.
        num_kept_batches: Batches whose graph is kept; 0 before the first product.
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
        form: ProductForm = "auto",
    ) -> None:
        """Check model, loss and data as ``EmpiricalRisk`` does, and what it raises.

        Args:
            model: Evaluated without dropout, whatever its mode.
            loss_fn: Called with outputs and targets; returns a scalar.
            batches: Yields ``(inputs, targets)``.
            bn: What BatchNorm normalises by; its statistics are held constant.
            normaliser: What the loss of a batch is divided by, given its targets.
            params: Names or patterns of parameters; gives a diagonal block of the
                Hessian.
            memory_budget: Most memory for the data, and again for kept graphs [bytes].
            form: ``"kept"`` keeps the graph of all batches whatever the budget,
                ``"rebuilt"`` that of none.

        Raises:
            UsageError: If ``form`` is none of these, or all data cannot be kept.
        """
        risk = EmpiricalRisk(
            model,
            loss_fn,
            batches,
            bn=bn,
            normaliser=normaliser,
            params=params,
            memory_budget=memory_budget,
        )
        self._set_up(risk, memory_budget, form)

    @classmethod
    def from_risk(
        cls,
        risk: EmpiricalRisk,
        *,
        memory_budget: int = MEMORY_BUDGET,
        form: ProductForm = "auto",
    ) -> Self:
        """Return the Hessian of a risk that is there already."""
        operator = cls.__new__(cls)
        operator._set_up(risk, memory_budget, form)
        return operator

    def _set_up(self, risk: EmpiricalRisk, budget: int, form: ProductForm) -> None:
        if form not in get_args(ProductForm):
            raise UsageError(
                f"form needs to be 'auto', 'kept' or 'rebuilt', got {form!r}."
            )
        if form == "kept" and not isinstance(risk.batches, FrozenBatches):
            raise UsageError(
                "form='kept' needs the data in memory, got more than the memory "
                "budget; raise memory_budget= or use form='auto'."
            )
        self.risk = risk
        self.num_kept_batches = 0
        self._budget = budget
        self._form = form
        self._gradient: tuple[Tensor, ...] | None = None
        self._state: tuple[object, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of chosen parameters, twice."""
        return self.risk.layout.num_params, self.risk.layout.num_params

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return self.risk.layout.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.risk.layout.device

    @property
    def form(self) -> Literal["kept", "rebuilt", "mixed"]:
        """How products are made since the last one, with graphs kept or not."""
        if self.num_kept_batches == 0:
            return "rebuilt"
        return "kept" if self.num_kept_batches == self.risk.num_batches else "mixed"

    def close(self) -> None:
        """Free the kept graphs; a later product builds them again."""
        self._gradient = None
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
        """Free the kept graphs."""
        self.close()

    def _matvec(self, vector: Tensor) -> Tensor:
        risk = self.risk
        parts = risk.layout.split(vector)
        wide = torch.promote_types(vector.dtype, torch.float32)
        with _second_derivatives_explained():
            self._follow_model()
            assert self._gradient is not None
            total = self._differentiate(self._gradient, parts, keep=True).to(wide)
            if self.num_kept_batches < risk.num_batches:
                with risk.evaluating():
                    for i, (weight, batch) in enumerate(risk.weighted_batches()):
                        if i >= self.num_kept_batches:
                            gradient = self._graph_of(weight, batch)
                            total += self._differentiate(gradient, parts, keep=False)
        return total.to(vector.dtype)

    def _differentiate(
        self, gradient: tuple[Tensor, ...], parts: tuple[Tensor, ...], *, keep: bool
    ) -> Tensor:
        """Gradient of ``<gradient, parts>``; zero where the gradient is constant."""
        pairs = [
            (g, p.to(g.dtype))
            for g, p in zip(gradient, parts, strict=True)
            if g.requires_grad
        ]
        parameters = self.risk.parameters
        if not pairs:
            return flatten(torch.zeros_like(p) for p in parameters)
        products = torch.autograd.grad(
            [g for g, _ in pairs],
            parameters,
            [p for _, p in pairs],
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )
        return flatten(products)

    def _graph_of(self, weight: float, batch: Batch) -> tuple[Tensor, ...]:
        loss = self.risk.loss_of(batch)
        return self.risk.gradients(weight * loss, create_graph=True)

    def _follow_model(self) -> None:
        """Build the kept graphs, unless they are there and of the present weights."""
        state = self._model_state()
        if self._gradient is not None and state == self._state:
            return
        self.close()
        sums: tuple[Tensor, ...] = tuple(
            torch.zeros_like(p) for p in self.risk.parameters
        )
        room = self._room()
        with self.risk.evaluating():
            for weight, batch in self.risk.weighted_batches():
                room -= count_examples(batch)
                if room < 0:
                    break
                graph = self._graph_of(weight, batch)
                sums = tuple(s + g for s, g in zip(sums, graph, strict=True))
                self.num_kept_batches += 1
        self._gradient, self._state = sums, state

    def _room(self) -> float:
        """Number of examples whose graphs fit into the budget."""
        if self._form == "kept":
            return float("inf")
        if self._form == "rebuilt" or not isinstance(self.risk.batches, FrozenBatches):
            return 0.0
        with self.risk.evaluating():
            weight, batch = next(self.risk.weighted_batches())
            count = count_examples(batch)
            if self.risk.checked:  # so examples can be taken apart
                count = min(count, _MEASURED_EXAMPLES)
                batch = take_examples(batch, torch.arange(count))
            return self._budget / max(self._graph_bytes(weight, batch) / count, 1.0)

    def _graph_bytes(self, weight: float, batch: Batch) -> int:
        """Memory that the graph of one batch's gradient holds [bytes]."""
        own = {p.untyped_storage().data_ptr() for p in self.risk.model.parameters()}
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            graph = self._graph_of(weight, batch)
        del graph
        return sum(found.values())

    def _model_state(self) -> tuple[object, ...]:
        """What changes when parameters or buffers do, also through ``.data``."""
        model = self.risk.model
        versions = [t._version for t in (*model.parameters(), *model.buffers())]
        vector = self.risk.vector()
        ramp = torch.linspace(0.5, 1.5, len(vector), device=vector.device)
        sums = torch.stack([vector.sum(), vector @ ramp.to(vector.dtype)])
        return (*versions, *sums.tolist())


@contextmanager
def _second_derivatives_explained() -> Iterator[None]:
    """Say what it means when PyTorch has no second derivative of an operation.

    Raises:
        UsageError: In its place.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if "derivative" in text and "not" in text:
            raise UsageError(
                "the Hessian needs second derivatives of every operation in the "
                f"model, got one without: {text.splitlines()[0]}; replace that layer "
                "(EmbeddingBag by Embedding and a sum, for one), or leave its "
                "parameters out with params=."
            ) from error
        raise

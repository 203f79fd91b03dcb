"""The Hessian of the empirical risk, by its products with vectors."""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch, count_examples
from noisekit.core.data import HeldBatches
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import EmpiricalRisk, LossFn
from noisekit.curvature.operators.derivative_check import check_second_derivatives
from noisekit.curvature.operators.hvp_methods import (
    Form,
    finite_difference,
    reverse_over_reverse,
)
from noisekit.curvature.operators.hvp_selection import (
    Trial,
    difference_error,
    difference_step,
    select_form,
)
from noisekit.curvature.operators.risk_operator import Product, RiskOperator
from noisekit.curvature.operators.weight_decay import WeightDecay

ProductForm = Literal[
    "auto",
    "kept",
    "rebuilt",
    "linearised",
    "forward_over_reverse",
    "fastest",
    "finite_difference",
]
FormInUse = Literal[
    "kept",
    "rebuilt",
    "mixed",
    "linearised",
    "forward_over_reverse",
    "finite_difference",
]
# Memory of a trace in that of the graph: it holds the constants before and after they
# are folded.
_TRACED_SIZE = 4.0
_WITHOUT_MEMORY = {"rebuilt", "forward_over_reverse", "finite_difference"}


class HessianOperator(RiskOperator):
    r"""Products with the Hessian of ``F(w) = \sum_b c_b L_b(w) / \sum_b c_b``.

    A product differentiates ``<grad F, v>`` once more. The graph of the gradient is
    kept for as many batches as the memory budget allows, which makes a product cost
    about two gradients, and rebuilt for the rest, about three to four.

    Other forms are used on request, and only if a trial product agrees with reverse
    over reverse; ``trial`` has the result.

    Attributes:
        trial: How the requested form compared, after the first product; ``None``
            where there was nothing to compare.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> H = nk.HessianOperator(model, loss_fn, batches)
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
        >>> H.to_dense()
        tensor([[1., 0.],
                [0., 4.]])
    """

    trial: Trial | None = None

    @checked
    def __init__(
        self,
        model: nn.Module | EmpiricalRisk,
        loss_fn: LossFn | None = None,
        batches: Iterable[Batch] | None = None,
        *,
        form: ProductForm = "auto",
        bn: BatchNormPolicy | None = None,
        normaliser: Normaliser | None = None,
        params: ParameterPatterns = None,
        memory_budget: int | None = None,
        weight_decay: WeightDecay = 0.0,
    ) -> None:
        """Check everything as :class:`RiskOperator` does.

        Args:
            model: This, and what is not described here, as in :class:`RiskOperator`.
            form: ``"auto"`` keeps graphs within the budget, by a rule that reads no
                clock, so that bits repeat. ``"kept"`` keeps the graph of all batches
                whatever the budget, ``"rebuilt"`` that of none. ``"linearised"``
                traces the gradient's derivative once, ``"forward_over_reverse"`` takes
                the least memory, ``"fastest"`` takes what is faster on one
                batch. ``"finite_difference"`` is for models without second
                derivatives: central differences of gradients in double precision,
                whose error ``trial`` states.
            weight_decay: Adds the curvature of the weight decay penalty.

        Raises:
            UsageError: If ``form`` is none of these, or all data cannot be kept.
        """
        self._asked = _checked_form(form)
        super().__init__(
            model,
            loss_fn,
            batches,
            bn=bn,
            normaliser=normaliser,
            params=params,
            memory_budget=memory_budget,
            weight_decay=weight_decay,
        )
        if form == "kept" and not isinstance(self.risk.batches, HeldBatches):
            raise UsageError(
                "form='kept' needs the data in memory, got more than the memory "
                "budget; raise memory_budget= or use form='auto'."
            )

    @property
    def form(self) -> FormInUse:
        """How products are made since the last one."""
        if self._asked == "finite_difference":
            return "finite_difference"
        if self.trial is not None and self.trial.form == "forward_over_reverse":
            return "forward_over_reverse"
        if self.num_kept_batches == 0:
            return "rebuilt"
        if self.num_kept_batches < self._num_used_batches:
            return "mixed"
        return "linearised" if self._traced else "kept"

    @property
    def _traced(self) -> bool:
        return self.trial is not None and self.trial.form == "linearised"

    def _precision(self, dtype: torch.dtype) -> torch.dtype:
        # Differences of float32 gradients carry no correct digit.
        differences = self._asked == "finite_difference"
        return torch.float64 if differences else dtype

    def _share(self, index: int, weight: float, batch: Batch) -> Product:
        return self._form(self.risk, weight, batch)

    def _passing_share(self, index: int, weight: float, batch: Batch) -> Product:
        # A trace costs too much for one pass, and saves nothing that can be measured.
        form = reverse_over_reverse if self._traced else self._form
        return form(self.risk, weight, batch)

    def _check_derivatives(self) -> None:
        if self._asked != "finite_difference":
            check_second_derivatives(self.risk)

    def _prepare(self) -> None:
        self.trial = None
        self._form: Form = reverse_over_reverse
        asked = self._asked
        if asked == "auto" or asked == "kept" or asked == "rebuilt":
            return
        with self._evaluating():
            weight, batch = next(self.risk.weighted_batches())
            if asked == "finite_difference":
                self._form = finite_difference(difference_step(self.risk))
                self.trial = difference_error(self.risk, weight, batch)
            else:
                keeps = self._room() >= count_examples(batch)
                self.trial, self._form = select_form(
                    asked, self.risk, weight, batch, keeps=keeps
                )

    def _room(self) -> float:
        if self._asked == "kept":
            return float("inf")
        taken = self._asked if self.trial is None else self.trial.form
        if taken in _WITHOUT_MEMORY:
            return 0.0
        return super()._room() / (_TRACED_SIZE if self._traced else 1.0)


def _checked_form(form: ProductForm) -> ProductForm:
    if form not in get_args(ProductForm):
        known = ", ".join(repr(name) for name in get_args(ProductForm)[:-1])
        raise UsageError(
            f"form needs to be {known} or 'finite_difference', got {form!r}."
        )
    return form

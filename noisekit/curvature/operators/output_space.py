"""Operators ``J' M J``: a matrix over a batch's outputs, pulled back to parameters."""

from abc import abstractmethod
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.params import flatten
from noisekit.curvature.operators.derivative_check import check_jacobian
from noisekit.curvature.operators.graph_cache import check_twice_differentiable
from noisekit.curvature.operators.risk_operator import Product, RiskOperator

OutputProduct = Callable[[Tensor], Tensor]
"""The product of ``M`` with something of the shape of the outputs."""


class OutputSpaceOperator(RiskOperator):
    r"""A sum over batches of :math:`J^\top M J`, with the outputs' Jacobian ``J``.

    ``J' u`` is linear in ``u`` and its derivative with respect to ``u`` is ``J``, so
    that ``J v`` takes two reverse passes and no forward-mode derivative, which not
    every layer has ("double backward"). With cached graphs a product costs less than
    one and a half gradient evaluations.

    Source:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian"; Schraudolph 2002
        for ``J' M J``.
    """

    @abstractmethod
    def _output_product(
        self, outputs: Tensor, batch: Batch, *, weight: float, index: int
    ) -> OutputProduct:
        """Return the product with ``M_b``, given the batch's detached outputs."""

    def _check_derivatives(self) -> None:
        if "jacobian" in self.risk.verified:
            return
        with self._evaluating():  # first: a detached loss has a message of its own
            for _, batch in islice(self.risk.weighted_batches(), 1):
                self.risk.check_followed(batch)
        check_jacobian(self.risk, what=type(self).__name__)

    def _share(self, index: int, weight: float, batch: Batch) -> Product:
        leaves = self.risk.leaves
        outputs = self._outputs(batch)
        inner = self._output_product(
            outputs.detach(), batch, weight=weight, index=index
        )
        if not outputs.requires_grad:
            return torch.zeros_like
        # J' u as a function of u; its value at u = 0 does not matter, only its graph.
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs,
            leaves,
            cotangent,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        check_twice_differentiable(pulled)
        split = self.risk.layout.split
        used = [i for i, part in enumerate(pulled) if part.requires_grad]
        attached = [pulled[i] for i in used]

        def product(vector: Tensor) -> Tensor:
            parts = split(vector)
            tangents = [parts[i].to(pulled[i].dtype) for i in used]
            # d <J' u, v> / du = J v.
            (pushed,) = torch.autograd.grad(
                attached, cotangent, tangents, retain_graph=True, materialize_grads=True
            )
            back = torch.autograd.grad(
                outputs,
                leaves,
                inner(pushed),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return flatten(back)

        return product

    def _outputs(self, batch: Batch) -> Tensor:
        self.risk.check_followed(batch)
        outputs = self.risk.outputs_of(batch)
        if isinstance(outputs, Tensor) and outputs.is_floating_point():
            return outputs
        raise UsageError(
            f"{type(self).__name__} needs a model that returns one floating-point "
            f"tensor, got a {type(outputs).__name__}; wrap the model so that it "
            "returns its logits or predictions alone, and let loss_fn take these."
        )


def example_sums(values: Tensor, num_examples: int) -> Tensor:
    """Return the sum over each example's entries, shaped to multiply ``values``.

    Examples are on the first axis, also several rows each where tokens are flattened,
    or on the second where time comes first.

    Raises:
        UsageError: If neither axis counts the examples.
    """
    length = values.shape[0] if values.ndim else 0
    time_first = values.ndim > 2 and length != num_examples
    time_first = time_first and values.shape[1] == num_examples
    if length and length % num_examples == 0 and not time_first:
        sums = values.reshape(num_examples, -1).sum(1)
        rows = sums.repeat_interleave(length // num_examples)
        return rows.reshape(length, *[1] * (values.ndim - 1))
    if time_first:
        axes = [axis for axis in range(values.ndim) if axis != 1]
        return torch.sum(values, axes, keepdim=True)
    raise UsageError(
        f"per-example products need outputs with an axis of {num_examples} examples, "
        f"got shape {tuple(values.shape)}; let the model return (examples, ...)."
    )

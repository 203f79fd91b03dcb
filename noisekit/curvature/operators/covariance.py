"""The covariance of gradients, over examples or over batches."""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch, count_examples
from noisekit.core.distributed import sum_over_ranks
from noisekit.core.errors import BatchSizeError, CoupledExamplesError, UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy, batch_norms
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import EmpiricalRisk, LossFn
from noisekit.curvature.operators.output_space import (
    OutputProduct,
    OutputSpaceOperator,
    example_sums,
)

Per = Literal["example", "batch"]


class GradientCovarianceOperator(OutputSpaceOperator):
    r"""Products with the covariance of per-example or of per-batch gradients.

    .. math:: \Sigma = \frac{n}{n-1} \sum_i \omega_i (g_i - G)(g_i - G)^\top

    ``G`` is the gradient of the risk. Per example, ``n`` examples have equal weights
    and ``g_i`` is ``n`` times what example ``i`` adds to ``G``. Per batch, ``g_i`` is
    the gradient of a batch's loss and the weight is its part of what the losses
    divide by, so that under ragged batches this is without bias the covariance of
    gradients of batches of the mean size: the per-example one over that size.

    Weight decay adds the same to every gradient and so does not appear.

    Attributes:
        per: ``"example"`` or ``"batch"``.
        centred: Whether ``G`` is subtracted; else this is the mean of ``g_i g_i'``.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> nk.GradientCovarianceOperator(model, loss_fn, batches).to_dense()
        tensor([[ 2., -8.],
                [-8., 32.]])
    """

    per: Per
    centred: bool

    @checked
    def __init__(
        self,
        model: nn.Module | EmpiricalRisk,
        loss_fn: LossFn | None = None,
        batches: Iterable[Batch] | None = None,
        *,
        per: Per = "example",
        centred: bool = True,
        bn: BatchNormPolicy | None = None,
        normaliser: Normaliser | None = None,
        params: ParameterPatterns = None,
        memory_budget: int | None = None,
    ) -> None:
        """Check everything as :class:`RiskOperator` does.

        Args:
            model: This, and what is not described here, as in :class:`RiskOperator`.
            per: What a gradient is of: ``"example"`` or ``"batch"``.
            centred: Whether to subtract the mean gradient.

        Raises:
            UsageError: If ``per`` is neither.
            CoupledExamplesError: If BatchNorm couples the examples of a batch.
        """
        if per not in get_args(Per):
            raise UsageError(f"per needs to be 'example' or 'batch', got {per!r}.")
        self.per, self.centred = per, centred
        super().__init__(
            model,
            loss_fn,
            batches,
            bn=bn,
            normaliser=normaliser,
            params=params,
            memory_budget=memory_budget,
        )
        coupled = self.risk.bn == "batch" and bool(batch_norms(self.risk.model))
        if per == "example" and coupled:
            raise CoupledExamplesError(
                "per-example gradients need examples that do not act on each other, "
                "got bn='batch', where BatchNorm couples those of a batch; use "
                "bn='running', or per='batch'."
            )

    def _output_product(
        self, outputs: Tensor, batch: Batch, *, weight: float, index: int
    ) -> OutputProduct:
        point = outputs.clone().requires_grad_()
        loss = weight * self.risk.loss_at(point, batch[1])
        (slope,) = torch.autograd.grad(loss, point, materialize_grads=True)
        if self.per == "example":
            count, scale = count_examples(batch), float(self.risk.num_examples)
        else:
            count, scale = 1, 1.0 / self.risk.share_of(weight, batch)
        return lambda u: scale * slope * example_sums(slope * u, count)

    def _prepare(self) -> None:
        count = self.risk.num_examples
        if self.per == "batch":
            own = torch.tensor(float(self._num_used_batches), device=self.device)
            count = round(float(sum_over_ranks(own, self.risk.ranks)))
        self._mean: Tensor | None = None
        if not self.centred:
            return
        if count < 2:
            raise BatchSizeError(
                f"a covariance needs at least 2 gradients, got {count} {self.per}; "
                "give more data, or centred=False."
            )
        self._factor = count / (count - 1)
        with self._evaluating():
            self._mean = self.risk.value_and_grad()[1]

    def _completed(self, product: Tensor, rows: Tensor) -> Tensor:
        if self._mean is None:
            return product
        along = rows @ self._mean
        return self._factor * (product - along.unsqueeze(1) * self._mean)

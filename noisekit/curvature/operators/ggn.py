"""The generalized Gauss-Newton matrix of the empirical risk."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.randomness import stream
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature.operators.derivative_check import check_loss_hessian
from noisekit.curvature.operators.output_space import OutputProduct, OutputSpaceOperator

_CONVEX_MODULES = (
    nn.CrossEntropyLoss,
    nn.MSELoss,
    nn.HuberLoss,
    nn.SmoothL1Loss,
    nn.BCEWithLogitsLoss,
)
_CONVEX_FUNCTIONS: tuple[object, ...] = (
    functional.cross_entropy,
    functional.mse_loss,
    functional.huber_loss,
    functional.smooth_l1_loss,
    functional.binary_cross_entropy_with_logits,
)
_POWER_ITERATIONS = 20


class GGNOperator(OutputSpaceOperator):
    r"""Products with the generalized Gauss-Newton matrix of the risk.

    .. math:: \sum_b c_b\, J_b^\top \frac{\partial^2 L_b}{\partial z^2} J_b / \sum_b c_b

    The Hessian without the curvature of the model: what remains where residuals
    vanish. It is positive semi-definite, since the loss is convex in the outputs
    ``z``; for cross-entropy of logits it is the Fisher matrix as well. Where the loss
    is one's own, convexity is tested on the first batch, at the model's outputs and
    near them.

    Raises:
        UsageError: On a product, if the model returns anything but one tensor, or if
            the loss is not convex, linear, or a function of more than the outputs.

    Source:
        Schraudolph 2002, "Fast curvature matrix-vector products for second-order
        gradient descent".

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> nk.GGNOperator(model, loss_fn, batches).to_dense()
        tensor([[1., 0.],
                [0., 4.]])
    """

    def _output_product(
        self, outputs: Tensor, batch: Batch, *, weight: float, index: int
    ) -> OutputProduct:
        return loss_hessian_product(self.risk, weight, outputs, batch[1])

    def _check_derivatives(self) -> None:
        super()._check_derivatives()
        if not _is_known_convex(self.risk.loss_fn):
            check_loss_hessian(self.risk, what=type(self).__name__)

    def _prepare(self) -> None:
        if _is_known_convex(self.risk.loss_fn):
            return
        with self._evaluating():
            weight, batch = next(self.risk.weighted_batches())
            outputs = self._outputs(batch).detach()
            # Away from where the model is, since a loss may be flat at a fit.
            drawn = torch.randn(outputs.shape, generator=stream(0, "outputs"))
            elsewhere = outputs + drawn.to(outputs.device, outputs.dtype)
            for point in (elsewhere, outputs):
                product = loss_hessian_product(self.risk, weight, point, batch[1])
                lowest, highest = _extreme_quotients(product, point)
                if point is elsewhere and highest == 0.0:
                    raise _linear_loss(self.risk.loss_fn)
                if lowest < -(torch.finfo(point.dtype).eps ** 0.5) * highest:
                    raise UsageError(
                        "Gauss-Newton needs a loss that is convex in the model's "
                        f"outputs, got curvature {lowest:.3g} along one direction for "
                        "the first batch; use HessianOperator for this loss."
                    )


def loss_hessian_product(
    risk: EmpiricalRisk,
    weight: float,
    outputs: Tensor,
    targets: Any,  # whatever the loss takes
) -> OutputProduct:
    """Return the product with the loss's Hessian in the outputs, times ``weight``.

    Raises:
        UsageError: If the loss is linear in the outputs, or depends on parameters
            otherwise than through them.
    """
    if risk.loss_at(outputs, targets).requires_grad:
        raise UsageError(
            "Gauss-Newton needs a loss that is a function of outputs and targets, got "
            "one that uses parameters besides, such as a penalty on weights; leave "
            "that out and pass weight_decay=."
        )
    point = outputs.clone().requires_grad_()
    loss = weight * risk.loss_at(point, targets)
    (slope,) = torch.autograd.grad(loss, point, create_graph=True)
    if not slope.requires_grad:
        raise _linear_loss(risk.loss_fn)

    def product(tangent: Tensor) -> Tensor:
        (curved,) = torch.autograd.grad(
            slope, point, tangent, retain_graph=True, materialize_grads=True
        )
        return curved

    return product


def _is_known_convex(loss_fn: object) -> bool:
    known = any(loss_fn is function for function in _CONVEX_FUNCTIONS)
    return known or isinstance(loss_fn, _CONVEX_MODULES)


def _extreme_quotients(product: OutputProduct, like: Tensor) -> tuple[float, float]:
    """Lowest curvature found, and largest magnitude, by two power iterations."""
    drawn = torch.randn(like.shape, generator=stream(0, "convexity"))
    start = drawn.to(like.device, like.dtype)

    def dominant(shift: float) -> float:
        vector, value = start / start.norm(), 0.0
        for _ in range(_POWER_ITERATIONS):
            image = product(vector) - shift * vector
            value = float((vector * image).sum())
            vector = image / image.norm().clamp_min(torch.finfo(image.dtype).tiny)
        return value

    largest = dominant(0.0)
    other = dominant(abs(largest)) + abs(largest)
    return min(largest, other), abs(largest)


def _linear_loss(loss_fn: object) -> UsageError:
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return UsageError(
        "Gauss-Newton needs a loss that curves in the model's outputs, got one that is "
        f"linear in them ({name}), whose matrix is zero; let the model return logits "
        "and use cross-entropy."
    )

"""Operators in other coordinates: scaled by the weights, or by Adam's steps."""

from collections.abc import Callable
from typing import Annotated

from torch import Tensor
from torch.optim import Adam, AdamW

from noisekit.core.arguments import checked
from noisekit.core.errors import UsageError
from noisekit.core.params import flatten
from noisekit.core.settings import Hint
from noisekit.curvature.operators.operator import (
    SymmetricOperator,
    TransformedOperator,
)
from noisekit.curvature.operators.risk_operator import RiskOperator


class ScaledOperator(TransformedOperator):
    r"""``D A D`` with a diagonal ``D``, which is read again at each product.

    Attributes:
        operator: ``A``.
    """

    def __init__(
        self, operator: SymmetricOperator, scales: Tensor | Callable[[], Tensor]
    ) -> None:
        """Take the diagonal, or what returns it.

        Args:
            operator: ``A``.
            scales: The diagonal of ``D``, ``(P,)``, or a function that returns it.

        Raises:
            UsageError: If it has another length.
        """
        self.operator = operator
        self._scales: Callable[[], Tensor] = (
            (lambda: scales) if isinstance(scales, Tensor) else scales
        )
        shape = self._scales().shape
        if shape != operator.shape[:1]:
            raise UsageError(
                f"scales needs shape ({operator.shape[0]},), got {tuple(shape)}; build "
                "it from the same parameters as the operator."
            )

    def _matmat(self, block: Tensor) -> Tensor:
        scales = self._scales().to(self.device, self.dtype).unsqueeze(1)
        return scales * (self.operator @ (scales * block))


@checked
def weight_scaled(operator: RiskOperator) -> ScaledOperator:
    r"""Return ``|w| H |w|``, invariant to rescaling of a layer's neurons.

    Where one layer's weights are multiplied by a factor and the next layer's divided
    by it, so that the function stays, this matrix and its eigenvalues stay as well.
    It follows the weights.

    Args:
        operator: ``H``, of a risk whose parameters are ``w``.

    Returns:
        The scaled operator, whose products cost the same.

    Source:
        Kwon et al. 2021, arXiv:2102.11600, section 3.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> nk.weight_scaled(nk.HessianOperator(model, loss_fn, batches)).to_dense()
        tensor([[ 9.,  0.],
                [ 0., 36.]])
    """
    return ScaledOperator(operator, lambda: operator.risk.vector().abs())


_OTHERS = Hint(advice="give another optimizer's diagonal to ScaledOperator")


@checked
def adam_preconditioned(
    operator: RiskOperator, optimizer: Annotated[Adam | AdamW, _OTHERS]
) -> ScaledOperator:
    r"""Return ``P^{-1/2} H P^{-1/2}`` with Adam's preconditioner at its present state.

    .. math:: P = (1 - \beta_1^t) \left( \operatorname{diag}
              \sqrt{\frac{v}{1 - \beta_2^t}} + \epsilon I \right)

    so that a step is ``lr`` times the inverse of ``P`` times the running mean of
    gradients. The largest eigenvalue is that of ``P^{-1} H``, the preconditioned
    sharpness: training by Adam settles where it is :math:`(2 + 2\beta_1) / ((1 -
    \beta_1)\, lr)`.

    Args:
        operator: ``H``, of a risk whose parameters the optimizer moves.
        optimizer: Adam or AdamW, after at least one step; followed as it moves on.

    Raises:
        UsageError: If it is another optimizer, misses a parameter, or took no step.

    Source:
        Cohen et al. 2022, arXiv:2207.14484, section 2.
    """
    return ScaledOperator(operator, lambda: _inverse_roots(operator, optimizer))


def _inverse_roots(
    operator: RiskOperator, optimizer: Annotated[Adam | AdamW, _OTHERS]
) -> Tensor:
    """The diagonal of ``P^{-1/2}`` for the operator's parameters."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    risk, parts = operator.risk, []
    for name, parameter in zip(risk.layout.names, risk.parameters, strict=True):
        group, state = groups.get(id(parameter)), optimizer.state.get(parameter)
        if group is None or not state:
            what = "does not hold" if group is None else "has taken no step for"
            raise UsageError(
                "Adam's preconditioner needs the state of every chosen parameter, got "
                f"an optimizer that {what} {name!r}; choose others with params=, or "
                "train for a step first."
            )
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        largest = group["amsgrad"]
        second = state["max_exp_avg_sq" if largest else "exp_avg_sq"]
        root = (second.to(risk.layout.dtype) / (1 - beta2**step)).sqrt()
        scale = (1 - beta1**step) * (root + group["eps"])
        parts.append(scale.rsqrt())
    return flatten(parts)

"""Up to which curvature an optimizer's steps are stable, in PyTorch's convention."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from noisekit.core.arguments import checked
from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate
from noisekit.core.settings import Positive, PositiveInt
from noisekit.sharpness.measurement import (
    Detail,
    Measure,
    Measurement,
    MeasurementContext,
)
from noisekit.sharpness.measures.eigenvalues import LambdaMax
from noisekit.sharpness.sgd_rule import SGDRule, check_steps_of_mean

StabilityKind = Literal["full_batch", "small_batch"]


@dataclass(frozen=True, kw_only=True)
class EdgeOfStability(Measure):
    """Settings of :func:`edge_of_stability_ratio` of the largest eigenvalue.

    Attributes:
        tol: Wanted relative accuracy of the eigenvalue.
        max_matvecs: Most Hessian-vector products to spend on it.
    """

    name = "edge_of_stability_ratio"
    description = (
        "the largest Hessian eigenvalue over the stability threshold of the update rule"
    )
    needs = "the update rule of SGD"
    sources = ("cohen2021gradient",)

    tol: Positive = LambdaMax.tol
    max_matvecs: PositiveInt | None = LambdaMax.max_matvecs

    def cost(self) -> int:
        """Return the cost of the eigenvalue, which it shares with ``lambda_max``."""
        return self._eigenvalue.cost()

    def typical_cost(self) -> int:
        """Return what the eigenvalue usually costs."""
        return self._eigenvalue.typical_cost()

    @property
    def _eigenvalue(self) -> LambdaMax:
        return LambdaMax(tol=self.tol, max_matvecs=self.max_matvecs)

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the largest eigenvalue over the threshold of stability."""
        rule = _rule_of(context)
        threshold = stability_threshold(rule)
        if context.known_lambda_max is None:
            top, error = context.eigenvalue(
                "LA", tol=self.tol, max_matvecs=self.max_matvecs
            )
        else:
            top, error = replace(context.known_lambda_max, num_matvecs=0), None
        detail: Detail = {
            "learning_rate": rule.lr,
            "momentum": rule.momentum,
            "nesterov": rule.nesterov,
            "threshold": threshold,
        }
        yield self.measured(
            edge_of_stability_ratio(top, rule),
            detail=detail,
            data_stderr=None if error is None else error / threshold,
        )


def _rule_of(context: MeasurementContext) -> SGDRule:
    """The update rule that the model is trained with.

    Raises:
        UsageError: If there is none, it is not SGD's, or it steps on a sum.
    """
    if context.update_rule is None:
        raise UsageError(
            "a stability threshold needs the update rule of SGD, got none; pass "
            "optimizer= with a torch.optim.SGD or an SGDRule(lr=...)."
        )
    if isinstance(context.update_rule, SGDRule):
        return context.update_rule
    check_steps_of_mean(context.risk.reduction)
    return SGDRule.of(context.update_rule)


@checked
def stability_threshold(
    rule: SGDRule | torch.optim.Optimizer, *, kind: StabilityKind = "full_batch"
) -> float:
    r"""Return the curvature of the loss above which steps are unstable [loss/param²].

    On a quadratic of curvature ``h`` with exact gradients, where :math:`\beta` is the
    momentum, :math:`\tau` the dampening and :math:`\lambda` the weight decay, the
    update is stable up to

    .. math:: h + \lambda = \frac{2}{\eta}, \quad
              \frac{2 (1 + \beta)}{(1 - \tau)\, \eta}, \quad
              \frac{2 (1 + \beta)}{(1 + 2 \beta)\, \eta}

    for plain SGD, heavy ball and Nesterov (``kind="full_batch"``); compare
    ``lambda_max`` with it. Of small batches a velocity is the sum of many unlike
    gradients, and batch sharpness settles where steps of the effective rate
    :math:`\eta (1 - \tau) / (1 - \beta)` would: at :math:`2 (1 - \beta) / ((1 - \tau)
    \eta)`, with or without Nesterov (``kind="small_batch"``). That is a finding in the
    small-batch regime, not a bound.

    Args:
        rule: An ``SGDRule``, or a ``torch.optim.SGD`` with one rule for all groups.
        kind: ``"full_batch"`` or ``"small_batch"``.

    Raises:
        UsageError: If ``kind`` is unknown, or the optimizer's threshold is.

    Source:
        Cohen et al. 2021, arXiv:2103.00065, for full batches; Andreyev et al. 2026,
        arXiv:2604.14108, for small ones.

    Example:
        >>> nk.stability_threshold(nk.SGDRule(lr=0.1))
        20.0
        >>> round(nk.stability_threshold(nk.SGDRule(lr=0.1, momentum=0.9)), 6)
        38.0
    """
    if kind not in get_args(StabilityKind):
        raise UsageError(
            f"kind needs to be 'full_batch' or 'small_batch', got {kind!r}."
        )
    sgd = rule if isinstance(rule, SGDRule) else SGDRule.of(rule)
    beta = sgd.momentum
    gain = 1 - sgd.dampening if beta else 1.0
    if kind == "small_batch":
        limit = 2 * (1 - beta) / (gain * sgd.lr)
    elif sgd.nesterov:
        limit = 2 * (1 + beta) / ((1 + 2 * beta) * sgd.lr)
    else:
        limit = 2 * (1 + beta) / (gain * sgd.lr)
    return limit - sgd.weight_decay


@checked
def edge_of_stability_ratio(
    curvature: Estimate,
    rule: SGDRule | torch.optim.Optimizer,
    *,
    kind: StabilityKind = "full_batch",
) -> Estimate:
    r"""Return a curvature in units of the threshold: :math:`\eta \lambda_{\max} / 2`.

    Args:
        curvature: ``lambda_max``, or batch sharpness with ``kind="small_batch"``.
        rule: An ``SGDRule``, or a ``torch.optim.SGD`` with one rule for all groups.
        kind: Which threshold; see :func:`stability_threshold`.

    Returns:
        The ratio; it has the curvature's errors, in the same units.

    Raises:
        UsageError: If ``kind`` is unknown, or the optimizer's threshold is.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> curvature = nk.lambda_max(model, loss_fn, batches)
        >>> ratio = nk.edge_of_stability_ratio(curvature, nk.SGDRule(lr=0.4))
        >>> round(float(ratio), 4)  # 0.4 * 4 / 2: steps of gradient descent are stable
        0.8
    """
    unit = 1 / stability_threshold(rule, kind=kind)
    return replace(
        curvature,
        value=unit * curvature.value,
        stderr=None if curvature.stderr is None else unit * curvature.stderr,
        bound=None if curvature.bound is None else unit * curvature.bound,
        ratio=None,
    )

"""Up to which curvature an optimiser's steps are stable, in PyTorch's convention."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate

StabilityKind = Literal["full_batch", "small_batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SGDRule:
    """The update rule of ``torch.optim.SGD``.

    ``v = momentum v + (1 - dampening) g``; the step is ``lr v``, or
    ``lr (g + momentum v)`` by Nesterov. ``g`` includes ``weight_decay w``.

    Attributes:
        lr: Learning rate.
        momentum: Share of the velocity that is kept.
        dampening: What the gradient's part in the velocity lacks.
        nesterov: Whether the step looks ahead.
        weight_decay: Coefficient of the L2 penalty.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what PyTorch refuses, and what is never stable."""
        if not self.lr > 0:
            raise UsageError(f"lr needs to be positive, got {self.lr}.")
        if not 0 <= self.momentum < 1 or not 0 <= self.dampening < 1:
            raise UsageError(
                "momentum and dampening need to be from 0 to below 1, got "
                f"{self.momentum} and {self.dampening}."
            )
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise UsageError(
                "nesterov needs momentum above 0 and no dampening, got "
                f"{self.momentum} and {self.dampening}."
            )

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "SGDRule":
        """Return the rule of an optimiser.

        Raises:
            UsageError: If it is not SGD, maximises, or its groups have different rules.
        """
        if not isinstance(optimizer, torch.optim.SGD):
            raise UsageError(
                "stability thresholds are known for torch.optim.SGD, got "
                f"{type(optimizer).__name__}, whose steps depend on the history of "
                "every weight."
            )
        rules = {cls._of_group(group) for group in optimizer.param_groups}
        if len(rules) > 1:
            raise UsageError(
                f"one threshold needs one update rule, got {len(rules)} different "
                "parameter groups; ask for each with SGDRule(lr=..., ...)."
            )
        if any(group["maximize"] for group in optimizer.param_groups):
            raise UsageError(
                "a threshold needs a loss that is minimised, got maximize."
            )
        return rules.pop()

    @classmethod
    def _of_group(cls, group: dict[str, float]) -> "SGDRule":
        names = ("lr", "momentum", "dampening", "weight_decay")
        values = {name: float(group[name]) for name in names}
        # Without momentum PyTorch ignores dampening.
        damped = values["dampening"] if values["momentum"] else 0.0
        return cls(
            lr=values["lr"],
            momentum=values["momentum"],
            dampening=damped,
            nesterov=bool(group["nesterov"]),
            weight_decay=values["weight_decay"],
        )


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
        UsageError: If ``kind`` is unknown, or the optimiser's threshold is.

    Source:
        Cohen et al. 2021, arXiv:2103.00065, for full batches; Andreyev et al. 2026,
        arXiv:2604.14108, for small ones.
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


def refuse_steps_of_sum(reduction: str) -> None:
    """Refuse an optimiser's own rate where it acts on the sum over a batch.

    Args:
        reduction: Of the loss; curvatures are those of its mean over examples.

    Raises:
        UsageError: If it is ``"sum"``.
    """
    if reduction == "sum":
        raise UsageError(
            "a stability threshold in units of the mean loss needs the rate of its "
            "steps, got a sum loss, whose steps grow with the batch; pass "
            "SGDRule(lr=rate * n, weight_decay=decay / n), n the examples of a step, "
            "to measure or edge_of_stability_ratio; a tracker goes without optimizer=."
        )


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
        UsageError: If ``kind`` is unknown, or the optimiser's threshold is.
    """
    unit = 1 / stability_threshold(rule, kind=kind)
    return replace(
        curvature,
        value=unit * curvature.value,
        stderr=None if curvature.stderr is None else unit * curvature.stderr,
        bound=None if curvature.bound is None else unit * curvature.bound,
        ratio=None,
    )

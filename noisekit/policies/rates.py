"""Learning rates and betas that go with a batch size, set in an optimizer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.errors import UsageError
from noisekit.core.settings import PositiveInt, check_settings
from noisekit.policies.policy import Decision

_BASE_RATE, _BASE_BETAS, _SET_RATE = "policy_base_lr", "policy_base_betas", "policy_lr"
"""Keys in param groups, so that an optimizer's state_dict carries them."""


@dataclass(frozen=True, kw_only=True)
class RateRule:
    r"""How learning rate and betas follow the batch size ``m``.

    Attributes:
        scaling: ``"linear"``: rate times ``m / reference_batch``; ``"sqrt"``: its root;
            ``"none"``; or ``"auto"``: linear for SGD, square root for Adam and AdamW,
            and an error for any other optimizer, for which the rule has to be stated.
        reference_batch: The batch size that the base rate is meant for.
        half_life: Whether betas are raised to the power ``m / reference_batch``: their
            averages then keep their half-life in examples.

    Source:
        Linear: Goyal et al. 2017, arXiv:1706.02677. Square root: Malladi et al. 2022,
        arXiv:2205.10287. Half-life: Marek et al. 2025, arXiv:2507.07101.

    Example:
        >>> import noisekit as nk
        >>> rule = nk.RateRule(reference_batch=128, scaling="sqrt")
        >>> rule.applied(nk.Decision(512)).rate_factor
        2.0
    """

    reference_batch: PositiveInt
    scaling: Literal["auto", "linear", "sqrt", "none"] = "auto"
    half_life: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self)

    def for_optimizer(self, optimizer: torch.optim.Optimizer) -> "RateRule":
        """Return the rule with ``"auto"`` resolved.

        Raises:
            UsageError: If the optimizer has no customary rule.
        """
        if self.scaling != "auto":
            return self
        if isinstance(optimizer, torch.optim.SGD):
            return replace(self, scaling="linear")
        if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            return replace(self, scaling="sqrt")
        raise UsageError(
            "scaling='auto' needs SGD (linear) or Adam and AdamW (square root), got "
            f"{type(optimizer).__name__}, for which no rule is customary; state "
            "scaling='linear', 'sqrt' or 'none'."
        )

    def applied(self, decision: Decision) -> Decision:
        """Return the decision with rate and betas scaled by its batch size.

        Raises:
            UsageError: If ``scaling`` is still ``"auto"``.
        """
        if self.scaling == "auto":
            raise UsageError(
                "scaling='auto' needs an optimizer; use for_optimizer() first, or "
                "state scaling='linear', 'sqrt' or 'none'."
            )
        ratio = decision.batch_size / self.reference_batch
        scale = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.scaling]
        power = ratio if self.half_life else 1.0
        return replace(
            decision,
            rate_factor=decision.rate_factor * scale,
            beta_factor=decision.beta_factor * power,
        )


@checked
def apply_rate(
    optimizer: torch.optim.Optimizer,
    decision: Decision,
    *,
    rule: RateRule | None = None,
    base: float | Sequence[float] | None = None,
) -> list[float]:
    """Set the learning rates and betas that a decision asks for.

    Every group's rate is its base rate times ``rate_factor``, and its betas are the
    base ones raised to ``beta_factor``. Base values are those that the optimizer has at
    the first call; they are kept in its param groups, so that its ``state_dict``
    carries them.

    Args:
        optimizer: Whose groups to set.
        decision: What the policy decided for the update to come.
        rule: How the rate follows the batch size besides; by default only the
            decision's own factors count.
        base: Base rate, or one per group, such as your own schedule's at this update.

    Returns:
        The rates of the groups.

    Raises:
        UsageError: If something else, such as a scheduler, changed a rate since the
            last call and no ``base`` is given; the rule does not know the optimizer;
            or betas are to change and there are none.

    Example:
        >>> import torch
        >>> import noisekit as nk
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> nk.apply_rate(optimizer, nk.Decision(256, rate_factor=0.75))
        [0.07500000000000001]
    """
    if rule is not None:
        decision = rule.for_optimizer(optimizer).applied(decision)
    groups = optimizer.param_groups
    bases = _bases(groups, base)
    if decision.beta_factor != 1.0 and any("betas" not in group for group in groups):
        raise UsageError(
            f"beta_factor={decision.beta_factor:g} needs an optimizer with betas, got "
            f"{type(optimizer).__name__}; leave half_life=False."
        )
    for group, own in zip(groups, bases, strict=True):
        group[_BASE_RATE] = own
        rate = own * decision.rate_factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        group[_SET_RATE] = float(group["lr"])
        if "betas" in group:
            kept = group.setdefault(_BASE_BETAS, tuple(map(float, group["betas"])))
            if decision.beta_factor != 1.0 or group["betas"] != kept:
                group["betas"] = tuple(b**decision.beta_factor for b in kept)
    return [group[_SET_RATE] for group in groups]


def _bases(
    groups: Sequence[dict[str, Any]], base: float | Sequence[float] | None
) -> list[float]:
    """The base rate of every group."""
    if base is not None:
        given = list(base) if isinstance(base, Sequence) else [base] * len(groups)
        if len(given) != len(groups):
            raise UsageError(
                f"base needs one rate per param group, of which there are "
                f"{len(groups)}, got {len(given)}."
            )
        return [float(rate) for rate in given]
    for number, group in enumerate(groups):
        last = group.get(_SET_RATE)
        if last is not None and float(group["lr"]) != last:
            raise UsageError(
                f"apply_rate needs to be alone in setting rates, got lr="
                f"{float(group['lr']):g} in group {number} where it had set {last:g}: "
                "a scheduler's rates would be multiplied by the factor twice. Compute "
                "the schedule's rate yourself and pass it as base=."
            )
    return [float(group.get(_BASE_RATE, group["lr"])) for group in groups]

"""CABS: the batch size coupled to learning rate, gradient variance and loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from noisekit.core.errors import UsageError
from noisekit.core.settings import NonNegative, Positive
from noisekit.policies.adaptive import Adaptive, Smoothing, Wanted, averaged
from noisekit.policies.policy import Need, Observation, State


@dataclass(frozen=True, kw_only=True)
class CABS(Adaptive):
    r"""Coupled adaptive batch size, as in the authors' program.

    .. math:: m_{t+1} = \mathrm{clip}\Big(\mathrm{round}\Big(c\,
        \frac{\eta\, \bar\xi_t}{\bar F_t + \epsilon}\Big), m_{min}, m_{max}\Big), \quad
        \xi_t = \frac{m_t - 1}{m_t}\, \mathrm{tr}\,\Sigma_t

    Averages are exponential, start at ``ξ = 0`` and ``F = 1`` and have no bias
    correction; the variance is the biased one, so that at ``m = 2`` the rule asks for
    half. Rounding is half to even, before clipping. The rate is that of the update
    whose reading is used.

    The rule is the maximum of a bound on the expected gain per example for SGD without
    momentum on a loss whose minimum is 0. With weight decay, or where the data are
    fitted exactly, ``F`` falls to 0 and the rule goes to ``max``.

    Several programs call another rule by this name, a threshold on the gradient's
    relative noise, which has nothing to do with ``η tr Σ / F``.

    Attributes:
        batch_size: Examples of the first update; ``min`` by default.
        min: Smallest batch size, at least 2.
        max: Largest batch size.
        smoothing: Weight of the past in both averages.
        c: Constant factor.
        eps: Added to the loss.
        moments: ``"exact"``, or ``"conv_compat"``: with the second moment of
            convolutions summed position by position, as in the authors' program, which
            drops products of two positions.
        momentum: ``"refuse"`` an optimizer with momentum, or ``"ignore"`` that the rule
            has none: with heavy ball the noise is that of the rate ``η / (1 - β)``.
        hysteresis: A change smaller than this share of the present size is not made.

    Source:
        Balles, Romero and Hennig 2017, arXiv:1612.05086.

    Example:
        >>> import noisekit as nk
        >>> policy = nk.CABS()
        >>> seen = nk.Observation(
        ...     updates=1, batch_size=16, learning_rate=0.1, loss=2.0,
        ...     variance_trace=4000 * 16 / 15)
        >>> state, decision = policy.next(policy.start(), seen)
        >>> decision
        Decision(batch_size=19, rate_factor=1.0, beta_factor=1.0, reason='19.05')
    """

    name = "cabs"
    rule = (
        "m = clip(round(c rate xi / (F + eps)), min, max), xi and F averages of the "
        "biased gradient variance and of the batch loss, started at 0 and 1"
    )
    sources = ("balles2017coupling",)
    refuses = (
        "momentum, unless momentum='ignore': the derivation has none, and noise "
        "counts rate / (1 - momentum) with it",
        "losses whose minimum is not 0, such as ones below zero: the size is held",
        "a batch of 1: its variance is unknown",
    )

    smoothing: Smoothing = 0.95
    c: Positive = 1.0
    eps: NonNegative = 0.0
    moments: Literal["exact", "conv_compat"] = "exact"
    momentum: Literal["refuse", "ignore"] = "refuse"

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse all but SGD, and its momentum unless that is to be ignored.

        Raises:
            UsageError: If the rule is not about this optimizer.
        """
        if not isinstance(optimizer, torch.optim.SGD):
            raise UsageError(
                "CABS needs torch.optim.SGD, whose learning rate the rule is about, "
                f"got {type(optimizer).__name__}; use NoiseScaleTarget or NormTest."
            )
        momentum = max(group["momentum"] for group in optimizer.param_groups)
        if momentum and self.momentum == "refuse":
            raise UsageError(
                f"CABS needs SGD without momentum, got momentum={momentum:g}: noise "
                "counts rate / (1 - momentum) with it, which the rule leaves out. Pass "
                "momentum='ignore' to use the rule as it stands."
            )

    @property
    def needs(self) -> tuple[Need, ...]:
        """Rate, loss and variance of every update."""
        return Need("learning_rate"), Need("loss"), Need(self._variance)

    @property
    def _variance(self) -> str:
        exact = self.moments == "exact"
        return "variance_trace" if exact else "conv_compat_variance"

    def memory(self) -> Mapping[str, Any]:
        """Return the averages' starts."""
        return {"variance": 0.0, "loss": 1.0}

    def wanted(self, memory: State, observation: Observation) -> Wanted:
        """Average variance and loss, and divide."""
        # All needs are there: the base class has seen to it.
        size, rate, loss = (
            float(observation.value(name) or 0.0)
            for name in ("batch_size", "learning_rate", "loss")
        )
        if size < 2:
            return Wanted(None, "the batch was of one example", {})
        variance = float(observation.value(self._variance) or 0.0)
        if self.moments == "exact":
            variance *= (size - 1) / size  # the biased one
        averages = {
            "variance": averaged(memory["variance"], variance, self.smoothing),
            "loss": averaged(memory["loss"], loss, self.smoothing),
        }
        below, above = averages["loss"] + self.eps, averages["variance"]
        if below < 0 or (below == 0 and above == 0):
            return Wanted(None, f"the average loss is {below:.4g}", averages)
        raw = self.c * rate * above / below if below > 0 else float("inf")
        return Wanted(raw, f"{raw:.4g}", averages)

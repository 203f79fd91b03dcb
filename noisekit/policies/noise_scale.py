"""Policies that follow the noise scale, or the gradient norm without its noise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt, Lt

from noisekit.core.settings import NonNegative, Positive, PositiveInt
from noisekit.policies.adaptive import AtIntervals, Smoothing, Wanted, averaged
from noisekit.policies.policy import Decision, Need, Observation, State

NUM_READINGS = 20
"""Readings before the first change: one step's noise scale is known to no digit."""


@dataclass(frozen=True, kw_only=True)
class NoiseScaleTarget(AtIntervals):
    r"""Keep the batch at a multiple of the simple noise scale.

    .. math:: m = \mathrm{ratio} \cdot \frac{\overline{\mathrm{tr}\,\Sigma}}
        {\overline{|G|^2}}

    Both parts are averaged before they are divided. Where the average ``|G|²`` is not
    positive, noise hides the signal and the size is held.

    At a batch of the noise scale itself, training needs about twice the fewest updates
    and twice the fewest examples (McCandlish 2018). For language models trained with
    Adam, Merrill et al. 2025 (arXiv:2505.23971) found the noise scale orders of
    magnitude below the critical batch size measured by branching, with another trend.

    Attributes:
        ratio: Batch size over noise scale.
        batch_size: Examples of the first update; ``min`` by default.
        min: Smallest batch size, at least 2.
        max: Largest batch size.
        smoothing: Weight of the past in both averages.
        min_readings: Readings before the first change.
        every: Interval between readings.
        hysteresis: A change smaller than this share of the present size is not made.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> import noisekit as nk
        >>> policy = nk.NoiseScaleTarget(min_readings=1, smoothing=0.0)
        >>> seen = nk.Observation(
        ...     updates=1, batch_size=16, variance_trace=40.0,
        ...     debiased_grad_sq_norm=1.0)
        >>> policy.next(policy.start(), seen)[1].batch_size
        40
    """

    name = "noise_scale"
    rule = "m = clip(round(ratio tr Sigma / |G|^2), min, max), both parts averaged"
    sources = ("mccandlish2018empirical",)
    refuses = (
        "Adam language models: the noise scale was found orders of magnitude below "
        "the critical batch size there (Merrill et al. 2025, arXiv:2505.23971)",
        "a signal that noise hides (average |G|^2 not positive): the size is held",
        "networks with BatchNorm, whose examples have no gradients of their own",
    )

    ratio: Positive = 1.0
    smoothing: Smoothing = 0.95
    min_readings: PositiveInt = NUM_READINGS
    hysteresis: NonNegative = 0.05

    @property
    def needs(self) -> tuple[Need, ...]:
        """Both parts of the noise scale."""
        return (
            Need("variance_trace", self.every),
            Need("debiased_grad_sq_norm", self.every),
        )

    def memory(self) -> Mapping[str, Any]:
        """Return the averages, and how many readings they hold."""
        return {"variance": 0.0, "signal": 0.0, "readings": 0}

    def wanted(self, memory: State, observation: Observation) -> Wanted:
        """Average both parts, and divide."""
        trace = float(observation.variance_trace or 0.0)
        norm = float(observation.debiased_grad_sq_norm or 0.0)
        # Both start at 0: what that takes away cancels in the ratio.
        new = {
            "variance": averaged(memory["variance"], trace, self.smoothing),
            "signal": averaged(memory["signal"], norm, self.smoothing),
            "readings": memory["readings"] + 1,
        }
        if new["readings"] < self.min_readings:
            size = float(memory["batch_size"])
            return Wanted(size, f"reading {new['readings']}", new)
        if new["signal"] <= 0:
            return Wanted(None, "noise hides the signal, |G|^2 <= 0", new)
        scale = new["variance"] / new["signal"]
        return Wanted(self.ratio * scale, f"noise scale {scale:.4g}", new)


@dataclass(frozen=True, kw_only=True)
class GradientThreshold(AtIntervals):
    r"""Grow the batch each time the full gradient's squared norm has fallen.

    After the ``k``-th time that the average ``|G|²`` fell to ``fall`` of what it was at
    the last change, the batch is ``m_0 factor^k`` and the rate ``rate^k`` of its base.
    The critical batch size of SGD's oracle complexity goes as ``1 / |G|²``, hence
    the default: the batch doubles where the squared norm halves. The paper's own
    thresholds and stages are not reproduced.

    Attributes:
        factor: Of the batch size, at each change.
        fall: Share of the last level at which the next change comes.
        rate: Factor of the learning rate at each change.
        batch_size: ``m_0``, examples of the first update; ``min`` by default.
        min: Smallest batch size, at least 2.
        max: Largest batch size.
        smoothing: Weight of the past in the average.
        min_readings: Readings of the average before the first level is taken.
        every: Interval between readings.
        hysteresis: A change smaller than this share of the present size is not made.

    Source:
        After Umeda and Iiduka 2025, arXiv:2508.05302, simplified.
    """

    name = "gradient_threshold"
    rule = (
        "m = min(m0 factor^k, max), rate = rate0 rate^k, after |G|^2 fell k times to "
        "the share fall of its level at the last change"
    )
    sources = ("umeda2025adaptive",)
    refuses = (
        "to be the paper's schedule: its stages and thresholds are not reproduced",
        "networks with BatchNorm, whose examples have no gradients of their own",
    )

    factor: Annotated[float, Gt(1)] = 2.0
    fall: Annotated[float, Gt(0), Lt(1)] = 0.5
    rate: Positive = 1.0
    smoothing: Smoothing = 0.95
    min_readings: PositiveInt = NUM_READINGS

    @property
    def needs(self) -> tuple[Need, ...]:
        """The squared gradient norm without its noise."""
        return (Need("debiased_grad_sq_norm", self.every),)

    def memory(self) -> Mapping[str, Any]:
        """Return the average and its weight, the last level and the changes so far."""
        return {
            "signal": 0.0,
            "weight": 0.0,
            "readings": 0,
            "level": None,
            "changes": 0,
        }

    def wanted(self, memory: State, observation: Observation) -> Wanted:
        """Average the squared norm and compare it with the level."""
        norm = float(observation.debiased_grad_sq_norm or 0.0)
        new: dict[str, Any] = {
            "signal": averaged(memory["signal"], norm, self.smoothing),
            "weight": averaged(memory["weight"], 1.0, self.smoothing),
            "readings": memory["readings"] + 1,
        }
        average = new["signal"] / new["weight"]
        level, changes = memory["level"], memory["changes"]
        text = f"|G|^2 = {average:.4g}"
        if new["readings"] >= self.min_readings:
            if average <= 0:
                return Wanted(None, f"noise hides the signal, {text}", new)
            if level is None or average <= self.fall * level:
                changes += level is not None
                new |= {"level": average, "changes": changes}
        enough = math.ceil(math.log(self.max / self.first_size, self.factor)) + 1
        size = self.first_size * self.factor ** min(changes, enough)
        return Wanted(size, f"{text}, {changes} changes so far", new)

    def decision(self, state: State, reason: str) -> Decision:
        """Return the size with the rate that goes with it."""
        rate = self.rate ** state["changes"]
        return Decision(state["batch_size"], rate, reason=reason)

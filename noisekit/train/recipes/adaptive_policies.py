"""Batch policies of recipes that follow readings of gradient noise, or losses."""

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from noisekit import policies
from noisekit.noise.criteria import NORM_LIMIT
from noisekit.policies import Policy
from noisekit.train.recipes.points import Length, Point
from noisekit.train.recipes.policy_section import (
    BatchPolicySection,
    BatchSize,
    point_of,
)
from noisekit.train.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    kind_of,
)


class _Adaptive(BatchPolicySection):
    """A policy that follows readings of gradient noise, or losses.

    Training begins with ``training.batch_size``.

    Attributes:
        min: Smallest batch; ``training.batch_size`` if left out.
        max: Largest batch.
        hysteresis: A change smaller than this share of the present size is not made.
    """

    min: BatchSize | None = None
    max: BatchSize
    hysteresis: NonNegativeFloat = 0.0

    _policy: ClassVar[type[policies.Adaptive]]

    def build(self, batch_size: int) -> Policy:
        """Return the policy with the section's settings."""
        settings = {
            key: getattr(self, key) for key in type(self).model_fields if key != "name"
        }
        if "every" in settings:
            settings["every"] = point_of(settings["every"])
        settings["min"] = batch_size if self.min is None else self.min
        return self._policy(batch_size=batch_size, **settings)


class _AtIntervals(_Adaptive):
    """A policy that decides now and then.

    Attributes:
        every: From one decision to the next.
    """

    every: Length = Point(updates=1)


class CabsBatch(_Adaptive):
    """CABS: learning rate times gradient variance over the loss.

    Attributes:
        smoothing: Weight of the past in its averages.
        c: Constant factor.
        eps: Added to the loss.
        moments: ``exact``, or as the authors' program has it of convolutions.
        momentum: ``refuse`` an optimizer with momentum, or ``ignore`` it.
    """

    name: Literal["cabs"] = "cabs"
    smoothing: Fraction = 0.95
    c: PositiveFloat = 1.0
    eps: NonNegativeFloat = 0.0
    moments: Literal["exact", "conv_compat"] = "exact"
    momentum: Literal["refuse", "ignore"] = "refuse"

    _policy = policies.CABS


class NormTestBatch(_AtIntervals):
    """Grow where the norm test of the gradient fails.

    Attributes:
        theta: Largest relative sampling error.
        population_size: Examples that batches are drawn from; unlimited if left out.
        smoothing: Weight of the past in its averages.
    """

    name: Literal["norm_test"] = "norm_test"
    theta: PositiveFloat = NORM_LIMIT
    population_size: PositiveInt | None = None
    smoothing: Fraction = 0.0

    _policy = policies.NormTest


class InnerProductTestBatch(_AtIntervals):
    """Grow where the inner-product test of the gradient fails.

    Attributes:
        theta: Its limit.
        nu: Limit of the orthogonality test, which is left out by default.
    """

    name: Literal["inner_product_test"] = "inner_product_test"
    theta: PositiveFloat = NORM_LIMIT
    nu: PositiveFloat | None = None

    _policy = policies.InnerProductTest


class NoiseScaleBatch(_AtIntervals):
    """A multiple of the simple noise scale.

    Attributes:
        ratio: Batch size over noise scale.
        smoothing: Weight of the past in both parts' averages.
        min_readings: Readings before the first change.
    """

    name: Literal["noise_scale"] = "noise_scale"
    ratio: PositiveFloat = 1.0
    smoothing: Fraction = 0.95
    min_readings: PositiveInt = 20
    hysteresis: NonNegativeFloat = 0.05

    _policy = policies.NoiseScaleTarget


class GradientThresholdBatch(_AtIntervals):
    """Grow each time the squared gradient norm, without noise, has fallen.

    Attributes:
        factor: Of the batch, at each change.
        fall: Share of the last level at which the next change comes.
        rate: Factor of the learning rate at each change.
        smoothing: Weight of the past in the average.
        min_readings: Readings before the first level is taken.
    """

    name: Literal["gradient_threshold"] = "gradient_threshold"
    factor: Annotated[float, Field(gt=1, le=10**6)] = 2.0
    fall: Annotated[float, Field(gt=0, lt=1)] = 0.5
    rate: PositiveFloat = 1.0
    smoothing: Fraction = 0.95
    min_readings: PositiveInt = 20

    _policy = policies.GradientThreshold


class RelativeDecrease(Section):
    """The loss fell by less than the share ``below`` over ``window`` intervals."""

    name: Literal["relative_decrease"] = "relative_decrease"
    window: PositiveInt = 3
    below: NonNegativeFloat = 0.02

    def build(self) -> policies.StallCriterion:
        """Return the criterion."""
        return policies.RelativeDecrease(window=self.window, below=self.below)


class Progress(Section):
    """Prechelt's progress over ``window`` intervals is below ``below`` thousandths."""

    name: Literal["progress"] = "progress"
    window: PositiveInt = 5
    below: PositiveFloat = 0.1

    def build(self) -> policies.StallCriterion:
        """Return the criterion."""
        return policies.Progress(window=self.window, below=self.below)


CriterionSpec = Annotated[
    Annotated[RelativeDecrease, Tag("relative_decrease")]
    | Annotated[Progress, Tag("progress")],
    Discriminator(kind_of("relative_decrease")),
]


class KicksBatch(BatchPolicySection):
    """``training.batch_size``, and ``small`` for a while where the loss stalls.

    Attributes:
        small: Batch in a kick.
        length: Length of a kick.
        cooldown: Length of the pause after one.
        criterion: When the training loss counts as stalled.
        every: Interval that losses are averaged over.
        patience: Intervals in a row at whose end the criterion has to hold.
    """

    name: Literal["kicks"] = "kicks"
    small: BatchSize
    length: Length = Point(epochs=1)
    cooldown: Length = Point(epochs=3)
    criterion: CriterionSpec = RelativeDecrease()
    every: Length = Point(epochs=1)
    patience: PositiveInt = 1

    @property
    def at_epoch_ends(self) -> bool:
        """Whether the batch size changes at ends of epochs alone."""
        lengths = (self.length, self.cooldown, self.every)
        return all(length.epochs and length.epochs % 1 == 0 for length in lengths)

    def build(self, batch_size: int) -> Policy:
        """Return the policy."""
        return policies.Kicks(
            batch_size=batch_size,
            small=self.small,
            length=point_of(self.length),
            cooldown=point_of(self.cooldown),
            criterion=self.criterion.build(),
            every=point_of(self.every),
            patience=self.patience,
        )

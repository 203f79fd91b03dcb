"""The table of batch policies that a recipe may name."""

from typing import Annotated

from pydantic import Discriminator, Tag

from noisekit.core.errors import UsageError
from noisekit.core.references import resolve
from noisekit.policies import Policy
from noisekit.train.recipes.adaptive_policies import (
    CabsBatch,
    GradientThresholdBatch,
    InnerProductTestBatch,
    KicksBatch,
    NoiseScaleBatch,
    NormTestBatch,
)
from noisekit.train.recipes.policy_section import BatchPolicySection
from noisekit.train.recipes.scheduled_policies import (
    ConstantBatch,
    GrowthBatch,
    TableBatch,
)
from noisekit.train.section import OWN, OwnSection, kind_of


class OwnPolicy(OwnSection, BatchPolicySection, extra="allow"):
    """The user's own policy: ``module:Class``, called with the other keys."""

    def build(self, batch_size: int) -> Policy:
        """Call the class."""
        kind = resolve(self.name)
        made = kind(**self.arguments) if callable(kind) else kind
        if not isinstance(made, Policy):
            raise UsageError(
                f"batch_policy.name = {self.name!r} needs to return a "
                f"noisekit.Policy, got {type(made).__name__}."
            )
        return made

    def smallest(self, batch_size: int) -> int:
        """Return 1: to ask the policy would import it."""
        return 1


BatchPolicySpec = Annotated[
    Annotated[ConstantBatch, Tag("constant")]
    | Annotated[TableBatch, Tag("table")]
    | Annotated[GrowthBatch, Tag("growth")]
    | Annotated[CabsBatch, Tag("cabs")]
    | Annotated[NormTestBatch, Tag("norm_test")]
    | Annotated[InnerProductTestBatch, Tag("inner_product_test")]
    | Annotated[NoiseScaleBatch, Tag("noise_scale")]
    | Annotated[GradientThresholdBatch, Tag("gradient_threshold")]
    | Annotated[KicksBatch, Tag("kicks")]
    | Annotated[OwnPolicy, Tag(OWN)],
    Discriminator(kind_of("constant")),
]
"""The table of batch policies: a new one is a section with ``build``, and a line."""

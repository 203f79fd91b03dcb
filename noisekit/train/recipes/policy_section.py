"""What every batch policy of a recipe is: a section that builds the policy it names.

What a rule decides is in ``noisekit.policies``, which training loops of one's own use
as well; sections are how a recipe states it.
"""

from abc import abstractmethod
from typing import Annotated

from pydantic import Field

from noisekit.policies import At, Policy
from noisekit.train.recipes.points import Length
from noisekit.train.section import Section

BatchSize = Annotated[int, Field(ge=1, le=10**9)]


OF_READINGS = frozenset(
    {
        "variance_trace",
        "conv_compat_variance",
        "grad_sq_norm",
        "debiased_grad_sq_norm",
        "inner_product_test",
        "orthogonality_test",
    }
)
"""What policies observe that only a probe's reading tells."""


class BatchPolicySection(Section):
    """What decides the batch size of each update.

    Attributes:
        name: The policy.
    """

    name: str

    @abstractmethod
    def build(self, batch_size: int) -> Policy:
        """Return the policy.

        Args:
            batch_size: ``training.batch_size``.
        """

    def smallest(self, batch_size: int) -> int:
        """Return the smallest batch that the policy may ask for."""
        return self.build(batch_size).bounds()[0]


def point_of(length: Length) -> At:
    """Return a point in the terms of policies."""
    (unit,) = length.keys
    return At(**{unit: getattr(length, unit)})

"""The table of terms: each changes the gradient of an update."""

from typing import Annotated

from pydantic import Discriminator

from noisekit.train.gradients.adversarial import Adversarial
from noisekit.train.gradients.gradient_penalty import GradientPenalty
from noisekit.train.gradients.proximal import Proximal

TermSpec = Annotated[GradientPenalty | Adversarial | Proximal, Discriminator("kind")]
"""A new term is a section with ``addition``, in a file of its own, and a name here."""

"""The table of terms: each changes the gradient of an update."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Discriminator

from noisekit.train.gradients.adversarial import Adversarial
from noisekit.train.gradients.gradient_penalty import GradientPenalty
from noisekit.train.gradients.proximal import Proximal

TermSpec = Annotated[GradientPenalty | Adversarial | Proximal, Discriminator("kind")]
"""A new term is a section with ``addition``, in a file of its own, and a name here."""


def passes_per_update(terms: Iterable[TermSpec], *, several: bool) -> int:
    """Return how many forward and backward passes over its batch an update takes.

    Args:
        terms: Terms of the recipe.
        several: Whether a batch has several micro-batches.
    """
    passes, steps = 1, 1
    for term in terms:
        if isinstance(term, Proximal):
            steps = term.steps
        else:
            passes += term.num_passes(several=several)
    return passes * steps

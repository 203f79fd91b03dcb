"""Training on adversarial examples: the fast gradient sign method."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.train.data.update_batches import Microbatch
from noisekit.train.gradients.step import GradientStep
from noisekit.train.section import PositiveFloat, Section


class Adversarial(Section):
    r"""Mixes in the loss at :math:`x + \epsilon\,\mathrm{sign}(\nabla_x L)`.

    The loss becomes ``(1 - weight) L(x) + weight L(x')``. Each update takes two more
    forward and backward passes. Inputs are as the network sees them: where data are
    standardised, ``epsilon`` counts in standard deviations; nothing is clipped to a
    range.

    Attributes:
        weight: Share of the adversarial loss.
        epsilon: Size of the change of each input.

    Source:
        Goodfellow et al. 2015, arXiv:1412.6572, section 6, whose share is one half.
    """

    kind: Literal["adversarial"]
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    epsilon: PositiveFloat

    def num_passes(self, *, several: bool) -> int:
        """Return the passes beside the update's own."""
        return 2

    def addition(self, step: GradientStep) -> list[Tensor]:
        """Return what is added to the gradient, by parameter."""
        total = [torch.zeros_like(parameter) for parameter in step.parameters]
        for part in step.batch:
            adversarial = step.gradient(part, self._example(step, part))
            torch._foreach_add_(total, adversarial, alpha=self.weight * part.share)
        for addition, parameter in zip(total, step.parameters, strict=True):
            if parameter.grad is not None:
                addition.sub_(parameter.grad, alpha=self.weight)
        return total

    def _example(self, step: GradientStep, part: Microbatch) -> Tensor:
        if not part.inputs.is_floating_point():
            raise UsageError(
                "training.terms kind = 'adversarial' needs real inputs, got tokens; "
                "leave the term out."
            )
        inputs = part.inputs.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(step.loss(part, inputs), inputs)
        return part.inputs + self.epsilon * slope.sign()

"""A penalty on the squared norm of the gradient."""

from typing import Literal

import torch
from torch import Tensor

from noisekit.train.data.update_batches import Microbatch
from noisekit.train.gradients.step import GradientStep
from noisekit.train.section import PositiveFloat, Section


class GradientPenalty(Section):
    r"""Adds ``weight / 2`` times the mean of :math:`|g_b|^2` over micro-batches.

    Its gradient is the mean of :math:`H_b g_b`, taken by a forward difference of step
    ``epsilon`` along :math:`g_b / |g_b|`, whose error is of order ``epsilon``. Each
    update takes one more forward and backward pass, and two more where it has several
    micro-batches. Which examples are penalized together is ``training.microbatch``.

    Attributes:
        weight: Coefficient of half the squared norm [param²/loss].
        epsilon: Length of the step in the weights [param].

    Source:
        Geiping et al. 2022, arXiv:2109.14119, section 3; the implicit penalty of SGD:
        Smith et al. 2021, arXiv:2101.12176.
    """

    kind: Literal["gradient_penalty"]
    weight: PositiveFloat
    epsilon: PositiveFloat = 0.01

    def num_passes(self, *, several: bool) -> int:
        """Return the passes beside the update's own, over one or several parts."""
        return 2 if several else 1

    def addition(self, step: GradientStep) -> list[Tensor]:
        """Return what is added to the gradient, by parameter."""
        total = [torch.zeros_like(parameter) for parameter in step.parameters]
        alone = len(step.batch) == 1
        for part in step.batch:
            gradient = _present(step) if alone else step.gradient(part)
            product = self._hessian_product(step, part, gradient)
            torch._foreach_add_(total, product, alpha=self.weight * part.share)
        return total

    def _hessian_product(
        self, step: GradientStep, part: Microbatch, gradient: list[Tensor]
    ) -> list[Tensor]:
        """Return ``(g(w + s g) - g(w)) / s`` with ``s = epsilon / |g|``."""
        norm = torch.nn.utils.get_total_norm(gradient)
        length = self.epsilon / norm
        # At a stationary point there is nothing to penalize, and no direction.
        length = torch.where(norm > 0, length, 0.0)
        before = [parameter.detach().clone() for parameter in step.parameters]
        with torch.no_grad():
            for parameter, slope in zip(step.parameters, gradient, strict=True):
                parameter.add_(slope * length)
        beyond = step.gradient(part)
        with torch.no_grad():
            for parameter, kept in zip(step.parameters, before, strict=True):
                parameter.copy_(kept)
        rate = torch.where(norm > 0, 1 / length, 0.0)
        return [
            (after - slope) * rate
            for after, slope in zip(beyond, gradient, strict=True)
        ]


def _present(step: GradientStep) -> list[Tensor]:
    """Return the gradient that the update's own pass has left."""
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in step.parameters
    ]

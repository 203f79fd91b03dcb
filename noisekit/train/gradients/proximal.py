"""Conservative training: several steps on one batch, held near where they began."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisekit.train.gradients.step import GradientStep
from noisekit.train.section import PositiveFloat, Section


class Proximal(Section):
    r"""Solves :math:`\min_w L_B(w) + \tfrac{\lambda}{2} |w - w_k|^2` in a few steps.

    An update takes ``steps`` steps of the run's own optimizer on its batch, each on
    the gradient at the present weights plus ``weight (w - w_k)``, where ``w_k`` are
    the weights before the update. All count as one update of the clock and of the
    schedule. The optimizer's momentum, or Adam's averages, see each of them.

    Attributes:
        weight: The coefficient [loss/param²].
        steps: Steps of the optimizer per update.

    Source:
        Li et al. 2014, "Efficient mini-batch training for stochastic optimization",
        KDD, section 3; used in Keskar et al. 2017, arXiv:1609.04836, appendix E.
    """

    kind: Literal["proximal"]
    weight: PositiveFloat
    steps: Annotated[int, Field(ge=2, le=1000)] = 3

    def solve(
        self, step: GradientStep, finish: Callable[[Sequence[Tensor]], None]
    ) -> None:
        """Take all steps but the last, whose gradient is left in ``.grad``.

        Args:
            step: The update, with the gradient at ``w_k`` in ``.grad``.
            finish: Adds to ``.grad``, and applies the other rules to it.
        """
        start = [parameter.detach().clone() for parameter in step.parameters]
        for _ in range(self.steps - 1):
            step.optimizer.step()
            step.optimizer.zero_grad()
            step.backward()
            with torch.no_grad():
                pulls = torch._foreach_sub(list(step.parameters), start)
                torch._foreach_mul_(pulls, self.weight)
            finish(pulls)

"""The gradient rules of a run, in the order in which they act."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from noisekit.train.gradients.proximal import Proximal
from noisekit.train.gradients.step import GradientStep
from noisekit.train.gradients.terms import TermSpec
from noisekit.train.gradients.trust_ratio import TrustRatio


@dataclass(frozen=True, slots=True)
class GradientRules:
    """Fills ``.grad`` for an update.

    First the gradient of the mean loss over the batch, which is what probes read. Then
    the terms, computed beside it and added; then the limit on the norm; then the
    optimizer's trust ratio.

    Attributes:
        terms: Terms of the recipe, each kind at most once.
        clip_norm: Largest norm of the whole gradient; ``None`` for no limit.
        trust_ratio: How each layer's gradient is scaled; ``None`` for not at all.
    """

    terms: tuple[TermSpec, ...] = ()
    clip_norm: float | None = None
    trust_ratio: TrustRatio | None = None

    def fill(self, step: GradientStep) -> Tensor:
        """Fill ``.grad``, and return the mean loss over the batch without terms."""
        loss = step.backward()
        self._finish(step, ())
        for term in self.terms:
            if isinstance(term, Proximal):
                with step.beside():
                    term.solve(step, partial(self._finish, step))
        return loss

    def _finish(self, step: GradientStep, pulls: Sequence[Tensor]) -> None:
        """Apply to ``.grad`` what follows the update's own gradient.

        Args:
            step: The update.
            pulls: What is added besides the terms, by parameter.
        """
        added = [term for term in self.terms if not isinstance(term, Proximal)]
        if added:
            with step.beside():
                additions = [term.addition(step) for term in added]
            for addition in additions:
                _add(step.parameters, addition)
        if pulls:
            _add(step.parameters, pulls)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(step.parameters, self.clip_norm)
        if self.trust_ratio is not None:
            self.trust_ratio.scale(step.parameters)


def _add(parameters: Sequence[nn.Parameter], additions: Sequence[Tensor]) -> None:
    for parameter, addition in zip(parameters, additions, strict=True):
        # Without a gradient no loss depends on it, and optimizers leave it alone.
        if parameter.grad is not None:
            parameter.grad.add_(addition)

"""The gradient rules of a run, in the order in which they act."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from noisekit.train.gradients.proximal import Proximal
from noisekit.train.gradients.step import GradientStep
from noisekit.train.gradients.terms import TermSpec

GradientScaling = Callable[[Iterable[nn.Parameter]], None]


class GradientRules:
    """Fills ``.grad`` for an update.

    First the gradient of the mean loss over the batch, which is what probes read. Then
    the terms, computed beside it and added; then the limit on the norm; then what the
    optimizer asks for, such as a trust ratio.

    Args:
        terms: Terms of the recipe, each kind at most once.
        clip_norm: Largest norm of the whole gradient; ``None`` for no limit.
        scaling: What the optimizer does to gradients before it steps, if anything.
    """

    def __init__(
        self,
        terms: Sequence[TermSpec] = (),
        *,
        clip_norm: float | None = None,
        scaling: GradientScaling | None = None,
    ) -> None:
        self._added = [term for term in terms if not isinstance(term, Proximal)]
        self._proximal = [term for term in terms if isinstance(term, Proximal)]
        self._clip_norm = clip_norm
        self._scaling = scaling

    def fill(self, step: GradientStep) -> Tensor:
        """Fill ``.grad``, and return the mean loss over the batch without terms."""
        loss = step.backward()
        self._finish(step, ())
        for term in self._proximal:
            with step.beside():
                term.solve(step, partial(self._finish, step))
        return loss

    def _finish(self, step: GradientStep, pulls: Sequence[Tensor]) -> None:
        """Apply to ``.grad`` what follows the update's own gradient.

        Args:
            step: The update.
            pulls: What is added besides the terms, by parameter.
        """
        if self._added:
            with step.beside():
                additions = [term.addition(step) for term in self._added]
            for addition in additions:
                _add(step.parameters, addition)
        if pulls:
            _add(step.parameters, pulls)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(step.parameters, self._clip_norm)
        if self._scaling is not None:
            self._scaling(step.parameters)


def _add(parameters: Sequence[nn.Parameter], additions: Sequence[Tensor]) -> None:
    for parameter, addition in zip(parameters, additions, strict=True):
        if parameter.grad is None:
            parameter.grad = addition.clone()
        else:
            parameter.grad.add_(addition)

"""Layer-wise adaptive rates: LARS as a factor on each layer's gradient."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class TrustRatio:
    r"""Scales the gradient of each weight matrix by its trust ratio.

    .. math:: g \leftarrow \frac{k |w|}{|g| + \lambda |w|} (g + \lambda w)

    SGD without weight decay of its own, applied to the result, is LARS. PyTorch's SGD
    has the rate outside of the momentum buffer, and the paper inside, which differs
    where the rate changes. The ratio is 1 where ``|w|`` or the denominator is zero.
    Biases and other vectors take the plain rate, with weight decay.

    Attributes:
        coefficient: ``k``.
        weight_decay: ``λ``.

    Source:
        You et al. 2017, arXiv:1708.03888, algorithm 1.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.data.fill_(3.0)  # |w| = 4.24
        tensor([[3., 3.]])
        >>> layer.weight.grad = torch.tensor([[0.0, 1.0]])
        >>> TrustRatio(coefficient=0.1).scale([layer.weight])
        >>> layer.weight.grad
        tensor([[0.0000, 0.4243]])
    """

    coefficient: float
    weight_decay: float = 0.0

    def scale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Scale ``.grad`` in place, wherever there is one."""
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    self._scale(parameter, parameter.grad)

    def _scale(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        if parameter.dim() < 2:
            gradient.add_(parameter, alpha=self.weight_decay)
            return
        length = torch.linalg.vector_norm(parameter)
        beyond = torch.linalg.vector_norm(gradient) + self.weight_decay * length
        usable = (length > 0) & (beyond > 0)
        ratio = torch.where(usable, self.coefficient * length / beyond, 1.0)
        gradient.add_(parameter, alpha=self.weight_decay).mul_(ratio)

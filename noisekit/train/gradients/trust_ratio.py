"""Layer-wise adaptive rates: LARS as a factor on each layer's gradient."""

from collections.abc import Iterable

import torch
from torch import nn


def scale_by_trust_ratio(
    parameters: Iterable[nn.Parameter], coefficient: float, weight_decay: float
) -> None:
    r"""Scale the gradient of each weight matrix by its trust ratio, in place.

    .. math:: g \leftarrow \frac{k |w|}{|g| + \lambda |w|} (g + \lambda w)

    SGD without weight decay of its own, applied to the result, is LARS. PyTorch's SGD
    has the rate outside of the momentum buffer, and the paper inside, which differs
    where the rate changes. The ratio is 1 where ``|w|`` or the denominator is zero.
    Biases and other vectors take the plain rate, with weight decay.

    Source: You et al. 2017, arXiv:1708.03888, algorithm 1.

    Args:
        parameters: Parameters with gradients.
        coefficient: ``k``.
        weight_decay: ``λ``.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> nn.init.constant_(layer.weight, 3.0)
        Parameter containing:
        tensor([[3., 3.]], requires_grad=True)
        >>> layer.weight.grad = torch.tensor([[0.0, 1.0]])
        >>> scale_by_trust_ratio([layer.weight], 0.1, 0.0)
        >>> layer.weight.grad  # |w| = 4.24
        tensor([[0.0000, 0.4243]])
    """
    with torch.no_grad():
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if parameter.dim() < 2:
                gradient.add_(parameter, alpha=weight_decay)
                continue
            length = torch.linalg.vector_norm(parameter)
            beyond = torch.linalg.vector_norm(gradient) + weight_decay * length
            usable = (length > 0) & (beyond > 0)
            ratio = torch.where(usable, coefficient * length / beyond, 1.0)
            gradient.add_(parameter, alpha=weight_decay).mul_(ratio)

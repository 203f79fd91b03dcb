"""Statistics of batch-size criteria from one step's sums, in total or per layer.

With ``u_i`` the contribution of example i to the gradient ``u = sum u_i`` that is
applied and ``w_i`` its weight in the mean, ``sum w_i = 1``: all functions take
``q = sum w_i²``, which is ``1/n`` for equal weights. A factor common to all ``u_i``,
such as a loss scale, cancels. Tensors stay on their device; nothing is synchronized.
"""

import torch
from torch import Tensor

Number = float | Tensor


def norm_statistic(sum_sq_norm: Tensor, grad_sq_norm: Tensor, q: Number) -> Tensor:
    r"""Return the smallest ``θ`` with which a batch passes the norm test.

    .. math:: \theta^2 = \frac{\sum_i |u_i|^2 - q |u|^2}{(1 - q) |u|^2}

    Its square is the sum of those of ``inner_product_statistic`` and
    ``orthogonality_statistic``.

    Args:
        sum_sq_norm: ``sum |u_i|²``.
        grad_sq_norm: ``|u|²``.
        q: ``sum w_i²``.
    """
    spread = (sum_sq_norm - q * grad_sq_norm).clamp_min(0)
    return (spread / ((1 - q) * grad_sq_norm)).sqrt()


def inner_product_statistic(products: Tensor, q: Number) -> Tensor:
    r"""Return the smallest ``θ`` with which a batch passes the inner-product test.

    .. math:: \theta^2 = \frac{\sum_i x_i^2 - q x^2}{(1 - q) x^2}, \quad
              x_i = \langle u_i, u \rangle, \; x = \sum_i x_i = |u|^2

    Args:
        products: ``x_i``, examples on the last axis.
        q: ``sum w_i²``.
    """
    whole = products.sum(-1).square()
    spread = (products.square().sum(-1) - q * whole).clamp_min(0)
    return (spread / ((1 - q) * whole)).sqrt()


def orthogonality_statistic(sum_sq_norm: Tensor, products: Tensor, q: Number) -> Tensor:
    r"""Return the smallest ``ν`` with which a batch passes the orthogonality test.

    .. math:: \nu^2 = \frac{\sum_i |u_i|^2 - \sum_i x_i^2 / |u|^2}{(1 - q) |u|^2}

    Args:
        sum_sq_norm: ``sum |u_i|²``.
        products: ``x_i = <u_i, u>``, examples on the last axis.
        q: ``sum w_i²``.
    """
    whole = products.sum(-1)
    # |u_i|^2 less the square of its component along u, x_i^2 / |u|^2.
    across = (sum_sq_norm - products.square().sum(-1) / whole).clamp_min(0)
    return (across / ((1 - q) * whole)).sqrt()


def signal_ratios(mean: Tensor, square_sum: Tensor, q: Number) -> tuple[Tensor, Tensor]:
    r"""Return ``sum_j ḡ_j² / Var(g_j)`` over the entries that vary, and their number.

    .. math:: \widehat{\mathrm{Var}}_j = \frac{\sum_i u_{ij}^2 / q - u_j^2}{1 - q}

    Entries whose variance is within rounding of zero, such as those of dead units,
    have no ratio and do not count.

    Args:
        mean: ``u``, in any shape.
        square_sum: ``sum u_i²`` element by element, in the same shape.
        q: ``sum w_i²``.
    """
    squares = square_sum / q
    variance = (squares - mean.square()) / (1 - q)
    varies = variance > _ROUNDING * torch.finfo(mean.dtype).eps * squares
    ratios = torch.where(varies, mean.square() / variance, 0.0)
    return ratios.sum(), varies.sum()


_ROUNDING = 8
"""Rounding error of a difference of squares, in units of ``eps``."""

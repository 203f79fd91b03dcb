"""XTrace: a leave-one-out trace estimate from exchangeable probes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Compressed:
    """Test vectors ``Ω`` and images ``A Ω = Q R``, in coordinates of the basis ``Q``.

    Attributes:
        inner: ``Q' A Q``, ``(r, r)``.
        tests: ``Q' Ω``, ``(r, m)``.
        factor: ``R``, ``(r, m)``.
        forms: ``ω_i' A ω_i``, ``(m,)``.
        eps: Relative rounding error of a product.
    """

    inner: Tensor
    tests: Tensor
    factor: Tensor
    forms: Tensor
    eps: float

    def without(self, index: int) -> "_Compressed":
        """The same without one test vector, as for a new run with ``m - 1`` of them."""
        keep = torch.arange(self.factor.shape[1]) != index
        # Q R_keep = (Q U) R': the images of the others span Q U.
        rotation, factor = torch.linalg.qr(self.factor[:, keep])
        return _Compressed(
            inner=rotation.T @ self.inner @ rotation,
            tests=rotation.T @ self.tests[:, keep],
            factor=factor,
            forms=self.forms[keep],
            eps=self.eps,
        )

    def trace(self) -> float:
        r"""The mean over ``i`` of the exact trace on ``Q_i`` and a probe of the rest.

        .. math:: \hat t_i = \mathrm{tr}(Q_i^\top A Q_i) + \omega_i^\top
                  (I - Q_i Q_i^\top) A (I - Q_i Q_i^\top) \omega_i

        with ``Q_i`` spanned by the images of all test vectors but ``ω_i``. It lacks a
        single direction of ``Q``: ``Q_i Q_i' = Q (I - s_i s_i') Q'``.
        """
        missing = _missing_directions(self.factor, self.eps)  # (r, m), s_i
        # Coordinates of Q_i Q_i' omega_i: (I - s_i s_i') Q' omega_i.
        inside = self.tests - missing * (missing * self.tests).sum(0)  # (r, m)
        # With p = Q_i Q_i' omega_i: omega' A omega - 2 p' A omega + p' A p, where
        # p' A omega_i is a product of coordinates, since A omega_i = Q R e_i.
        outside = self.forms - 2 * (inside * self.factor).sum(0)
        outside = outside + _forms(self.inner, inside)
        # tr(Q_i' A Q_i) = tr(Q' A Q) - s_i' Q' A Q s_i.
        terms = self.inner.trace() - _forms(self.inner, missing) + outside
        return float(terms.mean())


def exchangeable_trace(
    tests: Tensor, images: Tensor, multiply: Callable[[Tensor], Tensor], *, eps: float
) -> tuple[float, float]:
    """Return the trace and its standard error, by the jackknife over test vectors.

    The standard deviation of the ``m`` terms over ``sqrt(m)`` is not the error of their
    mean: they share all directions but one. It is too small by up to 70 %.

    Args:
        tests: ``(P, m)``, independent of each other.
        images: ``(P, m)``, their products with the operator.
        multiply: Gives the products with a block; called once, with ``m`` columns.
        eps: Rounding of the products.

    Source:
        Epperly, Tropp and Webber 2024, "XTrace: making the most of every sample in
        stochastic trace estimation", section 2.1.
    """
    basis, factor = torch.linalg.qr(images)  # (P, r) and (r, m)
    inner = (basis.T @ multiply(basis)).double().cpu()
    whole = _Compressed(
        inner=(inner + inner.T) / 2,
        tests=(basis.T @ tests).double().cpu(),
        factor=factor.double().cpu(),
        forms=(tests.double() * images.double()).sum(0).cpu(),
        eps=eps,
    )
    count = tests.shape[1]
    without = torch.tensor([whole.without(i).trace() for i in range(count)])
    # Jackknife variance (m - 1)/m sum (t_(i) - mean)^2 (Efron and Stein 1981).
    spread = float((without - without.mean()).square().sum())
    return whole.trace(), math.sqrt((count - 1) / count * spread)


def _missing_directions(factor: Tensor, eps: float) -> Tensor:
    """Unit columns ``s_i`` orthogonal to all columns of the factor but the ``i``-th.

    They are the normalized columns of ``R^{-T}``, since ``R^{-1} R = I``. Zero where
    the images are linearly dependent: the others then span the ``i``-th as well.
    """
    strengths = torch.linalg.svdvals(factor)
    if float(strengths[-1]) <= eps * float(strengths[0]):
        return torch.zeros_like(factor)
    directions: Tensor = torch.linalg.inv(factor).T
    return torch.nn.functional.normalize(directions, dim=0)


def _forms(matrix: Tensor, columns: Tensor) -> Tensor:
    forms: Tensor = (columns * (matrix @ columns)).sum(0)
    return forms

"""XTrace: a leave-one-out trace estimate from exchangeable probes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Compressed:
    """All that the estimate needs, in the coordinates of a basis of the images.

    Attributes:
        inner: ``(r, r)``, the operator on the basis.
        seen: ``(r, m)``, the test vectors.
        factor: ``(r, m)``, the images.
        forms: ``(m,)``, the tests' quadratic forms.
        eps: What rounding may make of a product, relative.
    """

    inner: Tensor
    seen: Tensor
    factor: Tensor
    forms: Tensor
    eps: float

    def without(self, index: int) -> "_Compressed":
        """What it were without one of the test vectors."""
        keep = torch.arange(self.factor.shape[1]) != index
        rotation, factor = torch.linalg.qr(self.factor[:, keep])
        return _Compressed(
            inner=rotation.T @ self.inner @ rotation,
            seen=rotation.T @ self.seen[:, keep],
            factor=factor,
            forms=self.forms[keep],
            eps=self.eps,
        )

    def trace(self) -> float:
        r"""The mean over tests of: exact trace on all others' images, and the rest.

        The ``i``-th term is the trace on ``Q_i``, spanned by the images of all tests
        but the ``i``-th, which lacks the single direction ``Q s_i`` of the whole, plus
        the ``i``-th test's quadratic form outside ``Q_i``.
        """
        missing = _missing_directions(self.factor, self.eps)
        inside = self.seen - missing * (missing * self.seen).sum(0)
        outside = self.forms - 2 * (inside * self.factor).sum(0)
        outside = outside + _forms(self.inner, inside)
        terms = self.inner.trace() - _forms(self.inner, missing) + outside
        return float(terms.mean())


def exchangeable_trace(
    tests: Tensor, images: Tensor, multiply: Callable[[Tensor], Tensor], *, eps: float
) -> tuple[float, float]:
    """Return the trace and its standard error, by the jackknife over test vectors.

    The spread of the terms themselves is not their mean's error: they share all their
    directions but one, and the error it gives is too small by up to 70 %.

    Args:
        tests: ``(P, m)``, independent of each other.
        images: ``(P, m)``, their products with the operator.
        multiply: Gives the products with a block; called once, with ``m`` columns.
        eps: Rounding of the products.

    Source:
        Epperly, Tropp and Webber 2024, "XTrace: making the most of every sample in
        stochastic trace estimation", section 2.1.
    """
    basis, factor = torch.linalg.qr(images)
    inner = (basis.T @ multiply(basis)).double().cpu()
    whole = _Compressed(
        inner=(inner + inner.T) / 2,
        seen=(basis.T @ tests).double().cpu(),
        factor=factor.double().cpu(),
        forms=(tests.double() * images.double()).sum(0).cpu(),
        eps=eps,
    )
    count = tests.shape[1]
    without = torch.tensor([whole.without(i).trace() for i in range(count)])
    spread = float((without - without.mean()).square().sum())
    return whole.trace(), math.sqrt((count - 1) / count * spread)


def _missing_directions(factor: Tensor, eps: float) -> Tensor:
    """Columns ``s_i`` orthogonal to all columns of the factor but the ``i``-th.

    None is missing where the images are linearly dependent: the others span it.
    """
    strengths = torch.linalg.svdvals(factor)
    if float(strengths[-1]) <= eps * float(strengths[0]):
        return torch.zeros_like(factor)
    directions: Tensor = torch.linalg.inv(factor).T
    return torch.nn.functional.normalize(directions, dim=0)


def _forms(matrix: Tensor, columns: Tensor) -> Tensor:
    forms: Tensor = (columns * (matrix @ columns)).sum(0)
    return forms

"""Deflation: an operator with known eigenvectors moved out of the way."""

from typing import Literal

import torch
from torch import Tensor

from noisekit.curvature.operators.operator import (
    SymmetricOperator,
    TransformedOperator,
)

End = Literal["LA", "SA"]


class DeflatedOperator(TransformedOperator):
    r"""``(I - V V') A (I - V V') + c V V'``: eigenvalues of ``V`` moved to ``c``.

    With ``c`` at the unwanted end of the spectrum, the wanted end belongs to the
    orthogonal complement of ``V``. Projection alone (``c = 0``) would not do: where the
    remaining eigenvalues are negative, the zeros of ``V`` would be the largest.
    """

    def __init__(
        self, operator: SymmetricOperator, vectors: Tensor, end: End, scale: float
    ) -> None:
        """Deflate eigenvectors ``(P, j)``.

        Args:
            operator: ``A``.
            vectors: ``V``; its columns are orthonormalized.
            end: Which end of the remaining spectrum is wanted.
            scale: At least about the norm of ``A``; ``c`` is plus or minus that.
        """
        self.operator = operator
        self._vectors = torch.linalg.qr(vectors.to(operator.dtype))[0]
        self._moved_to = -scale if end == "LA" else scale

    def _matmat(self, block: Tensor) -> Tensor:
        inside = self._vectors.T @ block  # (j, k), V' X
        product = self.operator @ (block - self._vectors @ inside)  # A (I - V V') X
        # (I - V V') Y + c V V' X = Y + V (c V' X - V' Y), with one product by V less.
        along = self._moved_to * inside - self._vectors.T @ product
        moved: Tensor = product + self._vectors @ along
        return moved

"""Deflation: an operator with known eigenvectors moved out of the way."""

from typing import Literal

import torch
from torch import Tensor

from noisekit.core.distributed import Ranks
from noisekit.curvature.operators.operator import SymmetricOperator

End = Literal["LA", "SA"]


class DeflatedOperator(SymmetricOperator):
    r"""``(I - V V') A (I - V V') + c V V'``: known vectors ``V`` moved out of the way.

    With ``c`` at the far end of the spectrum, the near end is that of what ``V`` leaves
    out, also where all of it has the other sign: projected out alone, ``V`` would be at
    zero, and above every negative eigenvalue.
    """

    def __init__(
        self, operator: SymmetricOperator, vectors: Tensor, end: End, scale: float
    ) -> None:
        """Take orthonormal columns ``(P, j)`` and the end that is to be searched.

        Args:
            operator: ``A``.
            vectors: ``V``.
            end: Which end of the rest is wanted.
            scale: About the norm of ``A``.
        """
        self._operator = operator
        self._vectors = torch.linalg.qr(vectors.to(operator.dtype))[0]
        self._moved_to = -scale if end == "LA" else scale

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the vectors."""
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self._operator.device

    @property
    def ranks(self) -> Ranks:
        """The processes that hold a share of the data."""
        return self._operator.ranks

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._matmat(vector.unsqueeze(1)).squeeze(1)

    def _matmat(self, block: Tensor) -> Tensor:
        inside = self._vectors.T @ block  # (j, k)
        product = self._operator @ (block - self._vectors @ inside)
        along = self._moved_to * inside - self._vectors.T @ product
        moved: Tensor = product + self._vectors @ along
        return moved

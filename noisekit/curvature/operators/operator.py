"""Symmetric linear operators: matrices given by matrix-vector products."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from noisekit.core.arguments import checked
from noisekit.core.distributed import Ranks
from noisekit.core.errors import UsageError


class MatrixLike(Protocol):
    """Anything square with a shape, a type and products, of NumPy or PyTorch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""

    @property
    def dtype(self) -> object:
        """A NumPy or a PyTorch type, that of the vectors it multiplies."""

    # The vector is an array or a tensor, by the dtype.
    def __matmul__(self, vector, /):  # type: ignore[no-untyped-def]
        """Return the product with a vector."""


class SymmetricOperator(ABC):
    """A symmetric matrix, by its products ``H @ v`` and ``H @ V``.

    Attributes:
        num_matvecs: Products with single vectors so far.
    """

    num_matvecs: int = 0

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the vectors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the vectors are."""

    @property
    def ranks(self) -> Ranks:
        """The processes that every product needs, each with the same vector."""
        return Ranks()

    def __repr__(self) -> str:
        """Write its kind, size, type and place, and what it has cost."""
        return (
            f"<{type(self).__name__} {self.shape}, {self.dtype} on {self.device}, "
            f"{self.num_matvecs} products so far>"
        )

    @abstractmethod
    def _matvec(self, vector: Tensor) -> Tensor:
        """Return the product with one vector of the right shape, type and device."""

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return the product with a vector ``(P,)`` or a block ``(P, k)``.

        Raises:
            UsageError: If the shape does not fit.
        """
        size = self.shape[1]
        if other.ndim not in {1, 2} or other.shape[0] != size:
            raise UsageError(
                f"the product needs a vector ({size},) or a block ({size}, k), got "
                f"shape {tuple(other.shape)}."
            )
        block = other.to(self.device, self.dtype)
        if other.ndim == 1:
            self.num_matvecs += 1
            return self._matvec(block)
        self.num_matvecs += other.shape[1]
        return self._matmat(block) if other.shape[1] else torch.zeros_like(block)

    def products_in_double(self, block: Tensor) -> Tensor | None:
        """Return products in double precision where rounding may hide in others."""
        return None

    def _matmat(self, block: Tensor) -> Tensor:
        """Return the product with a block of at least one column."""
        columns = [self._matvec(column.contiguous()) for column in block.unbind(1)]
        return torch.stack(columns, 1)

    def __add__(self, other: "SymmetricOperator") -> "SymmetricOperator":
        """Return the sum with another operator of the same parameters."""
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return LinearCombination([(1.0, self), (1.0, other)])

    def __sub__(self, other: "SymmetricOperator") -> "SymmetricOperator":
        """Return the difference to another operator of the same parameters."""
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return LinearCombination([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> "SymmetricOperator":
        """Return a multiple of this."""
        if not isinstance(factor, int | float):
            return NotImplemented
        return LinearCombination([(float(factor), self)])

    __rmul__ = __mul__

    def __neg__(self) -> "SymmetricOperator":
        """Return the negative of this."""
        return LinearCombination([(-1.0, self)])

    @checked
    def shifted(self, shift: float) -> "SymmetricOperator":
        """Return this plus ``shift`` times the identity."""
        return LinearCombination([(1.0, self)], shift=shift)

    def to_dense(self) -> Tensor:
        """Return the whole matrix, at the price of one product per column."""
        return self @ torch.eye(self.shape[1], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """Return this as SciPy's operator, for its solvers."""

        def product(vector: np.ndarray) -> np.ndarray:
            return block_product(vector.reshape(-1))

        def block_product(block: np.ndarray) -> np.ndarray:
            given = torch.from_numpy(np.ascontiguousarray(block))
            return (self @ given).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            shape=self.shape,
            matvec=product,
            rmatvec=product,
            matmat=block_product,
            rmatmat=block_product,
            dtype=dtype,
        )


class TransformedOperator(SymmetricOperator):
    """Base of operators made of one other, of the same size, type and device.

    Attributes:
        operator: The other.
    """

    operator: SymmetricOperator

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the vectors."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.operator.device

    @property
    def ranks(self) -> Ranks:
        """The processes that hold a share of the data."""
        return self.operator.ranks

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._matmat(vector.unsqueeze(1)).squeeze(1)


class LinearCombination(SymmetricOperator):
    r"""``sum_i a_i A_i + c I``, one product of each ``A_i`` per product.

    Attributes:
        terms: The factors ``a_i`` and operators ``A_i``.
        shift: ``c``.
    """

    def __init__(
        self,
        terms: Sequence[tuple[float, SymmetricOperator]],
        *,
        shift: float = 0.0,
    ) -> None:
        """Check that the terms fit together.

        Raises:
            UsageError: If they differ in size or device.
        """
        kinds = {(a.shape[0], str(a.device)) for _, a in terms}
        if len(kinds) != 1:
            kinds_text = ", ".join(
                f"{size} on {device}" for size, device in sorted(kinds)
            )
            raise UsageError(
                f"a sum needs operators of one size on one device, got {kinds_text}; "
                "choose the same parameters for all with params=."
            )
        self.terms = tuple(terms)
        self.shift = shift

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.terms[0][1].shape

    @property
    def dtype(self) -> torch.dtype:
        """The widest type of the terms."""
        return functools.reduce(
            torch.promote_types, (operator.dtype for _, operator in self.terms)
        )

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.terms[0][1].device

    @property
    def ranks(self) -> Ranks:
        """The processes of the term that spans most."""
        return max((a.ranks for _, a in self.terms), key=lambda ranks: ranks.size)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._matmat(vector)

    def _matmat(self, block: Tensor) -> Tensor:
        total = self.shift * block
        for factor, operator in self.terms:
            total = total + factor * (operator @ block).to(total.dtype)
        return total


class DenseOperator(SymmetricOperator):
    """A symmetric matrix that is there as a tensor."""

    def __init__(self, matrix: Tensor) -> None:
        _check_square(matrix.shape)
        scale = float(matrix.abs().max()) if matrix.numel() else 0.0
        # A matrix that is not finite is accepted: results have the status DIVERGED.
        if math.isfinite(scale) and not torch.allclose(
            matrix, matrix.T, rtol=0.0, atol=1e-4 * scale
        ):
            gap = float((matrix - matrix.T).abs().max())
            raise UsageError(
                f"eigenvalues need a symmetric matrix, got one that differs from its "
                f"transpose by up to {gap:.3g}; symmetrize it with (A + A.T) / 2."
            )
        self._matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._matrix.shape[0], self._matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the vectors."""
        return self._matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self._matrix.device

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._matrix @ vector


class ForeignOperator(SymmetricOperator):
    """Another library's operator; products go through NumPy or PyTorch as it asks."""

    def __init__(self, matrix: MatrixLike) -> None:
        self._shape = _shape_of(matrix)
        _check_square(self._shape)
        self._matrix = matrix
        self._speaks_torch = isinstance(matrix.dtype, torch.dtype)
        if isinstance(matrix.dtype, torch.dtype):
            self._dtype = matrix.dtype
        else:
            numpy_dtype = np.dtype(str(matrix.dtype or "float64"))
            self._dtype = torch.from_numpy(np.empty(0, dtype=numpy_dtype)).dtype
        self._device = torch.device(getattr(matrix, "device", None) or "cpu")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._shape[0], self._shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the vectors."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self._device

    def _matvec(self, vector: Tensor) -> Tensor:
        if self._speaks_torch:
            # Some return the graph that led there, which would pile up.
            return cast(Tensor, self._matrix @ vector).detach()
        product = self._matrix @ vector.numpy()
        return torch.from_numpy(np.asarray(product).reshape(-1)).to(self._dtype)


def as_operator(
    matrix: "SymmetricOperator | Tensor | np.ndarray | MatrixLike",
) -> SymmetricOperator:
    """Return ``matrix`` as a symmetric operator.

    Args:
        matrix: One already, a symmetric tensor or array, or anything with
            ``shape`` (or ``size``), ``dtype`` and ``@``, such as the operators of
            SciPy, curvlinops and hessian-eigenthings.

    Raises:
        UsageError: If it is none of these, not square, or not symmetric.
    """
    if isinstance(matrix, SymmetricOperator):
        return matrix
    if isinstance(matrix, Tensor):
        return DenseOperator(matrix if matrix.is_floating_point() else matrix.double())
    if isinstance(matrix, np.ndarray):
        return as_operator(torch.from_numpy(np.ascontiguousarray(matrix)))
    if not (_shape_of(matrix) and hasattr(matrix, "dtype")) or not hasattr(
        matrix, "__matmul__"
    ):
        raise UsageError(
            "an operator needs shape, dtype and @, got a "
            f"{type(matrix).__name__}; build one with nk.HessianOperator(model, "
            "loss_fn, batches)."
        )
    return ForeignOperator(matrix)


def _shape_of(matrix: object) -> tuple[int, ...]:
    """Its shape, or that of the only size it has; empty where it has neither."""
    shape = getattr(matrix, "shape", None)
    if shape is None:
        size = getattr(matrix, "size", None)
        return (size, size) if isinstance(size, int) else ()
    return tuple(shape)


def _check_square(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise UsageError(
            f"an operator needs a square shape (P, P) with P > 0, got {tuple(shape)}."
        )

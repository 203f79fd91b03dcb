"""Operators of any origin, seen as symmetric operators."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator, eigsh
from torch import nn
from torch.testing import assert_close

from noisekit.core.errors import UsageError
from noisekit.curvature import HessianOperator, as_operator
from tests.cases import RAGGED, mlp, seeded
from tests.reference.curvature import symmetric_with_spectrum

MATRIX = symmetric_with_spectrum([4.0, 1.0, 0.5, -2.0])


@pytest.mark.parametrize(
    "matrix",
    [
        MATRIX,
        torch.from_numpy(MATRIX),
        aslinearoperator(MATRIX),
        csr_array(MATRIX),
    ],
    ids=["array", "tensor", "LinearOperator", "sparse"],
)
def test_products_are_those_of_the_matrix(matrix: object) -> None:
    operator = as_operator(matrix)
    assert operator.shape == (4, 4)
    assert operator.dtype == torch.float64
    assert_close(operator.to_dense(), torch.from_numpy(MATRIX))
    assert operator.num_matvecs == 4


def test_products_with_a_block_are_counted_by_columns() -> None:
    """Catches: a block counted as one product, which flatters the cost."""
    operator = as_operator(MATRIX)
    block = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    assert_close(operator @ block, torch.from_numpy(MATRIX) @ block)
    assert operator.num_matvecs == 3
    operator @ block[:, 0]
    assert operator.num_matvecs == 4
    assert (operator @ block[:, :0]).shape == (4, 0)


def test_counts_belong_to_one_operator() -> None:
    """Catches: a counter shared by all operators."""
    as_operator(MATRIX) @ torch.ones(4).double()
    assert as_operator(MATRIX).num_matvecs == 0


def test_scipy_solves_with_our_operator() -> None:
    H = HessianOperator(seeded(mlp)(), nn.CrossEntropyLoss(), RAGGED)
    values = eigsh(H.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    want = np.linalg.eigvalsh(H.to_dense().numpy())[-2:]
    np.testing.assert_allclose(np.sort(values), want, rtol=1e-8)


# PyTorch's forward-mode derivatives, which it uses, warn about themselves.
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_another_library_speaks_torch() -> None:
    """Catches: tensors sent through NumPy to an operator that takes tensors."""
    from curvlinops import HessianLinearOperator

    model = seeded(mlp)().eval()
    loss = nn.CrossEntropyLoss()
    peer = HessianLinearOperator(model, loss, list(model.parameters()), RAGGED)
    ours = HessianOperator(model, loss, RAGGED).to_dense()
    assert_close(as_operator(peer).to_dense(), ours, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (np.zeros((2, 3)), r"square shape \(P, P\) with P > 0, got \(2, 3\)"),
        (np.zeros((0, 0)), r"with P > 0, got \(0, 0\)"),
        (np.array([[0.0, 1.0], [0.0, 0.0]]), "differs from its transpose by up to 1"),
        ("H", "needs shape, dtype and @, got a str; build one with nk.Hess"),
        (aslinearoperator(np.zeros((2, 3))), r"got \(2, 3\)"),
    ],
)
def test_what_is_no_symmetric_operator_is_refused(matrix: object, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        as_operator(matrix)


def test_an_operator_says_what_it_is() -> None:
    """Catches: a cell that shows nothing but an address in memory."""
    operator = as_operator(MATRIX)
    operator @ torch.ones(4)
    text = "<DenseOperator (4, 4), torch.float64 on cpu, 1 products so far>"
    assert repr(operator) == text


def test_wrong_vectors_are_refused() -> None:
    with pytest.raises(UsageError, match=r"vector \(4,\) or a block \(4, k\), got"):
        as_operator(MATRIX) @ torch.zeros(3)

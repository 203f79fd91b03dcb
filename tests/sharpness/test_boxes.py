"""The boxes of epsilon-sharpness against dense linear algebra."""

import numpy as np
import pytest
import torch
from torch import Tensor

from noisekit.sharpness.search import subspace
from noisekit.sharpness.search.regions import keskar_box
from noisekit.sharpness.search.subspace import RandomSubspace
from tests.reference import sharpness as reference


def columns_of(box: RandomSubspace) -> Tensor:
    """The matrix ``A``, one column per unit vector."""
    units = torch.eye(len(box.radius)).to(box.radius)
    return torch.stack([box.displacement(unit) for unit in units], dim=1)


@pytest.fixture
def origin() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(200, generator=generator, dtype=torch.float64)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in many blocks of rows, the last of them shorter."""
    monkeypatch.setattr(subspace, "_BLOCK_ENTRIES", 7 * 12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_dims", [1, 12, 150])
def test_radius_is_that_of_the_pseudo_inverse(origin: Tensor, num_dims: int) -> None:
    """Bounds are epsilon times one plus the coordinates of the weights in the span.

    Catches: A'x in place of A⁺x; bounds of the full space cut to the first few.
    """
    box = RandomSubspace(origin, 1e-3, num_dims=num_dims, seed=5)
    columns = columns_of(box).numpy()
    want = reference.subspace_radius(columns, origin.numpy(), 1e-3)
    np.testing.assert_allclose(box.radius.numpy(), want, rtol=1e-9)


@pytest.mark.usefixtures("small_blocks")
def test_columns_made_again_are_the_columns_kept(origin: Tensor) -> None:
    """A memory budget of nothing changes no number.

    Catches: blocks drawn from one running generator, other on the second pass.
    """
    kept = RandomSubspace(origin, 1e-3, num_dims=12, seed=5)
    again = RandomSubspace(origin, 1e-3, num_dims=12, seed=5, memory_budget=0)
    assert torch.equal(columns_of(kept), columns_of(again))
    assert torch.equal(columns_of(again), columns_of(again))
    assert torch.equal(kept.radius, again.radius)


@pytest.mark.usefixtures("small_blocks")
def test_gradient_is_the_adjoint_of_displacement(origin: Tensor) -> None:
    """``<A y, g>`` equals ``<y, A' g>`` for any y and g.

    Catches: rows of a block multiplied with the wrong part of the gradient.
    """
    box = RandomSubspace(origin, 1e-3, num_dims=12, seed=5)
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(12, generator=generator, dtype=torch.float64)
    g = torch.randn(200, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        box.displacement(y) @ g, y @ box.gradient(g), rtol=1e-12, atol=0
    )


def test_columns_are_standard_normal_and_not_alike(origin: Tensor) -> None:
    """Entries have mean 0, variance 1 and kurtosis 3; columns are nearly orthogonal.

    Catches: uniform, all-positive columns; columns of unit norm; the same block of
    numbers for each block of rows.
    """
    wide = origin.repeat(20)
    columns = columns_of(RandomSubspace(wide, 1e-3, num_dims=10, seed=2))
    num = columns.numel()
    assert abs(float(columns.mean())) < 4 / num**0.5
    assert abs(float(columns.var()) - 1) < 4 * (2 / num) ** 0.5
    assert abs(float((columns**4).mean()) - 3) < 4 * (96 / num) ** 0.5
    cosines = columns.T @ columns / len(wide)
    off_diagonal = cosines - cosines.diag().diag()
    assert float(off_diagonal.abs().max()) < 5 / len(wide) ** 0.5


@pytest.mark.usefixtures("small_blocks")
def test_blocks_differ(origin: Tensor) -> None:
    """Every block of rows has numbers of its own.

    Catches: the same seed for each block.
    """
    columns = columns_of(RandomSubspace(origin, 1e-3, num_dims=12, seed=5))
    assert not torch.equal(columns[:7], columns[7:14])


def test_full_space_box(origin: Tensor) -> None:
    """Full space has the identity as its matrix and bounds of every weight.

    Catches: bounds relative to the largest weight.
    """
    box = keskar_box(origin, 5e-4)
    torch.testing.assert_close(box.radius, 5e-4 * (origin.abs() + 1))
    assert torch.equal(box.displacement(origin), origin)
    assert torch.equal(box.gradient(origin), origin)


def test_random_points_and_corners_fill_the_box(origin: Tensor) -> None:
    """Points lie inside on both sides, corners on the bounds.

    Catches: points of the positive half only; corners inside.
    """
    box = keskar_box(origin, 1e-3)
    generator = torch.Generator().manual_seed(0)
    share = box.random_point(generator) / box.radius
    assert float(share.abs().max()) <= 1
    assert float(share.min()) < -0.9
    assert float(share.max()) > 0.9
    corner = box.random_point(generator)
    assert torch.equal(corner.abs(), box.radius)
    assert 60 < int((corner > 0).sum()) < 140

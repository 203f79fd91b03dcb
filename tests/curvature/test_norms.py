"""Frobenius norm and effective numbers, and that their errors are right."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate, Status
from noisekit.curvature import (
    effective_dimension,
    frobenius_norm,
    participation_ratio,
    top_eigenpairs,
)
from tests.reference.curvature import symmetric_with_spectrum

VALUES = np.array([8.0, 4.0, 1.0, *np.linspace(0.01, 0.5, 30)])
MATRIX = torch.from_numpy(symmetric_with_spectrum(VALUES.tolist()))

CASES: dict[str, tuple[Callable[[torch.Generator], Estimate], float]] = {
    "frobenius": (
        lambda g: frobenius_norm(MATRIX, num_matvecs=24, generator=g),
        float(np.linalg.norm(VALUES)),
    ),
    "frobenius_normal": (
        lambda g: frobenius_norm(MATRIX, num_matvecs=24, probe="normal", generator=g),
        float(np.linalg.norm(VALUES)),
    ),
    "participation": (
        lambda g: participation_ratio(MATRIX, num_matvecs=40, generator=g),
        float(VALUES.sum() ** 2 / (VALUES**2).sum()),
    ),
    "effective": (
        lambda g: effective_dimension(MATRIX, 0.5, generator=g),
        float((VALUES / (VALUES + 0.5)).sum()),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_intervals_cover(name: str) -> None:
    """Of 200 intervals at 95 %, at least 88 %, and little bias.

    Catches: the root's error taken for the square's; a variance over n; the bias of a
    squared mean; a mean over eigenvalues in place of a sum.
    """
    measure, truth = CASES[name]
    found = [measure(torch.Generator().manual_seed(seed)) for seed in range(200)]
    values = np.array([e.value for e in found])
    covered = sum(e.interval().contains(truth) for e in found)
    assert 176 <= covered <= 200
    assert abs(values.mean() - truth) < 0.25 * values.std()
    assert np.mean([e.stderr for e in found]) == pytest.approx(values.std(), rel=0.4)


def test_equal_eigenvalues_are_counted() -> None:
    """A projection of rank five has five effective directions, by every count.

    Catches: the inverse ratio; a normalisation by the size.
    """
    projection = torch.diag(torch.tensor([2.0] * 5 + [0.0] * 45).double())
    assert frobenius_norm(projection, num_matvecs=4).value == pytest.approx(20**0.5)
    ratio = participation_ratio(projection, num_matvecs=8)
    assert ratio.value == pytest.approx(5.0)
    count = effective_dimension(projection, 1e-9, num_probes=200)
    assert abs(count.value - 5.0) < 4 * count.stderr


def test_what_has_no_answer_says_so() -> None:
    """Catches: 0/0 as a number; a count of directions where signs cancel; NaN refused.

    The refusal spoke of the tolerance of a symmetry check.
    """
    assert participation_ratio(torch.zeros(9, 9)).status is Status.NO_SIGNAL
    assert frobenius_norm(torch.zeros(9, 9)).value == 0.0
    indefinite = effective_dimension(torch.diag(torch.tensor([3.0, -1.0, 0.5])), 0.1)
    assert indefinite.status is Status.NOT_COMPARABLE
    broken = (torch.eye(4) * torch.inf).nan_to_num(nan=torch.inf)
    assert participation_ratio(broken).status is Status.DIVERGED
    lost = torch.full((4, 4), torch.nan)
    assert participation_ratio(lost).status is Status.DIVERGED
    assert top_eigenpairs(lost).statuses == (Status.DIVERGED,)


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match="at least 2 for an error estimate, got 1"):
        frobenius_norm(MATRIX, num_matvecs=1)
    with pytest.raises(UsageError, match="num_matvecs needs to be at least 3, got 2"):
        participation_ratio(MATRIX, num_matvecs=2)
    with pytest.raises(UsageError, match=r"shift needs to be positive .* got 0"):
        effective_dimension(MATRIX, 0.0)

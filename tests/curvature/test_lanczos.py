"""Eigenpairs against known spectra, with honest residuals and statuses."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.curvature import HessianOperator, top_eigenpairs
from tests.cases import CASES, RAGGED, Case, mlp, seeded
from tests.randomness import seeded as seeded_generator
from tests.reference import curvature as reference
from tests.reference import sharpness as sharpness_reference

SEEDS = range(20)


class Diagonal:
    """A matrix that costs nothing to multiply, of any library's form."""

    def __init__(self, values: Sequence[float] | Tensor, dtype: torch.dtype) -> None:
        self.values = torch.as_tensor(values, dtype=dtype)
        self.shape = (len(self.values),) * 2
        self.dtype = dtype

    def __matmul__(self, vector: Tensor) -> Tensor:
        return self.values * vector


def wide_spectrum() -> Tensor:
    """A few large values over a bulk near zero, as in trained networks."""
    bulk = torch.rand(5000, generator=seeded_generator(0)).double() ** 8 * 3
    return torch.cat([torch.tensor([18.6, 16.1, 13.4, 10.6, 8.4]).double(), bulk])


@pytest.mark.parametrize(
    ("case", "which"),
    [(case, which) for case in CASES[::3] for which in ("LA", "SA")],
    ids=str,
)
def test_eigenpairs_of_models(case: Case, which: str) -> None:
    """Values, vectors and residuals against the dense decomposition.

    Catches: a residual bound that does not hold, order by magnitude, vectors that do
    not belong to the values.
    """
    H = HessianOperator(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    dense = H.to_dense()
    exact = np.linalg.eigvalsh(dense.numpy())
    exact = exact[::-1] if which == "LA" else exact
    pairs = top_eigenpairs(H, 3, which=which, tol=1e-6, generator=seeded_generator(0))
    assert pairs.converged
    np.testing.assert_allclose(
        pairs.values.numpy(), exact[:3], rtol=0, atol=1e-6 * np.abs(exact).max()
    )
    misfit = dense @ pairs.vectors - pairs.vectors * pairs.values
    assert bool((misfit.norm(dim=0) <= pairs.residuals + 1e-12).all())
    gram = pairs.vectors.T @ pairs.vectors
    assert torch.allclose(gram, torch.eye(3).double(), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([1.0] * 9, 3),
        ([0.0] * 9, 3),
        ([9.0] + [0.0] * 200, 2),
        ([3.0, 2.0, 1.0] + [0.0] * 200, 6),
        ([2.0, 2.0, 1.0, 1.0, 0.0, 0.0, -3.0], 4),
        ([4.0], 1),
        ([1.0, -1.0], 2),
        ([-5.0, -4.0, -3.0, -2.0], 2),
        ([5.0, 5.0, 5.0] + [1.0] * 300, 4),
        ([2.0] * 3 + [1.0] * 3 + [0.0] * 3, 3),
        ([5.0] * 3 + [0.1 * i for i in range(30)], 3),
        ([1e-9, 5e-10, 0.0, -1e-9], 2),
        ([1e9, 5e8, 0.0, -1e9], 2),
    ],
    ids=str,
)
def test_degenerate_small_and_low_rank_matrices(
    values: list[float], k: int, dtype: torch.dtype
) -> None:
    """Identity, zero, rank one, repeated values, any scale.

    Catches: ghost copies of an eigenvalue, missing copies, an absolute breakdown
    threshold, division by a zero norm.
    """
    for seed in SEEDS:
        pairs = top_eigenpairs(
            Diagonal(values, dtype), k, generator=seeded_generator(seed)
        )
        want = sorted(values, reverse=True)[:k]
        scale = max(abs(v) for v in values)
        np.testing.assert_allclose(pairs.values, want, rtol=0, atol=2e-6 * scale)
        assert pairs.converged


def test_no_ghosts_over_many_steps() -> None:
    """Three values only: the fourth is zero, however long it runs.

    Catches: Lanczos without reorthogonalization, which gives 3.0 six times.
    """
    operator = Diagonal([3.0, 2.0, 1.0] + [1e-6 * i for i in range(300)], torch.float32)
    pairs = top_eigenpairs(
        operator, 6, tol=1e-7, max_matvecs=400, generator=seeded_generator(0)
    )
    assert pairs.values[:3].tolist() == pytest.approx([3, 2, 1], rel=1e-5)
    assert float(pairs.values[3]) < 1e-3


def test_the_largest_is_algebraic_not_in_magnitude() -> None:
    """The lower end is as far from zero as the upper.

    Catches: power iteration, which returned -0.987 to 0.997 for this spectrum.
    """
    values = [1.0, -0.99, *np.linspace(-0.9, 0.9, 300)]
    for seed in SEEDS:
        operator = Diagonal(values, torch.float64)
        upper = top_eigenpairs(operator, generator=seeded_generator(seed))
        lower = top_eigenpairs(operator, which="SA", generator=seeded_generator(seed))
        assert float(upper.values[0]) == pytest.approx(1.0, abs=1e-3)
        assert float(lower.values[0]) == pytest.approx(-0.99, abs=1e-3)


def test_crowded_top_is_resolved_and_sorted() -> None:
    """Ten values between 0.9 and 1.

    Catches: stopping when two iterates are alike, which gave 0.92 to 0.99, unsorted.
    """
    values = [*np.linspace(0.9, 1.0, 10), *np.linspace(-0.1, 0.5, 500)]
    errors = []
    for seed in SEEDS:
        pairs = top_eigenpairs(
            Diagonal(values, torch.float64), 3, generator=seeded_generator(seed)
        )
        assert pairs.values.tolist() == sorted(pairs.values.tolist(), reverse=True)
        errors.append(np.abs(pairs.values.numpy() - np.sort(values)[:-4:-1]).max())
    assert np.median(errors) < 1e-5
    assert max(errors) < 0.0112


def test_one_value_of_a_crowd_is_rarely_taken_for_the_top() -> None:
    """The next value must have settled too, up to a part of the gap.

    Catches: stopping once one Ritz value has settled, which took a lower neighbour
    for the largest in 9 of 100 runs.
    """
    values = [*np.linspace(0.9, 1.0, 10), *np.linspace(-0.1, 0.5, 500)]
    wrong = 0
    for seed in range(100):
        pairs = top_eigenpairs(
            Diagonal(values, torch.float64), generator=seeded_generator(seed)
        )
        wrong += float(pairs.values[0]) < 0.995
    assert wrong <= 2


def test_top_value_costs_about_nine_products() -> None:
    """Catches: a default that runs far longer, or stops at two steps."""
    spectrum = wide_spectrum()
    costs, errors = [], []
    for seed in SEEDS:
        operator = Diagonal(spectrum, torch.float32)
        pairs = top_eigenpairs(operator, generator=seeded_generator(seed))
        costs.append(pairs.num_matvecs)
        errors.append(abs(float(pairs.values[0]) / 18.6 - 1))
        assert pairs.converged
    assert np.mean(costs) <= 10
    assert max(errors) < 1e-3


def test_several_values_miss_none() -> None:
    """Catches: stopping before a late eigenvalue has come up."""
    spectrum = wide_spectrum()
    for seed in SEEDS:
        operator = Diagonal(spectrum, torch.float32)
        pairs = top_eigenpairs(operator, 5, generator=seeded_generator(seed))
        np.testing.assert_allclose(pairs.values, spectrum[:5], rtol=1e-3)
        assert pairs.num_matvecs - pairs.num_copy_matvecs <= 25
        assert pairs.num_copy_matvecs <= 25


COPIES = [0.853] * 9 + [0.435] * 3 + [0.225, *np.linspace(-0.1, 0.1, 300)]
BELOW_ZERO = [-1.0] * 4 + list(np.linspace(-9, -2, 200))


@pytest.mark.parametrize("values", [COPIES, BELOW_ZERO], ids=["copies", "below zero"])
@pytest.mark.parametrize(("which", "k"), [("LA", 3), ("SA", 3), ("BE", 5)])
def test_each_value_comes_as_often_as_it_occurs(
    values: list[float], which: str, k: int
) -> None:
    """Vectors of one value are orthogonal, and residuals bound the misfit.

    Catches: one copy of each, since a Krylov space holds one; known vectors that are
    projected out to zero, above every negative value.
    """
    rising = np.sort(values)
    falling = rising[::-1]
    by_turns = np.stack([falling[:k], rising[:k]], 1).ravel()
    want = {"LA": falling, "SA": rising, "BE": by_turns}[which][:k]
    operator = Diagonal(values, torch.float64)
    pairs = top_eigenpairs(
        operator, k, which=which, max_matvecs=600, generator=seeded_generator(0)
    )
    np.testing.assert_allclose(pairs.values, want, atol=2e-3 * np.abs(values).max())
    products = torch.tensor(values).double()[:, None] * pairs.vectors
    misfit = (products - pairs.vectors * pairs.values).norm(dim=0)
    assert bool((misfit <= 1.01 * pairs.residuals + 1e-12).all())
    gram = pairs.vectors.T @ pairs.vectors
    np.testing.assert_allclose(gram, np.eye(k), atol=1e-5)
    assert pairs.copies_counted
    assert 0 < pairs.num_copy_matvecs < pairs.num_matvecs


def test_a_softmax_at_zero_weights_has_nine_tops() -> None:
    """The Hessian of ten equal classes has each eigenvalue nine times.

    Catches: the second different value in the place of the second.
    """
    torch.manual_seed(0)
    model = nn.Linear(20, 10).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    data = [(torch.randn(50, 20).double(), torch.randint(10, (50,)))]
    H = HessianOperator(model, nn.CrossEntropyLoss(), data)
    dense = torch.linalg.eigvalsh(H.to_dense())
    pairs = top_eigenpairs(H, 4, generator=seeded_generator(0))
    np.testing.assert_allclose(pairs.values, dense.flip(0)[:4], rtol=1e-3)


def test_a_search_for_copies_that_was_cut_short_is_told() -> None:
    """Catches: a list that looks complete when the budget ended the search."""
    operator = Diagonal(COPIES, torch.float64)
    pairs = top_eigenpairs(operator, 3, max_matvecs=14, generator=seeded_generator(0))
    assert pairs.converged
    assert not pairs.copies_counted
    assert str(pairs).endswith("each at least as often as listed; raise max_matvecs")
    whole = top_eigenpairs(operator, 3, generator=seeded_generator(0))
    assert "at least" not in str(whole)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_residuals_hold_where_the_loss_is_nearly_zero(scale: int) -> None:
    """In single precision a fitted softmax loses its digits, the same at each product.

    Catches: 1.188e-5 with a residual of 3e-10 where 1.170e-5 is right.
    """
    torch.manual_seed(0)
    inputs = torch.randn(40, 5)
    targets = (inputs @ torch.randn(3, 5).T).argmax(1)
    model, loss_fn = built_and_fitted(inputs, targets), nn.CrossEntropyLoss()
    with torch.no_grad():
        model[2].weight.mul_(scale)
    data = [(inputs, targets)]
    pairs = top_eigenpairs(HessianOperator(model, loss_fn, data))
    twin = copy.deepcopy(model).double()
    loss = sharpness_reference.flat_loss(twin, loss_fn, inputs.double(), targets)
    hessian = sharpness_reference.dense_hessian(
        loss, sharpness_reference.flat_weights(twin)
    )
    right = float(torch.linalg.eigvalsh(hessian)[-1])
    error = abs(float(pairs.values[0]) - right)
    assert error <= float(pairs.residuals[0])
    assert pairs.converged or float(pairs.residuals[0]) > 1e-3 * right


def built_and_fitted(inputs: Tensor, targets: Tensor) -> nn.Sequential:
    """Return a network whose cross-entropy is about 1e-4."""
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(600):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(inputs), targets).backward()
        optimizer.step()
    return model


def test_a_late_neighbour_is_rarely_missed() -> None:
    """Three values close together, two asked for.

    Catches: stopping before one value more than asked has settled, which missed one
    in 5 of 150 runs.
    """
    bulk = torch.rand(2000, generator=seeded_generator(0)).double() ** 8
    operator = Diagonal([10.0, 9.8, 9.6, 5.0, 4.9, *bulk], torch.float64)
    missed = 0
    for seed in range(150):
        pairs = top_eigenpairs(operator, 2, generator=seeded_generator(seed))
        missed += float(pairs.values[1]) < 9.7
    assert missed <= 1


def test_restarts_keep_memory_bounded_and_still_converge() -> None:
    """A slow spectrum needs several bases of vectors.

    Catches: losing the best vectors, or their coupling, at a restart.
    """
    values = np.linspace(0.0, 1.0, 2000) ** 2
    pairs = top_eigenpairs(
        Diagonal(values, torch.float64),
        2,
        tol=1e-6,
        max_matvecs=2000,
        generator=seeded_generator(0),
    )
    assert pairs.num_matvecs > 100
    assert pairs.converged
    np.testing.assert_allclose(pairs.values, np.sort(values)[:-3:-1], atol=1e-6)


def test_budget_ends_the_search_and_says_so() -> None:
    """Catches: an early stop that looks like a result."""
    operator = Diagonal(np.linspace(0.0, 1.0, 2000), torch.float64)
    pairs = top_eigenpairs(operator, max_matvecs=5, generator=seeded_generator(0))
    estimate = pairs.estimate()
    assert pairs.num_matvecs == 5
    assert not pairs.converged
    assert estimate.status is Status.NOT_CONVERGED
    assert estimate.value < 1.0 - 1e-3
    assert estimate.interval().high >= 1.0 - 0.2
    assert estimate.error_source is ErrorSource.SOLVER
    assert estimate.stderr is None


@pytest.mark.parametrize("bulk", [1.0, 3.0, 8.5])
def test_start_near_another_eigenvector_does_not_trap(bulk: float) -> None:
    """The start is the exact eigenvector of 9; the truth is 10.

    Catches: a warm start without random directions, or with a few steps of them only,
    since its residual is zero at once.
    """
    values = [10.0, 9.0, *np.linspace(0, bulk, 3000)]
    start = torch.zeros(3002)
    start[1] = 1.0
    for seed in SEEDS:
        pairs = top_eigenpairs(
            Diagonal(values, torch.float32),
            start=start,
            generator=seeded_generator(seed),
        )
        assert float(pairs.values[0]) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("budget", [4, 8, 20, 60, 150])
def test_residuals_bound_the_misfit_after_a_rough_start(budget: int) -> None:
    """Start vectors leave products outside the basis, also after restarts.

    Catches: a residual that forgets them.
    """
    values = torch.linspace(0.0, 1.0, 1000).double() ** 2
    operator = Diagonal(values, torch.float64)
    start = torch.randn(1000, 2, generator=seeded_generator(9)).double()
    start[-2:] += 20.0
    pairs = top_eigenpairs(
        operator,
        2,
        tol=1e-12,
        max_matvecs=budget,
        start=start,
        generator=seeded_generator(0),
    )
    misfit = values[:, None] * pairs.vectors - pairs.vectors * pairs.values
    found = misfit.norm(dim=0)
    assert bool((found <= pairs.residuals * (1 + 1e-9) + 1e-14).all())
    assert bool((pairs.residuals <= 3 * found + 1e-3).all())
    assert pairs.num_matvecs == budget


@pytest.mark.parametrize(("roughness", "saved"), [(0.0, 2.0), (0.05, 1.5), (0.3, 0.0)])
def test_good_start_saves_products(roughness: float, saved: float) -> None:
    """Exact, or off by what some steps of training make of it, or by much.

    Catches: ignoring the start; keeping only the wanted vector, so that the value next
    to it has to be found anew each time.
    """
    spectrum = wide_spectrum()
    cold, warm, errors = [], [], []
    for seed in SEEDS:
        generator = seeded_generator(seed)
        noise = torch.randn(len(spectrum), 2, generator=generator)
        start = torch.eye(len(spectrum), 2) + roughness * noise / noise.norm(dim=0)
        operator = Diagonal(spectrum, torch.float32)
        cold.append(top_eigenpairs(operator, generator=generator).num_matvecs)
        pairs = top_eigenpairs(operator, start=start, generator=generator)
        warm.append(pairs.num_matvecs)
        errors.append(abs(float(pairs.values[0]) / 18.6 - 1))
    assert np.mean(warm) <= np.mean(cold) - saved
    assert max(errors) < 1e-3


def test_block_of_starts_is_taken() -> None:
    values = [10.0, 9.0, 8.0, *np.linspace(0, 1, 100)]
    operator = Diagonal(values, torch.float64)
    first = top_eigenpairs(operator, 3, generator=seeded_generator(0))
    again = top_eigenpairs(
        operator, 3, start=first.vectors, generator=seeded_generator(1)
    )
    np.testing.assert_allclose(again.values, [10, 9, 8], rtol=1e-4)


def test_same_generator_gives_the_same_bits_and_none_does_not() -> None:
    """Catches: the global random state, and a fixed seed behind ``None``."""
    operator = Diagonal(wide_spectrum(), torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = top_eigenpairs(operator, generator=seeded_generator(4))
    two = top_eigenpairs(operator, generator=seeded_generator(4))
    free = {float(top_eigenpairs(operator).values[0]) for _ in range(3)}
    assert torch.equal(one.vectors, two.vectors)
    assert len(free) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_printed_it_is_the_values() -> None:
    """Catches: every weight of every vector on the screen."""
    operator = Diagonal(wide_spectrum(), torch.float32)
    pairs = top_eigenpairs(operator, 2, max_matvecs=4, generator=seeded_generator(0))
    first, *rest = str(pairs).splitlines()
    assert first == "eigenvalues after 4 products:"
    assert [line.strip() for line in rest] == [str(pairs.estimate(i)) for i in (0, 1)]
    assert rest[1].endswith("[not_converged]")
    assert "vectors" not in repr(pairs)
    assert len(repr(pairs)) < 300
    screened = replace(pairs, num_screening_matvecs=9)
    assert "4 products and 9 of an eighth of the data" in str(screened)


def test_weights_that_blew_up_give_diverged() -> None:
    """Catches: an exception, or a number, from a Hessian of NaN."""
    model = seeded(mlp)()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    H = HessianOperator(model, nn.CrossEntropyLoss(), RAGGED)
    pairs = top_eigenpairs(H, 2)
    assert pairs.statuses == (Status.DIVERGED, Status.DIVERGED)
    assert bool(pairs.values.isnan().all())
    assert pairs.num_matvecs == 1
    assert pairs.estimate().status is Status.DIVERGED


def test_single_precision_agrees_with_double() -> None:
    """Catches: coefficients accumulated in the operator's own precision."""
    spectrum = torch.from_numpy(
        reference.symmetric_with_spectrum(np.geomspace(100, 0.01, 120))
    )
    single = top_eigenpairs(
        spectrum.float(), 4, tol=1e-5, generator=seeded_generator(0)
    )
    want = [float(v) for v in np.geomspace(100, 0.01, 120)[:4]]
    assert single.values.tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 0}, "k needs to be at least 1, got 0"),
        ({"k": 5}, "between 1 and the size 4, got 5"),
        ({"which": "LM"}, "'LA', 'SA', 'BE', got 'LM'.*not by magnitude"),
        ({"tol": 0.0}, "tol needs to be between 0 and 1, got 0.0"),
        ({"k": 3, "max_matvecs": 2}, "at least k=3, got 2"),
        ({"start": torch.zeros(3)}, r"needs shape \(4,\) or \(4, j\), got \(3,\)"),
        ({"start": torch.zeros(4)}, "finite vectors that are not zero"),
        ({"start": torch.full((4,), torch.nan)}, "finite vectors that are not zero"),
    ],
)
def test_arguments_are_checked(options: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        top_eigenpairs(torch.eye(4), **options)

"""Spectra on which other packages are silently wrong, and what ours says of them.

Each test first shows the failure, so that it says when a peer has been mended.
"""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pyhessian import hessian
from torch import Tensor, nn
from torch.testing import assert_close

from noisekit.core.results import Status
from noisekit.curvature import (
    HessianOperator,
    spectral_quadrature,
    top_eigenpairs,
    trace,
)
from tests.randomness import seeded
from tests.reference.curvature import symmetric_with_spectrum

with warnings.catch_warnings():
    # They script functions with a tool that PyTorch is giving up.
    warnings.simplefilter("ignore")
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos
    from hessian_eigenthings import HessianOperator as EigenthingsHessian
    from hessian_eigenthings import LambdaOperator, lanczos, supervised_loss
    from hessian_eigenthings import trace as eigenthings_trace
    from hessian_eigenthings.algorithms import power_iteration_one

SCRIPTED = "ignore:.*torch.jit.script:FutureWarning"


def as_lambda(matrix: Tensor) -> LambdaOperator:
    return LambdaOperator(lambda v: matrix @ v, len(matrix), dtype=matrix.dtype)


def test_two_steps_of_lanczos_are_not_an_answer() -> None:
    """hessian-eigenthings' default number of steps for one value is two."""
    values = np.concatenate([[5.0], np.linspace(-1, 1, 99)])
    matrix = torch.from_numpy(symmetric_with_spectrum(values.tolist()))
    theirs = lanczos(as_lambda(matrix), k=1, which="LA", seed=0)
    ours = top_eigenpairs(matrix, generator=seeded())
    assert float(theirs.eigenvalues[0]) < 4.5
    assert float(ours.values[0]) == pytest.approx(5.0, rel=1e-3)
    stopped = top_eigenpairs(matrix, max_matvecs=2, generator=seeded())
    assert stopped.statuses == (Status.NOT_CONVERGED,)


def test_momentum_moves_the_eigenvalue_of_power_iteration() -> None:
    """hessian-eigenthings reports 4.5 for 5 at a momentum of one half, as converged."""
    matrix = torch.diag(torch.tensor([5.0, 1.0, 0.5, 0.1])).double()
    value, _, _, _, converged = power_iteration_one(
        as_lambda(matrix), momentum=0.5, max_iter=500, seed=0
    )
    assert converged
    assert value == pytest.approx(4.5, abs=0.01)
    ours = top_eigenpairs(matrix, generator=seeded())
    assert float(ours.values[0]) == pytest.approx(5.0)


def test_ghosts_of_lanczos_without_reorthogonalisation() -> None:
    """Those of curvlinops find an outlier many times over, ours once per probe."""
    values = np.concatenate([[10.0, 8.0], np.linspace(0.0, 1.0, 298)])
    matrix = symmetric_with_spectrum(values.tolist())
    nodes, _ = fast_lanczos(torch.from_numpy(matrix), 128)
    assert ((nodes - 10.0).abs() < 1e-6).sum() > 5
    ours = spectral_quadrature(matrix, num_steps=128, generator=seeded())
    for row, weights in zip(ours.nodes, ours.weights, strict=True):
        assert (np.abs(row[weights > 0] - 10.0) < 1e-6).sum() == 1


def test_a_signed_trace_does_not_stop_the_sampling() -> None:
    """PyHessian divides by the trace with its sign: a negative one ends at two samples.

    Ours has a number of probes fixed beforehand, and an error that covers.
    """
    generator = seeded()
    inputs = torch.randn(64, 6, generator=generator)
    model = nn.Linear(6, 2)
    concave = [(inputs, torch.randn(64, 2, generator=generator))]

    class Concave(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            noise = outputs.tanh() * targets
            return -(outputs.square() + noise).mean()

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = hessian(model, Concave(), data=concave[0], cuda=False)
        samples = peer.trace(maxIter=100, tol=1e-3)
    model.zero_grad()
    H = HessianOperator(model, Concave(), concave)
    truth = float(H.to_dense().trace())
    assert truth < 0
    assert len(samples) == 2
    found = trace(H, num_matvecs=60, method="hutchinson", generator=generator)
    assert found.num_samples == 60
    assert found.interval(0.999).contains(truth)


def classes(num_examples: int = 12, num_inputs: int = 3) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(num_examples, num_inputs, generator=seeded())
    return inputs, torch.randint(2, (num_examples,), generator=seeded(1))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def exact(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The Hessian over all data at once, whose mean leaves ignored targets out."""
    return HessianOperator(model, nn.CrossEntropyLoss(), [(inputs, targets)]).to_dense()


def test_batches_of_unequal_size_do_not_count_alike() -> None:
    """hessian-eigenthings averages 20, 20 and 4 examples with equal weights."""
    inputs, targets = classes(44)
    batches = list(zip(inputs.split(20), targets.split(20), strict=True))
    model, loss_fn = linear(), nn.CrossEntropyLoss()
    truth = exact(model, inputs, targets)
    theirs = EigenthingsHessian(model, batches, supervised_loss(loss_fn))
    vector = torch.randn(8, generator=seeded())
    gap = (theirs.matvec(vector) - truth @ vector).norm() / (truth @ vector).norm()
    assert float(gap) > 0.01
    ours = HessianOperator(model, loss_fn, batches)
    assert_close(ours @ vector, truth @ vector)


def test_ghosts_beyond_fifty_steps() -> None:
    """hessian-eigenthings drops its reorthogonalisation there: 3.0 several times."""
    values = torch.tensor([3.0, 2.0, 1.0] + [1e-6 * i for i in range(200)])
    theirs = lanczos(
        as_lambda(torch.diag(values)), k=6, max_iter=60, which="LA", seed=0
    )
    copies = sum(abs(float(v) - 3.0) < 1e-3 for v in theirs.eigenvalues)
    assert copies > 1
    ours = top_eigenpairs(torch.diag(values), 6, max_matvecs=60, generator=seeded())
    assert ours.values[:3].tolist() == pytest.approx([3.0, 2.0, 1.0], rel=1e-4)
    assert float(ours.values[3]) < 1e-3


def test_no_seed_is_not_a_fixed_seed() -> None:
    """hessian-eigenthings' repeats are one and the same number."""
    matrix = torch.from_numpy(symmetric_with_spectrum(np.linspace(-1, 3, 50).tolist()))
    theirs = {
        eigenthings_trace(as_lambda(matrix), num_matvecs=9, seed=None).estimate
        for _ in range(3)
    }
    assert len(theirs) == 1
    assert len({trace(matrix, num_matvecs=9).value for _ in range(3)}) == 3


def test_differences_do_not_depend_on_the_length_of_the_vector() -> None:
    """hessian-eigenthings moves the weights by as much as the vector is long."""
    inputs, targets = classes()
    model, loss_fn = linear(), nn.CrossEntropyLoss()
    truth = exact(model, inputs, targets)
    theirs = EigenthingsHessian(
        model,
        [(inputs, targets)],
        supervised_loss(loss_fn),
        method="finite_difference",
    )
    ours = HessianOperator(
        model, loss_fn, [(inputs, targets)], form="finite_difference"
    )
    vector = 300 * torch.randn(8, generator=seeded())
    want = truth @ vector
    assert float((theirs.matvec(vector) - want).norm() / want.norm()) > 0.02
    assert float((ours @ vector - want).norm() / want.norm()) < 1e-5


def test_products_leave_running_statistics_alone() -> None:
    """hessian-eigenthings' count as batches of the training."""
    inputs, targets = classes()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    loss_fn = nn.CrossEntropyLoss()
    theirs = EigenthingsHessian(model, [(inputs, targets)], supervised_loss(loss_fn))
    for _ in range(10):
        theirs.matvec(torch.ones(theirs.size))
    assert int(model[1].num_batches_tracked) == 10
    ours = HessianOperator(model, loss_fn, [(inputs, targets)], bn="batch")
    for _ in range(10):
        ours @ torch.ones(ours.shape[0])
    assert int(model[1].num_batches_tracked) == 10


def curvlinops_hessian(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batches: list[tuple[Tensor, Tensor]],
) -> HessianLinearOperator:
    return HessianLinearOperator(
        model, loss_fn, list(model.parameters()), batches, check_deterministic=False
    )


@pytest.mark.filterwarnings(SCRIPTED)
def test_ignored_targets_do_not_count() -> None:
    """Batches weigh by all of their examples in curvlinops."""
    inputs, targets = classes()
    targets[:5] = -100  # of the first batch one alone counts
    batches = list(zip(inputs.split(6), targets.split(6), strict=True))
    model, loss_fn = linear(), nn.CrossEntropyLoss()
    truth = exact(model, inputs, targets)
    vector = torch.randn(8, generator=seeded())
    theirs = curvlinops_hessian(model, loss_fn, batches) @ vector
    assert float((theirs - truth @ vector).norm() / (truth @ vector).norm()) > 0.05
    assert_close(HessianOperator(model, loss_fn, batches) @ vector, truth @ vector)


@pytest.mark.filterwarnings(SCRIPTED)
def test_a_loss_of_ones_own_has_no_reduction() -> None:
    """An attribute that curvlinops needs; ours finds out what the loss divides by."""
    inputs, targets = classes()
    model = linear()

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(AttributeError, match="reduction"):
        curvlinops_hessian(model, own, [(inputs, targets)]) @ torch.ones(8)
    ours = HessianOperator(model, own, [(inputs, targets)])
    assert_close(ours.to_dense(), exact(model, inputs, targets))


@pytest.mark.filterwarnings(SCRIPTED)
def test_batch_norm_in_training_mode_is_no_obstacle() -> None:
    """The transforms that curvlinops uses refuse it."""
    inputs, targets = classes()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    loss_fn = nn.CrossEntropyLoss()
    with pytest.raises(RuntimeError, match="in-place"):
        curvlinops_hessian(model, loss_fn, [(inputs, targets)]) @ torch.ones(34)
    for bn in ("running", "batch"):
        H = HessianOperator(model, loss_fn, [(inputs, targets)], bn=bn)
        dense = H.to_dense()
        assert bool(dense.isfinite().all())
        assert_close(dense, dense.T)


def test_a_space_that_ends_early_gives_no_copies() -> None:
    """Rank two: curvlinops goes on, dividing by the length of rounding errors."""
    matrix = torch.diag(torch.tensor([9.0, 1.0] + [0.0] * 50).double())
    torch.manual_seed(0)
    nodes, _ = fast_lanczos(matrix, 10)
    assert ((nodes - 9.0).abs() < 1e-3).sum() > 1
    ours = spectral_quadrature(matrix, num_steps=10, generator=seeded())
    assert ours.num_matvecs == 4 * 3
    for row in ours.nodes:
        assert row == pytest.approx([0.0, 1.0, 9.0], abs=1e-12)

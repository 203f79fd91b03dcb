"""The top eigenvalue by the PyHessian package, with its defects worked around."""

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch
from noisekit.core.errors import MissingPackageError, UsageError
from noisekit.core.params import flatten
from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.random_vectors import entropy_generator


def pyhessian_top_eigenvalue(
    risk: EmpiricalRisk,
    *,
    tol: float = 1e-4,
    max_iterations: int = 1000,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the eigenvalue of largest magnitude as PyHessian finds it.

    PyHessian weights batches by their examples, measures all parameters and fails
    where one has no gradient, leaves mode and gradients behind, draws from the
    global random state, and stops when two values in a row are alike. So it gets
    stand-ins for the chosen parameters, a loss that carries our weights, and a seed;
    nothing of the model is touched, and the residual of its result is ours.

    Args:
        risk: Whose Hessian.
        tol: PyHessian's own: relative change between two iterations.
        max_iterations: PyHessian's own.
        generator: Gives the seed; fresh entropy by default.

    Returns:
        PyHessian's value, with ``|H v - value v|`` at its vector as ``bound``.
        ``NOT_COMPARABLE`` where it is negative: the largest magnitude is then at the
        lower end of the spectrum, and not the largest eigenvalue. ``NOT_CONVERGED``
        where the residual is above a tenth of the value.

    Raises:
        MissingPackageError: If PyHessian is not installed.
        UsageError: If ``tol`` or ``max_iterations`` is not positive, or the data are
            spread over several processes.

    Source:
        Yao et al. 2020, arXiv:1912.07145.
    """
    if tol <= 0 or max_iterations < 1:
        raise UsageError(
            "PyHessian needs tol > 0 and max_iterations >= 1, got "
            f"{tol} and {max_iterations}."
        )
    if not risk.ranks.alone:
        raise UsageError(
            "PyHessian needs all data in one process, got a share of them in each of "
            f"{risk.ranks.size}; use method='lanczos'."
        )
    try:
        from pyhessian import hessian
    except ImportError as error:
        raise MissingPackageError(
            "method='pyhessian' needs PyHessian, which is not installed; run "
            "pip install pyhessian==0.1, or use method='lanczos'."
        ) from error
    if not math.isfinite(risk.value()):
        # It would run to its last iteration on numbers that are not.
        return _estimate(math.nan, math.nan, 0)
    seed = torch.randint(2**62, (), generator=entropy_generator(generator))
    loader = _WeightedBatches(risk)
    on_cuda = risk.layout.device.type == "cuda"
    with risk.evaluating(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        torch.default_generator.manual_seed(int(seed))
        peer = hessian(_StandIn(risk), _loss, dataloader=loader, cuda=on_cuda)
        values, vectors = peer.eigenvalues(maxIter=max_iterations, tol=tol, top_n=1)
    value, vector = float(values[0]), flatten(vectors[0])
    vector = vector / vector.norm()
    with HessianOperator(risk, form="rebuilt") as H:
        residual = float((H @ vector - value * vector).norm())
    return _estimate(value, residual, loader.num_passes + 1)


class _WeightedBatch:
    """A batch in the place of inputs, of which PyHessian asks two things only."""

    def __init__(self, factor: float, batch: Batch) -> None:
        self.factor = factor
        self.batch = batch

    def size(self, axis: int) -> int:
        """Weight that PyHessian gives it; ours is in ``factor``."""
        assert axis == 0
        return 1

    def to(self, device: str) -> "_WeightedBatch":
        """Return itself: the data are where the model is."""
        assert device in {"cpu", "cuda"}
        return self


class _WeightedBatches:
    """The batches of a risk as PyHessian's loader, read again on each product."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        self._risk = risk
        self._num_used = sum(count > 0 for count in risk.normalisers)
        self.num_passes = 0

    def __iter__(self) -> Iterator[tuple[_WeightedBatch, Tensor]]:
        self.num_passes += 1
        for weight, batch in self._risk.weighted_batches():
            # PyHessian divides by the number of examples, one for each batch here.
            yield _WeightedBatch(weight * self._num_used, batch), torch.empty(0)


class _StandIn(nn.Module):
    """A module whose parameters are copies of the chosen ones, and which gives losses.

    PyHessian's backward passes then fire no hook and leave no gradient on the
    parameters of the user's model.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__()
        self._risk = risk
        self.chosen = nn.ParameterList(p.detach().clone() for p in risk.parameters)
        self._others = {name: p.detach() for name, p in risk.model.named_parameters()}

    def forward(self, weighted: _WeightedBatch) -> Tensor:
        """Return the weighted loss of a batch."""
        own = dict(zip(self._risk.layout.names, self.chosen, strict=True))
        batch = weighted.batch
        outputs = self._risk.outputs_of(batch, {**self._others, **own})
        loss = weighted.factor * self._risk.loss_at(outputs, batch[1])
        # Adds nothing to any derivative, but gives every parameter a gradient.
        return loss + 0.0 * torch.stack([(p * p).sum() for p in self.chosen]).sum()


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Pass on what the stand-in returned, in the place of PyHessian's criterion."""
    assert targets.numel() == 0
    return outputs


def _estimate(value: float, residual: float, num_matvecs: int) -> Estimate:
    status = Status.OK
    if not math.isfinite(value):
        status = Status.DIVERGED
    elif value < 0:
        status = Status.NOT_COMPARABLE
    elif residual > 0.1 * value:
        status = Status.NOT_CONVERGED
    return Estimate(
        value=value,
        bound=residual,
        error_source=ErrorSource.SOLVER,
        status=status,
        num_matvecs=num_matvecs,
    )

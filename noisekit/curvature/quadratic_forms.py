"""Quadratic forms of an operator with random probes, and the error of their mean."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from noisekit.core.results import ErrorSource, Estimate, Status
from noisekit.curvature.operators.operator import SymmetricOperator
from noisekit.curvature.random_vectors import Probe, probe_block, shared_generator

# Products of a block share a pass over the data; more of them only take memory.
_BLOCK = 4
# Probes of a first round, whose standard deviation decides how many follow.
_PILOT = 12
# Relative rounding error of a trace, in units of eps.
_ROUNDINGS = 50


class Probes:
    """Independent random vectors ``z`` of covariance one, and their products.

    Attributes:
        wide: Type that sums are accumulated in.
        eps: Relative rounding error of a trace.
        num_matvecs: Products spent.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        generator: torch.Generator | None,
        *,
        probe: Probe = "rademacher",
        weights: Tensor | None = None,
    ) -> None:
        self._operator = operator
        self._generator = shared_generator(generator, operator.ranks, operator.device)
        self._probe = probe
        self._weights = None if weights is None else weights.to(operator.device)
        self._left_out: Tensor | None = None
        self.wide = torch.promote_types(operator.dtype, torch.float32)
        self.eps = _ROUNDINGS * torch.finfo(operator.dtype).eps
        self.num_matvecs = 0

    def leave_out(self, basis: Tensor) -> None:
        """Make later probes orthogonal to the columns of ``basis``."""
        self._left_out = basis

    def products(self, block: Tensor) -> Tensor:
        """Return ``H @ block``, in the wide type."""
        self.num_matvecs += block.shape[1]
        pieces = [
            (self._operator @ piece.to(self._operator.dtype)).to(self.wide)
            for piece in torch.split(block, _BLOCK, dim=1)
        ]
        return torch.cat(pieces, 1)

    def blocks(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``count`` probes in all, and their products, as columns."""
        like = (self.wide, self._operator.device)
        for begin in range(0, count, _BLOCK):
            shape = (self._operator.shape[0], min(_BLOCK, count - begin))
            block = probe_block(shape, self._generator, like, probe=self._probe)
            if self._weights is not None:
                block = block * self._weights[:, None].to(block)
            if self._left_out is not None:
                block = block - self._left_out @ (self._left_out.T @ block)
            yield block, self.products(block)

    def forms(self, count: int) -> Tensor:
        """Return ``z' H z`` of ``count`` probes, in double precision."""
        return self.sums(count, lambda z, product: z * product)

    def sums(self, count: int, terms: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the sums over parameters of ``terms(z, H z)``, one per probe."""
        samples = [
            terms(block.double(), products.double()).sum(0)
            for block, products in self.blocks(count)
        ]
        return torch.cat(samples).cpu()


def mean_estimate(
    samples: Tensor, num_matvecs: int, *, exact: float = 0.0, eps: float = 0.0
) -> Estimate:
    """Return ``exact`` plus the mean of the samples, with its standard error.

    The error includes the rounding of the exact part, ``eps`` of it, which is all that
    remains where the dominant directions are the whole matrix.
    """
    mean, count = exact + float(samples.mean()), len(samples)
    return Estimate(
        value=mean,
        stderr=math.hypot(float(samples.std()) / math.sqrt(count), eps * exact),
        error_source=ErrorSource.PROBES,
        num_samples=count,
        dof=count - 1,
        status=Status.OK if math.isfinite(mean) else Status.DIVERGED,
        num_matvecs=num_matvecs,
    )


def two_stage_estimate(
    probes: Probes, exact: float, most: int, target: tuple[float, bool]
) -> Estimate:
    """Return the mean of as many probes as a pilot round shows to be needed.

    Stein's two-stage procedure: with ``s`` the standard deviation of the pilot round,
    ``n = (s / target)²`` probes in all, and the error ``s / sqrt(n)`` with the degrees
    of freedom of the pilot. The spread of later probes is not used, so that the
    stopping rule does not bias the error.

    Source:
        Stein 1945, "A two-sample test for a linear hypothesis whose power is
        independent of the variance".

    Args:
        probes: Where samples come from.
        exact: What is added to their mean.
        most: Largest number of probes.
        target: Standard error, and whether relative to the value.
    """
    wanted, relative = target
    pilot = probes.forms(min(_PILOT, most))
    spread = float(pilot.std())
    scale = abs(exact + float(pilot.mean())) if relative else 1.0
    wanted *= scale
    if not math.isfinite(wanted + spread):
        return mean_estimate(pilot, probes.num_matvecs, exact=exact)
    # Without spread the pilot suffices; relative to a value of zero nothing does.
    needed = len(pilot)
    if spread > 0.0:
        needed = most + 1 if wanted == 0.0 else math.ceil((spread / wanted) ** 2)
    total = max(len(pilot), min(needed, most))
    samples = pilot
    if total > len(pilot):
        samples = torch.cat([pilot, probes.forms(total - len(pilot))])
    mean = exact + float(samples.mean())
    return Estimate(
        value=mean,
        stderr=math.hypot(spread / math.sqrt(total), probes.eps * exact),
        error_source=ErrorSource.PROBES,
        num_samples=total,
        dof=len(pilot) - 1,
        status=Status.OK if needed <= most else Status.NOT_CONVERGED,
        num_matvecs=probes.num_matvecs,
    )

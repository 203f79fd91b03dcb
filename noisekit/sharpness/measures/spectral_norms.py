"""How large the curvature is in all directions, and in how many there is any."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import NumSamples, Positive, PositiveInt
from noisekit.curvature import norms
from noisekit.curvature.operators.ggn import GGNOperator
from noisekit.curvature.operators.risk_operator import RiskOperator
from noisekit.curvature.random_vectors import sign_vector
from noisekit.sharpness.data_error import (
    form,
    has_groups,
    mean_weights,
    product_stderr,
)
from noisekit.sharpness.measurement import Measure, Measurement, MeasurementContext

_SOLVED = 1e-4
"""Relative residual at which a linear system counts as solved."""


@dataclass(frozen=True, kw_only=True)
class HessianFrobeniusNorm(Measure):
    """Settings of :func:`hessian_frobenius_norm`."""

    name = "hessian_frobenius_norm"
    description = "the Frobenius norm of the Hessian by random signs"
    needs = "second derivatives"
    sources = ("hutchinson1989stochastic",)

    num_matvecs: NumSamples = 32

    @property
    def _num_error_probes(self) -> int:
        return max(4, self.num_matvecs // 4)

    def cost(self) -> int:
        """Return the cost of the products, those of the error over batches too."""
        return 2 * (self.num_matvecs + 2 * self._num_error_probes)

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        r"""Yield the norm; its error over batches takes half as many products again.

        To first order the square moves by :math:`2\,\mathrm{tr}(H\,\mathrm{d}H)`, so a
        batch's part of it is the mean of :math:`(H z)^\top H_b z`.
        """
        hessian, generator = context.hessian, context.stream("frobenius")
        result = norms.frobenius_norm(
            hessian, num_matvecs=self.num_matvecs, generator=generator
        )
        if not context.data_error or not has_groups(hessian):
            yield self.measured(result)
            return
        noted: list[Tensor] = []
        num_probes = self._num_error_probes
        for signs in _signs(hessian, num_probes, generator):
            image = hessian @ signs
            with hessian.noting(_form_with(image)) as row:
                hessian @ signs
            noted.extend(row)
        square = float(torch.stack(noted).sum()) / num_probes
        stderr = product_stderr(hessian, noted, mean_weights(noted))
        if stderr is not None:
            # Relative to the same draws, which move every batch's part alike.
            stderr = result.value * stderr / square if square > 0 else None
        yield self.measured(_with_products(result, 2 * num_probes), data_stderr=stderr)


@dataclass(frozen=True, kw_only=True)
class EffectiveDimension(Measure):
    """Settings of :func:`effective_dimension`."""

    name = "effective_dimension"
    description = (
        "the effective dimension of the Gauss-Newton matrix by Lanczos quadrature"
    )
    needs = "a loss that is convex in the outputs"
    sources = ("maddox2020rethinking",)
    in_variant = ("shift",)

    shift: Positive = 1e-2
    num_probes: NumSamples = 8
    num_steps: PositiveInt = 20

    def cost(self) -> int:
        """Return the cost of the quadrature, and of as many linear systems."""
        return 2 * self.num_probes * (2 * self.num_steps + 1)

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        r"""Yield the number; its error over batches takes as many products again.

        To first order it moves by :math:`z\,\mathrm{tr}((G+z)^{-2}\,\mathrm{d}G)`, so a
        batch's part of that is the mean of :math:`z\,u^\top G_b u` with
        :math:`(G+z)\,u` random signs.
        """
        generator = context.stream("effective_dimension")
        with GGNOperator(context.risk) as gauss_newton:
            result = norms.effective_dimension(
                gauss_newton,
                self.shift,
                num_probes=self.num_probes,
                num_steps=self.num_steps,
                generator=generator,
            )
            stderr = None
            if context.data_error and has_groups(gauss_newton):
                before = gauss_newton.num_matvecs
                stderr = self._data_stderr(gauss_newton, generator)
                result = _with_products(result, gauss_newton.num_matvecs - before)
        yield self.measured(result, detail={"shift": self.shift}, data_stderr=stderr)

    def _data_stderr(
        self, gauss_newton: GGNOperator, generator: torch.Generator
    ) -> float | None:
        noted: list[Tensor] = []
        for signs in _signs(gauss_newton, self.num_probes, generator):
            solution = _solved(gauss_newton, self.shift, signs, self.num_steps)
            with gauss_newton.noting(form) as row:
                gauss_newton @ solution
            noted.extend(row)
        return product_stderr(gauss_newton, noted, self.shift * mean_weights(noted))


@checked
def hessian_frobenius_norm(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    num_matvecs: int = HessianFrobeniusNorm.num_matvecs,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    r"""Return :math:`\|H\|_F`, the root of the sum of squared Hessian eigenvalues.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        num_matvecs: Random probes, one Hessian product each.
        generator: Source of the random signs; by default a fresh one.
        data_error: Include the sampling error of the data, to first order, at about the
            same cost again.

    Returns:
        The norm [loss/param²], with its standard error over probes, and
        over data where asked for.

    Raises:
        UsageError: If fewer than 2 products are given.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> round(float(nk.hessian_frobenius_norm(model, loss_fn, batches)) ** 2, 3)
        17.0
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = HessianFrobeniusNorm(num_matvecs=num_matvecs)
    return measure.estimate(risk, generator=generator, data_error=data_error)


@checked
def effective_dimension(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    shift: float = EffectiveDimension.shift,
    num_probes: int = EffectiveDimension.num_probes,
    num_steps: int = EffectiveDimension.num_steps,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Estimate:
    r"""Return how many directions are curved: :math:`\sum_i \lambda_i/(\lambda_i+z)`.

    The eigenvalues are those of the Gauss-Newton matrix, which has no negative ones;
    of the Hessian the sum is not a count.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        shift: ``z``: curvature that counts as a half [loss/param²], such as a weight
            decay. Only values at the same shift can be compared.
        num_probes: Random vectors.
        num_steps: Most products for each.
        generator: Source of the vectors; by default a fresh one.
        data_error: Include the sampling error of the data, to first order, at about the
            same cost again.

    Returns:
        The number of directions, with its standard error over probes, and
        over data where asked for.

    Raises:
        UsageError: If an argument is out of range, or the loss is not convex in the
            outputs.

    Source:
        MacKay 1992, "Bayesian interpolation"; Maddox et al. 2020, arXiv:2003.02139.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> generator = torch.Generator().manual_seed(0)
        >>> dimension = nk.effective_dimension(
        ...     model, loss_fn, batches, shift=1.0, num_probes=500, generator=generator
        ... )
        >>> print(dimension)  # 1 / (1 + 1) + 4 / (4 + 1)
        1.304 ± 0.0098
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = EffectiveDimension(
        shift=shift, num_probes=num_probes, num_steps=num_steps
    )
    return measure.estimate(risk, generator=generator, data_error=data_error)


def _form_with(image: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what notes ``image' (H_b v)``."""
    return lambda _, part: form(image, part)


def _signs(
    operator: RiskOperator, count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    like = (operator.dtype, operator.device)
    for _ in range(count):
        yield sign_vector(operator.shape[0], generator, like)


def _solved(
    operator: RiskOperator, shift: float, target: Tensor, num_steps: int
) -> Tensor:
    """Solve for ``(G + shift) u = target`` by conjugate gradients, within the steps."""
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    size = form(residual, residual)
    enough = _SOLVED**2 * size
    for _ in range(num_steps):
        image = operator @ direction + shift * direction
        step = size / form(direction, image)
        solution += step.to(solution) * direction
        residual -= step.to(residual) * image
        last, size = size, form(residual, residual)
        if size <= enough:
            break
        direction = residual + (size / last).to(residual) * direction
    return solution


def _with_products(estimate: Estimate, num_matvecs: int) -> Estimate:
    """The estimate with further products counted."""
    return replace(estimate, num_matvecs=estimate.num_matvecs + num_matvecs)

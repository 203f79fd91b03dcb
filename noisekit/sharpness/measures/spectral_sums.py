"""Sums over the spectrum, each with its error over probes and over the batches."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from noisekit.core.results import Estimate
from noisekit.curvature.norms import effective_dimension, frobenius_norm
from noisekit.curvature.operators.ggn import GGNOperator
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.operators.risk_operator import RiskOperator
from noisekit.curvature.random_vectors import sign_vector
from noisekit.curvature.traces import trace, weighted_trace
from noisekit.sharpness.data_error import (
    WithDataError,
    batch_shares,
    data_stderr,
    gathered,
)

_SOLVED = 1e-4


def form(vector: Tensor, product: Tensor) -> Tensor:
    """Return the inner product of a vector and its product, in double precision."""
    return vector.double() @ product.double()


def trace_with_data_error(
    hessian: HessianOperator, *, num_matvecs: int, generator: torch.Generator
) -> WithDataError:
    """Return the trace; its error over batches takes no more products.

    The trace is linear in the matrix once directions and probes are drawn, so that
    each batch has its part of it.
    """
    with hessian.noting(form) as noted:
        found = trace(hessian, num_matvecs=num_matvecs, generator=generator)
    num_probes = found.num_samples or 0
    weights = torch.ones(len(noted), dtype=torch.float64)
    weights[: num_matvecs // 3] = 0.0  # a third only looks for directions
    weights[len(noted) - num_probes :] = 1 / num_probes
    return found, stderr_of_notes(hessian, noted, weights)


def weighted_trace_with_data_error(
    hessian: HessianOperator, *, num_matvecs: int, generator: torch.Generator
) -> WithDataError:
    """Return the trace in units of the weights, likewise."""
    with hessian.noting(form) as noted:
        found = weighted_trace(
            hessian,
            hessian.risk.vector(),
            num_matvecs=num_matvecs,
            generator=generator,
        )
    return found, stderr_of_notes(hessian, noted, mean_weights(noted))


def frobenius_with_data_error(
    hessian: HessianOperator,
    *,
    num_matvecs: int,
    generator: torch.Generator,
    data_error: bool = True,
) -> WithDataError:
    r"""Return the Frobenius norm; its error over batches takes half as many again.

    To first order the square moves by :math:`2\,\mathrm{tr}(H\,\mathrm{d}H)`, so a
    batch's part of it is the mean of :math:`(H z)^\top H_b z`.
    """
    found = frobenius_norm(hessian, num_matvecs=num_matvecs, generator=generator)
    if not data_error or not _has_groups(hessian):
        return found, None
    noted: list[Tensor] = []
    num_probes = max(4, num_matvecs // 4)
    for signs in _signs(hessian, num_probes, generator):
        image = hessian @ signs
        with hessian.noting(partial(_form_with, image)) as row:
            hessian @ signs
        noted.extend(row)
    square = float(torch.stack(noted).sum()) / num_probes
    stderr = stderr_of_notes(hessian, noted, mean_weights(noted))
    if stderr is None or not square > 0:
        return _paid(found, 2 * num_probes), None
    # Relative to the same draws, which move every batch's part alike.
    return _paid(found, 2 * num_probes), found.value * stderr / square


def dimension_with_data_error(
    gauss_newton: GGNOperator,
    *,
    shift: float,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator,
    data_error: bool = True,
) -> WithDataError:
    r"""Return the effective dimension; its error over batches takes as much again.

    To first order it moves by :math:`z\,\mathrm{tr}((G+z)^{-2}\,\mathrm{d}G)`, so a
    batch's part of that is the mean of :math:`z\,u^\top G_b u` with
    :math:`(G+z)\,u` random signs.
    """
    found = effective_dimension(
        gauss_newton,
        shift,
        num_probes=num_probes,
        num_steps=num_steps,
        generator=generator,
    )
    if not data_error or not _has_groups(gauss_newton):
        return found, None
    before = gauss_newton.num_matvecs
    noted: list[Tensor] = []
    for signs in _signs(gauss_newton, num_probes, generator):
        solution = _solved(gauss_newton, shift, signs, num_steps)
        with gauss_newton.noting(form) as row:
            gauss_newton @ solution
        noted.extend(row)
    stderr = stderr_of_notes(gauss_newton, noted, shift * mean_weights(noted))
    return _paid(found, gauss_newton.num_matvecs - before), stderr


def mean_weights(noted: list[Tensor]) -> Tensor:
    """Return the weights of a mean over all that was noted."""
    return torch.full((len(noted),), 1 / len(noted), dtype=torch.float64)


def parts_of_notes(
    operator: RiskOperator, noted: list[Tensor], weights: Tensor
) -> Tensor:
    """Return the batches' parts of a weighted sum over products, ``(B, ...)``."""
    table = torch.stack(noted)
    return gathered(torch.tensordot(weights.to(table), table, dims=1), operator.risk)


def stderr_of_notes(
    operator: RiskOperator, noted: list[Tensor], weights: Tensor
) -> float | None:
    """Return the error over batches of a weighted sum over products."""
    parts = parts_of_notes(operator, noted, weights)
    if not bool(parts.isfinite().all()):
        return None
    return data_stderr(parts, batch_shares(operator.risk))


def _form_with(image: Tensor, _: Tensor, product: Tensor) -> Tensor:
    return form(image, product)


def _has_groups(operator: RiskOperator) -> bool:
    shares = batch_shares(operator.risk)
    return shares is not None and len(shares) > 1


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


def _paid(found: Estimate, num_matvecs: int) -> Estimate:
    return replace(found, num_matvecs=found.num_matvecs + num_matvecs)

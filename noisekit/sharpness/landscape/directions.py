"""Directions of loss slices: filter-normalised, random, or eigenvectors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.core.settings import check_settings
from noisekit.curvature.eigenvalues.lanczos import top_eigenpairs
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.random_vectors import entropy_generator

DirectionKind = Literal["filter_normalised", "random", "eigenvectors"]
OneDimensional = Literal["fixed", "scaled"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """One or two directions of the weights.

    Attributes:
        vectors: ``(P, 1)`` or ``(P, 2)``; a step of 1 along a column adds it.
        kind: How they were made; ``"given"`` for the user's own.
        scale: What the length of a column means, in words.
        cosine: Cosine of the angle between two columns, 0 where orthogonal.
    """

    vectors: Tensor = field(repr=False)
    kind: str
    scale: str
    cosine: float

    @property
    def lengths(self) -> tuple[float, ...]:
        """Norm of each direction [param]."""
        return tuple(self.vectors.double().norm(dim=0).tolist())

    def __str__(self) -> str:
        """Write how they were made, their lengths, and what a step of 1 means."""
        lengths = " and ".join(f"{length:.4g}" for length in self.lengths)
        kind = self.kind.replace("_", "-")
        return f"{kind}, length {lengths} (a step of 1: {self.scale})"


@dataclass(frozen=True, slots=True)
class DirectionSpec:
    """How the directions of a slice are drawn.

    Attributes:
        kind: ``"filter_normalised"``: Gaussian, each filter scaled to the norm of
            the weights' own filter, the second direction orthogonal to the first in
            each filter of more than one weight. ``"random"``: Gaussian, orthogonal,
            as long as the weights. ``"eigenvectors"``: of the largest eigenvalues of
            the Hessian, of unit norm.
        one_dimensional: What filter normalisation does with biases and the weights of
            norms: they stay (``"fixed"``), or each is scaled to its own norm as one
            filter (``"scaled"``).
        generator: Source of the random numbers; by default a fresh one.
    """

    kind: DirectionKind = "filter_normalised"
    one_dimensional: OneDimensional = "fixed"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If an attribute is none of those above.
        """
        check_settings(self)


def directions_for(
    risk: EmpiricalRisk,
    wanted: DirectionKind | DirectionSpec | Directions | Sequence[Tensor],
    dims: int | None = None,
) -> Directions:
    """Return directions of a kind, or the given ones, checked.

    Args:
        risk: Whose weights; only its chosen parameters move.
        wanted: What to draw, or one flat vector ``(P,)`` per axis, or directions that
            are there already.
        dims: 1 or 2; 2 by default, or the number of vectors.

    Raises:
        UsageError: If ``wanted`` or ``dims`` is invalid, or a given direction is
            not a finite vector of the right length.
    """
    if isinstance(wanted, str):
        wanted = DirectionSpec(wanted)
    if isinstance(wanted, Directions):
        dims = wanted.vectors.shape[1] if dims is None else dims
        result = _given(risk, wanted.vectors.unbind(1), dims)
        return replace(wanted, vectors=result.vectors)
    if not isinstance(wanted, DirectionSpec):
        return _given(risk, wanted, len(wanted) if dims is None else dims)
    dims = 2 if dims is None else dims
    _check_dims(dims)
    generator = entropy_generator(wanted.generator)
    if wanted.kind == "filter_normalised":
        return _filter_normalised(risk, dims, wanted.one_dimensional, generator)
    if wanted.kind == "random":
        return _random(risk, dims, generator)
    return _eigenvectors(risk, dims, generator)


def _check_dims(dims: int) -> None:
    if dims not in {1, 2}:
        raise UsageError(f"a slice needs dims 1 or 2, got {dims}.")


def _given(risk: EmpiricalRisk, wanted: Sequence[Tensor], dims: int) -> Directions:
    _check_dims(dims)
    size = risk.layout.num_params
    if len(wanted) != dims or any(v.shape != (size,) for v in wanted):
        shapes = ", ".join(str(tuple(v.shape)) for v in wanted) or "none"
        raise UsageError(
            f"a slice in {dims} dimensions needs {dims} directions of shape ({size},), "
            f"got {shapes}; flatten them in the order of risk.layout.names."
        )
    vectors = torch.stack([v.detach().to(risk.vector()) for v in wanted], 1)
    norms = vectors.double().norm(dim=0)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise UsageError(
            "a direction needs finite numbers that are not all zero, got norms "
            f"{norms.tolist()}."
        )
    return _directions(vectors, "given", "as given")


def _random(risk: EmpiricalRisk, dims: int, generator: torch.Generator) -> Directions:
    drawn, _ = torch.linalg.qr(_gaussian(risk, dims, generator))
    vectors = drawn.to(risk.vector()) * risk.vector().norm()
    return _directions(vectors, "random", "as long as all weights together")


def _eigenvectors(
    risk: EmpiricalRisk, dims: int, generator: torch.Generator
) -> Directions:
    with HessianOperator(risk) as hessian:
        pairs = top_eigenpairs(hessian, dims, generator=generator)
    values = ", ".join(f"{value:.4g}" for value in pairs.values.tolist())
    scale = f"unit norm; eigenvalues {values}"
    if not pairs.converged:
        scale += ", not converged"
    return _directions(pairs.vectors, "eigenvectors", scale)


def _filter_normalised(
    risk: EmpiricalRisk,
    dims: int,
    one_dimensional: OneDimensional,
    generator: torch.Generator,
) -> Directions:
    filters = filter_numbers(risk, one_dimensional)
    weights = risk.vector().double()
    moved = filters >= 0
    if not bool((moved & (weights != 0)).any()):
        raise UsageError(
            "filter normalisation needs weights with two or more axes that are not all "
            f"zero, got {', '.join(risk.layout.names)}; pass one_dimensional='scaled' "
            "or directions='random'."
        )
    drawn = _gaussian(risk, dims, generator).to(weights)
    drawn[~moved] = 0.0  # (P, dims)
    sums = _FilterSums(filters.clamp(min=0), moved)
    if dims == 2:
        # Gram-Schmidt within each filter, so that scaling the filters keeps the
        # directions orthogonal; a filter of one weight has no second direction.
        several = sums.of(torch.ones_like(weights)) > 1
        share = sums.of(drawn[:, 0] * drawn[:, 1]) / sums.of(drawn[:, 0] ** 2)
        drawn[:, 1] -= torch.where(several, share, 0.0) * drawn[:, 0]
    # d <- d |w_f| / |d_f| in each filter f (Li et al. 2018, section 4).
    lengths = sums.of(weights**2).sqrt()  # (P,), |w_f| at each of its weights
    columns = [
        torch.where(moved, d * lengths / sums.of(d**2).sqrt(), 0.0)
        for d in drawn.unbind(1)
    ]
    words = "each filter as long as the weights' own; biases and norms "
    words += "stay" if one_dimensional == "fixed" else "count as one filter each"
    vectors = torch.stack(columns, 1).to(risk.layout.dtype)
    return _directions(vectors, "filter_normalised", words)


def filter_numbers(
    risk: EmpiricalRisk, one_dimensional: OneDimensional = "fixed"
) -> Tensor:
    """Return for each weight ``(P,)`` the number of its filter, -1 where it stays.

    A filter is the weights of an output channel: a row of a linear layer, ``weight[i]``
    of a convolution, ``weight[:, i]`` of a transposed one within its group, and a row
    of an embedding. Parameters with fewer than two axes are one filter or stay.
    """
    owners = {
        f"{name}.weight": module for name, module in risk.model.named_modules() if name
    }
    parts, count = [], 0
    for name, shape in zip(risk.layout.names, risk.layout.shapes, strict=True):
        if len(shape) < 2:
            fixed = one_dimensional == "fixed"
            numbers = torch.full(shape, -1 if fixed else count)
            count += 0 if fixed else 1
        else:
            numbers = count + _channels(owners.get(name), shape)
            count = int(numbers.max()) + 1
        parts.append(numbers.reshape(-1))
    return torch.cat(parts).to(risk.layout.device)


def _channels(owner: nn.Module | None, shape: torch.Size) -> Tensor:
    """Output channel of each weight of a tensor."""
    if isinstance(owner, _TRANSPOSED):
        groups = torch.arange(shape[0]) // (shape[0] // owner.groups)
        channels = groups[:, None] * shape[1] + torch.arange(shape[1])
        return channels.view(*shape[:2], *(1,) * (len(shape) - 2)).expand(shape)
    return torch.arange(shape[0]).view(-1, *(1,) * (len(shape) - 1)).expand(shape)


class _FilterSums:
    """Sums over each filter, broadcast to its weights."""

    def __init__(self, filters: Tensor, moved: Tensor) -> None:
        self._filters = filters
        self._moved = moved
        self._count = int(filters.max()) + 1

    def of(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(self._count)
        sums.index_add_(0, self._filters, torch.where(self._moved, values, 0.0))
        return sums[self._filters]


def _gaussian(risk: EmpiricalRisk, dims: int, generator: torch.Generator) -> Tensor:
    size = (risk.layout.num_params, dims)
    return torch.randn(
        size, generator=generator, device=generator.device, dtype=torch.float64
    )


def _directions(vectors: Tensor, kind: str, scale: str) -> Directions:
    if vectors.shape[1] == 1:
        return Directions(vectors, kind, scale, cosine=0.0)
    first, second = vectors.double().unbind(1)
    cosine = float(first @ second / (first.norm() * second.norm()))
    return Directions(vectors, kind, scale, cosine=cosine)

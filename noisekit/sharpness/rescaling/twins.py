"""Reparametrized twins of a network: the same function with another sharpness."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import Fraction, Positive
from noisekit.curvature.eigenvalues.lanczos import EigenPairs, top_eigenpairs
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.operators.preconditioned import ScaledOperator
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.rescaling.chains import FreeScale, free_scales
from noisekit.sharpness.rescaling.rescaling import Rescaling, rescaled_copy

_MOST_FACTORS = 20
_TARGET_MET = 0.05


def rescale_layers(model: nn.Module, factor: float, *, batch: Batch) -> nn.Module:
    """Return a copy of the same function with layers multiplied by ``factor``.

    Each layer with a free scale is multiplied, and what follows it divided: of three
    layers the first grows, the last shrinks, and the middle one keeps its weights and
    has its bias multiplied. A layer before a BatchNorm grows, with nothing to follow.

    Args:
        model: A chain, see :func:`free_scales`; not changed.
        factor: Positive; powers of two change no bit of the outputs of a network
            without BatchNorm.
        batch: ``(inputs, targets)`` on which both must agree.

    Raises:
        UsageError: If the network is no such chain, the factor is not positive, or
            the outputs differ.

    Source:
        Dinh et al. 2017, arXiv:1703.04933, section 3.
    """
    _check_factor(factor)
    return rescaled_copy(model, _by_layer(model, factor), batch=batch)[0]


def rescale_neurons(
    model: nn.Module,
    spread: float,
    *,
    batch: Batch,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Return a copy of the same function with each neuron multiplied by its own factor.

    Args:
        model: A chain, see :func:`free_scales`; not changed.
        spread: Factors are log-uniform from ``1/spread`` to ``spread``.
        batch: ``(inputs, targets)`` on which both must agree.
        generator: Source of the factors; by default a fresh one.

    Raises:
        UsageError: If the network is no such chain, the spread is not positive, or
            the outputs differ.

    Source:
        Neyshabur et al. 2015, arXiv:1506.02617, section 2.
    """
    _check_factor(spread)
    generator = entropy_generator(generator)
    like = next(model.parameters())
    rescaling = Rescaling({})
    for scale in free_scales(model):
        drawn = torch.rand(
            scale.num_channels, generator=generator, device=generator.device
        )
        factors = torch.exp((2 * drawn - 1) * math.log(spread))
        rescaling = rescaling.then(scale.rescaling(factors.to(like)))
    return rescaled_copy(model, rescaling, batch=batch)[0]


@dataclass(frozen=True, slots=True)
class RescaledTwin:
    """A network of the same function as another, with a larger sharpness.

    Attributes:
        model: The twin.
        factor: By what one layer was divided and another multiplied.
        divided: The layer whose weights became smaller.
        multiplied: The layer that makes up for it; ``None`` for a BatchNorm.
        lambda_max: Largest Hessian eigenvalue of the original [loss/param²].
        twin_lambda_max: That of the twin [loss/param²].
        output_change: Largest difference of outputs, relative to the largest output.
    """

    model: nn.Module = field(repr=False)
    factor: float
    divided: str
    multiplied: str | None
    lambda_max: Estimate
    twin_lambda_max: Estimate
    output_change: float

    @property
    def ratio(self) -> float:
        """How many times sharper the twin is."""
        return self.twin_lambda_max.value / self.lambda_max.value

    def __str__(self) -> str:
        """Write both largest eigenvalues, and what was rescaled."""
        what = f"{self.divided} divided by {self.factor:.4g}"
        if self.multiplied is not None:
            what += f", {self.multiplied} multiplied by it"
        return (
            f"lambda_max {self.lambda_max} -> {self.twin_lambda_max} loss/param² "
            f"({self.ratio:.4g} times); {what}; outputs changed by "
            f"{self.output_change:.2g}"
        )


@checked
def rescaled_twin(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    factor: Annotated[float, Gt(1), Lt(math.inf)] = 4.0,
    tol: Fraction = 1e-3,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
) -> RescaledTwin:
    r"""Return a twin with identical predictions and a larger Hessian eigenvalue.

    It is the control that shows what raw sharpness is worth: the function, and so the
    test error, is the same. The layer to divide is the one that carries most of the
    top eigenvector ``v``, since the twin's eigenvalue is at least
    :math:`\lambda \sum_i d_i^2 v_i^2` with ``d`` the divisors, up to negative
    curvature.

    Arguments that are not listed are those of
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        model: A chain, see :func:`free_scales`, or its :class:`EmpiricalRisk`; not
            changed.
        factor: Above 1; a power of two changes no bit of the outputs of a network
            without BatchNorm.
        tol: Wanted relative accuracy of both eigenvalues.
        generator: Source of the random start; by default a fresh one.

    Raises:
        UsageError: If the network is no such chain, the factor is not above 1, the
            outputs differ, or the factor is too small to raise the eigenvalue.

    Source:
        Dinh et al. 2017, arXiv:1703.04933, section 4.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)
        ... )
        >>> batches = [(torch.randn(16, 2), torch.randint(3, (16,)))]
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> twin = nk.rescaled_twin(model, loss_fn, batches, factor=10.0)
        >>> x = batches[0][0]
        >>> torch.allclose(model(x), twin.model(x), atol=1e-5), twin.ratio > 1
        (True, True)
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser)
    generator = entropy_generator(generator)
    with HessianOperator(risk) as hessian:
        pairs = top_eigenpairs(hessian, tol=tol, generator=generator)
        best = _sharpest(risk, factor, pairs.vectors[:, 0])
        twin_pairs = _pairs_of_twin(hessian, best.rescaling(factor), tol, generator)
    before, after = float(pairs.values[0]), float(twin_pairs.values[0])
    if not after - before > tol * abs(before):
        raise UsageError(
            f"a sharper twin needs a factor other than {factor:g}, got the largest "
            f"eigenvalue {after:.4g} for {before:.4g} by dividing {best.divided}; "
            "raise it, or look for NaN in the batches and the weights."
        )
    return _twin(risk, best, factor, (pairs.estimate(), twin_pairs.estimate()))


@checked
def sharpened_twin(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    target: Positive,
    tol: Fraction = 1e-3,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
) -> RescaledTwin:
    """Return a twin with identical predictions and a chosen Hessian eigenvalue.

    The adversary of raw sharpness: however flat the minimum, there are weights of the
    same function that are as sharp as you like. See :func:`rescaled_twin` for a
    chosen factor instead, and for which layer is divided.

    Arguments that are not listed are those of
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        model: A chain, see :func:`free_scales`, or its :class:`EmpiricalRisk`; not
            changed.
        target: The twin's largest Hessian eigenvalue, above the model's own; it is
            reached within 5 % [loss/param²].
        tol: Wanted relative accuracy of the eigenvalues.
        generator: Source of the random start; by default a fresh one.

    Raises:
        UsageError: If the network is no such chain, the target is not above the
            model's own eigenvalue or out of reach, or the outputs differ.

    Source:
        Dinh et al. 2017, arXiv:1703.04933, section 4.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser)
    generator = entropy_generator(generator)
    with HessianOperator(risk) as hessian:
        pairs = top_eigenpairs(hessian, tol=tol, generator=generator)
        before = float(pairs.values[0])
        if not 0 < before < target < math.inf:
            raise UsageError(
                "target needs to be finite and above the model's own largest "
                f"eigenvalue, which must be positive, got {target:g} and {before:.4g}."
            )
        factor = math.sqrt(target / before)
        best = _sharpest(risk, factor, pairs.vectors[:, 0])
        for _ in range(_MOST_FACTORS):
            twin_pairs = _pairs_of_twin(hessian, best.rescaling(factor), tol, generator)
            reached = float(twin_pairs.values[0]) / target
            if abs(reached - 1) <= _TARGET_MET:
                values = pairs.estimate(), twin_pairs.estimate()
                return _twin(risk, best, factor, values)
            # The eigenvalue grows at last as the factor squared.
            factor *= max(reached, 1e-2) ** -0.5
    raise UsageError(
        f"target={target:g} needs to be within reach, got {reached * target:.4g} after "
        f"dividing {best.divided} by {factor:.3g}; ask for less."
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A family of rescalings that make one layer smaller."""

    scale: FreeScale
    divides_source: bool
    like: Tensor

    @property
    def divided(self) -> str:
        return self.scale.source if self.divides_source else self.scale.sink

    @property
    def multiplied(self) -> str | None:
        if not self.divides_source:
            return self.scale.source
        return None if self.scale.sink_weight is None else self.scale.sink

    def rescaling(self, factor: float) -> Rescaling:
        factors = self.like.new_full((self.scale.num_channels,), factor)
        return self.scale.rescaling(1 / factors if self.divides_source else factors)


def _candidates(risk: EmpiricalRisk) -> list[_Candidate]:
    like, result = risk.vector(), []
    for scale in free_scales(risk.model):
        result.append(_Candidate(scale, True, like))
        if scale.sink_weight is not None:
            result.append(_Candidate(scale, False, like))
    return result


def _sharpest(risk: EmpiricalRisk, factor: float, vector: Tensor) -> _Candidate:
    """The candidate with the largest lower bound of its eigenvalue."""

    def bound(candidate: _Candidate) -> float:
        divisors = 1 / candidate.rescaling(factor).vector(risk.layout)
        return float(((divisors * vector).double() ** 2).sum())

    return max(_candidates(risk), key=bound)


def _pairs_of_twin(
    hessian: HessianOperator,
    rescaling: Rescaling,
    tol: float,
    generator: torch.Generator,
) -> EigenPairs:
    divisors = 1 / rescaling.vector(hessian.risk.layout)
    scaled = ScaledOperator(hessian, divisors)
    return top_eigenpairs(scaled, tol=tol, generator=generator)


def _twin(
    risk: EmpiricalRisk,
    chosen: _Candidate,
    factor: float,
    values: tuple[Estimate, Estimate],
) -> RescaledTwin:
    batch = next(iter(risk.batches))
    rescaling = chosen.rescaling(factor)
    twin, change = rescaled_copy(risk.model, rescaling, batch=batch, bn=risk.bn)
    return RescaledTwin(
        model=twin,
        factor=factor,
        divided=chosen.divided,
        multiplied=chosen.multiplied,
        lambda_max=values[0],
        twin_lambda_max=values[1],
        output_change=change,
    )


def _by_layer(model: nn.Module, factor: float) -> Rescaling:
    like = next(model.parameters())
    rescaling = Rescaling({})
    for scale in free_scales(model):
        factors = like.detach().new_full((scale.num_channels,), factor)
        rescaling = rescaling.then(scale.rescaling(factors))
    return rescaling


def _check_factor(factor: float) -> None:
    if not 0 < factor < math.inf:
        raise UsageError(
            f"a rescaling needs a positive and finite factor, got {factor}; ReLU "
            "networks keep their function for no other."
        )

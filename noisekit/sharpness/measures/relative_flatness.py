"""Relative flatness: curvature of a layer's rows, weighted by their inner products."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.quadratic_forms import mean_estimate
from noisekit.curvature.random_vectors import entropy_generator, sign_vector
from noisekit.sharpness.data_error import (
    WithDataError,
    batch_shares,
    data_stderr,
    over_data,
)
from noisekit.sharpness.measures.spectral_sums import mean_weights, parts_of_notes


def relative_flatness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    num_matvecs: int = 32,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
    data_error: bool = False,
) -> Mapping[str, Estimate]:
    r"""Return the relative flatness of each weight matrix, by parameter name.

    With the rows ``w_s`` of a layer's weights (its neurons) and the block
    ``H_{ss'}`` of the Hessian that belongs to two of them,

    .. math:: \kappa = \sum_{s,s'} \langle w_s, w_{s'} \rangle\,
              \mathrm{tr}\, H_{ss'} = \mathbb{E}_{r,z}\, D^\top H D, \qquad
              D = (W r)\, z^\top

    with independent random signs ``r, z``. One product serves all layers, since the
    cross terms have mean zero. A convolution's weights count as a matrix of output
    channels times everything else. Despite the name, larger is sharper. Rescaling
    whole layers does not change it; rescaling single neurons does.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`; of the parameters, those of at least two axes
    are measured.

    Args:
        num_matvecs: Random probes, one Hessian product each.
        generator: Source of the signs; by default a fresh one.
        data_error: Whether to count in how far other data of the same kind would move
            it, from the batches' parts of the same products, at no extra cost.

    Returns:
        Values [loss], each with its standard error over probes, and over data where
        asked for.

    Raises:
        UsageError: If there is no weight matrix, or fewer than 2 products.

    Source:
        Petzka et al. 2021, arXiv:2001.00939, definition 3.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    with HessianOperator(risk) as hessian:
        found = flatness_with_data_error(
            hessian, num_matvecs=num_matvecs, generator=entropy_generator(generator)
        )
    return MappingProxyType(
        {
            name: over_data(estimate, stderr if data_error else None, risk)
            for name, (estimate, stderr) in found.items()
        }
    )


def flatness_with_data_error(
    hessian: HessianOperator, *, num_matvecs: int, generator: torch.Generator
) -> dict[str, WithDataError]:
    """Return each matrix's value; the error over batches takes no more products.

    Raises:
        UsageError: If there is no weight matrix, or fewer than 2 products.
    """
    layout = hessian.risk.layout
    weights = zip(layout.names, layout.split(hessian.risk.vector()), strict=True)
    matrices = {name: part.flatten(1) for name, part in weights if part.ndim >= 2}
    _refuse_bad_arguments(matrices, num_matvecs)

    def forms(probe: Tensor, product: Tensor) -> Tensor:
        pairs = zip(layout.split(probe), layout.split(product), strict=True)
        found = [(z.double() * image.double()).sum() for z, image in pairs]
        return torch.stack(found)

    samples = []
    with hessian.noting(forms) as noted:
        for _ in range(num_matvecs):
            probe = _probe(hessian, matrices, generator)
            samples.append(forms(probe, hessian @ probe))
    values = torch.stack(samples).cpu()  # (probes, tensors)
    parts = parts_of_notes(hessian, noted, mean_weights(noted))
    shares = batch_shares(hessian.risk)
    found: dict[str, WithDataError] = {}
    for i, name in enumerate(layout.names):
        if name in matrices:
            estimate = mean_estimate(values[:, i], num_matvecs)
            sure = estimate.status is Status.OK
            found[name] = estimate, data_stderr(parts[:, i], shares) if sure else None
    return found


def _probe(
    hessian: HessianOperator, matrices: Mapping[str, Tensor], drawn: torch.Generator
) -> Tensor:
    """A direction ``(W r) z'`` in every weight matrix, none elsewhere."""
    layout = hessian.risk.layout
    probe = torch.zeros(layout.num_params, dtype=layout.dtype, device=layout.device)
    parts = dict(zip(layout.names, layout.split(probe), strict=True))
    for name, matrix in matrices.items():
        like = (matrix.dtype, matrix.device)
        left, right = (sign_vector(matrix.shape[1], drawn, like) for _ in range(2))
        parts[name].copy_(torch.outer(matrix @ left, right).view_as(parts[name]))
    return probe


def _refuse_bad_arguments(matrices: Mapping[str, Tensor], num_matvecs: int) -> None:
    if not matrices:
        raise UsageError(
            "relative flatness needs weights of at least two axes, got none; choose "
            "others with params=."
        )
    if num_matvecs < 2:
        raise UsageError(
            "num_matvecs needs to be at least 2 for an error estimate, got "
            f"{num_matvecs}."
        )

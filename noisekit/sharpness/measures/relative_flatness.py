"""Relative flatness: curvature of a layer's rows, weighted by their inner products."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import NumSamples
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.quadratic_forms import mean_estimate
from noisekit.curvature.random_vectors import entropy_generator, sign_vector
from noisekit.sharpness.data_error import (
    WithDataError,
    batch_shares,
    data_stderr,
    mean_weights,
    over_data,
    product_parts,
)
from noisekit.sharpness.measurement import Measure, Measurement, MeasurementContext


@dataclass(frozen=True, kw_only=True)
class RelativeFlatness(Measure):
    """Settings of :func:`relative_flatness`."""

    name = "relative_flatness"
    description = "relative flatness of each weight matrix by random signs"
    needs = "weight matrices and second derivatives"
    sources = ("petzka2021relative",)

    num_matvecs: NumSamples = 32

    def cost(self) -> int:
        """Return the cost of the products, which all layers share."""
        return 2 * self.num_matvecs

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the relative flatness of each weight matrix."""
        layers = self.layers(context.hessian, context.stream("relative_flatness"))
        for i, (name, (result, error)) in enumerate(layers.items()):
            if i:
                result = replace(result, num_matvecs=0)  # the same products serve all
            yield Measurement(self.name, result, f"layer={name}", data_stderr=error)

    def layers(
        self, hessian: HessianOperator, generator: torch.Generator
    ) -> dict[str, WithDataError]:
        """Return each matrix's value; the error over batches takes no more products.

        Raises:
            UsageError: If there is no weight matrix.
        """
        layout = hessian.risk.layout
        weights = zip(layout.names, layout.split(hessian.risk.vector()), strict=True)
        matrices = {name: part.flatten(1) for name, part in weights if part.ndim >= 2}
        if not matrices:
            raise UsageError(
                "relative flatness needs weights of at least two axes, got none; "
                "choose others with params=."
            )

        def forms(probe: Tensor, product: Tensor) -> Tensor:
            pairs = zip(layout.split(probe), layout.split(product), strict=True)
            return torch.stack(
                [(z.double() * image.double()).sum() for z, image in pairs]
            )

        samples = []
        with hessian.noting(forms) as noted:
            for _ in range(self.num_matvecs):
                probe = _probe(hessian, matrices, generator)
                samples.append(forms(probe, hessian @ probe))
        values = torch.stack(samples).cpu()  # (probes, tensors)
        parts = product_parts(hessian, noted, mean_weights(noted))  # (B, tensors)
        shares = batch_shares(hessian.risk)
        result: dict[str, WithDataError] = {}
        for i, name in enumerate(layout.names):
            if name in matrices:
                estimate = mean_estimate(values[:, i], self.num_matvecs)
                sure = estimate.status is Status.OK
                stderr = data_stderr(parts[:, i], shares) if sure else None
                result[name] = estimate, stderr
        return result


@checked
def relative_flatness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    num_matvecs: int = RelativeFlatness.num_matvecs,
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
        data_error: Include the sampling error of the data, estimated from the per-batch
            contributions at no extra cost.

    Returns:
        Values [loss], each with its standard error over probes, and over data where
        asked for.

    Raises:
        UsageError: If there is no weight matrix, or fewer than 2 products.

    Source:
        Petzka et al. 2021, arXiv:2001.00939, definition 3.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> generator = torch.Generator().manual_seed(0)
        >>> result = nk.relative_flatness(
        ...     model, loss_fn, batches, num_matvecs=500, generator=generator
        ... )
        >>> print(result["weight"])  # |w|² tr H = 2 * 5
        9.8 ± 0.45
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = RelativeFlatness(num_matvecs=num_matvecs)
    drawn = entropy_generator(generator)
    with MeasurementContext(risk, stream=lambda *_: drawn) as context:
        layers = measure.layers(context.hessian, drawn)
    return MappingProxyType(
        {
            name: over_data(estimate, stderr if data_error else None, risk)
            for name, (estimate, stderr) in layers.items()
        }
    )


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

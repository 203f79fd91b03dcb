"""Take many measures of one model on the same data, sharing what they share."""

import secrets
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.evaluation_mode import BatchNormPolicy, batch_norms
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.randomness import stream
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.vocabulary import QUANTITIES
from noisekit.sharpness.card import CardRow, Conditions, SharpnessCard
from noisekit.sharpness.data_error import over_data
from noisekit.sharpness.measurement import Measure, MeasurementContext, Taken, take
from noisekit.sharpness.measures import chosen_measures
from noisekit.sharpness.sgd_rule import SGDRule

DEFAULT_MEASURES = (
    "lambda_max",
    "lambda_min",
    "hessian_trace",
    "weighted_hessian_trace",
    "epsilon_sharpness",
    "worst_case_sharpness",
    "adaptive_worst_case_sharpness",
    "average_sharpness",
    "grad_norm",
)
ON_EVERY_CARD = ("lambda_min", "grad_norm")
"""They show whether the point is a minimum."""


@checked
def measure(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    measures: str | Measure | Iterable[str | Measure] = DEFAULT_MEASURES,
    optimizer: SGDRule | torch.optim.Optimizer | None = None,
    data_error: bool = True,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> SharpnessCard:
    """Return a sharpness card: many measures of a model on identical data.

    The data are read once, the Hessian's graph is kept between measures, and
    eigenvectors, gradient and their errors over the data are shared. A measure that
    cannot be had gives a row with its status and reason, and the others still come.
    Each measure has a random stream of its own, so that taking more changes none.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        measures: Names of measures, with their usual settings, and objects with
            settings of their own, such as ``WorstCase(rho=0.1, steps=20)``. An unknown
            name raises an error that lists the valid ones. The gradient's norm and the
            smallest eigenvalue are on every card.
        optimizer: What the model is trained with, for the edge of stability.
        data_error: Include the sampling error of the data also where that costs more:
            a product for an eigenvalue, a gradient for the gradient's norm, half as
            many products again for the Frobenius norm and as many for the effective
            dimension. Others come at no cost. Batches need to be random groups.
        generator: Gives the seed of all random streams; by default a fresh one.

    Raises:
        UsageError: If a measure is unknown.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> generator = torch.Generator().manual_seed(0)
        >>> card = nk.measure(
        ...     model,
        ...     loss_fn,
        ...     batches,
        ...     measures=["lambda_max", nk.WorstCase(rho=0.1, steps=20)],
        ...     generator=generator,
        ... )
        >>> [row.quantity for row in card.rows]
        ['lambda_max', 'lambda_min', 'worst_case_sharpness', 'grad_norm']
        >>> card.rows[2].variant
        'rho=0.1,steps=20'
    """
    chosen = chosen_measures(measures)
    names = {item.name for item in chosen}
    missing = [name for name in ON_EVERY_CARD if name not in names]
    chosen = chosen_measures((*chosen, *missing))
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    seed = _seed(generator)
    with MeasurementContext(
        risk,
        stream=partial(stream, seed, "measure"),
        update_rule=optimizer,
        data_error=data_error,
    ) as context:
        rows = tuple(
            row for taken in take(chosen, context) for row in _rows(taken, risk)
        )
        conditions = _conditions(context, seed)
    return SharpnessCard(rows=rows, conditions=conditions)


def _rows(taken: Taken, risk: EmpiricalRisk) -> list[CardRow]:
    measure = taken.measure
    rows = []
    for item in taken.measurements:
        share = item.detail.get("first_order_share")
        known = QUANTITIES.get(item.quantity, measure.quantity)
        rows.append(
            CardRow(
                measure=measure.name,
                measured_by=measure,
                quantity=item.quantity,
                variant=item.variant,
                unit=known.unit,
                invariance=measure.invariance,
                estimate=item.estimate,
                data_stderr=item.data_stderr,
                over_data=over_data(item.estimate, item.data_stderr, risk),
                first_order_share=float(share) if isinstance(share, float) else None,
                reason=str(item.detail.get("error") or item.detail.get("note") or ""),
                seconds=taken.seconds,
                detail=item.detail,
            )
        )
    return rows


def _conditions(context: MeasurementContext, seed: int) -> Conditions:
    risk = context.risk
    loss, gradient = context.loss_and_gradient()
    layout = risk.layout
    return Conditions(
        loss=loss,
        error=risk.evaluate().error,
        grad_norm=float(gradient.double().norm()),
        weight_norm=float(risk.vector().double().norm()),
        num_params=layout.num_params,
        num_examples=risk.num_examples,
        num_batches=risk.num_batches,
        data_hash=risk.data_hash,
        bn=risk.bn if batch_norms(risk.model) else None,
        reduction=risk.reduction,
        dtype=str(layout.dtype).removeprefix("torch."),
        device=str(layout.device),
        model=type(risk.model).__name__,
        loss_fn=getattr(risk.loss_fn, "__name__", type(risk.loss_fn).__name__),
        seed=seed,
        torch_version=torch.__version__,
    )


def _seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return secrets.randbits(62)
    bits = torch.randint(2**62, (), generator=generator, device=generator.device)
    return int(bits)

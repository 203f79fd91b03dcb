"""Measuring many things of one model on the same data, sharing what they share."""

import math
import secrets
import time
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from noisekit.core.batches import Batch
from noisekit.core.errors import NoisekitError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.randomness import stream
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature import HessianOperator
from noisekit.sharpness.card.card import CardRow, Conditions, SharpnessCard
from noisekit.sharpness.card.registry import Measure, measures_called
from noisekit.sharpness.card.subject import Measured, MeasureSettings, Subject
from noisekit.sharpness.data_error import over_data
from noisekit.sharpness.measures.stability import SGDRule

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
"""Without these nobody can tell whether the point is a minimum."""


def measure(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    measures: str | Iterable[str] = DEFAULT_MEASURES,
    settings: MeasureSettings | None = None,
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
    Each measure has a random stream of its own, so that asking for more changes none.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        measures: Names of measures; an unknown one is answered with all there are.
            The gradient's norm and the smallest eigenvalue are on every card.
        settings: Radii, steps and tolerances; the usual ones by default.
        optimizer: What the model is trained with, for the edge of stability.
        data_error: Whether to measure errors over the batches also where that costs
            more: a product for an eigenvalue, a gradient for the gradient's norm, half
            as many products again for the Frobenius norm and as many for the effective
            dimension. Others come at no cost. Batches need to be random groups.
        generator: Gives the seed of all random streams; by default a fresh one.

    Raises:
        UsageError: If a measure is unknown.
    """
    names = (measures,) if isinstance(measures, str) else tuple(measures)
    chosen = measures_called((*names, *ON_EVERY_CARD))
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    settings = settings or MeasureSettings()
    seed = _seed(generator)
    with HessianOperator(risk) as hessian:
        subject = Subject(
            risk=risk,
            hessian=hessian,
            settings=settings,
            streams=partial(stream, seed, "measure"),
            update_rule=optimizer,
            data_errors=data_error,
        )
        rows = tuple(row for entry in chosen for row in _rows(entry, subject))
        conditions = _conditions(subject, seed)
    return SharpnessCard(rows=rows, conditions=conditions, settings=settings)


def _rows(entry: Measure, subject: Subject) -> list[CardRow]:
    """Take one measure; what it gave before it failed is kept."""
    began = time.perf_counter()
    found: list[Measured] = []
    reason = ""
    try:
        found.extend(entry.take(subject))
    except (NoisekitError, RuntimeError, ArithmeticError) as error:
        # PyTorch raises RuntimeError for what an operation cannot do.
        reason = str(error).splitlines()[0] or type(error).__name__
        nothing = Estimate(math.nan, status=Status.UNAVAILABLE)
        found.append(Measured(entry.name, nothing, detail={"note": reason}))
    seconds = time.perf_counter() - began
    return [_row(entry, item, seconds, subject.risk) for item in found]


def _row(
    entry: Measure, item: Measured, seconds: float, risk: EmpiricalRisk
) -> CardRow:
    share = item.detail.get("first_order_share")
    invariant = not item.detail.get("eta")  # eta above 0 adds a scale of its own
    return CardRow(
        measure=entry.name,
        quantity=item.quantity,
        variant=item.variant,
        gauge=entry.gauge if invariant else "raw",
        estimate=item.estimate,
        data_stderr=item.data_stderr,
        over_data=over_data(item.estimate, item.data_stderr, risk),
        first_order_share=float(share) if isinstance(share, float | int) else None,
        reason=str(item.detail.get("note") or ""),
        seconds=seconds,
        detail=item.detail,
    )


def _conditions(subject: Subject, seed: int) -> Conditions:
    risk = subject.risk
    loss, gradient = subject.start()
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
        bn=risk.bn,
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

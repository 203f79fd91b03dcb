"""What can be measured at a snapshot: every measure of sharpness, and the noise."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

from noisekit.core.randomness import stream
from noisekit.core.results import Estimate
from noisekit.curvature import HessianOperator
from noisekit.probes import gradient_noise
from noisekit.sharpness import SHARPNESS_MEASURES
from noisekit.sharpness.card.subject import Measured, MeasureSettings, Subject
from noisekit.sharpness.measures.stability import SGDRule
from noisekit.train.recipes.measure_spec import MeasureSpec
from noisekit.train.recipes.run_spec import OptimizerSpec, RunSpec

__all__ = ["MEASURES", "Measure", "Measured", "Subject", "snapshot_subject"]

Measure = Callable[[Subject], Iterator[Measured]]


def snapshot_subject(
    spec: RunSpec,
    hessian: HessianOperator,
    *,
    step: int,
    learning_rate: float,
    lambda_max: Estimate | None,
) -> Subject:
    """Return the model at one snapshot as something to be measured.

    Args:
        spec: The run.
        hessian: Of the risk over the examples to measure on.
        step: The snapshot's update; with the seed it names the random streams.
        learning_rate: The rate that led there.
        lambda_max: The largest eigenvalue, where it has been measured here.
    """
    return Subject(
        risk=hessian.risk,
        hessian=hessian,
        settings=_settings(spec.measure),
        streams=partial(stream, spec.seed, "measure", step),
        update_rule=_update_rule(spec.optimizer, learning_rate),
        lambda_max=lambda_max,
    )


def _settings(spec: MeasureSpec) -> MeasureSettings:
    return MeasureSettings(
        tol=spec.tol,
        max_matvecs=spec.max_matvecs,
        trace_matvecs=spec.trace_matvecs,
        shift=spec.shift,
        epsilon=spec.epsilon,
        subspace_dim=spec.subspace_dim,
        max_iter=spec.max_iter,
        rho=spec.rho,
        adaptive_rho=spec.adaptive_rho,
        sigma=spec.sigma,
        adaptive_sigma=spec.adaptive_sigma,
        ascent_steps=spec.ascent_steps,
        num_draws=spec.num_draws,
        group_size=spec.group_size,
        batch_size=spec.batch_size,
    )


def _update_rule(spec: OptimizerSpec, learning_rate: float) -> SGDRule | None:
    if spec.name != "sgd" or learning_rate <= 0:
        return None
    return SGDRule(
        lr=learning_rate,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        weight_decay=spec.weight_decay,
    )


def _simple_noise_scale(subject: Subject) -> Iterator[Measured]:
    noise = gradient_noise(
        subject.risk.model,
        subject.risk.loss_fn,
        subject.risk.batches,
        bn=subject.risk.bn,
    )
    yield Measured("variance_trace", noise.variance_trace)
    yield Measured("debiased_grad_sq_norm", noise.debiased_grad_sq_norm)
    yield Measured("simple_noise_scale", noise.simple_noise_scale)


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {name: measure.take for name, measure in SHARPNESS_MEASURES.items()}
    | {"simple_noise_scale": _simple_noise_scale}
)
"""Every measure but ``example_grad_sq_norm``, which fills a table of its own."""

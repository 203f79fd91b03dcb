"""What can be measured at a snapshot: one function per name of the recipe."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch

from noisekit.core.randomness import stream
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import (
    HessianOperator,
    pyhessian_top_eigenvalue,
    top_eigenpairs,
    trace,
    weighted_trace,
)
from noisekit.probes import gradient_noise
from noisekit.sharpness.epsilon import EpsilonSharpness, epsilon_sharpness_of
from noisekit.sharpness.spectrum import gauge_fixed_lambda_max_of
from noisekit.train.specs import MeasureSpec

Detail = dict[str, bool | int | float | str | None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One quantity as measured.

    Attributes:
        quantity: Its name in the vocabulary.
        estimate: Value, error, cost and status.
        variant: The setting that tells several of one quantity apart.
        detail: Settings and by-products.
    """

    quantity: str
    estimate: Estimate
    variant: str = ""
    detail: Detail = field(default_factory=dict)


@dataclass(slots=True)
class Subject:
    """The model at one snapshot, with what measures share.

    Attributes:
        risk: The empirical risk over the examples to measure on.
        hessian: Its Hessian; the graph is kept between measures.
        settings: How hard to measure.
        stream_name: Names the random streams, such as seed and update.
        learning_rate: The rate that led to the snapshot.
        lambda_max: The largest eigenvalue, where it has been measured here.
    """

    risk: EmpiricalRisk
    hessian: HessianOperator
    settings: MeasureSpec
    stream_name: tuple[int, int]
    learning_rate: float
    lambda_max: Estimate | None = None

    def generator(self, *names: str) -> torch.Generator:
        """Return the stream of one measure, whatever was measured before."""
        seed, step = self.stream_name
        return stream(seed, "measure", step, *names)


Measure = Callable[[Subject], Iterator[Measured]]


def _lambda_max(subject: Subject) -> Iterator[Measured]:
    yield Measured("lambda_max", _extreme(subject, "LA"))


def _lambda_min(subject: Subject) -> Iterator[Measured]:
    yield Measured("lambda_min", _extreme(subject, "SA"))


def _extreme(subject: Subject, which: Literal["LA", "SA"]) -> Estimate:
    pairs = top_eigenpairs(
        subject.hessian,
        1,
        which=which,
        tol=subject.settings.tol,
        max_matvecs=subject.settings.max_matvecs,
        generator=subject.generator("lanczos", which),
    )
    return pairs.estimate()


def _lambda_max_pyhessian(subject: Subject) -> Iterator[Measured]:
    generator = subject.generator("pyhessian")
    found = pyhessian_top_eigenvalue(
        subject.risk,
        max_iterations=subject.settings.max_matvecs,
        generator=generator,
    )
    yield Measured("lambda_max_pyhessian", found)


def _gauge_fixed_lambda_max(subject: Subject) -> Iterator[Measured]:
    found = gauge_fixed_lambda_max_of(
        subject.risk,
        tol=subject.settings.tol,
        max_matvecs=subject.settings.max_matvecs,
        generator=subject.generator("gauge_fixed"),
    )
    yield Measured("gauge_fixed_lambda_max", found)


def _hessian_trace(subject: Subject) -> Iterator[Measured]:
    found = trace(
        subject.hessian,
        num_matvecs=subject.settings.trace_matvecs,
        generator=subject.generator("trace"),
    )
    yield Measured("hessian_trace", found)


def _weighted_hessian_trace(subject: Subject) -> Iterator[Measured]:
    found = weighted_trace(
        subject.hessian,
        subject.risk.vector(),
        num_matvecs=subject.settings.trace_matvecs,
        generator=subject.generator("weighted_trace"),
    )
    yield Measured("weighted_hessian_trace", found)


def _edge_of_stability_ratio(subject: Subject) -> Iterator[Measured]:
    top = subject.lambda_max or _extreme(subject, "LA")
    half = subject.learning_rate / 2
    scaled = replace(
        top,
        value=half * top.value,
        bound=None if top.bound is None else half * top.bound,
    )
    detail: Detail = {"learning_rate": subject.learning_rate}
    yield Measured("edge_of_stability_ratio", scaled, detail=detail)


def _grad_norm(subject: Subject) -> Iterator[Measured]:
    _, gradient = subject.risk.value_and_grad()
    norm = float(torch.linalg.vector_norm(gradient.cpu().double()))
    yield Measured("grad_norm", Estimate(norm, num_grads=1))


def _epsilon_sharpness(subject: Subject) -> Iterator[Measured]:
    settings = subject.settings
    for dim in dict.fromkeys((None, settings.subspace_dim)):
        for epsilon in settings.epsilon:
            found = epsilon_sharpness_of(
                subject.risk,
                epsilon=epsilon,
                subspace_dim=dim,
                max_iter=settings.max_iter,
                generator=subject.generator("epsilon", f"{epsilon:g}", str(dim)),
            )
            yield from _with_first_order_share(found)


def _with_first_order_share(found: EpsilonSharpness) -> Iterator[Measured]:
    variant = f"epsilon={found.epsilon:g}"
    if found.subspace_dim is not None:
        variant += f",subspace_dim={found.subspace_dim}"
    detail: Detail = {
        "epsilon": found.epsilon,
        "subspace_dim": found.subspace_dim,
        "column_scaling": found.column_scaling,
        "method": found.method,
        "loss": found.loss,
        "grad_norm": found.grad_norm,
        "displacement_norm": found.displacement_norm,
        "first_order_share": found.first_order_share,
        "note": found.detail,
    }
    yield Measured("epsilon_sharpness", found.estimate, variant, detail)
    share = Estimate(found.first_order_share, status=found.estimate.status)
    yield Measured("first_order_share", share, variant)


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
    {
        "edge_of_stability_ratio": _edge_of_stability_ratio,
        "epsilon_sharpness": _epsilon_sharpness,
        "gauge_fixed_lambda_max": _gauge_fixed_lambda_max,
        "grad_norm": _grad_norm,
        "hessian_trace": _hessian_trace,
        "lambda_max": _lambda_max,
        "lambda_max_pyhessian": _lambda_max_pyhessian,
        "lambda_min": _lambda_min,
        "simple_noise_scale": _simple_noise_scale,
        "weighted_hessian_trace": _weighted_hessian_trace,
    }
)
"""Every measure but ``example_grad_sq_norm``, which fills a table of its own."""

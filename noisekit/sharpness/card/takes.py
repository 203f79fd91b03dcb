"""How each measure is taken from a subject: one function per measure."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from noisekit.core.results import Estimate, Status
from noisekit.curvature import GGNOperator, pyhessian_top_eigenvalue
from noisekit.sharpness.card.subject import Detail, Measured, Subject
from noisekit.sharpness.data_error import gradient_errors
from noisekit.sharpness.measures.average import AverageSharpness, average_sharpness
from noisekit.sharpness.measures.batch import batch_sharpness
from noisekit.sharpness.measures.epsilon import EpsilonSharpness, epsilon_sharpness
from noisekit.sharpness.measures.fisher_rao import fisher_rao_norm
from noisekit.sharpness.measures.logits import Logits
from noisekit.sharpness.measures.pac_bayes import (
    PacBayesFlatness,
    pac_bayes_flatness,
    pac_bayes_sharpness,
)
from noisekit.sharpness.measures.relative_flatness import flatness_with_data_error
from noisekit.sharpness.measures.spectral_sums import (
    dimension_with_data_error,
    frobenius_with_data_error,
    trace_with_data_error,
    weighted_trace_with_data_error,
)
from noisekit.sharpness.measures.spectrum import gauge_fixed_with_data_error
from noisekit.sharpness.measures.stability import (
    edge_of_stability_ratio,
    stability_threshold,
)
from noisekit.sharpness.measures.worst_case import (
    WorstCaseSharpness,
    worst_case_sharpness,
)

_MOSTLY_NOISE = 0.5
"""Share of noise in a squared gradient above which the card says so."""


def take_lambda_max(subject: Subject) -> Iterator[Measured]:
    """Yield the largest eigenvalue."""
    found, error = subject.eigenvalue("LA")
    yield Measured("lambda_max", found, data_stderr=error)


def take_lambda_min(subject: Subject) -> Iterator[Measured]:
    """Yield the smallest eigenvalue."""
    found, error = subject.eigenvalue("SA")
    yield Measured("lambda_min", found, data_stderr=error)


def take_lambda_max_pyhessian(subject: Subject) -> Iterator[Measured]:
    """Yield PyHessian's eigenvalue."""
    found = pyhessian_top_eigenvalue(
        subject.risk,
        max_iterations=subject.settings.max_matvecs or 1000,
        generator=subject.streams("pyhessian"),
    )
    yield Measured("lambda_max_pyhessian", found)


def take_gauge_fixed_lambda_max(subject: Subject) -> Iterator[Measured]:
    """Yield the largest eigenvalue at unit rows before BatchNorm."""
    found, error = gauge_fixed_with_data_error(
        subject.risk,
        tol=subject.settings.tol,
        max_matvecs=subject.settings.max_matvecs,
        generator=subject.streams("gauge_fixed"),
        data_error=subject.data_errors,
    )
    yield Measured("gauge_fixed_lambda_max", found, data_stderr=error)


def take_hessian_trace(subject: Subject) -> Iterator[Measured]:
    """Yield the trace."""
    found, error = trace_with_data_error(
        subject.hessian,
        num_matvecs=subject.settings.trace_matvecs,
        generator=subject.streams("trace"),
    )
    yield Measured("hessian_trace", found, data_stderr=error)


def take_weighted_hessian_trace(subject: Subject) -> Iterator[Measured]:
    """Yield the trace weighted by squared weights."""
    found, error = weighted_trace_with_data_error(
        subject.hessian,
        num_matvecs=subject.settings.trace_matvecs,
        generator=subject.streams("weighted_trace"),
    )
    yield Measured("weighted_hessian_trace", found, data_stderr=error)


def take_hessian_frobenius_norm(subject: Subject) -> Iterator[Measured]:
    """Yield the Frobenius norm."""
    found, error = frobenius_with_data_error(
        subject.hessian,
        num_matvecs=subject.settings.trace_matvecs,
        generator=subject.streams("frobenius"),
        data_error=subject.data_errors,
    )
    yield Measured("hessian_frobenius_norm", found, data_stderr=error)


def take_effective_dimension(subject: Subject) -> Iterator[Measured]:
    """Yield the number of curved directions of the Gauss-Newton matrix."""
    shift = subject.settings.shift
    with GGNOperator(subject.risk) as gauss_newton:
        found, error = dimension_with_data_error(
            gauss_newton,
            shift=shift,
            num_probes=8,
            num_steps=20,
            generator=subject.streams("effective_dimension"),
            data_error=subject.data_errors,
        )
    variant = f"shift={shift:g}"
    yield Measured("effective_dimension", found, variant, {"shift": shift}, error)


def take_relative_flatness(subject: Subject) -> Iterator[Measured]:
    """Yield the relative flatness of each weight matrix."""
    layers = flatness_with_data_error(
        subject.hessian,
        num_matvecs=subject.settings.trace_matvecs,
        generator=subject.streams("relative_flatness"),
    )
    for i, (name, (found, error)) in enumerate(layers.items()):
        if i:
            found = replace(found, num_matvecs=0)  # the same products serve all
        yield Measured("relative_flatness", found, f"layer={name}", data_stderr=error)


def take_edge_of_stability_ratio(subject: Subject) -> Iterator[Measured]:
    """Yield the largest eigenvalue over the threshold of stability."""
    rule = subject.rule()
    top, error = subject.eigenvalue("LA")
    found = edge_of_stability_ratio(top, rule)
    threshold = stability_threshold(rule)
    detail: Detail = {
        "learning_rate": rule.lr,
        "momentum": rule.momentum,
        "nesterov": rule.nesterov,
        "threshold": threshold,
    }
    yield Measured(
        "edge_of_stability_ratio",
        found,
        detail=detail,
        data_stderr=None if error is None else error / threshold,
    )


def take_grad_norm(subject: Subject) -> Iterator[Measured]:
    """Yield the norm of the gradient, and how much of it is noise of the data."""
    _, gradient = subject.start()
    norm = float(torch.linalg.vector_norm(gradient.cpu().double()))
    status = Status.OK if math.isfinite(norm) else Status.DIVERGED
    found = Estimate(norm, status=status, num_grads=1)
    if not subject.data_errors or not 0 < norm < math.inf:
        yield Measured("grad_norm", found)
        return
    error, share = gradient_errors(subject.risk, gradient)
    detail: Detail = {"noise_share": share}
    if share is not None and share > _MOSTLY_NOISE:
        detail["note"] = (
            f"noise over the batches alone gives {100 * min(1.0, share):.0f} % of the "
            "square"
        )
    spent = found if error is None else replace(found, num_grads=2)
    yield Measured("grad_norm", spent, detail=detail, data_stderr=error)


def take_epsilon_sharpness(subject: Subject) -> Iterator[Measured]:
    """Yield epsilon-sharpness, and its first-order share, by box and space."""
    settings = subject.settings
    for dim in dict.fromkeys((None, settings.subspace_dim)):
        for epsilon in settings.epsilon:
            found = epsilon_sharpness(
                subject.risk,
                epsilon=epsilon,
                subspace_dim=dim,
                max_iter=settings.max_iter,
                generator=subject.streams("epsilon", f"{epsilon:g}", str(dim)),
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
    yield Measured(
        "epsilon_sharpness", found.estimate, variant, detail, found.data_stderr
    )
    share = Estimate(found.first_order_share, status=found.estimate.status)
    yield Measured("first_order_share", share, variant)


def take_worst_case_sharpness(subject: Subject) -> Iterator[Measured]:
    """Yield worst-case sharpness, of one step and of an ascent."""
    yield from _worst_cases(subject, "worst_case_sharpness")


def take_adaptive_worst_case_sharpness(subject: Subject) -> Iterator[Measured]:
    """Yield the same in units of the weights."""
    yield from _worst_cases(subject, "adaptive_worst_case_sharpness", adaptive=True)


def take_logit_normalised_worst_case(subject: Subject) -> Iterator[Measured]:
    """Yield the same in units of the weights, with logits normalised."""
    yield from _worst_cases(
        subject,
        "logit_normalised_worst_case_sharpness",
        adaptive=True,
        logits=subject.settings.logits,
    )


def _worst_cases(
    subject: Subject, name: str, *, adaptive: bool = False, logits: Logits = "raw"
) -> Iterator[Measured]:
    """Yield one step as SAM takes it, and an ascent, in the Euclidean ball."""
    settings = subject.settings
    rho = settings.adaptive_rho if adaptive else settings.rho
    for steps in dict.fromkeys((1, settings.ascent_steps)):
        found = worst_case_sharpness(
            subject.risk,
            rho=rho,
            adaptive=adaptive,
            eta=settings.eta if adaptive else 0.0,
            steps=steps,
            logits=logits,
            generator=subject.streams(name, f"{rho:g}", str(steps)),
        )
        variant = f"rho={rho:g},steps={steps}"
        yield _worst_case(name, found, variant)


def take_m_sharpness(subject: Subject) -> Iterator[Measured]:
    """Yield worst-case sharpness averaged over groups of examples."""
    settings = subject.settings
    found = worst_case_sharpness(
        subject.risk,
        rho=settings.rho,
        batch_size=settings.group_size,
        generator=subject.streams("m_sharpness"),
    )
    variant = f"rho={settings.rho:g},m={settings.group_size}"
    yield _worst_case("m_sharpness", found, variant)


def _worst_case(name: str, found: WorstCaseSharpness, variant: str) -> Measured:
    detail: Detail = {
        "rho": found.rho,
        "norm": found.norm,
        "adaptive": found.adaptive,
        "eta": found.eta,
        "steps": found.plan.steps,
        "logits": found.logits,
        "loss": found.loss,
        "grad_norm": found.grad_norm,
        "first_order_share": found.first_order_share,
        "num_at_rest": found.num_at_rest,
        "note": found.detail,
    }
    return Measured(name, found.estimate, variant, detail, found.data_stderr)


def take_average_sharpness(subject: Subject) -> Iterator[Measured]:
    """Yield average-case sharpness."""
    yield _average(subject, "average_sharpness")


def take_adaptive_average_sharpness(subject: Subject) -> Iterator[Measured]:
    """Yield the same in units of the weights."""
    yield _average(subject, "adaptive_average_sharpness", adaptive=True)


def take_logit_normalised_average(subject: Subject) -> Iterator[Measured]:
    """Yield the same in units of the weights, with logits normalised."""
    yield _average(
        subject,
        "logit_normalised_average_sharpness",
        adaptive=True,
        logits=subject.settings.logits,
    )


def _average(
    subject: Subject, name: str, *, adaptive: bool = False, logits: Logits = "raw"
) -> Measured:
    settings = subject.settings
    sigma = settings.adaptive_sigma if adaptive else settings.sigma
    found: AverageSharpness = average_sharpness(
        subject.risk,
        sigma=sigma,
        adaptive=adaptive,
        eta=settings.eta if adaptive else 0.0,
        num_draws=settings.num_draws,
        logits=logits,
        generator=subject.streams(name, f"{sigma:g}"),
    )
    detail: Detail = {
        "sigma": sigma,
        "adaptive": adaptive,
        "eta": found.eta,
        "antithetic": found.antithetic,
        "logits": logits,
        "loss": found.loss,
        "num_evaluations": found.num_evaluations,
    }
    return Measured(name, found.estimate, f"sigma={sigma:g}", detail, found.data_stderr)


def take_pac_bayes_flatness(subject: Subject) -> Iterator[Measured]:
    """Yield flatness under noise, plain and magnitude-aware."""
    for aware in (False, True):
        found = pac_bayes_flatness(
            subject.risk,
            target=subject.settings.flatness_target,
            criterion=subject.settings.flatness_criterion,
            magnitude_aware=aware,
            num_draws=subject.settings.num_draws,
            generator=subject.streams("pac_bayes_flatness", str(aware)),
        )
        yield _flatness("pac_bayes_flatness", found)


def take_pac_bayes_sharpness(subject: Subject) -> Iterator[Measured]:
    """Yield flatness under ascent, plain and magnitude-aware."""
    for aware in (False, True):
        found = pac_bayes_sharpness(
            subject.risk,
            target=subject.settings.flatness_target,
            criterion=subject.settings.flatness_criterion,
            magnitude_aware=aware,
            steps=subject.settings.ascent_steps,
            generator=subject.streams("pac_bayes_sharpness", str(aware)),
        )
        yield _flatness("pac_bayes_sharpness", found)


def _flatness(name: str, found: PacBayesFlatness) -> Measured:
    detail: Detail = {
        "radius": found.radius,
        "target": found.target,
        "criterion": found.criterion,
        "start": found.start,
        "num_evaluations": found.num_evaluations,
        "note": found.detail,
    }
    variant = "magnitude_aware" if found.magnitude_aware else ""
    return Measured(name, found.estimate, variant, detail, found.data_stderr)


def take_fisher_rao_norm(subject: Subject) -> Iterator[Measured]:
    """Yield the squared Fisher-Rao norm."""
    found = fisher_rao_norm(subject.risk, likelihood=subject.settings.likelihood)
    yield Measured("fisher_rao_norm", found)


def take_batch_sharpness(subject: Subject) -> Iterator[Measured]:
    """Yield batch sharpness, by both ways to average."""
    found = batch_sharpness(
        subject.risk,
        batch_size=subject.settings.batch_size,
        generator=subject.streams("batch_sharpness"),
    )
    detail: Detail = {
        "batch_size": found.batch_size,
        "num_left_out": found.num_left_out,
    }
    variant = f"batch_size={found.batch_size}"
    yield Measured("batch_sharpness", found.estimate, variant, detail)
    means = replace(found.ratio_of_means, num_grads=0)  # of the same passes
    yield Measured("batch_sharpness_ratio_of_means", means, variant, detail)

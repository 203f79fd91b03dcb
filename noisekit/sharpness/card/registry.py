"""Every measure of sharpness by its name: what it computes and what changes it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from noisekit.core.errors import UsageError
from noisekit.sharpness.card import takes
from noisekit.sharpness.card.subject import Measured, Subject

Gauge = Literal["raw", "layers", "neurons", "norms"]

GAUGES: Mapping[Gauge, str] = MappingProxyType(
    {
        "raw": "changed by rescalings that keep the function",
        "layers": "unchanged when whole layers of a ReLU network are rescaled",
        "neurons": "unchanged when layers or neurons of a ReLU network are rescaled",
        "norms": "unchanged when weights before a BatchNorm are rescaled",
    }
)
"""Which function-preserving rescalings leave a measure as it is."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure.

    Attributes:
        name: Its name, that of the first quantity that it gives.
        take: Measures a subject.
        gauge: Which rescalings leave it as it is.
        method: How it is computed, as a clause for a paper's methods section.
        needs: What it cannot be had without, beside a differentiable loss.
        sources: Keys of its papers.
    """

    name: str
    take: Callable[[Subject], Iterator[Measured]]
    gauge: Gauge
    method: str
    needs: str = ""
    sources: tuple[str, ...] = ()


_LANCZOS = ("wu2000thick",)
_SECOND = "second derivatives"
_CLASSES = "outputs (n, classes) and class targets"

MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        measure.name: measure
        for measure in (
            Measure(
                "lambda_max",
                takes.take_lambda_max,
                "raw",
                "the largest algebraic Hessian eigenvalue by Lanczos iteration with "
                "full reorthogonalisation",
                _SECOND,
                _LANCZOS,
            ),
            Measure(
                "lambda_min",
                takes.take_lambda_min,
                "raw",
                "the smallest algebraic Hessian eigenvalue by Lanczos iteration",
                _SECOND,
                _LANCZOS,
            ),
            Measure(
                "gauge_fixed_lambda_max",
                takes.take_gauge_fixed_lambda_max,
                "norms",
                "the largest Hessian eigenvalue with every weight row that feeds a "
                "BatchNorm at unit norm",
                "weights that feed a BatchNorm",
                ("laarhoven2017l2",),
            ),
            Measure(
                "lambda_max_pyhessian",
                takes.take_lambda_max_pyhessian,
                "raw",
                "PyHessian's power iteration as a second opinion",
                "PyHessian installed",
                ("yao2020pyhessian",),
            ),
            Measure(
                "hessian_trace",
                takes.take_hessian_trace,
                "raw",
                "the Hessian trace by Hutch++ with random signs",
                _SECOND,
                ("hutchinson1989stochastic", "meyer2021hutch"),
            ),
            Measure(
                "weighted_hessian_trace",
                takes.take_weighted_hessian_trace,
                "neurons",
                "the sum of squared weight times diagonal curvature by random signs",
                _SECOND,
                ("hutchinson1989stochastic",),
            ),
            Measure(
                "hessian_frobenius_norm",
                takes.take_hessian_frobenius_norm,
                "raw",
                "the Frobenius norm of the Hessian by random signs",
                _SECOND,
                ("hutchinson1989stochastic",),
            ),
            Measure(
                "effective_dimension",
                takes.take_effective_dimension,
                "raw",
                "the effective dimension of the Gauss-Newton matrix by Lanczos "
                "quadrature",
                "a loss that is convex in the outputs",
                ("maddox2020rethinking",),
            ),
            Measure(
                "relative_flatness",
                takes.take_relative_flatness,
                "layers",
                "relative flatness of each weight matrix by random signs",
                "weight matrices and second derivatives",
                ("petzka2021relative",),
            ),
            Measure(
                "fisher_rao_norm",
                takes.take_fisher_rao_norm,
                "neurons",
                "the squared Fisher-Rao norm from directional derivatives of the "
                "outputs, exact on the data",
                "a cross-entropy or squared-error loss",
                ("liang2019fisher",),
            ),
            Measure(
                "epsilon_sharpness",
                takes.take_epsilon_sharpness,
                "raw",
                "epsilon-sharpness, the largest relative rise of the loss in a box, "
                "searched from corner to corner (a lower bound)",
                "",
                ("keskar2017large",),
            ),
            Measure(
                "worst_case_sharpness",
                takes.take_worst_case_sharpness,
                "raw",
                "worst-case sharpness in a Euclidean ball by one normalised gradient "
                "step and by projected ascent (lower bounds)",
                "",
                ("foret2021sharpness",),
            ),
            Measure(
                "adaptive_worst_case_sharpness",
                takes.take_adaptive_worst_case_sharpness,
                "neurons",
                "worst-case sharpness in a ball whose axes are proportional to the "
                "weights (lower bounds)",
                "",
                ("kwon2021asam", "andriushchenko2023modern"),
            ),
            Measure(
                "logit_normalised_worst_case_sharpness",
                takes.take_logit_normalised_worst_case,
                "neurons",
                "adaptive worst-case sharpness of the loss of centred and normalised "
                "logits",
                _CLASSES,
                ("andriushchenko2023modern",),
            ),
            Measure(
                "m_sharpness",
                takes.take_m_sharpness,
                "raw",
                "worst-case sharpness of one step averaged over groups of examples",
                "",
                ("foret2021sharpness",),
            ),
            Measure(
                "average_sharpness",
                takes.take_average_sharpness,
                "raw",
                "average-case sharpness, the mean rise of the loss under Gaussian "
                "weight noise in antithetic pairs",
                "",
            ),
            Measure(
                "adaptive_average_sharpness",
                takes.take_adaptive_average_sharpness,
                "neurons",
                "average-case sharpness under Gaussian noise proportional to each "
                "weight",
                "",
                ("andriushchenko2023modern",),
            ),
            Measure(
                "logit_normalised_average_sharpness",
                takes.take_logit_normalised_average,
                "neurons",
                "adaptive average-case sharpness of the loss of centred and "
                "normalised logits",
                _CLASSES,
                ("andriushchenko2023modern",),
            ),
            Measure(
                "pac_bayes_flatness",
                takes.take_pac_bayes_flatness,
                "raw",
                "PAC-Bayes flatness, one over the largest variance of weight noise "
                "that keeps the error within its target, by bisection",
                _CLASSES,
                ("jiang2020fantastic",),
            ),
            Measure(
                "pac_bayes_sharpness",
                takes.take_pac_bayes_sharpness,
                "raw",
                "one over the square of the largest displacement that keeps the error "
                "within its target, by ascent and bisection (a lower bound)",
                _CLASSES,
                ("jiang2020fantastic",),
            ),
            Measure(
                "batch_sharpness",
                takes.take_batch_sharpness,
                "raw",
                "batch sharpness, the mean over batches of each batch's curvature "
                "along its own gradient",
                "two batches or more",
                ("andreyev2024edge",),
            ),
            Measure(
                "edge_of_stability_ratio",
                takes.take_edge_of_stability_ratio,
                "raw",
                "the largest Hessian eigenvalue over the stability threshold of the "
                "update rule",
                "the update rule of SGD",
                ("cohen2021gradient",),
            ),
            Measure(
                "grad_norm",
                takes.take_grad_norm,
                "raw",
                "the norm of the gradient of the mean loss",
            ),
        )
    }
)
"""Every measure that a card can have, in the order in which it shows them."""


def measures_called(names: str | Iterable[str]) -> tuple[Measure, ...]:
    """Return the measures of these names, each once, in the order of the registry.

    Raises:
        UsageError: If there is no such measure.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in wanted if name not in MEASURES]
    if unknown or not wanted:
        raise UsageError(
            f"measures needs names of measures, got {', '.join(unknown) or 'none'}; "
            f"there are: {', '.join(MEASURES)}."
        )
    return tuple(MEASURES[name] for name in MEASURES if name in wanted)

"""Every measure of sharpness by its name, with its usual settings."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from noisekit.core.errors import UsageError
from noisekit.sharpness.measurement import Measure
from noisekit.sharpness.measures.average import AverageCase
from noisekit.sharpness.measures.batch import BatchSharpness
from noisekit.sharpness.measures.eigenvalues import (
    GaugeFixedLambdaMax,
    LambdaMax,
    LambdaMin,
)
from noisekit.sharpness.measures.epsilon import EpsilonSharpness
from noisekit.sharpness.measures.fisher_rao import FisherRaoNorm
from noisekit.sharpness.measures.gradient import GradNorm
from noisekit.sharpness.measures.pac_bayes import PacBayesFlatness, PacBayesSharpness
from noisekit.sharpness.measures.relative_flatness import RelativeFlatness
from noisekit.sharpness.measures.spectral_norms import (
    EffectiveDimension,
    HessianFrobeniusNorm,
)
from noisekit.sharpness.measures.stability import EdgeOfStability
from noisekit.sharpness.measures.traces import HessianTrace, WeightedHessianTrace
from noisekit.sharpness.measures.worst_case import WorstCase


def by_name(measures: Iterable[Measure]) -> Mapping[str, tuple[Measure, ...]]:
    """Return the measures grouped by their names, in the order given."""
    groups: dict[str, list[Measure]] = {}
    for measure in measures:
        groups.setdefault(measure.name, []).append(measure)
    return MappingProxyType({name: tuple(group) for name, group in groups.items()})


MEASURES = by_name(
    (
        LambdaMax(),
        LambdaMin(),
        GaugeFixedLambdaMax(),
        LambdaMax(method="pyhessian", tol=1e-4),
        HessianTrace(),
        WeightedHessianTrace(),
        HessianFrobeniusNorm(),
        EffectiveDimension(),
        RelativeFlatness(),
        FisherRaoNorm(),
        EpsilonSharpness(epsilon=1e-3),
        EpsilonSharpness(epsilon=5e-4),
        WorstCase(steps=1),
        WorstCase(steps=10),
        WorstCase(adaptive=True, rho=0.5, steps=1),
        WorstCase(adaptive=True, rho=0.5, steps=10),
        WorstCase(adaptive=True, rho=0.5, steps=1, logits="unit_std"),
        WorstCase(adaptive=True, rho=0.5, steps=10, logits="unit_std"),
        WorstCase(batch_size=128),
        AverageCase(),
        AverageCase(adaptive=True, sigma=0.1),
        AverageCase(adaptive=True, sigma=0.1, logits="unit_std"),
        PacBayesFlatness(),
        PacBayesFlatness(magnitude_aware=True),
        PacBayesSharpness(),
        PacBayesSharpness(magnitude_aware=True),
        BatchSharpness(),
        EdgeOfStability(),
        GradNorm(),
    )
)
"""Every measure by its name, in the order in which a card shows them.

A name stands for all of its usual settings, such as both boxes of epsilon-sharpness.
"""


def chosen_measures(
    measures: str | Measure | Iterable[str | Measure],
) -> tuple[Measure, ...]:
    """Return the measures of names and objects, each once, in the order of a card.

    Measures that are not in the table, such as your own, come last.

    Raises:
        UsageError: If a name is unknown, or there is no measure.
    """
    single = isinstance(measures, str | Measure)
    given = [measures] if single else list(measures)  # type: ignore[arg-type]
    chosen: dict[Measure, None] = {}
    unknown = []
    for item in given:
        if isinstance(item, Measure):
            chosen[item] = None
        elif isinstance(item, str) and item in MEASURES:
            chosen |= dict.fromkeys(MEASURES[item])
        else:
            unknown.append(item if isinstance(item, str) else repr(item))
    if unknown or not chosen:
        raise UsageError(
            "measures needs names of measures or objects such as WorstCase(rho=0.1), "
            f"got {', '.join(unknown) or 'none'}; there are: {', '.join(MEASURES)}."
        )
    order = {name: i for i, name in enumerate(MEASURES)}
    return tuple(sorted(chosen, key=lambda m: order.get(m.name, len(order))))

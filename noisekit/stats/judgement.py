"""The rule that turns paired data into verdicts, fixed before looking."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from noisekit.core.errors import NoVerdictError, UsageError
from noisekit.core.results import Interval, Status
from noisekit.stats.contrasts import Contrast, ContrastResult, PairedSample, Verdict
from noisekit.stats.hypothesis import PairedEffect, Scale, paired_effect
from noisekit.stats.multiplicity import pooled_adjustment

ALPHA = 0.05
"""Largest accepted chance of one or more false verdicts among primary contrasts."""


def judge(
    contrasts: Sequence[Contrast],
    data: Mapping[str, PairedSample],
    *,
    claims: bool = True,
    allow_missing: bool = False,
) -> list[ContrastResult]:
    """Return a verdict on each contrast, by a rule that knows no data.

    *Larger* or *smaller* if the 95 % interval lies beyond the margin, *equivalent* if
    the 90 % interval lies inside it, otherwise *not resolved*. Verdicts on primary
    contrasts are adjusted, so that one or more false ones (the true effect is not in
    the region that the verdict names) come in at most 5 % of experiments; the family is
    all primary contrasts of the recipe, also those that end without a verdict. Verdicts
    on descriptive contrasts are not adjusted and say so.

    A pair of which a side is missing (a diverged run, a snapshot never reached) is
    information about the arm and is never dropped in silence: a primary contrast with
    one is *not comparable* unless ``allow_missing``, and any other names the count.

    Args:
        contrasts: As the recipe has them.
        data: The paired sample of each contrast, by contrast name.
        claims: False for runs that may not carry a verdict, such as smoke runs.
        allow_missing: Judge primary contrasts on the complete pairs.

    Returns:
        One result per contrast, in the order given.

    Raises:
        UsageError: If two contrasts share a name or one has no sample in ``data``.
    """
    fault = _names_fault(contrasts, data)
    if fault:
        raise UsageError(fault)
    num_primary = sum(contrast.primary for contrast in contrasts)
    return [
        _judge_one(
            contrast,
            data[contrast.name],
            num_tests=num_primary if contrast.primary else 1,
            claims=claims,
            allow_missing=allow_missing or not contrast.primary,
        )
        for contrast in contrasts
    ]


def require_verdict(result: ContrastResult) -> Verdict:
    """Return the verdict of runs that may carry one.

    Raises:
        NoVerdictError: If the runs make no claims.
    """
    if result.verdict is Verdict.NOT_JUDGED:
        raise NoVerdictError(
            f"contrast {result.contrast.name!r} needs runs that may carry a verdict, "
            f"got {result.reason}; run a profile whose recipe sets claims = true."
        )
    return result.verdict


def _judge_one(
    contrast: Contrast,
    sample: PairedSample,
    *,
    num_tests: int,
    claims: bool,
    allow_missing: bool,
) -> ContrastResult:
    treatment, reference = sample.complete()
    num_missing = len(sample.seeds) - treatment.size
    effect, fault = _measure(treatment, reference, contrast.scale)
    obstacle = _obstacle(sample, num_missing, claims=claims, allowed=allow_missing)
    verdict, reason = Verdict.NOT_RESOLVED, fault
    p_beyond = p_inside = math.nan
    if obstacle is not None:
        verdict, reason = obstacle
    elif effect is not None and not fault:
        test = effect.margin_test(contrast.margin)
        p_beyond, p_inside = test.beyond, test.inside
        verdict, reason = _decide(
            p_beyond, p_inside, num_tests, rises=test.larger < test.smaller
        )
    if num_missing and obstacle is None:
        note = f"{num_missing} of {len(sample.seeds)} pairs are missing and left out"
        reason = f"{reason}; {note}" if reason else note
    return ContrastResult(
        contrast=contrast,
        verdict=verdict,
        reason=reason,
        effect=effect.effect if effect else math.nan,
        interval=_interval(effect, contrast.scale, 1.0 - ALPHA),
        interval_90=_interval(effect, contrast.scale, 1.0 - 2.0 * ALPHA),
        adjusted_interval=_interval(effect, contrast.scale, 1.0 - ALPHA / num_tests),
        p_beyond=p_beyond,
        p_inside=p_inside,
        num_pairs=int(treatment.size),
        num_missing=num_missing,
        num_tests=num_tests,
    )


def _decide(
    p_beyond: float, p_inside: float, num_tests: int, *, rises: bool
) -> tuple[Verdict, str]:
    # The family's other p-values do not matter: the factor is its size throughout.
    family = [1.0] * (num_tests - 1)
    beyond, inside = pooled_adjustment([p_beyond, *family], [p_inside, *family])
    if beyond[0] <= ALPHA:
        return (Verdict.LARGER if rises else Verdict.SMALLER), ""
    if inside[0] <= ALPHA:
        return Verdict.EQUIVALENT, ""
    if p_beyond <= ALPHA or p_inside <= ALPHA:
        side = "beyond" if p_beyond <= ALPHA else "inside"
        return Verdict.NOT_RESOLVED, (
            f"{side} the margin by itself, not after adjusting for {num_tests} "
            "primary contrasts"
        )
    return Verdict.NOT_RESOLVED, "the interval reaches across the margin"


def _obstacle(
    sample: PairedSample, num_missing: int, *, claims: bool, allowed: bool
) -> tuple[Verdict, str] | None:
    if not claims:
        return Verdict.NOT_JUDGED, "runs of a recipe that makes no claims"
    if sample.not_comparable is not None:
        return Verdict.NOT_COMPARABLE, sample.not_comparable
    if num_missing and not allowed:
        return Verdict.NOT_COMPARABLE, (
            f"{num_missing} of {len(sample.seeds)} pairs are missing (a run diverged "
            "or never reached the snapshot)"
        )
    return None


def _measure(
    treatment: NDArray[np.float64], reference: NDArray[np.float64], scale: Scale
) -> tuple[PairedEffect | None, str]:
    num_pairs = treatment.size
    if num_pairs < 2:
        return None, f"an interval needs at least 2 complete pairs, got {num_pairs}"
    if scale == "ratio":
        bad = int(np.sum((treatment <= 0.0) | (reference <= 0.0)))
        if bad:
            return None, (
                f"{bad} of {num_pairs} pairs have a value at or below zero, which has "
                "no ratio"
            )
    effect = paired_effect(treatment, reference, scale=scale)
    if effect.estimate.status is not Status.OK:
        return effect, f"all {num_pairs} pairs agree exactly, so no spread is known"
    return effect, ""


def _interval(effect: PairedEffect | None, scale: Scale, level: float) -> Interval:
    if effect is None:
        return Interval(0.0 if scale == "ratio" else -math.inf, math.inf, level)
    return effect.interval(level)


def _names_fault(
    contrasts: Sequence[Contrast], data: Mapping[str, PairedSample]
) -> str:
    names = [contrast.name for contrast in contrasts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return f"contrasts need distinct names, got {twice} more than once."
    absent = [name for name in names if name not in data]
    if absent:
        return (
            f"judging needs a paired sample for every contrast, got none for {absent}; "
            "give one with not_comparable= where the runs have no such value."
        )
    return ""

"""Verdicts on paired data, by a rule fixed before the runs."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from noisekit.core.errors import NoVerdictError, UsageError
from noisekit.core.results import Interval, Status
from noisekit.stats.contrasts import Contrast, ContrastResult, PairedSample, Verdict
from noisekit.stats.effects import PairedEffect, Scale, paired_effect

ALPHA = 0.05
"""Largest accepted chance of one or more false verdicts among primary contrasts."""


def judge(
    contrasts: Sequence[Contrast],
    data: Mapping[str, PairedSample],
    *,
    claims: bool = True,
    allow_missing: bool = False,
) -> list[ContrastResult]:
    """Return a verdict on each contrast.

    The t-interval that decides is the one in the result. Where the 95 % interval lies
    beyond the margin the verdict is *larger* or *smaller*; where it lies inside, it is
    *larger within the margin* or *smaller within the margin* if it excludes no effect,
    else *equivalent*. Where it reaches across the margin, the 90 % interval may still
    lie inside (two one-sided tests at 5 %) and then decides, if both agree on the
    direction; otherwise the contrast is *not resolved*.

    For the m primary contrasts 5 % becomes ``5 %/m`` throughout (Bonferroni), so that
    one or more false verdicts come in at most 5 % of experiments. The family is all
    primary contrasts of the recipe, also those that end without a verdict.

    Source:
        Schuirmann 1987, "A comparison of the two one-sided tests procedure and the
        power approach for assessing the equivalence of average bioavailability".

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
    alpha = ALPHA / num_tests  # Bonferroni
    num_missing = len(sample.seeds) - sample.complete()[0].size
    effect, fault = _measure(sample, contrast.scale, 1.0 - alpha)
    interval = _interval(effect, contrast.scale, 1.0 - alpha)
    obstacle = _obstacle(sample, num_missing, claims=claims, allowed=allow_missing)
    p_value, reason = math.nan, ""
    if obstacle is not None:
        verdict, reason = obstacle
    elif effect is None or fault:
        verdict, reason = Verdict.NOT_RESOLVED, fault
    else:
        p_value = min(1.0, num_tests * effect.p_value)  # adjusted like alpha
        verdict, interval = _decide(contrast, effect, alpha)
        if verdict is Verdict.NOT_RESOLVED:
            reason = _open_question(contrast, effect, interval, num_tests)
    if num_missing and obstacle is None:
        note = f"{num_missing} of {len(sample.seeds)} pairs are missing and left out"
        reason = f"{reason}; {note}" if reason else note
    crossed = effect is not None and effect.estimate is sample.crossed
    return ContrastResult(
        contrast=contrast,
        verdict=verdict,
        reason=reason,
        effect=effect.effect if effect else math.nan,
        interval=interval,
        p_value=p_value,
        error_over="seeds and images" if crossed else "seeds",
        num_pairs=len(sample.seeds) - num_missing,
        num_missing=num_missing,
        num_tests=num_tests,
    )


def _decide(
    contrast: Contrast, effect: PairedEffect, alpha: float
) -> tuple[Verdict, Interval]:
    """Return the verdict and the interval that decides it.

    Two one-sided tests at level ``alpha`` reject both sides of the margin where the
    interval of level ``1 - 2 alpha`` lies inside it (Schuirmann 1987): no multiplicity,
    since the effect cannot lie on both sides. A direction is a two-sided test of the
    point null, and so is "beyond the margin" with a side chosen by the data: these need
    the interval of level ``1 - alpha``.
    """
    wide, narrow = effect.interval(1.0 - alpha), effect.interval(1.0 - 2.0 * alpha)
    verdict = _position(contrast, wide)
    if verdict is Verdict.NOT_RESOLVED:
        inside = _position(contrast, narrow)
        # 1 or -1 where the wide interval excludes no effect, else 0. The narrow one may
        # exclude it while the wide one does not; equivalence is then not claimed, since
        # the verdict would name a direction that was not tested at ``alpha``.
        direction = (wide.low > contrast.null) - (wide.high < contrast.null)
        is_inside = inside.decided and inside.region == 0
        if is_inside and inside.direction == direction:
            return inside, narrow
    return verdict, wide


def _position(contrast: Contrast, interval: Interval) -> Verdict:
    """Return the verdict of one interval against no effect and the margin."""
    low, high = interval.low, interval.high
    lowest, highest = contrast.margin_ends
    if low > highest:
        return Verdict.LARGER
    if high < lowest:
        return Verdict.SMALLER
    if low < lowest or high > highest:
        return Verdict.NOT_RESOLVED
    if low > contrast.null:
        return Verdict.LARGER_WITHIN_MARGIN
    if high < contrast.null:
        return Verdict.SMALLER_WITHIN_MARGIN
    return Verdict.EQUIVALENT


def _open_question(
    contrast: Contrast, effect: PairedEffect, interval: Interval, num_tests: int
) -> str:
    """Return why the contrast is not resolved."""
    alone, _ = _decide(contrast, effect, ALPHA)
    if alone.decided:
        return (
            f"{alone} by itself, not after adjusting for {num_tests} primary contrasts"
        )
    if interval.low > contrast.null:
        return "larger, but the interval reaches across the margin"
    if interval.high < contrast.null:
        return "smaller, but the interval reaches across the margin"
    return "the interval reaches across the margin"


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
    sample: PairedSample, scale: Scale, level: float
) -> tuple[PairedEffect | None, str]:
    """Return the effect with the wider of its errors, and what is wrong with it."""
    treatment, reference = sample.complete()
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
    # A spread of exactly zero gives an interval of no width, which would decide
    # anything: identical pairs mean that nothing varied between the seeds.
    if effect.estimate.status is not Status.OK:
        return effect, f"all {num_pairs} pairs agree exactly, so no spread is known"
    # Error rates share their test images, so that seeds alone understate the error.
    if sample.crossed is not None and scale == "difference":
        crossed = PairedEffect(sample.crossed, scale)
        if _width(crossed, level) > _width(effect, level):
            return crossed, ""
    return effect, ""


def _width(effect: PairedEffect, level: float) -> float:
    interval = effect.interval(level)
    return interval.high - interval.low


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

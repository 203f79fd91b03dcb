"""Verdicts on paired data, by a rule fixed before the runs."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from noisekit.core.errors import NoVerdictError, UsageError
from noisekit.core.results import Interval, Status
from noisekit.stats.claims import Claim, ClaimResult, Verdict
from noisekit.stats.effects import NO_EFFECT, PairedEffect, Scale, paired_effect
from noisekit.stats.permutation import SimultaneousBand
from noisekit.stats.sample import SeedSample

ALPHA = 0.05
"""Largest accepted chance of one or more false verdicts among primary claims."""


def judge(
    claims: Sequence[Claim],
    data: Mapping[str, SeedSample],
    *,
    verdicts: bool = True,
    allow_missing: bool = False,
) -> list[ClaimResult]:
    """Return a verdict on each claim.

    The t-interval that decides is the one in the result. Where the 95 % interval lies
    beyond the margin the verdict is *larger* or *smaller*; where it lies inside, it is
    *larger within the margin* or *smaller within the margin* if it excludes no effect,
    else *equivalent*. Where it reaches across the margin, the 90 % interval may still
    lie inside (two one-sided tests at 5 %) and then decides, if both agree on the
    direction; otherwise the claim is *not resolved*.

    For the m primary claims 5 % becomes ``5 %/m`` throughout (Bonferroni), so that
    one or more false verdicts come in at most 5 % of experiments. The family is all
    primary claims of the recipe, also those that end without a verdict.

    Source:
        Schuirmann 1987, "A comparison of the two one-sided tests procedure and the
        power approach for assessing the equivalence of average bioavailability".

    A pair of which a side is missing (a diverged run, a snapshot never reached) is
    information about the arm and is never dropped in silence: a primary claim with
    one is *not comparable* unless ``allow_missing``, and any other names the count.

    A claim of kind ``identity`` *passed* where it is within its margin and *failed*
    where it is beyond; one of kind ``control`` *passed* where its place is the one that
    ``expect`` names, within the margin if that is empty. Neither belongs to the family.

    Args:
        claims: As the recipe has them.
        data: The paired sample of each claim, by claim name.
        verdicts: False for runs that may not carry a verdict, such as smoke runs.
        allow_missing: Judge primary claims on the complete pairs.

    Returns:
        One result per claim, in the order given.

    Raises:
        UsageError: If two claims share a name or one has no sample in ``data``.
    """
    fault = _names_fault(claims, data)
    if fault:
        raise UsageError(fault)
    num_primary = sum(claim.primary for claim in claims)
    return [
        _judge_one(
            claim,
            data[claim.name],
            num_tests=num_primary if claim.primary else 1,
            verdicts=verdicts,
            allow_missing=allow_missing or not claim.primary,
        )
        for claim in claims
    ]


def require_verdict(result: ClaimResult) -> Verdict:
    """Return the verdict of runs that may carry one.

    Raises:
        NoVerdictError: If the runs make no claims.
    """
    if result.verdict is Verdict.NOT_JUDGED:
        raise NoVerdictError(
            f"claim {result.claim.name!r} needs runs that may carry a verdict, "
            f"got {result.reason}; run a profile whose recipe sets verdicts = true."
        )
    return result.verdict


def _judge_one(
    claim: Claim,
    sample: SeedSample,
    *,
    num_tests: int,
    verdicts: bool,
    allow_missing: bool,
) -> ClaimResult:
    alpha = ALPHA / num_tests  # Bonferroni
    num_missing = len(sample.seeds) - sample.complete()[0].size
    effect, fault = _measure(sample, claim, 1.0 - alpha)
    interval = _interval(effect, claim.scale, 1.0 - alpha)
    obstacle = _obstacle(
        claim, sample, num_missing, verdicts=verdicts, allowed=allow_missing
    )
    p_value, reason = math.nan, ""
    if obstacle is not None:
        verdict, reason = obstacle
    elif effect is None or fault:
        verdict, reason = Verdict.NOT_RESOLVED, fault
    else:
        p_value = min(1.0, num_tests * _p_value(effect, claim))  # adjusted like alpha
        verdict, interval = _decide(claim, effect, alpha)
        if verdict is Verdict.NOT_RESOLVED:
            reason = _open_question(claim, effect, interval, num_tests)
        verdict, reason = _as_check(claim, verdict, reason)
    if num_missing and obstacle is None:
        things = "pairs" if sample.reference is not None else "seeds"
        note = f"{num_missing} of {len(sample.seeds)} {things} are missing and left out"
        reason = f"{reason}; {note}" if reason else note
    crossed = isinstance(effect, PairedEffect) and effect.estimate is sample.crossed
    return ClaimResult(
        claim=claim,
        verdict=verdict,
        reason=reason,
        effect=effect.effect if effect else math.nan,
        interval=interval,
        p_value=p_value,
        error_over="seeds and images" if crossed else "seeds",
        num_pairs=len(sample.seeds) - num_missing,
        num_missing=num_missing,
        num_tests=num_tests,
        note=sample.note,
    )


Effect = PairedEffect | SimultaneousBand
"""What has an effect, an interval and a p-value."""


def _decide(claim: Claim, effect: Effect, alpha: float) -> tuple[Verdict, Interval]:
    """Return the verdict and the interval that decides it.

    Two one-sided tests at level ``alpha`` reject both sides of the margin where the
    interval of level ``1 - 2 alpha`` lies inside it (Schuirmann 1987): no multiplicity,
    since the effect cannot lie on both sides. A direction is a two-sided test of the
    point null, and so is "beyond the margin" with a side chosen by the data: these need
    the interval of level ``1 - alpha``.
    """
    wide, narrow = _ends(claim, effect, alpha), _ends(claim, effect, 2.0 * alpha)
    verdict = _position(claim, wide)
    if verdict is Verdict.NOT_RESOLVED:
        inside = _position(claim, narrow)
        # 1 or -1 where the wide interval excludes no effect, else 0. The narrow one may
        # exclude it while the wide one does not; equivalence is then not claimed, since
        # the verdict would name a direction that was not tested at ``alpha``.
        direction = (wide.low > claim.null) - (wide.high < claim.null)
        is_inside = inside.decided and inside.region == 0
        if is_inside and inside.direction == direction:
            return inside, narrow
    return verdict, wide


def _ends(claim: Claim, effect: Effect, alpha: float) -> Interval:
    """Return the interval at ``1 - alpha``: a point for a check without any spread."""
    if claim.kind != "claim" and not _has_spread(effect):
        return Interval(effect.effect, effect.effect, 1.0 - alpha)
    return effect.interval(1.0 - alpha)


def _has_spread(effect: Effect) -> bool:
    return not isinstance(effect, PairedEffect) or effect.estimate.status is Status.OK


def _p_value(effect: Effect, claim: Claim) -> float:
    if isinstance(effect, PairedEffect):
        return effect.p_value_of(claim.null)
    return effect.p_value


def _as_check(claim: Claim, verdict: Verdict, reason: str) -> tuple[Verdict, str]:
    """Return whether an identity or a control passed; a claim keeps its verdict."""
    if claim.kind == "claim" or not verdict.decided:
        return verdict, reason
    planted = claim.expect if claim.kind == "control" else ""
    wanted = {"larger": 1, "smaller": -1}.get(planted, 0)
    if verdict.region == wanted:
        return Verdict.PASSED, ""
    return Verdict.FAILED, f"{verdict}, and {planted or 'equivalent'} was certain"


def _position(claim: Claim, interval: Interval) -> Verdict:
    """Return the verdict of one interval against no effect and the margin."""
    low, high = interval.low, interval.high
    lowest, highest = claim.margin_ends
    if low > highest:
        return Verdict.LARGER
    if high < lowest:
        return Verdict.SMALLER
    if low < lowest or high > highest:
        return Verdict.NOT_RESOLVED
    if low > claim.null:
        return Verdict.LARGER_WITHIN_MARGIN
    if high < claim.null:
        return Verdict.SMALLER_WITHIN_MARGIN
    return Verdict.EQUIVALENT


def _open_question(
    claim: Claim, effect: Effect, interval: Interval, num_tests: int
) -> str:
    """Return why the claim is not resolved."""
    alone, _ = _decide(claim, effect, ALPHA)
    if alone.decided:
        return f"{alone} by itself, not after adjusting for {num_tests} primary claims"
    if interval.low > claim.null:
        return "larger, but the interval reaches across the margin"
    if interval.high < claim.null:
        return "smaller, but the interval reaches across the margin"
    return "the interval reaches across the margin"


def _obstacle(
    claim: Claim,
    sample: SeedSample,
    num_missing: int,
    *,
    verdicts: bool,
    allowed: bool,
) -> tuple[Verdict, str] | None:
    if not verdicts:
        return Verdict.NOT_JUDGED, "runs of a recipe that gives no verdicts"
    if sample.not_comparable is not None:
        return Verdict.NOT_COMPARABLE, sample.not_comparable
    if num_missing and not allowed:
        things = "pairs" if claim.compares else "seeds"
        return Verdict.NOT_COMPARABLE, (
            f"{num_missing} of {len(sample.seeds)} {things} are missing (a run "
            "diverged or never reached the snapshot)"
        )
    return None


def _measure(
    sample: SeedSample, claim: Claim, level: float
) -> tuple[Effect | None, str]:
    """Return the effect with the wider of its errors, and what is wrong with it."""
    if sample.band is not None:
        return sample.band, ""
    scale, things = claim.scale, "pairs" if sample.reference is not None else "seeds"
    treatment, reference = sample.complete(no_effect=NO_EFFECT[scale])
    num_pairs = treatment.size
    if num_pairs < 2:
        return None, f"an interval needs at least 2 complete {things}, got {num_pairs}"
    bad = int(np.sum((treatment <= 0.0) | (reference <= 0.0)))
    if scale == "ratio" and bad:
        return None, (
            f"{bad} of {num_pairs} {things} have a value at or below zero, which has "
            "no ratio"
        )
    effect = paired_effect(treatment, reference, scale=scale)
    # A spread of exactly zero gives an interval of no width, which would decide
    # anything: identical pairs mean that nothing varied between the seeds.
    if not _has_spread(effect):
        fault = f"all {num_pairs} {things} agree exactly, so no spread is known"
        return effect, fault if claim.kind == "claim" else ""
    # Error rates share their test images, so that seeds alone understate the error.
    if sample.crossed is not None and scale == "difference":
        crossed = PairedEffect(sample.crossed, scale)
        if _width(crossed, level) > _width(effect, level):
            return crossed, ""
    return effect, ""


def _width(effect: PairedEffect, level: float) -> float:
    interval = effect.interval(level)
    return interval.high - interval.low


def _interval(effect: Effect | None, scale: Scale, level: float) -> Interval:
    if effect is None:
        return Interval(0.0 if scale == "ratio" else -math.inf, math.inf, level)
    return effect.interval(level)


def _names_fault(claims: Sequence[Claim], data: Mapping[str, SeedSample]) -> str:
    names = [claim.name for claim in claims]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return f"claims need distinct names, got {twice} more than once."
    absent = [name for name in names if name not in data]
    if absent:
        return (
            f"judging needs a paired sample for every claim, got none for {absent}; "
            "give one with not_comparable= where the runs have no such value."
        )
    return ""

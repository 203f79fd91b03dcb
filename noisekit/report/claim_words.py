"""Claims in words and units: a line of the table, a sentence, the whole answer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from noisekit.core.vocabulary import QUANTITIES
from noisekit.figures.theme import arm_words, snapshot_words
from noisekit.report.typography import (
    NO_VALUE,
    fixed,
    lower_first,
    number,
    sentence_case,
    spaced,
    symbol,
    typeset,
)
from noisekit.stats import Claim, ClaimResult, Verdict, claim_titles
from noisekit.stats.effects import NO_EFFECT

_TIMES = "\u202f×"
_NOT_CAUSES = "These runs cannot say whether sharpness causes the error."
_CLAIMS_NOTHING = (
    "No verdict: this profile shows that everything runs and claims nothing."
)


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """One line of the table of claims, all in words."""

    anchor: str
    title: str
    quantity: str
    symbol: Markup
    statistic: str
    groups: tuple[str, ...]
    place: str
    effect: str
    interval: str
    level: str
    pairs: str
    images: bool
    null: str
    margin: str
    verdict: str
    reason: str
    note: str
    paper: str
    against_paper: str
    sentence: str
    experiment: str = ""
    broken: str = ""


def claim_rows(
    results: Sequence[ClaimResult], arms: Mapping[str, str], *, prefix: str = "claim-"
) -> list[ClaimRow]:
    """Return each claim as a line of the table.

    Args:
        results: Claims with effects and verdicts.
        arms: The name under which each arm is shown.
        prefix: What the anchor of a claim has before its name.
    """
    titles = claim_titles([result.claim for result in results])
    rows = []
    for result in results:
        claim = result.claim
        known = QUANTITIES.get(claim.quantity)
        rows.append(
            ClaimRow(
                anchor=f"{prefix}{claim.name}",
                title=titles[claim.name],
                quantity=_quantity(claim),
                symbol=symbol(known.symbol) if known else Markup(),
                statistic=typeset(claim.statistic.words()),
                groups=_groups(claim, arms),
                place=_place(claim),
                effect=_effect(result),
                interval=_interval(result),
                level=_level(result),
                pairs=_pairs(result),
                images="images" in result.error_over,
                null=_null(claim),
                margin=_margin(claim),
                verdict=str(result.verdict),
                reason=typeset(result.reason),
                note=typeset(result.note),
                paper=typeset(claim.paper),
                against_paper=result.against_paper,
                sentence=sentence(result, arms),
            )
        )
    return rows


def sentence(result: ClaimResult, arms: Mapping[str, str]) -> str:
    """Return one sentence with arms, effect, deciding interval and verdict."""
    claim = result.claim
    kind = "" if claim.primary else f" ({_family(claim)})"
    return f"{_arms_compared(result.claim, arms)}: {_finding(result)}{kind}."


def answer(
    results: Sequence[ClaimResult],
    arms: Mapping[str, str],
    *,
    verdicts: bool = True,
    setting: str = "",
) -> str:
    """Return the answer that follows from the table of claims, a line a statement.

    Every primary claim is reported, with its interval and its place to the margin.
    A descriptive claim of the same kind of quantity that contradicts one of them
    (decided, and on another side of the margin or in another direction), or that is
    decided where a primary one is not, is reported as well. The others are counted.

    Args:
        results: Claims with effects and verdicts.
        arms: The name under which each arm is shown.
        verdicts: Whether the runs may carry verdicts.
        setting: What was trained, in a few words.
    """
    if not verdicts:
        return _CLAIMS_NOTHING
    primary = [result for result in results if result.claim.primary]
    checks = [result for result in results if result.claim.kind != "claim"]
    others = [item for item in results if item not in (*primary, *checks)]
    contrary = [result for result in others if _contradicts(result, primary)]
    parts = [f"{sentence_case(setting)}."] if setting else []
    parts += [failed_check(result, arms) for result in checks if broken(result)]
    if primary:
        parts += _by_arms(primary, arms)
    else:
        parts.append("No claim was primary, so there is no verdict.")
    if contrary:
        findings = " ".join(_by_arms(contrary, arms))
        parts.append(f"Against this, by descriptive claims: {findings}")
    parts += _rest([result for result in others if result not in contrary])
    kinds = {_kind(result.claim) for result in results}
    if "sharpness" in kinds and any(kind.endswith("_error") for kind in kinds):
        parts.append(_NOT_CAUSES)
    return "\n".join(parts)


def broken(result: ClaimResult) -> bool:
    """Return whether a check of the instrument did not come out as it must.

    A control whose planted answer is not seen is broken as well.
    """
    unseen = result.claim.kind == "control" and (
        result.verdict in (Verdict.NOT_RESOLVED, Verdict.NOT_COMPARABLE)
    )
    return result.verdict is Verdict.FAILED or unseen


def failed_check(result: ClaimResult, arms: Mapping[str, str]) -> str:
    """Return a warning that a check failed, for the top of the page."""
    return (
        f"The {result.claim.kind} “{result.claim.name.replace('_', ' ')}” did not come "
        f"out as it must, so no verdict here can be trusted until it is explained. "
        f"{sentence(result, arms)}"
    )


def _by_arms(results: Sequence[ClaimResult], arms: Mapping[str, str]) -> list[str]:
    """Return one sentence for each pair of arms, with the findings of its claims."""
    findings: dict[str, list[str]] = {}
    for result in results:
        pair = _arms_compared(result.claim, arms)
        findings.setdefault(pair, []).append(_finding(result))
    return [f"{pair}: {'; '.join(found)}." for pair, found in findings.items()]


def _contradicts(descriptive: ClaimResult, primary: Sequence[ClaimResult]) -> bool:
    """Return whether a primary verdict must not be reported without this result."""
    verdict = descriptive.verdict
    if not verdict.decided:
        return False
    for result in primary:
        if _kind(result.claim) != _kind(descriptive.claim):
            continue
        opposed = verdict.direction * result.verdict.direction < 0
        if opposed or not result.verdict.decided:
            return True
        if verdict.region != result.verdict.region:
            return True
    return False


def _kind(claim: Claim) -> str:
    """Return what claims must share to contradict each other."""
    known = QUANTITIES.get(claim.quantity)
    sharpness = known is not None and known.invariance is not None
    return "sharpness" if sharpness else claim.quantity


def _rest(results: Sequence[ClaimResult]) -> list[str]:
    """Return a sentence that counts the descriptive claims that are not reported."""
    if not results:
        return []
    counts: dict[str, int] = {}
    for result in results:
        counts[str(result.verdict)] = counts.get(str(result.verdict), 0) + 1
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return [f"Other descriptive claims: {listed}."]


def _groups(claim: Claim, arms: Mapping[str, str]) -> tuple[str, ...]:
    """Return the groups of runs under the names of their arms."""
    return tuple(_arm(name, arms) for name in claim.statistic.groups if name)


def _arms_compared(claim: Claim, arms: Mapping[str, str]) -> str:
    names = _groups(claim, arms)[:2]
    return sentence_case(" against ".join(names) or "all runs")


def _family(claim: Claim) -> str:
    return {"claim": "descriptive"}.get(claim.kind, claim.kind)


def _place(claim: Claim) -> str:
    at = claim.statistic.snapshot
    return f"at {snapshot_words(at)}" if at else ""


def _head(claim: Claim) -> str:
    """Return what is measured: quantity, statistic and place."""
    parts = [lower_first(_quantity(claim)), claim.statistic.words()]
    head = ", ".join(part for part in parts if part)
    return f"{head} {_place(claim)}".rstrip()


def _finding(result: ClaimResult) -> str:
    """Return the finding of a claim, without its arms."""
    claim, head = result.claim, _head(result.claim)
    verdict, reason = result.verdict, typeset(result.reason)
    size = f"{_size(result)}{_interval_words(result)}"
    relevant = f"the {_margin(claim)} called relevant"
    if verdict is Verdict.NOT_COMPARABLE:
        return f"{head} could not be compared: {reason}"
    if verdict is Verdict.NOT_JUDGED:
        return f"{head} is not judged: {reason}"
    if verdict is Verdict.NOT_RESOLVED:
        measured = "" if math.isnan(result.effect) else f"{size}; "
        return f"{head} is not resolved against {relevant}: {measured}{reason}"
    note = f"; {reason}" if reason else ""
    return f"{_decided(result, head, size)}{note}"


def _decided(result: ClaimResult, head: str, size: str) -> str:
    """Return the words of a verdict, or of a check of the instrument."""
    claim, verdict = result.claim, result.verdict
    relevant = f"the {_margin(claim)} called relevant"
    if verdict in (Verdict.PASSED, Verdict.FAILED):
        return f"{head} {verdict} the check: {size}"
    if not _moves(claim):
        return f"{head} was {size}, {_against_null(claim, verdict)}"
    if verdict is Verdict.EQUIVALENT:
        return f"{head} stayed within {relevant}: {size}"
    moved = "rose" if verdict.direction > 0 else "fell"
    if claim.scale == "difference":
        moved += " by"
    elif moved == "fell":
        moved += " to"
    compared = "more" if verdict.region else "less"
    return f"{head} {moved} {size}, {compared} than {relevant}"


def _moves(claim: Claim) -> bool:
    """Return whether a claim is about one quantity moving between two groups."""
    plain = claim.null == NO_EFFECT[claim.scale]
    return claim.compares and plain and claim.statistic.moves


def _against_null(claim: Claim, verdict: Verdict) -> str:
    """Return where a number lies against the one that was claimed."""
    if verdict is Verdict.EQUIVALENT:
        return f"within {_margin(claim)} of {_null(claim)}"
    side = "above" if verdict.direction > 0 else "below"
    compared = "more" if verdict.region else "less"
    return (
        f"{side} {_null(claim)} by {compared} than the {_margin(claim)} called relevant"
    )


def _size(result: ClaimResult) -> str:
    """Return an effect without its sign where the verb has the direction."""
    directed = result.verdict.direction and _moves(result.claim)
    if result.claim.scale == "difference" and directed:
        return _effect(result).lstrip("+−")
    return _effect(result)


def _interval_words(result: ClaimResult) -> str:
    if not result.interval.bounded:
        return ""
    return f" ({_level(result)} interval {_interval(result)})"


def _quantity(claim: Claim) -> str:
    known = QUANTITIES.get(claim.quantity)
    return known.label if known else spaced(claim.quantity)


def _arm(name: str, arms: Mapping[str, str]) -> str:
    return arms.get(name, arm_words(name))


def _effect(result: ClaimResult) -> str:
    if math.isnan(result.effect):
        return NO_VALUE
    claim = result.claim
    if claim.scale == "ratio":
        return f"{number(result.effect, pad=True)}{_times(claim)}"
    factor, unit = _unit(claim)
    return f"{fixed(factor * result.effect, _places(result))} {unit}".rstrip()


def _times(claim: Claim) -> str:
    """Return the sign of a factor, where two groups are compared."""
    if claim.compares:
        return _TIMES
    unit = _unit(claim)[1]
    return f" {unit}" if unit else ""


def _interval(result: ClaimResult) -> str:
    if not result.interval.bounded:
        return NO_VALUE
    ends = result.interval.low, result.interval.high
    if result.claim.scale == "ratio":
        low, high = (number(end, pad=True) for end in ends)
    else:
        factor, places = _unit(result.claim)[0], _places(result)
        low, high = (fixed(factor * end, places) for end in ends)
    return f"{low} to {high}"


def _level(result: ClaimResult) -> str:
    return f"{100 * result.interval.level:.3g} %"


def _places(result: ClaimResult) -> int:
    """Return decimals that leave two digits of the interval's half-width."""
    half = _unit(result.claim)[0] * (result.interval.high - result.interval.low) / 2
    if not (math.isfinite(half) and half > 0):
        return 2
    return min(6, max(0, 1 - math.floor(math.log10(half))))


def _margin(claim: Claim) -> str:
    if claim.scale == "ratio":
        return f"{number(claim.margin)}{_TIMES}"
    factor, unit = _unit(claim)
    return f"{number(factor * claim.margin)} {unit}".rstrip()


def _null(claim: Claim) -> str:
    if claim.scale == "ratio":
        return f"{number(claim.null)}{_times(claim)}"
    factor, unit = _unit(claim)
    return f"{number(factor * claim.null)} {unit}".rstrip()


def _unit(claim: Claim) -> tuple[float, str]:
    known = QUANTITIES.get(claim.quantity)
    stated = claim.statistic.unit
    unit = (known.unit if known else "") if stated is None else stated
    if unit == "fraction":
        return 100.0, "points" if claim.compares else "%"
    return 1.0, unit


def _pairs(result: ClaimResult) -> str:
    missing = f", {result.num_missing} missing" if result.num_missing else ""
    noun = "pair" if result.claim.compares else "seed"
    return f"{result.num_pairs} {noun}{'' if result.num_pairs == 1 else 's'}{missing}"

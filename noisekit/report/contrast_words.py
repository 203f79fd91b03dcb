"""Contrasts in words and units: a line of the table, a sentence, the whole answer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from noisekit.core.vocabulary import QUANTITIES
from noisekit.figures.theme import snapshot_words
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
from noisekit.stats import Contrast, ContrastResult, Verdict, contrast_titles

_TIMES = "\u202f×"
_NOT_CAUSES = "These runs cannot say whether sharpness causes the error."
_CLAIMS_NOTHING = (
    "No verdict: this profile shows that everything runs and claims nothing."
)


@dataclass(frozen=True, slots=True)
class ContrastRow:
    """One line of the table of contrasts, all in words."""

    title: str
    quantity: str
    symbol: Markup
    treatment: str
    reference: str
    snapshot: str
    effect: str
    interval: str
    level: str
    pairs: str
    images: bool
    margin: str
    verdict: str
    reason: str
    paper: str
    sentence: str


def contrast_rows(
    results: Sequence[ContrastResult], arms: Mapping[str, str]
) -> list[ContrastRow]:
    """Return each contrast as a line of the table.

    Args:
        results: Contrasts with effects and verdicts.
        arms: The name under which each arm is shown.
    """
    titles = contrast_titles([result.contrast for result in results])
    rows = []
    for result in results:
        contrast = result.contrast
        known = QUANTITIES.get(contrast.quantity)
        rows.append(
            ContrastRow(
                title=titles[contrast.name],
                quantity=_quantity(contrast),
                symbol=symbol(known.symbol) if known else Markup(),
                treatment=_arm(contrast.treatment, arms),
                reference=_arm(contrast.reference, arms),
                snapshot=snapshot_words(contrast.snapshot),
                effect=_effect(result),
                interval=_interval(result),
                level=_level(result),
                pairs=_pairs(result),
                images="images" in result.error_over,
                margin=_margin(contrast),
                verdict=str(result.verdict),
                reason=typeset(result.reason),
                paper=typeset(contrast.paper),
                sentence=sentence(result, arms),
            )
        )
    return rows


def sentence(result: ContrastResult, arms: Mapping[str, str]) -> str:
    """Return one sentence with arms, effect, deciding interval and verdict."""
    kind = "" if result.contrast.primary else " (descriptive)"
    return f"{_arms_compared(result.contrast, arms)}: {_finding(result)}{kind}."


def answer(
    results: Sequence[ContrastResult],
    arms: Mapping[str, str],
    *,
    claims: bool = True,
    setting: str = "",
) -> str:
    """Return the answer that follows from the table of contrasts, a line a statement.

    Every primary contrast is reported, with its interval and its place to the margin.
    A descriptive contrast of the same kind of quantity that contradicts one of them
    (decided, and on another side of the margin or in another direction), or that is
    decided where a primary one is not, is reported as well. The others are counted.

    Args:
        results: Contrasts with effects and verdicts.
        arms: The name under which each arm is shown.
        claims: Whether the runs may carry verdicts.
        setting: What was trained, in a few words.
    """
    if not claims:
        return _CLAIMS_NOTHING
    primary = [result for result in results if result.contrast.primary]
    others = [result for result in results if not result.contrast.primary]
    contrary = [result for result in others if _contradicts(result, primary)]
    parts = [f"{sentence_case(setting)}."] if setting else []
    if primary:
        parts += _by_arms(primary, arms)
    else:
        parts.append("No contrast was primary, so there is no verdict.")
    if contrary:
        findings = " ".join(_by_arms(contrary, arms))
        parts.append(f"Against this, by descriptive contrasts: {findings}")
    parts += _rest([result for result in others if result not in contrary])
    kinds = {_kind(result.contrast) for result in results}
    if "sharpness" in kinds and any(kind.endswith("_error") for kind in kinds):
        parts.append(_NOT_CAUSES)
    return "\n".join(parts)


def _by_arms(results: Sequence[ContrastResult], arms: Mapping[str, str]) -> list[str]:
    """Return one sentence for each pair of arms, with the findings of its contrasts."""
    findings: dict[str, list[str]] = {}
    for result in results:
        pair = _arms_compared(result.contrast, arms)
        findings.setdefault(pair, []).append(_finding(result))
    return [f"{pair}: {'; '.join(found)}." for pair, found in findings.items()]


def _contradicts(
    descriptive: ContrastResult, primary: Sequence[ContrastResult]
) -> bool:
    """Return whether a primary verdict must not be reported without this result."""
    verdict = descriptive.verdict
    if not verdict.decided:
        return False
    for result in primary:
        if _kind(result.contrast) != _kind(descriptive.contrast):
            continue
        opposed = verdict.direction * result.verdict.direction < 0
        if opposed or not result.verdict.decided:
            return True
        if verdict.region != result.verdict.region:
            return True
    return False


def _kind(contrast: Contrast) -> str:
    """Return what contrasts must share to contradict each other."""
    known = QUANTITIES.get(contrast.quantity)
    sharpness = known is not None and known.invariance is not None
    return "sharpness" if sharpness else contrast.quantity


def _rest(results: Sequence[ContrastResult]) -> list[str]:
    """Return a sentence that counts the descriptive contrasts that are not reported."""
    if not results:
        return []
    counts: dict[str, int] = {}
    for result in results:
        counts[str(result.verdict)] = counts.get(str(result.verdict), 0) + 1
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return [f"Other descriptive contrasts: {listed}."]


def _arms_compared(contrast: Contrast, arms: Mapping[str, str]) -> str:
    treatment, reference = (
        _arm(arm, arms) for arm in (contrast.treatment, contrast.reference)
    )
    return sentence_case(f"{treatment} against {reference}")


def _finding(result: ContrastResult) -> str:
    """Return the finding of a contrast, without its arms."""
    contrast = result.contrast
    head = f"{lower_first(_quantity(contrast))} at {snapshot_words(contrast.snapshot)}"
    verdict, reason = result.verdict, typeset(result.reason)
    size = f"{_size(result)}{_interval_words(result)}"
    relevant = f"the {_margin(contrast)} called relevant"
    if verdict is Verdict.NOT_COMPARABLE:
        return f"{head} could not be compared: {reason}"
    if verdict is Verdict.NOT_JUDGED:
        return f"{head} is not judged: {reason}"
    if verdict is Verdict.NOT_RESOLVED:
        measured = "" if math.isnan(result.effect) else f"{size}; "
        return f"{head} is not resolved against {relevant}: {measured}{reason}"
    note = f"; {reason}" if reason else ""
    if verdict is Verdict.EQUIVALENT:
        return f"{head} stayed within {relevant}: {size}{note}"
    moved = "rose" if verdict.direction > 0 else "fell"
    if contrast.scale == "difference":
        moved += " by"
    elif moved == "fell":
        moved += " to"
    compared = "more" if verdict.region else "less"
    return f"{head} {moved} {size}, {compared} than {relevant}{note}"


def _size(result: ContrastResult) -> str:
    """Return an effect without its sign where the verb has the direction."""
    if result.contrast.scale == "difference" and result.verdict.direction:
        return _effect(result).lstrip("+−")
    return _effect(result)


def _interval_words(result: ContrastResult) -> str:
    if not result.interval.bounded:
        return ""
    return f" ({_level(result)} interval {_interval(result)})"


def _quantity(contrast: Contrast) -> str:
    known = QUANTITIES.get(contrast.quantity)
    return known.label if known else spaced(contrast.quantity)


def _arm(name: str, arms: Mapping[str, str]) -> str:
    return arms.get(name, spaced(name))


def _effect(result: ContrastResult) -> str:
    if math.isnan(result.effect):
        return NO_VALUE
    if result.contrast.scale == "ratio":
        return f"{number(result.effect, pad=True)}{_TIMES}"
    factor, unit = _unit(result.contrast)
    return f"{fixed(factor * result.effect, _places(result))} {unit}".rstrip()


def _interval(result: ContrastResult) -> str:
    if not result.interval.bounded:
        return NO_VALUE
    ends = result.interval.low, result.interval.high
    if result.contrast.scale == "ratio":
        low, high = (number(end, pad=True) for end in ends)
    else:
        factor, places = _unit(result.contrast)[0], _places(result)
        low, high = (fixed(factor * end, places) for end in ends)
    return f"{low} to {high}"


def _level(result: ContrastResult) -> str:
    return f"{100 * result.interval.level:.3g} %"


def _places(result: ContrastResult) -> int:
    """Return decimals that leave two digits of the interval's half-width."""
    half = _unit(result.contrast)[0] * (result.interval.high - result.interval.low) / 2
    if not (math.isfinite(half) and half > 0):
        return 2
    return min(6, max(0, 1 - math.floor(math.log10(half))))


def _margin(contrast: Contrast) -> str:
    if contrast.scale == "ratio":
        return f"{number(contrast.margin)}{_TIMES}"
    factor, unit = _unit(contrast)
    return f"{number(factor * contrast.margin)} {unit}".rstrip()


def _unit(contrast: Contrast) -> tuple[float, str]:
    known = QUANTITIES.get(contrast.quantity)
    unit = known.unit if known else ""
    return (100.0, "points") if unit == "fraction" else (1.0, unit)


def _pairs(result: ContrastResult) -> str:
    missing = f", {result.num_missing} missing" if result.num_missing else ""
    noun = "pair" if result.num_pairs == 1 else "pairs"
    return f"{result.num_pairs} {noun}{missing}"

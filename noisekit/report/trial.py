"""The claims of several sets of runs on one page, by the account that they bear on."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from noisekit.core.errors import EmptyDataError
from noisekit.figures import arm_styles
from noisekit.records import Runs
from noisekit.report.claim_words import ClaimRow, broken, claim_rows, failed_check
from noisekit.report.comparability import judged_claims
from noisekit.report.page_model import write_page
from noisekit.report.recipe_view import title
from noisekit.report.rules import fair_test_rules
from noisekit.report.typography import sentence_case, typeset
from noisekit.stats import ACCOUNTS, ClaimResult, Verdict

_CHECKS = "Checks of the instrument"
_OTHER = "Other claims"


@dataclass(frozen=True, slots=True)
class Judged:
    """The claims of one set of runs.

    Attributes:
        experiment: Name of the experiment and profile.
        results: Its claims with verdicts.
        rows: The same in words.
        broken: Rules of a fair test that do not hold.
        faults: What could not be read.
        data: Name of its data.
    """

    experiment: str
    results: tuple[ClaimResult, ...]
    rows: tuple[ClaimRow, ...]
    broken: tuple[str, ...]
    faults: tuple[str, ...]
    data: str


@dataclass(frozen=True, slots=True)
class TrialPage:
    """All that the template shows.

    Attributes:
        experiments: Names of the experiments.
        alarms: Checks of the instrument that did not come out as they must.
        faults: What could not be read.
        families: Account, its sentence, and its claims; checks last.
        closing: What the runs support, and what they cannot.
    """

    experiments: tuple[str, ...]
    alarms: tuple[str, ...]
    faults: tuple[str, ...]
    families: tuple[tuple[str, str, tuple[ClaimRow, ...]], ...]
    closing: str


def build_trial(sets: Sequence[Runs], out: Path | str) -> Path:
    """Write the claims of several sets of runs as one HTML page; return its path.

    Args:
        sets: The sets of runs, each of a recipe of its own.
        out: The file; one that is there is replaced as a whole.

    Raises:
        EmptyDataError: If no recipe states a claim.
        StorageError: If the file cannot be written.
    """
    return write_page("trial.html.j2", trial_page(sets), Path(out))


def trial_page(sets: Sequence[Runs]) -> TrialPage:
    """Return the claims of several sets by account, with their verdicts.

    Raises:
        EmptyDataError: If no recipe states a claim.
    """
    judged = [_judged(runs, number) for number, runs in enumerate(sets, start=1)]
    if not any(item.results for item in judged):
        raise EmptyDataError(
            "a trial needs runs of a recipe that states claims, got "
            f"{', '.join(item.experiment for item in judged) or 'no runs'}, which "
            "states none; add [[claims]] to the recipe and run it."
        )
    return TrialPage(
        experiments=tuple(item.experiment for item in judged),
        alarms=tuple(
            f"{item.experiment}: {failed_check(result, {})}"
            for item in judged
            for result in item.results
            if broken(result)
        ),
        faults=tuple(typeset(text) for item in judged for text in item.faults),
        families=tuple(_families(judged)),
        closing=" ".join(closing(judged)),
    )


def _judged(runs: Runs, number: int) -> Judged:
    results = judged_claims(runs)
    arms = {arm: style.label for arm, style in arm_styles(runs.runs).items()}
    claims = [result.claim for result in results]
    rules = [rule.name for rule in fair_test_rules(runs, claims) if not rule.met]
    # Losses that do not match are the reason of the claim's own verdict already.
    named = tuple(name for name in rules if not name.startswith("Training loss"))
    experiment = title(runs)
    rows = [
        replace(row, experiment=experiment, broken=_joined(named))
        for row in claim_rows(results, arms, prefix=f"set-{number}-claim-")
    ]
    data = str(runs.directories[0].manifest.data.get("name", ""))
    return Judged(experiment, results, tuple(rows), named, tuple(runs.faults), data)


def _joined(rules: Sequence[str]) -> str:
    return typeset("; ".join(rule[:1].lower() + rule[1:] for rule in rules))


def _families(
    judged: Iterable[Judged],
) -> Iterator[tuple[str, str, tuple[ClaimRow, ...]]]:
    pairs = [
        pair for item in judged for pair in zip(item.results, item.rows, strict=True)
    ]
    for account, words in (*ACCOUNTS.items(), ("", "")):
        rows = tuple(
            row
            for result, row in pairs
            if result.claim.account == account and result.claim.kind == "claim"
        )
        name = sentence_case(account.replace("_", " ")) if account else _OTHER
        yield name, words, rows
    checks = tuple(row for result, row in pairs if result.claim.kind != "claim")
    yield _CHECKS, "identities and controls; not claims", checks


def closing(judged: Sequence[Judged]) -> Iterator[str]:
    """Yield the sentences on what the runs support and what they cannot, by rule."""
    claims = [
        result
        for item in judged
        for result in item.results
        if result.claim.kind == "claim"
    ]
    counts = Counter(str(result.verdict) for result in claims)
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    sets = f"{len(judged)} experiment{'' if len(judged) == 1 else 's'}"
    yield f"{_count(len(claims), 'claim')} of {sets} came out as: {listed or 'none'}."
    yield from _papers(claims)
    if any(broken(result) for item in judged for result in item.results):
        yield (
            "A check of the instrument did not come out as it must, so none of these "
            "verdicts supports anything until that is explained."
        )
    unjudged = sum(not result.verdict.decided for result in claims)
    if unjudged:
        yield (
            f"The {_count(unjudged, 'claim')} without a decision support neither side: "
            "not resolved is no evidence of equivalence, not comparable none at all."
        )
    rules = dict.fromkeys(name for item in judged for name in item.broken)
    if rules:
        yield f"Rules that are broken in one set or more: {_joined(list(rules))}."
    data = ", ".join(dict.fromkeys(item.data for item in judged if item.data))
    where = f" of {data}" if data else ""
    yield (
        f"All of it holds for these networks and splits{where}, and for the budgets "
        "and rates that the recipes state; a paper's own setting is another."
    )
    if len(judged) > 1:
        yield (
            "Primary claims are adjusted for their number within each experiment, not "
            "across experiments."
        )
    yield (
        "No claim here intervenes on sharpness itself, so none says what causes an "
        "error, and no account as a whole is confirmed or refuted."
    )


def _papers(claims: Sequence[ClaimResult]) -> Iterator[str]:
    """Yield how many verdicts agree with the papers, over the primary claims too."""
    found = Counter(result.against_paper for result in claims if result.against_paper)
    if found:
        parts = [f"{_count(count, 'claim')} {words}" for words, count in found.items()]
        yield f"Where a paper has a direction: {', '.join(parts)}."
    primary = [result for result in claims if result.claim.primary]
    beyond = (Verdict.LARGER, Verdict.SMALLER)
    supported = [result.claim.name for result in primary if result.verdict in beyond]
    if supported:
        names = ", ".join(name.replace("_", " ") for name in supported)
        yield f"Beyond their margins, of {len(primary)} primary claims: {names}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

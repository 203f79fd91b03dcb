"""The result of an analysis that answers with the claims of a recipe."""

from collections.abc import Iterable, Mapping, Sequence

from noisekit.figures import Plot
from noisekit.records import Runs
from noisekit.report.claim_words import answer
from noisekit.report.recipe_view import gives_verdicts, question, setting_words
from noisekit.report.results import AnalysisResult, Table
from noisekit.report.rules import fair_test_rules
from noisekit.stats import ClaimResult


def claims_result(
    runs: Runs,
    results: Sequence[ClaimResult],
    *,
    name: str,
    arms: Mapping[str, str],
    plots: Iterable[Plot] = (),
    tables: Iterable[Table] = (),
    warnings: Iterable[str] = (),
) -> AnalysisResult:
    """Return the recipe's question with verdicts, and the rules of a fair test.

    Args:
        runs: The runs.
        results: Their claims, as :func:`judged_claims` returns them.
        name: Name of the analysis.
        arms: The name under which each arm is shown.
        plots: Figures, the most telling first.
        tables: Tables.
        warnings: What a reader must know before using the numbers.
    """
    return AnalysisResult(
        name=name,
        question=question(runs),
        answer=answer(
            results,
            arms,
            verdicts=gives_verdicts(runs),
            setting=setting_words(runs),
        ),
        rules=fair_test_rules(runs, [result.claim for result in results]),
        claims=tuple(results),
        arms=arms,
        plots=tuple(plots),
        tables=tuple(tables),
        warnings=tuple(warnings),
    )

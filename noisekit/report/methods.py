"""How the numbers of a page were made, in sentences, with the papers behind them."""

from collections.abc import Iterator, Sequence

from noisekit.core.citations import bibtex, cited_in
from noisekit.core.vocabulary import Quantity
from noisekit.report.results import AnalysisResult, Provenance
from noisekit.stats import ClaimResult

_T_INTERVALS = (
    "Effects are paired by seed, since arms of one seed share initial weights and the "
    "order of examples where batch sizes allow: ratios of geometric means, or "
    "differences of means, with Student's t-intervals over seeds."
)
_FAMILY = (
    "For {count} primary claims each interval is adjusted to an error of "
    "{share:.3g} % (Bonferroni), so that one or more false verdicts come in at most "
    "5 % of experiments; descriptive claims are not adjusted."
)
_IMAGES = (
    "Differences of test error are also analysed over seeds and images as crossed "
    "random effects (Hillis 2007), given the one split of the data; the wider interval "
    "decides."
)
_NOISE = (
    "Noise scales are ratios of averages over readings, never averages of ratios, with "
    "Fieller's confidence set; one that is not resolved is shown as the bound that it "
    "is."
)


def method_sentences(
    results: Sequence[AnalysisResult], quantities: Sequence[Quantity]
) -> tuple[str, ...]:
    """Return how effects, errors and noise scales were computed, as far as shown.

    Args:
        results: The analyses of the page.
        quantities: The quantities that the page names.
    """
    claims = [item for result in results for item in result.claims]
    names = {quantity.name for quantity in quantities}
    return tuple(_sentences(claims, names))


def _sentences(claims: Sequence[ClaimResult], names: set[str]) -> Iterator[str]:
    primary = [item for item in claims if item.claim.primary]
    if claims:
        yield _T_INTERVALS
    if primary:
        tests = primary[0].num_tests
        yield _FAMILY.format(count=tests, share=5 / tests)
    if any(item.claim.quantity.endswith("_error") for item in claims):
        yield _IMAGES
    if "simple_noise_scale" in names:
        yield _NOISE


def references(provenance: Provenance, quantities: Sequence[Quantity]) -> str:
    """Return BibTeX of the papers behind the recipe and the quantities shown."""
    sources = " ".join([provenance.source, *(q.source for q in quantities)])
    return bibtex(citation.key for citation in cited_in(sources))

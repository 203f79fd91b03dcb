"""Sets of contrasts whose true effects are known, and what their answers claim."""

import math
import re
from dataclasses import dataclass

import numpy as np

from noisekit.report import answer
from noisekit.stats import ClaimResult, SeedSample, Verdict, contrast, judge

ARMS = {"large": "batch 128", "small": "batch 16"}
MARGINS = {"ratio": 1.5, "difference": 0.005}
# Quantity, scale and whether primary, of the contrasts of one set.
DESIGN = (
    ("lambda_max", "ratio", True),
    ("test_error", "difference", True),
    ("hessian_trace", "ratio", True),
    ("lambda_max", "ratio", False),
    ("test_error", "difference", False),
)
# True effects of the five contrasts, in units of the margin.
PLANTED = {
    "null": (0.0, 0.0, 0.0, 0.0, 0.0),
    "within the margin": (0.5, -0.5, 0.5, 0.5, -0.5),
    "just beyond": (1.02, -1.02, 1.02, 1.02, -1.02),
    "beyond": (2.5, -2.5, 2.5, 2.5, -2.5),
    "both sides": (0.0, 2.5, -2.5, 2.5, -2.5),
}
_CLAIM = re.compile(
    r"(?P<verb>rose|fell|stayed within|is not resolved)"
    r"(?:.*?(?P<compared>more|less) than the [\d.]+)?"
)


@dataclass(frozen=True)
class Planted:
    """One set: its results, its answer, and the true effects in units of the margin."""

    results: tuple[ClaimResult, ...]
    text: str
    truth: tuple[float, ...]

    @property
    def primary(self) -> list[tuple[ClaimResult, float]]:
        pairs = zip(self.results, self.truth, strict=True)
        return [(r, t) for r, t in pairs if r.claim.primary]

    def phrase(self, result: ClaimResult) -> str:
        """Return what the answer says of a contrast; empty where it does not."""
        loss = str(result.claim.statistic.snapshot).removeprefix("loss_")
        place = f"at training loss {loss} "
        found = [
            part
            for line in self.text.split("\n")
            for part in line.removesuffix(".").split("; ")
            if place in part
        ]
        return found[0] if found else ""


def planted(
    kind: str, generator: np.random.Generator, *, num_seeds: int = 10
) -> Planted:
    """Draw one set of contrasts with normal errors of half a margin per pair."""
    truth = PLANTED[kind]
    claims, data = [], {}
    for place, ((quantity, scale, primary), effect) in enumerate(
        zip(DESIGN, truth, strict=True)
    ):
        claim = contrast(
            name=f"c{place}",
            quantity=quantity,
            treatment="large",
            reference="small",
            snapshot=f"loss_{place + 1}",
            scale=scale,
            margin=MARGINS[scale],
            primary=primary,
        )
        draws = generator.normal(effect, 0.5, num_seeds)
        base = np.full(num_seeds, 0.03)
        values = (
            base + MARGINS["difference"] * draws
            if scale == "difference"
            else base * np.exp(math.log(MARGINS["ratio"]) * draws)
        )
        claims.append(claim)
        data[claim.name] = SeedSample(
            tuple(range(num_seeds)), tuple(values), tuple(base)
        )
    results = tuple(judge(claims, data))
    return Planted(results, answer(results, ARMS), truth)


def is_false(verdict: Verdict, effect: float) -> bool:
    """Whether a verdict is wrong of a true effect in units of the margin."""
    region = 0 if abs(effect) < 1 else int(np.sign(effect))
    if verdict in (Verdict.LARGER, Verdict.SMALLER):
        return region != {Verdict.LARGER: 1, Verdict.SMALLER: -1}[verdict]
    if verdict is Verdict.LARGER_WITHIN_MARGIN:
        return region != 0 or effect <= 0
    if verdict is Verdict.SMALLER_WITHIN_MARGIN:
        return region != 0 or effect >= 0
    return verdict is Verdict.EQUIVALENT and region != 0


def claimed(phrase: str) -> str:
    """Return the verdict that a phrase of the answer claims."""
    found = _CLAIM.search(phrase)
    assert found is not None, phrase
    if found["verb"] in ("rose", "fell"):
        side = {"rose": "larger", "fell": "smaller"}[found["verb"]]
        within = {"less": " within the margin", "more": ""}[found["compared"]]
        return side + within
    return {"stayed within": "equivalent"}.get(found["verb"], "not resolved")


def false_share(kind: str, *, num_sets: int, seed: int, num_seeds: int = 10) -> float:
    """Return the share of sets with a false primary verdict, sentences checked too."""
    generator = np.random.default_rng(seed)
    false = 0
    for _ in range(num_sets):
        drawn = planted(kind, generator, num_seeds=num_seeds)
        check_sentences(drawn)
        false += any(
            is_false(result.verdict, effect) for result, effect in drawn.primary
        )
    return false / num_sets


def check_sentences(drawn: Planted) -> None:
    """Check that the answer says of each contrast what its verdict is.

    Every primary verdict is told; a descriptive one at least where it contradicts a
    primary one of the same quantity.
    """
    for result in drawn.results:
        phrase = drawn.phrase(result)
        if phrase:
            assert claimed(phrase) == str(result.verdict), drawn.text
        else:
            assert not result.claim.primary, drawn.text
            for other, _ in drawn.primary:
                if other.claim.quantity == result.claim.quantity:
                    assert not contradicts(result.verdict, other.verdict), drawn.text


def contradicts(one: Verdict, other: Verdict) -> bool:
    """Whether two decided verdicts cannot both hold of one effect."""
    undecided = (Verdict.NOT_RESOLVED, Verdict.NOT_COMPARABLE)
    if one in undecided or other in undecided:
        return False
    beyond = (Verdict.LARGER, Verdict.SMALLER)
    if one in beyond or other in beyond:
        return one is not other
    return {one, other} == {
        Verdict.LARGER_WITHIN_MARGIN,
        Verdict.SMALLER_WITHIN_MARGIN,
    }

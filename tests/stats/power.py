"""How often verdicts are right, and false: ``python -m tests.stats.power``.

Writes the tables of ``docs/claims.md``. Effects and standard deviations of one seed are
in units of the margin.
"""

from collections import Counter

import numpy as np

from noisekit.stats import Claim, SeedSample, Value, Verdict, judge

REPEATS = 1000
EFFECTS = (0.0, 0.5, 0.99, 1.01, 1.5, 2.0)
SPREADS = (0.5, 1.0, 2.0)
SEEDS = (3, 5, 10, 20)


def claim(name: str, *, primary: bool) -> Claim:
    """Return a claim of margin 1 around 0."""
    return Claim(
        name=name,
        statistic=Value(quantity="test_error"),
        margin=1.0,
        primary=primary,
    )


def shares(
    effect: float, spread: float, num_seeds: int, *, family: int = 1, seed: int = 0
) -> dict[Verdict, float]:
    """Return the share of each verdict on the first claim of a family.

    Args:
        effect: True effect, in margins.
        spread: Standard deviation of one seed's number, in margins.
        num_seeds: Seeds behind a claim.
        family: Primary claims.
        seed: Seed of the simulation.
    """
    generator = np.random.default_rng(seed)
    claims = [claim(f"claim{i}", primary=family > 1) for i in range(family)]
    counts: Counter[Verdict] = Counter()
    for row in generator.normal(effect, spread, (REPEATS, num_seeds)):
        sample = SeedSample(tuple(range(num_seeds)), tuple(map(float, row)))
        data = {item.name: sample for item in claims}
        counts[judge(claims, data)[0].verdict] += 1
    return {verdict: counts[verdict] / REPEATS for verdict in Verdict}


def false_share(found: dict[Verdict, float], effect: float) -> float:
    """Return how often a verdict was false, by side of the margin or direction."""
    inside = (
        Verdict.EQUIVALENT,
        Verdict.LARGER_WITHIN_MARGIN,
        Verdict.SMALLER_WITHIN_MARGIN,
    )
    wrong = {Verdict.SMALLER, Verdict.SMALLER_WITHIN_MARGIN}
    if effect == 0.0:
        wrong.add(Verdict.LARGER_WITHIN_MARGIN)
    wrong.update(inside if effect > 1.0 else (Verdict.LARGER,))
    return sum(found[verdict] for verdict in wrong)


def decided_rightly(found: dict[Verdict, float], effect: float) -> float:
    """Return how often the right side of the margin was decided."""
    right = [Verdict.LARGER]
    if effect < 1.0:
        right = [Verdict.EQUIVALENT, Verdict.LARGER_WITHIN_MARGIN]
    return sum(found[verdict] for verdict in right)


def table(family: int) -> str:
    """Return a table in Markdown: power and false verdicts by effect and seeds."""
    lines = ["| effect | one seed's deviation | " + " | ".join(map(str, SEEDS)) + " |"]
    lines.append("| --- " * (2 + len(SEEDS)) + "|")
    for effect in EFFECTS:
        for spread in SPREADS:
            cells = []
            for count in SEEDS:
                found = shares(effect, spread, count, family=family)
                right = 100 * decided_rightly(found, effect)
                false = 100 * false_share(found, effect)
                cells.append(f"{right:.0f} ({false:.1f})")
            lines.append(f"| {effect:g} | {spread:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for size in (1, 3):
        print(f"\n{size} claim(s) in the family\n\n{table(size)}")

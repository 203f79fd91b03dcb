"""Plain statistics to compare with, from SciPy and from definitions."""

import itertools
import math

import numpy as np
from scipy import stats
from scipy.special import ndtr


def paired_t_interval(treatment, reference, level):
    """SciPy's paired t-interval of the mean difference."""
    result = stats.ttest_rel(treatment, reference)
    interval = result.confidence_interval(level)
    return float(interval.low), float(interval.high)


def verdict_by_interval(differences, margin, num_tests):
    """The rule in words: where do SciPy's two t-intervals lie against 0 and margin?"""
    alpha = 0.05 / num_tests
    result = stats.ttest_1samp(differences, 0.0)
    wide = result.confidence_interval(1.0 - alpha)
    narrow = result.confidence_interval(1.0 - 2.0 * alpha)
    if wide.low > margin:
        return "larger"
    if wide.high < -margin:
        return "smaller"
    if narrow.low < -margin or narrow.high > margin:
        return "not resolved"
    if wide.low > 0.0:
        return "larger within the margin"
    if wide.high < 0.0:
        return "smaller within the margin"
    shown_is_wide = -margin < wide.low and wide.high < margin
    shown_includes_none = shown_is_wide or narrow.low <= 0.0 <= narrow.high
    return "equivalent" if shown_includes_none else "not resolved"


def kendall_by_pairs(x, y):
    """Kendall's tau-b from its definition, pair by pair."""
    agree = ties_x = ties_y = 0
    pairs = list(itertools.combinations(range(len(x)), 2))
    for i, j in pairs:
        agree += int(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]))
        ties_x += int(x[i] == x[j])
        ties_y += int(y[i] == y[j])
    return agree / math.sqrt((len(pairs) - ties_x) * (len(pairs) - ties_y))


def jackknife_stderr(x, y):
    """Delete-one jackknife standard error of atanh(tau-b), refitting each time."""
    n = len(x)
    values = []
    for i in range(n):
        tau = kendall_by_pairs(np.delete(x, i), np.delete(y, i))
        values.append(math.atanh(tau))
    values = np.array(values)
    return math.sqrt((n - 1) / n * np.sum((values - values.mean()) ** 2))


def max_flip_statistics(differences):
    """Largest mean curve difference under every assignment of signs."""
    n = len(differences)
    return sorted(
        float(np.max(np.abs(np.mean(np.array(signs)[:, None] * differences, axis=0))))
        for signs in itertools.product((1.0, -1.0), repeat=n)
    )


def weighted_two_way_mean(differences, seed_draws, image_draws):
    """Mean of a table after its rows and columns are drawn with replacement."""
    return float(np.mean(differences[np.ix_(seed_draws, image_draws)]))


def walks(seed, shape):
    """Curves whose noise is correlated along them, with mean zero."""
    generator = np.random.default_rng(seed)
    steps = generator.normal(size=shape)
    return 0.2 * np.cumsum(steps, axis=-1) + generator.normal(size=shape)


def answers(source, *, shape, seed_sd=0.3, hardness=(-2.2, -2.0)):
    """Right answers of two arms with hard images and lucky seeds, and the truth.

    Errors are 1.4 and 2.3 % unless ``hardness`` (as normal quantiles) says otherwise.
    """
    common = source.normal(0.0, 3.0, shape[1])
    tables, errors = [], []
    for mean in hardness:
        own = source.normal(0.0, 1.0, shape[1])
        luck = source.normal(0.0, seed_sd, (shape[0], 1))
        spread = math.sqrt(1.0 + 9.0 + 1.0 + seed_sd**2)
        chance = ndtr(mean * spread + common + own + luck)
        tables.append(source.random(shape) >= chance)
        errors.append(float(ndtr(mean)))
    return tables[0], tables[1], errors[0] - errors[1]

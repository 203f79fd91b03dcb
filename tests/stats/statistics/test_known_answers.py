"""Each statistic on runs whose answer follows from how they were made."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from noisekit.core.errors import UsageError
from noisekit.stats import (
    STATISTICS,
    BestDifference,
    CurveGap,
    Difference,
    Fit,
    Interaction,
    RangeWidth,
    Rank,
    Ratio,
    RunTables,
    SeedSample,
    Slope,
    Spread,
    SpreadRatio,
    TailMean,
    TimeTo,
    Value,
    arms_named,
    statistic_of,
    table_of,
)
from tests.stats.statistics.planted_runs import grid

SIZES = (8, 16, 32, 64)
RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
STEPS = np.arange(1.0, 101.0)


def numbers(sample: SeedSample) -> list[float]:
    return list(sample.treatment)


def pairs(sample: SeedSample) -> tuple[list[float], list[float]]:
    assert sample.reference is not None
    return list(sample.treatment), list(sample.reference)


def two_sizes() -> RunTables:
    return grid(
        {"batch_size": (8, 64)},
        lambda s, seed: {"test_error": 0.01 * s["batch_size"] + seed},
        seeds=3,
    )


@pytest.mark.parametrize("kind", [Difference, Ratio])
def test_two_groups_are_read_by_seed(kind: type[Difference]) -> None:
    """Catches: groups exchanged; another group's runs; pairing by position."""
    found = kind(
        quantity="test_error", treatment="batch_size=64", reference="batch_size=8"
    ).sample(two_sizes())
    above, below = pairs(found)
    assert above == pytest.approx([0.64, 1.64, 2.64])
    assert below == pytest.approx([0.08, 1.08, 2.08])


def test_a_value_is_one_group_against_a_number() -> None:
    """Catches: a reference made up where there is none."""
    statistic = Value(quantity="test_error", treatment="batch_size=64")
    found = statistic.sample(two_sizes())
    assert numbers(found) == pytest.approx([0.64, 1.64, 2.64])
    assert found.reference is None


def test_replicates_are_averaged_within_the_seed_first() -> None:
    """Two orders from one point: the mean of a difference, geometric for a ratio.

    Catches: replicates counted as seeds; an arithmetic mean under a ratio.
    """
    runs = grid(
        {"batch_size": (8, 64), "order": (1, 2)},
        lambda s, seed: {"lambda_max": s["batch_size"] * 4 ** s["order"]},
    )
    for kind, mean in ((Difference, (4 + 16) / 2), (Ratio, 8.0)):
        statistic = kind(
            quantity="lambda_max",
            treatment="batch_size=64",
            reference="batch_size=8",
            over="order",
        )
        above, below = pairs(statistic.sample(runs))
        assert above == pytest.approx([64 * mean] * 5)
        assert below == pytest.approx([8 * mean] * 5)
        assert replace(statistic, over="*").sample(runs) == statistic.sample(runs)


def test_a_group_of_several_runs_a_seed_is_refused() -> None:
    """Catches: the first of two runs taken, or their mean, without being asked."""
    runs = grid(
        {"batch_size": (8,), "order": (1, 2)}, lambda s, seed: {"test_error": 0.1}
    )
    with pytest.raises(UsageError, match="needs one run per seed, got group 'batch_s"):
        Value(quantity="test_error", treatment="batch_size=8").sample(runs)
    with pytest.raises(
        UsageError, match="got over='orders'; they have batch_size, order"
    ):
        Value(quantity="test_error", over="orders").sample(runs)
    with pytest.raises(UsageError, match="got 'batch_size=9', which none belongs to"):
        Value(quantity="test_error", treatment="batch_size=9").sample(runs)


def test_interaction_is_a_difference_of_differences() -> None:
    """0.3 for momentum 0.9 less 0.1 for momentum 0; as ratios 3 and 2.

    Catches: a sign; the conditions exchanged; a difference under the scale of ratios.
    """
    values = {(64, 0.9): 0.45, (8, 0.9): 0.15, (64, 0): 0.2, (8, 0): 0.1}
    runs = grid(
        {"batch_size": (8, 64), "momentum": (0, 0.9)},
        lambda s, seed: {"test_error": values[s["batch_size"], s["momentum"]]},
    )
    statistic = Interaction(
        quantity="test_error",
        treatment="batch_size=64/momentum=0.9",
        reference="batch_size=8/momentum=0.9",
        other_treatment="batch_size=64/momentum=0",
        other_reference="batch_size=8/momentum=0",
    )
    above, below = pairs(statistic.sample(runs))
    assert (above[0], below[0]) == pytest.approx((0.3, 0.1))
    above, below = pairs(statistic.sample(runs, scale="ratio"))
    assert (above[0], below[0]) == pytest.approx((3.0, 2.0))


def test_a_tail_is_the_last_share_of_the_run() -> None:
    """Values 1 to 100 at steps 1 to 100: the last quarter is 75 to 100.

    Catches: the first quarter; a share of the points where points are uneven; a run
    that diverged with a mean.
    """
    runs = grid(
        {"batch_size": (8,)},
        lambda s, seed: {},
        curve=lambda s, seed: {"step": STEPS, "train_loss": STEPS},
        diverged=lambda s, seed: seed == 4,
    )
    tail = TailMean(quantity="train_loss")
    assert numbers(tail.sample(runs))[:4] == [87.5] * 4
    assert math.isnan(numbers(tail.sample(runs))[4])
    assert numbers(replace(tail, reduce="max").sample(runs))[0] == 100.0
    uneven = np.array([1.0, 2.0, 3.0, 4.0, 80.0, 100.0])
    runs = grid(
        {"batch_size": (8,)},
        lambda s, seed: {},
        curve=lambda s, seed: {"step": uneven, "train_loss": uneven},
    )
    assert numbers(tail.sample(runs))[0] == 90.0


def test_curves_of_a_series_are_followed_by_their_own_steps() -> None:
    """Measured at steps 0, 10 and 20 of a run without snapshots of them.

    Catches: a series that is dropped, since its rows name no snapshot.
    """
    where = {"run_id": "a", "arm": "a", "seed": 0}
    measured = pd.DataFrame(
        {"step": [0, 10, 20], "value": [1.0, 2.0, 6.0], "snapshot": None, **where}
    ).assign(quantity="lambda_max", variant="")
    runs = RunTables(
        pd.DataFrame([where]),
        pd.DataFrame([{**where, "snapshot": "final", "step": 20}]),
        measured,
        pd.DataFrame({"step": [0, 20], "epoch": [0.0, 2.0], **where}),
    )
    tail = TailMean(quantity="lambda_max", tail=0.5)
    assert numbers(tail.sample(runs)) == [4.0]
    slope = Slope(quantity="lambda_max", over="time", x="epoch", stop=0.5)
    assert numbers(slope.sample(runs)) == pytest.approx([1.0])


def test_slope_over_a_factor() -> None:
    """Catches: log2 for the natural one in one axis; the factor of another arm."""
    runs = grid(
        {"batch_size": SIZES}, lambda s, seed: {"lambda_max": s["batch_size"] ** -0.5}
    )
    log = Slope(quantity="lambda_max", over="batch_size", log=True)
    assert numbers(log.sample(runs)) == pytest.approx([-0.5] * 5)
    runs = grid(
        {"batch_size": SIZES}, lambda s, seed: {"test_error": 3 * s["batch_size"]}
    )
    plain = Slope(quantity="test_error", over="batch_size")
    assert numbers(plain.sample(runs)) == pytest.approx([3.0] * 5)


def test_slope_over_a_ratio_of_factors() -> None:
    """Catches: the ratio upside down; the first factor alone."""
    runs = grid(
        {"learning_rate": RATES, "batch_size": SIZES},
        lambda s, seed: {"lambda_max": (s["learning_rate"] / s["batch_size"]) ** -1.5},
    )
    slope = Slope(quantity="lambda_max", over="learning_rate/batch_size", log=True)
    assert numbers(slope.sample(runs)) == pytest.approx([-1.5] * 5)


def test_an_update_s_variance_is_linear_without_replacement() -> None:
    """Var of an update at fixed rate per example is ``m (1 - m/N)``: slope below 1.

    Of m = 2 to 512 and N = 4,096 it is 0.981, and 1 once corrected.

    Catches: a correction by (N - m)/(N - 1), or by m/N.
    """
    sizes = tuple(2**k for k in range(1, 10))
    runs = grid(
        {"batch_size": sizes},
        lambda s, seed: {"lambda_max": s["batch_size"] * (1 - s["batch_size"] / 4096)},
    )
    slope = Slope(quantity="lambda_max", over="batch_size", log=True)
    m = np.array(sizes)
    fitted = np.polyfit(np.log(m), np.log(m * (1 - m / 4096)), 1)[0]
    assert numbers(slope.sample(runs))[0] == pytest.approx(fitted)
    assert fitted < 0.99
    corrected = replace(slope, population=4096)
    assert numbers(corrected.sample(runs))[0] == pytest.approx(1.0, abs=1e-12)


def test_slope_along_a_run() -> None:
    """Catches: the start, whose logarithm does not exist, taken for a gap."""
    steps = np.arange(0.0, 100.0)
    runs = grid(
        {"batch_size": (8,)},
        lambda s, seed: {},
        curve=lambda s, seed: {"step": steps, "distance_from_start": 3 * steps**0.25},
    )
    slope = Slope(quantity="distance_from_start", over="time", log=True)
    assert numbers(slope.sample(runs)) == pytest.approx([0.25] * 5)
    late = replace(slope, log=False, start=0.5, stop=1.0)
    chord = 3 * np.polyfit(steps[50:], steps[50:] ** 0.25, 1)[0]
    assert numbers(late.sample(runs))[0] == pytest.approx(chord, rel=1e-2)


def test_a_run_without_a_value_leaves_its_seed_without_a_slope() -> None:
    """Catches: a slope over the arms that survived, as if it were that of all."""
    runs = grid(
        {"batch_size": SIZES},
        lambda s, seed: {"lambda_max": s["batch_size"]},
        diverged=lambda s, seed: s["batch_size"] == 64 and seed == 1,
    )
    found = numbers(Slope(quantity="lambda_max", over="batch_size").sample(runs))
    assert [math.isnan(value) for value in found] == [False, True, False, False, False]


def test_range_is_counted_in_octaves_around_the_best() -> None:
    """Best at 0.2; 0.1 to 0.4 lie within 0.02 of it, so two octaves.

    Catches: levels counted instead of octaves; a level beyond a gap; an end that is
    the grid's own.
    """
    errors = {0.05: 0.10, 0.1: 0.05, 0.2: 0.04, 0.4: 0.055, 0.8: 0.10}
    runs = grid(
        {"learning_rate": RATES},
        lambda s, seed: {"test_error": errors[s["learning_rate"]]},
    )
    width = RangeWidth(quantity="test_error", within=0.02)
    found = width.sample(runs)
    assert numbers(found) == pytest.approx([2.0] * 5)
    assert found.not_comparable is None
    top = replace(width, end="top").sample(runs)
    assert numbers(top) == pytest.approx([math.log2(0.4)] * 5)
    wide = replace(width, within=0.2).sample(runs)
    assert "reaches an end of the grid (0.05 to 0.8)" in str(wide.not_comparable)


def test_a_range_s_top_falls_by_an_octave_for_each_of_batch_size() -> None:
    """The best rate halves as the batch doubles, and so does the range's top.

    Catches: natural logarithms in one axis; the slope of all runs at once.
    """
    runs = grid(
        {"learning_rate": tuple(2.0**-k for k in range(12)), "batch_size": SIZES},
        lambda s, seed: {
            "test_error": abs(math.log2(s["learning_rate"] * s["batch_size"]))
        },
    )
    statistic = RangeWidth(
        quantity="test_error", within=1.5, end="top", against="batch_size"
    )
    assert numbers(statistic.sample(runs)) == pytest.approx([-1.0] * 5)
    width = replace(statistic, end="width")
    assert numbers(width.sample(runs)) == pytest.approx([0.0] * 5)


def best_runs(validation: dict[float, float], luck: float = 0.0) -> RunTables:
    """Return runs at two batch sizes; at 64 the seed's own luck moves validation."""
    return grid(
        {"learning_rate": RATES, "batch_size": (8, 64)},
        lambda s, seed: {
            "validation_error": validation[s["learning_rate"]]
            - luck * (s["learning_rate"] == RATES[1 + seed % 3]),
            "test_error": s["learning_rate"] + s["batch_size"] / 1000 + seed / 100,
        },
    )


INSIDE = {0.05: 0.3, 0.1: 0.2, 0.2: 0.1, 0.4: 0.2, 0.8: 0.3}


def test_the_best_level_is_chosen_on_validation_and_compared_on_test() -> None:
    """Catches: the rate that is best on test data, 0.05 here."""
    statistic = BestDifference(
        quantity="test_error", treatment="batch_size=64", reference="batch_size=8"
    )
    found = statistic.sample(best_runs(INSIDE))
    above, below = pairs(found)
    assert above == pytest.approx([0.264 + seed / 100 for seed in range(5)])
    assert below == pytest.approx([0.208 + seed / 100 for seed in range(5)])
    assert found.not_comparable is None
    assert found.note.startswith("learning rate 0.2 chosen for batch_size=64")


def test_a_seed_s_own_luck_does_not_choose_its_level() -> None:
    """Catches: a level chosen by the very seed that is then compared."""
    statistic = BestDifference(
        quantity="test_error", treatment="batch_size=64", reference="batch_size=8"
    )
    lucky = statistic.sample(best_runs(INSIDE, luck=0.15))
    assert lucky.treatment == statistic.sample(best_runs(INSIDE)).treatment


def test_a_best_level_at_an_end_of_the_grid_is_not_comparable() -> None:
    """Catches: a rate tuned over a grid that is too short."""
    at_end = {rate: 1 - rate for rate in RATES}
    found = BestDifference(
        quantity="test_error", treatment="batch_size=64", reference="batch_size=8"
    ).sample(best_runs(at_end))
    assert found.not_comparable == (
        "the best learning rate, 0.8, is at an end of the grid (0.05 to 0.8), so a "
        "better one may lie beyond"
    )


def test_no_level_is_chosen_on_test_data() -> None:
    """Catches: selection on the data that are judged."""
    statistic = BestDifference(
        quantity="test_error", select="test_loss", treatment="a", reference="b"
    )
    assert "chosen on test data is no fair comparison" in statistic.fault()


def test_spread_is_the_deviation_over_levels() -> None:
    """Catches: n for n - 1; a diverged run left out, which makes a spread small."""
    runs = grid(
        {"learning_rate": RATES[:3]},
        lambda s, seed: {"test_error": s["learning_rate"]},
        diverged=lambda s, seed: seed == 1 and s["learning_rate"] == 0.2,
    )
    spread = Spread(quantity="test_error")
    found = numbers(spread.sample(runs))
    assert found[0] == pytest.approx(np.std([0.05, 0.1, 0.2], ddof=1))
    assert math.isnan(found[1])
    counted = numbers(replace(spread, diverged=0.9).sample(runs))
    assert counted[1] == pytest.approx(np.std([0.05, 0.1, 0.9], ddof=1))
    logs = numbers(replace(spread, log=True).sample(runs))
    assert logs[0] == pytest.approx(math.log(2))


def test_spreads_are_compared_as_a_ratio() -> None:
    """Catches: a difference of spreads; the reference's spread on top."""
    runs = grid(
        {"learning_rate": RATES, "batch_size": (8, 64)},
        lambda s, seed: {"test_error": s["learning_rate"] * s["batch_size"]},
    )
    statistic = SpreadRatio(
        quantity="test_error", treatment="batch_size=64", reference="batch_size=8"
    )
    above, below = pairs(statistic.sample(runs))
    assert np.divide(above, below) == pytest.approx([8.0] * 5)


def decaying(settings: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Return a loss of 1/step times the batch size, in units of ten steps."""
    return {
        "step": STEPS,
        "epoch": STEPS / 10,
        "train_loss": settings["batch_size"] / STEPS,
    }


def test_time_to_a_loss_is_counted_to_its_first_sustained_crossing() -> None:
    """8/step is at or below 0.5 from step 16 on.

    Catches: interpolation; a strict inequality; a crossing counted before it held.
    """
    runs = grid({"batch_size": (8,)}, lambda s, seed: {}, curve=decaying)
    time = TimeTo(quantity="train_loss", below=0.5)
    assert numbers(time.sample(runs)) == [16.0] * 5
    assert numbers(replace(time, x="epoch").sample(runs)) == pytest.approx([1.6] * 5)
    assert numbers(replace(time, sustain=3).sample(runs)) == [18.0] * 5
    never = replace(time, below=0.01).sample(runs)
    assert all(map(math.isnan, numbers(never)))
    assert never.note == "5 of 5 runs never got there"


def test_the_shortest_time_over_a_grid_is_not_taken_from_its_end() -> None:
    """Catches: a critical batch size from rates that stop at the best one."""

    def curve(settings: dict[str, float], seed: int) -> dict[str, np.ndarray]:
        best = abs(math.log2(settings["learning_rate"] / 0.2)) + 1
        return {"step": STEPS, "train_loss": 8 * best / STEPS}

    runs = grid({"learning_rate": RATES}, lambda s, seed: {}, curve=curve)
    time = TimeTo(quantity="train_loss", below=0.5, best_over="learning_rate")
    assert numbers(time.sample(runs)) == [16.0] * 5
    assert time.sample(runs).not_comparable is None
    short = grid({"learning_rate": RATES[:3]}, lambda s, seed: {}, curve=curve)
    assert "at an end of the grid" in str(time.sample(short).not_comparable)


def test_largest_gap_of_curves_is_found_with_its_place() -> None:
    """A bump of 0.4 in logarithms at epoch 5 between curves that agree elsewhere.

    Catches: the gap at the end; a difference for a ratio; a place in another unit.
    """
    generator = np.random.default_rng(0)

    def curve(settings: dict[str, float], seed: int) -> dict[str, np.ndarray]:
        epochs = np.linspace(0, 10, 51)
        bump = 0.4 * np.exp(-((epochs - 5.0) ** 2)) * (settings["batch_size"] == 64)
        noise = generator.normal(0.0, 0.01, 51)
        return {"epoch": epochs, "train_loss": np.exp(bump - epochs / 10 + noise)}

    runs = grid({"batch_size": (8, 64)}, lambda s, seed: {}, curve=curve, seeds=8)
    statistic = CurveGap(
        quantity="train_loss", treatment="batch_size=64", reference="batch_size=8"
    )
    found = statistic.sample(runs, scale="ratio")
    assert found.band is not None
    assert found.band.effect == pytest.approx(math.exp(0.4), rel=0.02)
    assert found.band.interval().contains(math.exp(0.4))
    assert found.band.p_value == 2 / 2**8
    place = float(found.note.removeprefix("largest at epoch "))
    assert place == pytest.approx(5.0, abs=0.4)
    mean = np.mean(np.log(found.treatment) - np.log(found.reference))
    assert math.exp(mean) == pytest.approx(found.band.effect)


def test_exponent_of_a_power_law() -> None:
    """Catches: base of logarithms in one axis alone."""
    runs = grid(
        {"batch_size": SIZES}, lambda s, seed: {"step": 7 * s["batch_size"] ** -0.7}
    )
    fit = Fit(quantity="step", model="power")
    assert numbers(fit.sample(runs)) == pytest.approx([-0.7] * 5)


def hyperbola(settings: dict[str, float], seed: int) -> dict[str, float]:
    """Return steps of critical batch size 20 + seed at the best rate, 0.2."""
    rate = abs(math.log2(settings["learning_rate"] / 0.2)) + 1
    steps = 100 * (1 + (20 + seed) / settings["batch_size"])
    return {"step": rate * steps, "simple_noise_scale": 10.0}


def test_critical_batch_size_is_that_of_the_hyperbola() -> None:
    """Catches: a fit of all rates; prediction and measurement exchanged."""
    runs = grid({"learning_rate": RATES, "batch_size": SIZES}, hyperbola)
    fit = Fit(quantity="step", model="hyperbola", best_over="learning_rate")
    found = fit.sample(runs)
    assert numbers(found) == pytest.approx([20, 21, 22, 23, 24], rel=1e-6)
    assert found.not_comparable is None
    over = replace(fit, predicted="simple_noise_scale").sample(runs)
    assert numbers(over) == pytest.approx([2, 2.1, 2.2, 2.3, 2.4], rel=1e-6)
    flat = grid({"batch_size": SIZES}, lambda s, seed: {"step": 100.0})
    alone = replace(fit, best_over="")
    assert all(map(math.isnan, numbers(alone.sample(flat))))


def test_ranks_are_those_of_each_seed() -> None:
    """Catches: all seeds' runs ranked at once, where a seed's level decides."""
    runs = grid(
        {"batch_size": SIZES},
        lambda s, seed: {
            "lambda_max": s["batch_size"] - 1000 * seed,
            "test_error": s["batch_size"] + 1000 * seed,
        },
    )
    assert numbers(Rank(quantity="lambda_max").sample(runs)) == [1.0] * 5


def test_granulated_rank_moves_one_factor_at_a_time() -> None:
    """Sharpness falls with the rate as error does, and rises with depth against it.

    Along the rate tau is 1, along depth -1: granulated 0, over all runs otherwise.

    Catches: a factor that moves both taken for the measure's own merit.
    """
    runs = grid(
        {"learning_rate": (1, 2, 3), "depth": (1, 2)},
        lambda s, seed: {
            "lambda_max": -s["learning_rate"] + 0.1 * s["depth"],
            "test_error": -s["learning_rate"] - 0.1 * s["depth"],
        },
    )
    rank = Rank(quantity="lambda_max", over="learning_rate, depth")
    assert numbers(rank.sample(runs)) == pytest.approx([0.0] * 5)
    plain = numbers(replace(rank, over="").sample(runs))
    assert plain == pytest.approx([9 / 15] * 5)


@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic_comes_back_from_its_table(name: str) -> None:
    """Catches: a setting that a recipe cannot state, or that is lost on the way."""
    needed = {
        "slope": {"over": "batch_size"},
        "range_width": {"within": 0.1},
        "time_to": {"below": 0.5},
        "fit": {"model": "power"},
        "interaction": {"other_treatment": "c", "other_reference": "d"},
    }
    groups = {"treatment": "a", "reference": "b"}
    table = {"name": name, "quantity": "test_error", **groups, **needed.get(name, {})}
    statistic = statistic_of(table)
    assert statistic.name == name
    assert statistic_of(table_of(statistic)) == statistic
    assert not statistic.fault()
    assert statistic.quantities[0] == "test_error"
    words = statistic.words()
    assert not words or words[0] not in " ,."


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "slop"}, "name needs to be one of difference, ratio"),
        ({}, "name needs to be one of .* got null"),
        ({"name": "value"}, "quantity is missing, which 'value' needs"),
        (
            {"name": "value", "quantity": "test_error", "tial": 1},
            "tial is no setting of 'value', which has quantity, treatment",
        ),
        (
            {"name": "tail_mean", "quantity": "test_error", "tail": 2.0},
            "tail needs to be between 0 and 1, got 2.0",
        ),
        (
            {"name": "fit", "quantity": "step", "model": "line"},
            "model needs to be 'power' or 'hyperbola', got 'line'",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(table, message: str) -> None:
    """Catches: a misspelt setting at its default."""
    with pytest.raises(UsageError, match=message):
        statistic_of(table)


def test_groups_are_named_by_factors_of_arms_with_other_names() -> None:
    """Catches: a factor that counts only where it is part of an arm's name."""
    arms = {
        "small": {"batch_size": 16, "hidden": [64, 64]},
        "large": {"batch_size": 128, "hidden": [64]},
        "plain/batch_size=16": {"batch_size": 16, "hidden": [64]},
    }
    assert arms_named("batch_size=16", arms) == ("small", "plain/batch_size=16")
    assert arms_named("batch_size=16.0", arms) == ("small", "plain/batch_size=16")
    assert arms_named("plain/batch_size=16", arms) == ("plain/batch_size=16",)
    assert arms_named("hidden=[64,64]", arms) == ("small",)
    assert arms_named("plain/batch_size=128", arms) == ()

"""What ``--dry-run`` says."""

from pathlib import Path

import pytest

from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.probe_spec import ProbeSpec
from noisekit.train.sweeps import cost
from noisekit.train.sweeps.cost import duration, estimate_cost

TINY = Path(__file__).parents[1] / "tiny.toml"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for a hundredth of a second; counts do not depend on it."""
    monkeypatch.setattr(cost, "_TIMING_SECONDS", 0.01)


def test_counts_add_up_over_arms_and_seeds() -> None:
    """Counts are those of a calculation by hand.

    Catches: one arm's batch size taken for all; seeds left out.
    """
    recipe = load_recipe(
        TINY,
        overrides={
            "arms": '[{name="a"}, {name="b", set={"training.batch_size"=16}}]',
            "measure.everywhere": '["grad_norm"]',
            "measure.at": '{final=["hessian_trace", "lambda_max"]}',
            "measure.settings.hessian_trace.num_matvecs": "5",
            "measure.settings.lambda_max.max_matvecs": "7",
        },
    )
    found = estimate_cost(recipe)
    assert (found.num_runs, found.updates, found.workers) == (4, 48, 1)
    assert found.gradient_evaluations == 2 * 12 * (8 + 16)
    assert found.hessian_products == 4 * (2 * 1 + 5 + 7)
    assert 0 < found.seconds < 60
    assert found.disk_bytes > 4 * 2 * 4 * (20 * 4 + 4 + 4 * 4 + 4)


def test_readings_cost_what_their_estimators_do() -> None:
    """Ghost batches cost a whole update, rows their share, each extra sign a backward.

    Catches: every estimator priced as one; the second of two forgotten; rows of a
    table that do not grow with the estimators.
    """
    probes = [
        {"estimator": "rows", "row_share": 0.125},
        {"estimator": ["per_example", "random_signs"], "num_signs": 3},
        {"estimator": ["ghost", "accumulation"], "ghost_batch": 2},
    ]
    found = [cost._reading_updates(ProbeSpec.model_validate(probe)) for probe in probes]
    assert found == pytest.approx([0.125, 3.0, 1.1])
    plain, beside = (
        estimate_cost(
            load_recipe(TINY, overrides={"probe.every": "3", "probe.estimator": names})
        )
        for names in ('"auto"', '["auto", "rows", "chunks"]')
    )
    assert beside.disk_bytes - plain.disk_bytes == 4 * (12 // 3) * 2 * 56


def test_workers_share_the_time() -> None:
    """Four runs in two processes take half as long, and five take no less.

    Catches: time that does not depend on the workers; more workers than runs.
    """
    recipe = load_recipe(TINY)
    assert estimate_cost(recipe, workers=9).workers == 4
    assert estimate_cost(recipe, workers=0).workers == 1


def test_rows_are_words() -> None:
    """Each row can be printed as it is, and says what is a bound and what a guess."""
    rows = dict(estimate_cost(load_recipe(TINY)).rows())
    assert rows["runs"] == "4, 1 at the same time"
    assert rows["updates"] == "at most 48"
    assert rows["time"].startswith("about ")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.4, "4 s"), (89, "89 s"), (200, "3 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_duration_is_in_a_unit_that_fits(seconds: float, words: str) -> None:
    """Seconds, minutes or hours."""
    assert duration(seconds) == words

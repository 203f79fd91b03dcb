"""What the report makes of seeds per arm, splits per seed, and networks on record."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from noisekit.records import RunDirectory, Runs, open_runs
from noisekit.report import fair_test_rules, setting_words
from noisekit.report.comparability import correct_answers, sample_of, spread_of
from noisekit.report.recipe_view import normalising_batches
from tests.report.samples import ERROR, SHARPNESS, make_runs


def test_spread_is_over_pairs_and_on_the_claims_scale(tmp_path: Path) -> None:
    """Catches: the spread of an arm, or of ratios without their logarithm."""
    runs = make_runs(tmp_path)
    logs = [math.log(128 / 16), math.log(129 / 17)]
    assert spread_of(runs, SHARPNESS) == pytest.approx(
        abs(logs[0] - logs[1]) / math.sqrt(2)
    )
    one = make_runs(tmp_path / "one", seeds={"small": [0], "large": [0]})
    assert spread_of(one, ERROR) is None


def test_pairs_are_planned_where_both_arms_are(tmp_path: Path) -> None:
    """A run that is lost stays a missing pair; a seed of one arm alone is none.

    Catches: a trunk with fewer seeds whose claims miss pairs that nobody planned.
    """
    recipe = {
        "seeds": {"first": 0, "count": 3},
        "arms": [
            {"name": "small", "seeds": {"first": 0, "count": 2}},
            {"name": "large"},
        ],
    }
    seeds = {"small": [0], "large": [0, 1, 2]}
    runs = make_runs(tmp_path, seeds=seeds, recipe=recipe)
    sample = sample_of(runs, SHARPNESS)
    assert sample.seeds == (0, 1)
    assert sample.reference is not None
    assert sample.reference[0] == 16.0
    assert math.isnan(sample.reference[1])
    unknown = make_runs(tmp_path / "unknown", seeds=seeds)
    assert sample_of(unknown, SHARPNESS).seeds == (0, 1, 2)


def test_seeds_beside_the_plan_break_a_rule(tmp_path: Path) -> None:
    """Catches: seeds that were added after a look, shown as if they were planned."""

    def found(folder: str, **seeds: int) -> list[str]:
        runs = make_runs(tmp_path / folder, recipe={"seeds": seeds})
        return [
            rule.detail
            for rule in fair_test_rules(runs, (SHARPNESS,))
            if rule.name == "As many seeds as were planned" and not rule.met
        ]

    [more] = found("more", first=0, count=2, planned=1)
    assert more == (
        "1 planned, 2 seeds run (2 were asked for); seeds that are added once results "
        "are known make intervals too narrow"
    )
    [fewer] = found("fewer", first=0, count=2, planned=9)
    assert "too narrow" not in fewer
    assert found("as planned", first=0, count=2) == []


@pytest.mark.parametrize("split", ["shared", "own"])
def test_images_of_different_splits_are_not_crossed(split: str, tmp_path: Path) -> None:
    """With a split per seed the fifth image is another one at each seed.

    Catches: an error over images that pairs unrelated images; a page that says that
    there is one split.
    """
    recipe = {
        "seeds": {"first": 0, "count": 2, "split": split},
        "data": {"name": "digits"},
    }
    runs = make_runs(tmp_path, recipe=recipe)
    runs.__dict__["examples"] = pd.DataFrame(
        {"arm": arm, "seed": seed, "snapshot": "equal_epochs", "split": "test"}
        | {"example": image, "correct": (seed + image) % 2 == 0}
        for arm in ("small", "large")
        for seed in (0, 1)
        for image in (0, 1)
    )
    assert (correct_answers(runs, ERROR) is None) == (split == "own")
    words = "a split per seed" if split == "own" else "one split"
    assert words in setting_words(runs)


def built_with(folder: Path, layers: int | None) -> Runs:
    make_runs(folder, recipe={"model": {"name": "resnet8"}})
    for directory in (folder / "runs").iterdir():
        run = RunDirectory.open(directory)
        network = {} if layers is None else {"num_params": 9, "batch_norms": layers}
        with run.lock():
            run.write_manifest(replace(run.manifest, network=network))
    return open_runs(folder)


def test_batch_norm_is_recognised_by_the_network_that_was_built(
    tmp_path: Path,
) -> None:
    """Whatever a network is called, and whoever wrote it, it is on record as built.

    Catches: a ResNet that slips past a list of names.
    """
    arms = ("small", "large")
    unknown = normalising_batches(built_with(tmp_path / "unknown", None))
    assert unknown == dict.fromkeys(arms)
    without = normalising_batches(built_with(tmp_path / "without", 0))
    assert without == dict.fromkeys(arms, 0.0)
    within = normalising_batches(built_with(tmp_path / "within", 3))
    assert within == {"small": 16, "large": 128}

"""The papers' experiments as recipes: each parses, with the published updates."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.parsing import parse_sections
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSections, RunSpec
from noisekit.train.recipes.timeline import Change, timeline

PAPERS = Path(__file__).parents[1] / "papers"
NAMES = sorted(path.stem for path in PAPERS.glob("*.toml"))


@cache
def recipe(name: str) -> Recipe:
    return load_recipe(PAPERS / f"{name}.toml")


def run(name: str, arm: str) -> RunSpec:
    return next(spec for spec in recipe(name).run_specs() if spec.arm == arm)


def rows(name: str, arm: str) -> list[Change]:
    return timeline(run(name, arm))


@pytest.mark.parametrize("name", NAMES)
def test_each_experiment_can_be_stated(name: str) -> None:
    """Without a fault, and the same when it is read from its record.

    Catches: a concept that the schema lost; a section that its own JSON is not.
    """
    made = recipe(name)
    assert Recipe.from_json(made.to_json()) == made
    for spec in made.run_specs()[: len(made.arms)]:
        assert RunSpec.from_json(spec.to_json()) == spec
        assert timeline(spec)


def test_there_is_a_recipe_per_experiment() -> None:
    """Catches: a folder that is not found, so that nothing is tested."""
    assert len(NAMES) == 17


@pytest.mark.parametrize(
    ("name", "arm", "update"),
    [
        ("adabatch", "adaptive", 15_080),
        ("adabatch", "small", 39_000),
        ("grow_not_decay", "decay", 78_200),
        ("grow_not_decay", "hybrid", 34_520),
        ("grow_not_decay", "grow", 29_000),
        ("grow_not_decay", "grow_fast", 6_500),
        ("grow_not_decay", "grow_fastest", 2_360),
        ("train_longer", "small", 7_680),
        ("train_longer", "rate_ghost", 240),
        ("train_longer", "rate_ghost_updates", 7_680),
        ("linear_scaling", "large", 14_040),
        ("rate_to_batch", "cycled_batch", 6_000),
        ("rate_to_batch", "cycled_rate", 9_600),
        ("full_batch", "full", 1_920),
    ],
)
def test_runs_take_the_published_updates(name: str, arm: str, update: int) -> None:
    """Catches: an arm whose settings do not reach the clock."""
    assert rows(name, arm)[-1].update == update


def test_changes_come_where_the_papers_have_them() -> None:
    """Catches: a change an update or an epoch off; a rate of another rule."""
    adabatch = rows("adabatch", "adaptive")[:-1]
    assert [(row.update, row.batch_size) for row in adabatch] == [
        (0, 128),
        (7_800, 256),
        (11_700, 512),
        (13_640, 1024),
        (14_600, 2048),
    ]
    wanted = [0.1, 0.075, 0.05625, 0.0421875, 0.031640625]
    assert [row.learning_rate for row in adabatch] == pytest.approx(wanted)
    warm = timeline(run("adabatch", "large_warmed_up"), each_epoch=True)
    assert [row.learning_rate for row in warm[:6]] == pytest.approx(
        [0.1, 0.4, 0.7, 1.0, 1.3, 1.6]
    )
    switched = rows("switching", "large_then_small")
    assert [(r.update, r.batch_size) for r in switched] == [
        (0, 1024),
        (120, 64),
        (2_040, 64),
    ]
    momenta = [row.momentum for row in rows("stochastic_edge", "more_momentum")]
    assert momenta == [0.9, 0.95, 0.95]
    control = rows("kicks", "as_many_small_epochs_at_the_start")
    assert [(r.update, r.batch_size) for r in control[:2]] == [(0, 32), (2_560, 512)]


def test_seeds_draw_splits_of_their_own_where_asked() -> None:
    """Arms of one seed share it. Catches: one split for all; one per arm."""
    own = recipe("norm_batch").run_specs()
    splits = {(spec.seed, spec.data.split_seed) for spec in own}
    assert len(splits) == len({split for _, split in splits}) == 5
    shared = recipe("kicks").run_specs()
    assert len({spec.data.split_seed for spec in shared}) == 1


@pytest.mark.parametrize("number", range(5))
def test_sections_of_the_documentation_parse(number: int) -> None:
    """Catches: a key that the page still has and the schema not."""
    page = Path(__file__).parents[3] / "docs" / "experiments.md"
    blocks = re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.DOTALL | re.M)
    sections = tomllib.loads(blocks[number])
    assert sections.keys() <= RunSections.model_fields.keys()
    base = run("kicks", "constant").model_dump(mode="json")
    faults = parse_sections({**base, **sections}).faults
    assert [str(fault) for fault in faults] == []

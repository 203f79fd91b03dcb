"""Arms that start from other arms, arms of grids, and seeds of their own."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from noisekit.core.errors import RecipeError
from noisekit.stats import arms_named
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.recipe import Recipe

FORKS = Path(__file__).parents[1] / "forks.toml"


def changed(tmp_path: Path, **parts: Any) -> Path:
    """Write the recipe of forks with some top-level keys replaced."""
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps({**tomllib.loads(FORKS.read_text()), **parts}))
    return path


def faults_of(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def arm(name: str, origin: str = "", snapshot: str = "final", **rest: Any) -> Any:
    start = {"start.arm": origin, "start.snapshot": snapshot} if origin else {}
    return {"name": name, "set": start | rest.pop("set", {}), **rest}


def test_an_arm_grid_names_arms_by_their_factors() -> None:
    """Every combination, in order, with the arm's own settings below the grid's.

    Catches: a grid that loses the settings of its arm; factors that the records lack.
    """
    recipe = load_recipe(FORKS)
    names = [arm.name for arm in recipe.arms]
    assert names[:3] == [
        "trunk",
        "fork/snapshot=mid/order=1/batch_size=4",
        "fork/snapshot=mid/order=1/batch_size=16",
    ]
    assert len(names) == 10
    specs = {spec.run_id: spec for spec in recipe.run_specs()}
    fork = specs["fork.snapshot-late.order-2.batch_size-16-seed1"]
    assert fork.start is not None
    assert (fork.start.arm, fork.start.snapshot, fork.start.order) == (
        "trunk",
        "late",
        2,
    )
    assert fork.factors == {
        "start.arm": "trunk",
        "optimizer": "keep",
        "snapshot": "late",
        "order": 2,
        "batch_size": 16,
    }
    assert specs["trunk-seed0"].kept_optimizers == ("mid", "late")
    assert fork.kept_optimizers == ()


def test_a_recipe_of_forks_is_the_same_once_recorded() -> None:
    """Catches: seeds or starts that are resolved anew, differently, when read back."""
    recipe = load_recipe(FORKS)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.run_specs() == recipe.run_specs()


def test_runs_without_a_start_are_described_as_before() -> None:
    """Catches: another fingerprint, which refuses the checkpoints of older runs."""
    spec = next(iter(load_recipe(FORKS.with_name("tiny.toml")).run_specs()))
    content = json.loads(spec.to_json())
    assert content.keys().isdisjoint({"start", "kept_optimizers"})


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (1e6, "1e06"),
        (0.05, "0.05"),
        ([64, 32], "64x32"),
        ({"epochs": 2.0}, "epochs-2"),
        (True, "true"),
    ],
)
def test_names_of_values_are_safe(value: Any, word: str) -> None:
    """Catches: a plus or a brace in the name of a directory."""
    from noisekit.train.recipes.tables import with_grid

    arms, faults = with_grid({"name": "a", "grid": {"x.y": [value]}}, key="grid")
    assert not faults
    assert arms == [{"name": f"a/y={word}", "set": {"x.y": value}}]


def test_a_group_is_named_by_parts_of_names() -> None:
    """Catches: a group that depends on the order of factors; prefixes as parts."""
    arms = ["b=1", "fork/k=1/b=16", "fork/k=2/b=16", "fork/k=2/b=1"]
    assert arms_named("fork/b=16", arms) == ("fork/k=1/b=16", "fork/k=2/b=16")
    assert arms_named("b=16/k=1", arms) == ("fork/k=1/b=16",)
    assert arms_named("b=1", arms) == ("b=1",)
    assert arms_named("fork/b=1", arms) == ("fork/k=2/b=1",)
    assert arms_named("for", arms) == ()


def test_a_contrast_of_a_group_is_checked_in_each_of_its_arms(tmp_path: Path) -> None:
    """Catches: a quantity that only some arms of a group measure."""
    contrast = tomllib.loads(FORKS.read_text())["contrasts"][0]
    path = changed(tmp_path, contrasts=[{**contrast, "treatment": "fork/batch_size=8"}])
    assert "contrasts.batch.treatment: needs an arm" in faults_of(path)
    path = changed(tmp_path, contrasts=[{**contrast, "quantity": "lambda_max"}])
    assert "'lambda_max' is not measured at 'final'" in faults_of(path)
    path = changed(tmp_path, contrasts=[{**contrast, "quantity": "distance_from_fork"}])
    assert load_recipe(path)
    path = changed(
        tmp_path,
        contrasts=[
            {**contrast, "quantity": "distance_from_fork", "reference": "trunk"}
        ],
    )
    assert "'distance_from_fork' is not measured" in faults_of(path)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (
            [arm("trunk"), arm("fork", "trunc")],
            "arms.fork.start.arm: needs an arm, one of 'trunk', 'fork', got 'trunc'; "
            "did you mean 'trunk'?",
        ),
        (
            [arm("trunk"), arm("fork", "trunk", "midd")],
            "arms.fork.start.snapshot: needs a snapshot of arm 'trunk', one of "
            "'start', 'mid', 'late', 'final', got 'midd'; did you mean 'mid'?",
        ),
        (
            [arm("a", "b"), arm("b", "c"), arm("c", "a")],
            "arms.b.start.arm: 'b' starts from 'c', which starts from 'a', which "
            "starts from 'b': a cycle",
        ),
        ([arm("a", "a")], "arms.a.start.arm: 'a' starts from 'a': a cycle"),
        (
            [arm("trunk"), arm("fork", "trunk", set={"model.hidden": [5]})],
            "arms.fork.start.arm: needs an arm with the same [model], whose weights "
            "fit; 'trunk' has another",
        ),
        (
            [
                arm("trunk", set={"optimizer": {"name": "adam", "learning_rate": 0.1}}),
                arm("fork", "trunk", set={"start.optimizer": "keep"}),
            ],
            "arms.fork.start.optimizer: 'keep' needs the optimizer of arm 'trunk', "
            "'adam', got 'sgd'; use 'reset'",
        ),
        (
            [
                arm("trunk", seeds={"count": 1}),
                arm("fork", "trunk", seeds={"count": 2}),
            ],
            "arms.fork.seeds: needs seeds of arm 'trunk', from whose runs it starts "
            "(0 to 0), got 1 as well; give 'trunk' more, or this arm fewer",
        ),
        (
            [arm("trunk"), arm("fork", set={"start.arm": "trunk"})],
            "arms.fork.set.start.snapshot: is missing and has no default",
        ),
        (
            [arm("a/b=1"), arm("a.b-1")],
            "arms: needs names that differ in more than '/' and '=', got 'a/b=1' and "
            "'a.b-1'",
        ),
        (
            [arm("trunk"), arm("fork", "trunk", grid={"start.order": []})],
            "arms.fork.grid.start.order: needs a list of one value or more, got []",
        ),
    ],
)
def test_faults_of_starts_name_both_arms(
    tmp_path: Path, arms: list[Any], said: str
) -> None:
    """Catches: a fault that is found in the first run; one that names one arm only."""
    assert said in faults_of(changed(tmp_path, arms=arms, contrasts=[]))


def test_forks_have_the_seeds_of_their_trunk(tmp_path: Path) -> None:
    """An arm's own seeds hold for what starts from it, and `seeds.count` is the most.

    Catches: forks without a trunk to start from; a smoke profile with too many runs.
    """
    arms = [
        arm("other"),
        arm("trunk", seeds={"count": 2}),
        arm("fork", "trunk"),
        arm("late", "fork", seeds={"count": 1}),
    ]
    path = changed(tmp_path, arms=arms, contrasts=[], seeds={"count": 3})
    recipe = load_recipe(path)

    def seeds(recipe: Recipe, name: str) -> list[int]:
        return [spec.seed for spec in recipe.run_specs() if spec.arm == name]

    assert seeds(recipe, "other") == [0, 1, 2]
    assert seeds(recipe, "trunk") == seeds(recipe, "fork") == [0, 1]
    assert seeds(recipe, "late") == [0]
    assert Recipe.from_json(recipe.to_json()).run_specs() == recipe.run_specs()
    one = recipe.adjusted(seeds=1)
    assert [seeds(one, name) for name in ("other", "trunk", "fork")] == [[0]] * 3


def test_each_seed_may_have_a_split_of_its_own(tmp_path: Path) -> None:
    """Arms of a seed share the split, seeds do not.

    Catches: a key that nothing reads; a split per arm, which would unpair them.
    """
    seeds = {"count": 2, "split": "own"}
    path = changed(tmp_path, seeds=seeds, **{"data": {**DATA, "split_seed": 40}})
    found = {
        (spec.seed, spec.data.split_seed) for spec in load_recipe(path).run_specs()
    }
    assert len(found) == len({split for _, split in found}) == 2
    shared = changed(tmp_path, seeds={"count": 2})
    assert {spec.data.split_seed for spec in load_recipe(shared).run_specs()} == {0}


DATA = tomllib.loads(FORKS.read_text())["data"]


def test_another_number_of_seeds_leaves_a_trace() -> None:
    """Catches: seeds added after a look at the results, of which no record tells."""
    recipe = load_recipe(FORKS)
    assert recipe.seeds.planned is None
    assert "planned" not in recipe.to_json()
    more = recipe.adjusted(seeds=5)
    assert (more.seeds.count, more.seeds.planned) == (5, 2)
    assert (more.adjusted(seeds=7).seeds.planned) == 2
    assert more.adjusted(seeds=2) == recipe
    asked = load_recipe(FORKS, overrides={"seeds.count": "5"})
    assert asked == more

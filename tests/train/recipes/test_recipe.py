"""Recipes: what they resolve to, and what is refused, in which words."""

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w

from noisekit.core.errors import RecipeError, UsageError
from noisekit.core.vocabulary import QUANTITIES
from noisekit.sharpness import EpsilonSharpness, WorstCase
from noisekit.stats import contrast
from noisekit.train.measures import MEASURES
from noisekit.train.models import F1
from noisekit.train.recipes.catalogue import experiments
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.measure_spec import (
    ALWAYS_RECORDED,
    MeasureSpec,
    translated_measure,
)
from noisekit.train.recipes.points import Point
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.tables import merged

MINIMAL = """
format = 2
name = "minimal"
question = "Does it load?"
verdicts = true

[data]
name = "digits"
train = 96
validation = 16
test = 16

[model]
name = "mlp"
hidden = [8]

[optimizer]
name = "sgd"
learning_rate = 0.1

[training]
batch_size = 8
stop = { updates = 24 }

[evaluation]
every = { updates = 8 }

[snapshots]
losses = [0.5]
at = { equal_epochs = { epochs = 2 } }

[measure]
everywhere = ["lambda_max"]

[seeds]
first = 3
count = 2

[[arms]]
name = "small"

[[arms]]
name = "large"
set = { "training.batch_size" = 32, "optimizer.learning_rate" = 0.4 }

[[contrasts]]
name = "sharper"
quantity = "lambda_max"
treatment = "large"
reference = "small"
snapshot = "loss_0.5"
scale = "ratio"
margin = 1.5
primary = true

[profiles.tiny]
verdicts = false
data = { train = 64 }
snapshots = { losses = [1.0, 0.5] }
seeds = { count = 1 }

[profiles.rates]
contrasts = []
grid = { optimizer = { learning_rate = [0.1, 1e-3] }, training.batch_size = [8, 32] }
"""


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes the minimal recipe, with some keys changed."""

    def write(**settings: object) -> Path:
        table = tomllib.loads(MINIMAL)
        for key, value in settings.items():
            *parents, last = key.split("__")
            inner = table
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(table))
        return path

    return write


def faults_of(path: Path, profile: str | None = None, **overrides: str) -> str:
    """Return the message with which a recipe is refused."""
    settings = {key.replace("__", "."): text for key, text in overrides.items()}
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, profile=profile, overrides=settings)
    message = str(caught.value)
    assert str(path) in message
    return message


def test_each_arm_is_resolved_at_each_seed(write) -> None:
    """An arm's settings reach its own runs and no others; seeds are paired.

    Catches: settings of one arm leaking into the next; seeds counted from 0.
    """
    specs = load_recipe(write()).run_specs()
    seen = [
        (s.run_id, s.seed, s.training.batch_size, s.optimizer.learning_rate)
        for s in specs
    ]
    assert seen == [
        ("small-seed3", 3, 8, 0.1),
        ("large-seed3", 3, 32, 0.4),
        ("small-seed4", 4, 8, 0.1),
        ("large-seed4", 4, 32, 0.4),
    ]
    assert specs[0].factors == {"batch_size": 8, "learning_rate": 0.1}
    assert specs[1].factors == {"batch_size": 32, "learning_rate": 0.4}


def test_equal_epochs_are_another_update_in_each_arm(write) -> None:
    """An epoch is as many updates as the arm's batches need.

    Catches: taking one update number for all arms.
    """
    small, large, *_ = load_recipe(write()).run_specs()
    point = small.snapshot_points["equal_epochs"]
    found = [
        run.clock.updates_to(run.clock.span(point), run.training.batch_size)
        for run in (small, large)
    ]
    assert found == [24, 6]
    assert (small.max_updates, large.max_updates) == (24, 24)


def test_run_spec_survives_json_exactly(write) -> None:
    """Every float comes back with the same bits, every tuple as a tuple.

    Catches: rounding floats; lists in place of tuples.
    """
    path = write(optimizer__learning_rate=0.1 + 0.2, snapshots__losses=[1 / 3, 0.5])
    recipe = load_recipe(path)
    assert Recipe.from_json(recipe.to_json()) == recipe
    for spec in recipe.run_specs():
        assert RunSpec.from_json(spec.to_json()) == spec
        assert RunSpec.from_table(spec.model_dump(mode="json")) == spec


def test_profile_merges_tables_and_replaces_lists(write) -> None:
    """A profile states what differs; a list of it stands alone.

    Catches: replacing a whole table; appending to a list.
    """
    recipe = load_recipe(write(), profile="tiny")
    assert recipe.profile == "tiny"
    assert recipe.data.train == 64
    assert recipe.data.validation == 16
    assert recipe.snapshots.losses == (1.0, 0.5)
    assert recipe.snapshots.at == {"equal_epochs": Point(epochs=2)}
    assert not recipe.verdicts


def test_another_kind_replaces_its_section_and_an_override_does_not(write) -> None:
    """A profile's other network has none of the keys of the one below.

    Catches: an MLP's widths left in F1; an override that drops the learning rate.
    """
    path = write(profiles__f1={"model": {"name": "f1"}, "data": {"name": "digits"}})
    recipe = load_recipe(path, profile="f1", overrides={"optimizer.name": "adam"})
    assert recipe.model == F1()
    assert recipe.data.train == 96
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate) == ("adam", 0.1)


def test_default_profile_is_the_files_own(write) -> None:
    """Without a profile the file's ``default_profile`` holds, if it names one."""
    assert load_recipe(write()).profile == ""
    assert load_recipe(write(default_profile="tiny")).profile == "tiny"


def test_grid_takes_the_place_of_arms(write) -> None:
    """A profile's grid makes every combination an arm, and the arms go.

    Catches: keeping the arms below; pairing values instead of crossing them.
    """
    recipe = load_recipe(write(), profile="rates")
    assert [arm.name for arm in recipe.arms] == [
        "learning_rate=0.1/batch_size=8",
        "learning_rate=0.1/batch_size=32",
        "learning_rate=0.001/batch_size=8",
        "learning_rate=0.001/batch_size=32",
    ]
    assert recipe.arms[3].set == {
        "optimizer.learning_rate": 1e-3,
        "training.batch_size": 32,
    }


def test_override_is_laid_over_the_profile(write) -> None:
    """``--set`` wins over the profile; what is no TOML is taken as text.

    Catches: laying the profile over the override.
    """
    recipe = load_recipe(
        write(),
        profile="tiny",
        overrides={"seeds.count": "7", "optimizer.name": "adam", "verdicts": "true"},
    )
    assert recipe.seeds.count == 7
    assert recipe.optimizer.name == "adam"
    assert recipe.verdicts


def test_what_all_arms_set_need_not_be_said_before(write) -> None:
    """A grid over a key without a default is enough.

    Catches: refusing the recipe for lack of the key.
    """
    table = tomllib.loads(write().read_text())
    del table["optimizer"]["learning_rate"]
    path = write()
    path.write_text(tomli_w.dumps(table))
    assert load_recipe(path, profile="rates").optimizer.learning_rate == 0.1
    assert "optimizer.learning_rate: is missing" in faults_of(path)


def test_contrasts_are_those_that_statistics_take(write) -> None:
    """A stated contrast reaches the statistics with all its fields."""
    (claim,) = load_recipe(write()).stated_claims()
    assert claim == contrast(
        name="sharper",
        quantity="lambda_max",
        treatment="large",
        reference="small",
        snapshot="loss_0.5",
        scale="ratio",
        margin=1.5,
        primary=True,
    )


def test_measures_and_records_are_in_the_vocabulary() -> None:
    """What can be asked for can be measured, and stands in the glossary.

    Catches: a measure that a recipe may name and that no run takes.
    """
    assert set(MEASURES) | set(ALWAYS_RECORDED) <= set(QUANTITIES)
    for name, measures in MEASURES.items():
        assert {measure.name for measure in measures} == {name}


def test_every_setting_of_every_measure_can_be_set() -> None:
    """A table changes all that a name stands for, a list takes the measure for each.

    Catches: settings that only the card can set; a table that replaces the usual rows.
    """
    spec = MeasureSpec.model_validate_json(
        json.dumps(
            {
                "settings": {
                    "epsilon_sharpness": {"restarts": 2, "method": "lbfgsb"},
                    "worst_case_sharpness": [
                        {"rho": 0.1, "norm": "linf"},
                        {"steps": 3},
                    ],
                    "pac_bayes_flatness": {"target": 0.2, "criterion": "loss"},
                    "fisher_rao_norm": {"likelihood": "gaussian"},
                }
            }
        )
    )
    assert spec.measures("epsilon_sharpness") == (
        EpsilonSharpness(epsilon=1e-3, restarts=2, method="lbfgsb"),
        EpsilonSharpness(epsilon=5e-4, restarts=2, method="lbfgsb"),
    )
    assert spec.measures("worst_case_sharpness") == (
        WorstCase(rho=0.1, norm="linf"),
        WorstCase(steps=3),
    )
    assert [m.magnitude_aware for m in spec.measures("pac_bayes_flatness")] == [
        False,
        True,
    ]
    assert spec.measures("lambda_max") == MEASURES["lambda_max"]
    for name, usual in MEASURES.items():
        everything = {"settings": {name: [measure.settings for measure in usual]}}
        read = MeasureSpec.model_validate_json(json.dumps(everything))
        assert read.measures(name) == usual
        again = MeasureSpec.model_validate_json(read.model_dump_json())
        assert again == read


def test_all_faults_of_settings_come_with_their_keys(write) -> None:
    """Unknown measure, unknown setting, wrong type, out of bounds, another quantity.

    Catches: one fault at a time; an error in the middle of a run.
    """
    settings = {
        "lamda_max": {"tol": 1e-3},
        "hessian_trace": {"num_matvec": 8},
        "average_sharpness": {"num_draws": 1, "antithetic": "yes"},
        "worst_case_sharpness": [{"rho": 0.1}, {"rho": -0.1}],
        "adaptive_worst_case_sharpness": {"adaptive": False},
    }
    message = faults_of(write(measure={"settings": settings}))
    for said in (
        "measure.settings.lamda_max: needs a measure, one of",
        "did you mean 'lambda_max'?",
        "measure.settings.hessian_trace.num_matvec: unknown key; did you mean "
        "'num_matvecs'? Allowed here: num_matvecs",
        "settings.average_sharpness.num_draws: needs a number at least 2, got 1",
        "measure.settings.average_sharpness.antithetic: needs true or false",
        "settings.worst_case_sharpness[2].rho: needs a number above 0, got -0.1",
        "settings.adaptive_worst_case_sharpness: needs settings of "
        "adaptive_worst_case_sharpness, got those of worst_case_sharpness; put them "
        "under measure.settings.worst_case_sharpness",
    ):
        assert said in message, message


def test_settings_of_format_1_are_read_as_they_were_meant() -> None:
    """Radii, boxes and effort lay side by side there, each for several measures.

    Catches: recorded runs whose settings are lost; a subspace without the full space.
    """
    read = MeasureSpec.model_validate_json(
        json.dumps(
            translated_measure(
                {
                    "everywhere": ["lambda_max"],
                    "epsilon": [1e-3],
                    "subspace_dim": 5,
                    "max_iter": 4,
                    "max_matvecs": 60,
                    "trace_matvecs": 8,
                    "adaptive_rho": 0.4,
                    "rho": 0.03,
                    "ascent_steps": 2,
                }
            )
        )
    )
    assert read.everywhere == ("lambda_max",)
    assert read.measures("epsilon_sharpness") == (
        EpsilonSharpness(epsilon=1e-3, max_iter=4),
        EpsilonSharpness(epsilon=1e-3, max_iter=4, subspace_dim=5),
    )
    assert read.measures("adaptive_worst_case_sharpness") == (
        WorstCase(adaptive=True, rho=0.4, steps=1),
        WorstCase(adaptive=True, rho=0.4, steps=2),
    )
    (pyhessian,) = read.measures("lambda_max_pyhessian")
    assert (pyhessian.max_matvecs, pyhessian.tol) == (60, 1e-4)
    assert read.measures("relative_flatness")[0].num_matvecs == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"training__batch_sise": 8},
            "training.batch_sise: unknown key; did you mean 'batch_size'? Allowed "
            "here: batch_size, clip_norm, epoch_end, label_smoothing, loss, ",
        ),
        ({"qestion": "x"}, "qestion: unknown key; did you mean 'question'?"),
        (
            {"optimizer__name": "sdg"},
            "optimizer.name: needs 'sgd', 'adam', 'adamw', 'module:function', got "
            "\"sdg\"; did you mean 'sgd'?",
        ),
        (
            {"seeds__count": "ten"},
            'seeds.count: needs an integer, got "ten" (text)',
        ),
        ({"seeds__count": 2.5}, "seeds.count: needs an integer, got 2.5"),
        ({"seeds__count": True}, "seeds.count: needs an integer, got true"),
        ({"seeds__count": 0}, "seeds.count: needs a number at least 1, got 0"),
        (
            {"optimizer__learning_rate": float("inf")},
            "optimizer.learning_rate: needs a finite number",
        ),
        (
            {"optimizer__learning_rate": -1.0},
            "optimizer.learning_rate: needs a number above 0, got -1.0",
        ),
        ({"model__hidden": 8}, "model.hidden: needs a list, got 8"),
        ({"data": 8}, "data: needs a table, got 8"),
        (
            {"model__name": "f1"},
            "model.hidden: unknown key. Allowed here: init, init_scale, name",
        ),
        (
            {"training__stop": {"loss": 0.1}},
            "training.stop: needs epochs or updates as a bound",
        ),
        (
            {"training__batch_size": 128},
            "training.batch_size: needs at most data.train (96) examples, got 128",
        ),
        (
            {"data__train": 100},
            "arms.large.set.training.batch_size: needs to divide data.train (100), so "
            "that every update sees as many examples; with 32, batch 4 of each epoch "
            "would have 4. Choose another number, or set training.epoch_end "
            "to 'drop', 'ragged' or 'run_on'",
        ),
        (
            {"snapshots__at": {"equal_epochs": {"epochs": 3}}},
            "snapshots.at.equal_epochs.epochs: lies at update 36, after the last that "
            "training.stop allows (24); take it earlier or train longer",
        ),
        (
            {"measure__at": {"equal_epoch": ["grad_norm"]}},
            "measure.at.equal_epoch: needs a snapshot, one of 'start', 'loss_0.5', "
            "'equal_epochs', 'final', got 'equal_epoch'; did you mean 'equal_epochs'?",
        ),
        (
            {"measure__num_examples": 97},
            "measure.num_examples: needs at most data.train (96) examples, got 97",
        ),
        ({"arms": []}, "arms: needs"),
        (
            {"arms": [{"name": "a", "set": {"trainin.batch_size": 8}}]},
            "arms.a.set.trainin.batch_size: needs a section, one of",
        ),
        ({"arms": [{"name": "a/b"}]}, "arms[1].name: needs text that matches"),
        (
            {"arms": [{"name": "a"}, {"name": "a"}]},
            "arms: needs a name per arm, got 'a' 2 times",
        ),
        (
            {"grid": {"training.batch_size": []}},
            "grid: arms and a grid exclude each other",
        ),
        ({"format": 3}, "format: needs 2, got 3"),
        (
            {"analyses": ["sharpness_vs_batchsize"]},
            "analyses: needs an analysis, one of 'gradient_noise', 'outcomes_by_arm', "
            "'rate_choice', 'sharpness_vs_batch_size', 'stated_claims', got "
            "'sharpness_vs_batchsize'; did you mean 'sharpness_vs_batch_size'?",
        ),
        (
            {"probe": {"estimator": "rowz"}},
            "probe.estimator[1]: needs 'auto', 'per_example', 'rows', 'chunks', "
            "'accumulation', 'random_signs', 'ghost' or 'preconditioned', got "
            "\"rowz\"; did you mean 'rows'?",
        ),
        (
            {"probe": {"estimator": ["rows", "rows"]}},
            "probe: estimator needs different names, got ['rows', 'rows']",
        ),
        (
            {"probe": {"estimator": "preconditioned"}},
            "write estimator = ['auto', 'preconditioned']",
        ),
        (
            {"probe": {"estimator": "ghost"}},
            "probe: estimator = 'ghost' needs ghost_batch, the examples of a ghost "
            "batch; set it to at most half a micro-batch",
        ),
        (
            {"probe": {"ghost_batch": 4}},
            "probe: ghost_batch = 4 belongs to estimator = 'ghost'; name it, or leave",
        ),
        (
            {"probe": {"estimator": "ghost", "ghost_batch": 5}},
            "probe.ghost_batch: needs to fit twice into the 8 examples of a "
            "micro-batch, got 5; use at most 4, or larger batches",
        ),
        (
            {"probe": {"estimator": ["auto", "accumulation"]}},
            "probe.estimator: 'accumulation' compares the micro-batches of an update, "
            "so that it needs training.microbatch of at most half of the batch (8), "
            "got none; set it, or use 'auto'",
        ),
        (
            {"probe": {"estimator": "chunks"}, "model__norm": "batch"},
            "probe.estimator: 'chunks' needs examples with gradients of their own, "
            "which the network's BatchNorm couples; use 'ghost' with probe.ghost_batch",
        ),
        (
            {"probe": {"estimator": ["auto", "preconditioned"]}},
            "probe.estimator: 'preconditioned' is the noise that Adam sees, and needs "
            "optimizer.name = 'adam' or 'adamw', got 'sgd'; leave it out",
        ),
        ({"probe": {"row_share": 0.0}}, "probe.row_share: needs a number above 0"),
        ({"probe": {"num_chunks": 1}}, "probe.num_chunks: needs a number at least 2"),
    ],
)
def test_fault_names_key_and_remedy(write, settings, said) -> None:
    """Each kind of fault is refused with its key, what was found and what to write.

    Catches: a check that is left out; text taken for a number; ``true`` taken for 1.
    """
    assert said in faults_of(write(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"compute__device": "meta"},
            "compute.device: needs text that matches ^(cpu|cuda|mps|xpu)",
        ),
        (
            {"optimizer__learning_rate": 1e300},
            "optimizer.learning_rate: needs a number at most 3e+38, got 1e+300",
        ),
        (
            {"training__stop": {"updates": 1e30}},
            "training.stop.updates: needs an integer, got 1e+30",
        ),
        (
            {"training__stop": {"updates": 10**12}},
            "training.stop.updates: needs a number at most 1e+09, got 1000000000000",
        ),
        (
            {"training__stop": {"epochs": 1e9}},
            "training.stop.epochs: needs a number at most 1e+09",
        ),
        (
            {"training__stop": {"epochs": 9e8}},
            "training.stop: allows 1.08e+10 updates, at most 999,999,999 are possible",
        ),
        (
            {"seeds__first": 2**63 - 1},
            "seeds.first: needs a number at most 1e+15, got 9223372036854775807",
        ),
        (
            {"arms": [{"name": "a" * 161}]},
            "arms[1].name: needs text of at most 160 characters",
        ),
        (
            {"measure__settings": {"epsilon_sharpness": {"epsilon": []}}},
            "measure.settings.epsilon_sharpness.epsilon: needs a number, got []",
        ),
        (
            {"evaluation__every": {"updates": 4, "epochs": 1.0}},
            "evaluation.every: needs exactly one of updates, epochs, share, got "
            "updates, epochs",
        ),
        (
            {"evaluation__every": {"loss": 0.5}},
            "evaluation.every: needs exactly one of updates, epochs, share, got loss",
        ),
        ({"snapshots__at": {"late": {}}}, "snapshots.at.late: needs one of updates"),
        (
            {"schedule": {"name": "step", "milestones": []}},
            "schedule: needs either milestones or every",
        ),
        (
            {
                "training__stop": {"epochs": 4.0},
                "schedule": {
                    "name": "cosine",
                    "warmup": {"length": {"updates": 5}, "start": 0.1},
                },
            },
            "schedule.warmup.length: under 'cosine' needs the unit of training.stop",
        ),
        (
            {"training__microbatch": 9},
            "training: microbatch needs at most batch_size (8) examples, got 9",
        ),
        (
            {"training__loss": "cross_entrpy"},
            "'module:function', got 'cross_entrpy'; did you mean 'cross_entropy'?",
        ),
    ],
)
def test_impossible_value_is_a_fault_and_not_an_error_later(
    write, settings, said
) -> None:
    """What no run could be made of is refused with its key.

    Catches: an overflow, a traceback or a hundred failed runs in place of a fault.
    """
    assert said in faults_of(write(**settings))


def test_the_longest_names_can_be_run(write) -> None:
    """Catches: an arm of 160 characters whose run's name is then too long."""
    arms = [{"name": "a" * 160}, {"name": "b" * 159}]
    recipe = load_recipe(write(arms=arms, contrasts=[], seeds__first=10**9))
    assert max(len(spec.run_id) for spec in recipe.run_specs()) == 175


def test_grid_beyond_bounds_is_counted_and_not_made(write) -> None:
    """Catches: a thousand million arms in memory before the first fault."""
    axes = {f"optimizer.key{i}": list(range(10)) for i in range(9)}
    message = faults_of(write(profiles__huge__grid=axes), profile="huge")
    assert "grid: makes 1,000,000,000 arms, at most 10,000 are possible" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2026-12-01", 'question: needs text, got "2026'),
        ("[" * 4000 + "]" * 4000, ""),
        ("[" * 40 + "]" * 40, "recipes nest at most 16 tables and lists"),
        ("1\nverdicts = true", ""),
    ],
)
def test_odd_override_is_text_or_a_fault(write, text: str, said: str) -> None:
    """Dates and what nests beyond Python's stack are no tracebacks.

    Catches: ``datetime`` that JSON cannot write; a second key smuggled in.
    """
    overrides = {"title": text}
    if said.startswith("recipes"):
        with pytest.raises(RecipeError, match=said):
            load_recipe(write(), overrides=overrides)
    else:
        assert load_recipe(write(), overrides=overrides).title == text


def test_contrasts_are_checked_where_their_arms_are_measured(write) -> None:
    """An arm's own snapshots and measures count, in both arms of a contrast.

    Catches: a contrast refused at a snapshot that both arms have; one accepted at a
    snapshot that one of them lacks.
    """
    losses = {"snapshots.losses": [0.5, 0.25]}
    arms = [{"name": "small", "set": losses}, {"name": "large", "set": losses}]
    contrast = {**tomllib.loads(MINIMAL)["contrasts"][0], "snapshot": "loss_0.25"}
    assert load_recipe(write(arms=arms, contrasts=[contrast])).contrasts
    arms[1] = {"name": "large"}
    message = faults_of(write(arms=arms, contrasts=[contrast]))
    assert "contrasts.sharper.snapshot: needs a snapshot, one of 'start'" in message


def test_two_contrasts_of_one_name_are_refused(write) -> None:
    """Catches: two verdicts in the report that cannot be told apart."""
    contrast = tomllib.loads(MINIMAL)["contrasts"][0]
    message = faults_of(write(contrasts=[contrast, contrast]))
    assert "contrasts: needs a name per contrast, got 'sharper' 2 times" in message


def test_another_kind_in_an_arm_leaves_defaults_behind(write) -> None:
    """An arm may choose another optimizer; what the recipe states stays a fault.

    Catches: a recorded recipe, which states every default, that no longer loads.
    """
    arms = [{"name": "sgd"}, {"name": "adam", "set": {"optimizer.name": "adam"}}]
    recipe = load_recipe(write(arms=arms, contrasts=[]))
    assert recipe.run_specs()[1].optimizer.name == "adam"
    assert Recipe.from_json(recipe.to_json()) == recipe
    message = faults_of(write(arms=arms, contrasts=[], optimizer__momentum=0.9))
    assert "arms.adam.set.optimizer.momentum: unknown key" in message


def test_length_and_named_point_are_replaced_whole(write) -> None:
    """A profile may state them in another unit.

    Catches: ``{ updates = 8, epochs = 1 }``, which is no length.
    """
    layer = {
        "evaluation": {"every": {"epochs": 1.0}},
        "snapshots": {"at": {"equal_epochs": {"updates": 5}}},
    }
    recipe = load_recipe(write(profiles__other=layer), profile="other")
    assert recipe.evaluation.every == Point(epochs=1.0)
    assert recipe.snapshots.at["equal_epochs"] == Point(updates=5)
    assert recipe.snapshots.losses == (0.5,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"quantity": "test_error", "scale": "difference", "margin": 5.0},
            "contrasts[1]: margin of a difference of test_error is a fraction below 1, "
            "such as 0.005 for half a point; got 5.0",
        ),
        (
            {"treatment": "larg"},
            "contrasts.sharper.treatment: needs an arm, one of 'small', 'large', got "
            "'larg'; did you mean 'large'?",
        ),
        (
            {"reference": "large"},
            "contrasts.sharper.reference: needs another arm than the treatment",
        ),
        (
            {"snapshot": "loss_0.4"},
            "contrasts.sharper.snapshot: needs a snapshot, one of 'start', 'loss_0.5'",
        ),
        (
            {"quantity": "lamda_max"},
            "contrasts.sharper.quantity: needs a quantity, one of",
        ),
        (
            {"quantity": "hessian_trace"},
            "contrasts.sharper.quantity: 'hessian_trace' is not measured at "
            "'loss_0.5'; add it to measure.at.loss_0.5 or to measure.everywhere",
        ),
        (
            {"margin": 0.5},
            "contrasts[1]: margin of a ratio is a factor above 1, such as 1.5; got 0.5",
        ),
        ({"scale": "log"}, "contrasts[1].scale: needs 'ratio' or 'difference'"),
        ({"margn": 1.5}, "contrasts[1].margn: unknown key; did you mean 'margin'?"),
    ],
)
def test_contrast_names_only_what_the_recipe_takes(write, change, said) -> None:
    """A contrast that no run could answer is refused before any run.

    Catches: finding out after an hour that the quantity was never measured.
    """
    contrast = {**tomllib.loads(MINIMAL)["contrasts"][0], **change}
    assert said in faults_of(write(contrasts=[contrast]))


def test_all_faults_are_reported_at_once(write) -> None:
    """Schema, arms, contrasts and what sections need of each other, in one message.

    Catches: stopping at the first fault, or at the first kind of fault.
    """
    contrast = {**tomllib.loads(MINIMAL)["contrasts"][0], "treatment": "big"}
    path = write(
        optimizer__nmae="sgd",
        data__train=100,
        measure__at={"later": ["grad_norm"]},
        contrasts=[contrast],
    )
    message = faults_of(path, seeds__count="0")
    assert "has 7 faults" in message
    for key in (
        "optimizer.nmae",
        "seeds.count",
        "arms.large.set.training.batch_size",
        "\n  training.batch_size",
        "measure.at.later",
        "snapshots.at.equal_epochs.epochs",
        "contrasts.sharper.treatment",
    ):
        assert f"{key}: " in message, key


def test_fault_says_which_layer_it_came_from(write) -> None:
    """What a profile or an override brought is not looked for in the base."""
    path = write(profiles__tiny__data__tran=5)
    message = faults_of(path, profile="tiny", model__nam="mlp", data__test="x")
    assert "data.tran: unknown key; did you mean 'train'?" in message
    assert "(from profile tiny)" in message
    assert 'data.test: needs an integer, got "x" (text) (from --set)' in message


def test_override_that_arms_undo_is_refused(write) -> None:
    """Setting what an arm sets would change nothing, or only some of the arms.

    Catches: silently running with another value than the one asked for.
    """
    message = faults_of(write(), training__batch_size="16")
    assert (
        "training.batch_size: has no effect, since arms set it: large; change the "
        "arms or the grid (from --set)"
    ) in message


def test_unknown_profile_is_refused_with_the_known_ones(write) -> None:
    """A mistyped profile is not taken for none."""
    message = faults_of(write(), profile="tyni")
    assert "needs a profile, one of 'tiny', 'rates', got 'tyni'" in message
    assert message.endswith("did you mean 'tiny'?")


def test_broken_toml_is_refused_with_its_place(tmp_path: Path) -> None:
    """The line of the fault comes through."""
    path = tmp_path / "recipe.toml"
    path.write_text("name = 'a'\nquestion = what\n")
    assert "is not TOML: Invalid value (at line 2, column 12)" in faults_of(path)


def test_missing_file_is_refused_with_what_there_is(tmp_path: Path) -> None:
    """A path that is not there, and a name that is not known, say what is."""
    with pytest.raises(
        RecipeError, match=r"does not exist.*small_vs_large_batch.*noisekit new"
    ):
        load_recipe(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match="did you mean 'small_vs_large_batch'"):
        load_recipe("small_vs_big_batch")


def test_adjusting_checks_what_it_is_given(write) -> None:
    """Another device or number of seeds is checked like the recipe's own.

    Catches: a run with no seeds at all; an error of pydantic's.
    """
    recipe = load_recipe(write())
    assert recipe.adjusted() == recipe
    assert recipe.adjusted(seeds=7).seeds == recipe.seeds.model_copy(
        update={"count": 7, "planned": 2}
    )
    with pytest.raises(UsageError, match="count: needs a number at least 1, got 0"):
        recipe.adjusted(seeds=0)
    with pytest.raises(UsageError, match=r'device: needs text that .* got "gpu"'):
        recipe.adjusted(device="gpu")


def test_lists_are_replaced_and_tables_merged() -> None:
    """The rule of profiles, on plain tables."""
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merged(base, {"a": {"y": [3]}, "c": 2}) == {
        "a": {"x": 1, "y": [3]},
        "b": 1,
        "c": 2,
    }
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


PROFILES = [
    (entry.path, profile.name) for entry in experiments() for profile in entry.profiles
]


@pytest.mark.parametrize(
    ("path", "profile"), PROFILES, ids=[f"{p.parent.name}-{n}" for p, n in PROFILES]
)
def test_bundled_recipe_is_sound(path: Path, profile: str) -> None:
    """Every bundled profile loads, and says what it is and what it costs."""
    recipe = load_recipe(path, profile=profile)
    assert recipe.title
    assert recipe.cost
    assert recipe.run_specs()
    if recipe.verdicts:
        assert any(claim.primary for claim in recipe.stated_claims())
        assert recipe.seeds.count >= recipe.rules.min_pairs

"""What is refused of recipes whose batch size and settings change."""

import json
from typing import Any

import pytest
from pydantic import JsonValue

from noisekit.policies import Constant, Decision, Observation, Policy, State
from noisekit.train.recipes.consistency import section_faults
from noisekit.train.recipes.parsing import parse_sections
from noisekit.train.recipes.run_spec import RunSections
from tests.train.run_specs import run_spec

BASE = {
    key: value
    for key, value in json.loads(run_spec().to_json()).items()
    if key in RunSections.model_fields
}
GROWTH: dict[str, JsonValue] = {
    "name": "growth",
    "factor": 2,
    "every": {"epochs": 1},
    "max": 64,
}


def faults_of(**sections: Any) -> list[str]:
    """Return all faults of the toy run with sections merged into it."""
    table: dict[str, Any] = dict(BASE)
    for key, value in sections.items():
        inside = isinstance(value, dict) and isinstance(table.get(key), dict)
        same = inside and value.get("name", table[key].get("name")) == table[key].get(
            "name"
        )
        table[key] = {**table[key], **value} if same else value
    parsed = parse_sections(table)
    return [str(fault) for fault in (*parsed.faults, *section_faults(parsed))]


def phase(point: JsonValue, **settings: JsonValue) -> JsonValue:
    return [{"at": point, "set": dict(settings)}]


MLP_BN: JsonValue = {"name": "mlp", "hidden": [8], "norm": "batch"}
RUN_ON: JsonValue = {"epoch_end": "run_on"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"batch_policy": {**GROWTH, "max": 8}},
            "batch_policy: max needs to be at least the batch size 16, got 8",
        ),
        (
            {"batch_policy": {**GROWTH, "max": 500}},
            "batch_policy: may ask for 500 examples, data.train has 128",
        ),
        (
            {"batch_policy": {**GROWTH, "at": [{"epochs": 1}]}},
            "batch_policy: needs either at, a list of points, or every",
        ),
        (
            {"batch_policy": {"name": "table", "sizes": [8], "at": [{"epochs": 1}]}},
            "batch_policy: needs one size more than at has points (1), got 1",
        ),
        (
            {
                "batch_policy": {
                    "name": "table",
                    "sizes": [8, 16, 4],
                    "at": [{"epochs": 2}, {"updates": 3}],
                }
            },
            "batch_policy: at needs points on one clock",
        ),
        (
            {"batch_policy": {**GROWTH, "factor": 3}},
            "training.epoch_end: training.epoch_end = 'divides' needs batches that",
        ),
        (
            {"batch_policy": {"name": "norm_test", "max": 64}},
            "training.epoch_end: under batch_policy.name = 'norm_test' needs 'run_on'",
        ),
        (
            {"batch_policy": {"name": "kicks", "small": 5}},
            "batch_policy.small: needs to divide data.train (128), got 5",
        ),
        (
            {"batch_policy": {"name": "kicks", "small": 4, "length": {"updates": 3}}},
            "training.epoch_end: under batch_policy.name = 'kicks' needs 'run_on'",
        ),
        (
            {
                "batch_policy": {"name": "cabs", "max": 64},
                "training": RUN_ON,
                "optimizer": {"momentum": 0.9},
            },
            "batch_policy: CABS needs SGD without momentum, got momentum=0.9",
        ),
        (
            {
                "batch_policy": {"name": "cabs", "max": 64},
                "training": RUN_ON,
                "optimizer": {"name": "adam", "learning_rate": 0.1},
            },
            "batch_policy: CABS needs torch.optim.SGD",
        ),
        (
            {
                "batch_policy": {"name": "noise_scale", "max": 64},
                "training": RUN_ON,
                "model": MLP_BN,
            },
            "batch_policy.name: 'noise_scale' needs debiased_grad_sq_norm, of examples",
        ),
        (
            {
                "batch_policy": {"name": "inner_product_test", "max": 64},
                "training": {**RUN_ON, "microbatch": 8},
            },
            "batch_policy.name: 'inner_product_test' needs all examples of an update",
        ),
        (
            {"batch_policy": {"name": "norm_tset", "max": 64}},
            "did you mean 'norm_test'?",
        ),
        (
            {"phases": phase({"updates": 3}, **{"model.hidden": [4]})},
            "phases[1].set.model.hidden: cannot change in mid-run; what can is",
        ),
        (
            {"phases": phase({"updates": 3}, **{"optimizer.name": "adam"})},
            "phases[1].set.optimizer.name: cannot change in mid-run",
        ),
        (
            {"phases": phase({"updates": 3}, optimizer={"name": "sgd"})},
            "phases[1].set.optimizer.name: cannot change in mid-run",
        ),
        (
            {"phases": phase({"updates": 3}, **{"training.stop": {"updates": 9}})},
            "phases[1].set.training.stop.updates: cannot change in mid-run",
        ),
        (
            {"phases": phase({"updates": 3}, **{"optimizer.momentun": 0.5})},
            "phases[1].set.optimizer.momentun: unknown key; did you mean 'momentum'?",
        ),
        (
            {"phases": phase({"updates": 3}, **{"training.batch_size": 24})},
            "training.epoch_end: training.epoch_end = 'divides' needs batches that",
        ),
        (
            {"phases": phase({}, **{"training.batch_size": 8})},
            "phases[1].at: needs one of updates, epochs, share, loss, stalled",
        ),
        (
            {"optimizer": {"scaling": "linear"}},
            "optimizer: scaling = 'linear' needs reference_batch",
        ),
        (
            {
                "optimizer": {
                    "name": "adam",
                    "learning_rate": 0.1,
                    "scale_betas": "both",
                }
            },
            "optimizer: scale_betas = 'both' needs reference_batch",
        ),
        (
            {"evaluation": {"splits": ["test"]}, "snapshots": {"losses": [0.5]}},
            "evaluation.splits: needs 'train', whose loss snapshots.loss_0.5 waits for",
        ),
        (
            {"snapshots": {"every": {"epoch": {"epochs": 1}}}},
            "snapshots.every.epoch: needs the unit of training.stop, or a share",
        ),
        (
            {"snapshots": {"every": {"u": {"updates": 99}}}},
            "snapshots.every.u: is longer than training.stop",
        ),
        (
            {
                "series": [{"every": {"updates": 3}, "measures": ["lambda_mox"]}],
            },
            "series[1].measures[1]: needs a measure",
        ),
    ],
)
def test_what_could_not_run_is_a_fault(sections: dict[str, Any], said: str) -> None:
    """Catches: a run that fails in the middle, or does not what it was asked to."""
    assert said in "\n".join(faults_of(**sections))


@pytest.mark.parametrize(
    "sections",
    [
        {"batch_policy": GROWTH},
        {"batch_policy": {"name": "kicks", "small": 4}},
        {"batch_policy": {"name": "cabs", "max": 64}, "training": RUN_ON},
        {
            "batch_policy": {"name": "cabs", "max": 64, "momentum": "ignore"},
            "training": RUN_ON,
            "optimizer": {"momentum": 0.9},
        },
        {"batch_policy": {"name": "kicks", "small": 4}, "model": MLP_BN},
        {"phases": phase({"loss": 0.5}, **{"training.batch_size": 8})},
        {"phases": phase({"updates": 8}, schedule={"name": "cosine"})},
        {"training": {**BASE["training"], "microbatch": 7}},
        {"evaluation": {"splits": ["test"]}},
        {"snapshots": {"every": {"part": {"share": 0.25}}}},
    ],
)
def test_what_can_run_is_none(sections: dict[str, Any]) -> None:
    """Catches: a check that refuses what works."""
    assert faults_of(**sections) == []


class EveryOther(Policy):
    """A user's own policy: the size alternates."""

    name = "every_other"
    rule = "m alternates"

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def bounds(self) -> tuple[int, int]:
        return min(self.sizes), max(self.sizes)

    def start(self) -> State:
        return {"turn": 0}

    def next(self, state: State, observation: Observation) -> tuple[State, Decision]:
        turn = state["turn"]
        return {"turn": 1 - turn}, Decision(self.sizes[turn])


def test_a_policy_of_one_s_own_is_not_imported_to_be_checked() -> None:
    """Catches: a recipe whose code runs while it is read."""
    policy: JsonValue = {"name": "nowhere:Policy", "sizes": [4, 8]}
    spec = run_spec(batch_policy=policy, training={"epoch_end": "run_on"})
    assert faults_of(batch_policy=policy, training=RUN_ON) == []
    assert spec.max_updates == 40
    assert spec.named_code == ("nowhere:Policy",)


def test_a_constant_policy_may_be_stated() -> None:
    """Catches: a table without a name that is another policy."""
    spec = run_spec(batch_policy={})
    assert spec.batch_policy.build(16) == Constant(16)

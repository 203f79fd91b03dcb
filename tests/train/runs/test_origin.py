"""Runs that begin where another run stood, against continuations made by hand."""

import hashlib
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import nn

from noisekit.core.errors import RunDirectoryError, RunFailedError
from noisekit.records import RunDirectory, Runs, RunStatus, load_tensors, open_runs
from noisekit.train.data.datasets import load_data
from noisekit.train.models import build_model
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.sweeps import sweep

FORKS = Path(__file__).parents[1] / "forks.toml"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
    "adam": {"name": "adam", "learning_rate": 0.01},
}


def recipe_of(folder: Path, **parts: Any) -> Recipe:
    """Return the recipe of forks with parts replaced, at one seed."""
    table = {**tomllib.loads(FORKS.read_text()), "seeds": {"count": 1}, **parts}
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(table))
    return load_recipe(path)


def fork(origin: str, snapshot: str, **settings: Any) -> dict[str, Any]:
    start = {"start.arm": origin, "start.snapshot": snapshot}
    return {"name": "fork", "set": start | settings}


def permutation(seed: int, *names: object) -> torch.Tensor:
    """The order of one pass, made from the stream's name by hand."""
    text = "/".join(map(str, (seed, *names)))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.randperm(32, generator=torch.Generator().manual_seed(number))


class ByHand:
    """A network that is trained step by step, with PyTorch alone."""

    def __init__(self, spec: RunSpec, rate: float) -> None:
        data = load_data(spec.data)
        self.inputs, self.targets = data.train.inputs, data.train.targets
        self.model = build_model(
            spec.model,
            input_shape=data.input_shape,
            num_classes=data.num_classes,
            seed=spec.seed,
        )
        self.drawn = self.vector()
        self.optimizer = self.new_optimizer(spec.optimizer.name, rate)

    def new_optimizer(self, name: str, rate: float) -> torch.optim.Optimizer:
        parameters = self.model.parameters()
        if name == "adam":
            return torch.optim.Adam(parameters, lr=rate, fused=True)
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9)

    def train(self, updates: int, batch: int, *names: object) -> None:
        self.model.train()
        stream = torch.cat([permutation(0, *names, epoch) for epoch in range(12)])
        for update in range(updates):
            chosen = stream[update * batch : (update + 1) * batch]
            self.optimizer.zero_grad()
            outputs = self.model(self.inputs[chosen])
            nn.functional.cross_entropy(outputs, self.targets[chosen]).backward()
            self.optimizer.step()

    def vector(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def weights(runs: Runs, run_id: str, snapshot: str) -> dict[str, torch.Tensor]:
    found = runs.weights(run_id, snapshot)
    return {name: torch.from_numpy(value) for name, value in found.items()}


def assert_same_bits(found: dict[str, torch.Tensor], model: nn.Module) -> None:
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kept", ["reset", "keep"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fork_equals_a_continuation_by_hand(
    name: str, kept: str, tmp_path: Path
) -> None:
    """Same bits, BatchNorm's buffers among them, as training on by hand.

    With ``keep``, momentum and Adam's moments and step counts go on, at the fork's own
    rate; with ``reset`` they begin anew. The order is another one, and both distances
    are from where they say.

    Catches: weights without buffers; a momentum that is lost, or kept when it should
    not be; the trunk's rate in the fork; the trunk's order in place of the fork's.
    """
    rate = OPTIMIZERS[name]["learning_rate"]
    settings = {
        "start.optimizer": kept,
        "start.order": 3,
        "optimizer.learning_rate": rate / 2,
        "training.batch_size": 16,
    }
    arms = [fork("trunk", "mid", **settings), {"name": "trunk"}]
    recipe = recipe_of(tmp_path, optimizer=OPTIMIZERS[name], arms=arms, contrasts=[])
    runs = sweep.run(recipe, tmp_path / "set", workers=0)

    hand = ByHand(recipe.run_specs()[0], rate)
    hand.train(6, 8, "order")
    assert_same_bits(weights(runs, "trunk-seed0", "mid"), hand.model)
    assert_same_bits(weights(runs, "fork-seed0", "start"), hand.model)
    forked = hand.vector()
    if kept == "reset":
        hand.optimizer = hand.new_optimizer(name, rate)
    for group in hand.optimizer.param_groups:
        group["lr"] = rate / 2
    hand.train(12, 16, "another order", 3)
    assert_same_bits(weights(runs, "fork-seed0", "final"), hand.model)

    end = runs.snapshots.set_index(["run_id", "snapshot"]).loc[("fork-seed0", "final")]
    for column, begin in (
        ("distance_from_start", hand.drawn),
        ("distance_from_fork", forked),
    ):
        distance = float((hand.vector() - begin).double().norm())
        assert end[column] == pytest.approx(distance, rel=1e-5), column


def test_distance_may_be_from_the_forks_own_start(tmp_path: Path) -> None:
    """Catches: a key that nothing reads; a fork of a fork measured from its parent."""
    arms = [
        {"name": "trunk"},
        fork("trunk", "final"),
        {**fork("fork", "final"), "name": "second"},
        {
            **fork("fork", "final", **{"start.distance_from": "start"}),
            "name": "own",
        },
    ]
    runs = sweep.run(
        recipe_of(tmp_path, arms=arms, contrasts=[]), tmp_path / "set", workers=0
    )
    rows = runs.snapshots.set_index(["arm", "snapshot"])
    begin = rows.xs("start", level="snapshot")
    assert begin.loc["own", "distance_from_start"] == 0.0
    assert begin.loc["second", "distance_from_fork"] == 0.0
    root = weights(runs, "trunk-seed0", "start")
    there = weights(runs, "fork-seed0", "final")
    gone = sum(
        float((there[name] - root[name]).double().square().sum())
        for name in root
        if name.endswith(("weight", "bias"))
    )
    assert begin.loc["second", "distance_from_start"] == pytest.approx(gone**0.5)
    assert begin["distance_from_fork"].isna().to_dict()["trunk"]


def test_candidates_keep_the_optimizer_of_their_own_update(tmp_path: Path) -> None:
    """A crossing is settled later than it is made; what is kept is of when it was made.

    Catches: weights of one update with the momentum of another.
    """
    base = tomllib.loads(FORKS.read_text())
    arms = [
        {"name": "trunk"},
        fork("trunk", "loss_1.34", **{"start.optimizer": "keep"}),
    ]
    recipe = recipe_of(
        tmp_path,
        arms=arms,
        contrasts=[],
        snapshots={"losses": [1.34], "sustain": 3},
        evaluation={"every": {"updates": 2}},
        compute={**base["compute"], "checkpoint_updates": 1},
    )
    sweep.run(recipe, tmp_path / "set", workers=0)
    trunk = RunDirectory.open(tmp_path / "set/runs/trunk-seed0")
    step = trunk.read("snapshots").rows.to_pylist()[1]["step"]
    assert 0 < step < 12
    hand = ByHand(recipe.run_specs()[0], 0.1)
    hand.train(step, 8, "order")
    state = hand.optimizer.state_dict()["state"]
    arrays, _ = load_tensors(trunk.optimizers / "loss_1.34.safetensors", ours=True)
    found = [torch.from_numpy(a) for a in arrays.values()]
    wanted = [entry["momentum_buffer"] for entry in state.values()]
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))


@pytest.fixture
def one_fork(tmp_path: Path) -> tuple[Path, Recipe]:
    """A finished set of a trunk and a fork that keeps the optimizer."""
    arms = [
        {"name": "trunk"},
        fork("trunk", "mid", **{"start.optimizer": "keep"}),
    ]
    recipe = recipe_of(tmp_path, arms=arms, contrasts=[])
    sweep.run(recipe, tmp_path / "set", workers=0)
    return tmp_path / "set", recipe


def test_the_record_says_where_a_run_began(one_fork: tuple[Path, Recipe]) -> None:
    """Catches: a fork whose origin only the recipe names."""
    path, _ = one_fork
    trunk, fork = (
        RunDirectory.open(path / "runs" / name).manifest
        for name in ("trunk-seed0", "fork-seed0")
    )
    assert trunk.digests is not None
    assert dict(fork.origin) == {
        "run_id": "trunk-seed0",
        "snapshot": "mid",
        "step": "6",
        "sha256": trunk.digests["snapshots/mid.safetensors"],
        "optimizer_sha256": trunk.digests["optimizers/mid.safetensors"],
    }
    assert not trunk.origin
    assert fork.network == {"num_params": len_of_params(path), "batch_norms": 1}
    assert open_runs(path).faults == []


def len_of_params(path: Path) -> int:
    found = open_runs(path).weights("trunk-seed0", "start")
    return sum(a.size for n, a in found.items() if n.endswith(("weight", "bias")))


def test_a_changed_trunk_is_detected(one_fork: tuple[Path, Recipe]) -> None:
    """A trunk that was replaced is named by whoever reads, and no fork goes on from it.

    Catches: a fork half of one trunk and half of another.
    """
    path, _ = one_fork
    run = RunDirectory.open(path / "runs/fork-seed0")
    with run.lock():
        other = {**run.manifest.origin, "sha256": "0" * 64}
        run.write_manifest(replace(run.manifest, origin=other))
    [fault] = open_runs(path).faults
    assert "fork-seed0" in fault
    assert "trunk-seed0" in fault
    assert "changed since" in fault
    with run.lock():
        failed = replace(run.manifest, status=RunStatus.FAILED)
        run.write_manifest(failed)
    with pytest.raises(RunFailedError, match="which has changed since"):
        sweep.resume(path, workers=0)


def test_a_damaged_start_fails_the_fork_alone(one_fork: tuple[Path, Recipe]) -> None:
    """Catches: training on from weights that are not the trunk's."""
    path, _ = one_fork
    file = path / "runs/trunk-seed0/optimizers/mid.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert any("mid.safetensors" in fault for fault in open_runs(path).faults)
    run = RunDirectory.open(path / "runs/fork-seed0")
    with run.lock():
        run.write_manifest(replace(run.manifest, status=RunStatus.FAILED))
    with pytest.raises(RunFailedError) as caught:
        sweep.resume(path, workers=0)
    assert "mid.safetensors" in str(caught.value)


def test_a_start_that_was_never_reached_skips_the_fork(tmp_path: Path) -> None:
    """Skipped is a result: the set is complete, and what starts from the fork as well.

    Catches: a set that can never be finished; a fork from the nearest snapshot instead.
    """
    arms = [
        {"name": "trunk"},
        fork("trunk", "loss_0.0001"),
        {**fork("fork", "final"), "name": "second"},
    ]
    recipe = recipe_of(tmp_path, arms=arms, contrasts=[], snapshots={"losses": [1e-4]})
    runs = sweep.run(recipe, tmp_path / "set", workers=0)
    table = runs.runs.set_index("run_id")
    assert list(table["status"]) == ["done", "skipped", "skipped"]
    assert table.loc["fork-seed0", "reason"] == (
        "trunk-seed0 ended without snapshot 'loss_0.0001' (done: took the 12 updates "
        "that training.stop allows)"
    )
    assert (
        "fork-seed0 ended without snapshot 'final'"
        in table.loc["second-seed0", "reason"]
    )
    assert runs.faults == []
    assert sweep.resume(tmp_path / "set", workers=0).faults == []


def test_a_fork_of_a_diverged_trunk_begins_before_it_diverged(tmp_path: Path) -> None:
    """Catches: a snapshot that was taken in time, thrown away for what came later."""
    arms = [
        {"name": "trunk", "set": {"optimizer.learning_rate": 1e30}},
        fork("trunk", "start"),
        {**fork("trunk", "late"), "name": "late"},
    ]
    base = tomllib.loads(FORKS.read_text())
    recipe = recipe_of(
        tmp_path,
        arms=arms,
        contrasts=[],
        model={**base["model"], "norm": "none"},
        evaluation={"every": {"updates": 1}},
    )
    runs = sweep.run(recipe, tmp_path / "set", workers=0)
    assert list(runs.runs["status"]) == ["diverged", "done", "skipped"]
    assert "diverged: the " in runs.runs["reason"].iloc[2]


def test_a_trunk_has_to_be_complete(tmp_path: Path) -> None:
    """Catches: a fork from a trunk whose files may yet change."""
    from noisekit.train.runs.loop import train_run
    from tests.train.run_specs import new_run, run_spec

    trunk = run_spec(run_id="trunk-seed0", arm="trunk")
    own = run_spec(
        run_id="fork-seed0", arm="fork", start={"arm": "trunk", "snapshot": "final"}
    )
    new_run(trunk, tmp_path)
    run = new_run(own, tmp_path)
    with pytest.raises(
        RunDirectoryError, match="needs to be complete, got one that is"
    ):
        train_run(own, run)

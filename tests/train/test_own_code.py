"""Recipes that name the user's own code: what runs, and what is never imported."""

import sys
from pathlib import Path

import pytest
import torch

from noisekit.cli.pipeline import write_report
from noisekit.core import references
from noisekit.core.errors import UsageError
from noisekit.records import open_runs
from noisekit.train.data.datasets import load_data
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.runs.revisit import revisit
from noisekit.train.sweeps import sweep
from noisekit.train.sweeps.run_status import status

TINY = Path(__file__).with_name("tiny.toml")
CODE = """
import torch
from pathlib import Path
from torch import nn

Path(__file__).with_name("imported").touch()

def spirals(noise):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(48) % 3
    return torch.randn(48, 2, generator=generator) * noise + targets[:, None], targets

def narrow(input_shape, num_classes, width):
    return nn.Sequential(
        nn.Linear(*input_shape, width), nn.Tanh(), nn.Linear(width, num_classes)
    )

def margins(outputs, targets):
    return nn.functional.multi_margin_loss(outputs, targets, reduction="none")

class HalfSpeed(torch.optim.SGD):
    def __init__(self, params, lr, damping):
        super().__init__(params, lr=lr)

def answer(runs):
    from noisekit.report import AnalysisResult
    return AnalysisResult(name="own", question="?", answer=f"{len(runs)} runs seen")
"""
SETTINGS = {
    "data.name": "MODULE:spirals",
    "data.noise": "0.5",
    "data.train": "32",
    "model.name": "MODULE:narrow",
    "model.width": "5",
    "optimizer.name": "MODULE:HalfSpeed",
    "optimizer.damping": "0.1",
    "training.loss": "MODULE:margins",
    "analyses": '["MODULE:answer"]',
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module, importable under a name of its own."""
    path = tmp_path / f"mine_{tmp_path.name}.py".replace("-", "_")
    path.write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    sys.modules.pop(path.stem, None)


def recipe_of(module: Path) -> Recipe:
    text = TINY.read_text().replace("hidden = [4]", "")
    path = module.with_suffix(".toml")
    path.write_text(text)
    overrides = {k: v.replace("MODULE", module.stem) for k, v in SETTINGS.items()}
    return load_recipe(path, overrides=overrides)


def test_everything_may_be_the_user_s_own(module: Path) -> None:
    """Data, network, optimizer, loss and analysis, with their own keys as arguments.

    Catches: a hard-wired loss; arguments that are lost between TOML, set and run; a
    resume that cannot read what it recorded.
    """
    recipe = recipe_of(module)
    runs = sweep.run(recipe, module.parent / "set", workers=0, allow_code=True)
    assert set(runs.runs["status"]) == {"done"}
    assert runs.weights("slow-seed0", "final")["0.weight"].shape == (5, 2)
    with references.allow_code():
        seen = revisit(runs, "slow-seed0", "final")
        data = load_data(recipe.data).train
        outputs = seen.model(data.inputs).detach()
        losses = torch.nn.functional.multi_margin_loss(outputs, data.targets)
        wrong = (outputs.argmax(1) != data.targets).double().mean()
        answer, _, _ = write_report(module.parent / "set", None)
    row = runs.snapshots.query("run_id == 'slow-seed0' and snapshot == 'final'").iloc[0]
    assert row["train_loss"] == pytest.approx(float(losses), rel=1e-5)
    assert row["train_error"] == float(wrong)
    assert answer == "4 runs seen"
    sweep.resume(module.parent / "set", workers=0, allow_code=True)


def test_code_runs_only_where_allowed(module: Path) -> None:
    """The refusal names the modules, and comes before anything is imported or made.

    Catches: a recipe from elsewhere that runs its code because it was loaded.
    """
    recipe = recipe_of(module)
    with pytest.raises(
        UsageError, match=rf"would import {module.stem}, with .* add --allow-code"
    ):
        sweep.run(recipe, module.parent / "set", workers=0)
    assert not (module.parent / "imported").exists()
    assert not (module.parent / "set").exists()
    assert not references.code_allowed()


def test_reading_a_set_from_elsewhere_imports_nothing(module: Path) -> None:
    """Status, tables, weights and the report; a network of its own is not rebuilt.

    Catches: a report that imports an analysis which the recipe names; a permission
    that outlives the run.
    """
    path = module.parent / "set"
    sweep.run(recipe_of(module), path, workers=0, allow_code=True)
    (module.parent / "imported").unlink()
    sys.modules.pop(module.stem)
    assert {row.status for row in status(path)} == {"done"}
    runs = open_runs(path)
    assert len(runs.evaluations) > 0
    answer, _, _ = write_report(path, None)
    assert "is code of the recipe's own and was not imported" in answer
    with pytest.raises(UsageError, match="was not imported"):
        revisit(runs, "slow-seed0", "final")
    with pytest.raises(UsageError, match="add --allow-code"):
        sweep.resume(path, workers=0)
    assert not (module.parent / "imported").exists()


def test_workers_have_the_same_leave(module: Path) -> None:
    """Catches: a permission that stays in the parent process."""
    runs = sweep.run(
        recipe_of(module), module.parent / "set", workers=1, seeds=1, allow_code=True
    )
    assert set(runs.runs["status"]) == {"done"}


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("no_such_module_here:f", "ModuleNotFoundError"),
        ("math:no_such_name", "AttributeError"),
    ],
)
def test_what_is_not_there_is_named(reference: str, said: str) -> None:
    """Catches: Python's own error, which does not say which key it came from."""
    with references.allow_code(), pytest.raises(UsageError, match=said):
        references.resolve(reference)

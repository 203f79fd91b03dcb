"""Runs of a user's own recipe, whose arms differ in their network alone."""

from pathlib import Path

import pytest

RECIPE = """
format = 2
name = "norm_or_not"
question = "Does BatchNorm change sharpness?"
analyses = ["sharpness_vs_batch_size"]
verdicts = true
[data]
name = "digits"
train = 256
validation = 64
test = 64
[model]
name = "mlp"
hidden = [8]
norm = "none"
[optimizer]
name = "sgd"
learning_rate = 0.1
[training]
batch_size = 32
stop = { updates = 32 }
[evaluation]
every = { updates = 8 }
[snapshots]
losses = [1.5]
at = { equal_updates = { updates = 32 } }
[probe]
every = 0
[measure]
everywhere = ["lambda_max"]
settings = { lambda_max = { max_matvecs = 40 } }
[seeds]
count = 2
[[arms]]
name = "plain"
[[arms]]
name = "with_batchnorm"
set = { "model.norm" = "batch" }
[rules]
min_pairs = 2
[[contrasts]]
name = "lambda_max_at_equal_updates"
quantity = "lambda_max"
treatment = "with_batchnorm"
reference = "plain"
snapshot = "equal_updates"
scale = "ratio"
margin = 1.5
primary = true
description = "same number of updates"
"""


@pytest.fixture(scope="session")
def network_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return finished runs of two networks, made once; not to be changed."""
    import noisekit as nk

    folder = tmp_path_factory.mktemp("networks")
    (folder / "recipe.toml").write_text(RECIPE)
    nk.run(nk.load_recipe(folder / "recipe.toml"), folder / "runs", workers=0)
    return folder / "runs"

"""Fixtures that several folders share."""

from pathlib import Path

import pytest
import torch

# Small tensors gain nothing from a second thread, and test workers share the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished sweep of the smoke profile, made once; not to be changed."""
    import noisekit as nk

    folder = tmp_path_factory.mktemp("sweep") / "smoke"
    nk.run(nk.load_recipe("small_vs_large_batch", profile="smoke"), folder, workers=0)
    return folder

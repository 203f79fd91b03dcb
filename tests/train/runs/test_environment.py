"""What of a process decides bits, set and given back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from noisekit.core.errors import DeviceMismatchError, RunDirectoryError
from noisekit.records import RunDirectory
from noisekit.train.data.datasets import load_data
from noisekit.train.recipes.sections import ComputeSpec
from noisekit.train.runs.environment import begin, computing
from tests.train.run_specs import new_run, run_spec


def test_the_process_is_given_back() -> None:
    """Threads, strictness and the global random state, also after an error.

    Catches: a library call that leaves PyTorch strict or single-threaded.
    """
    torch.manual_seed(5)
    before = (torch.get_num_threads(), torch.get_rng_state())

    def fail_inside() -> None:
        with computing(ComputeSpec(threads=3)) as threads:
            assert threads == torch.get_num_threads() == 3
            assert torch.are_deterministic_algorithms_enabled()
            torch.rand(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_device_that_is_not_there_is_refused() -> None:
    """Catches: an assertion of PyTorch about CUDA, without what to do."""
    with (
        pytest.raises(DeviceMismatchError, match=r"got 'cuda:7' .*; use --device cpu"),
        computing(ComputeSpec(device="cuda:7")),
    ):
        pass


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return new_run(run_spec(), tmp_path)


def test_the_data_are_on_record(run: RunDirectory) -> None:
    """Catches: a run whose data nobody can identify."""
    data = load_data(run_spec().data)
    begin(run, data)
    assert run.manifest.data["sha256"] == data.sha256
    assert run.manifest.faults == ()


def test_other_data_are_refused(run: RunDirectory) -> None:
    """Catches: half a run on one data set and half on another."""
    data = load_data(run_spec().data)
    begin(run, data)
    with pytest.raises(RunDirectoryError, match="needs the data that it began with"):
        begin(run, replace(data, sha256="0" * 64))


def test_other_software_and_hardware_are_on_record(run: RunDirectory) -> None:
    """A resume elsewhere goes on, but nobody is told that the bits are the same.

    Catches: silence about another torch; a warning on each resume.
    """
    data = load_data(run_spec().data)
    begin(run, data)
    before = run.manifest
    versions = {**before.versions, "torch": "2.6.0", "noisekit": "0.0.9"}
    host = {**before.host, "processor": "abacus"}
    run.write_manifest(replace(before, versions=versions, host=host))
    begin(run, data)
    begin(run, data)
    faults = run.manifest.faults
    assert len(faults) == 3
    assert faults[0].startswith("begun with torch 2.6.0, resumed with ")
    assert faults[0].endswith("its bits are not those of an unbroken run")
    assert faults[1].startswith("begun with noisekit 0.0.9, resumed with ")
    assert faults[2].startswith("begun with processor abacus, resumed with ")
    assert run.manifest.versions["torch"] == "2.6.0"

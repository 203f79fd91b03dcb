"""A probe that writes a run directory, and the report of such a run."""

from pathlib import Path

import pytest
import torch
from torch import nn

import noisekit as nk
from noisekit.core.errors import RunLockedError, UsageError


def train(probed: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(8, 5, generator=generator)
        targets = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(probed(inputs), targets).backward()
        optimizer.step()


@pytest.fixture
def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_saved_readings_are_the_probe_s_own(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    """The table on disk holds each reading once, with its numbers.

    Catches: a sink that is called twice, rows lost at the end.
    """
    model, optimizer = net
    with nk.attach(model, optimizer, save_to=tmp_path / "mine") as probe:
        train(model, optimizer, 7)
    steps = nk.open_runs(tmp_path / "mine").steps
    assert list(steps["step"]) == list(range(1, 8))
    for row, reading in zip(steps.itertuples(), probe.readings, strict=True):
        assert row.grad_sq_norm == pytest.approx(reading.grad_sq_norm.value)
        assert row.variance_trace == pytest.approx(reading.variance_trace.value)


def test_run_is_readable_while_it_is_written(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Catches: a store that can be read only when it is sealed."""
    model, optimizer = net
    with nk.attach(model, optimizer, save_to=tmp_path / "mine"):
        train(model, optimizer, 300)
        assert len(nk.open_runs(tmp_path / "mine").steps) > 0


def test_second_writer_is_refused(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Catches: two loops that write into one run."""
    model, optimizer = net
    with (
        nk.attach(model, optimizer, save_to=tmp_path / "mine"),
        pytest.raises(RunLockedError, match="mine"),
    ):
        nk.attach(model, optimizer, save_to=tmp_path / "mine")


def test_refused_attachment_frees_the_directory(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    """A wrong option leaves no lock behind.

    Catches: a run directory that stays locked after attach raised.
    """
    model, optimizer = net
    with pytest.raises(UsageError):
        nk.attach(model, optimizer, estimator="ghost", save_to=tmp_path / "mine")
    with nk.attach(model, optimizer, save_to=tmp_path / "mine"):
        train(model, optimizer, 1)

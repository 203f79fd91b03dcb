"""A probe that writes a run directory, and the report of such a run."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pandas as pd
import pytest
import torch
from torch import nn

import noisekit as nk
from noisekit.core.errors import RunLockedError, StorageError, UsageError
from noisekit.integrations import recording
from noisekit.probes import MetricStep, ProbeOptions, StepMetric, StepQuantity


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


def test_a_budget_and_estimators_side_by_side_are_recorded(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Catches: options that are accepted here and lost on the way to the probe."""
    model, optimizer = net
    with nk.attach(
        model,
        optimizer,
        estimator=("per_example", "chunks"),
        num_chunks=2,
        budget=0.5,
        save_to=tmp_path / "mine",
    ) as probe:
        train(model, optimizer, 30)
    steps = nk.open_runs(tmp_path / "mine").steps
    assert list(steps["step"]) == [reading.step for reading in probe.readings]
    assert 2 <= len(steps) <= 30
    assert probe.overhead.budget == 0.5


def test_every_quantity_is_recorded(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Also those that the first step has not got.

    Catches: a column that the table does not know.
    """
    model, optimizer = net
    with nk.attach(
        model,
        optimizer,
        quantities=("norm_test", "gsnr", "update_size", "gradient_cosine"),
        save_to=tmp_path / "mine",
    ) as probe:
        train(model, optimizer, 4)
    steps = nk.open_runs(tmp_path / "mine").steps
    for name in ("norm_test", "debiased_gsnr", "update_size", "gradient_cosine"):
        wanted = [reading.row()[name] for reading in probe.readings]
        assert list(steps[name]) == pytest.approx(wanted, nan_ok=True), name
    assert steps["gradient_cosine"].notna().sum() == 3


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_s_ending_makes_it_text(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path, ending: str
) -> None:
    """Catches: a run directory called readings.csv; a cosine that comes too late."""
    model, optimizer = net
    path = tmp_path / f"readings.{ending}"
    with nk.attach(
        model, optimizer, quantities="gradient_cosine", save_to=path
    ) as probe:
        train(model, optimizer, 3)
    table = pd.read_csv(path) if ending == "csv" else pd.read_json(path, lines=True)
    assert list(table["step"]) == [1, 2, 3]
    assert list(table["gradient_cosine"].isna()) == [True, False, False]
    wanted = [reading.row()["grad_sq_norm"] for reading in probe.readings]
    assert list(table["grad_sq_norm"]) == pytest.approx(wanted)


def test_an_unwritable_file_leaves_no_probe(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Catches: hooks left on the model after attach raised."""
    model, optimizer = net
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(StorageError, match=r"a sink needs a file .*taken\.csv"):
        nk.attach(model, optimizer, save_to=tmp_path / "taken.csv")
    assert not model._forward_pre_hooks


def test_attach_has_the_options_of_a_probe() -> None:
    """The same names in the same order, with the same types and defaults, described.

    Catches: an option that one of the two has not got, or that no text describes.
    """
    own = dict(inspect.signature(nk.attach).parameters)
    options = inspect.signature(ProbeOptions).parameters
    assert list(own) == ["model", "optimizer", *options, "save_to"]
    own_types, types = get_type_hints(nk.attach), get_type_hints(ProbeOptions)
    for name, option in options.items():
        assert own[name].default == option.default, name
        if name != "sinks":
            assert types[name] == own_types[name], name  # beside their bounds
    text = inspect.getdoc(nk.attach) or ""
    arguments = text.partition("Args:\n")[2].partition("\nRaises:")[0]
    assert re.findall(r"^    (\w+): ", arguments, re.MULTILINE) == list(own)


def test_every_option_reaches_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: one option passed on as another, or not at all."""
    got: dict[str, object] = {}

    def attach_probe(model: object, optimizer: object, options: object) -> None:
        got.update(options.__dict__, model=model, optimizer=optimizer)

    wanted = {name: object() for name in inspect.signature(nk.attach).parameters}
    wanted["save_to"] = None
    monkeypatch.setattr(recording, "attach_probe", attach_probe)
    names = [field.name for field in dataclasses.fields(ProbeOptions)]
    unchecked = dataclasses.make_dataclass("Options", names)
    monkeypatch.setattr(recording, "ProbeOptions", unchecked)
    nk.attach(**wanted)  # type: ignore[arg-type]
    del wanted["save_to"]
    assert got == wanted


def test_a_metric_of_one_s_own_needs_a_text_file(
    net: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Catches: a run directory whose table breaks off at the first reading."""

    class Steps(StepMetric):
        name = "my_metric"

        def value(self, step: MetricStep) -> StepQuantity:
            return StepQuantity(torch.tensor([float(step.reading.step)]))

    model, optimizer = net
    with pytest.raises(
        UsageError, match=r"quantities of the vocabulary, got my_metric"
    ):
        nk.attach(model, optimizer, quantities=[Steps()], save_to=tmp_path / "mine")
    assert not model._forward_pre_hooks
    path = tmp_path / "mine.csv"
    with nk.attach(model, optimizer, quantities=[Steps()], save_to=path):
        train(model, optimizer, 2)
    assert list(pd.read_csv(path)["my_metric"]) == [1.0, 2.0]

"""All estimators on the same steps: unbiased, silent to the device, and harmless."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import UsageError
from noisekit.integrations import attach
from noisekit.integrations import attach as recorded
from noisekit.noise import GradientMoments, ratio_of_averages
from noisekit.probes import Probe
from noisekit.records import open_runs, table
from tests.probes.models import CASES, MLP, Case

NAMES = (
    "per_example",
    "rows",
    "chunks",
    "accumulation",
    "random_signs",
    "norm_layers",
    "preconditioned",
)


def attached(model: nn.Module) -> tuple[Probe, torch.optim.Optimizer]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    probe = attach(model, optimizer, estimator=NAMES, calibrate_every=3)  # type: ignore[arg-type]
    return probe, optimizer


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            (functional.cross_entropy(model(data[0]), data[1]) / 2).backward()
        optimizer.step()


# Reentrant checkpoints have no second backward pass; replays ask for shapes only.
QUIET = [c for c in CASES if "reentrant" not in c.name and "square" not in c.name]


@pytest.mark.parametrize("case", QUIET, ids=lambda c: c.name)
def test_no_estimator_asks_the_device(case: Case) -> None:
    """On the meta device every transfer to the host raises.

    Catches: ``.item()``, a branch on a value, rows or signs drawn on another device.
    """
    model = case.model(torch.float32).to("meta")
    data = tuple(tensor.to("meta") for tensor in case.data(torch.float32))
    probe, optimizer = attached(model)
    train(model, optimizer, data, 2)
    last = probe.readings[-1]
    if last.coverage.complete:
        assert {"rows", "chunks", "accumulation"} <= set(last.estimates)
        for moments in last.estimates.values():
            assert moments.sum_sq_norm.is_meta


@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_losses_do_not_ask_either(weighted: bool) -> None:
    """Catches: a sum of class weights turned into a Python number."""
    weight = torch.ones(3, device="meta") if weighted else None
    loss = nn.CrossEntropyLoss(weight=weight)
    model = MLP.model(torch.float32).to("meta")
    optimizer = torch.optim.Adam(model.parameters())
    probe = attach(model, optimizer, estimator=NAMES, loss_fn=loss)  # type: ignore[arg-type]
    inputs, targets = (t.to("meta") for t in MLP.data(torch.float32))
    for _ in range(2):
        for _ in range(2):
            loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(r.coverage.complete for r in probe.readings)


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied_embedding", "attention"])
def test_no_estimator_changes_a_bit_of_the_training(name: str) -> None:
    """Catches: a hook that keeps a gradient from being moved, and rounds anew."""
    case = next(case for case in CASES if case.name == name)
    results = []
    for probed in (False, True):
        model, data = case.model(torch.float32), case.data(torch.float32)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if probed:
            _, optimizer = attached(model)
        train(model, optimizer, data, 3)
        results.append((model.state_dict(), torch.get_rng_state()))
    for key, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][key]), key
    assert torch.equal(results[0][1], results[1][1])


class Sum(nn.Module):
    """A linear function whose gradient at an example is the example itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(size // 2, 1, bias=False)
        self.second = nn.Linear(size // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        total: Tensor = self.first(a) + self.second(b)
        return total


def test_every_estimator_is_unbiased_on_known_gradients() -> None:
    """Gradients ``G + S^(1/2) z`` in micro-batches of 5 and 9 that weigh by size.

    Means over 600 steps lie within 4 standard errors of ``tr Σ`` and ``|G|²``.

    Catches: a clamp per step; n for n - 1; chunks and micro-batches of one size
    supposed; rows that are counted as all; the last micro-batch alone.
    """
    torch.manual_seed(0)
    model = Sum(8).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    names = ("per_example", "rows", "chunks", "accumulation", "random_signs")
    probe = attach(
        model,
        optimizer,
        estimator=names,
        microbatch_weights="by_size",
        row_share=0.4,
        num_chunks=3,
    )
    generator = torch.Generator().manual_seed(1)
    mean, scales = torch.full((8,), 0.15).double(), torch.linspace(0.2, 1.5, 8).double()
    for _ in range(600):
        optimizer.zero_grad()
        for n in (5, 9):
            z = torch.randn(n, 8, generator=generator, dtype=torch.float64)
            (model(mean + scales * z).mean() * n / 14).backward()
        optimizer.step()
    truth = float(scales.square().sum()), float(mean.square().sum())
    for name in names:
        parts = [r.estimates[name].trace_and_norm() for r in probe.readings]
        for position, expected in enumerate(truth):
            values = torch.stack([part[position] for part in parts])
            error = float(values.std()) / math.sqrt(len(values))
            assert abs(float(values.mean()) - expected) < 4 * error, name
        assert min(float(norm) for _, norm in parts) < 0  # never clamped


def test_rows_of_a_table_give_the_estimates_again() -> None:
    """Catches: statistics from which an estimator's values do not follow."""
    case = next(case for case in CASES if case.name == "cnn")
    model = case.model()
    probe, optimizer = attached(model)
    train(model, optimizer, case.data(), 2)
    reading, row = probe.readings[1], probe.readings[1].row()
    columns = {column.name for column in table("steps").columns}
    assert set(row) <= columns
    assert all(type(value) in (int, float, str) for value in row.values())
    for name in NAMES:
        prefix = "" if name == "per_example" else f"{name}_"
        found = GradientMoments.from_columns(row, prefix).parts()
        expected = reading.estimates[name].parts()
        assert found is not None
        assert expected is not None
        assert found.variance_trace == pytest.approx(expected.variance_trace)
        assert found.debiased_grad_sq_norm == pytest.approx(
            expected.debiased_grad_sq_norm
        )
        assert found.trace_variance == pytest.approx(expected.trace_variance)


def test_rows_are_drawn_from_the_generator_that_is_given() -> None:
    """Catches: a seed of the probe's own whatever the user says."""
    chosen = []
    for seed in (5, 5, 6):
        model, generator = MLP.model(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        probe = attach(
            model, optimizer, estimator="rows", row_share=0.5, generator=generator
        )
        train(model, optimizer, MLP.data(), 1)
        chosen.append(probe.readings[0].variance_trace.value)
    assert chosen[0] == chosen[1] != chosen[2]


def test_draws_go_on_where_they_were() -> None:
    """A resumed probe draws the rows and signs that the first one would have.

    Catches: a generator that starts anew, or calibration lost.
    """
    rows = []
    for broken in (False, True):
        model, data = MLP.model(), MLP.data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        names = ("rows", "random_signs", "per_example")
        probe = attach(model, optimizer, estimator=names)
        train(model, optimizer, data, 2)
        if broken:
            state = probe.state_dict()
            probe.detach()
            probe = attach(model, optimizer, estimator=names)
            probe.load_state_dict(state)
        train(model, optimizer, data, 2)
        rows.append(probe.readings[-1].row())
    assert rows[0] == rows[1]


def test_accumulation_does_not_move_the_norm_test() -> None:
    """Cockpit sets the last micro-batch's rows against the accumulated gradient.

    The same 32 examples then give it 100 %, 72 % and 58 % of the truth in one, two and
    four micro-batches; they have to give the same here.
    """
    case = Case("batch", MLP.build, (32, 6), MLP.ways)
    found, of_the_last = [], []
    for parts in (1, 2, 4):
        model, (inputs, targets) = case.model(), case.data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        probe = attach(model, optimizer)
        for rows, classes in zip(
            inputs.chunk(parts), targets.chunk(parts), strict=True
        ):
            (functional.cross_entropy(model(rows), classes) / parts).backward()
        optimizer.step()
        reading = probe.readings[0]
        norm = reading.grad_sq_norm.value
        found.append(math.sqrt(reading.variance_trace.value / (32 * norm)))
        assert reading.example_sq_norms is not None
        last = reading.example_sq_norms[-32 // parts :] / parts**2
        n = len(last)
        variance = (float(last.sum()) - n * norm) / (n - 1)
        of_the_last.append(math.sqrt(max(0.0, variance) / (n * norm)))
    assert found[1:] == pytest.approx(found[:1] * 2)
    assert of_the_last[0] == pytest.approx(found[0])
    assert of_the_last[1] < 0.9 * found[0]
    assert of_the_last[2] < 0.8 * found[0]


def test_the_window_of_an_average_is_stated() -> None:
    """Catches: a window that is taken from the start, or of steps not read."""
    model, data = MLP.model(), MLP.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    probe = attach(model, optimizer, estimator=("per_example", "chunks"))
    train(model, optimizer, data, 6)
    for name in ("per_example", "chunks"):
        parts = [r.estimates[name].trace_and_norm() for r in probe.readings[-3:]]
        found = probe.simple_noise_scale(window=3, estimator=name)
        assert found.num_samples == 3
        assert found.ratio is not None
        traces = [float(trace) for trace, _ in parts]
        assert found.ratio.numerator == pytest.approx(sum(traces) / 3)
    assert probe.simple_noise_scale().num_samples == 6


def test_what_was_not_read_cannot_be_averaged() -> None:
    """Catches: a KeyError, or a silent NaN."""
    model = MLP.model()
    probe = attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    message = (
        "were read, per_example, ranks, accumulation, got 'rows'; name it in attach"
    )
    with pytest.raises(UsageError, match=message):
        probe.simple_noise_scale(estimator="rows")
    with pytest.raises(UsageError, match="window needs to be at least 1, got 0"):
        probe.simple_noise_scale(window=0)


def test_rows_of_a_run_have_the_same_columns() -> None:
    """The first step has no second moments, and no ranks at any.

    Catches: a column that a text file's header does not have.
    """
    model = MLP.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    probe = attach(model, optimizer, estimator=("auto", "preconditioned", "ranks"))
    train(model, optimizer, MLP.data(), 2)
    first, second = (reading.row() for reading in probe.readings)
    assert list(first) == list(second)
    assert math.isnan(first["preconditioned_mean_sq_norm"])
    assert second["preconditioned_mean_sq_norm"] > 0
    assert second["ranks_num_units"] == 0


def test_estimates_can_be_made_again_from_a_run_directory(tmp_path: Path) -> None:
    """Catches: statistics that stay in memory, or columns that the table lacks."""
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = ("per_example", "rows", "chunks", "accumulation")
    probe = recorded(model, optimizer, estimator=names, save_to=tmp_path / "run")
    train(model, optimizer, MLP.data(), 3)
    probe.detach()
    steps = open_runs(tmp_path / "run").steps
    for name in names:
        prefix = "" if name == "per_example" else f"{name}_"
        parts = [
            GradientMoments.from_columns(row, prefix).trace_and_norm()
            for row in steps.to_dict("records")
        ]
        again = ratio_of_averages(*(torch.stack(c) for c in zip(*parts, strict=True)))
        found = probe.simple_noise_scale(estimator=name)
        mine, theirs = again.simple_noise_scale.interval(), found.interval()
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high))

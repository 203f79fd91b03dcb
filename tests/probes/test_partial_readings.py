"""Readings that cover a part of the parameters, and what is said of missing noise."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import ProbeAdvice
from noisekit.core.results import Status
from noisekit.integrations import attach
from noisekit.probes import Probe
from tests.probes.models import MLP
from tests.reference import noise as reference

NUM, LENGTH, WIDTH, WORDS = 6, 5, 4, 7


class Language(nn.Module):
    """Factors of positions that all sequences share, and a loss of the batch inside.

    The factors are no layer's parameter and no summand, and a replay of the model has
    one output for all examples: nothing tells their per-example gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        hidden = self.table(words) * self.positions
        return functional.cross_entropy(
            self.head(hidden).flatten(0, 1), targets.flatten()
        )


def sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    words, targets = torch.randint(WORDS, (2, NUM, LENGTH), generator=generator)
    return words, targets


def step(model: Language, optimizer: torch.optim.Optimizer, num_parts: int = 1) -> None:
    optimizer.zero_grad()
    for words, targets in zip(*(t.chunk(num_parts) for t in sequences()), strict=True):
        (model(words, targets) / num_parts).backward()
    optimizer.step()


def attached(**options: object) -> tuple[Probe, Language, torch.optim.Optimizer]:
    model = Language().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return attach(model, optimizer, **options), model, optimizer  # type: ignore[arg-type]


def rows_of(model: Language) -> dict[str, Tensor]:
    """Every sequence's own gradient, by one backward pass each."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    words, targets = sequences()
    single = [
        torch.autograd.grad(model(words[i : i + 1], targets[i : i + 1]), parameters)
        for i in range(NUM)
    ]
    return {
        n: torch.stack(g) for n, g in zip(names, zip(*single, strict=True), strict=True)
    }


# ------------------------------------------------------------------ what is covered


@pytest.mark.parametrize("estimator", ["auto", "chunks"])
def test_one_parameter_does_not_blank_the_others(estimator: str) -> None:
    """Against one backward pass per sequence, of the parameters that were read.

    Catches: NaN for 3 of 4 parameters that are exact; the noise of a part set against
    the gradient of all; a reading that passes for a whole one.
    """
    probe, model, optimizer = attached(estimator=estimator, num_chunks=NUM)
    for _ in range(5):
        step(model, optimizer)
    reading, rows = probe.readings[-1], rows_of(model)
    left_out = rows.pop("positions")
    assert list(reading.coverage.unread) == ["positions"]
    assert not reading.coverage.complete
    wanted = reference.variance_trace(list(rows.values()))
    assert reading.variance_trace.value == pytest.approx(wanted, rel=1e-9)
    debiased = reference.debiased_grad_sq_norm(list(rows.values()))
    assert reading.debiased_grad_sq_norm.value == pytest.approx(debiased, rel=1e-9)
    whole = sum(float(g.mean(0).square().sum()) for g in (*rows.values(), left_out))
    assert reading.grad_sq_norm.value == pytest.approx(whole, rel=1e-9)
    size = sum(p.numel() for p in model.parameters())
    assert reading.share_read.params == pytest.approx(1 - LENGTH * WIDTH / size)
    share = 1 - float(left_out.mean(0).square().sum()) / whole
    assert reading.share_read.grad_sq_norm == pytest.approx(share, rel=1e-9)
    assert reading.row()["coverage"] == pytest.approx(reading.share_read.params)
    for layer in reading.layers:
        if layer.name == "positions":
            assert layer.variance_trace.status is Status.UNAVAILABLE
            assert "its outputs are not" in str(layer.variance_trace)
            assert layer.grad_sq_norm.value > 0
        else:
            own = reference.variance_trace([rows[layer.name]])
            assert layer.variance_trace.value == pytest.approx(own, rel=1e-9)
    assert "3 of 4 parameters by" in str(reading)
    assert "not read: positions (" in str(reading)


def test_a_parameter_that_nothing_reads_is_given_up() -> None:
    """Catches: the whole model replayed in vain at every reading, for ever."""
    probe, model, optimizer = attached()
    for _ in range(6):
        step(model, optimizer)
    plan = probe._recorder.plan
    assert [probe._recorder.names[i] for i in plan.left_out] == ["positions"]
    assert all(site.path for site in plan.sites)
    unread = [reading.coverage.unread for reading in probe.readings]
    assert all(list(each) == ["positions"] for each in unread)
    state = probe.state_dict()
    again, model, optimizer = attached()
    again.load_state_dict(state)
    step(model, optimizer)
    assert again.readings[0].coverage.unread == unread[-1]
    assert all(site.path for site in again._recorder.plan.sites)


def test_auto_takes_the_micro_batches_that_are_there() -> None:
    """From the reading on that follows the first which per-example norms left short.

    Catches: a part of the model where accumulation tells of all of it.
    """
    probe, model, optimizer = attached()
    for _ in range(3):
        step(model, optimizer, num_parts=3)
    assert [reading.estimator for reading in probe.readings] == [
        "per_example",
        "accumulation(2)",
        "accumulation(2)",
    ]
    last = probe.readings[-1]
    assert last.coverage.complete
    parts = torch.cat([rows.flatten(1) for rows in rows_of(model).values()], 1)
    means = parts.unflatten(0, (3, 2)).mean(1)
    wanted = 2 * reference.variance_trace([means])
    assert last.variance_trace.value == pytest.approx(wanted, rel=1e-9)


def test_a_second_estimator_of_a_part_is_missing() -> None:
    """Catches: moments of a part beside those of the whole, under no word."""
    probe, model, optimizer = attached(estimator=("accumulation", "per_example"))
    step(model, optimizer, num_parts=2)
    reading = probe.readings[0]
    assert list(reading.estimates) == ["accumulation"]
    assert reading.coverage.missing["per_example"].startswith("it covers a part: ")


# ------------------------------------------------------------------------ smoothing


def test_whole_and_partial_readings_are_not_mixed() -> None:
    """Catches: an average over readings of different parameters."""
    probe, model, optimizer = attached()
    for num_parts in (3, 3, 1, 3, 3):
        step(model, optimizer, num_parts)
    partial = [bool(reading.coverage.unread) for reading in probe.readings]
    assert partial == [True, False, True, False, False]
    found = probe.simple_noise_scale()
    assert found.note == "2 left out that cover other parameters"
    assert found.value == pytest.approx(
        probe.simple_noise_scale(window=2).value, rel=1e-9
    )
    only = attached()
    for _ in range(3):
        step(*only[1:])
    note = only[0].simple_noise_scale().note
    assert note is not None
    assert note.startswith("3 of 4 parameters by")


def test_a_reading_that_is_not_finite_is_counted_and_left_out() -> None:
    """Catches: one overflow that makes the whole window NaN."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer)
    for number in range(4):
        optimizer.zero_grad()
        scale = math.inf if number == 2 else 1.0
        (functional.cross_entropy(model(inputs), targets) * scale).backward()
        if number == 2:
            optimizer.zero_grad()  # the weights stay finite
        optimizer.step()
    broken = probe.readings[2]
    assert str(broken.simple_noise_scale) == (
        "nan [unavailable: the gradient is not finite]"
    )
    found = probe.simple_noise_scale()
    assert found.note == "1 of 4 readings left out: not finite"
    assert found.value == pytest.approx(probe.simple_noise_scale(window=1).value)
    assert str(found).endswith("(1 of 4 readings left out: not finite)")


# ------------------------------------------------------------------------- one warning


def batch_norm_step(probe_options: dict[str, object], steps: int = 2) -> Probe:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer, **probe_options)  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    return probe


def test_missing_noise_is_said_once_with_the_way_out() -> None:
    """In a warning, in the probe's representation, and in place of a value.

    Catches: "50 readings in 50 steps" of NaN; a warning at every step.
    """
    with pytest.warns(ProbeAdvice) as caught:
        probe = batch_norm_step({}, steps=3)
    reason = (
        "no noise: BatchNorm in training mode couples the examples (1); use "
        "estimator='ghost' with loss_fn= and ghost_batch=, or accumulate gradients "
        "over several micro-batches"
    )
    assert [str(w.message) for w in caught] == [f"step 1: {reason}. Training goes on."]
    assert repr(probe) == f"<Probe: 3 readings in 3 steps; {reason}>"
    value = probe.simple_noise_scale()
    assert value.status is Status.UNAVAILABLE
    assert str(value) == f"nan [unavailable: {reason.removeprefix('no noise: ')}]"
    assert str(probe.readings[0]).splitlines()[2] == f"  coverage: {reason}"


def test_a_reading_that_the_next_one_completes_is_no_cause_for_a_warning() -> None:
    """A site is widened after the first reading, and reads from the second on.

    Catches: advice that is out of date one step later.
    """

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + functional.linear(x, self.layer.weight)

    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = attach(model, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
    assert [reading.coverage.complete for reading in probe.readings] == [False, True]
    assert repr(probe) == "<Probe: 2 readings in 2 steps>"


def test_steps_without_a_gradient_are_said() -> None:
    """Catches: an empty list of readings, and no word why."""
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    with pytest.warns(
        ProbeAdvice, match="step 1: nothing was read: the parameters had"
    ):
        optimizer.step()
    assert "nothing was read" in repr(probe)
    assert str(probe.simple_noise_scale()) == "nan [unavailable: no step was read]"


@pytest.mark.parametrize("stepped", [False, True])
def test_loops_that_never_step_the_optimizer_are_said(stepped: bool) -> None:
    """As sharpness-aware wrappers do, or ``p.data.add_``; not if there was a step.

    Catches: no reading and no word; a warning for a loop that drops some gradients.
    """
    model, (inputs, targets) = MLP.model(), MLP.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(20):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            if stepped and number == 0:
                optimizer.step()
    messages = [str(warning.message) for warning in caught]
    if stepped:
        assert messages == []
    else:
        (message,) = messages
        assert "without a step of the SGD; attach with the optimizer whose" in message
        assert "without a step of the SGD" in repr(probe)


def test_a_second_probe_is_said() -> None:
    """Catches: a notebook cell run again, whose probes all read each step."""
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    with pytest.warns(ProbeAdvice, match="another probe reads the steps"):
        attach(model, optimizer).detach()
    probe.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, optimizer)

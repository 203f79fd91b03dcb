"""The probe as an object: schedule, sinks, tables, measurements, resuming."""

import copy

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.results import ErrorSource, Status
from noisekit.integrations import attach
from noisekit.noise import ratio_of_averages
from noisekit.probes import Probe, Reading
from tests.probes.models import CASES, MLP
from tests.reference import noise as reference


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    steps: int,
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()


def attached(**options: object) -> tuple[Probe, nn.Module, torch.optim.Optimizer]:
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return attach(model, optimizer, **options), model, optimizer  # type: ignore[arg-type]


def test_every_k_steps_starting_with_the_first() -> None:
    """Catches: an offset by one; examples of unread steps not counted."""
    probe, model, optimizer = attached(every=3)
    train(model, optimizer, MLP.data(), 7)
    assert [reading.step for reading in probe.readings] == [1, 4, 7]
    assert [reading.examples_seen for reading in probe.readings] == [6, 24, 42]
    assert (probe.step, probe.examples_seen) == (7, 42)


def test_accumulated_examples_count_in_steps_that_are_not_read() -> None:
    """Catches: the last micro-batch counted alone where nothing is recorded."""
    probe, model, optimizer = attached(every=2)
    inputs, targets = MLP.data()
    for _ in range(3):
        for _ in range(2):
            functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert probe.examples_seen == 3 * 2 * len(inputs)
    assert probe.readings[-1].batch_size == 2 * len(inputs)


def test_a_schedule_may_be_a_function_of_the_step() -> None:
    """Catches: steps counted from zero."""
    probe, model, optimizer = attached(every=lambda step: step in (2, 5))
    train(model, optimizer, MLP.data(), 6)
    assert [reading.step for reading in probe.readings] == [2, 5]


def test_sinks_get_every_reading() -> None:
    """Catches: a sink called with what was not kept, or not at all."""
    seen: list[Reading] = []
    probe, model, optimizer = attached(sinks=[seen.append])
    train(model, optimizer, MLP.data(), 3)
    assert seen == probe.readings


def test_readings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: memory that grows with the length of the run."""
    monkeypatch.setattr("noisekit.probes.history.MAX_READINGS", 2)
    probe, model, optimizer = attached()
    train(model, optimizer, MLP.data(), 4)
    assert [reading.step for reading in probe.readings] == [3, 4]


def test_detached_is_as_if_never_attached() -> None:
    """Catches: a hook that stays on the model, its parameters or the optimizer."""
    probe, model, optimizer = attached(loss_fn=nn.CrossEntropyLoss())
    train(model, optimizer, MLP.data(), 1)
    probe.detach()
    train(model, optimizer, MLP.data(), 1)
    assert probe.step == 1
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_post_hooks


def test_a_with_block_detaches_after_an_exception() -> None:
    """Catches: hooks that survive the block."""
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), attach(model, optimizer):
        raise KeyError
    assert not model._forward_hooks


def test_frame_has_one_row_per_reading() -> None:
    """Catches: columns of objects instead of numbers."""
    probe, model, optimizer = attached()
    train(model, optimizer, MLP.data(), 3)
    frame = probe.frame()
    assert list(frame["step"]) == [1, 2, 3]
    numeric = frame.drop(columns=["unit", "estimator", "status"])
    assert all(pd.api.types.is_numeric_dtype(numeric[name]) for name in numeric)
    assert frame["variance_trace"][1] == probe.readings[1].variance_trace.value


def test_smoothed_noise_scale_is_a_ratio_of_averages() -> None:
    """Catches: an average of ratios."""
    probe, model, optimizer = attached()
    train(model, optimizer, MLP.data(), 5)
    traces = torch.tensor([r.variance_trace.value for r in probe.readings])
    norms = torch.tensor([r.debiased_grad_sq_norm.value for r in probe.readings])
    found = probe.simple_noise_scale()
    expected = ratio_of_averages(traces, norms).simple_noise_scale
    assert found.ratio is not None
    assert found.ratio.numerator == pytest.approx(float(traces.mean()), rel=1e-5)
    assert found.ratio.denominator == pytest.approx(float(norms.mean()), rel=1e-5)
    assert found.error_source is ErrorSource.STEPS
    assert found.status is expected.status


def test_smoothed_noise_scale_of_no_and_one_reading() -> None:
    """Catches: an average over nothing."""
    probe, model, optimizer = attached()
    assert probe.simple_noise_scale().status is Status.UNAVAILABLE
    train(model, optimizer, MLP.data(), 1)
    assert probe.simple_noise_scale().error_source is ErrorSource.DATA


def test_a_measurement_is_off_the_training_path() -> None:
    """Gradients, random state and the next reading are as if it had not been.

    Catches: a measurement whose gradient is applied, or counted as a micro-batch.
    """
    case = CASES[5]
    rows, states = [], []
    for measured in (False, True):
        model, (inputs, targets) = case.model(), case.data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(model, optimizer, loss_fn=functional.cross_entropy)
        functional.cross_entropy(model(inputs), targets).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        if measured:
            probe.measure(*case.data(seed=9))
        after = [p.grad for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))
        optimizer.step()
        rows.append([reading.row() for reading in probe.readings])
        states.append(torch.get_rng_state())
    assert rows[0] == rows[1]
    assert torch.equal(*states)


def test_a_measurement_is_right() -> None:
    """Catches: a model in another mode; a batch mixed with the training's."""
    probe, model, optimizer = attached(loss_fn=functional.cross_entropy)
    train(model, optimizer, MLP.data(), 2)
    inputs, targets = MLP.data(seed=9)
    reading = probe.measure(inputs, targets)
    grads = reference.example_gradients(
        copy.deepcopy(model), functional.cross_entropy, inputs, targets
    )
    trace = reference.variance_trace(list(grads.values()))
    assert reading.variance_trace.value == pytest.approx(trace)
    assert reading.step == 2
    assert len(probe.readings) == 2


def test_a_resumed_probe_reads_where_the_first_one_came_to() -> None:
    """Catches: sites that are found anew, which costs a reading and moves bits."""
    case = next(case for case in CASES if case.name == "functional")
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = attach(model, optimizer)
    train(model, optimizer, case.data(), 2)
    first.detach()
    second = attach(model, optimizer)
    second.load_state_dict(first.state_dict())
    train(model, optimizer, case.data(), 1)
    assert not first.readings[0].coverage.complete
    assert second.readings[0].coverage == first.readings[1].coverage


def test_a_resumed_probe_goes_on_where_it_was() -> None:
    """Catches: counters that start anew, and a schedule with them."""
    whole, model, optimizer = attached(every=3)
    train(model, optimizer, MLP.data(), 8)
    first, model, optimizer = attached(every=3)
    train(model, optimizer, MLP.data(), 5)
    state = first.state_dict()
    first.detach()
    second = attach(model, optimizer, every=3)
    second.load_state_dict(state)
    train(model, optimizer, MLP.data(), 3)
    rows = [r.row() for r in (*first.readings, *second.readings)]
    assert rows == [r.row() for r in whole.readings]

"""Compiled models: what still sees their steps, and what is replayed for the rest."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import UsageError
from noisekit.integrations import attach
from noisekit.probes import Probe
from noisekit.probes.capture.hooks import ModelHook, ParameterHook
from tests.reference import noise as reference

# The compiler itself asks it of tensors that are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def build(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 5),
        nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(dropout)),
        nn.Linear(5, 3),
    )


def compiled(model: nn.Module) -> nn.Module:
    """Trace as ever, but run without a code generator, which is slow to start."""
    wrapped: nn.Module = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    return wrapped


def data(size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(size, 6, generator=generator)
    return inputs, torch.randint(3, (size,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, parts: int = 1) -> None:
    optimizer.zero_grad()
    inputs, targets = data(6)
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        (functional.cross_entropy(model(x), y) / parts).backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def example_gradients(model: nn.Module) -> Tensor:
    grads = reference.example_gradients(
        copy.deepcopy(model), functional.cross_entropy, *data(6)
    )
    return torch.cat([grad.flatten(1) for grad in grads.values()], 1)


def assert_read(probe: Probe, rows: Tensor) -> None:
    reading = probe.readings[-1]
    assert reading.coverage.reason is None, reading.coverage
    trace = float(rows.double().var(0).sum())
    assert reading.variance_trace.value == pytest.approx(trace, rel=1e-4)
    norm = float(rows.double().mean(0).square().sum())
    assert reading.grad_sq_norm.value == pytest.approx(norm, rel=1e-4)
    assert reading.batch_size == 6


def test_a_compiled_model_has_its_gradient_read() -> None:
    """Per-parameter hooks always fire; those of layers are left out of the code.

    Catches: readings of nothing; a full second pass that nobody asked for.
    """
    torch.compiler.reset()
    model = build()
    rows = example_gradients(model)
    wrapped, optimizer = compiled(model), sgd(model)
    probe = attach(wrapped, optimizer)
    step(wrapped, optimizer)
    reading = probe.readings[0]
    norm = float(rows.mean(0).square().sum())
    assert reading.grad_sq_norm.value == pytest.approx(norm, rel=1e-4)
    assert reading.batch_size == 6
    assert reading.coverage.reason is not None
    assert reading.coverage.reason.startswith(
        "torch.compile keeps the calls of layers to itself; estimator='per_example' "
        "replays the compiled parts"
    )


def test_micro_batches_of_a_compiled_model_tell_its_noise() -> None:
    """Catches: noise that is said to be unreadable where parameters suffice."""
    torch.compiler.reset()
    model = build()
    rows = example_gradients(model).view(3, 2, -1).mean(1)
    wrapped, optimizer = compiled(model), sgd(model)
    probe = attach(wrapped, optimizer)
    step(wrapped, optimizer, parts=3)
    reading = probe.readings[0]
    assert reading.estimator == "accumulation(2)"
    trace = 2 * float(rows.double().var(0).sum())
    assert reading.variance_trace.value == pytest.approx(trace, rel=1e-4)


def test_a_compiled_model_is_replayed_where_that_is_asked_for() -> None:
    """Every second step; the closure is checked as ever.

    Catches: hooks that are silent since the model was compiled.
    """
    torch.compiler.reset()
    model = build()
    wrapped, optimizer = compiled(model), sgd(model)
    probe = attach(wrapped, optimizer, estimator="per_example", every=2)
    for _ in range(2):
        rows = example_gradients(model)
        step(wrapped, optimizer)
        step(wrapped, optimizer)
        assert_read(probe, rows)
    ways = set(probe.readings[-1].coverage.methods.values())
    assert ways == {"replay of the model"}
    assert [reading.step for reading in probe.readings] == [1, 3]


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_a_compiled_part_is_replayed_and_the_rest_read_by_its_rules(
    in_place: bool,
) -> None:
    """Catches: a wrapper that is replayed in compiled form, which vmap cannot enter.

    A part that was compiled in place has no hooks of its own: what is around it is
    replayed.
    """
    torch.compiler.reset()
    model = build()
    rows = example_gradients(model)
    if in_place:
        model[1].compile(backend="aot_eager")
    else:
        model[1] = compiled(model[1])
    optimizer = sgd(model)
    probe = attach(model, optimizer, estimator="per_example")
    torch._dynamo.utils.counters.clear()
    step(model, optimizer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_read(probe, rows)
    ways = probe.readings[0].coverage.methods
    assert ways["0.weight"] == "linear"
    where = "the model" if in_place else "1"
    inner = "1.0.weight" if in_place else "1._orig_mod.0.weight"
    assert ways[inner] == f"replay of {where}"


def test_ghost_batches_of_a_compiled_model_run_as_written() -> None:
    """Catches: a compilation for every size of ghost batch."""
    torch.compiler.reset()
    model = build()
    rows = example_gradients(model).view(3, 2, -1).mean(1)
    wrapped, optimizer = compiled(model), sgd(model)
    probe = attach(
        wrapped,
        optimizer,
        estimator="ghost",
        ghost_batch=2,
        loss_fn=functional.cross_entropy,
    )
    inputs, targets = data(6)
    torch._dynamo.utils.counters.clear()
    probe.loss_fn(wrapped(inputs), targets).backward()
    optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    trace = 2 * float(rows.double().var(0).sum())
    assert probe.readings[0].variance_trace.value == pytest.approx(trace, rel=1e-4)


def test_a_model_compiled_after_attaching_says_so() -> None:
    """Catches: hooks traced into the code, or broken graphs, or a silent probe.

    ``fullgraph=True`` refuses to compile around a hook that it cannot trace.
    """
    torch.compiler.reset()
    model = build()
    optimizer = sgd(model)
    probe = attach(model, optimizer)
    step(model, optimizer)
    wrapped = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(wrapped, optimizer)  # type: ignore[arg-type]
    first, second = probe.readings
    assert first.coverage.complete
    assert second.grad_sq_norm.value > 0
    assert second.coverage.reason == (
        "the model's own forward was not called in this step, or was compiled after "
        "the probe had been attached"
    )


@torch._dynamo.config.patch(compiled_autograd=True)
def test_a_backward_pass_inside_compiled_code_says_so() -> None:
    """The whole step is one compiled function; the gradient's norm is still right.

    Catches: hooks that the compiler traces or fails on; a probe without any reading.
    """
    torch.compiler.reset()
    model = build()
    rows = example_gradients(model)
    optimizer = sgd(model)
    probe = attach(model, optimizer)

    @torch.compile(backend="eager")
    def backward(inputs: Tensor, targets: Tensor) -> None:
        functional.cross_entropy(model(inputs), targets).backward()

    backward(*data(6))
    optimizer.step()
    reading = probe.readings[0]
    norm = float(rows.double().mean(0).square().sum())
    assert reading.grad_sq_norm.value == pytest.approx(norm, rel=1e-4)
    assert reading.coverage.reason == (
        "no backward pass was seen that has left this gradient"
    )


def test_a_measurement_of_a_compiled_model_runs_as_written() -> None:
    """Catches: a measurement through the wrapper, whose layers cannot be read."""
    torch.compiler.reset()
    model = build()
    rows = example_gradients(model)
    wrapped, optimizer = compiled(model), sgd(model)
    probe = attach(wrapped, optimizer, loss_fn=functional.cross_entropy)
    reading = probe.measure(*data(6))
    trace = float(rows.double().var(0).sum())
    assert reading.variance_trace.value == pytest.approx(trace, rel=1e-4)


def test_a_compiled_loss_changes_nothing() -> None:
    """Catches: a probe that refuses what does not concern it."""
    torch.compiler.reset()
    model = build()
    rows = example_gradients(model)
    optimizer = sgd(model)
    probe = attach(model, optimizer)
    loss_fn = torch.compile(functional.cross_entropy, backend="aot_eager")
    inputs, targets = data(6)
    loss_fn(model(inputs), targets).backward()
    optimizer.step()
    assert_read(probe, rows)


@pytest.mark.parametrize("estimator", ["auto", "per_example"])
def test_attaching_to_a_compiled_model_changes_no_bit(estimator: str) -> None:
    """With dropout, whose masks a replay must not move.

    Catches: random numbers drawn by a replay; hooks that break the graph, so that
    other kernels run.
    """
    found = []
    for probed in (False, True):
        torch.compiler.reset()
        model = build(dropout=0.5)
        wrapped, optimizer = compiled(model), sgd(model)
        torch.manual_seed(5)
        if probed:
            attached = attach(wrapped, optimizer, estimator=estimator)  # type: ignore[arg-type]
        for _ in range(3):
            step(wrapped, optimizer)
        found.append([*model.parameters(), torch.get_rng_state()])
    assert len(attached.readings) == 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_model_compiled_in_place_is_refused() -> None:
    """Catches: hooks that a compiled call never reaches."""
    model = build()
    model.compile(backend="aot_eager")
    message = (
        "got Sequential at the top compiled in place, which drops its hooks silently; "
        r"train what torch\.compile\(model\) returns, and attach to that\."
    )
    with pytest.raises(UsageError, match=message):
        attach(model, sgd(model))


class _Counter:
    """Counts the calls that reach it through a hook."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("of_model", [True, False])
def test_hooks_leave_nothing_in_compiled_code(of_model: bool) -> None:
    """One graph, without a break; calls that are not compiled arrive.

    Catches: a weak reference that the compiler is made to follow, and cannot.
    """
    torch.compiler.reset()
    counter, layer = _Counter(), nn.Linear(6, 5)

    def call(inputs: Tensor) -> Tensor:
        if of_model:
            model_hook(layer)
        else:
            parameter_hook(inputs)
        return 2 * inputs

    model_hook = ModelHook(counter.note, layer)
    parameter_hook = ParameterHook(counter.note, 0)
    torch.compile(call, backend="eager", fullgraph=True)(data()[0])
    assert counter.count == 0
    call(data()[0])
    assert counter.count == 1

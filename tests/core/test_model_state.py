"""Whatever evaluates a model leaves all of its state as it was, or refuses."""

import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noisekit as nk
from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from tests.cases import RAGGED, seeded
from tests.core.stateful_models import (
    STATEFUL,
    CountingHook,
    DataDependentScale,
    Helper,
    MomentumEncoder,
    PlainState,
    SharedModule,
)

LOSS = nn.CrossEntropyLoss()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def moved_states(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    start = {k: v.clone() for k, v in model.state_dict().items()}
    end = {k: v + 0.1 if v.is_floating_point() else v for k, v in start.items()}
    return {"start": start, "end": end}


ENTRIES: dict[str, Callable[[nn.Module], object]] = {
    "value_and_grad": lambda m: EmpiricalRisk(m, LOSS, RAGGED).value_and_grad(),
    "unchecked": lambda m: EmpiricalRisk(m, LOSS, RAGGED, check=False).value(),
    "lambda_max": lambda m: nk.lambda_max(m, LOSS, RAGGED, generator=generator()),
    "trace": lambda m: nk.trace(
        nk.HessianOperator(m, LOSS, RAGGED), num_matvecs=9, generator=generator()
    ),
    "ggn": lambda m: nk.GGNOperator(m, LOSS, RAGGED) @ torch.ones(num_params(m)),
    "slice": lambda m: nk.loss_slice(m, LOSS, RAGGED, num_points=3),
    "interpolate": lambda m: nk.interpolate(
        m, LOSS, RAGGED, num_points=3, **moved_states(m)
    ),
    "average": lambda m: nk.average_sharpness(
        m, LOSS, RAGGED, sigma=0.01, num_draws=2, generator=generator()
    ),
    "epsilon": lambda m: nk.epsilon_sharpness(
        m, LOSS, RAGGED, max_iter=2, generator=generator()
    ),
    "batch": lambda m: nk.batch_sharpness(m, LOSS, RAGGED[:2]),
    "card": lambda m: nk.measure(m, LOSS, RAGGED, measures=["lambda_max", "grad_norm"]),
}


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


PLAIN: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (nn.Module, lambda v: [(type(m), id(m), state_of(vars(m))) for m in v.modules()]),
    (Tensor, lambda v: (id(v), v.dtype, v.detach().numpy().tobytes())),
    (torch.Generator, lambda v: v.get_state().tolist()),
    (np.random.Generator, lambda v: v.bit_generator.state),
    ((np.random.RandomState, np.ndarray), pickle.dumps),
    (random.Random, lambda v: v.getstate()),
    (dict, lambda v: [(key, state_of(item)) for key, item in v.items()]),
    ((list, tuple, deque), lambda v: [state_of(item) for item in v]),
    ((Helper, CountingHook), lambda v: state_of(vars(v))),
)


def state_of(value: Any) -> Any:
    """All of a model's state, or of what it refers to, as plain comparable values."""
    for kinds, plain in PLAIN:
        if isinstance(value, kinds):
            return plain(value)
    return value


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", STATEFUL)
def test_nothing_of_the_model_changes(kind: str, entry: str) -> None:
    """State of every kind, through every way of evaluating a model.

    Catches: restoring buffers but not the values of parameters; plain tensors,
    counters, queues, helpers, hidden modules or generators that go on;
    ``torch.func.functional_call``, which breaks a module with two names.
    """
    model = seeded(STATEFUL[kind])()
    before = state_of(model)
    # State that follows the weights by ``.data`` is hidden from second derivatives.
    hidden = kind in {"MomentumEncoder", "PowerIteration", "HiddenTeacher"}
    with suppress(UsageError) if hidden else nullcontext():
        ENTRIES[entry](model)
    assert state_of(model) == before


class FailingBackward(torch.autograd.Function):
    """The identity, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Pass on."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Fail."""
        raise ZeroDivisionError("planted")


def fail(*_: object) -> Tensor:
    raise ZeroDivisionError("planted")


def failing_backward(outputs: Tensor, targets: Tensor) -> Tensor:
    return FailingBackward.apply(LOSS(outputs, targets))


class FailingLoader:
    """Fails at the end of every pass but the first."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        """Begin a pass."""
        self.passes += 1
        yield from RAGGED
        if self.passes > 2:
            fail()


def evaluated(model: nn.Module, loss: Any, batches: Any, **options: Any) -> None:
    EmpiricalRisk(model, loss, batches, check=False, **options).value_and_grad()


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("where", ["forward", "loss", "backward", "loader"])
def test_nothing_changes_when_something_fails(kind: str, where: str) -> None:
    """Catches: restoring on success only, at any of the places that can fail."""
    model = seeded(STATEFUL[kind])()
    if where == "forward":
        model.head.register_forward_hook(fail)
    before = state_of(model)
    loss = {"loss": fail, "backward": failing_backward}.get(where, LOSS)
    batches = FailingLoader() if where == "loader" else RAGGED
    budget = 1 if where == "loader" else 2**20
    with pytest.raises(ZeroDivisionError, match="planted"):
        evaluated(model, loss, batches, memory_budget=budget)
    assert state_of(model) == before


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_batch_has_one_loss_whatever_went_before(kind: str) -> None:
    """The loss of all data is the mean of losses, each of a fresh copy of the model.

    Catches: state that moves on from batch to batch, so that the loss depends on
    their order and a second evaluation differs from the first.
    """
    want = 0.0
    for inputs, targets in RAGGED:
        with torch.no_grad():
            outputs = seeded(STATEFUL[kind])().eval()(inputs)
        want += float(LOSS(outputs, targets)) * len(targets) / 10
    risk = EmpiricalRisk(seeded(STATEFUL[kind])(), LOSS, RAGGED)
    assert risk.value() == pytest.approx(want, rel=1e-12)
    assert risk.value(risk.vector()) == risk.value() == risk.value()


@pytest.mark.parametrize(
    "kind", ["Codebook", "PlainState", "OwnGenerators", "SharedModule", "StatefulHook"]
)
def test_curvature_of_a_model_that_moves_its_own_state(kind: str) -> None:
    """Products of kept and of rebuilt graphs agree with differences of gradients.

    Catches: graphs kept of a forward pass whose tensors the next one overwrote.
    """
    model = seeded(STATEFUL[kind])()
    risk = EmpiricalRisk(model, LOSS, RAGGED)
    point, step = risk.vector(), 1e-5
    direction = torch.linspace(-1.0, 1.0, len(point), dtype=torch.float64)
    _, ahead = risk.value_and_grad(point + step * direction)
    _, behind = risk.value_and_grad(point - step * direction)
    with nk.HessianOperator(model, LOSS, RAGGED) as hessian:
        for _ in range(2):
            product = hessian @ direction
            torch.testing.assert_close(
                product, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7
            )


def test_the_callers_vector_is_not_written_to() -> None:
    """Catches: a vector that shares its memory with the parameters held at it."""

    class Shrinking(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            self.weight.data.mul_(0.5)
            return super().forward(inputs)

    model = Shrinking(4, 3).double()
    vector = torch.ones(15, dtype=torch.float64)
    with pytest.raises(UsageError, match="writes to weight"):
        EmpiricalRisk(model, LOSS, RAGGED, check=False).value(vector)
    assert torch.equal(vector, torch.ones_like(vector))


def test_a_forward_pass_that_sets_what_is_measured_is_refused() -> None:
    """Once initialised, or with the parameter left out, the model is measured.

    Catches: a risk that does not depend on the weights that it is a function of.
    """
    model = seeded(DataDependentScale)()
    before = state_of(model)
    with pytest.raises(UsageError) as caught:
        nk.lambda_max(model, LOSS, RAGGED)
    assert str(caught.value) == (
        "a measurement needs a forward pass that leaves the measured parameters as "
        "they are, got DataDependentScale, which writes to scale when it is called; "
        "if it initialises them with its first batch, call it once beforehand, else "
        "leave them out with params= or set requires_grad_(False) on them."
    )
    assert state_of(model) == before
    model(RAGGED[0][0])
    assert nk.lambda_max(model, LOSS, RAGGED).value > 0


def test_objects_stay_the_same_objects() -> None:
    """Catches: copies put in the place of a queue that the trainer also holds."""
    model = seeded(PlainState)()
    queue, helper, offset = model.queue, model.helper, model.offset
    EmpiricalRisk(model, LOSS, RAGGED).value()
    assert (model.queue, model.helper, model.offset) == (queue, helper, offset)
    assert model.queue is queue
    assert not queue
    assert helper.inner["steps"] == 0


def test_a_graph_of_the_training_stays_valid() -> None:
    """A loss from before the measurement can be differentiated after it.

    Catches: parameters written to and written back, which moves their versions.
    """
    model = seeded(MomentumEncoder)()
    loss = LOSS(model(RAGGED[0][0]), RAGGED[0][1])
    EmpiricalRisk(model, LOSS, RAGGED).value_and_grad()
    loss.backward()
    assert float(model.body.weight.grad.norm()) > 0


def test_hooks_on_parameters_do_not_run() -> None:
    """Neither do optimizers that step within the backward pass.

    Catches: a clamped gradient taken for the loss's; hooks that are lost afterwards.
    """
    model = seeded(SharedModule)()
    want = EmpiricalRisk(model, LOSS, RAGGED).value_and_grad()[1]
    top = nk.lambda_max(model, LOSS, RAGGED, generator=generator())
    calls = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-0.001, 0.001))
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    got = EmpiricalRisk(model, LOSS, RAGGED).value_and_grad()[1]
    assert torch.equal(got, want)
    assert nk.lambda_max(model, LOSS, RAGGED, generator=generator()).value == top.value
    assert not calls
    LOSS(model(RAGGED[0][0]), RAGGED[0][1]).backward()
    assert all(float(p.grad.abs().max()) <= 0.001 for p in model.parameters())
    assert len(calls) == 4

"""A fault of the probe ends a reading, never a training."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from noisekit.core.errors import ProbeWarning
from noisekit.core.layers.linear import LinearRule
from noisekit.core.layers.per_example import Site
from noisekit.integrations import attach
from noisekit.probes import Probe
from noisekit.probes.capture import forward, recorder
from noisekit.probes.capture.independence import IndependenceCheck
from noisekit.probes.estimators.examples import PerExample
from noisekit.probes.step_result import StepResult


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class SparseTable(nn.Module):
    """A lookup whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(11, 8)), nn.Linear(8, 3)

    def forward(self, numbers: Tensor) -> Tensor:
        looked_up = functional.embedding(numbers, self.table, sparse=True)
        logits: Tensor = self.head(looked_up.mean(1))
        return logits


class SparseInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.sparse.mm(x, self.weight))
        return logits


class Masked(nn.Module):
    """Attention under a mask that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.mix(x).chunk(3, -1)
        scores = (query @ key.mT).masked_fill(~mask, -1e9).softmax(-1)
        logits: Tensor = self.head(scores @ value).mean(1)
        return logits


def cached() -> nn.Module:
    model = mlp()
    parametrizations.weight_norm(model[0])
    return model


X, Y = torch.randn(6, 6), torch.arange(6) % 3
TOKENS, SEQUENCES = torch.randint(11, (6, 4)), torch.randn(6, 6, 8)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def of(*inputs: Tensor) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, _: functional.cross_entropy(model(*inputs), Y)


def sometimes_empty(model: nn.Module, step: int) -> Tensor:
    count = 0 if step == 1 else 6
    return functional.cross_entropy(model(X[:count]), Y[:count], reduction="sum")


def nested(model: nn.Module, _: int) -> Tensor:
    parts = [X[:3], X[:5], X[:2]]
    inputs = torch.nested.nested_tensor(parts, layout=torch.jagged)
    return model(inputs).values().pow(2).mean()


@dataclass(frozen=True)
class Case:
    """A training that runs without a probe.

    Attributes:
        loss: Of a model and the number of the step.
        around: What a step runs in.
        in_backward: Whether the optimizer steps parameter by parameter.
        reason: What the second reading's coverage says; ``None`` where it is read.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    in_backward: bool = False
    reason: str | None = ""


CASES = {
    "a batch without examples": Case(
        mlp, sometimes_empty, reason="the batch has no examples"
    ),
    "a sparse gradient": Case(SparseTable, of(TOKENS)),
    "a sparse input": Case(
        SparseInput, of(X.to_sparse()), reason="a sparse or nested input"
    ),
    "a nested input": Case(mlp, nested, reason="a sparse or nested input"),
    "a cache of weights": Case(cached, of(X), parametrize.cached, reason=None),
    "a mask of positions": Case(Masked, of(SEQUENCES, CAUSAL), reason=None),
    "a step in backward": Case(mlp, of(X), in_backward=True),
}


def trained(case: Case, probed: bool) -> tuple[list[Tensor], Probe | None]:
    torch.manual_seed(0)
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer) if probed else None

    def step(*_: object) -> None:
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters() if case.in_backward else ():
        parameter.register_post_accumulate_grad_hook(step)
    for number in range(4):
        with case.around():
            case.loss(model, number).backward()
            if not case.in_backward:
                step()
    return [parameter.detach() for parameter in model.parameters()], probe


@pytest.mark.parametrize("name", CASES)
def test_what_trains_without_a_probe_trains_with_one(name: str) -> None:
    """Bit for bit, with a reason in the coverage and at most one warning.

    Catches: raw errors out of ``forward``, ``backward`` and ``step``; a reason that
    points elsewhere; what could be read refused for a mask of as many positions.
    """
    case = CASES[name]
    plain, _ = trained(case, probed=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after, probe = trained(case, probed=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))
    assert sum(w.category is ProbeWarning for w in caught) <= 1
    assert probe is not None
    if case.in_backward:
        return
    reason = probe.readings[1].coverage.reason
    if case.reason is None:
        assert reason is None
        assert not caught
    else:
        assert reason is not None
        assert case.reason in reason


# ---------------------------------------------------------------- planted faults

PLACES: dict[str, tuple[object, str]] = {
    "start of the forward pass": (forward, "batch_size_of"),
    "a captured call": (forward, "captured_call"),
    "the runs of copies": (IndependenceCheck, "result"),
    "a layer's rule": (LinearRule, "sq_norms"),
    "a site": (Site, "name_of"),
    "the gradient's norm": (recorder, "gradient_sq_norms"),
    "an estimator": (PerExample, "noise"),
    "the reading": (StepResult, "reading"),
}


@contextmanager
def broken(place: tuple[object, str]) -> Iterator[None]:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, fails)
        yield


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_anywhere_in_the_probe_costs_readings_only(place: str) -> None:
    """Training keeps its bits and readings come back once the fault is gone.

    Catches: a hook without a guard; a fault that stays for later steps; a warning at
    every step.
    """
    torch.manual_seed(0)
    plain = mlp()
    model = mlp()
    model.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    probe = attach(model, optimizers[1])

    def step() -> None:
        for trained_model, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(trained_model(X), Y).backward()
            optimizer.step()

    with broken(PLACES[place]):
        with pytest.warns(ProbeWarning, match="planted") as caught:
            step()
        step()  # without a second warning, which would be an error here
    assert len(caught) == 1
    failed = [reading for reading in probe.readings if reading.coverage.complete]
    assert not failed
    for reading in probe.readings:
        assert "ZeroDivisionError: planted" in str(reading.coverage.reason)
    step()
    assert probe.readings[-1].coverage.complete
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_faults_can_be_raised() -> None:
    """Catches: an option that is taken and ignored."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, on_error="raise")
    with broken(PLACES["a layer's rule"]), pytest.raises(ZeroDivisionError):
        functional.cross_entropy(model(X), Y).backward()


class Pair(nn.Module):
    """Returns logits, and a loss that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.body(x)
        return logits, logits.square().mean()


@pytest.mark.parametrize("used", [0, 1])
def test_a_compiled_model_with_an_unused_output(used: int) -> None:
    """Compiled code calls the hooks of both outputs, of the unused one with ``None``.

    Catches: an attribute asked of a gradient that is not there.
    """
    torch.manual_seed(0)
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="aot_eager")
    probe = attach(compiled, optimizer, on_error="raise")
    for _ in range(3):
        optimizer.zero_grad()
        outputs = compiled(X)
        loss = outputs[1] if used else functional.cross_entropy(outputs[0], Y)
        loss.backward()
        optimizer.step()
    assert len(probe.readings) == 3

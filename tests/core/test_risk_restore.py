"""A measurement leaves no trace, also when it fails half-way."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from noisekit.core.data import freeze
from noisekit.core.risk import EmpiricalRisk
from tests.cases import RAGGED, batch_norm_network, mlp, seeded

LOSS = nn.CrossEntropyLoss()


def random_states() -> list[Any]:
    numpy = np.random.get_state()  # noqa: NPY002  the global state itself
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy],
    ]


def state_of(model: nn.Module) -> list[Any]:
    """Everything that a measurement could leave behind."""
    return [
        {name: t.clone().numpy().tobytes() for name, t in model.state_dict().items()},
        [t._version for t in (*model.parameters(), *model.buffers())],
        [id(t) for t in (*model.parameters(), *model.buffers())],
        [m.training for m in model.modules()],
        [getattr(m, "momentum", None) for m in model.modules()],
        [getattr(m, "track_running_stats", None) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [id(p.grad) for p in model.parameters()],
        [p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None],
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        random_states(),
    ]


def prepared_model() -> nn.Module:
    """A model in the middle of training: mixed modes, gradients, a frozen layer."""
    model = nn.Sequential(seeded(batch_norm_network)(), nn.Linear(3, 3).double())
    model.train()
    model[0][1].eval()
    LOSS(model(RAGGED[0][0]), RAGGED[0][1]).backward()
    model[1].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("bn", ["running", "recalibrated", "batch"])
def test_measuring_leaves_no_trace(bn: Any) -> None:
    """All state is compared bit for bit, version counters too.

    Catches: ``model.eval()`` left behind, running statistics moved by BatchNorm,
    gradients left or cleared, a random state that went on.
    """
    model = prepared_model()
    before = state_of(model)
    risk = EmpiricalRisk(model, LOSS, RAGGED, bn=bn)
    risk.value()
    risk.evaluate(risk.vector() + 1.0)
    risk.value_and_grad(risk.vector() * 2.0)
    assert state_of(model) == before


@pytest.mark.parametrize("bn", ["running", "recalibrated", "batch"])
@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_failing_leaves_no_trace(bn: Any, failing_call: int) -> None:
    """Catches: restoring on success only."""
    model = prepared_model()
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            torch.rand(3)
            raise ZeroDivisionError("planted")
        return LOSS(outputs, targets)

    before = state_of(model)
    risk = EmpiricalRisk(model, loss, RAGGED, bn=bn, check=False)
    with pytest.raises(ZeroDivisionError, match="planted"):
        risk.value_and_grad(risk.vector() + 1.0)
    assert state_of(model) == before
    assert risk.value() == risk.value()


def test_nested_contexts_restore_at_the_outermost() -> None:
    model = prepared_model()
    before = state_of(model)
    risk = EmpiricalRisk(model, LOSS, RAGGED)
    with risk.evaluating():
        with risk.evaluating():
            assert not any(m.training for m in model.modules())
        assert not any(m.training for m in model.modules())
    assert state_of(model) == before


def test_buffers_that_a_forward_pass_moves_come_back() -> None:
    """Catches: restoring the buffers of BatchNorm only."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3).double()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            self.last = inputs.mean()
            return self.linear(inputs)

    model = Counter()
    last = model.last
    EmpiricalRisk(model, LOSS, RAGGED).value()
    assert float(model.calls) == 0.0
    assert model.last is last


def test_gradients_come_back_even_if_the_loss_changes_them() -> None:
    """Catches: trusting that nobody calls ``zero_grad`` in between."""
    model = prepared_model()
    before = state_of(model)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        model.zero_grad()
        model.requires_grad_(True)
        return LOSS(outputs, targets)

    EmpiricalRisk(model, loss, RAGGED, check=False).value()
    assert state_of(model) == before


def test_train_methods_of_modules_are_not_called() -> None:
    """Catches: ``model.eval()``, at which adapters merge their weights."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> "Merging":
            assert mode, "eval was called"
            return super().train(mode)

    EmpiricalRisk(Merging(4, 3).double(), LOSS, RAGGED).value()


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize(
    "measure", [freeze, lambda data: EmpiricalRisk(seeded(mlp)(), LOSS, data).value()]
)
def test_a_training_loader_goes_on_as_if_not_read(
    own_generator: bool, measure: Callable[[Any], object]
) -> None:
    """Catches: a measurement that changes the order of the training data."""

    def next_order(measured: bool) -> list[int]:
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(5) if own_generator else None
        data = TensorDataset(torch.randn(10, 4).double(), torch.arange(10) % 3)
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
        if measured:
            measure(loader)
        return [int(x[0] * 1e6) for batch, _ in loader for x in batch]

    assert next_order(True) == next_order(False)


def test_evaluation_mode_is_used_inside() -> None:
    """Dropout is off and gradients are on, whatever the caller's mode was.

    Catches: measuring a random function.
    """
    model = nn.Sequential(seeded(mlp)(), nn.BatchNorm1d(3).double()).train()
    risk = EmpiricalRisk(model, LOSS, RAGGED)
    with torch.no_grad():
        _, first = risk.value_and_grad()
    with torch.inference_mode():
        _, second = risk.value_and_grad()
    assert torch.equal(first, second)
    assert float(first.norm()) > 0.0

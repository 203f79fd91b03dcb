"""What a call may change beside its inputs and parameters, kept in a copy."""

import copy
import functools
import threading
from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import ModelCopyError
from noisekit.core.layers.call_state import CallState
from noisekit.core.model_copies import copy_module


def test_draws_are_noticed() -> None:
    """Catches: a state that is compared with itself."""
    module = nn.Linear(2, 2)
    state = CallState.of(module)
    assert not state.has_drawn(module)
    torch.rand(1)
    assert state.has_drawn(module)


class _Helper:
    def __init__(self) -> None:
        self.calls = 0


class _Everything(nn.Module):
    """Writes to all kinds of state in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.alias = self.linear
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.zeros(2)
        self.last: Tensor | None = None
        self.all: list[int] = []
        self.cache: dict[str, list[int]] = {"seen": []}
        self.queue: deque[Tensor] = deque(maxlen=2)
        self.torch_generator = torch.Generator().manual_seed(0)
        self.numpy_generator = np.random.default_rng(0)
        self.helper = _Helper()
        self.bound = self._note
        self.parts = functools.partial(self._note, 2)

    def _note(self, number: int) -> None:
        self.all.append(number)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)
            self.count += 1
            self.plain += 1
        self.bound(1)
        self.parts()
        self.cache["seen"].append(1)
        self.helper.calls += 1
        noise = torch.randn(3, generator=self.torch_generator)
        noise = noise + float(self.numpy_generator.random())
        self.last = self.alias(x + noise)
        self.queue.append(self.last)
        return self.last


def _state_of(module: nn.Module) -> dict[str, object]:
    core = module
    assert isinstance(core, _Everything)
    return {
        "tensors": {n: t.clone() for n, t in core.state_dict().items()},
        "plain": core.plain.clone(),
        "last": core.last,
        "all": list(core.all),
        "cache": copy.deepcopy(core.cache),
        "queue": [id(t) for t in core.queue],
        "torch": core.torch_generator.get_state(),
        "numpy": core.numpy_generator.bit_generator.state,
        "calls": core.helper.calls,
    }


def test_a_copy_shares_no_state() -> None:
    """A forward pass of the copy leaves all that the original holds as it was.

    Also activations with a graph, which ``copy.deepcopy`` refuses; the closure of a
    hook; methods and partial functions bound to the original.

    Catches: a shallow copy of attributes; bound methods that write to the original.
    """
    torch.manual_seed(0)
    model, calls = _Everything(), []
    model.linear.register_forward_hook(lambda *_: calls.append(1))
    model(torch.ones(1, 3))
    before, called = _state_of(model), list(calls)
    other = copy_module(model)
    torch.testing.assert_close(other(torch.ones(1, 3)), model(torch.ones(1, 3)))
    assert len(calls) == len(called) + 1  # the original's own call alone
    model.load_state_dict(before["tensors"])
    again = copy_module(model)
    again(torch.ones(1, 3))
    after = _state_of(model)
    torch.testing.assert_close(after["tensors"], before["tensors"], rtol=0, atol=0)
    assert after["calls"] == 2
    assert after["all"] == [1, 2, 1, 2]
    assert isinstance(again, _Everything)
    assert again.all == [1, 2] * 3
    assert again.alias is again.linear


def test_replaced_tensors_take_every_place() -> None:
    """Recurrent layers keep their weights in a list beside the parameters.

    Catches: new leaves put into ``_parameters`` alone; a module under two names, one of
    which keeps the old weights; an original that has lost its own.
    """
    core = nn.LSTM(3, 4)
    model = nn.ModuleList([core, core])
    leaves = {p: torch.zeros_like(p).requires_grad_() for p in model.parameters()}
    other = copy_module(model, leaves)
    assert isinstance(other, nn.ModuleList)
    assert other[0] is other[1]
    outputs = other[1](torch.ones(2, 1, 3))[0]
    assert float(outputs.detach().abs().max()) == 0.0
    outputs.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    assert all(isinstance(p, nn.Parameter) for p in core.parameters())
    assert all(p.grad is None for p in core.parameters())


def test_what_cannot_be_copied_is_named() -> None:
    """Catches: an error of ``pickle`` in the middle of somebody's forward pass."""
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(ModelCopyError, match=r"needs what can be copied, got Linear"):
        copy_module(model)

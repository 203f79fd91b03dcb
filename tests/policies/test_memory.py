"""The search for the largest batch that fits: what it finds, and what it gives back."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import noisekit as nk
from noisekit.policies.memory import is_out_of_memory


def limited(limit, error=None):
    def step(size):
        if size > limit:
            raise error or torch.OutOfMemoryError("CUDA out of memory.")

    return step


@pytest.mark.parametrize("limit", [1, 3, 8, 512, 513])
@pytest.mark.parametrize(("start", "most"), [(2, 1), (1, 5), (64, 512), (2, 4096)])
def test_largest_that_fits(limit, most, start):
    """Catches: the last power of two; a size above max; one that did not fit."""
    found = nk.find_batch_size(
        limited(limit),
        restore=[],
        start=start,
        max_size=most,
        headroom=0.0,
        resolution=0.0,
    )
    assert found.largest == found.batch_size == min(limit, most)
    assert found.smallest_failed == (limit + 1 if limit < most else None)
    for trial in found.trials:
        assert trial.fits == (trial.batch_size <= limit)
        assert trial.batch_size <= most


def test_resolution_and_headroom():
    found = nk.find_batch_size(limited(1000), restore=[], headroom=0.25)
    assert 970 <= found.largest <= 1000
    assert found.batch_size == int(0.75 * found.largest)
    assert int(found) == found.batch_size
    assert len(found.trials) < 20


def test_result_shows_what_was_tried():
    found = nk.find_batch_size(limited(10), restore=[], max_size=64)
    text = str(found)
    assert "10 fits, 11 did not; headroom 10 %" in text
    assert len(text.splitlines()) == 2 + len(found.trials)
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["largest"] == 10
    assert saved["trials"][0]["batch_size"] == 2
    free = nk.find_batch_size(limited(100), restore=[], max_size=64)
    assert free.batch_size == 64
    assert "batch size 64: 64 fits, no larger was tried" in str(free)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("anything"),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("HIP out of memory."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_out_of_memory_is_recognised(error):
    found = nk.find_batch_size(limited(5, error), restore=[], resolution=0.0)
    assert found.largest == 5
    wrapped = ValueError("step failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_raised(error):
    """Catches: any RuntimeError taken for one of memory."""
    with pytest.raises(type(error)):
        nk.find_batch_size(limited(5, error), restore=[])


def test_nothing_fits():
    with pytest.raises(nk.NoisekitError, match="needs a step that fits with one"):
        nk.find_batch_size(limited(0), restore=[])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"start": 0}, "start needs to be at least 1, got 0"),
        ({"max_size": 1.5}, "max_size needs"),
        ({"headroom": 1.0}, "headroom needs to be below 1, got 1.0"),
        ({"resolution": -0.1}, "resolution needs"),
        ({"restore": [3]}, "restore needs modules, optimizers, or objects with"),
    ],
)
def test_arguments_refused(arguments, words):
    with pytest.raises(nk.NoisekitError, match=words):
        nk.find_batch_size(limited(5), **{"restore": []} | arguments)


class Counting(nn.Module):
    """Has all that a step may change: BatchNorm, dropout, a counter, a mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)
        self.calls = 0
        self.frozen = nn.Linear(2, 2).eval()

    def forward(self, inputs):
        self.calls += 1
        return self.drop(self.linear(self.norm(inputs)))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "tensor_rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("ending", ["found", "raises"])
def test_everything_is_given_back(kind, warm, ending):
    """Catches: optimizer buffers left behind; statistics or modes that have moved."""
    torch.manual_seed(0)
    model = Counting()
    optimizer = OPTIMIZERS[kind](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loss_fn = nn.CrossEntropyLoss()

    def step(size):
        if size > 20:
            raise (
                torch.OutOfMemoryError("out")
                if ending == "found"
                else ValueError("shape")
            )
        model.train()
        inputs = torch.randn(size, 6)
        optimizer.zero_grad()
        loss_fn(model(inputs), torch.randint(0, 3, (size,))).backward()
        optimizer.step()
        schedule.step()
        model.frozen.train()
        random.random()
        np.random.rand()  # noqa: NPY002 - the state of others

    if warm:
        step(8)
    model.linear.eval()
    tensors = [*model.parameters(), *model.buffers()]
    grads = [p.grad for p in model.parameters()]
    buffers = {
        id(value): value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    before = snapshot(model, optimizer, schedule)
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    if ending == "found":
        found = nk.find_batch_size(step, restore=[model, optimizer, schedule])
        assert found.largest == 20
    else:
        with pytest.raises(ValueError, match="shape"):
            nk.find_batch_size(step, restore=[model, optimizer, schedule])
    assert equal(snapshot(model, optimizer, schedule), before)
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    assert [p.grad for p in model.parameters()] == grads or all(
        a is b for a, b in zip(grads, (p.grad for p in model.parameters()), strict=True)
    )
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                assert buffers[id(value)] is value
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    assert np.array_equal(np.random.get_state()[1], draws[2])  # noqa: NPY002
    step(8)  # and training goes on


def snapshot(model, optimizer, schedule):
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    states = [model.state_dict(), optimizer.state_dict(), schedule.state_dict()]
    return copy.deepcopy([*states, modes, grads, model.calls])


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other

"""Models whose forward pass changes state: one class for each kind of it."""

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class _Head(nn.Module):
    """A small network, on which each kind of state is put."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def features(self, inputs: Tensor) -> Tensor:
        """Return what the head sees."""
        return torch.tanh(self.body(inputs))


class MomentumEncoder(_Head):
    """Moves parameters of a second encoder, through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(4, 5).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Move the slow encoder towards the fast one and add its features."""
        pairs = zip(self.slow.parameters(), self.body.parameters(), strict=True)
        for slow, fast in pairs:
            slow.data.mul_(0.9).add_(0.1 * fast.data)
        return self.head(self.features(inputs) + torch.tanh(self.slow(inputs)))


class PowerIteration(_Head):
    """Replaces a parameter's memory, as wrappers for spectral norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Iterate once."""
        v = functional.normalize(self.body.weight.data.T @ self.u.data, dim=0)
        self.u.data = functional.normalize(self.body.weight.data @ v, dim=0)
        scale = self.u @ self.body.weight @ v
        return self.head(torch.tanh(self.body(inputs) / scale))


class Codebook(_Head):
    """Moves a buffer in place and counts in another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, 5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        """Move the codes towards the features' mean."""
        features = self.features(inputs)
        outputs = self.head(features + self.codes.clone())
        self.calls += 1
        with torch.no_grad():
            self.codes.mul_(0.9).add_(0.1 * features.mean(0))
        return outputs


class PlainState(_Head):
    """Keeps a plain tensor, a counter, a queue, an array and a helper object."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.zeros(5)
        self.calls = 0
        self.queue: deque[float] = deque(maxlen=3)
        self.history: dict[str, list[float]] = {"means": []}
        self.array = np.zeros(2)
        self.helper = Helper()

    def forward(self, inputs: Tensor) -> Tensor:
        """Use and move all of them."""
        gain = self.helper.gain * (1 + self.calls) * (1 + len(self.queue))
        features = self.features(inputs) + self.offset.clone() + gain
        self.calls += 1
        self.offset += 0.1
        self.queue.append(float(features.detach().mean()))
        self.history["means"].append(float(features.detach().mean()))
        self.array += 1.0
        self.helper.step()
        return self.head(features)


class Helper:
    """State outside of any module."""

    def __init__(self) -> None:
        self.gain = 1.0
        self.inner = {"steps": 0, "tensor": torch.zeros(2)}

    def step(self) -> None:
        """Move."""
        self.gain *= 1.1
        self.inner["steps"] += 1
        self.inner["tensor"] += 1.0


class OwnGenerators(_Head):
    """Draws from generators of its own, also without training."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.numpy = np.random.default_rng(0)
        self.legacy = np.random.RandomState(0)
        self.python = random.Random(0)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scale the features by draws."""
        draws = torch.rand(5, generator=self.generator)
        scale = self.numpy.random() + self.legacy.rand() + self.python.random()
        return self.head(self.features(inputs) * draws.to(inputs.dtype) * scale)


class HiddenTeacher(_Head):
    """Keeps a second network in a list, where PyTorch does not find it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(4, 5)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Move the teacher and add its features."""
        teacher = self.hidden[0].to(inputs.dtype).requires_grad_(False)
        teacher.weight.data.add_(0.1 * self.body.weight.data)
        return self.head(self.features(inputs) + torch.tanh(teacher(inputs)))


class NormalisedTable(nn.Module):
    """An embedding that rescales its rows in place when they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, max_norm=0.5).requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Look up the sign pattern of the first two inputs."""
        rows = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()
        return self.head(self.table(rows) + inputs)


class SharedModule(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(4, 4)
        self.layers = nn.ModuleList([layer, layer])
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Go through the layer twice."""
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return self.head(inputs)


class StatefulHook(_Head):
    """A hook object that counts and scales by its count."""

    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(CountingHook())

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layers."""
        return self.head(self.features(inputs))


class CountingHook:
    """Scales by the number of calls so far."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Count and scale."""
        self.calls += 1
        return output * (1 + 0.1 * self.calls)


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        MomentumEncoder,
        PowerIteration,
        Codebook,
        PlainState,
        OwnGenerators,
        HiddenTeacher,
        NormalisedTable,
        SharedModule,
        StatefulHook,
    )
}


class DataDependentScale(_Head):
    """Sets a trainable scale from its first batch, whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, inputs: Tensor) -> Tensor:
        """Initialise on the first call."""
        features = self.features(inputs)
        if not self.initialised:
            self.scale.data.copy_(1 / (features.detach().std(0) + 0.1))
            self.initialised.fill_(True)
        return self.head(self.scale * features)

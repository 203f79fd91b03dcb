"""Models that write to everything they hold whenever they are called."""

import random
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class _Core(nn.Module):
    """A layer that subclasses do something around."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x)
        return hidden


class ActNorm(nn.Module):
    """Initialises its parameters from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = (
            nn.Parameter(torch.zeros(6)),
            nn.Parameter(torch.ones(6)),
        )
        self.register_buffer("initialised", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.initialised.item() == 0:
            with torch.no_grad():
                self.shift.data.copy_(-x.mean(0))
                self.scale.data.copy_(1 / (x.std(0, unbiased=False) + 1e-2))
                self.initialised.fill_(1)
        return self.scale * (x + self.shift)


class Momentum(_Core):
    """An encoder whose parameters follow another's."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(
                self.slow.parameters(), self.linear.parameters(), strict=True
            ):
                slow.mul_(0.9).add_(fast, alpha=0.1)
        hidden: Tensor = self.linear(x) + self.slow(x)
        return hidden


class Spectral(nn.Module):
    """Power iterations on parameters, written through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.bar = nn.Parameter(torch.randn(6, 6))
        self.u = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        v = functional.normalize(self.bar.data.T @ self.u.data, dim=0)
        self.u.data = functional.normalize(self.bar.data @ v, dim=0)
        return x @ (self.bar / self.u.dot(self.bar @ v)).T


class Codebook(_Core):
    """Vectors that follow the rows assigned to them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x)
        nearest = torch.cdist(hidden.detach(), self.codes).argmin(1)
        quantised = self.codes[nearest]
        self.codes.index_add_(0, nearest, 0.1 * (hidden.detach() - quantised))
        return hidden + (quantised - hidden).detach() + 0.1 * hidden


class Counters(_Core):
    """A plain tensor, a number, a list and a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.calls = torch.zeros(()), 0
        self.seen: list[int] = []
        self.by_size: dict[int, list[int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        self.seen.append(len(x))
        self.by_size.setdefault(len(x), []).append(self.calls)
        hidden: Tensor = self.linear(x) * (1 + 0.1 * self.count)
        return hidden / len(self.by_size[len(x)])


class Queues(_Core):
    """Rows of earlier batches, in a tensor and in a deque."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = torch.zeros(32, 6)
        self.last: deque[Tensor] = deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x)
        before = sum((row for row in self.last), torch.zeros(6))
        outputs = hidden + 0.1 * self.queue.mean(0) + 0.1 * before
        self.queue[: len(hidden)] = hidden.detach()
        self.last.append(hidden.mean(0).detach())
        return outputs


class Generators(_Core):
    """Draws from generators of its own, and from all global ones."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_generator = torch.Generator().manual_seed(0)
        self.numpy_generator = np.random.default_rng(0)
        self.generator = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.torch_generator)
        noise = noise + torch.randn(x.shape)
        scale = self.numpy_generator.random() + self.generator.random()
        scale += np.random.rand() + random.random()  # noqa: NPY002
        hidden: Tensor = self.linear(x + 0.1 * noise) * scale
        return hidden


class _Helper:
    def __init__(self) -> None:
        self.means: list[float] = []


class Helpers(_Core):
    """An object that is no module, and a hook with a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = _Helper()
        self.totals = [0.0]
        totals = self.totals

        def scaled(_: object, __: object, output: Tensor) -> Tensor:
            totals[0] += 1.0
            return output * (1 + 0.1 * totals[0])

        self.linear.register_forward_hook(scaled)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x)
        self.helper.means.append(float(hidden.detach().mean()))
        return hidden * len(self.helper.means)


class Aliases(nn.Module):
    """One layer under several names, also twice in a list."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.GRUCell(6, 6)
        self.layers = nn.ModuleList([layer] * 3)
        self.other = layer

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for layer in (*self.layers, self.other):
            state = layer(x, state)
        return state


class Renormalised(nn.Module):
    """A table whose rows are rescaled in place when they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        numbers = (x[:, :2] * 10).long() % 5
        return x + self.table(numbers).mean(1)


class OwnBatchNorm(nn.Module):
    """Statistics of the batch, and running ones beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("running", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running.mul_(0.9).add_(0.1 * x.mean(0))
        return self.weight * (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


CORES: tuple[Callable[[], nn.Module], ...] = (
    ActNorm,
    Momentum,
    Spectral,
    Codebook,
    Counters,
    Queues,
    Generators,
    Helpers,
    Aliases,
    Renormalised,
    OwnBatchNorm,
)

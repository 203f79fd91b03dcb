"""Random models with one planted coupling or reordering of their examples."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import noisekit as nk
from noisekit.probes import Reading

NUM_EXAMPLES, WIDTH, CLASSES = 8, 6, 3

Hidden = Callable[[Tensor, Tensor], Tensor]
"""What happens to hidden rows, given the inputs they came from."""


def batch_statistics(hidden: Tensor, _: Tensor) -> Tensor:
    return functional.batch_norm(hidden, None, None, training=True)


def centred(hidden: Tensor, _: Tensor) -> Tensor:
    return hidden - hidden.mean(0)


def attention_over_the_batch(hidden: Tensor, _: Tensor) -> Tensor:
    return hidden + (hidden @ hidden.T).softmax(-1) @ hidden


def rolled(hidden: Tensor, _: Tensor) -> Tensor:
    return hidden + 0.5 * hidden.roll(1, 0)


def mixup(hidden: Tensor, _: Tensor) -> Tensor:
    return 0.7 * hidden + 0.3 * hidden[torch.randperm(len(hidden))]


def cumulated(hidden: Tensor, _: Tensor) -> Tensor:
    return hidden + 0.1 * hidden.cumsum(0)


def groups_of_four(hidden: Tensor, _: Tensor) -> Tensor:
    groups = hidden.view(2, 4, -1)
    return (groups + groups.std(0, keepdim=True)).view_as(hidden)


def graph(hidden: Tensor, _: Tensor) -> Tensor:
    number = torch.arange(len(hidden))
    adjacency = (number[:, None] - number[None]).abs() <= 1
    return adjacency.to(hidden.dtype) @ hidden / 3


def sorted_shift(hidden: Tensor, inputs: Tensor) -> Tensor:
    order = inputs.flatten(1)[:, 0].argsort()
    shifted = hidden[order] + 0.3 * hidden[order].roll(1, 0)
    return shifted[order.argsort()]


def largest(hidden: Tensor, _: Tensor) -> Tensor:
    return hidden - hidden.amax(0)


COUPLINGS: dict[str, Hidden] = {
    function.__name__: function
    for function in (
        batch_statistics,
        centred,
        attention_over_the_batch,
        rolled,
        mixup,
        cumulated,
        groups_of_four,
        graph,
        sorted_shift,
        largest,
    )
}


@dataclass(frozen=True)
class Draw:
    """What a random model is made of."""

    blocks: tuple[str, ...]
    dropout: float
    at: int


def draw(seed: int) -> Draw:
    """Return a random architecture."""
    chooser = random.Random(seed)
    blocks = tuple(chooser.choice(BLOCKS) for _ in range(chooser.randint(1, 3)))
    return Draw(
        blocks, chooser.choice((0.0, 0.1, 0.4)), chooser.randint(1, len(blocks))
    )


class _Positions(nn.Module):
    """Rows merged with positions, and taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.linear(x.repeat_interleave(3, 0)))
        return rows.view(len(x), 3, -1).mean(1)


class _TimeMajor(nn.Module):
    """A recurrent layer with time on its first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x, x.cos(), x.sin()])
        last: Tensor = self.recurrent(steps)[0][-1]
        return last


class _Sorted(nn.Module):
    """Rows in the order of their first entry, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        hidden: Tensor = torch.tanh(self.linear(x[order]))
        return hidden[order.argsort()]


class _Experts(nn.Module):
    """Every row through one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > x[:, 1]).nonzero()[:, 0]
        others = (x[:, 0] <= x[:, 1]).nonzero()[:, 0]
        hidden = torch.zeros_like(x)
        hidden = hidden.index_copy(0, chosen, self.first(x[chosen]))
        return hidden.index_copy(0, others, self.second(x[others]))


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.norm(self.linear(x)))
        return hidden


_MAKERS = {
    "linear": _Linear,
    "positions": _Positions,
    "time_major": _TimeMajor,
    "sorted": _Sorted,
    "experts": _Experts,
}
BLOCKS = tuple(_MAKERS)


class Planted(nn.Module):
    """A drawn model, with or without a coupling after one of its blocks."""

    def __init__(self, drawn: Draw, coupling: Hidden | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_MAKERS[name]() for name in drawn.blocks)
        self.dropout = nn.Dropout(drawn.dropout)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.coupling, self.at = coupling, drawn.at

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for number, block in enumerate(self.blocks, 1):
            hidden = self.dropout(block(hidden))
            if self.coupling is not None and number == self.at:
                hidden = self.coupling(hidden, x)
        logits: Tensor = self.head(hidden)
        return logits


def reading_of(
    seed: int, coupling: str | None
) -> tuple[Reading, nn.Module, Tensor, Tensor]:
    """The third reading of a random model, with the draws of its last step."""
    torch.manual_seed(seed)
    chosen = None if coupling is None else COUPLINGS[coupling]
    model = Planted(draw(seed), chosen).double()
    inputs = torch.randn(NUM_EXAMPLES, WIDTH, dtype=torch.float64)
    targets = torch.randint(CLASSES, (NUM_EXAMPLES,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with nk.attach(model, optimizer) as probe:
        for _ in range(4):
            optimizer.zero_grad()
            torch.manual_seed(9)
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return probe.readings[-1], model, inputs, targets


def losses_apart(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Squared norms of the gradients of the batch's single losses, same draws."""
    torch.manual_seed(9)
    losses = functional.cross_entropy(model(inputs), targets, reduction="none")
    parameters = list(model.parameters())
    norms = []
    for loss in losses:
        grads = torch.autograd.grad(
            loss, parameters, retain_graph=True, materialize_grads=True
        )
        norms.append(sum(grad.square().sum() for grad in grads))
    return torch.stack(norms)

"""Models that per-example gradients must be right on, small enough for brute force."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """A model, the shape of its inputs, and how its parameters must be read."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ways: frozenset[str]
    batch_dim: int = 0
    vocabulary: int = 0

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the model, initialised alike on each call."""
        torch.manual_seed(1)
        return self.build().to(dtype)

    def data(
        self, dtype: torch.dtype = torch.float64, *, seed: int = 2
    ) -> tuple[Tensor, Tensor]:
        """Return inputs and classes."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            inputs = torch.randint(self.vocabulary, self.shape, generator=generator)
        else:
            inputs = torch.randn(self.shape, generator=generator, dtype=torch.float64)
            inputs = inputs.to(dtype)
        count = self.shape[self.batch_dim]
        return inputs, torch.randint(3, (count,), generator=generator)


class _Tied(nn.Module):
    """One layer called twice, its weight also another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        logits: Tensor = self.head(self.first(hidden))
        return logits


class _TiedEmbedding(nn.Module):
    """A language model's table, used at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.table(tokens).cumsum(1))).mean(1)
        return logits


class _Attention(nn.Module):
    """Attention, and a position table that is a bare parameter."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.attention = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + self.positions
        hidden, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        logits: Tensor = self.head(hidden.mean(1))
        return logits


class _TimeFirst(nn.Module):
    """Recurrent and linear layers that see time on axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 6)
        self.recurrent = nn.LSTM(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.recurrent(self.project(x.transpose(0, 1)))
        logits: Tensor = self.head(steps[-1])
        return logits


class _Functional(nn.Module):
    """Uses a child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(x @ self.child.weight + self.child.bias))
        return logits


class _HalfFunctional(_Functional):
    """Calls the child and uses its weight behind its back as well."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.child(x)) @ self.child.weight
        logits: Tensor = self.head(hidden)
        return logits


class _Folded(nn.Module):
    """Folds time into the batch, so that rows are no examples."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.project(x.flatten(0, 1)))
        logits: Tensor = self.head(rows.view(*x.shape[:2], -1).sum(1))
        return logits


class _Checkpointed(nn.Module):
    """Recomputes its middle in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = checkpoint(self.middle, hidden, use_reentrant=self.reentrant)
        logits: Tensor = self.head(hidden)
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.BatchNorm2d(4).eval(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    return model


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def _weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3))


LINEAR = frozenset({"linear"})

CASES = (
    Case("mlp", _mlp, (6, 6), LINEAR),
    Case(
        "cnn", _cnn, (5, 2, 9, 9), frozenset({"convolution", "normalisation", "linear"})
    ),
    Case("partly_frozen", _frozen, (6, 6), LINEAR),
    Case("tied", _Tied, (5, 6), frozenset({"linear", "linear, shared"})),
    Case(
        "tied_embedding",
        _TiedEmbedding,
        (5, 4),
        frozenset({"linear", "embedding and linear, shared"}),
        vocabulary=7,
    ),
    Case(
        "attention",
        _Attention,
        (4, 5, 8),
        frozenset({"linear", "replay of attention", "broadcast"}),
    ),
    Case(
        "time_first",
        _TimeFirst,
        (4, 6, 4),
        frozenset({"linear", "recurrent"}),
    ),
    Case(
        "functional", _Functional, (5, 4), frozenset({"linear", "replay of the model"})
    ),
    Case(
        "half_functional",
        _HalfFunctional,
        (5, 4),
        frozenset({"linear", "replay of the model"}),
    ),
    Case("folded", _Folded, (4, 6, 4), frozenset({"linear", "replay of the model"})),
    Case("weight_norm", _weight_norm, (5, 6), frozenset({"linear", "replay of 0"})),
    Case("checkpoint", lambda: _Checkpointed(reentrant=False), (5, 4), LINEAR),
    Case("checkpoint_reentrant", lambda: _Checkpointed(reentrant=True), (5, 4), LINEAR),
    # As many time steps as examples: sizes alone cannot tell the axes apart.
    Case(
        "time_first_square",
        _TimeFirst,
        (6, 6, 4),
        frozenset({"linear", "recurrent"}),
    ),
    Case(
        "attention_square",
        _Attention,
        (5, 5, 8),
        frozenset({"linear", "replay of attention", "broadcast"}),
    ),
)
IDS = [case.name for case in CASES]

MLP = CASES[0]


def random_attention() -> nn.Module:
    """Attention that drops entries while it trains."""
    return _Attention(dropout=0.5)


def dropout_model() -> nn.Module:
    """Dropout between two layers that have rules."""
    return _dropout()

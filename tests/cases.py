"""One table of small problems in double precision: model, loss, reduction, batches.

Batches are ragged throughout, since equal ones hide wrong weights. What each batch's
loss is divided by stands here by hand, so that it is a second opinion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.reference import curvature as reference

Batches = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Case:
    """A problem small enough for its whole Hessian.

    ``counts`` is what the loss of each batch is divided by, ``normaliser`` what a user
    has to say so, or ``None`` where noisekit must know it.
    """

    name: str
    build: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Tensor]
    batches: Batches
    counts: tuple[float, ...]
    reduction: Literal["mean", "sum"] = "mean"
    normaliser: Callable[[Any], Tensor | float] | None = None

    def __str__(self) -> str:
        """Name of the case, for pytest's ids."""
        return self.name

    def gradient_and_hessian(self) -> tuple[np.ndarray, np.ndarray]:
        """Return both at the initial weights, by the slow reference."""
        return reference.gradient_and_hessian(
            self.build(),
            self.loss_fn,
            self.batches,
            counts=self.counts,
            reduction=self.reduction,
        )

    def hessian(self) -> Tensor:
        """Return the dense Hessian at the initial weights, by the slow reference."""
        return torch.from_numpy(self.gradient_and_hessian()[1])


class TiedNetwork(nn.Module):
    """Uses one weight twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Go through both."""
        return self.decoder(torch.tanh(self.encoder(inputs)))


class PartlyUsedNetwork(nn.Module):
    """Has a layer that no output depends on, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.unused = nn.Linear(4, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Leave ``unused`` out."""
        return self.head(torch.tanh(self.frozen(inputs)))


class TwoInputs(nn.Module):
    """Takes two named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Combine both."""
        return self.head(torch.tanh(self.left(left)) * self.right(right))


class TokenModel(nn.Module):
    """Predicts a token at each position; classes are the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.head = nn.Linear(3, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(n, classes, positions)``."""
        return self.head(torch.tanh(self.embedding(tokens))).transpose(1, 2)


class Recurrent(nn.Module):
    """An LSTM over time, then a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Read the sequence."""
        return self.head(self.lstm(inputs)[0][:, -1])


class Attention(nn.Module):
    """Self-attention through the fused function, then a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Attend."""
        query, key, value = self.mix(inputs).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.head(mixed.mean(1))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """Return a builder whose model is the same each time, in double precision."""

    def builder() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().double()

    return builder


def mlp() -> nn.Module:
    """Return a small network with dropout, which a measurement must switch off."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


def batch_norm_network() -> nn.Module:
    """Return a small network with BatchNorm whose running statistics are not 0, 1."""
    norm = nn.BatchNorm1d(5)
    norm.running_mean = torch.linspace(-0.5, 0.5, 5)
    norm.running_var = torch.linspace(0.5, 2.0, 5)
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3))


def convolutional() -> nn.Module:
    """Return a small convolutional network with GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def classes(
    sizes: tuple[int, ...], *shape: int, num_classes: int = 3, seed: int = 1
) -> Batches:
    """Return batches of the given sizes, with class targets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, *shape, generator=generator, dtype=torch.float64),
            torch.randint(num_classes, (n,), generator=generator),
        )
        for n in sizes
    ]


def _token_batches() -> Batches:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for n, padding in ((4, 1), (4, 3), (2, 2)):
        tokens = torch.randint(6, (n, 5), generator=generator)
        targets = torch.randint(6, (n, 5), generator=generator)
        targets[0, :padding] = -100
        batches.append((tokens, targets))
    return batches


def _regression_batches() -> Batches:
    return [
        (x, torch.stack([x[:, 0], x[:, 1] * x[:, 2], y * 0.5], 1)) for x, y in RAGGED
    ]


def _pairs(as_mapping: bool) -> Batches:
    return [
        (
            {"left": x[:, :3], "right": x[:, 2:]}
            if as_mapping
            else (x[:, :3], x[:, 2:]),
            y,
        )
        for x, y in RAGGED
    ]


RAGGED = classes((4, 4, 2), 4)
COUNTS = (4.0, 4.0, 2.0)
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
_WEIGHTED_COUNTS = tuple(
    float(sum(CLASS_WEIGHTS[int(t)] for t in y)) for _, y in RAGGED
)


def _own_weighted_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, weight=CLASS_WEIGHTS)


CASES = [
    Case("mlp", seeded(mlp), nn.CrossEntropyLoss(), RAGGED, COUNTS),
    Case(
        "mlp_sum",
        seeded(mlp),
        nn.CrossEntropyLoss(reduction="sum"),
        RAGGED,
        COUNTS,
        reduction="sum",
    ),
    Case(
        "regression",
        seeded(mlp),
        nn.MSELoss(),
        _regression_batches(),
        (12.0, 12.0, 6.0),
    ),
    Case(
        "own_loss_sum",
        seeded(mlp),
        lambda outputs, targets: (outputs - targets).pow(4).sum(),
        _regression_batches(),
        COUNTS,
        reduction="sum",
    ),
    Case(
        "batch_norm", seeded(batch_norm_network), nn.CrossEntropyLoss(), RAGGED, COUNTS
    ),
    Case(
        "convolutional",
        seeded(convolutional),
        functional.cross_entropy,
        classes((3, 3, 1), 1, 3, 3),
        (3.0, 3.0, 1.0),
    ),
    Case(
        "class_weights",
        seeded(mlp),
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
        RAGGED,
        _WEIGHTED_COUNTS,
    ),
    Case(
        "own_class_weights",
        seeded(mlp),
        _own_weighted_loss,
        RAGGED,
        _WEIGHTED_COUNTS,
        normaliser=lambda targets: CLASS_WEIGHTS[targets].sum(),
    ),
    Case(
        "ignored_tokens",
        seeded(TokenModel),
        nn.CrossEntropyLoss(),
        _token_batches(),
        (19.0, 17.0, 8.0),
    ),
    Case("tied", seeded(TiedNetwork), nn.CrossEntropyLoss(), RAGGED, COUNTS),
    Case(
        "partly_used", seeded(PartlyUsedNetwork), nn.CrossEntropyLoss(), RAGGED, COUNTS
    ),
    Case(
        "tuple_inputs", seeded(TwoInputs), nn.CrossEntropyLoss(), _pairs(False), COUNTS
    ),
    Case(
        "named_inputs", seeded(TwoInputs), nn.CrossEntropyLoss(), _pairs(True), COUNTS
    ),
    Case(
        "recurrent",
        seeded(Recurrent),
        nn.CrossEntropyLoss(),
        classes((4, 2), 3, 2),
        (4.0, 2.0),
    ),
    Case(
        "attention",
        seeded(Attention),
        nn.CrossEntropyLoss(),
        classes((4, 2), 3, 4),
        (4.0, 2.0),
    ),
]

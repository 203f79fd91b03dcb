"""The networks M1 to M4 that costs are measured on, each with a batch."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Network:
    """A network and a batch for it.

    Attributes:
        title: What it is, with its batch.
        build: Makes the model.
        inputs: Makes the batch.
        num_classes: Of the targets.
        loss_fn: Makes the loss.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    num_classes: int = 10
    loss_fn: Callable[[], nn.Module] = nn.CrossEntropyLoss

    def made(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return model, inputs and targets, the same on each call."""
        torch.manual_seed(0)
        model, inputs = self.build(), self.inputs()
        shape = inputs.shape[:1] if inputs.is_floating_point() else inputs.shape
        return model, inputs, torch.randint(self.num_classes, shape)


def fully_connected(*, batch_norm: bool) -> nn.Module:
    """Keskar's F1: 784, five hidden layers of 512, 10."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise([784, *[512] * 5]):
        layers.append(nn.Linear(fan_in, fan_out))
        if batch_norm:
            layers.append(nn.BatchNorm1d(fan_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(512, 10))


def convolutional() -> nn.Module:
    """Four 3 x 3 convolutions without normalisation, and a linear layer."""
    layers: list[nn.Module] = []
    for channels, stride in (((3, 32), 1), ((32, 32), 2), ((32, 64), 1), ((64, 64), 2)):
        layers += [nn.Conv2d(*channels, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 8 * 8, 10))


class _Residual(nn.Module):
    """Two convolutions with group normalisation, and a shortcut."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False),
            nn.GroupNorm(8, fan_out),
            nn.ReLU(),
            nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False),
            nn.GroupNorm(8, fan_out),
        )
        same = stride == 1 and fan_in == fan_out
        self.shortcut = (
            nn.Identity() if same else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.branch(x) + self.shortcut(x))


def residual() -> nn.Module:
    """ResNet-20 with group normalisation."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
    ]
    fan_in = 16
    for width in (16, 32, 64):
        for block in range(3):
            stride = 2 if block == 0 and width > 16 else 1
            layers.append(_Residual(fan_in, width, stride))
            fan_in = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


class _Attention(nn.Module):
    """Causal self-attention of four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.into(x).view(batch, length, 3, 4, width // 4)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True
        )
        mixed: Tensor = self.out(found.transpose(1, 2).reshape(x.shape))
        return mixed


class _Block(nn.Module):
    """Attention and two linear layers, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), _Attention(width))
        self.mixture = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        result: Tensor = x + self.mixture(x)
        return result


class LanguageModel(nn.Module):
    """A transformer of four blocks over 64 tokens."""

    def __init__(self, vocabulary: int = 256, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(64, width)
        self.blocks = nn.Sequential(*[_Block(width) for _ in range(4)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.tokens(tokens) + self.places(places.repeat(len(tokens), 1))
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


class TokenLoss(nn.Module):
    """The mean cross-entropy over all tokens."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


NETWORKS = {
    "M1": Network(
        "Keskar's F1 without BatchNorm, batch 256",
        lambda: fully_connected(batch_norm=False),
        lambda: torch.randn(256, 784),
    ),
    "M1 BatchNorm": Network(
        "Keskar's F1, batch 256; BatchNorm couples the examples while it trains, so "
        "that the default reads the gradient alone",
        lambda: fully_connected(batch_norm=True),
        lambda: torch.randn(256, 784),
    ),
    "M2": Network(
        "convolutional, no normalisation, 3 x 32 x 32, batch 128",
        convolutional,
        lambda: torch.randn(128, 3, 32, 32),
    ),
    "M3": Network(
        "ResNet-20 with group normalisation, 3 x 32 x 32, batch 128",
        residual,
        lambda: torch.randn(128, 3, 32, 32),
    ),
    "M4": Network(
        "transformer language model, 4 blocks of width 128, 64 tokens, batch 32",
        LanguageModel,
        lambda: torch.randint(256, (32, 64)),
        num_classes=256,
        loss_fn=TokenLoss,
    ),
}

"""Networks that put layers together in the ways in which people do."""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

N, T, C = 4, 5, 3
"""Examples, positions, classes."""


class Headed(nn.Module):
    """A core, called as ``route`` says, and a linear layer over what comes of it."""

    def __init__(
        self, core: nn.Module, width: int, route: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        self.core = core
        self.head = nn.Linear(width, C)
        self.route = route

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.route is None:
            hidden = self.core(*inputs)
        else:
            hidden = self.route(self.core, *inputs)
        logits: Tensor = self.head(hidden)
        return logits


class Residual(nn.Module):
    """Pre-normalised blocks with skip connections, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.block = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.short = nn.Conv2d(4, 4, 1, stride=2)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        for _ in range(2):
            hidden = hidden + self.block(torch.relu(self.norm(hidden)))
        logits: Tensor = self.head(self.short(hidden).mean((2, 3)))
        return logits


class UNet(nn.Module):
    """Down, up by a transposed convolution, and across; classes per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="circular")
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.up = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=2)
        self.out = nn.Conv2d(6, C, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.silu(self.norm(self.middle(self.down(x))))
        joined = torch.cat([x, self.up(hidden)], 1)
        logits: Tensor = self.out(joined)
        return logits.movedim(1, -1)


class Vision(nn.Module):
    """Patches, a class token and positions as bare parameters, attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        tokens = tokens + self.positions
        heads = self.qkv(self.norm(tokens)).unflatten(-1, (3, 2, 4)).movedim(1, 3)
        q, k, v = heads.unbind(1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.scale * self.out(mixed.movedim(1, 2).flatten(2))
        logits: Tensor = self.head(tokens[:, 0])
        return logits


class LanguageModel(nn.Module):
    """A causal transformer whose output layer is its token table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 8, padding_idx=0)
        self.places = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 9, 0.0, batch_first=True)
        self.norm = nn.RMSNorm(8)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = self.tokens(tokens) + self.places(
            torch.arange(length, device=tokens.device)
        )
        mask = nn.Transformer.generate_square_subsequent_mask(
            length, device=hidden.device, dtype=hidden.dtype
        )
        logits: Tensor = self.out(self.norm(self.layer(hidden, mask, is_causal=True)))
        return logits


class SharedWithFallback(nn.Module):
    """One weight in a layer with a rule and in one without."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        self.recurrent = nn.RNN(6, 6, batch_first=True)
        self.recurrent.weight_ih_l0 = self.linear.weight
        self.head = nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.recurrent(torch.tanh(self.linear(x)))
        logits: Tensor = self.head(steps)
        return logits


class Experts(nn.Module):
    """Each example goes through one expert; the last is used by none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        hidden = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                hidden = hidden.index_add(0, rows, expert(x[rows]))
        logits: Tensor = self.head(hidden.tanh())
        return logits


class Queries(nn.Module):
    """As many learned queries as examples, read by a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(N, 6))
        self.project = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.project(self.queries).mT, -1) @ self.queries


class BehindItsBack(nn.Module):
    """A parameter of its own, and a child's weight used without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.child = nn.Linear(6, 6)
        self.head = nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.child(x * self.scale)) @ self.child.weight
        logits: Tensor = self.head(hidden)
        return logits


class Repeated(nn.Module):
    """A layer with a rule and one without, both called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.slope = nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.slope(self.linear(x))
        return x


class ByHand(nn.Module):
    """A custom module that computes with its parameters itself, and scales by one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight).tanh() * self.scale


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=7,
        n_positions=9,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Logits(GPT2LMHeadModel(config))


class Logits(nn.Module):
    """What a model of another package returns, as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


def resnet() -> nn.Module:
    """Torchvision's, with group normalisation, and without its two widest stages."""
    kind = torchvision.models.resnet
    model = kind.ResNet(
        kind.BasicBlock,
        [1, 1, 1, 1],
        norm_layer=lambda channels: nn.GroupNorm(4, channels),
    )
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, C)
    return model


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, C))
    for parameter in (model[0].weight, model[1].bias):
        parameter.requires_grad_(False)
    return model


def frozen_batch_norm() -> nn.Module:
    norms = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.BatchNorm1d(5)).eval()
    for norm in (norms[0], norms[2]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return Headed(norms, 5)


def instance_norm(*, tracking: bool, training: bool) -> nn.Module:
    norm = nn.InstanceNorm1d(T, affine=True, track_running_stats=tracking)
    nn.init.normal_(norm.weight)
    return Headed(norm, 6).train(training)

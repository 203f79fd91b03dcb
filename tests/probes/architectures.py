"""Architectures and losses whose every example and layer must be read exactly.

Inputs are tuples of tensors with the examples on axis 0; outputs have them there too,
and the classes on their last axis, so that every loss fits every model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.probes import networks, routes
from tests.probes.networks import T
from tests.probes.routes import Inputs


@dataclass(frozen=True)
class Architecture:
    """A model, what goes into it, and the kinds of ways in which it must be read."""

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[], Inputs]
    ways: frozenset[str]

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the model, initialised alike on each call."""
        torch.manual_seed(1)
        return self.build().to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> Inputs:
        """Return the batch, drawn alike on each call."""
        torch.manual_seed(2)
        drawn = self.draw()
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in drawn)


@dataclass(frozen=True)
class Loss:
    """A loss of a batch, and how targets for it are made from the outputs' shape."""

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    reduction: str
    classes: bool = True

    def targets(self, outputs: Tensor) -> Tensor:
        """Return targets, drawn alike for outputs of the same shape."""
        generator = torch.Generator().manual_seed(3)
        if self.classes:
            shape, classes = outputs.shape[:-1], outputs.shape[-1]
            return torch.randint(classes, shape, generator=generator)
        drawn = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        return drawn.to(outputs.dtype)


def cross_entropy(outputs: Tensor, targets: Tensor, **options: object) -> Tensor:
    return functional.cross_entropy(
        outputs.flatten(0, -2), targets.flatten(), **options
    )


def _weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    weight = torch.linspace(0.2, 2.0, outputs.shape[-1], dtype=outputs.dtype)
    return cross_entropy(outputs, targets, weight=weight)


def _log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).cosh().log().flatten(1).sum(1).mean()


LOSSES = (
    Loss("cross_entropy_mean", cross_entropy, "mean"),
    Loss("cross_entropy_sum", lambda o, t: cross_entropy(o, t, reduction="sum"), "sum"),
    Loss("class_weights", _weighted, "mean"),
    Loss("ignored", lambda o, t: cross_entropy(o, t, ignore_index=1), "mean"),
    Loss("mse_mean", functional.mse_loss, "mean", classes=False),
    Loss(
        "mse_sum",
        lambda o, t: functional.mse_loss(o, t, reduction="sum"),
        "sum",
        classes=False,
    ),
    Loss("log_cosh", _log_cosh, "mean", classes=False),
)


def _case(
    name: str, build: Callable[[], nn.Module], draw: Callable[[], Inputs], *ways: str
) -> Architecture:
    return Architecture(name, build, draw, frozenset(ways))


def _core(
    name: str,
    build: Callable[[], nn.Module],
    width: int,
    draw: Callable[[], Inputs],
    way: str,
    *,
    route: Callable[..., Tensor] | None = None,
) -> Architecture:
    """A single layer under a linear head."""
    return _case(
        name, lambda: networks.Headed(build(), width, route), draw, way, "linear"
    )


RULES = (
    _core("linear_2d", lambda: nn.Linear(6, 4), 4, routes.flat, "linear"),
    _core(
        "linear_no_bias", lambda: nn.Linear(6, 4, bias=False), 4, routes.flat, "linear"
    ),
    _core("linear_3d", lambda: nn.Linear(6, 4), 4, routes.sequences, "linear"),
    _core("linear_4d", lambda: nn.Linear(8, 4), 4, routes.images, "linear"),
    _core("conv1d", lambda: nn.Conv1d(T, 6, 2), 5, routes.sequences, "convolution"),
    _core(
        "conv2d", lambda: nn.Conv2d(2, 6, 3, groups=2), 6, routes.images, "convolution"
    ),
    _core(
        "conv3d",
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 6, 2)),
        6,
        routes.images,
        "convolution",
        route=routes.pool,
    ),
    _core(
        "conv_transposed",
        lambda: nn.ConvTranspose2d(2, 6, 3, stride=2),
        6,
        routes.images,
        "convolution",
        route=routes.pool,
    ),
    _core("layer_norm", lambda: nn.LayerNorm(6), 6, routes.sequences, "normalisation"),
    _core("rms_norm", lambda: nn.RMSNorm(6), 6, routes.sequences, "normalisation"),
    _core(
        "group_norm",
        lambda: nn.GroupNorm(1, 2),
        2,
        routes.images,
        "normalisation",
        route=routes.pool_squares,
    ),
    _case(
        "batch_norm_eval",
        networks.frozen_batch_norm,
        routes.flat,
        "normalisation",
        "linear",
    ),
    *(
        _case(
            f"instance_norm{'_tracking' * tracking}{'' if training else '_eval'}",
            lambda t=tracking, m=training: networks.instance_norm(
                tracking=t, training=m
            ),
            routes.sequences,
            "normalisation",
            "linear",
        )
        for tracking in (False, True)
        for training in (False, True)
    ),
    _core("embedding", lambda: nn.Embedding(7, 4), 4, routes.tokens, "embedding"),
    _core(
        "embedding_options",
        lambda: nn.Embedding(7, 4, padding_idx=2, max_norm=1.0),
        4,
        routes.tokens,
        "embedding",
    ),
)

FALLBACK = (
    _core(
        "rnn",
        lambda: nn.RNN(6, 4, 2, nonlinearity="relu"),
        4,
        routes.sequences,
        "recurrent",
        route=routes.time_first,
    ),
    _core(
        "lstm",
        lambda: nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True, proj_size=3),
        6,
        routes.sequences,
        "replay",
        route=routes.steps,
    ),
    _core(
        "lstm_time_first_square",
        lambda: nn.LSTM(6, 4, bidirectional=True),
        8,
        routes.square_sequences,
        "recurrent",
        route=routes.time_first,
    ),
    _core(
        "lstm_states",
        lambda: nn.LSTM(6, 4, batch_first=True),
        4,
        routes.sequences,
        "recurrent",
        route=routes.with_state,
    ),
    _core(
        "gru",
        lambda: nn.GRU(6, 4, bias=False, batch_first=True),
        4,
        routes.sequences,
        "recurrent",
        route=routes.steps,
    ),
    _core(
        "gru_packed",
        lambda: nn.GRU(6, 4, batch_first=True),
        4,
        routes.ragged,
        "replay",
        route=routes.packed,
    ),
    _core(
        "attention",
        lambda: nn.MultiheadAttention(6, 2),
        6,
        routes.sequences,
        "replay",
        route=routes.attention_time_first,
    ),
    _core(
        "attention_options",
        lambda: nn.MultiheadAttention(
            6, 2, bias=False, add_bias_kv=True, kdim=6, vdim=6, batch_first=True
        ),
        6,
        routes.square_sequences,
        "replay",
        route=routes.attention,
    ),
    _core(
        "attention_masked",
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        6,
        routes.square_sequences,
        "replay",
        route=routes.attention_masked,
    ),
    _core(
        "attention_masked_each",
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        6,
        routes.sequences,
        "replay",
        route=routes.attention_masked_each,
    ),
    _core(
        "bilinear",
        lambda: nn.Bilinear(2, 4, 5),
        5,
        routes.sequences,
        "replay",
        route=routes.halves,
    ),
    *(
        _core(
            f"embedding_bag_{mode}",
            lambda mode=mode: nn.EmbeddingBag(7, 4, mode=mode, padding_idx=1),
            4,
            routes.tokens,
            "replay",
        )
        for mode in ("sum", "mean", "max")
    ),
    _core(
        "embedding_bag_offsets",
        lambda: nn.EmbeddingBag(7, 4),
        4,
        routes.tokens,
        "replay",
        route=routes.by_offsets,
    ),
    _core("by_hand", networks.ByHand, 6, routes.sequences, "replay"),
    _core("repeated", networks.Repeated, 6, routes.flat, "replay"),
    _core("queries", networks.Queries, 6, routes.flat, "replay"),
    _core(
        "weight_norm",
        lambda: parametrizations.weight_norm(nn.Conv1d(T, 5, 2)),
        5,
        routes.sequences,
        "replay",
    ),
    _core(
        "orthogonal",
        lambda: parametrizations.orthogonal(nn.Linear(6, 5)),
        5,
        routes.flat,
        "replay",
    ),
    _case(
        "shared_with_fallback",
        networks.SharedWithFallback,
        routes.sequences,
        "linear",
        "recurrent",
        "replay",
    ),
    _case("behind_its_back", networks.BehindItsBack, routes.flat, "linear", "replay"),
    _case("experts", networks.Experts, routes.flat, "linear", "replay"),
    _case("frozen", networks.partly_frozen, routes.flat, "linear", "normalisation"),
)

NETWORKS = (
    _case(
        "residual",
        networks.Residual,
        routes.images,
        "convolution",
        "normalisation",
        "linear",
    ),
    _case("u_net", networks.UNet, routes.images, "convolution", "normalisation"),
    _case(
        "vision_transformer",
        networks.Vision,
        routes.images,
        "convolution",
        "normalisation",
        "linear",
        "replay",
    ),
    _case(
        "transformer_layer_eval",
        lambda: networks.Headed(
            nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 6
        ).eval(),
        routes.square_sequences,
        "linear",
        "normalisation",
        "replay",
    ),
    _case(
        "transformer",
        lambda: networks.Headed(
            nn.Transformer(6, 2, 1, 1, 8, 0.0, batch_first=True),
            6,
            lambda core, x: core(x, x.flip(1)),
        ),
        routes.sequences,
        "linear",
        "normalisation",
        "replay",
    ),
    *(
        _case(name, build, draw, "embedding", "normalisation", "linear", *more)
        for name, build, draw, more in (
            ("language_model", networks.LanguageModel, routes.tokens, ("replay",)),
            (
                "language_model_square",
                networks.LanguageModel,
                routes.square_tokens,
                ("replay",),
            ),
            ("gpt2", networks.gpt2, routes.tokens, ()),
        )
    ),
    _case(
        "resnet",
        networks.resnet,
        lambda: (torch.randn(2, 3, 8, 8),),
        "convolution",
        "normalisation",
        "linear",
    ),
)

ARCHITECTURES = (*RULES, *FALLBACK, *NETWORKS)

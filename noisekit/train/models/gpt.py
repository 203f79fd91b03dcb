"""A small GPT: a decoder-only transformer over tokens."""

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from noisekit.core.errors import UsageError
from noisekit.train.models.section import NetworkSection
from noisekit.train.section import Fraction, PositiveInt

_STD = 0.02


class Gpt(NetworkSection):
    """GPT-2 at any size; the embedding of tokens is also the output layer's weight.

    With ``init = "default"`` weights are GPT-2's: normal with deviation 0.02, those of
    the layers that write into the residual stream divided by the root of their number,
    biases zero.

    Attributes:
        layers: Number of blocks.
        heads: Attention heads of each block.
        width: Width of the residual stream, a multiple of ``heads``.
        dropout: Share that is dropped of the embeddings and of what each layer adds.

    Source:
        Radford et al. 2019, "Language models are unsupervised multitask learners",
        section 2.3.
    """

    name: Literal["gpt"] = "gpt"
    layers: PositiveInt = 2
    heads: PositiveInt = 2
    width: PositiveInt = 64
    dropout: Fraction = 0.0

    reads_tokens: ClassVar[bool] = True

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"heads needs to divide width ({self.width}), got {self.heads}"
            )
        return self

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Return the network for sequences of ``input_shape[0]`` tokens."""
        if len(input_shape) != 1:
            raise UsageError(
                f"gpt needs sequences of tokens, got examples of shape {input_shape}; "
                "use data.name = 'text'."
            )
        return Transformer(self, context=input_shape[0], num_tokens=num_classes)


class Transformer(nn.Module):
    """Logits of the next token at each position.

    Inputs are tokens of shape ``(n, positions)``; outputs have shape ``(n, tokens,
    positions)``, classes on axis 1 as PyTorch's losses take them.
    """

    def __init__(self, spec: Gpt, *, context: int, num_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, spec.width)
        self.positions = nn.Embedding(context, spec.width)
        self.dropout = nn.Dropout(spec.dropout)
        blocks = [_Block(spec) for _ in range(spec.layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(spec.width)
        self.output = nn.Linear(spec.width, num_tokens, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=_STD)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for block in blocks:
            for added in (block.project, block.narrow):
                nn.init.normal_(added.weight, std=_STD / (2 * spec.layers) ** 0.5)
        self.output.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # A row of places per example: each example then has an embedding of its own.
        stream = self.tokens(tokens) + self.positions(places.expand_as(tokens))
        stream = self.blocks(self.dropout(stream))  # (n, positions, width)
        logits: Tensor = self.output(self.norm(stream))
        return logits.transpose(1, 2)


class _Block(nn.Module):
    """Causal attention and a dense layer of four times the width, each added."""

    def __init__(self, spec: Gpt) -> None:
        super().__init__()
        self._heads = spec.heads
        self.norm1 = nn.LayerNorm(spec.width)
        self.attend = nn.Linear(spec.width, 3 * spec.width)
        self.project = nn.Linear(spec.width, spec.width)
        self.norm2 = nn.LayerNorm(spec.width)
        self.widen = nn.Linear(spec.width, 4 * spec.width)
        self.activation = nn.GELU(approximate="tanh")
        self.narrow = nn.Linear(4 * spec.width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, stream: Tensor) -> Tensor:
        """Return the residual stream after the block."""
        attended = self.project(self._attention(self.norm1(stream)))
        stream = stream + self.dropout(attended)
        dense = self.narrow(self.activation(self.widen(self.norm2(stream))))
        added: Tensor = stream + self.dropout(dense)
        return added

    def _attention(self, inputs: Tensor) -> Tensor:
        shape = (*inputs.shape[:2], self._heads, -1)
        parts = self.attend(inputs).chunk(3, dim=-1)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in parts)
        heads = scaled_dot_product_attention(query, key, value, is_causal=True)
        return heads.transpose(1, 2).flatten(2)  # (n, positions, width)

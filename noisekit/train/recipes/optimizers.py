"""Optimizers of recipes: each a section that builds PyTorch's."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Literal, Self

import torch
from pydantic import Discriminator, Tag, model_validator
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.train.references import resolve
from noisekit.train.section import (
    OWN,
    Fraction,
    NonNegativeFloat,
    OwnSection,
    PositiveFloat,
    Section,
    kind_of,
)

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


class OptimizerSection(Section):
    """Which optimizer, and its learning rate.

    Attributes:
        name: The optimizer.
        learning_rate: Rate that the schedule multiplies.
    """

    name: str
    learning_rate: PositiveFloat

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer; its rate is set anew before each update."""


class Sgd(OptimizerSection):
    """SGD with PyTorch's momentum: ``v = momentum v + g; w -= rate v``."""

    name: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum above 0")
        return self

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return ``torch.optim.SGD``."""
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


class _AdamSection(OptimizerSection):
    """What Adam and AdamW share."""

    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8

    def _build(
        self, kind: type[torch.optim.Adam], parameters: Iterable[nn.Parameter]
    ) -> torch.optim.Optimizer:
        listed = list(parameters)
        return kind(
            listed,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=all(p.device.type in _FUSED_DEVICES for p in listed),
        )


class Adam(_AdamSection):
    """Adam; its weight decay is added to the gradient."""

    name: Literal["adam"] = "adam"

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return ``torch.optim.Adam``."""
        return self._build(torch.optim.Adam, parameters)


class AdamW(_AdamSection):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return ``torch.optim.AdamW``."""
        return self._build(torch.optim.AdamW, parameters)


class OwnOptimizer(OwnSection, OptimizerSection, extra="allow"):
    """The user's own optimizer: ``module:Class``, called with the other keys.

    The class, or function, takes the parameters, ``lr`` and the other keys.
    """

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Call the class."""
        kind = resolve(self.name)
        made = (
            kind(list(parameters), lr=self.learning_rate, **self.arguments)
            if callable(kind)
            else kind
        )
        if not isinstance(made, torch.optim.Optimizer):
            raise UsageError(
                f"optimizer.name = {self.name!r} needs to return a "
                f"torch.optim.Optimizer, got {type(made).__name__}."
            )
        return made


OptimizerSpec = Annotated[
    Annotated[Sgd, Tag("sgd")]
    | Annotated[Adam, Tag("adam")]
    | Annotated[AdamW, Tag("adamw")]
    | Annotated[OwnOptimizer, Tag(OWN)],
    Discriminator(kind_of()),
]
"""The table of optimizers: a new one is a section with ``build``, and a line here."""

"""Optimizers of recipes: each a section that builds PyTorch's, with its rate rule."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Discriminator, Tag, model_validator
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.core.references import resolve
from noisekit.train.gradients import TrustRatio
from noisekit.train.section import (
    OWN,
    Fraction,
    NonNegativeFloat,
    OwnSection,
    PositiveFloat,
    PositiveInt,
    Section,
    kind_of,
)

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


Scaling = Literal["none", "sqrt", "linear"]
Settings = Mapping[str, Any]
"""What the optimizer's parameter groups hold beside the rate, by PyTorch's names."""


class OptimizerSection(Section):
    """Which optimizer, its learning rate, and how that follows the batch size.

    The rate of an update is ``learning_rate`` times the scaling's factor times the
    schedule's. PyTorch's momentum, ``v = momentum v + g; w -= rate v``, needs no
    correction where the rate changes (Goyal et al. 2017, arXiv:1706.02677, section 3).

    Attributes:
        name: The optimizer.
        learning_rate: Rate at a batch of ``reference_batch`` examples.
        reference_batch: Batch size that ``learning_rate`` is stated for; 1 makes it a
            rate per example.
        scaling: How the rate grows with the batch size ``B``: not at all, as
            ``sqrt(B / reference_batch)``, or as ``B / reference_batch``.
        follows: Which batch size is ``B``: that of each update (``present``), or
            ``training.batch_size`` whatever the batch policy makes of it (``start``).
    """

    name: str
    learning_rate: PositiveFloat
    reference_batch: PositiveInt | None = None
    scaling: Scaling = "none"
    follows: Literal["present", "start"] = "present"

    @model_validator(mode="after")
    def _scaling_has_a_reference(self) -> Self:
        if self.scaling != "none" and self.reference_batch is None:
            raise ValueError(
                f"scaling = {self.scaling!r} needs reference_batch, the batch size "
                "that learning_rate is stated for"
            )
        return self

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer; its rate is set anew before each update."""

    @property
    def layer_scaling(self) -> TrustRatio | None:
        """How each layer's gradient is scaled before the optimizer steps, if it is."""
        return None

    @property
    def settings(self) -> Settings:
        """What the parameter groups hold beside the rate."""
        return {}

    def settings_at(self, batch_size: int, beta_factor: float = 1.0) -> Settings:
        """Return the settings of an update of ``batch_size`` examples.

        Args:
            batch_size: Examples of the update.
            beta_factor: Power that a batch policy raises Adam's betas to.
        """
        return self.settings

    def rate_at(self, batch_size: int) -> float:
        """Return the rate of an update of ``batch_size`` examples, unscheduled."""
        if self.scaling == "none" or self.reference_batch is None:
            return self.learning_rate
        ratio = batch_size / self.reference_batch
        return self.learning_rate * (
            ratio if self.scaling == "linear" else math.sqrt(ratio)
        )


class Sgd(OptimizerSection):
    """SGD with PyTorch's momentum: ``v = momentum v + g; w -= rate v``.

    Attributes:
        momentum: Factor of the buffer.
        nesterov: Whether the buffer is applied as Nesterov's.
        weight_decay: What of the weights is added to the gradient.
        trust_ratio: LARS's coefficient: ``g`` becomes ``trust_ratio |w| (g + decay w)
            / (|g| + decay |w|)`` for each weight matrix. Left out, gradients are
            applied as they are.
    """

    name: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    trust_ratio: PositiveFloat | None = None

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum above 0")
        return self

    @property
    def settings(self) -> Settings:
        """Momentum, its kind, and weight decay."""
        return {
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            # The trust ratio scales the decay too, and adds it itself.
            "weight_decay": self.weight_decay if self.trust_ratio is None else 0.0,
        }

    @property
    def layer_scaling(self) -> TrustRatio | None:
        """The trust ratio, where one is stated."""
        if self.trust_ratio is None:
            return None
        return TrustRatio(self.trust_ratio, self.weight_decay)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return ``torch.optim.SGD``."""
        return torch.optim.SGD(parameters, lr=self.learning_rate, **self.settings)


class _AdamSection(OptimizerSection):
    """What Adam and AdamW share.

    Attributes:
        weight_decay: Its factor.
        betas: Decay rates of the two averages at a batch of ``reference_batch``.
        eps: Added to the root of the second average.
        scale_betas: Which of the averages keep their half-life in examples where the
            batch size ``B`` differs: ``beta ** (B / reference_batch)`` (Marek et al.
            2025, arXiv:2507.07101, who keep that of the second).
    """

    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    scale_betas: Literal["none", "second", "both"] = "none"

    @model_validator(mode="after")
    def _scaled_betas_have_a_reference(self) -> Self:
        if self.scale_betas != "none" and self.reference_batch is None:
            raise ValueError(
                f"scale_betas = {self.scale_betas!r} needs reference_batch, the batch "
                "size that betas are stated for"
            )
        return self

    @property
    def settings(self) -> Settings:
        """Betas, epsilon and weight decay."""
        return {
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }

    def settings_at(self, batch_size: int, beta_factor: float = 1.0) -> Settings:
        """Return the settings with the betas of a batch size."""
        power = 1.0
        if self.scale_betas != "none" and self.reference_batch is not None:
            power = batch_size / self.reference_batch
        if power == beta_factor == 1.0:
            return self.settings
        first, second = self.betas
        first **= beta_factor * (power if self.scale_betas == "both" else 1.0)
        return {**self.settings, "betas": (first, second ** (beta_factor * power))}

    def _build(
        self, kind: type[torch.optim.Adam], parameters: Iterable[nn.Parameter]
    ) -> torch.optim.Optimizer:
        listed = list(parameters)
        return kind(
            listed,
            lr=self.learning_rate,
            **self.settings,
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

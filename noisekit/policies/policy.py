"""The protocol of batch-size policies: pure functions of what was observed.

A policy is asked before every update, also before the first. It gets its own state and
an :class:`Observation`, and returns the next state and a :class:`Decision`. States are
JSON, so that a checkpoint needs nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch

from noisekit.core.citations import CITATIONS
from noisekit.core.settings import Settings, check_settings
from noisekit.policies.point import At

State = Mapping[str, Any]
"""What a policy keeps from update to update: texts to numbers, texts, lists, None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is known where an update starts.

    The position is that of the update about to start; all other values are of the
    update before it, ``None`` where they were not asked for or do not exist yet.

    Attributes:
        updates: Updates taken.
        examples: Examples that entered an update, on all ranks.
        epochs: Passes over the training data, parts of one included.
        share: Share of the run; ``None`` where its length is not known.
        batch_size: Examples of the last update, over ranks and accumulation.
        learning_rate: Its rate, for the mean gradient.
        loss: Mean loss of its batch.
        evaluation_loss: Loss of the last evaluation.
        variance_trace: ``tr Σ`` of single examples' gradients, ``n - 1`` denominator
            [loss²/param²].
        conv_compat_variance: The biased variance with the second moment of
            convolutions summed position by position, for ``CABS`` alone
            [loss²/param²].
        grad_sq_norm: ``|g|²`` of the batch's mean gradient [loss²/param²].
        debiased_grad_sq_norm: ``|G|²`` without the noise's part; may be negative
            [loss²/param²].
        inner_product_test: Smallest ``θ`` with which the batch passes the
            inner-product test.
        orthogonality_test: Smallest ``ν`` with which it passes the orthogonality test.
        others: What a policy of your own needs besides, by name.
    """

    updates: int = 0
    examples: int = 0
    epochs: float = 0.0
    share: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    loss: float | None = None
    evaluation_loss: float | None = None
    variance_trace: float | None = None
    conv_compat_variance: float | None = None
    grad_sq_norm: float | None = None
    debiased_grad_sq_norm: float | None = None
    inner_product_test: float | None = None
    orthogonality_test: float | None = None
    others: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def value(self, name: str) -> float | None:
        """Return one of the values by name, ``others`` included."""
        if name in self.others:
            return self.others[name]
        value: float | None = getattr(self, name, None)
        return value


@dataclass(frozen=True, slots=True)
class Decision:
    """What holds for the next update.

    Attributes:
        batch_size: Examples of the update, over ranks and accumulation.
        rate_factor: Factor on the base learning rate, since the start of training: not
            on the last update's rate.
        beta_factor: Power to which the optimizer's base betas are raised: with the
            ratio of the batch sizes, averages keep their half-life in examples.
        reason: Why, in a few words.
    """

    batch_size: int
    rate_factor: float = 1.0
    beta_factor: float = 1.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Need:
    """A value that a policy needs to observe.

    Attributes:
        name: Field of :class:`Observation`, or a key of its ``others``.
        every: How often.
    """

    name: str
    every: At = field(default_factory=lambda: At(updates=1))


class Policy(ABC):
    """Base of batch-size policies: a frozen dataclass whose fields are its settings.

    Settings are checked against their annotations. ``next`` must be a pure function:
    equal states and observations give equal results, on every rank and after a resume.

    Attributes:
        name: Name in recipes.
        rule: The rule as a formula or one sentence.
        sources: Keys of ``CITATIONS``, or texts.
        refuses: What the rule does not cover, one sentence each.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    sources: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check every setting against its annotation."""
        check_settings(cast("Settings", self))

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be observed, and how often; nothing but the position here."""
        return ()

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that the rule is not about; none here.

        Raises:
            UsageError: If it is refused.
        """
        return

    @abstractmethod
    def bounds(self) -> tuple[int, int]:
        """Return the smallest and the largest batch that the policy may ask for."""

    @abstractmethod
    def start(self) -> State:
        """Return the state before the first update."""

    @abstractmethod
    def next(self, state: State, observation: Observation) -> tuple[State, Decision]:
        """Decide about the update that starts where the observation was made."""

    def __str__(self) -> str:
        """Write the rule, its settings, its source and what it refuses."""
        settings = ", ".join(
            f"{item.name}={_text(getattr(self, item.name))}"
            for item in fields(cast("Settings", self))
        )
        parts = [
            f"{type(self).__name__}: {self.rule}",
            f"settings: {settings}",
            *(f"needs: {need.name}, every {need.every}" for need in self.needs),
            *(f"source: {_cited(source)}" for source in self.sources),
            *(f"refuses: {text}" for text in self.refuses),
        ]
        return "\n".join(parts)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    return str(value)


def _cited(source: str) -> str:
    if source not in CITATIONS:
        return source
    paper = CITATIONS[source]
    where = f"arXiv:{paper.arxiv}" if paper.arxiv else paper.venue
    return f"{paper.short}, {paper.title}, {where}"

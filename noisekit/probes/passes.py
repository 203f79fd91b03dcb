"""What a training step leaves behind: passes, captured calls, gradients."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from noisekit.core.layer_rules import LayerCall
from noisekit.core.per_example import Site
from noisekit.noise.moments import GradientMoments
from noisekit.probes.accumulation import Before

CallKey = tuple[str, int]
"""A site's path and how often it had been called before in the same pass."""


@dataclass(slots=True, eq=False)
class ForwardPass:
    """One forward pass of the model: a micro-batch.

    Attributes:
        num_examples: Rows of the batch; ``None`` where the model's input has none.
        sq_norms: ``|u_i|²`` by parameter index, as its gradient is accumulated.
        inner_products: ``<u_i, v>`` by parameter, where a direction ``v`` was given.
        faults: Why per-example readings do not exist here.
        num_calls: Calls per site so far.
        inputs: The model's own inputs, where they are kept for a replay.
        ghost: Moments over replayed ghost batches.
    """

    num_examples: int | None
    sq_norms: dict[int, Tensor] = field(default_factory=dict)
    inner_products: list[Tensor] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_calls: dict[str, int] = field(default_factory=dict)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    ghost: GradientMoments | None = None


@dataclass(slots=True, eq=False)
class CapturedCall:
    """A call of a site, waiting for its output's gradients in graph task ``task``."""

    site: Site
    call: LayerCall
    forward_pass: ForwardPass
    versions: tuple[int, ...]
    key: CallKey
    task: int = -1
    released: bool = False
    norms: dict[str, Tensor] = field(default_factory=dict)

    def sq_norms_of(self, parameter: nn.Parameter, among: Collection[str]) -> Tensor:
        """``|u_i|²`` of one parameter; those of ``among`` are computed together."""
        name = self.site.name_of(parameter)
        if name not in self.norms:
            names = among if name in among else (name,)
            self.norms = self.site.rule.sq_norms(self.call, names)
        return self.norms[name]

    def release(self) -> None:
        """Drop the activations and gradients."""
        self.call.args, self.call.kwargs = (), {}
        self.call.grads = [None] * len(self.call.grads)
        self.released = True


@dataclass(slots=True)
class StepRecord:
    """What the backward passes of one optimiser step have gathered.

    Attributes:
        passes: The forward passes that gradients came from.
        gradient: Squared norm of ``.grad`` per parameter after the last of them.
        faults: Why the gradient is not this step's alone.
    """

    passes: list[ForwardPass] = field(default_factory=list)
    gradient: Tensor | None = None
    faults: list[str] = field(default_factory=list)

    def start(self, before: Before) -> None:
        """Begin a backward pass; where ``.grad`` was emptied, begin the step anew."""
        if before is Before.EMPTY:
            self.passes, self.gradient, self.faults = [], None, []
        elif before is Before.NOT_ZEROED:
            self.faults.append("gradients of the step before were not zeroed")
        elif before is Before.CHANGED:
            self.faults.append("gradients were changed between two backward passes")

    def start_unseen(self) -> None:
        """Begin a backward pass that no pass of the model led to."""
        self.passes, self.gradient = [], None
        self.faults = ["the model's own forward was not called in this step"]

    def add(self, passes: Iterable[ForwardPass]) -> None:
        """Count ``passes`` in."""
        for forward_pass in passes:
            if forward_pass not in self.passes:
                self.passes.append(forward_pass)

    @property
    def num_examples(self) -> int:
        """Examples behind the gradient."""
        return sum(p.num_examples or 0 for p in self.passes)

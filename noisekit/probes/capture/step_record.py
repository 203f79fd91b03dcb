"""What a training step leaves behind: passes, captured calls, gradients."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from noisekit.core.layers.decomposition import GradientPieces, example_pieces
from noisekit.core.layers.per_example import Site
from noisekit.core.layers.rule import LayerCall
from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.accumulation import Before
from noisekit.probes.capture.loss_counts import LossCounts

CallKey = tuple[str, int]
"""A site's path and how often it had been called before in the same pass."""

UNSEEN = (
    "the model's own forward was not called in this step, or was compiled after the "
    "probe had been attached"
)
"""Why a gradient has no examples, where no hook of the model was called."""

Norms = tuple[tuple[int, ...], Tensor]
"""Parameters by index, and one squared norm for each of them."""


@dataclass(slots=True)
class Wanted:
    """What the next passes are to be read for.

    Attributes:
        gradient: Whether the gradient's norm is wanted.
        examples: Whether per-example norms are wanted as well.
        closure: Whether the closure is checked.
        split: Whether that check forms the gradients of single examples.
        inputs: Whether each pass keeps the model's inputs, for a replay.
        refuses_coupling: The estimator for which coupled examples raise; empty where
            they are noted.
        tangents: A direction per parameter; each example's inner product with it is
            then wanted too.
    """

    gradient: bool = True
    examples: bool = True
    closure: bool = True
    split: bool = True
    inputs: bool = False
    refuses_coupling: str = ""
    tangents: Mapping[str, Tensor] | None = None


@dataclass(slots=True, eq=False)
class ForwardPass:
    """One forward pass of the model: a micro-batch.

    Attributes:
        num_examples: Rows of the batch; ``None`` where the model's input has none.
        read: Parameters whose calls have been read, by index.
        sq_norms: ``|u_i|²`` by parameter index, as its gradient is accumulated.
        rows: The examples whose norms are read in ``row_norms``.
        row_norms: ``|u_i|²`` of those examples, by parameter index.
        chunk_norms: ``|sum u_i|²`` of each chunk of the batch, by parameter index.
        scaled_sums: ``sum |P u_i|²`` with the optimizer's preconditioner ``P``.
        own_norms: Squared norms of this micro-batch's own gradient.
        signed_norms: ``|sum s_i u_i|²`` with random signs, one vector per draw.
        inner_products: ``<u_i, v>`` by parameter, where a direction ``v`` was given.
        faults: Why per-example readings do not exist here.
        unread: By parameter index: why the pass tells nothing of that parameter.
        coupling: Why the examples have no gradients of their own; empty if they do.
        notes: What a reader of per-example readings must know.
        own_faults: Why the micro-batch's own gradient is not to be had.
        signed_faults: Why there are no readings with random signs.
        twice: Runs of the autograd engine that kept the graph of its gradient.
        num_calls: Calls per site so far.
        inputs: The model's own inputs, where they are kept for a replay.
        ghost_faults: Why there are no ghost batches.
        ghost: Moments over replayed ghost batches.
        weights: What each example counts in the loss's mean; alike if ``None``.
        weights_from: What tells them: ``"given"`` by the user, or what the loss that
            was called does over its targets, such as ``"mean"``.
        counts: What the gradient of the outputs tells of the same.
        tokens: How many of the sequences' tokens count, or why that is not known.
        gathered: What step metrics keep of the pass, each under a key of its own.
    """

    num_examples: int | None
    read: set[int] = field(default_factory=set)
    sq_norms: dict[int, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    row_norms: dict[int, Tensor] = field(default_factory=dict)
    chunk_norms: dict[int, Tensor] = field(default_factory=dict)
    scaled_sums: dict[int, Tensor] = field(default_factory=dict)
    own_norms: list[Norms] = field(default_factory=list)
    signed_norms: list[Tensor] = field(default_factory=list)
    inner_products: list[Tensor] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unread: dict[int, str] = field(default_factory=dict)
    coupling: str = ""
    notes: list[str] = field(default_factory=list)
    own_faults: list[str] = field(default_factory=list)
    signed_faults: list[str] = field(default_factory=list)
    ghost_faults: list[str] = field(default_factory=list)
    twice: set[int] = field(default_factory=set)
    num_calls: dict[str, int] = field(default_factory=dict)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    ghost: GradientMoments | None = None
    weights: Tensor | None = None
    weights_from: str = ""
    counts: LossCounts | None = None
    tokens: Tensor | str | None = None
    gathered: dict[object, Any] = field(default_factory=dict)

    def refuse_coupled(self, reason: str) -> None:
        """Note that the examples are coupled, which explains other faults as well."""
        if not self.coupling:
            self.coupling = reason
            self.faults.insert(0, reason)


@dataclass(slots=True, eq=False)
class CapturedCall:
    """A call of a site, waiting for its output's gradients in graph task ``task``.

    Superseded where they are read at the operations that broadcast the output.
    """

    site: Site
    call: LayerCall
    forward_pass: ForwardPass
    versions: tuple[int, ...]
    key: CallKey
    task: int = -1
    released: bool = False
    superseded: bool = False
    num_read: int = 0
    norms: dict[str, Tensor] = field(default_factory=dict)
    chunk_norms: dict[str, Tensor] = field(default_factory=dict)
    square_sums: dict[str, Tensor] = field(default_factory=dict)
    part: "CapturedCall | None" = None

    def sq_norms_of(self, parameter: nn.Parameter, among: Collection[str]) -> Tensor:
        """``|u_i|²`` of one parameter; those of ``among`` are computed together."""
        name = self.site.name_of(parameter)
        if name not in self.norms:
            names = among if name in among else (name,)
            self.norms = self.site.rule.sq_norms(self.call, names)
        return self.norms[name]

    def read_squares(self, names: Collection[str]) -> None:
        """Read norms and element-wise squares together, where that costs less."""
        if names and not self.square_sums and self.site.rule.splits(self.call):
            pieces = example_pieces(self.site.rule, self.call, names, square_sums=True)
            self.keep(pieces)

    def keep(self, pieces: Mapping[str, GradientPieces]) -> None:
        """Keep what the examples' own gradients tell."""
        self.norms = {name: piece.sq_norms for name, piece in pieces.items()}
        self.square_sums = {
            name: piece.square_sum
            for name, piece in pieces.items()
            if piece.square_sum is not None
        }

    def count_read(self) -> None:
        """Note that one more parameter was read; after the last, release the call.

        Memory that is given back at once serves the rest of the backward pass.
        """
        self.num_read += 1
        if self.num_read == len(self.site.params):
            self.release()

    def release(self) -> None:
        """Drop the activations and gradients."""
        self.call.args, self.call.kwargs = (), {}
        self.call.grads = [None] * len(self.call.grads)
        self.call.statistics, self.call.before = (), None
        self.part = None
        self.square_sums = {}
        self.released = True


@dataclass(slots=True)
class StepRecord:
    """What the backward passes of one optimizer step have gathered.

    Attributes:
        passes: The forward passes that gradients came from.
        gradient: Squared norm of ``.grad`` per parameter after the last of them.
        scaled_gradient: The same of ``P .grad``, with the optimizer's preconditioner.
        faults: Why the gradient is not this step's alone.
        num_discarded: Backward passes whose gradient was zeroed without a step.
    """

    passes: list[ForwardPass] = field(default_factory=list)
    gradient: Tensor | None = None
    scaled_gradient: Tensor | None = None
    faults: list[str] = field(default_factory=list)
    num_discarded: int = 0

    def start(self, before: Before) -> None:
        """Begin a backward pass; where ``.grad`` was emptied, begin the step anew."""
        if before is Before.EMPTY:
            self.num_discarded += bool(self.passes)
            self.passes, self.gradient, self.faults = [], None, []
        elif before is Before.NOT_ZEROED:
            self.faults.append("gradients of the step before were not zeroed")
        elif before is Before.CHANGED:
            self.faults.append("gradients were changed between two backward passes")

    def start_unseen(self) -> None:
        """Begin a backward pass that no pass of the model led to."""
        self.passes, self.gradient = [], None
        self.faults = [UNSEEN]

    def add(self, passes: Iterable[ForwardPass]) -> None:
        """Count ``passes`` in."""
        for forward_pass in passes:
            if forward_pass not in self.passes:
                self.passes.append(forward_pass)

    @property
    def num_examples(self) -> int:
        """Examples behind the gradient."""
        return sum(p.num_examples or 0 for p in self.passes)


class GradientListener(Protocol):
    """Whoever makes something else of the same backward passes."""

    def read(self, index: int, calls: Sequence[CapturedCall]) -> None:
        """A parameter's gradient is complete; its calls are still captured."""

    def gradient_ready(self, record: StepRecord) -> None:
        """A backward pass has left its gradients, reduced over ranks, unclipped."""

"""Tensors without examples, read where a forward pass broadcasts them over these.

Bare parameters, such as class tokens, and outputs of layers whose input all examples
share, such as a table of positions. See ``broadcast_nodes`` for what has to hold.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor
from torch.autograd.graph import Node

from noisekit.core.layers.embedding import EmbeddingRule
from noisekit.core.layers.per_example import Site
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.layers.rule import LayerCall
from noisekit.probes.capture.broadcast_nodes import (
    ExampleGradients,
    Meeting,
    meetings,
    source_node,
)
from noisekit.probes.capture.sites import SitePlan
from noisekit.probes.capture.step_record import CallKey, CapturedCall, ForwardPass

Arrival = Callable[[CapturedCall, Tensor, ExampleGradients], object]
"""Takes a gradient that enters a node, and what makes it the examples' ones."""


def bare_parameters(sites: Iterable[Site]) -> list[str]:
    """Names in the model of the parameters that would be read by replaying."""
    return [
        f"{site.path}.{name}".lstrip(".")
        for site in sites
        if isinstance(site.rule, ModuleReplay)
        for name in site.params
    ]


def may_be_shared(site: Site) -> bool:
    """Whether all examples may share a call of the layer."""
    return isinstance(site.rule, EmbeddingRule)


def name_of_output(key: CallKey) -> str:
    """Return a name for a call's output that no parameter has."""
    return f"{key[0]}:{key[1]}"


class Broadcasts:
    """Follows the graphs of passes to where tensors meet the examples.

    Args:
        plan: Where each parameter is read.
        axes_of: Return the axes of the examples in the results in which the tensor of
            a name meets them, in order, as runs of copies have shown.
        arrive: Called in a backward pass.
    """

    def __init__(
        self,
        plan: SitePlan,
        axes_of: Callable[[str], Sequence[Sequence[int]]],
        arrive: Arrival,
    ) -> None:
        self._plan = plan
        self._axes_of = axes_of
        self._arrive = arrive

    def follow(
        self,
        outputs: Iterable[Tensor],
        shared: Mapping[Node, CapturedCall],
        forward_pass: ForwardPass,
        *,
        search: bool,
    ) -> set[CallKey]:
        """Have the gradients by example of a pass read where they enter its graph.

        Args:
            outputs: Of the model.
            shared: Calls without an axis of examples, by the nodes of their outputs.
            forward_pass: The pass.
            search: Whether to look for parameters that are not read in this way yet.

        Returns:
            Those of the shared calls whose gradients will arrive.
        """
        bare = dict(self._plan.broadcast)
        if search:
            bare |= self._plan.bare()
        if not (bare or shared):
            return set()
        sources = {source_node(s.params[n]): i for i, (s, n) in bare.items()}
        names = {node: _full_name(*bare[index]) for node, index in sources.items()}
        names |= {node: name_of_output(call.key) for node, call in shared.items()}
        roots = [t.grad_fn for t in outputs if t.grad_fn is not None]
        found = meetings(roots, names)
        for node, index in sources.items():
            if names[node] in found:
                readers = self._readers(names[node], found, forward_pass)
                self._follow_parameter(index, bare[index], readers, forward_pass)
        return {
            captured.key
            for node, captured in shared.items()
            if self._follow_output(
                captured, self._readers(names[node], found, forward_pass)
            )
        }

    def _readers(
        self,
        name: str,
        found: Mapping[str, list[Meeting] | None],
        forward_pass: ForwardPass,
    ) -> list[tuple[Node, ExampleGradients]]:
        """Where to read the tensor of a name, and how; empty where it is not clear."""
        known, met = self._axes_of(name), found.get(name) or ()
        if len(known) != len(met):
            return []
        readers = []
        for meeting, axes in zip(met, known, strict=True):
            fitting = [
                axis
                for axis in meeting.axes(forward_pass.num_examples or 0)
                if meeting.result_axis(axis) in axes and meeting.keeps(axis)
            ]
            if len(fitting) != 1:
                return []
            readers.append((meeting.node, meeting.reader(fitting[0])))
        return readers

    def _follow_parameter(
        self,
        index: int,
        place: tuple[Site, str],
        readers: Sequence[tuple[Node, ExampleGradients]],
        forward_pass: ForwardPass,
    ) -> None:
        if not readers:
            if self._plan.replay_instead(index):
                forward_pass.unread[index] = (
                    f"{_full_name(*place)} is not broadcast over the examples any more"
                )
            return
        site, count = self._plan.read_broadcast(index), forward_pass.num_examples or 0
        call = LayerCall(site.module, (), {}, (0,), count, [None])
        key = (_full_name(*place), 0)
        self._hook(CapturedCall(site, call, forward_pass, (), key), readers)

    def _follow_output(
        self,
        captured: CapturedCall,
        readers: Sequence[tuple[Node, ExampleGradients]],
    ) -> bool:
        if not readers:
            return False
        site, given, count = captured.site, captured.call, captured.call.num_examples
        tensor: Tensor = (*given.args, *given.kwargs.values())[0]
        args = (tensor.expand(count, *tensor.shape),)
        call = LayerCall(
            site.module, args, {}, (0,), count, [None], autocast=given.autocast
        )
        captured.superseded = True
        versions = (args[0]._version,)
        self._hook(
            CapturedCall(site, call, captured.forward_pass, versions, captured.key),
            readers,
        )
        return True

    def _hook(
        self,
        captured: CapturedCall,
        readers: Sequence[tuple[Node, ExampleGradients]],
    ) -> None:
        for node, reader in readers:
            node.register_prehook(partial(self._on_grads, captured, reader))

    def _on_grads(
        self,
        captured: CapturedCall,
        reader: ExampleGradients,
        grads: tuple[Tensor | None, ...],
    ) -> None:
        if grads[0] is not None:
            self._arrive(captured, grads[0], reader)


def _full_name(site: Site, name: str) -> str:
    return f"{site.path}.{name}".lstrip(".")

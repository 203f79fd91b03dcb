"""Whether autograd reaches the parameters that a loss depends on."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noisekit.core.batches import Batch, tensors_in
from noisekit.core.errors import UsageError
from noisekit.core.restorable import same_bits

if TYPE_CHECKING:
    from noisekit.core.risk import EmpiricalRisk


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yield each node of the autograd graph behind some tensors once."""
    visited: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        stack += [following for following, _ in node.next_functions]


def reached_leaves(loss: Tensor) -> set[int]:
    """Return the ids of the leaf tensors that the graph of ``loss`` ends in."""
    if loss.requires_grad and loss.grad_fn is None:
        return {id(loss)}
    # Nodes that accumulate gradients have their leaf as ``variable``.
    leaves = (getattr(node, "variable", None) for node in graph_nodes([loss]))
    return {id(leaf) for leaf in leaves if leaf is not None}


def same_tensors(one: object, other: object) -> bool:
    """Return whether the tensors inside two values are equal bit for bit."""
    pairs = [tensors_in(one), tensors_in(other)]
    return len(pairs[0]) == len(pairs[1]) and all(
        same_bits(a.detach(), b.detach()) for a, b in zip(*pairs, strict=True)
    )


def check_followed(
    risk: "EmpiricalRisk", batch: Batch, outputs: Any, loss: Tensor
) -> None:
    """Refuse a loss that parameters move although autograd does not reach them.

    Those it does not reach are set to not-a-number: what does not use them stays the
    same.

    Args:
        risk: Held as measured.
        batch: Whose outputs and loss are given.
        outputs: Of the model.
        loss: Of the outputs.

    Raises:
        UsageError: Naming the parameters.
    """
    reached = reached_leaves(loss)
    names = [
        name
        for name, leaf in zip(risk.layout.names, risk.leaves, strict=True)
        if id(leaf) not in reached
    ]
    if not names:
        return
    part = risk.restricted_to(names)
    # Not under no_grad: a model may differentiate by itself.
    with part.at(torch.full_like(part.vector(), math.nan)):
        try:
            others = risk.outputs_of(batch)
            other = risk.loss_at(others, batch[1])
        except UsageError:
            raise
        except Exception:  # a model may refuse what is not a number in any way
            is_used = True
        else:
            is_used = not same_tensors(loss, other)
            # A count of errors may be the same; outputs are not.
            is_used |= not reached and not same_tensors(outputs, others)
    if is_used:
        raise UsageError(cut_text(names))


def cut_text(names: Sequence[str]) -> str:
    """Return the refusal of a loss that depends on parameters behind a cut."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        "a derivative needs a loss that autograd can follow back to the parameters, "
        f"got one that depends on {shown} but is cut off from them by detach(), "
        ".item(), torch.no_grad() or a count such as the error rate; remove the cut, "
        "leave those parameters out with params=, or set requires_grad_(False) on "
        "them. Functions that need no derivative take such a loss."
    )

"""The loss at many points of weight space, batched with ``vmap`` where possible."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from noisekit.core.batches import Batch, count_examples
from noisekit.core.evaluation_mode import batch_norms
from noisekit.core.risk import EmpiricalRisk

_MAX_STACK = 32
"""Points in one stack; larger ones are not faster."""

StateAt = Callable[[int], Mapping[str, Tensor]]
"""Weights and statistics of one point, by names of the model's state dict."""


@dataclass(frozen=True, slots=True)
class PointValues:
    """Loss and error at many points.

    Attributes:
        losses: Loss at each point; may be infinite or NaN.
        errors: Share of misclassified examples, NaN where the data have no classes.
        num_batched: Points that were evaluated many at a time.
        loop_reason: Why the others were evaluated one by one; empty if they were not.
    """

    losses: tuple[float, ...]
    errors: tuple[float, ...]
    num_batched: int
    loop_reason: str


def loss_range(losses: Sequence[float] | np.ndarray) -> str:
    """Write from where to where losses go, and how many of them are not finite."""
    values = np.asarray(losses, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    spread = f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else "none"
    num_infinite = values.size - finite.size
    return f"losses {spread}" + (f", {num_infinite} not finite" if num_infinite else "")


def values_at(
    risk: EmpiricalRisk,
    state_at: StateAt,
    count: int,
    *,
    exact: Iterable[int],
) -> PointValues:
    """Return a risk's loss and error at ``count`` points; the model is restored.

    Models narrower than float32 are evaluated in float32. The points of ``exact`` go
    through the model as it is, so that their losses are bit for bit those of a model
    with these weights. The rest are stacked and evaluated by ``vmap``, within the
    risk's memory budget. The stack is checked against ``exact``; where losses differ,
    or PyTorch cannot ``vmap`` the model, all points are evaluated in a loop.

    Args:
        risk: The model, the loss and the data.
        state_at: The weights of each point.
        count: Number of points.
        exact: At least one point.
    """
    # Rounding of narrower weights would make steps of the loss.
    risk = risk.in_precision(torch.float32)
    with risk.model_converted():
        return _values_at(risk, state_at, count, sorted(set(exact)))


def _values_at(
    risk: EmpiricalRisk, state_at: StateAt, count: int, alone: list[int]
) -> PointValues:
    known = dict(zip(alone, _one_by_one(risk, state_at, alone), strict=True))
    rest = [i for i in range(count) if i not in known]
    reason = _cannot_batch(risk)
    if rest and not reason:
        try:
            known |= _stacked_values(risk, state_at, rest, known)
        # An error of the model itself, rather than of vmap, recurs in the loop.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] or type(error).__name__
    remaining = [i for i in rest if i not in known]
    known |= dict(zip(remaining, _one_by_one(risk, state_at, remaining), strict=True))
    values = [known[i] for i in range(count)]
    return PointValues(
        losses=tuple(loss for loss, _ in values),
        errors=tuple(error for _, error in values),
        num_batched=len(rest) - len(remaining),
        loop_reason=reason if remaining else "",
    )


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state dict: not copies."""
    state = model.state_dict()
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def chosen_names(risk: EmpiricalRisk) -> dict[str, str]:
    """Return all names of each chosen parameter, with its first."""
    first = {id(p): n for n, p in zip(risk.layout.names, risk.parameters, strict=True)}
    named = risk.model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if id(p) in first}


@torch.no_grad()
def load_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into the model's tensors in place; missing entries stay."""
    for key, value in state.items():
        own[key].copy_(value)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor narrower than float32 in float32, any other as it is."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def preserve_tensors(own: Mapping[str, Tensor]) -> Iterator[None]:
    """Restore parameters and buffers on exit, bit for bit."""
    copies = {key: value.clone() for key, value in own.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(copies[key])


def _one_by_one(
    risk: EmpiricalRisk, state_at: StateAt, indices: list[int]
) -> list[tuple[float, float]]:
    own = own_state(risk.model)
    values = []
    with preserve_tensors(own):
        for i in indices:
            load_state(own, state_at(i))
            point = risk.evaluate()
            values.append(
                (point.loss, math.nan if point.error is None else point.error)
            )
    return values


def _cannot_batch(risk: EmpiricalRisk) -> str:
    """Why points cannot be evaluated together, empty where they may be."""
    if risk.bn != "running" and batch_norms(risk.model):
        return f"bn={risk.bn!r} recomputes statistics at each point"
    return ""


def _stacked_values(
    risk: EmpiricalRisk,
    state_at: StateAt,
    indices: list[int],
    known: Mapping[int, tuple[float, float]],
) -> dict[int, tuple[float, float]]:
    """Values at ``indices``, checked at the known points.

    Raises:
        ArithmeticError: If the values at the known points differ.
        MemoryError: If the budget holds one point only.
    """
    classified = not any(math.isnan(error) for _, error in known.values())
    size = _points_within(risk)
    if size < 2:
        raise MemoryError(
            f"memory_budget={risk.memory_budget} holds one point at a time"
        )
    queue = [*known, *indices]  # the known points first: a mismatch ends it early
    result: dict[int, tuple[float, float]] = {}
    for first in range(0, len(queue), size):
        chunk = queue[first : first + size]
        stack = _stacked(risk.model, [state_at(i) for i in chunk])
        values = _values_of_stack(risk, stack, len(chunk), classified)
        result |= dict(zip(chunk, values, strict=True))
        _check_known(result, known, risk.layout.dtype)
    return {i: result[i] for i in indices}


def _stacked(model: nn.Module, states: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One tensor per weight and statistic, with the points as its first axis.

    A shared weight goes in once, by its first name.
    """
    names = [name for name, _ in model.named_parameters()]
    names += [name for name, b in model.named_buffers() if b.is_floating_point()]
    like = own_state(model)
    return {
        name: torch.stack([state[name].to(like[name]) for state in states])
        for name in names
        if name in states[0]
    }


def _values_of_stack(
    risk: EmpiricalRisk, stack: dict[str, Tensor], count: int, classified: bool
) -> list[tuple[float, float]]:
    dtype = torch.float32 if risk.layout.device.type == "mps" else torch.float64
    losses = torch.zeros(count, dtype=dtype, device=risk.layout.device)
    wrong, counted = torch.zeros_like(losses), 0.0
    with risk.evaluating(), torch.no_grad():
        for weight, batch in risk.weighted_batches():
            part, missed = vmap(_of_one_point(risk, batch, classified))(stack)
            losses += weight * part.to(dtype)
            wrong += missed
            counted += float((batch[1] >= 0).sum()) if classified else 0.0
    errors = wrong / counted if counted else torch.full_like(losses, math.nan)
    return list(zip(losses.tolist(), errors.tolist(), strict=True))


def _of_one_point(
    risk: EmpiricalRisk, batch: Batch, classified: bool
) -> Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """Loss and number of misclassified examples of a batch, as a function."""
    targets = batch[1]

    def values(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        outputs = risk.outputs_of(batch, state)
        loss = risk.loss_fn(outputs, risk.converted(targets))
        if not classified:
            return loss, torch.zeros_like(loss)
        wrong = (targets >= 0) & (outputs.argmax(1) != targets)
        return loss, wrong.sum()

    return values


def _points_within(risk: EmpiricalRisk) -> int:
    """How many points fit into the budget, by the activations of the largest batch.

    Measured by the tensors that autograd saves, each storage once.
    """
    largest = max((batch for _, batch in risk.weighted_batches()), key=count_examples)
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with (
        risk.evaluating(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        risk.loss_of(largest)
    weights = sum(t.numel() * t.element_size() for t in own_state(risk.model).values())
    return min(_MAX_STACK, risk.memory_budget // (sum(sizes.values()) + weights))


def _check_known(
    result: Mapping[int, tuple[float, float]],
    known: Mapping[int, tuple[float, float]],
    dtype: torch.dtype,
) -> None:
    # Kernels of a stack sum in another order; sqrt(eps) (3e-4 of float32) is far above
    # that, and far below the change by a module that ignores the stacked weights.
    allowed = torch.finfo(dtype).eps ** 0.5
    for i in known.keys() & result.keys():
        got, want = result[i][0], known[i][0]
        same = got == want or (math.isnan(got) and math.isnan(want))
        if not same and not abs(got - want) <= allowed * (1 + abs(want)):
            raise ArithmeticError(
                f"evaluated together the loss at a known point is {got:.6g} instead "
                f"of {want:.6g}"
            )

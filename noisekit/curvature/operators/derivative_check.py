r"""A check of autograd's second derivatives against differences of its first ones.

Autograd differentiates a backward pass again only through operations that it has
recorded. A custom ``autograd.Function`` whose backward returns a gradient that its
forward saved, or that runs under ``no_grad``, and a ``.detach()`` in the model or the
loss are constants to it: the second derivative lacks a term, without an error. So a
product with a random vector is compared with a central difference along that vector,

.. math:: H v \approx \frac{\nabla L(w + h v) - \nabla L(w - h v)}{2 h}

in double precision on a few examples, once for each risk. It costs two gradients of at
most 8 examples where they agree at once, twelve where they never do, and copies of the
weights in double precision meanwhile.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.errors import UsageError
from noisekit.core.graph_check import graph_nodes
from noisekit.core.params import flatten
from noisekit.core.randomness import stream
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature.operators.graph_cache import check_twice_differentiable

MEASURED_EXAMPLES = 8

# Steps h, relative to the weights' norm. The first is large against the rounding error
# 1e-16 / h, and so small that hardly a ReLU changes sides; the others are for saturated
# losses, whose gradients round more coarsely, and for wide networks.
_STEPS = (1e-8, 1e-6, 1e-4, 1e-10)
# In single precision the rounding error of a difference is 1e-7 / h.
_COARSE_STEPS = (1e-3, 1e-2)
# Of 300 ordinary networks 99 % agree to 1e-7. A smaller missing term is not detected.
_AGREES = 1e-5
# A mismatch counts only if differences of two step sizes agree with each other this
# much better than with autograd. Kinks and rounding errors make them disagree.
_CONSISTENT = 0.03
# A gap below this many rounding errors of the difference is inconclusive.
_ROUNDINGS = 100


def check_second_derivatives(risk: EmpiricalRisk, *, what: str = "a Hessian") -> None:
    """Check products with the Hessian of a risk, once per risk.

    Args:
        risk: Not held; the check holds it in double precision, where that is possible.
        what: What needs them, for the message.

    Raises:
        UsageError: If differences of gradients converge to something else.
    """
    _check(risk, "hessian", _hessian_gap, what)


def check_jacobian(risk: EmpiricalRisk, *, what: str) -> None:
    """Check products ``J v`` of the outputs' Jacobian, once per risk.

    The reference is a difference of outputs, so that two forward passes suffice.

    Args:
        risk: Not held; its model returns one tensor.
        what: What needs them, for the message.

    Raises:
        UsageError: If differences of outputs converge to something else.
    """
    _check(risk, "jacobian", _jacobian_gap, what)


def check_loss_hessian(risk: EmpiricalRisk, *, what: str) -> None:
    """Check products with the loss's Hessian in the outputs, once per risk.

    Args:
        risk: Not held; its model returns one tensor.
        what: What needs them, for the message.

    Raises:
        UsageError: If differences of gradients converge to something else.
    """
    _check(risk, "loss", _loss_hessian_gap, what)


def _hessian_gap(
    held: EmpiricalRisk, batch: Batch, steps: Iterable[float], hidden: "_Hidden"
) -> float:
    """Relative gap of ``H v`` to differences of gradients."""
    vector, point, unit = _trial(held)
    loss = held.loss_of(batch)
    hidden.note_functions(loss)
    gradient = held.gradients(loss, create_graph=True)
    hidden.note_backward(gradient)
    product = _product(gradient, held, vector)

    def slope(move: float) -> Tensor:
        with held.at(point + move * unit * vector):
            return flatten(held.gradients(held.loss_of(batch)))

    return relative_gap(product, slope, steps, unit)


def _jacobian_gap(
    held: EmpiricalRisk, batch: Batch, steps: Iterable[float], hidden: "_Hidden"
) -> float:
    """Relative gap of ``J v`` to differences of outputs."""
    vector, point, unit = _trial(held)
    outputs = held.outputs_of(batch)
    cotangent = torch.zeros_like(outputs, requires_grad=True)
    # The derivative of J'u in u is J, since J'u is linear in u.
    pulled = held.gradients((outputs * cotangent).sum(), create_graph=True)
    hidden.note_functions(outputs)
    hidden.note_backward(pulled)
    along = [
        (part * piece.to(part.dtype)).sum()
        for part, piece in zip(pulled, held.layout.split(vector), strict=True)
        if part.requires_grad
    ]
    pushed = torch.zeros_like(outputs)
    if along:
        (pushed,) = torch.autograd.grad(
            torch.stack(along).sum(), cotangent, materialize_grads=True
        )

    def moved(move: float) -> Tensor:
        with held.at(point + move * unit * vector), torch.no_grad():
            result: Tensor = held.outputs_of(batch)
            return result

    return relative_gap(pushed, moved, steps, unit)


def _loss_hessian_gap(
    held: EmpiricalRisk, batch: Batch, steps: Iterable[float], hidden: "_Hidden"
) -> float:
    """Relative gap of the loss's Hessian in the outputs to differences of gradients."""
    outputs: Tensor = held.outputs_of(batch).detach()
    drawn = torch.randn(outputs.shape, generator=stream(0, "loss curvature"))
    vector = drawn.to(outputs)
    unit = max(1.0, float(outputs.norm())) / float(vector.norm())

    def slope(point: Tensor, create_graph: bool = False) -> Tensor:
        point.requires_grad_()
        loss = held.loss_at(point, batch[1])
        hidden.note_functions(loss)
        (result,) = torch.autograd.grad(loss, point, create_graph=create_graph)
        return result

    point = outputs.clone()
    exact, gradient = torch.zeros_like(outputs), slope(point, create_graph=True)
    if gradient.requires_grad:
        (exact,) = torch.autograd.grad(gradient, point, vector, materialize_grads=True)
    return relative_gap(
        exact, lambda move: slope(outputs + move * unit * vector), steps, unit
    )


def relative_gap(
    exact: Tensor,
    function: Callable[[float], Tensor],
    steps: Iterable[float],
    unit: float = 1.0,
) -> float:
    """Return the relative gap of a derivative to central differences; 0 if unsure.

    Args:
        exact: The derivative along a vector.
        function: What it is the derivative of, at so many ``unit`` along the vector.
        steps: To move by, to either side; tried until one agrees.
        unit: Length of a step of 1, in lengths of the vector.
    """
    target = exact.double()
    settled: list[Tensor] = []
    for step in steps:
        ahead, behind = function(step), function(-step)
        reach = 2 * step * unit
        difference = (ahead.double() - behind.double()) / reach
        gap = _relative(difference, target)
        if not gap > _AGREES:
            return 0.0
        missing = float((difference - target).norm())
        # Rounding error of the values, divided by 2 h like their difference.
        rounding = torch.finfo(ahead.dtype).eps * float(ahead.norm()) / reach
        # Second difference: large where the one-sided slopes differ, as at the kink of
        # a dead ReLU.
        bend = float((ahead + behind - 2 * function(0.0)).double().norm()) / reach
        if missing > _ROUNDINGS * rounding and bend <= _CONSISTENT * missing:
            settled.append(difference)
    for first, second in itertools.pairwise(settled):
        gap = _relative(second, target)
        # Not both zero: steps below the resolution of the type change nothing.
        moved = bool(first.any()) and bool(second.any())
        if moved and _relative(first, second) <= _CONSISTENT * gap:
            return gap
    return 0.0


class _Hidden:
    """Operations of a graph that may hide a term of a second derivative.

    Attributes:
        functions: Names of the nodes of custom functions.
        once: Whether a derivative is marked as not differentiable.
    """

    def __init__(self) -> None:
        self.functions: set[str] = set()
        self.once = False

    def note_functions(self, tensor: Tensor) -> None:
        """Collect the custom functions behind a tensor."""
        for node in graph_nodes([tensor]):
            custom = isinstance(node, torch.autograd.function.BackwardCFunction)
            if custom or node.name().startswith("CppNode"):
                self.functions.add(node.name().removesuffix("Backward"))

    def note_backward(self, gradients: Iterable[Tensor]) -> None:
        """Look for a derivative that cannot be differentiated in a backward graph."""
        try:
            check_twice_differentiable(gradients)
        except RuntimeError:
            self.once = True


_Gap = Callable[[EmpiricalRisk, Batch, Iterable[float], _Hidden], float]


def _check(risk: EmpiricalRisk, kind: str, gap_in: _Gap, what: str) -> None:
    """Raise if there is a gap; nothing where the kind was verified before."""
    if kind not in risk.verified:
        hidden = _Hidden()
        _refuse_gap(_measured(risk, gap_in, hidden), what, hidden)
        risk.verified.add(kind)


def _measured(risk: EmpiricalRisk, gap_in: _Gap, hidden: _Hidden) -> float:
    """The gap in double precision; in the risk's own where there is none.

    In single precision a network's kinks show as well: a gap counts there only behind
    a function that autograd may not see through.
    """
    batch = _few_examples(risk)
    if batch is None:  # of a process without data
        return 0.0
    for dtype in (torch.float64, risk.layout.dtype):
        held = risk.at_given_statistics(dtype)
        wide = dtype == torch.float64
        try:
            with held.evaluating():
                gap = gap_in(held, batch, _STEPS if wide else _COARSE_STEPS, hidden)
        except Exception:  # the product itself raises it, with its own message
            continue
        return gap if wide or hidden.functions else 0.0
    return 0.0


def _few_examples(risk: EmpiricalRisk) -> Batch | None:
    batch = next((batch for _, batch in risk.weighted_batches()), None)
    if batch is None or not risk.checked:  # examples may not be separable
        return batch
    rows = torch.arange(min(count_examples(batch), MEASURED_EXAMPLES))
    return take_examples(batch, rows)


def _trial(risk: EmpiricalRisk) -> tuple[Tensor, Tensor, float]:
    """A fixed random direction, the weights, and the length of a unit step along it."""
    drawn = torch.randn(risk.layout.num_params, generator=stream(0, "derivative"))
    vector, point = drawn.to(risk.layout.device, risk.layout.dtype), risk.vector()
    return vector, point, max(1.0, float(point.norm())) / float(vector.norm())


def _product(
    gradient: tuple[Tensor, ...], risk: EmpiricalRisk, vector: Tensor
) -> Tensor:
    pairs = zip(gradient, risk.layout.split(vector), strict=True)
    along = [(g * v.to(g.dtype)).sum() for g, v in pairs if g.requires_grad]
    if not along:
        return torch.zeros_like(vector)
    return flatten(risk.gradients(torch.stack(along).sum()))


def _relative(got: Tensor, want: Tensor) -> float:
    """Distance over the larger length: 0 where both are zero."""
    length = max(float(got.norm()), float(want.norm()))
    if not math.isfinite(length):
        return math.inf
    return float((got - want).norm()) / length if length > 0 else 0.0


def _refuse_gap(gap: float, what: str, hidden: _Hidden) -> None:
    if gap == 0.0:
        return
    known = ", ".join(sorted(hidden.functions))
    where = f"the custom function {known}" if known else "something"
    cause = (
        f"{where} has a derivative that is not differentiable (once_differentiable)"
        if hidden.once
        else f"{where} hides a part of it, such as a gradient saved by the forward "
        "pass, a backward pass under no_grad, or a .detach()"
    )
    raise UsageError(
        f"{what} needs autograd to differentiate its own backward pass, got a "
        f"derivative {100 * gap:.2g} % away from what differences of first derivatives "
        f"converge to: {cause}. Use a version in plain PyTorch operations, or "
        "HessianOperator(..., form='finite_difference')."
    )

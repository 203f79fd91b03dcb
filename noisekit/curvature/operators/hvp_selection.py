"""Selection of a Hessian-vector product (HVP) method, by a trial product."""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from noisekit.core.batches import Batch
from noisekit.core.randomness import stream
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature.operators.hvp_methods import (
    Form,
    Product,
    finite_difference,
    forward_over_reverse,
    linearised,
    reverse_over_reverse,
)

TriedForm = Literal[
    "reverse_over_reverse", "linearised", "forward_over_reverse", "finite_difference"
]
_FORMS: dict[TriedForm, Form] = {
    "linearised": linearised,
    "forward_over_reverse": forward_over_reverse,
}


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial product.

    Attributes:
        form: The form that is used.
        error: Its relative difference from what it was compared with: from the
            reverse over the reverse, or from differences with twice the step. NaN
            where it could not be compared.
        reason: Why it is not the requested one; empty where it is.
    """

    form: TriedForm
    error: float
    reason: str = ""


def select_form(
    asked: Literal["linearised", "forward_over_reverse", "fastest"],
    risk: EmpiricalRisk,
    weight: float,
    batch: Batch,
    *,
    keeps: bool,
) -> tuple[Trial, Form]:
    """Return the requested form if a trial product agrees, else reverse over reverse.

    Args:
        asked: A form, or ``"fastest"`` for the quicker one of reverse over reverse
            and its rival: linearised where graphs are kept, else forward over reverse.
        risk: Held as measured.
        weight: Factor of the batch's loss.
        batch: Where to try.
        keeps: Whether the memory budget allows to keep anything.
    """
    if asked != "fastest":
        name: TriedForm = asked
    else:
        name = "linearised" if keeps else "forward_over_reverse"
    trusted = reverse_over_reverse(risk, weight, batch)
    # A trace may contain values of its first call, which only a second vector shows.
    vectors = [_trial_vector(risk, i) for i in range(2)]
    want = torch.stack([trusted(vector) for vector in vectors])
    try:
        # First without a trace: tracing an operation without a forward derivative can
        # crash the process instead of raising.
        forward_over_reverse(risk, weight, batch)(vectors[0])
        rival = _FORMS[name](risk, weight, batch)
        got = torch.stack([rival(vector) for vector in vectors])
    except Exception as error:  # PyTorch refuses in many types of error
        return _fall_back(f"{name} failed: {type(error).__name__}: {error}", math.nan)
    difference = _relative(got, want)
    if not difference <= math.sqrt(torch.finfo(want.dtype).eps):
        return _fall_back(f"{name} differs by {difference:.2g}", difference)
    if asked == "fastest":
        seconds = _seconds(rival, vectors[0])
        graph = trusted if keeps else _rebuilt(risk, weight, batch)
        usual = _seconds(graph, vectors[0])
        if usual <= seconds:
            slower = f"{name} takes {seconds:.2g} s on a batch, not {usual:.2g} s"
            return _fall_back(slower, difference)
    return Trial(name, difference), _FORMS[name]


def difference_step(risk: EmpiricalRisk) -> float:
    """Return the step of central differences, ``eps^(1/3) max(1, |w|)``.

    It balances the truncation error ``h²`` against the rounding error ``eps / h``.
    """
    length = float(risk.vector().norm())
    rounding = float(torch.finfo(risk.layout.dtype).eps)
    return math.cbrt(rounding) * max(1.0, length)


def difference_error(risk: EmpiricalRisk, weight: float, batch: Batch) -> Trial:
    """Return how much central differences change when their step is doubled."""
    step, vector = difference_step(risk), _trial_vector(risk, 0)
    one, two = (
        finite_difference(h)(risk, weight, batch)(vector) for h in (step, 2 * step)
    )
    return Trial("finite_difference", _relative(two, one))


def _trial_vector(risk: EmpiricalRisk, number: int) -> Tensor:
    layout = risk.layout
    generator = stream(0, "trial product", number)
    drawn = torch.randn(layout.num_params, generator=generator)
    return drawn.to(layout.device, layout.dtype)


def _relative(got: Tensor, want: Tensor) -> float:
    length = float(want.norm())
    gap = float((got - want).norm())
    return gap / length if length > 0 else gap


def _fall_back(reason: str, error: float) -> tuple[Trial, Form]:
    text = reason.splitlines()[0]
    return Trial("reverse_over_reverse", error, text), reverse_over_reverse


def _rebuilt(risk: EmpiricalRisk, weight: float, batch: Batch) -> Product:
    return lambda vector: reverse_over_reverse(risk, weight, batch)(vector)


def _seconds(product: Product, vector: Tensor) -> float:
    """Time of one product, with a transfer to the host as synchronization."""
    began = time.perf_counter()
    float(product(vector).sum())
    return time.perf_counter() - began

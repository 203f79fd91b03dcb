"""A question about a Hessian, answered by noisekit and by the dense matrix."""

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from noisekit.core.batches import map_tensors, tensors_in
from noisekit.core.data import HeldBatches
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns, flatten
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn
from noisekit.curvature.eigenvalues.lanczos import top_eigenpairs
from noisekit.curvature.operators.hessian import HessianOperator
from noisekit.curvature.traces import trace

AuditQuantity = Literal["lambda_max", "lambda_min", "trace"]
Weighting = Literal["true", "examples", "equal", "undivided"]

_TOL = 1e-5
_NUM_PROBES = 100
# Moves of a weight: the first makes rounding and truncation of about 1e-11. Where a
# ReLU changes sides on the way, both sides bend away from the middle by more than this
# part, and the second, smaller one is taken.
_STEPS = (1e-5, 1e-9)
_KINK = 1e-3


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: of which loss, and which number of its Hessian.

    Attributes:
        model: The model.
        loss_fn: The loss.
        batches: The data, in memory.
        bn: The BatchNorm policy.
        normaliser: What the loss is divided by, where the user states it.
        params: The parameters.
        reduction: Whether the loss is a mean or a sum, as found.
        weighting: How batches are combined: as they must be, by their examples, all
            alike, or as a plain sum.
        quantity: The number.
        by_magnitude: Whether the eigenvalue of largest magnitude is taken for the
            largest one.
    """

    model: nn.Module
    loss_fn: LossFn
    batches: HeldBatches
    bn: BatchNormPolicy
    normaliser: Normaliser | None
    params: ParameterPatterns
    reduction: Literal["mean", "sum"]
    weighting: Weighting = "true"
    quantity: AuditQuantity = "lambda_max"
    by_magnitude: bool = False

    def risk(self) -> EmpiricalRisk:
        """Return the loss with its batches combined by ``weighting``."""
        chosen, check = self.normaliser, True
        if self.weighting != "true":
            chosen, check = _normaliser_for(self.weighting, self.batches), False
        risk = EmpiricalRisk(
            self.model,
            self.loss_fn,
            self.batches,
            bn=self.bn,
            normaliser=chosen,
            params=self.params,
            check=check,
        )
        if self.weighting in {"examples", "equal"}:
            # Whatever the loss is, these packages average the batches' losses.
            risk.reduction = "mean"
        elif self.weighting == "undivided":
            risk.reduction = "sum"
        return risk


def question_of(risk: EmpiricalRisk) -> Question:
    """Return the question about a risk, with its data in memory."""
    return Question(
        risk.model,
        risk.loss_fn,
        HeldBatches(iter(risk.batches)),
        risk.bn,
        risk.normaliser,
        risk.layout.names,
        risk.reduction,
    )


def by_noisekit(question: Question, generator: torch.Generator) -> Estimate:
    """Return noisekit's answer, by Lanczos or random vectors."""
    with HessianOperator(question.risk()) as hessian:
        if question.quantity == "trace":
            return trace(hessian, num_matvecs=_NUM_PROBES, generator=generator)
        largest = question.quantity == "lambda_max"
        ends = {"LA": largest or question.by_magnitude}
        ends["SA"] = not largest or question.by_magnitude
        result = [
            top_eigenpairs(
                hessian, which=which, tol=_TOL, max_matvecs=1000, generator=generator
            ).estimate()
            for which in ("LA", "SA")
            if ends[which]
        ]
    return max(result, key=lambda e: abs(e.value)) if len(result) > 1 else result[0]


def error_of_signs(
    question: Question, num_samples: int, generator: torch.Generator
) -> float:
    """Return the standard error of a trace from this many random signs, estimated."""
    with HessianOperator(question.risk()) as hessian:
        result = trace(
            hessian, num_matvecs=num_samples, method="hutchinson", generator=generator
        )
    return result.stderr or 0.0


@dataclass(frozen=True, slots=True, eq=False)
class DenseAnswers:
    """The answers of the dense Hessian.

    Attributes:
        eigenvalues: ``(P,)``, ascending, in double precision.
        trace: Their sum.
        sign_variance: Variance of ``z' H z`` over random signs ``z``.
        method: How the Hessian was computed, and in which precision.
    """

    eigenvalues: Tensor
    trace: float
    sign_variance: float
    method: str

    def answer(self, question: Question) -> float:
        """Return the quantity of a question."""
        if question.quantity == "trace":
            return self.trace
        low, high = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        if question.by_magnitude:
            return max(low, high, key=abs)
        return high if question.quantity == "lambda_max" else low


def by_brute_force(question: Question) -> DenseAnswers:
    """Return the answers of the dense Hessian, entry by entry, in double precision.

    Its rows are differences of gradients, so that a second derivative that autograd
    takes wrongly, for noisekit and for every package alike, shows as a deviation.
    Where model or loss cannot be had in double precision, they are autograd's, in
    the precision that there is.
    """
    try:
        matrix, method = _by_differences(in_double_precision(question)), "differences"
    except (RuntimeError, TypeError, ValueError):
        matrix, method = _by_autograd(question), "autograd"
    dtype = matrix.dtype
    matrix = (matrix + matrix.T).double() / 2
    return DenseAnswers(
        eigenvalues=_eigenvalues(matrix),
        trace=float(matrix.diag().sum()),
        sign_variance=2 * float((matrix**2).sum() - (matrix.diag() ** 2).sum()),
        method=f"{method} in {str(dtype).removeprefix('torch.')}",
    )


class Answers:
    """Answers to questions about one model, each dense Hessian computed once."""

    def __init__(self, max_params: int, generator: torch.Generator) -> None:
        self.max_params = max_params
        self.generator = generator
        self._dense: dict[Question, DenseAnswers | None] = {}

    def dense(self, question: Question) -> DenseAnswers | None:
        """Return the dense answers, ``None`` where there are too many parameters."""
        matrix = replace(question, quantity="lambda_max", by_magnitude=False)
        if matrix not in self._dense:
            size = matrix.risk().layout.num_params
            small = size <= self.max_params
            self._dense[matrix] = by_brute_force(matrix) if small else None
        return self._dense[matrix]

    def answer(self, question: Question) -> float:
        """Return the number, by brute force where that is possible."""
        dense = self.dense(question)
        if dense is not None:
            return dense.answer(question)
        return by_noisekit(question, self.generator).value


def in_double_precision(question: Question) -> Question:
    """Return the same question about a copy in double precision."""

    def widened(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    loss_fn = question.loss_fn
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn).double()
    return replace(
        question,
        model=copy.deepcopy(question.model).double(),
        loss_fn=loss_fn,
        batches=HeldBatches(
            (map_tensors(widened, x), map_tensors(widened, y))
            for x, y in question.batches
        ),
    )


def _by_differences(question: Question) -> Tensor:
    """The Hessian by two gradients for each weight, moved to either side."""
    risk = question.risk()
    point = risk.vector()
    rows = []
    with risk.evaluating():
        middle = risk.value_and_grad()[1]

        def slope_at(index: int, moved: float) -> Tensor:
            kept = point[index].clone()
            point[index] += moved
            slope = risk.value_and_grad(point)[1]
            point[index] = kept
            return slope

        for index in range(len(point)):
            for step in _STEPS:
                step *= max(1.0, abs(float(point[index])))
                ahead, behind = slope_at(index, step), slope_at(index, -step)
                row = (ahead - behind) / (2 * step)
                bend = (ahead + behind - 2 * middle).norm() / (2 * step)
                if bool(bend <= _KINK * row.norm()):
                    break
            rows.append(row)
    return torch.stack(rows)


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Ascending eigenvalues of the dense Hessian.

    Raises:
        UsageError: If an entry is not finite.
    """
    if not bool(matrix.isfinite().all()):
        raise UsageError(
            "an audit needs a finite Hessian, got NaN or infinity; look for them in "
            "the batches and the weights."
        )
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values


def _by_autograd(question: Question) -> Tensor:
    """The Hessian by one backward pass for each entry of the gradient."""
    risk = question.risk()
    size = risk.layout.num_params
    matrix = torch.zeros(size, size, dtype=risk.layout.dtype, device=risk.layout.device)
    with risk.evaluating():
        for weight, loss in risk.batch_losses():
            gradient = flatten(risk.gradients(loss, create_graph=True))
            for row, entry in enumerate(gradient):
                if entry.requires_grad:
                    matrix[row] += weight * _row(entry, risk)
    return matrix


def _row(entry: Tensor, risk: EmpiricalRisk) -> Tensor:
    parts = torch.autograd.grad(
        entry,
        risk.parameters,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return flatten(parts)


def _normaliser_for(weighting: Weighting, batches: HeldBatches) -> Normaliser:
    """Weights as other packages take them: the length of the inputs' first axis."""
    share = 1.0 / len(batches)
    weights = {
        id(targets): float(len(tensors_in(inputs)[0]))
        if weighting == "examples"
        else share
        for inputs, targets in batches
    }
    return lambda targets: weights[id(targets)]

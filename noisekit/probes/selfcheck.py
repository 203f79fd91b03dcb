"""The probe against brute force, on somebody's own model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisekit.core.batches import Batch, count_examples
from noisekit.core.mode import BatchNormPolicy
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import EmpiricalRisk, LossFn
from noisekit.probes.frozen import parameter_sq_norms

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF_TOLERANCE = 1e-1


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How far the probe's per-example norms are from one backward pass per example.

    Attributes:
        errors: Largest error by parameter, relative to its largest squared norm.
        tolerance: What rounding may explain at the parameters' precision.
        coverage: How each parameter was read.
        num_examples: Examples compared.
    """

    errors: Mapping[str, float]
    tolerance: float
    coverage: Mapping[str, str]
    num_examples: int

    @property
    def passed(self) -> bool:
        """Whether every parameter agrees."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        """Say it in one line, with the worst parameter."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        verdict = "agrees" if self.passed else "disagrees"
        return (
            f"the probe {verdict} with brute force on {self.num_examples} examples: "
            f"largest relative error {self.errors[worst]:.1e} ({worst}, by "
            f"{self.coverage[worst]}; tolerance {self.tolerance:.0e})"
        )


def self_check(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    *,
    bn: BatchNormPolicy = "running",
    params: ParameterPatterns = None,
) -> SelfCheck:
    """Compare the probe's per-example norms with one backward pass per example.

    Both are taken at frozen weights and without dropout; the model is given back.

    Args:
        model: Any model whose examples are not coupled.
        loss_fn: Its loss, a mean or a sum over examples.
        batch: ``(inputs, targets)``; a few examples suffice.
        bn: BatchNorm policy; ``"batch"`` couples the examples and is refused.
        params: Names or patterns of the parameters to check; all by default.

    Raises:
        CoupledExamplesError: If examples have no gradients of their own.
        LayerReadError: If some parameter's gradients cannot be told apart.
    """
    risk = EmpiricalRisk(model, loss_fn, [batch], bn=bn, params=params)
    norms, coverage = parameter_sq_norms(risk, params)
    count = count_examples(batch)
    expected = _one_backward_per_example(risk, batch, count)
    dtype = risk.layout.dtype
    return SelfCheck(
        {
            name: _relative_error(norms[name], expected[name])
            for name in risk.layout.names
        },
        _TOLERANCES.get(dtype, _HALF_TOLERANCE),
        coverage,
        count,
    )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    largest = expected.abs().max()
    error = (found.to(expected) - expected).abs().max()
    return float(error / largest) if largest > 0 else float(error)


def _one_backward_per_example(
    risk: EmpiricalRisk, batch: Batch, count: int
) -> dict[str, Tensor]:
    rows: list[list[Tensor]] = []
    with risk.evaluating():
        for i in range(count):
            grads = risk.gradients(risk.loss_of(_example(batch, i, count)))
            rows.append([grad.double().square().sum() for grad in grads])
    columns = (torch.stack(column) for column in zip(*rows, strict=True))
    return dict(zip(risk.layout.names, columns, strict=True))


def _example(batch: Batch, index: int, count: int) -> Batch:
    def row(tensor: Tensor) -> Tensor:
        whole = tensor.dim() > 0 and tensor.shape[0] == count
        return tensor[index : index + 1] if whole else tensor

    example: Any = pytree.tree_map_only(Tensor, row, batch)
    return example[0], example[1]

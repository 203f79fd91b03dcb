"""The probe against brute force, on somebody's own model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from noisekit.core.batches import Batch, count_examples
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import EmpiricalRisk, LossFn
from noisekit.probes.estimators.brute_force import read_by_probe, read_one_by_one

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF_TOLERANCE = 1e-1


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How far a probe's readings are from one backward pass per example.

    Attributes:
        errors: Largest error of per-example squared norms by parameter, relative to
            its largest one.
        estimators: By estimator, the largest error of its units' squared norms,
            relative to the largest one.
        tolerance: What rounding may explain at the parameters' precision.
        coverage: How each parameter was read.
        num_examples: Examples compared.
    """

    errors: Mapping[str, float] = field(repr=False)
    estimators: Mapping[str, float]
    tolerance: float
    coverage: Mapping[str, str] = field(repr=False)
    num_examples: int

    @property
    def passed(self) -> bool:
        """Whether every parameter and every estimator agrees."""
        found = (*self.errors.values(), *self.estimators.values())
        return all(error <= self.tolerance for error in found)

    def __str__(self) -> str:
        """Say it in one line, with the worst parameter or estimator."""
        named = {f"{n}, by {self.coverage[n]}": e for n, e in self.errors.items()}
        named |= {f"estimator {name}": e for name, e in self.estimators.items()}
        worst = max(named, key=lambda name: named[name])
        verdict = "agrees" if self.passed else "disagrees"
        return (
            f"the probe {verdict} with brute force on {self.num_examples} examples: "
            f"largest relative error {named[worst]:.1e} ({worst}; tolerance "
            f"{self.tolerance:.0e})"
        )


def self_check(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    *,
    bn: BatchNormPolicy = "running",
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> SelfCheck:
    """Compare the probe with one backward pass per example.

    Per-example norms by parameter, and the units of a random subset of rows, of
    chunks, of micro-batches and of random signs. All at frozen weights and without
    dropout; the model is given back.

    Args:
        model: Any model whose examples are not coupled.
        loss_fn: Its loss, a mean or a sum over examples.
        batch: ``(inputs, targets)``; a few examples suffice.
        bn: BatchNorm policy; ``"batch"`` couples the examples and is refused.
        normaliser: What the loss of a batch is divided by, given its targets.
        params: Names or patterns of the parameters to check; all by default.

    Raises:
        CoupledExamplesError: If examples have no gradients of their own.
        LayerReadError: If some parameter's gradients cannot be told apart.
    """
    risk = EmpiricalRisk(
        model, loss_fn, [batch], bn=bn, normaliser=normaliser, params=params
    )
    found, expected = read_by_probe(risk, batch, params), read_one_by_one(risk, batch)
    return SelfCheck(
        _errors(found.examples, expected.examples),
        _errors(found.estimators, expected.estimators),
        _TOLERANCES.get(risk.layout.dtype, _HALF_TOLERANCE),
        found.coverage,
        count_examples(batch),
    )


def _errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    overall = torch.stack([norms.abs().max() for norms in expected.values()]).max()
    return {
        name: _relative_error(found[name], norms, overall)
        for name, norms in expected.items()
    }


def _relative_error(found: Tensor, expected: Tensor, overall: Tensor) -> float:
    """Relative to the largest norm, or to what rounding leaves of a zero gradient."""
    dust = torch.finfo(found.dtype).eps ** 1.5 * overall
    largest = torch.maximum(expected.abs().max(), dust.to(expected.dtype))
    error = (found.to(expected) - expected).abs().max()
    return float(error / largest) if largest > 0 else float(error)

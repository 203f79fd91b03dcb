"""What is measured, how hard, and what measures of one subject share."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import EigenPairs, HessianOperator, top_eigenpairs
from noisekit.curvature.operators.likelihoods import Likelihood
from noisekit.sharpness.data_error import (
    WithDataError,
    curvature_parts,
    data_stderr_at,
)
from noisekit.sharpness.measures.logits import Logits
from noisekit.sharpness.measures.pac_bayes_trial import Criterion
from noisekit.sharpness.measures.stability import SGDRule, refuse_steps_of_sum

Detail = dict[str, bool | int | float | str | None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One quantity as measured.

    Attributes:
        quantity: Its name in the vocabulary.
        estimate: Value, error, cost and status.
        variant: The setting that tells several of one quantity apart.
        detail: Settings and by-products.
        data_stderr: Error over the batches, where it is not the estimate's own.
    """

    quantity: str
    estimate: Estimate
    variant: str = ""
    detail: Detail = field(default_factory=dict)
    data_stderr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSettings:
    """How hard to measure, and with which radii.

    Attributes:
        tol: Relative accuracy of eigenvalues.
        max_matvecs: Most Hessian products for one eigenvalue.
        trace_matvecs: Hessian products for one trace.
        shift: Curvature that counts as a half in the effective dimension.
        epsilon: Box sizes of epsilon-sharpness.
        subspace_dim: Dimension of its random subspace, searched beside the full space.
        max_iter: Iterations of its search.
        rho: Radius of worst-case sharpness.
        adaptive_rho: The same in units of the weights.
        sigma: Standard deviation of the noise of average sharpness.
        adaptive_sigma: The same in units of the weights.
        eta: Added to the weights' units in adaptive measures; 0 keeps them invariant.
        ascent_steps: Steps of an ascent.
        num_draws: Draws of the noise.
        group_size: Examples in a group of m-sharpness.
        batch_size: Examples in a batch of batch sharpness; as given by default.
        logits: How logits are normalised in the measures that do so.
        flatness_target: Rise that PAC-Bayes flatness allows.
        flatness_criterion: Of what: the ``"error"``, or the ``"loss"`` where outputs
            are not classes.
        likelihood: Of the Fisher-Rao norm, where the loss does not tell it.
    """

    tol: float = 1e-3
    max_matvecs: int | None = None
    trace_matvecs: int = 32
    shift: float = 1e-2
    epsilon: tuple[float, ...] = (1e-3, 5e-4)
    subspace_dim: int | None = None
    max_iter: int = 10
    rho: float = 0.05
    adaptive_rho: float = 0.5
    sigma: float = 0.01
    adaptive_sigma: float = 0.1
    eta: float = 0.0
    ascent_steps: int = 10
    num_draws: int = 16
    group_size: int = 128
    batch_size: int | None = None
    logits: Logits = "unit_std"
    flatness_target: float = 0.1
    flatness_criterion: Criterion = "error"
    likelihood: Likelihood | None = None


@dataclass(slots=True)
class Subject:
    """A model on fixed data, and what its measures share.

    Attributes:
        risk: The empirical risk over the examples to measure on.
        hessian: Its Hessian; the graph is kept between measures.
        settings: How hard to measure.
        streams: Gives the random stream of a name, whatever was measured before.
        update_rule: What the model is trained with, for stability thresholds.
        data_errors: Whether measures get their error over batches also where that
            takes more products or gradients.
        lambda_max: The largest eigenvalue, where it was measured before.
    """

    risk: EmpiricalRisk
    hessian: HessianOperator
    settings: MeasureSettings
    streams: Callable[..., torch.Generator]
    update_rule: SGDRule | torch.optim.Optimizer | None = None
    data_errors: bool = True
    lambda_max: Estimate | None = None
    _pairs: dict[str, EigenPairs] = field(default_factory=dict)
    _errors: dict[str, float | None] = field(default_factory=dict)
    _start: tuple[float, Tensor] | None = None

    def start(self) -> tuple[float, Tensor]:
        """Return loss and gradient, computed once."""
        if self._start is None:
            self._start = self.risk.in_precision(torch.float32).value_and_grad()
        return self._start

    def extreme(self, which: Literal["LA", "SA"]) -> EigenPairs:
        """Return the largest or smallest eigenpair, computed once."""
        if which not in self._pairs:
            self._pairs[which] = top_eigenpairs(
                self.hessian,
                1,
                which=which,
                tol=self.settings.tol,
                max_matvecs=self.settings.max_matvecs,
                generator=self.streams("lanczos", which),
            )
        return self._pairs[which]

    def eigenvalue(self, which: Literal["LA", "SA"]) -> WithDataError:
        """Return the largest or smallest eigenvalue and its error over batches.

        It costs nothing where it was measured already.
        """
        if which == "LA" and self.lambda_max is not None:
            return replace(self.lambda_max, num_matvecs=0), None
        shared = which in self._errors
        found = self.extreme(which).estimate()
        if not shared:
            self._errors[which] = self._error_of(self.extreme(which))
        error = self._errors[which]
        cost = 0 if shared else found.num_matvecs + (error is not None)
        return replace(found, num_matvecs=cost), error

    def _error_of(self, pairs: EigenPairs) -> float | None:
        """Return the error over batches of an eigenvalue, to first order."""
        if not self.data_errors or not pairs.values.isfinite().all():
            return None
        vector = pairs.vectors[:, 0]
        return data_stderr_at(self.risk, lambda risk: curvature_parts(risk, vector))

    def rule(self) -> SGDRule:
        """Return the update rule.

        Raises:
            UsageError: If there is none, it is not SGD's, or it steps on a sum.
        """
        if self.update_rule is None:
            raise UsageError(
                "a stability threshold needs the update rule of SGD, got none; pass "
                "optimizer= with a torch.optim.SGD or an SGDRule(lr=...)."
            )
        if isinstance(self.update_rule, SGDRule):
            return self.update_rule
        refuse_steps_of_sum(self.risk.reduction)
        return SGDRule.of(self.update_rule)

"""The Fisher-Rao norm, which no rescaling of a ReLU network changes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser, normaliser_value
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.curvature.operators.derivative_check import check_jacobian
from noisekit.curvature.operators.likelihoods import (
    Likelihood,
    check_outputs,
    class_axis,
    likelihood_of,
    target_weights,
)
from noisekit.sharpness.data_error import gathered, mean_over_batches
from noisekit.sharpness.measurement import Measure, Measurement, MeasurementContext


@dataclass(frozen=True, kw_only=True)
class FisherRaoNorm(Measure):
    """Settings of :func:`fisher_rao_norm`."""

    name = "fisher_rao_norm"
    description = (
        "the squared Fisher-Rao norm from directional derivatives of the outputs, "
        "exact on the data"
    )
    needs = "a cross-entropy or squared-error loss"
    sources = ("liang2019fisher",)

    likelihood: Likelihood | None = None

    def cost(self) -> int:
        """Return the two reverse passes that make a forward one, and the outputs."""
        return 3

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield the squared Fisher-Rao norm."""
        risk = context.risk
        chosen = self.likelihood or likelihood_of(risk.loss_fn)
        if chosen is None:
            raise UsageError(
                "the Fisher-Rao norm needs a likelihood, 'categorical' or 'gaussian', "
                f"got {chosen!r} of {type(risk.loss_fn).__name__}; set likelihood=."
            )
        check_jacobian(risk, what="the Fisher-Rao norm")
        risk = risk.in_precision(torch.float32)
        sums, counts = [], []
        with risk.evaluating():
            for outputs, along, batch in _derivatives(risk):
                if chosen == "categorical":
                    axis = class_axis(risk, outputs, batch)
                    outputs, along = (o.movedim(axis, 1) for o in (outputs, along))
                    check_outputs(outputs, chosen)
                    weights = target_weights(outputs, batch, risk.normaliser).double()
                    terms = weights * _class_variances(outputs, along)
                else:
                    terms = along.double().square()
                    share = normaliser_value(batch, risk.normaliser) / len(outputs)
                    weights = terms.new_full((len(outputs),), share)
                sums.append(terms.reshape(len(outputs), -1).sum(1))
                counts.append(weights.reshape(len(outputs), -1).sum(1))
        total, count = (
            gathered(torch.cat(sums), risk),
            gathered(torch.cat(counts), risk),
        )
        yield self.measured(
            replace(
                mean_over_batches(total / count.sum(), count / count.sum()),
                num_grads=3 * risk.num_batches,
            )
        )


@checked
def fisher_rao_norm(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    likelihood: Likelihood | None = FisherRaoNorm.likelihood,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> Estimate:
    r"""Return the squared Fisher-Rao norm :math:`w^\top F(w)\, w` of a model's weights.

    ``F`` is the Fisher information of the model's own distribution: of classes with
    the outputs as logits, or normal about the outputs with variance 1. With
    ``a = J w``, the directional derivative of an example's outputs, it is the mean
    over the data of

    .. math:: \mathrm{Var}_{k \sim p(x)}\, a_k \quad\text{or}\quad |a|^2,

    weighted as the loss weights its targets, exact on the data given, at about three
    gradients. Rescalings of layers or neurons that keep a ReLU network's function do
    not change it.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        likelihood: ``"categorical"`` or ``"gaussian"``; by default that of the loss.

    Returns:
        The mean [loss], with its standard error over examples.

    Raises:
        UsageError: If the likelihood is unknown, or outputs do not fit it.

    Source:
        Liang et al. 2019, arXiv:1711.01530.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> round(float(nk.fisher_rao_norm(model, loss_fn, batches)), 4)
        2.5
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    return FisherRaoNorm(likelihood=likelihood).estimate(risk)


def _derivatives(risk: EmpiricalRisk) -> Iterator[tuple[Tensor, Tensor, Batch]]:
    """Yield outputs, their derivative along the weights, and each batch.

    Two reverse passes make a forward one, also for layers that have no forward
    derivative: ``J' u`` is linear in ``u``, and its slope along ``w`` is ``J w``.
    """
    for _, batch in risk.weighted_batches():
        outputs = risk.outputs_of(batch)
        if not isinstance(outputs, Tensor) or outputs.ndim < 2:
            raise UsageError(
                "the Fisher-Rao norm needs a model that returns one tensor "
                f"(n, outputs, ...), got {_describe(outputs)}."
            )
        dual = torch.zeros_like(outputs, requires_grad=True)
        gradients = risk.gradients((outputs * dual).sum(), create_graph=True)
        pairs = zip(gradients, risk.layout.split(risk.vector()), strict=True)
        slope = torch.stack([(g * w).sum() for g, w in pairs]).sum()
        (along,) = torch.autograd.grad(
            slope, dual, allow_unused=True, materialize_grads=True
        )
        yield outputs.detach(), along, batch


def _class_variances(outputs: Tensor, along: Tensor) -> Tensor:
    """Variance of the derivative over the classes that the model predicts."""
    chances = outputs.double().softmax(1)
    mean = (chances * along).sum(1, keepdim=True)
    return (chances * (along - mean).square()).sum(1)


def _describe(outputs: object) -> str:
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}"
    return f"a {type(outputs).__name__}"

"""Curvature of batch losses along the steps that the same batches ask for."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch, count_examples, take_examples
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser, normaliser_value
from noisekit.core.params import ParameterPatterns, flatten
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import NumSamples, PositiveInt
from noisekit.curvature.operators.derivative_check import check_second_derivatives
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import gathered
from noisekit.sharpness.jackknife import mean_of_ratios, ratio_of_means
from noisekit.sharpness.measurement import (
    Detail,
    Measure,
    Measurement,
    MeasurementContext,
    MeasureResult,
)
from noisekit.sharpness.sgd_rule import SGDRule


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSharpnessResult(MeasureResult):
    """Curvature along the batches' own steps, by both ways to average.

    Attributes:
        estimate: Mean over batches of each batch's ratio [loss/param²]: the measure
            as defined, with its standard error over batches.
        ratio_of_means: Mean numerator over mean denominator, with an interval by the
            jackknife of its log.
        ratios: ``(B,)``, each batch's own.
        batch_size: Examples in a batch; all batches are of this size.
        num_left_out: Batches of another size that were not used.
    """

    ratio_of_means: Estimate
    ratios: Tensor = field(repr=False)
    batch_size: int
    num_left_out: int

    def __str__(self) -> str:
        """Write both averages, and the batches behind them."""
        left_out = f", {self.num_left_out} left out" if self.num_left_out else ""
        return (
            f"{self.estimate} loss/param², ratio of means {self.ratio_of_means}, "
            f"{self.ratios.numel()} batches of {self.batch_size}{left_out}"
        )


@dataclass(frozen=True, slots=True)
class _Batches:
    """This process's batches, their size, and how many of all were left out."""

    own: list[Batch]
    size: int
    num_left_out: int


@dataclass(frozen=True, kw_only=True)
class BatchSharpness(Measure):
    """Settings of :func:`batch_sharpness`."""

    name = "batch_sharpness"
    description = (
        "batch sharpness, the mean over batches of each batch's curvature along its "
        "own gradient"
    )
    needs = "two batches or more"
    sources = ("andreyev2024edge",)

    batch_size: PositiveInt | None = None
    num_batches: NumSamples | None = None

    def cost(self) -> int:
        """Return the gradient and the Hessian product of every batch."""
        return 3

    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Yield batch sharpness, by both ways to average."""
        result = self.result(context.risk, context.stream("batch_sharpness"))
        detail: Detail = {
            "batch_size": result.batch_size,
            "num_left_out": result.num_left_out,
        }
        variant = f"batch_size={result.batch_size}"
        yield Measurement(self.name, result.estimate, variant, detail)
        means = replace(result.ratio_of_means, num_grads=0)  # of the same passes
        yield Measurement(f"{self.name}_ratio_of_means", means, variant, detail)

    def result(
        self, risk: EmpiricalRisk, generator: torch.Generator
    ) -> BatchSharpnessResult:
        """Measure the batches of a risk, with what is needed to read the result."""
        return _along_steps(risk, lambda gradient: gradient, self, generator)

    def batches(self, risk: EmpiricalRisk, generator: torch.Generator) -> _Batches:
        """Return this process's batches of the one size that all processes use.

        Raises:
            UsageError: If no batch has ``batch_size`` examples.
        """
        given = [batch for _, batch in risk.weighted_batches()]
        if self.batch_size is not None:
            given = list(_random_batches(given, self.batch_size, generator))
        own = torch.tensor([count_examples(batch) for batch in given])
        sizes = gathered(own.to(risk.layout.device), risk)
        largest = int(sizes.max())
        wanted = self.batch_size or largest
        if not bool((sizes == wanted).any()):
            raise UsageError(
                f"batch_size={wanted} needs batches of at least as many examples, got "
                f"at most {largest}; pass larger ones."
            )
        fitting = [batch for batch in given if count_examples(batch) == wanted]
        if self.num_batches is not None:
            counts = torch.tensor([len(fitting)], device=risk.layout.device)
            before = int(gathered(counts, risk)[: risk.ranks.rank].sum())
            fitting = fitting[: max(0, self.num_batches - before)]
        return _Batches(fitting, wanted, int((sizes != wanted).sum()))


@checked
def batch_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    batch_size: int | None = BatchSharpness.batch_size,
    num_batches: int | None = BatchSharpness.num_batches,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> BatchSharpnessResult:
    r"""Return the curvature of batch losses along their own gradients.

    .. math:: \mathbb{E}_B \left[ \frac{g_B^\top H_B\, g_B}{|g_B|^2} \right]

    with gradient and Hessian of the *same* batch. It depends on the batch size, so all
    batches need to be of one: others, such as a ragged last one, are left out and
    counted. Trained by SGD of that batch size it settles about ``2 / lr``; see
    :func:`stability_threshold` for momentum. Batch losses are means over the batch, as
    everywhere: those of a sum loss are divided by what they sum over.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        batch_size: Make random batches of so many examples out of each given one.
        num_batches: Most batches to use, the first ones; all by default.
        generator: Source of those; by default a fresh one.

    Returns:
        The mean of the ratios and the ratio of the means, each with its error over
        batches. Batches without gradient have no ratio and make the mean NaN, with
        ``Status.NO_SIGNAL``.

    Raises:
        UsageError: If an argument is out of range.

    Source:
        Andreyev and Beneventano 2024, arXiv:2412.20553.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> result = nk.batch_sharpness(model, loss_fn, batches * 2)
        >>> round(result.value, 4)  # (1 * 1² + 4 * 4²) / (1² + 4²)
        3.8235
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    measure = BatchSharpness(batch_size=batch_size, num_batches=num_batches)
    return measure.result(risk, entropy_generator(generator))


@checked
def step_sharpness(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    optimizer: torch.optim.Optimizer,
    batch_size: int | None = BatchSharpness.batch_size,
    num_batches: int | None = BatchSharpness.num_batches,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> BatchSharpnessResult:
    r"""Return the curvature of batch losses along the steps that an optimizer takes.

    .. math:: \mathbb{E}_B \left[ \frac{s_B^\top H_B\, s_B}{s_B^\top g_B} \right]

    with the step ``s_B`` that SGD would take now on that batch, its velocity included,
    per unit of learning rate. Weight decay is part of ``g`` and ``H``. Without
    momentum this is batch sharpness. The optimizer is read, never stepped. Of a sum
    loss the step is that on the sum, the curvature that of the mean.

    ``model`` to ``batches``, ``bn``, ``normaliser`` and ``params`` are as in
    :func:`~noisekit.core.risk.as_risk`.

    Args:
        optimizer: A ``torch.optim.SGD`` with one rule for all groups.
        batch_size: Make random batches of so many examples out of each given one.
        num_batches: Most batches to use, the first ones; all by default.
        generator: Source of those; by default a fresh one.

    Returns:
        The mean of the ratios and the ratio of the means, each with its error over
        batches. A velocity may point uphill on some batch, so that single ratios can
        be large or negative: prefer the ratio of means where they spread widely.

    Raises:
        UsageError: If an argument is out of range, or the optimizer is not SGD.

    Source:
        Andreyev et al. 2026, arXiv:2604.14108.
    """
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    rule = SGDRule.of(optimizer)
    velocity = _velocity(risk, optimizer)

    def step(gradient: Tensor) -> Tensor:
        if rule.momentum == 0:
            return gradient
        if velocity is None:
            moving = gradient
        else:
            moving = rule.momentum * velocity + (1 - rule.dampening) * gradient
        return gradient + rule.momentum * moving if rule.nesterov else moving

    plan = BatchSharpness(batch_size=batch_size, num_batches=num_batches)
    return _along_steps(
        risk, step, plan, entropy_generator(generator), weight_decay=rule.weight_decay
    )


def _random_batches(
    given: list[Batch], size: int, generator: torch.Generator
) -> Iterator[Batch]:
    for batch in given:
        order = torch.randperm(
            count_examples(batch), generator=generator, device=generator.device
        )
        for index in torch.split(order, size):
            yield take_examples(batch, index)


def _along_steps(
    risk: EmpiricalRisk,
    step: Callable[[Tensor], Tensor],
    plan: BatchSharpness,
    generator: torch.Generator,
    *,
    weight_decay: float = 0.0,
) -> BatchSharpnessResult:
    """Measure ``s' H_B s`` over ``s' g_B`` on every batch."""
    risk = risk.in_precision(torch.float32)
    check_second_derivatives(risk, what="sharpness along a step")
    result = torch.zeros(0, 2, dtype=torch.float64, device=risk.layout.device)
    with risk.evaluating():
        batches = plan.batches(risk, generator)
        if batches.own:
            rows = [_curvature_along(risk, b, step, weight_decay) for b in batches.own]
            result = torch.stack(rows)  # (batches, 2)
    above, below = gathered(result, risk).unbind(1)  # of all processes
    return BatchSharpnessResult(
        estimate=mean_of_ratios(above / below),
        ratio_of_means=ratio_of_means(above, below),
        ratios=above / below,
        batch_size=batches.size,
        num_left_out=batches.num_left_out,
    )


def _curvature_along(
    risk: EmpiricalRisk,
    batch: Batch,
    step: Callable[[Tensor], Tensor],
    weight_decay: float,
) -> Tensor:
    """Return ``s' H s`` and ``s' g`` of one batch's mean loss.

    The step is that on the loss as it is trained on. With ``c`` what a sum loss sums
    over, its gradient, step and Hessian are all ``c`` times those of the mean.
    """
    gradients = risk.gradients(risk.loss_of(batch), create_graph=True)
    gradient = flatten(gradients).detach()
    if weight_decay:
        gradient += weight_decay * risk.vector()
    direction = step(gradient)
    parts = zip(gradients, risk.layout.split(direction), strict=True)
    slope = torch.stack([(g * s).sum() for g, s in parts]).sum()
    product = flatten(risk.gradients(slope)) + weight_decay * direction
    wide = direction.double()
    forms = torch.stack([wide @ product.double(), wide @ gradient.double()])
    if risk.reduction == "mean":
        return forms
    count = normaliser_value(batch, risk.normaliser)
    return forms / forms.new_tensor([count**3, count**2])


def _velocity(risk: EmpiricalRisk, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The optimizer's velocity, in the order of the risk's parameters."""
    parts = [
        optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
        for p in risk.parameters
    ]
    if all(part is None for part in parts):
        return None
    return flatten(
        torch.zeros_like(p) if part is None else part.detach()
        for p, part in zip(risk.parameters, parts, strict=True)
    )

"""The Fisher information matrix of a model's likelihood: exact, sampled, empirical."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.batches import Batch, count_examples
from noisekit.core.data import StreamedBatches
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.randomness import stream
from noisekit.core.risk import EmpiricalRisk, LossFn
from noisekit.core.settings import PositiveInt, check_settings
from noisekit.curvature.operators.likelihoods import (
    Likelihood,
    check_outputs,
    class_axis,
    likelihood_of,
    observed_classes,
    one_hot,
    same_shape,
    sampled_classes,
    target_weights,
)
from noisekit.curvature.operators.output_space import (
    OutputProduct,
    OutputSpaceOperator,
    example_sums,
)
from noisekit.curvature.operators.weight_decay import WeightDecay
from noisekit.curvature.random_vectors import entropy_generator

FisherKind = Literal["true", "monte_carlo", "empirical"]


@dataclass(frozen=True, slots=True)
class MonteCarlo:
    """A Fisher matrix by targets drawn from the model's own distribution.

    Attributes:
        num_samples: Draws per target.
        generator: Of the draws; fresh entropy by default.
    """

    num_samples: PositiveInt = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Refuse fewer than one draw.

        Raises:
            UsageError: If there is none.
        """
        check_settings(self)


class FisherOperator(OutputSpaceOperator):
    r"""Products with the Fisher matrix of the model's likelihood over the data.

    .. math:: F = \frac{1}{\sum c} \sum_i c_i\, E_{y \sim p}[g_{iy} g_{iy}^\top]

    ``g_iy`` is the gradient of ``-log p(y | x_i)``. Under a categorical likelihood the
    outputs are logits, with the classes on the axis along which the loss does not see
    a constant, and each target is a term of its own, weighted as the loss weights it:
    ignored ones by 0, others by their class weight. Under a Gaussian one the outputs
    are means of unit variance and each example is a term; the sum is divided by what
    the loss divides by, so that the Gauss-Newton matrix of ``MSELoss`` is twice this.

    The empirical Fisher matrix takes the observed targets in place of the model's own
    distribution. It is no estimate of the Fisher matrix away from a perfect fit.

    Attributes:
        kind: ``"true"``, ``"monte_carlo"`` or ``"empirical"``.
        likelihood: ``"categorical"`` or ``"gaussian"``.
        num_samples: Draws per target, for ``"monte_carlo"``.
        seed: Of the draws, taken from the generator.

    Source:
        Kunstner, Balles and Hennig 2019, arXiv:1905.12558, section 2.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss  # the Hessian is diag(1, 4)
        >>> nk.FisherOperator(model, loss_fn, batches, kind="true").to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """

    kind: FisherKind
    likelihood: Likelihood
    num_samples: int
    seed: int

    @checked
    def __init__(
        self,
        model: nn.Module | EmpiricalRisk,
        loss_fn: LossFn | None = None,
        batches: Iterable[Batch] | None = None,
        *,
        kind: FisherKind | MonteCarlo = "true",
        likelihood: Likelihood | None = None,
        bn: BatchNormPolicy | None = None,
        normaliser: Normaliser | None = None,
        params: ParameterPatterns = None,
        memory_budget: int | None = None,
        weight_decay: WeightDecay = 0.0,
    ) -> None:
        """Check everything as :class:`RiskOperator` does.

        Args:
            model: This, and what is not described here, as in :class:`RiskOperator`.
            loss_fn: ``loss_fn(outputs, targets)``; its normaliser weights the targets.
            kind: ``"true"`` takes the expectation over the model's distribution
                exactly, ``"monte_carlo"`` by drawing targets once, so that the
                operator stays the same matrix, and ``"empirical"`` not at all.
                :class:`MonteCarlo` states how many are drawn and by which generator.
            likelihood: What the outputs are parameters of; that of the loss by
                default, where PyTorch's cross-entropy or mean squared error.
            weight_decay: Adds the curvature of the weight decay penalty.

        Raises:
            UsageError: If ``kind`` or ``likelihood`` is none of these.
        """
        self._choose_kind(kind)
        super().__init__(
            model,
            loss_fn,
            batches,
            bn=bn,
            normaliser=normaliser,
            params=params,
            memory_budget=memory_budget,
            weight_decay=weight_decay,
        )
        self.likelihood = _checked_likelihood(likelihood, self.risk)
        if self.kind == "monte_carlo" and isinstance(
            self.risk.batches, StreamedBatches
        ):
            self.risk.batches.keep_order()  # draws go by the place of a batch

    def _choose_kind(self, kind: FisherKind | MonteCarlo) -> None:
        drawing = kind if isinstance(kind, MonteCarlo) else MonteCarlo()
        name = "monte_carlo" if isinstance(kind, MonteCarlo) else kind
        self.kind, self.num_samples = name, drawing.num_samples
        bits = torch.randint(2**62, (), generator=entropy_generator(drawing.generator))
        self.seed = int(bits)

    def _output_product(
        self, outputs: Tensor, batch: Batch, *, weight: float, index: int
    ) -> OutputProduct:
        if self.likelihood == "gaussian":
            return self._gaussian(outputs, batch, index)
        axis = class_axis(self.risk, outputs, batch)
        inner = self._categorical(outputs.movedim(axis, 1), batch, index)
        return lambda u: inner(u.movedim(axis, 1)).movedim(1, axis)

    def _categorical(self, outputs: Tensor, batch: Batch, index: int) -> OutputProduct:
        """Return the product for logits ``(n, classes, ...)``."""
        check_outputs(outputs, self.likelihood)
        weights = target_weights(outputs, batch, self.risk.normaliser).unsqueeze(1)
        factor = weights / self.risk.total
        p = outputs.softmax(1)
        if self.kind == "true":
            # The covariance of a one-hot target: diag(p) - p p'.
            return lambda u: factor * (p * u - p * (p * u).sum(1, keepdim=True))
        if self.kind == "empirical":
            residuals = (p - observed_classes(outputs, batch[1])).unsqueeze(0)
        else:
            drawn = sampled_classes(p, self.num_samples, self._generator(index))
            residuals = torch.stack([p - one_hot(c, outputs) for c in drawn])

        def product(u: Tensor) -> Tensor:
            along = (residuals * u).sum(2, keepdim=True)  # (samples, n, 1, ...)
            return factor * (residuals * along).mean(0)

        return product

    def _gaussian(self, outputs: Tensor, batch: Batch, index: int) -> OutputProduct:
        factor = 1.0 / self.risk.total
        if self.kind == "true":
            return lambda u: factor * u
        count = count_examples(batch)
        if self.kind == "empirical":
            targets = self.risk.converted(batch[1])
            residuals = (outputs - same_shape(outputs, targets)).unsqueeze(0)
        else:
            shape = (self.num_samples, *outputs.shape)
            drawn = torch.randn(shape, generator=self._generator(index))
            residuals = drawn.to(outputs.device, outputs.dtype)
        scale = factor / len(residuals)

        def product(u: Tensor) -> Tensor:
            terms = [scale * r * example_sums(r * u, count) for r in residuals]
            return torch.stack(terms).sum(0)

        return product

    def _generator(self, index: int) -> torch.Generator:
        """The stream of one batch, the same at each product."""
        return stream(self.seed, "fisher", self.risk.ranks.rank, index)


def _checked_likelihood(
    likelihood: Likelihood | None, risk: EmpiricalRisk
) -> Likelihood:
    chosen = likelihood or likelihood_of(risk.loss_fn)
    if chosen is None or chosen not in get_args(Likelihood):
        raise UsageError(
            "a Fisher matrix needs likelihood='categorical' or 'gaussian', got "
            f"{likelihood!r} and a loss that does not tell; say which distribution "
            "the outputs are parameters of."
        )
    return chosen

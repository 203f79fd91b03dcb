"""Quantities that need the gradient's mean and variance parameter by parameter."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from noisekit.core.errors import BatchSizeError, UsageError
from noisekit.noise.step_statistics import signal_ratios


@dataclass(frozen=True, slots=True)
class ElementMoments:
    r"""Mean and mean square of per-example gradients, parameter by parameter.

    Attributes:
        num_examples: Examples ``n`` of the batch.
        mean: ``ḡ_j`` of every parameter, in any shape [loss/param].
        square_mean: ``(1/n) Σ_i g_ij²``, in the same shape [loss²/param²].
    """

    num_examples: int
    mean: Tensor = field(repr=False)
    square_mean: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        """Check the number of examples and the shapes."""
        if self.num_examples < 2:
            raise BatchSizeError(
                f"a variance per parameter needs 2 examples, got {self.num_examples}."
            )
        if self.mean.shape != self.square_mean.shape:
            raise UsageError(
                "moments need a mean and a mean square of one shape, got "
                f"{tuple(self.mean.shape)} and {tuple(self.square_mean.shape)}."
            )

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of ``g_ij`` over the examples [loss²/param²]."""
        return self._spread() * (self.num_examples / (self.num_examples - 1))

    @property
    def biased_variance_trace(self) -> Tensor:
        """``Σ_j ((1/n) Σ_i g_ij² - ḡ_j²)``, the ``ξ`` of CABS [loss²/param²]."""
        return self._spread().sum()

    def __str__(self) -> str:
        """Write how much was read, the squared mean and the variance in all."""
        return (
            f"gradients of {self.num_examples} examples over {self.mean.numel()} "
            f"parameters: |mean|² {float(self.mean.square().sum()):.4g}, "
            f"total variance {float(self.variance.sum()):.4g}"
        )

    def _spread(self) -> Tensor:
        # Rounding can take the difference of two near-equal squares below zero.
        return (self.square_mean - self.mean.square()).clamp_min(0)


@dataclass(frozen=True, slots=True)
class SignalToNoise:
    """Squared mean over variance of the gradient, averaged over parameters.

    Attributes:
        mean: Average over parameters, plug-in; about ``1 / n`` of it is noise.
        debiased_mean: The same, unbiased for Gaussian gradients; may be negative; NaN
            of fewer than 4 examples.
        num_params: Parameters averaged over.
        num_constant: Parameters left out, whose gradient does not vary.
    """

    mean: Tensor
    debiased_mean: Tensor
    num_params: Tensor
    num_constant: Tensor


def gradient_signal_to_noise(moments: ElementMoments) -> SignalToNoise:
    r"""Return the mean of ``r_j = ḡ_j² / Var(g_j)`` over parameters.

    The mean of a batch contains noise, so that for Gaussian gradients without signal
    the plug-in is ``(n-1) / (n (n-3))`` on average; ``debiased_mean`` corrects factor
    and offset: ``r (n-3)/(n-1) - 1/n``.

    Source:
        Liu et al. 2020, arXiv:2001.07384.
    """
    n = moments.num_examples
    total, count = _sum_of_ratios(moments)
    mean = total / count
    # n mean^2 / Var is F(1, n - 1) distributed, noncentral by n mu^2 / sigma^2, of mean
    # (n - 1) / (n - 3) times (1 + the noncentrality).
    debiased = mean * ((n - 3) / (n - 1)) - 1 / n if n > 3 else mean * math.nan
    return SignalToNoise(mean, debiased, count, moments.mean.numel() - count)


def evidence_stopping(moments: ElementMoments) -> Tensor:
    r"""Return the evidence-based stopping criterion; training may stop above zero.

    .. math:: 1 - \frac{n}{D} \sum_j \frac{\bar g_j^2}{\widehat{\mathrm{Var}}(g_j)}

    Its expectation is about zero where the true gradient is zero. Parameters whose
    gradient does not vary, such as those of dead units, do not count towards ``D``.

    Source:
        Mahsereci, Balles, Lassner and Hennig 2017, arXiv:1703.09580.
    """
    total, count = _sum_of_ratios(moments)
    return 1 - moments.num_examples * total / count


def cabs_batch_size(
    biased_variance_trace: float, loss: float, learning_rate: float
) -> float:
    r"""Return the batch size that CABS asks for, ``η ξ / F``, not rounded [examples].

    The rule assumes that the loss can fall to zero.

    Args:
        biased_variance_trace: ``ξ``, with the denominator ``n`` [loss²/param²].
        loss: ``F``, mean loss of the batch [loss].
        learning_rate: ``η`` of plain SGD [param²/loss].

    Raises:
        UsageError: If loss or rate are negative.

    Source:
        Balles, Romero and Hennig 2017, arXiv:1612.05086.
    """
    if loss < 0 or learning_rate < 0:
        raise UsageError(
            "CABS needs a loss and a learning rate that are not negative, got "
            f"{loss} and {learning_rate}; subtract the loss's lower bound from it."
        )
    if loss == 0:
        return math.inf if biased_variance_trace > 0 else 0.0
    return learning_rate * biased_variance_trace / loss


def _sum_of_ratios(moments: ElementMoments) -> tuple[Tensor, Tensor]:
    """Sum of ``ḡ_j² / Var(g_j)`` over the parameters that vary, and their number."""
    share = 1 / moments.num_examples
    return signal_ratios(moments.mean, moments.square_mean * share, share)

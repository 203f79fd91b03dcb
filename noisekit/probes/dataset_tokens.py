"""Gradient noise of sequences of different lengths, counted in tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from noisekit.core.batches import Batch, count_examples
from noisekit.core.errors import UsageError
from noisekit.core.normalisation import normaliser_value
from noisekit.core.risk import EmpiricalRisk
from noisekit.probes.capture.example_weights import per_example, target_weights
from noisekit.probes.capture.tokens import TokenCounts


@dataclass(frozen=True, slots=True)
class SequenceShares:
    """What every sequence counts in the risk, and in tokens.

    Attributes:
        shares: Of each sequence in the risk, one on average ``(N,)``.
        per_sequence: Tokens of a sequence, on average.
    """

    shares: Tensor
    per_sequence: float

    def of_a_ratio(
        self, sq_norms: Tensor, inner_products: Tensor, grad_sq_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both as a batch's own mean over tokens sees them, to first order.

        That mean is ``sum r_i a_i / sum r_i``, whose noise is of ``r_i (a_i - G)``: how
        lengths themselves vary cancels. In place of ``g_i = r_i a_i`` stand
        ``h_i = g_i - (r_i - 1) G``, which have the same mean.
        """
        s, h, q = sq_norms.double(), inner_products.double(), grad_sq_norm.double()
        beyond = self.shares.to(s) - 1
        return s - 2 * beyond * h + beyond.square() * q, h - beyond * q


def sequence_shares(risk: EmpiricalRisk, given: TokenCounts | None) -> SequenceShares:
    """Return what every sequence counts, in the order of the risk's batches.

    Raises:
        UsageError: If the loss does not tell which tokens count, or is divided by
            something else.
    """
    shares, sums, squares = [], 0.0, 0.0
    for _, batch in risk.weighted_batches():
        num_sequences = count_examples(batch)
        if given is None:
            counts = _known(risk, batch, num_sequences)
            squares += float(counts.square().sum())
            counts = counts.sum(1)
        else:
            counts = per_example("tokens", given(batch[1]), num_sequences).double()
            squares += float(counts.sum())
        sums += float(counts.sum())
        shares.append(_shares(risk, batch, counts))
    found = torch.cat(shares)
    tokens = sums**2 / squares
    return SequenceShares(found / found.mean(), tokens / len(found))


def _known(risk: EmpiricalRisk, batch: Batch, num_sequences: int) -> Tensor:
    """What each target of a sequence counts ``(n, L)``."""
    weights = target_weights(risk.loss_fn, batch[1])
    if weights is None or weights.numel() <= num_sequences:
        raise UsageError(
            "unit='token' needs a loss that tells which of several targets per "
            "sequence count, such as nn.CrossEntropyLoss, got "
            f"{type(risk.loss_fn).__name__}; give tokens=, which of a batch's targets "
            "returns the number of tokens per sequence."
        )
    return weights.reshape(num_sequences, -1).double()


def _shares(risk: EmpiricalRisk, batch: Batch, counts: Tensor) -> Tensor:
    """What a batch's sequences count in what its loss is divided by."""
    divisor = normaliser_value(batch, risk.normaliser)
    if math.isclose(divisor, float(counts.sum()), rel_tol=1e-6):
        return counts
    if divisor == len(counts):
        return torch.ones_like(counts)
    raise UsageError(
        "unit='token' needs a loss that is divided by its tokens or its sequences, got "
        f"{divisor:g} for {len(counts)} sequences of {float(counts.sum()):g} tokens; "
        "give the normaliser= and tokens= that belong together."
    )

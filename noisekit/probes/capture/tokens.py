r"""How many tokens a batch of sequences counts, in which its noise scale is given.

The sampling unit stays the sequence, since tokens of one sequence are not independent.
With ``T`` tokens that count and sequences of weight ``w_i`` in the step's gradient,
the noise in that gradient is ``S sum w_i²``, ``S`` being ``tr Σ`` of the sequences;
what it would be of one token more or less follows from

.. math:: E|g_B|^2 = |G|^2 \left(1 + \frac{\mathcal{B}}{T}\right), \quad
          \mathcal{B} = T \sum_i w_i^2 \, \frac{\mathrm{tr}\,\Sigma}{|G|^2}

``T sum w_i²`` is the number of tokens of each sequence, and of sequences of different
lengths that of the *effective* ones: long sequences carry more of the noise, so that
the plain mean length would be too little.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noisekit.core.batches import tensors_in
from noisekit.probes.capture.example_weights import (
    per_example,
    target_weights,
    tells_targets,
)
from noisekit.probes.capture.step_weights import StepWeights

# Takes a batch's targets, in whatever form the loader gives them.
TokenCounts = Callable[[Any], Tensor]

_WAY_OUT = (
    "give attach() tokens=, a function of the targets, and call the loss through "
    "probe.loss_fn"
)
_UNSEEN = "the loss was not called through probe.loss_fn, so that no target was seen"


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens that count behind a step's gradient, still on their device.

    Attributes:
        values: Their number, and that of each effective sequence ``(2,)``.
    """

    values: Tensor

    def __str__(self) -> str:
        """Write both numbers."""
        return f"{self.total:g} tokens, {self.per_sequence:.4g} per effective sequence"

    @property
    def total(self) -> float:
        """Tokens of the step."""
        return float(self.values[0])

    @property
    def per_sequence(self) -> float:
        """Tokens of an effective sequence."""
        return float(self.values[1])

    @classmethod
    def of(
        cls, counts: Sequence[Tensor | str | None], weights: StepWeights, like: Tensor
    ) -> "TokenCount | str":
        """Return the step's count, or why it is not known.

        Args:
            counts: Tokens by micro-batch, or the reason why they are not known.
            weights: What the sequences weigh.
            like: A tensor on the device.
        """
        known = [count for count in counts if isinstance(count, Tensor)]
        if not known or len(known) < len(counts):
            reasons = [count for count in counts if isinstance(count, str)]
            return reasons[0] if reasons else _UNSEEN
        total = torch.stack([count.double() for count in known]).sum()
        return cls(torch.stack([total, total * weights.example_sq_sum]).to(like.device))


def target_tokens(
    given: TokenCounts | None, loss_fn: object, targets: Any, num_sequences: int
) -> Tensor | str:
    """Return how many tokens of the targets count, or why that is not known.

    Args:
        given: The user's own function of the targets.
        loss_fn: PyTorch's cross-entropies are known: tokens that are not ignored
            count, with class weights ``c`` the effective ``(sum c)² / sum c²``.
        targets: Of one micro-batch.
        num_sequences: Its sequences.

    Raises:
        NormaliserError: If ``given`` does not return one number per sequence.
    """
    if given is not None:
        return per_example("tokens", given(targets), num_sequences).sum()
    weights = target_weights(loss_fn, targets)
    if weights is None or weights.numel() % num_sequences:
        return f"the loss does not tell which targets count; {_WAY_OUT}"
    if weights.numel() == num_sequences:
        return (
            "the targets are one per sequence, and tell nothing of its tokens; "
            f"{_WAY_OUT}"
        )
    squares = weights.square().sum()
    return weights.sum().square() / squares.clamp(min=torch.finfo(weights.dtype).tiny)


def input_tokens(
    inputs: object, num_sequences: int | None, batch_dim: int
) -> Tensor | str:
    """Return the positions of the model's only input, if it is one of token numbers.

    With a mask or labels beside it, or features, what counts is not known.
    """
    tensors = tensors_in(inputs)
    if len(tensors) == 1 and num_sequences is not None:
        ids = tensors[0]
        integral = not ids.is_floating_point() and ids.dtype != torch.bool
        if integral and ids.dim() == 2 and ids.shape[batch_dim] == num_sequences:
            return torch.full((), float(ids.numel()), device=ids.device)
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
    return (
        "counting tokens without the loss needs one input of token numbers "
        f"(sequence, position), got {shapes or 'none'}; give attach() the loss and "
        "call it through probe.loss_fn, or tokens= beside it"
    )


def refusal_of_tokens(
    unit: str, given: TokenCounts | None, loss_fn: object
) -> str | None:
    """Why tokens can be known not to be countable before any step, with the way out."""
    if given is not None and unit != "token":
        return f"tokens= belongs to unit='token', got unit={unit!r}; leave one out."
    if given is not None and loss_fn is None:
        return (
            "tokens= needs the targets to be seen, got loss_fn=None; give the loss to "
            "attach() and call it through probe.loss_fn."
        )
    untold = given is None and loss_fn is not None and not tells_targets(loss_fn)
    if unit == "token" and untold:
        return (
            "unit='token' needs to know which targets count, got a loss of your own, "
            f"{_name(loss_fn)}; give tokens=, which of a batch's targets returns the "
            "number of tokens per sequence."
        )
    return None


def _name(loss_fn: object) -> str:
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)

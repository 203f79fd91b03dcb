"""Loss and learning rate of a step, in the units of a mean over its examples."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from noisekit.probes.capture.step_record import StepRecord
from noisekit.probes.capture.step_weights import Number, StepWeights
from noisekit.probes.options import ProbeOptions


def weights_of(record: StepRecord, options: ProbeOptions) -> StepWeights:
    """Return what the step's examples weigh under the loop's conventions."""
    return StepWeights.of(
        record.passes, options.loss_reduction, options.microbatch_weights
    )


def mean_loss(record: StepRecord, options: ProbeOptions) -> Tensor | str:
    """Return the mean loss of the step's examples, or why it is not known."""
    gathered = [forward_pass.gathered for forward_pass in record.passes]
    if any(one.num_losses > 1 for one in gathered):
        return "the loss was called more than once in a pass: it may be a part only"
    losses = [one.loss for one in gathered if one.loss is not None]
    if len(losses) < len(gathered) or not losses:
        return "the loss was not seen: call it through probe.loss_fn"
    if options.loss_reduction == "sum":
        return torch.stack(losses).sum() / applied_factor(record, options)
    parts = zip(losses, weights_of(record, options).of_microbatches(), strict=True)
    return torch.stack([loss * weight for loss, weight in parts]).sum()


def applied_factor(record: StepRecord, options: ProbeOptions) -> Number:
    """Return this rank's gradient in units of the mean gradient."""
    if options.loss_reduction != "sum":
        return 1.0
    return sum(weights_of(record, options).counts)


def learning_rates(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], like: Tensor
) -> Tensor | float:
    """Return the rate of every parameter; one number where they are alike.

    Args:
        optimizer: Whose groups have the rates.
        parameters: In the reading's order.
        like: One entry per parameter, on the right device.
    """
    groups = optimizer.param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    own = [rates[id(parameter)] for parameter in parameters]
    if all(rate is own[0] for rate in own):
        # A tensor may be changed in place before the reading is looked at.
        only: Tensor | float = own[0].clone() if isinstance(own[0], Tensor) else own[0]
        return only
    return torch.stack(
        [
            rate.to(like.dtype).reshape(())
            if isinstance(rate, Tensor)
            else torch.full((), rate, dtype=like.dtype, device=like.device)
            for rate in own
        ]
    )

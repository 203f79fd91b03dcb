"""The batch size that CABS asks for: learning rate times variance over loss."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from noisekit.core.errors import UsageError
from noisekit.core.layers.per_example import Site
from noisekit.core.layers.rule import LayerCall, widen
from noisekit.core.results import Unavailable
from noisekit.noise.moments import GradientMoments
from noisekit.noise.step_quantity import StepQuantity
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import CapturedCall, ForwardPass
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator import StepNoise
from noisekit.probes.estimators.step_inputs import StepInputs
from noisekit.probes.step_metrics.batch_tests import step_moments
from noisekit.probes.step_metrics.metric import (
    MetricStep,
    RankSum,
    State,
    StepMetric,
    call_fault,
)


class Cabs(StepMetric):
    r"""``η ξ / F`` with the biased variance ``ξ`` and the batch's loss ``F``.

    Source:
        Balles, Romero and Hennig 2017, arXiv:1612.05086.
    """

    name = "cabs"

    def set_up(self, context: ProbeContext) -> None:
        """Check that there is a loss, and the optimizer that the rule is about.

        Raises:
            UsageError: If there is not.
        """
        if not isinstance(context.optimizer, torch.optim.SGD):
            raise UsageError(
                f"quantities={self.name!r} needs torch.optim.SGD, whose learning rate "
                f"the rule is about, got {type(context.optimizer).__name__}; leave it "
                "out."
            )
        check_loss_given(self.name, context)
        self._context = context

    @property
    def rank_sums(self) -> Mapping[str, RankSum]:
        """The loss is a mean over examples."""
        return {"loss": RankSum(1, power=1)}

    def on_loss(self, active: ForwardPass, targets: Any, loss: Tensor) -> None:
        """Keep the loss."""
        active.gathered.setdefault(self, []).append(loss.detach())

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return the mean loss and the learning rates."""
        loss = self._mean_loss(step)
        if isinstance(loss, Unavailable):
            return loss
        context = self._context
        rates = learning_rates(
            context.optimizer, context.recorder.parameters, step.gradient
        )
        return {"loss": loss.reshape(1), "rates": rates}

    def _mean_loss(self, step: StepInputs) -> Tensor | Unavailable:
        """The mean loss of the step's examples, or why it is not known."""
        seen: list[list[Tensor]] = [p.gathered.get(self, []) for p in step.passes]
        if any(len(losses) > 1 for losses in seen):
            return Unavailable(
                "the loss was called more than once in a pass: it may be a part only"
            )
        if not seen or not all(seen):
            return Unavailable("the loss was not seen: call it through probe.loss_fn")
        losses = [losses[0] for losses in seen]
        if self._context.loss_reduction == "sum":
            counted = self._context.applied_factor(step.record)
            return torch.stack(losses).sum() / counted
        parts = zip(losses, step.weights.of_microbatches(), strict=True)
        return torch.stack([loss * weight for loss, weight in parts]).sum()

    def value(self, step: MetricStep) -> StepQuantity | Unavailable:
        """Return the batch size in total and each parameter's part of it."""
        moments, layers = step_moments(step.reading), step.reading.layer_moments
        if isinstance(moments, Unavailable):
            return moments
        if layers is None:
            return Unavailable("the noise was not read layer by layer")
        if step.reading.coverage.unread:
            return Unavailable("not all parameters could be read")
        spread = self._spread(step, layers)
        if isinstance(spread, Unavailable):
            return spread
        # From a step along the applied gradient to one along the mean's.
        rates = step.state["rates"] * step.applied_factor
        entries = rates * spread / step.state["loss"]
        return StepQuantity(torch.cat((entries.sum().reshape(1), entries)))

    def _spread(
        self, step: MetricStep, layers: GradientMoments
    ) -> Tensor | Unavailable:
        """Biased variance per parameter ``(Q,)``."""
        share = layers.weight_sq_sum / layers.unit_size
        return layers.trace_and_norm()[0] * (1 - share)


class CabsConvCompat(Cabs):
    """CABS with the second moment of convolutions taken position by position.

    As in the authors' program, which drops products of two positions.
    """

    name = "cabs_conv_compat"

    def set_up(self, context: ProbeContext) -> None:
        """Find the convolutions."""
        super().set_up(context)
        recorder = context.recorder
        self._parameters, self._plan = recorder.parameters, recorder.plan
        self._convolutions = tuple(
            index
            for index in range(len(self._parameters))
            if self._is_convolution(index)
        )

    def _is_convolution(self, index: int) -> bool:
        """Whether only convolutions use the parameter."""
        return all(_is_convolution(site) for site in self._plan.sites_of(index))

    @property
    def rank_sums(self) -> Mapping[str, RankSum]:
        """Second moments are sums of squares."""
        positions = RankSum(len(self._parameters), power=2)
        return {**super().rank_sums, "positions": positions}

    def request(self, recorder: Recorder, num_readings: int) -> None:
        """Request the layers' calls."""
        recorder.wanted.examples = True

    def on_calls(self, index: int, calls: Sequence[CapturedCall]) -> None:
        """Read a convolution's second moment with positions apart."""
        if self._is_convolution(index):
            sums = calls[0].forward_pass.gathered.setdefault(_position_sums, {})
            sums[index] = _position_sums(calls, self._parameters[index])

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        """Return the convolutions' second moments as well."""
        state = super().measure(step, noise)
        if isinstance(state, Unavailable):
            return state
        fault = call_fault(step, fewest=1)  # other ranks may have more
        if fault:
            return fault
        sums = torch.zeros_like(step.gradient)
        for forward_pass in step.passes:
            found: dict[int, Tensor] = forward_pass.gathered.get(_position_sums, {})
            for index, own in found.items():
                sums[index] += own.to(sums.dtype)
        return {**state, "positions": sums * step.scale}

    def _spread(
        self, step: MetricStep, layers: GradientMoments
    ) -> Tensor | Unavailable:
        """The convolutions' from their positions, the others' as it is."""
        if "per_example" not in step.reading.estimates:
            return Unavailable("it needs estimator='per_example'")
        spread = super()._spread(step, layers)
        assert isinstance(spread, Tensor)
        share = layers.weight_sq_sum / layers.unit_size
        apart = step.tensor("positions") / share - layers.grad_sq_norm
        spread = spread.clone()
        for index in self._convolutions:
            spread[index] = apart[index]
        return spread


def check_loss_given(name: str, context: ProbeContext) -> None:
    """Check that the probe sees the loss.

    Raises:
        UsageError: If it does not.
    """
    if context.loss_fn is None:
        raise UsageError(
            f"quantities={name!r} needs the loss to be seen, got loss_fn=None; "
            "give it to attach() and call it through probe.loss_fn."
        )


def learning_rates(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], like: Tensor
) -> Tensor | float:
    """Return the rate of every parameter ``(Q,)``; one number where they are alike.

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


def _is_convolution(site: Site) -> bool:
    module = site.module
    return (
        site.rule.name == "convolution"
        and isinstance(module, _ConvNd)
        and not isinstance(module, _ConvTransposeNd)
    )


def _position_sums(calls: Sequence[CapturedCall], parameter: nn.Parameter) -> Tensor:
    """``sum_i sum_p x_ip² z_ip²``: the weight gradient of squares, summed up."""
    parts = []
    for captured in calls:
        name = captured.site.name_of(parameter)
        squared = _squared(captured.call)
        rows = slice(0, squared.num_examples)
        found = captured.site.rule.summed_grads(squared, (name,), rows)
        parts.append(found[name].sum())
    return torch.stack(parts).sum()


def _squared(call: LayerCall) -> LayerCall:
    """The call with its input and its output gradient squared."""

    def square(value: object) -> object:
        return widen(value).square() if isinstance(value, Tensor) else value

    return replace(
        call,
        args=tuple(square(value) for value in call.args),
        kwargs={name: square(value) for name, value in call.kwargs.items()},
        grads=[None if grad is None else widen(grad).square() for grad in call.grads],
    )

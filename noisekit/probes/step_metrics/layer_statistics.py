"""What layers' calls tell beside norms, gathered as each gradient is complete."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from noisekit.core.layers.per_example import Site
from noisekit.core.layers.rule import LayerCall, widen
from noisekit.noise.step_statistics import signal_ratios
from noisekit.probes.capture.sites import SitePlan
from noisekit.probes.capture.step_record import CapturedCall, StepRecord
from noisekit.probes.capture.step_weights import (
    LossReduction,
    MicrobatchWeights,
    StepWeights,
)
from noisekit.probes.capture.unit_norms import UnitNorms
from noisekit.probes.step_metrics.options import OF_PRODUCTS, OF_SQUARES


class ByProducts:
    """Gathers inner products, second moments and the like, as far as asked for.

    Second moments take the memory of the parameters once more, of a second
    micro-batch again while it is read, and some of the largest layer to compare them.

    Attributes:
        wanted: Whether to gather now.
    """

    def __init__(
        self,
        names: Collection[str],
        parameters: Sequence[nn.Parameter],
        plan: SitePlan,
        *,
        units: UnitNorms,
        loss_reduction: LossReduction,
        microbatch_weights: MicrobatchWeights,
    ) -> None:
        self.wanted = False
        self._products = bool(OF_PRODUCTS & set(names))
        self._squares = bool(OF_SQUARES & set(names))
        self._positions = "cabs_conv_compat" in names
        self._parameters = parameters
        self._units = units
        self._plan = plan
        self._loss_reduction = loss_reduction
        self._microbatch_weights = microbatch_weights

    @property
    def convolutions(self) -> tuple[int, ...]:
        """Parameters that only convolutions use, by index."""
        every = range(len(self._parameters))
        return tuple(index for index in every if self._is_convolution(index))

    def _is_convolution(self, index: int) -> bool:
        return all(_is_convolution(site) for site in self._plan.sites_of(index))

    def read(self, index: int, calls: Sequence[CapturedCall]) -> None:
        """Read a parameter's calls; its gradient is complete in ``.grad``."""
        if not self.wanted:
            return
        gathered = calls[0].forward_pass.gathered
        parameter = self._parameters[index]
        if self._products:
            gathered.products[index] = _inner_products(calls, parameter)
        if self._squares:
            gathered.square_sums[index] = self._units.square_sums(index, calls)
        if self._positions and self._is_convolution(index):
            gathered.position_sums[index] = _position_sums(calls, parameter)

    def gradient_ready(self, record: StepRecord) -> None:
        """Compare the step's second moments so far with its gradient so far."""
        passes = record.passes
        record.signal = None
        if not self.wanted or not self._squares or not passes:
            return
        if any(p.faults or p.unread or not p.num_examples for p in passes):
            return
        squares = passes[0].gathered.square_sums
        for forward_pass in passes[1:]:
            others = forward_pass.gathered.square_sums
            for index, other in others.items():
                own = squares.get(index)
                squares[index] = other if own is None else own.add_(other)
            others.clear()
        weights = StepWeights.of(passes, self._loss_reduction, self._microbatch_weights)
        record.signal = self._signal(squares, weights.example_sq_sum)

    def _signal(self, squares: dict[int, Tensor], share: float | Tensor) -> Tensor:
        """Sum of ratios and number of entries per parameter, ``(2, Q)``."""
        nothing = next(iter(squares.values())).new_zeros(())
        found = []
        for index, parameter in enumerate(self._parameters):
            total, count = nothing, nothing
            if index in squares and parameter.grad is not None:
                mean = widen(parameter.grad)
                total, count = signal_ratios(mean, squares[index].to(mean.dtype), share)
            found.append(torch.stack((total, count.to(total.dtype))))
        return torch.stack(found, 1)


def _inner_products(calls: Sequence[CapturedCall], parameter: nn.Parameter) -> Tensor:
    """``<u_i, .grad>`` of one parameter, all its calls together."""
    grad = parameter.grad
    assert grad is not None
    parts = [
        captured.site.rule.inner_products(
            captured.call, {captured.site.name_of(parameter): grad}
        )
        for captured in calls
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


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

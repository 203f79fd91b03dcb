"""Readings on their way from a device to the host, while training goes on."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.tokens import TokenCount
from noisekit.probes.reading import Reading


class HostCopy:
    """A reading that is being copied; whoever looks at it waits for the copy alone.

    All of its tensors go over as one, into memory that the device can write to by
    itself; the step that they come from is never waited for.
    """

    def __init__(self, reading: Reading) -> None:
        tensors = list(_tensors_of(reading))
        device = tensors[0].device
        wide = any(tensor.dtype == torch.float64 for tensor in tensors)
        dtype = torch.float64 if wide else torch.float32
        packed = torch.cat(
            [tensor.detach().reshape(-1).to(dtype) for tensor in tensors]
        )
        self._shapes = [tensor.shape for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        self._host = torch.empty(
            packed.shape, dtype=dtype, pin_memory=device.type == "cuda"
        )
        self._host.copy_(packed, non_blocking=True)
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        # The device's own memory is free as soon as the copy is done.
        self._reading = _with_tensors(
            reading, iter([tensor.new_empty(0) for tensor in tensors])
        )

    def resolved(self) -> Reading:
        """Return the reading with its tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        sizes = [shape.numel() for shape in self._shapes]
        parts = zip(torch.split(self._host, sizes), self._shapes, strict=True)
        return _with_tensors(
            self._reading, iter([part.view(shape) for part, shape in parts])
        )


def on_its_way(reading: Reading) -> "Reading | HostCopy":
    """Start copying a reading to the host, where it is on another device."""
    return HostCopy(reading) if reading.layer_sq_norms.is_cuda else reading


def _tensors_of(reading: Reading) -> Iterator[Tensor]:
    """Yield every tensor of a reading, in a fixed order."""
    yield reading.layer_sq_norms
    if reading.example_sq_norms is not None:
        yield reading.example_sq_norms
    if isinstance(reading.clip_factor, Tensor):
        yield reading.clip_factor
    if reading.tokens is not None:
        yield reading.tokens.values
    for quantity in reading.quantities.values():
        yield quantity.values
    for moments in _moments_of(reading):
        for value in _values_of(moments):
            if isinstance(value, Tensor):
                yield value


def _moments_of(reading: Reading) -> Iterator[GradientMoments]:
    own = (reading.moments, reading.layer_moments)
    yield from (moments for moments in own if moments is not None)
    yield from reading.estimates.values()


def _values_of(moments: GradientMoments) -> tuple[float | Tensor, ...]:
    return (
        moments.unit_size,
        moments.weight_sq_sum,
        moments.sum_sq_norm,
        moments.sum_fourth,
        moments.grad_sq_norm,
    )


def _with_tensors(reading: Reading, tensors: Iterator[Tensor]) -> Reading:
    """The reading with other tensors, in the order of ``_tensors_of``."""

    def moments(old: GradientMoments | None) -> GradientMoments | None:
        if old is None:
            return None
        size, weights, first, fourth, norm = (
            next(tensors) if isinstance(value, Tensor) else value
            for value in _values_of(old)
        )
        assert isinstance(first, Tensor)
        assert isinstance(fourth, Tensor)
        assert isinstance(norm, Tensor)
        return replace(
            old,
            unit_size=size,
            weight_sq_sum=weights,
            sum_sq_norm=first,
            sum_fourth=fourth,
            grad_sq_norm=norm,
        )

    layers = next(tensors)
    examples = None if reading.example_sq_norms is None else next(tensors)
    factor = reading.clip_factor
    factor = next(tensors) if isinstance(factor, Tensor) else factor
    tokens = None if reading.tokens is None else TokenCount(next(tensors))
    quantities = {
        name: replace(old, values=next(tensors))
        for name, old in reading.quantities.items()
    }
    own, by_layer = moments(reading.moments), moments(reading.layer_moments)
    estimates = {name: moments(old) for name, old in reading.estimates.items()}
    return replace(
        reading,
        layer_sq_norms=layers,
        example_sq_norms=examples,
        clip_factor=factor,
        tokens=tokens,
        quantities=quantities,
        moments=own,
        layer_moments=by_layer,
        estimates={name: new for name, new in estimates.items() if new is not None},
    )

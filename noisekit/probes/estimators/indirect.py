"""Estimators that do not square single units' gradients: signs, proxies, replays."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from noisekit.noise.moments import GradientMoments
from noisekit.probes.capture.unit_norms import is_norm_layer
from noisekit.probes.estimators.calibration import Calibration
from noisekit.probes.estimators.step_inputs import Evidence, StepNoise, call_fault


def random_signs(evidence: Evidence) -> StepNoise | str:
    """Return the noise with random signs, or why there is none."""
    passes = evidence.passes
    faults = [fault for p in passes for fault in p.signed_faults]
    faults += [p.coupling for p in passes if p.coupling]
    if faults:
        return faults[0]
    if not all(p.signed_norms for p in passes):
        return "no gradient of the model's output arrived"
    if evidence.record.num_examples * evidence.num_ranks < 2:
        return f"noise needs 2 examples per step, got {evidence.record.num_examples}"
    by_pass = [torch.stack(p.signed_norms).mean(0) for p in passes]
    sums = torch.stack(by_pass).sum(0) * evidence.scale
    weight_sq_sum = evidence.weights.example_sq_sum
    draws = evidence.options.num_signs
    layers, moments = (
        _with_chance_bound(
            GradientMoments(
                evidence.record.num_examples, 1, weight_sq_sum, total, total, gradient
            ),
            draws,
        )
        for total, gradient in (
            (sums, evidence.gradient),
            (sums.sum(), evidence.gradient.sum()),
        )
    )
    methods = dict.fromkeys(evidence.coverage, f"random signs, {draws} drawn")
    note = evidence.weights.note
    return StepNoise("random_signs", "random_signs", methods, moments, layers, note)


def _with_chance_bound(moments: GradientMoments, draws: int) -> GradientMoments:
    """Fourth moments that stand for the chance of the signs, not for the examples.

    ``|sum s_i u_i|²`` has at most twice its squared mean as variance.
    """
    n = moments.num_effective
    mean_fourth = moments.mean_sq_norm.square() * (1 + 2 * (n - 1) / draws)
    return replace(moments, sum_fourth=mean_fourth / n**3)


def norm_layers(evidence: Evidence) -> StepNoise | str:
    """Return what the normalisation layers say of the whole, or why nothing."""
    fault = call_fault(evidence, lambda p: True)
    if fault:
        return fault
    chosen = [is_norm_layer(way) for way in evidence.coverage.values()]
    if not all(p.sq_norms for p in evidence.passes) or not any(chosen):
        return "the model has no normalisation layer whose parameters are read"
    mask = torch.tensor(chosen, device=evidence.gradient.device)
    part = replace(evidence, gradient=evidence.gradient * mask)
    tables = [
        part.table({i: n for i, n in p.sq_norms.items() if chosen[i]})
        for p in evidence.passes
    ]
    moments, _ = part.units(tables, evidence.weights.example_sq_sum)
    _calibrate(evidence, moments)
    calibration = evidence.calibration
    note = "of the normalisation layers alone: an uncalibrated proxy"
    if calibration.num_readings:
        moments = _calibrated(moments, calibration, evidence.gradient.sum())
        note = f"a proxy, calibrated by {calibration.num_readings} full readings"
    methods = {
        name: way if own else "not read: normalisation layers stand for it"
        for (name, way), own in zip(evidence.coverage.items(), chosen, strict=True)
    }
    return StepNoise("norm_layers", "norm_layers", methods, moments, None, note)


def _calibrate(evidence: Evidence, part: GradientMoments) -> None:
    """Count a step in whose every layer was read, if calibration is wanted."""
    full = all(len(p.sq_norms) == len(p.read) for p in evidence.passes)
    if full and evidence.options.calibrate_every is not None:
        tables = [evidence.table(p.sq_norms) for p in evidence.passes]
        whole, _ = evidence.units(tables, evidence.weights.example_sq_sum)
        evidence.calibration.add(_trace(whole), _trace(part))


def _trace(moments: GradientMoments) -> Tensor:
    n = moments.num_effective
    return (moments.mean_sq_norm - moments.grad_sq_norm) / (1 - 1 / n)


def _calibrated(
    part: GradientMoments, calibration: Calibration, grad_sq_norm: Tensor
) -> GradientMoments:
    """Moments with the whole gradient's norm and the part's noise times the ratio."""
    n, ratio = part.num_effective, calibration.ratio
    mean_sq = ratio * _trace(part) * (1 - 1 / n) + grad_sq_norm
    spread = part.mean_fourth - part.mean_sq_norm.square()
    mean_fourth = mean_sq.square() + ratio * ratio * spread
    return replace(
        part,
        sum_sq_norm=mean_sq / n,
        sum_fourth=mean_fourth / n**3,
        grad_sq_norm=grad_sq_norm,
    )


def ghost(evidence: Evidence) -> StepNoise | str:
    """Return the noise of replayed ghost batches, or why there is none."""
    passes = evidence.passes
    faults = [fault for p in passes for fault in p.ghost_faults]
    if faults:
        return faults[0]
    ghosts = [p.ghost for p in passes if p.ghost is not None]
    if len(ghosts) < len(passes):
        return "the loss was not called through probe.loss_fn"
    size = evidence.options.ghost_batch
    note = None
    if len(ghosts) > 1:
        note = f"averaged over {len(ghosts)} micro-batches"
    methods = dict.fromkeys(evidence.coverage, f"ghost batches of {size}")
    moments = _averaged(ghosts)
    return StepNoise("ghost", f"ghost({size})", methods, moments, None, note)


def _averaged(parts: Sequence[GradientMoments]) -> GradientMoments:
    """Moments whose ``tr Σ`` and ``|G|²`` are the averages over parts, by their units.

    Unlike ``merge`` this needs no gradient of all parts together.
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(part.num_units for part in parts)
    shares = [part.num_units / total for part in parts]
    size = sum(s * part.unit_size for s, part in zip(shares, parts, strict=True))
    own = [_trace(part) for part in parts]  # per unit
    traces = [
        trace * (part.unit_size / size) for part, trace in zip(parts, own, strict=True)
    ]
    norms = [
        part.grad_sq_norm - part.weight_sq_sum * trace
        for part, trace in zip(parts, own, strict=True)
    ]
    trace, norm, mean_fourth = (
        torch.stack([s * v for s, v in zip(shares, values, strict=True)]).sum()
        for values in (traces, norms, [part.mean_fourth for part in parts])
    )
    a = sum(s * part.weight_sq_sum for s, part in zip(shares, parts, strict=True))
    q = norm + a * trace
    mean_sq = q + (1 - a) * trace
    return replace(
        parts[0],
        num_units=total,
        unit_size=size,
        weight_sq_sum=a,
        sum_sq_norm=mean_sq * a,
        sum_fourth=mean_fourth * a**3,
        grad_sq_norm=q,
    )


def preconditioned(evidence: Evidence) -> StepNoise | str:
    """Return the noise that an adaptive optimiser sees, or why not."""
    fault = call_fault(evidence, lambda p: p.read)
    if fault:
        return fault
    gradient = evidence.record.scaled_gradient
    if gradient is None or not all(p.scaled_sums for p in evidence.passes):
        return "the optimiser has no second moments before its first step"
    own = replace(evidence, gradient=gradient * evidence.scale)
    sums = [
        own.table({i: s.reshape(1) for i, s in p.scaled_sums.items()})
        for p in evidence.passes
    ]
    by_parameter = torch.cat(sums, 1).sum(1)
    layers, moments = (
        GradientMoments(
            evidence.record.num_examples,
            1,
            evidence.weights.example_sq_sum,
            total,
            torch.full_like(total, math.nan),
            norm,
        )
        for total, norm in (
            (by_parameter, own.gradient),
            (by_parameter.sum(), own.gradient.sum()),
        )
    )
    methods = {name: f"{way}, squares" for name, way in evidence.coverage.items()}
    note = evidence.weights.note
    return StepNoise("preconditioned", "preconditioned", methods, moments, layers, note)

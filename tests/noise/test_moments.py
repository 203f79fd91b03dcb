"""Sufficient statistics: what follows from them, and how they merge."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from noisekit.core.errors import UsageError
from noisekit.core.results import Status
from noisekit.noise import GradientMoments
from tests.reference import noise as reference


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3


def moments_of(grads: Tensor, weights: Tensor | None = None) -> GradientMoments:
    """The moments of ``(n, P)`` gradients in a weighted mean."""
    n = len(grads)
    weights = torch.full((n,), 1 / n).to(grads) if weights is None else weights
    parts = weights[:, None] * grads
    sq_norms = parts.square().sum(1)
    return GradientMoments(
        n,
        1,
        float(weights.square().sum()),
        sq_norms.sum(),
        sq_norms.square().sum(),
        parts.sum(0).square().sum(),
    )


def test_parts_are_the_covariance_and_the_debiased_norm() -> None:
    """Catches: contributions ``u_i`` taken for gradients ``g_i = n u_i``."""
    grads = draw(7, 5)
    parts = moments_of(grads).parts()
    assert parts is not None
    trace = reference.variance_trace([grads])
    assert parts.variance_trace == pytest.approx(trace)
    norm = reference.debiased_grad_sq_norm([grads])
    assert parts.debiased_grad_sq_norm == pytest.approx(norm)


def test_a_common_factor_scales_parts_and_leaves_the_ratio() -> None:
    """Loss scaling, or accumulation without dividing.

    Catches: a fourth moment that scales like a square.
    """
    grads = draw(7, 5)
    one, three = moments_of(grads).finalise(), moments_of(3 * grads).finalise()
    assert one is not None
    assert three is not None
    ratio = three.variance_trace.value / one.variance_trace.value
    assert ratio == pytest.approx(9)
    assert three.variance_trace.stderr == pytest.approx(9 * one.variance_trace.stderr)
    scale = three.simple_noise_scale.interval()
    assert scale.low == pytest.approx(one.simple_noise_scale.interval().low)


def test_unequal_weights_are_unbiased() -> None:
    """Catches: n where the effective number belongs."""
    weights = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
    grads = draw(4_000, 5, 6)
    found = [moments_of(g, weights).parts() for g in grads]
    traces = torch.tensor([p.variance_trace for p in found if p is not None])
    norms = torch.tensor([p.debiased_grad_sq_norm for p in found if p is not None])
    for values, truth in ((traces, 6.0), (norms, 6 * 0.09)):
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - truth) < 4 * error


def test_single_step_errors_are_bounds() -> None:
    """Intervals of one step cover at least as often as they say.

    Catches: an error of ``|G|²`` that leaves out the noise along the gradient.
    """
    truth = {"variance_trace": 6.0, "debiased_grad_sq_norm": 6 * 0.09}
    truth["simple_noise_scale"] = truth["variance_trace"] / (6 * 0.09)
    covered = dict.fromkeys(truth, 0)
    repeats = 1_000
    for grads in draw(repeats, 128, 6, seed=1):
        found = moments_of(grads).finalise()
        for name, value in truth.items():
            covered[name] += getattr(found, name).interval().contains(value)
    assert all(count / repeats > 0.935 for count in covered.values()), covered


def test_a_finite_population_has_less_noise_to_take_off() -> None:
    """Batches drawn without replacement from 40 examples: ``|∇F|²`` is recovered.

    Catches: the infinite-population form, low by ``tr Σ / N``.
    """
    population = draw(40, 5, seed=2)
    truth = float(population.mean(0).square().sum())
    generator = torch.Generator().manual_seed(3)
    values, naive = [], []
    for _ in range(4_000):
        chosen = torch.randperm(40, generator=generator)[:10]
        moments = moments_of(population[chosen])
        for sizes, into in ((40, values), (None, naive)):
            parts = moments.parts(population_size=sizes)
            assert parts is not None
            into.append(parts.debiased_grad_sq_norm)
    found = torch.tensor(values)
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - truth) < 4 * error
    assert abs(float(torch.tensor(naive).mean()) - truth) > 4 * error


def test_merging_equals_one_batch() -> None:
    """Chunks of unequal size give what all their examples give together.

    Catches: squared norms of sums added; chunks that weigh the same whatever their
    size; fourth powers scaled like squares.
    """
    grads = draw(11, 5)
    a, b = moments_of(grads[:4]), moments_of(grads[4:])
    whole = moments_of(grads)
    merged = a.merge(b, grad_sq_norm=whole.grad_sq_norm)
    assert merged.num_units == 11
    assert merged.num_effective == pytest.approx(11)
    torch.testing.assert_close(merged.sum_sq_norm, whole.sum_sq_norm)
    torch.testing.assert_close(merged.sum_fourth, whole.sum_fourth)
    other, own = merged.parts(), whole.parts()
    assert other is not None
    assert own is not None
    assert other.variance_trace == pytest.approx(own.variance_trace)


def test_units_of_different_sizes_do_not_merge() -> None:
    a = moments_of(draw(4, 3))
    b = GradientMoments(4, 8, 0.25, a.sum_sq_norm, a.sum_fourth, a.grad_sq_norm)
    with pytest.raises(UsageError, match="units of one size, got 1 and 8 examples"):
        a.merge(b, grad_sq_norm=a.grad_sq_norm)


def test_chunks_give_the_noise_of_an_example() -> None:
    """Means over chunks of 8 have an eighth of the noise.

    Catches: a chunk's own noise reported per example.
    """
    chunks = draw(4_000, 8, 5).mean(1)
    one = moments_of(chunks)
    found = GradientMoments(
        one.num_units,
        8,
        one.weight_sq_sum,
        one.sum_sq_norm,
        one.sum_fourth,
        one.grad_sq_norm,
    ).finalise()
    assert found is not None
    assert found.variance_trace.value == pytest.approx(5.0, rel=0.05)


def test_one_unit_has_no_noise() -> None:
    assert moments_of(draw(1, 3)).finalise() is None


def test_layers_add_up() -> None:
    """Catches: a layer's entry taken from its neighbour."""
    grads = draw(6, 4)
    parts = grads.square().T / 36  # one parameter per layer: (layers, examples)
    moments = GradientMoments(
        6, 1, 1 / 6, parts.sum(1), parts.square().sum(1), grads.mean(0).square()
    )
    found = [moments.layer(i).parts() for i in range(4)]
    for i, part in enumerate(found):
        assert part is not None
        assert part.variance_trace == pytest.approx(float(grads[:, i].var()))


def unequal_chunks(grads: Tensor, sizes: list[int]) -> GradientMoments:
    """The moments of chunks of ``(n, P)`` gradients that weigh by their size."""
    n = len(grads)
    parts = torch.stack([part.sum(0) / n for part in grads.split(sizes)])
    weights = torch.tensor(sizes, dtype=torch.float64) / n
    weight_sq_sum = float(weights.square().sum())
    sq_norms = parts.square().sum(1)
    return GradientMoments(
        len(sizes),
        weight_sq_sum * n,
        weight_sq_sum,
        sq_norms.sum(),
        sq_norms.square().sum(),
        parts.sum(0).square().sum(),
    )


def test_unequal_chunks_give_the_noise_of_an_example() -> None:
    """Catches: the mean size of chunks where their weighted size belongs."""
    grads, sizes = draw(12, 5), [2, 3, 7]
    means = torch.stack([part.mean(0) for part in grads.split(sizes)])
    counts = torch.tensor(sizes, dtype=torch.float64)
    trace, norm = reference.unit_noise(means, counts / 12, counts)
    parts = unequal_chunks(grads, sizes).parts()
    assert parts is not None
    assert parts.variance_trace == pytest.approx(trace)
    assert parts.debiased_grad_sq_norm == pytest.approx(norm)


def test_weights_may_be_on_the_device() -> None:
    """Catches: a weight that is turned into a number while the step runs."""
    plain = unequal_chunks(draw(12, 5), [2, 3, 7])
    on_device = replace(
        plain,
        unit_size=torch.tensor(plain.unit_size, dtype=torch.float64),
        weight_sq_sum=torch.tensor(plain.weight_sq_sum, dtype=torch.float64),
    )
    assert on_device.parts() == plain.parts()
    assert on_device.columns() == plain.columns()


@pytest.mark.parametrize("prefix", ["", "chunks_"])
def test_columns_hold_all_there_is(prefix: str) -> None:
    """Catches: a table from which an interval cannot be had again."""
    for num_read in (None, 2):
        moments = replace(unequal_chunks(draw(12, 5), [2, 3, 7]), num_read=num_read)
        row = {prefix + name: value for name, value in moments.columns().items()}
        again = GradientMoments.from_columns(row, prefix)
        mine, theirs = again.parts(), moments.parts()
        assert mine is not None
        assert theirs is not None
        for name in ("variance_trace", "debiased_grad_sq_norm", "trace_variance"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name))
        assert mine.dof == pytest.approx(theirs.dof)


def test_a_subset_has_the_error_of_the_units_that_were_read() -> None:
    """Catches: the error of all units for a quarter of them."""
    whole = moments_of(draw(400, 5))
    part = replace(whole, num_read=100)
    mine, theirs = part.parts(), whole.parts()
    assert mine is not None
    assert theirs is not None
    assert mine.trace_variance == pytest.approx(4 * theirs.trace_variance, rel=0.02)
    assert mine.variance_trace == theirs.variance_trace


def test_an_unread_spread_leaves_one_step_unresolved() -> None:
    """Catches: NaN limits, or an error of zero."""
    moments = replace(moments_of(draw(8, 3)), sum_fourth=torch.tensor(math.nan))
    found = moments.finalise()
    assert found is not None
    assert found.variance_trace.interval().low == -math.inf
    interval = found.simple_noise_scale.interval()
    assert (interval.low, interval.high) == (0.0, math.inf)
    assert found.simple_noise_scale.status is Status.NOT_RESOLVED


def test_merged_subsets_count_what_was_read() -> None:
    """Catches: a subset that is taken for the whole once it is merged."""
    grads = draw(12, 5)
    a, b = moments_of(grads[:4]), replace(moments_of(grads[4:]), num_read=2)
    norm = grads.mean(0).square().sum()
    assert a.merge(b, grad_sq_norm=norm).num_read == 6
    assert a.merge(a, grad_sq_norm=norm).num_read is None


def test_printed_they_are_a_line() -> None:
    """Catches: a tensor per layer on the screen; a scale of a single unit."""
    moments = moments_of(draw(7, 5))
    scale = moments.finalise()
    assert scale is not None
    assert str(moments) == (
        f"gradient moments of 7 units of 1 examples: noise scale "
        f"{scale.simple_noise_scale}, tr Σ {scale.variance_trace}, "
        f"|G|² {scale.debiased_grad_sq_norm}"
    )
    assert "tensor" not in repr(moments)
    layers = torch.ones(3)
    by_layer = replace(
        moments, sum_sq_norm=layers, sum_fourth=layers, grad_sq_norm=layers
    )
    assert str(by_layer).endswith("of 7 units of 1 examples, 3 entries")
    assert str(moments_of(draw(1, 5))).endswith("too few for a noise scale")

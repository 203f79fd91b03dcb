"""Some rows of a captured call, and sums over chunks of them, layer by layer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.layers.batch_axis import axis_of_examples
from noisekit.core.layers.chunks import call_of_rows, chunk_slices, chunk_sq_norms
from noisekit.core.layers.per_example import Site, assign_sites
from noisekit.core.layers.rule import LayerCall
from tests.reference import noise as reference

Build = Callable[[], nn.Module]
LAYERS: dict[str, tuple[Build, tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(5, 4), (9, 5), 0),
    "wide_linear": (lambda: nn.Linear(30, 40), (9, 30), 0),
    "linear_positions": (lambda: nn.Linear(5, 4), (9, 3, 5), 0),
    "linear_time_first": (lambda: nn.Linear(5, 4), (3, 9, 5), 1),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), (9, 2, 6, 6), 0),
    "layer_norm": (lambda: nn.LayerNorm(5), (9, 3, 5), 0),
    "layer_norm_time_first": (lambda: nn.LayerNorm(5), (3, 9, 5), 1),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (9, 4, 3), 0),
    "recurrent": (lambda: nn.GRU(3, 4, batch_first=True), (9, 2, 3), 0),
}


def captured(name: str) -> tuple[Site, LayerCall, dict[str, Tensor]]:
    """A call as hooks capture it, and the gradients of its examples."""
    build, shape, axis = LAYERS[name]
    torch.manual_seed(0)
    layer = build().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    output = layer(inputs)
    single = output[0] if isinstance(output, tuple) else output
    grad = torch.randn_like(single)
    site = assign_sites(layer, list(layer.parameters()))[0]
    grads: list[Tensor | None] = [grad, None] if output is not single else [grad]
    axes = (
        axis_of_examples(
            shape, 9, among=site.rule.example_axes(layer, inputs.shape), where=name
        ),
    )
    call = LayerCall(layer, (inputs,), {}, axes, 9, grads)
    call.statistics = site.rule.statistics(single)
    rows: dict[str, list[Tensor]] = {n: [] for n, _ in layer.named_parameters()}
    for i in range(9):
        out = layer(inputs.narrow(axis, i, 1))
        out = out[0] if isinstance(out, tuple) else out
        found = torch.autograd.grad(
            out, list(layer.parameters()), grad.narrow(axis, i, 1)
        )
        for parameter, own in zip(rows, found, strict=True):
            rows[parameter].append(own)
    return site, call, {n: torch.stack(r) for n, r in rows.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_a_call_of_some_rows(name: str) -> None:
    """Catches: a tensor that keeps all rows, such as a norm's statistics."""
    site, call, grads = captured(name)
    rows = torch.tensor([1, 4, 8])
    part = call_of_rows(site, call, rows)
    assert part is not None
    assert part.num_examples == 3
    found = site.rule.sq_norms(part, tuple(grads))
    for parameter, norms in reference.sq_norms(grads).items():
        torch.testing.assert_close(found[parameter], norms[rows])


@pytest.mark.parametrize("num_chunks", [3, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_sums_over_chunks(name: str, num_chunks: int) -> None:
    """Nine rows in three alike chunks, or in four that are not.

    Catches: inner products across chunks, or of each example with itself alone.
    """
    site, call, grads = captured(name)
    chunks = chunk_slices(9, num_chunks)
    found = chunk_sq_norms(site, call, tuple(grads), chunks)
    for parameter, rows in grads.items():
        expected = [rows[c].sum(0).square().sum() for c in chunks]
        torch.testing.assert_close(found[parameter], torch.stack(expected))


@pytest.mark.parametrize(("num_examples", "num_chunks"), [(9, 4), (3, 4), (8, 2)])
def test_chunks_cover_the_batch(num_examples: int, num_chunks: int) -> None:
    """Catches: a last chunk that is empty or twice as long."""
    chunks = chunk_slices(num_examples, num_chunks)
    assert len(chunks) == min(num_examples, num_chunks)
    covered = [i for c in chunks for i in range(c.start, c.stop)]
    assert covered == list(range(num_examples))
    sizes = {c.stop - c.start for c in chunks}
    assert max(sizes) - min(sizes) <= 1


def test_random_calls_have_no_part() -> None:
    """Catches: masks drawn anew for some rows of the batch."""
    site, call, _ = captured("recurrent")
    call.rng_state = torch.get_rng_state()
    assert call_of_rows(site, call, torch.tensor([0])) is None

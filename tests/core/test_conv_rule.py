"""The convolution rule against one backward pass per example, over generated shapes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from noisekit.core.layers import rule as layer_rules
from noisekit.core.layers.batch_axis import WHOLE
from noisekit.core.layers.convolution import ConvRule, Form, form_for
from noisekit.core.layers.correlation import CONVOLUTIONS, Correlation
from noisekit.core.layers.rule import LayerCall
from tests.reference import noise as reference

# PyTorch's own remark on even kernels; that case is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

RULE = ConvRule()


@dataclass(frozen=True)
class Geometry:
    """A convolution and the shape of a batch for it."""

    kind: type[nn.Module]
    options: dict[str, Any]  # what the layer's constructor takes
    shape: tuple[int, ...]


def _transposed_options(draw: st.DrawFn, axes: int) -> dict[str, Any]:
    stride = [draw(st.integers(1, 3)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 2)) for _ in range(axes)]
    limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    return {
        "stride": stride,
        "dilation": dilation,
        "padding": [draw(st.integers(0, 1)) for _ in range(axes)],
        "output_padding": [draw(st.integers(0, limit)) for limit in limits],
    }


def _plain_options(draw: st.DrawFn, axes: int) -> dict[str, Any]:
    padding = draw(st.sampled_from(["same", "same", "valid", 1, "several"]))
    if padding == "several":
        padding = [draw(st.integers(0, 2)) for _ in range(axes)]
    stride = 1 if padding == "same" else draw(st.integers(1, 3))
    modes = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    return {
        "stride": stride,
        "dilation": draw(st.integers(1, 2)),
        "padding": padding,
        "padding_mode": draw(st.sampled_from(modes)),
    }


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any of the six kinds, with options that fit each other."""
    kind = draw(st.sampled_from(CONVOLUTIONS))
    axes = int(kind.__name__[-2])
    groups = draw(st.integers(1, 3))
    transposed = "Transpose" in kind.__name__
    options = (_transposed_options if transposed else _plain_options)(draw, axes)
    options |= {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": [draw(st.integers(1, 3)) for _ in range(axes)],
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    extents = [draw(st.integers(5, 7)) for _ in range(axes)]
    shape = (draw(st.integers(1, 4)), options["in_channels"], *extents)
    return Geometry(kind, options, shape)


def called(
    geometry: Geometry, dtype: torch.dtype = torch.float64
) -> tuple[LayerCall, dict[str, Tensor]]:
    """A call with a random output gradient, and each example's own gradient."""
    torch.manual_seed(0)
    layer = geometry.kind(**geometry.options).to(dtype)
    inputs = torch.randn(geometry.shape, dtype=dtype)
    grads = torch.randn_like(layer(inputs).detach())
    call = LayerCall(layer, (inputs,), {}, (0,), geometry.shape[0], [grads])
    return call, reference.module_gradients(layer, inputs, grads)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(geometries())
def test_every_form_is_exact_on_generated_shapes(geometry: Geometry) -> None:
    """Catches: stride and dilation exchanged, pads of one side, groups mixed.

    Also a transposed convolution read as a plain one, and output padding forgotten.
    """
    call, expected = called(geometry)
    names = list(expected)
    grads = RULE.example_grads(call, names, slice(0, call.num_examples))
    sq_norms = RULE.sq_norms(call, names)
    wanted = reference.sq_norms(expected)
    for name in names:
        torch.testing.assert_close(grads[name], expected[name])
        torch.testing.assert_close(sq_norms[name], wanted[name])
    everything = Correlation.of(call, slice(0, call.num_examples))
    by_patches = everything.grads_by_patches().flatten(1).square().sum(1)
    torch.testing.assert_close(by_patches, wanted["weight"])
    torch.testing.assert_close(everything.gram_sq_norms(), wanted["weight"])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(geometries(), st.integers(0, 3), st.integers(1, 4))
def test_sums_on_generated_shapes(geometry: Geometry, start: int, count: int) -> None:
    """Catches: sums over all examples where some were asked for; squares of sums."""
    call, expected = called(geometry)
    names = list(expected)
    rows = slice(min(start, call.num_examples - 1), call.num_examples)
    rows = slice(rows.start, min(rows.stop, rows.start + count))
    sums = RULE.summed_grads(call, names, rows)
    squares = RULE.square_sums(call, names)
    for name in names:
        torch.testing.assert_close(sums[name], expected[name][rows].sum(0))
        torch.testing.assert_close(squares[name], expected[name].square().sum(0))


WIDE = {
    Form.GROUPED: Geometry(
        nn.Conv2d,
        {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "stride": 2},
        (5, 32, 13, 12),
    ),
    Form.PATCHES: Geometry(
        nn.Conv2d,
        {"in_channels": 3, "out_channels": 16, "kernel_size": 3, "padding": 1},
        (5, 3, 12, 12),
    ),
    Form.GRAM: Geometry(
        nn.ConvTranspose2d,
        {"in_channels": 48, "out_channels": 32, "kernel_size": 4, "stride": 2},
        (5, 48, 2, 2),
    ),
}


@pytest.mark.parametrize("form", WIDE, ids=lambda form: form.name.lower())
def test_the_form_goes_by_the_sizes_and_float32_is_close(form: Form) -> None:
    """Catches: a form that is never chosen, and squares summed in too few bits."""
    call, expected = called(WIDE[form])
    assert form_for(call) is form
    single, _ = called(WIDE[form], torch.float32)
    narrow = LayerCall(
        single.module.float(),
        (call.args[0].float(),),
        {},
        (0,),
        call.num_examples,
        [grad.float() for grad in call.grads if grad is not None],
    )
    got = RULE.sq_norms(narrow, ("weight", "bias"))
    wanted = reference.sq_norms(expected)
    for name, sq_norms in got.items():
        assert sq_norms.dtype == torch.float32
        torch.testing.assert_close(
            sq_norms.double(), wanted[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("form", WIDE, ids=lambda form: form.name.lower())
def test_one_example_at_a_time_gives_the_same(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a last chunk that is dropped or counted twice."""
    call, expected = called(WIDE[form])
    monkeypatch.setattr(layer_rules, "CHUNK_ELEMENTS", 1)
    wanted = reference.sq_norms(expected)
    torch.testing.assert_close(
        RULE.sq_norms(call, ["weight"])["weight"], wanted["weight"]
    )
    squares = RULE.square_sums(call, ["weight"])["weight"]
    torch.testing.assert_close(squares, expected["weight"].square().sum(0))


def test_channels_last_activations_are_read_alike() -> None:
    """Catches: folding examples into groups through a view of another layout."""
    call, expected = called(WIDE[Form.GROUPED])
    last = torch.channels_last
    grads = [g.contiguous(memory_format=last) for g in call.grads if g is not None]
    inputs = call.args[0].contiguous(memory_format=last)
    other = LayerCall(call.module, (inputs,), {}, (0,), call.num_examples, grads)
    got = RULE.sq_norms(other, ["weight"])["weight"]
    torch.testing.assert_close(got, reference.sq_norms(expected)["weight"])


def test_a_single_image_is_one_example() -> None:
    """Catches: channels of an image without batch axis, taken for examples."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3).double()
    inputs = torch.randn(3, 6, 6, dtype=torch.float64)
    output = layer(inputs)
    assert list(RULE.example_axes(layer, inputs.shape)) == []
    grads = torch.randn_like(output)
    call = LayerCall(layer, (inputs,), {}, (WHOLE,), 1, [grads])
    (weight,) = torch.autograd.grad(output, layer.weight, grads)
    got = RULE.example_grads(call, ["weight"], slice(0, 1))["weight"]
    torch.testing.assert_close(got[0], weight)


def test_parametrised_convolutions_are_left_to_the_replay() -> None:
    """Catches: reading a weight that the layer computes from something else."""
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 2))
    assert not RULE.applies(layer)
    assert RULE.applies(nn.ConvTranspose3d(2, 2, 2))


@pytest.mark.parametrize("kind", CONVOLUTIONS, ids=lambda kind: kind.__name__)
def test_nothing_is_asked_of_the_values(kind: type[nn.Module]) -> None:
    """On the meta device, where every look at a value raises.

    Catches: a transfer to the host in a rule, and tensors made on another device.
    """
    axes = int(kind.__name__[-2])
    for channels in (2, 32):
        with torch.device("meta"):
            layer = kind(channels, channels, 3)
            inputs = torch.randn(4, channels, *[5] * axes)
            grads = torch.randn_like(layer(inputs))
        call = LayerCall(layer, (inputs,), {}, (0,), 4, [grads])
        names = ("weight", "bias")
        assert RULE.sq_norms(call, names)["weight"].shape == (4,)
        sums = RULE.summed_grads(call, names, slice(1, 3))
        assert sums["weight"].shape == layer.weight.shape
        squares = RULE.square_sums(call, names)
        assert squares["weight"].shape == layer.weight.shape

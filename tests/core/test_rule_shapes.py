"""Layer rules at generated shapes and options, against one product per example."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from noisekit.core.layers.per_example import assign_sites
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.layers.rule import LayerCall
from tests.reference import noise as reference

# PyTorch's own remark on even kernels; they are wanted.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

generated = settings(derandomize=True, max_examples=100, deadline=None)
few = st.integers(1, 4)


def assert_exact(module: nn.Module, inputs: Tensor, *, axis: int = 0) -> None:
    """Everything that a rule tells agrees with a loop over the examples."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    (site,) = assign_sites(module, list(module.parameters()))
    assert not isinstance(site.rule, ModuleReplay)
    rule, names, count = site.rule, list(site.params), inputs.shape[axis]
    assert axis in rule.example_axes(module, inputs.shape)
    grads = torch.randn_like(module(inputs).detach())
    # Laid out in memory as the formats for images on a GPU are, not row by row.
    layouts = [
        t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t
        for t in (inputs, grads)
    ]
    call = LayerCall(module, (layouts[0],), {}, (axis,), count, [layouts[1]])
    expected = reference.module_gradients(module, inputs, grads, axis=axis)
    rows = slice(count // 2, count)
    some = rule.example_grads(call, names, rows)
    sums = rule.summed_grads(call, names, rows)
    squares = rule.square_sums(call, names)
    norms = rule.sq_norms(call, names)
    for name in names:
        own = expected[name]
        torch.testing.assert_close(some[name], own[rows])
        torch.testing.assert_close(sums[name], own[rows].sum(0))
        torch.testing.assert_close(squares[name], own.square().sum(0))
        torch.testing.assert_close(norms[name], reference.sq_norms(expected)[name])
    tangents = {name: torch.randn_like(p) for name, p in site.params.items()}
    products = [(expected[n] * tangents[n]).reshape(count, -1).sum(1) for n in names]
    got = rule.inner_products(call, tangents)
    torch.testing.assert_close(got, torch.stack(products).sum(0))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@generated
@given(st.data())
def test_linear(data: st.DataObject) -> None:
    """Catches: positions on more than one axis, examples on another than the first.

    Also the wrong one of the exact forms at the border between them.
    """
    torch.manual_seed(0)
    leading = data.draw(st.lists(few, min_size=1, max_size=3))
    axis = data.draw(st.integers(0, len(leading) - 1))
    width, out = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    layer = nn.Linear(width, out, bias=data.draw(st.booleans()))
    assert_exact(layer, normal(*leading, width), axis=axis)


@generated
@given(st.data())
def test_embedding(data: st.DataObject) -> None:
    """Catches: equal indices of different examples added up; padding counted.

    Tables longer and shorter than the sequences.
    """
    torch.manual_seed(0)
    shape = data.draw(st.lists(few, min_size=1, max_size=3))
    rows = data.draw(st.integers(1, 9))
    padding = data.draw(st.none() | st.integers(0, rows - 1))
    axis = data.draw(st.integers(0, len(shape) - 1))
    layer = nn.Embedding(rows, data.draw(few), padding_idx=padding)
    assert_exact(layer, torch.randint(rows, shape), axis=axis)


@generated
@given(st.data())
def test_feature_norms(data: st.DataObject) -> None:
    """Catches: statistics over the wrong axes; several normalised ones."""
    torch.manual_seed(0)
    leading = data.draw(st.lists(few, min_size=1, max_size=3))
    normalised = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=2))
    axis = data.draw(st.integers(0, len(leading) - 1))
    if data.draw(st.booleans()):
        layer: nn.Module = nn.RMSNorm(
            normalised, eps=data.draw(st.sampled_from((None, 0.1)))
        )
    else:
        layer = nn.LayerNorm(normalised, eps=0.1, bias=data.draw(st.booleans()))
    assert_exact(layer, 3 + normal(*leading, *normalised), axis=axis)


@generated
@given(st.data())
def test_channel_norms(data: st.DataObject) -> None:
    """Catches: channels of one group mixed with another's, or with another example's.

    Also statistics of the batch where the running ones were used.
    """
    torch.manual_seed(0)
    count, groups, dims = data.draw(few), data.draw(few), data.draw(st.integers(1, 3))
    channels = groups * data.draw(few)
    sizes = data.draw(st.lists(st.integers(2, 3), min_size=dims, max_size=dims))
    kind = data.draw(st.sampled_from(("group", "instance", "batch")))
    tracking = kind == "batch" or data.draw(st.booleans())
    if kind == "group":
        layer: nn.Module = nn.GroupNorm(groups, channels, eps=0.1)
    else:
        family = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        if kind == "batch":
            family = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        layer = family[dims - 1](
            channels, eps=0.1, affine=True, track_running_stats=tracking
        )
    if kind != "group" and tracking:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    layer.train(kind == "instance" and data.draw(st.booleans()))
    assert_exact(layer, 3 + normal(count, channels, *sizes))


@generated
@given(st.data())
def test_convolutions(data: st.DataObject) -> None:
    """Catches: strides that leave a border unused, pads of the wrong side or mode."""
    torch.manual_seed(0)
    dims = data.draw(st.integers(1, 3))
    family = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kernel, stride, dilation = (
        data.draw(st.lists(st.integers(1, top), min_size=dims, max_size=dims))
        for top in (3, 2, 2)
    )
    groups = data.draw(st.integers(1, 3))
    options: dict[str, Any] = {"groups": groups, "bias": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["padding"], stride = "same", [1] * dims
    else:
        options["padding"] = [data.draw(st.integers(0, k - 1)) for k in kernel]
    modes = st.sampled_from(("zeros", "reflect", "replicate", "circular"))
    layer = family[dims - 1](
        groups * data.draw(st.integers(1, 3)),
        groups * data.draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        dilation=dilation,
        padding_mode=data.draw(modes),
        **options,
    )
    assert_exact(layer, _image(data, layer, kernel, dilation))


@generated
@given(st.data())
def test_transposed_convolutions(data: st.DataObject) -> None:
    """Catches: input and output exchanged in one of the forms; output padding."""
    torch.manual_seed(0)
    dims = data.draw(st.integers(1, 3))
    family = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    kernel, stride, dilation = (
        data.draw(st.lists(st.integers(1, top), min_size=dims, max_size=dims))
        for top in (3, 2, 2)
    )
    groups = data.draw(st.integers(1, 3))
    layer = family[dims - 1](
        groups * data.draw(st.integers(1, 3)),
        groups * data.draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        dilation=dilation,
        groups=groups,
        bias=data.draw(st.booleans()),
        padding=[data.draw(st.integers(0, (k - 1) // 2)) for k in kernel],
        output_padding=[
            data.draw(st.integers(0, max(s, d) - 1))
            for s, d in zip(stride, dilation, strict=True)
        ],
    )
    assert_exact(layer, _image(data, layer, kernel, dilation))


def _image(
    data: st.DataObject, layer: Any, kernel: list[int], dilation: list[int]
) -> Tensor:
    """A batch large enough for the kernel."""
    sizes = [
        d * (k - 1) + 1 + data.draw(st.integers(0, 3))
        for k, d in zip(kernel, dilation, strict=True)
    ]
    return normal(data.draw(few), layer.in_channels, *sizes)

"""Networks of the papers: parameter counts that are known, and what they take."""

import itertools

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import batch_norms
from noisekit.train.models import (
    C1,
    C2,
    AlexNet,
    Gpt,
    Mlp,
    ModelSpec,
    NetworkSection,
    ResNet,
    ResNet50,
    SmallCnn,
    Vgg11,
    build_model,
)

COLOUR = (3, 32, 32)


def count(spec: NetworkSection, shape: tuple[int, ...], num_classes: int) -> int:
    """Parameters, of a network built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in spec.build(shape, num_classes).parameters())


@pytest.mark.parametrize(
    ("spec", "shape", "num_classes", "num_params"),
    [
        # He et al.'s table 6 has .27, .46, .66, .85 and 1.7 million.
        (ResNet(depth=20), COLOUR, 10, 269_722),
        (ResNet(depth=32), COLOUR, 10, 464_154),
        (ResNet(depth=44), COLOUR, 10, 658_586),
        (ResNet(depth=56), COLOUR, 10, 853_018),
        (ResNet(depth=110), COLOUR, 10, 1_727_962),
        # torchvision's documentation of vgg11_bn and resnet50.
        (Vgg11(), (3, 224, 224), 1000, 132_868_840),
        (ResNet50(), (3, 224, 224), 1000, 25_557_032),
        # GPT-2 small, whose output layer is the embedding.
        (Gpt(layers=12, heads=12, width=768), (1024,), 50_257, 124_439_808),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_published_sizes(spec, shape, num_classes, num_params) -> None:
    """The size is the published one, to the last parameter.

    Catches: shortcuts with parameters; biases before BatchNorm; an output layer of
    its own beside the embedding.
    """
    assert count(spec, shape, num_classes) == num_params


def conv(before: int, after: int, kernel: int, *, norm: bool) -> int:
    return before * after * kernel**2 + after + 2 * after * norm


def dense(*widths: int, norm: bool) -> int:
    pairs = list(itertools.pairwise(widths))
    return sum(a * b + b for a, b in pairs) + sum(2 * b * norm for _, b in pairs[:-1])


VGG_LIKE = (3, 64, 64, 128, 128, *[256] * 3, *[512] * 6)
VGG11_WIDTHS = (3, 64, 128, 256, 256, 512, 512, 512, 512)
VGG11_CONVOLUTIONS = sum(
    conv(a, b, 3, norm=True) for a, b in itertools.pairwise(VGG11_WIDTHS)
)


@pytest.mark.parametrize(
    ("spec", "num_classes", "num_params"),
    [
        (
            C1(),
            10,
            conv(3, 64, 5, norm=True)
            + conv(64, 64, 5, norm=True)
            + dense(64 * 64, 384, 192, 10, norm=True),
        ),
        (
            C1(name="c3"),
            100,
            conv(3, 64, 5, norm=True)
            + conv(64, 64, 5, norm=True)
            + dense(64 * 64, 384, 192, 100, norm=True),
        ),
        (
            C2(),
            10,
            sum(conv(a, b, 3, norm=True) for a, b in itertools.pairwise(VGG_LIKE))
            + dense(512, 512, 10, norm=True),
        ),
        *(
            (
                AlexNet(norm=norm),
                10,
                conv(3, 16, 5, norm=norm != "none")
                + conv(16, 48, 3, norm=norm != "none")
                + conv(48, 96, 3, norm=norm != "none")
                + conv(96, 64, 3, norm=norm != "none")
                + conv(64, 64, 3, norm=norm != "none")
                + dense(64 * 16, 256, 256, 10, norm=norm == "batch"),
            )
            for norm in ("none", "batch", "batch_convolutions", "group")
        ),
        # The classifier of Keskar's script after the nine layers of convolutions.
        (Vgg11(), 10, VGG11_CONVOLUTIONS + dense(512, 4096, 4096, 10, norm=False)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_sizes_counted_by_hand(spec, num_classes, num_params) -> None:
    """Every parameter on images of CIFAR's shape is accounted for.

    Catches: a block too few; BatchNorm in dense layers where it was left out.
    """
    assert count(spec, COLOUR, num_classes) == num_params


def test_c1_is_the_small_network_at_full_width() -> None:
    """The shallow network and its narrow version are one architecture."""
    small = count(SmallCnn(width=64, norm="batch"), COLOUR, 10)
    assert count(C1(dropout=False), COLOUR, 10) == small


@pytest.mark.parametrize(
    ("norm", "kind", "after_convolutions", "bias"),
    [
        ("none", None, 0, True),
        ("batch", nn.BatchNorm2d, 7, False),
        ("batch_convolutions", nn.BatchNorm2d, 7, False),
        ("group", nn.GroupNorm, 7, False),
    ],
)
def test_resnet_normalizes_as_stated(norm, kind, after_convolutions, bias) -> None:
    """Depth 8 has seven convolutions, each normalized or with a bias."""
    model = build_model(
        ResNet(depth=8, norm=norm), input_shape=(1, 8, 8), num_classes=4, seed=0
    )
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 7
    assert all((m.bias is not None) == bias for m in convolutions)
    found = [m for m in model.modules() if kind is not None and isinstance(m, kind)]
    assert len(found) == after_convolutions
    assert bool(batch_norms(model)) == norm.startswith("batch")


def test_shortcut_has_no_parameters_and_starts_where_it_should() -> None:
    """With a residual of zero, a block passes every second pixel on.

    Catches: channels added on one side only; a projection; a pool instead.
    """
    model = build_model(
        ResNet(depth=8, norm="none"), input_shape=(1, 8, 8), num_classes=4, seed=0
    )
    block = model[3]  # the first of the second stage: 16 to 32 channels
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    inputs = torch.rand(2, 16, 8, 8)
    outputs = block(inputs)
    assert outputs.shape == (2, 32, 4, 4)
    assert torch.equal(outputs[:, 8:24], inputs[:, :, ::2, ::2])
    assert not outputs[:, :8].any()
    assert not outputs[:, 24:].any()


def test_gpt_sees_no_later_token() -> None:
    """Logits at a place change with tokens up to it, and with none behind it.

    Catches: attention without its mask; positions that are left out.
    """
    spec = Gpt(layers=2, heads=2, width=8)
    model = build_model(spec, input_shape=(6,), num_classes=5, seed=0).double()
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0]])
    other = tokens.clone()
    other[0, 3] = 1
    before, after = model(tokens), model(other)
    assert before.shape == (1, 5, 6)
    changed = (before != after).any(dim=1).squeeze(0)
    assert changed.tolist() == [False, False, False, True, True, True]
    same = model(torch.zeros(1, 6, dtype=torch.int64))
    assert not torch.allclose(same[..., 0], same[..., 1])


@pytest.mark.parametrize(
    ("activation", "function"),
    [("tanh", torch.tanh), ("silu", nn.functional.silu), ("relu", torch.relu)],
)
def test_activation_is_the_stated_one(activation, function) -> None:
    """A network of one hidden layer is computed by hand."""
    spec = Mlp(hidden=(3,), activation=activation)
    model = build_model(spec, input_shape=(2,), num_classes=2, seed=0)
    inputs = torch.randn(4, 2)
    hidden = function(model.linear1(inputs))
    torch.testing.assert_close(model(inputs), model.output(hidden))


@pytest.mark.parametrize("init", ["default", "he_normal"])
def test_scale_multiplies_weights_and_no_bias(init: str) -> None:
    """Catches: a scale that is drawn anew; biases that are scaled."""
    plain = build_model(Mlp(init=init), input_shape=(4,), num_classes=3, seed=1)
    scaled = build_model(
        Mlp(init=init, init_scale=0.2), input_shape=(4,), num_classes=3, seed=1
    )
    for (name, before), after in zip(
        plain.named_parameters(), scaled.parameters(), strict=True
    ):
        factor = 0.2 if name.endswith("weight") else 1.0
        assert torch.equal(after, before * factor), name


def test_scale_counts_once_where_a_weight_is_shared() -> None:
    """GPT's output layer is its embedding."""
    spec = Gpt(width=8)
    sizes = {}
    for scale in (1.0, 0.5):
        given = spec.model_copy(update={"init_scale": scale})
        model = build_model(given, input_shape=(4,), num_classes=7, seed=0)
        sizes[scale] = model.output.weight
    assert torch.equal(sizes[0.5], sizes[1.0] * 0.5)


def test_last_norm_of_each_block_may_start_at_zero() -> None:
    """Goyal's start: 16 blocks of ResNet-50 begin as the identity."""
    with torch.device("meta"):
        plain = ResNet50().build((3, 64, 64), 10)
    with torch.device("cpu"):
        model = ResNet50(last_norm_zero=True).build((3, 64, 64), 10)
    assert len(batch_norms(plain)) == 53
    zero = [norm for norm in batch_norms(model) if not norm.weight.any()]
    assert len(zero) == 16


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (C2(), (1, 28, 28), r"c2 needs images of at least 32x32, got 28x28"),
        (Vgg11(), (3, 28, 28), r"vgg11_bn needs images of at least 32x32"),
        (ResNet50(), (1, 64, 64), r"resnet50 needs images with 3 channels, got 1"),
        (AlexNet(), (20,), r"alexnet needs images of shape .* got .*\(20,\)"),
        (Gpt(), (1, 8, 8), r"gpt needs sequences of tokens, got .*\(1, 8, 8\)"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_other_examples_are_refused(spec, shape, message) -> None:
    """Catches: a pool that leaves no pixel, and PyTorch's own error for it."""
    with pytest.raises(UsageError, match=message):
        spec.build(shape, 10)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "resnet", "depth": 18}, "depth needs to be 8, 14, 20"),
        ({"name": "gpt", "width": 10, "heads": 3}, r"heads needs to divide width"),
        ({"name": "resnet", "norm": "layer"}, "batch_convolutions"),
    ],
)
def test_impossible_settings_are_faults(table, message) -> None:
    """A recipe is refused before anything runs."""
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ModelSpec).validate_python(table)


def test_every_name_has_its_network() -> None:
    """Catches: two tags of one class that lose the name."""
    for name in ("c1", "c2", "c3", "c4"):
        spec = TypeAdapter(ModelSpec).validate_python({"name": name})
        assert spec.name == name
        assert type(spec) is (C1 if name in ("c1", "c3") else C2)

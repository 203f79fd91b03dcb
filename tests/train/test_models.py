"""Networks: their shapes, and whose weights they start from."""

import pytest
import torch
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.train.models import (
    F1,
    Mlp,
    NetworkSection,
    SmallCnn,
    build_model,
)

CASES = [
    (Mlp(), (1, 8, 8), 64 * 128 + 128 + 128 * 128 + 128 + 1290),
    (Mlp(hidden=(5,), norm="batch"), (7,), 40 + 10 + 60),
    # 784 -> 5 x (512, BatchNorm) -> 10
    (F1(), (1, 28, 28), 785 * 512 + 4 * 513 * 512 + 5 * 1024 + 5130),
    # 5x5 convolutions 1 -> 2 -> 2, then 2 x 2 x 2 -> 12 -> 6 -> 10
    (SmallCnn(width=2), (1, 8, 8), 52 + 102 + 108 + 78 + 70),
    (SmallCnn(width=2), (3, 7, 5), 152 + 102 + 108 + 78 + 70),
]


def build(spec: NetworkSection, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0):
    return build_model(spec, input_shape=shape, num_classes=10, seed=seed)


@pytest.mark.parametrize(("spec", "shape", "num_params"), CASES)
def test_network_has_the_stated_size(spec, shape, num_params) -> None:
    """Every parameter is accounted for by hand, and images go in as they are.

    Catches: a layer too few; pooling that rounds the other way.
    """
    model = build(spec, shape)
    assert sum(p.numel() for p in model.parameters()) == num_params
    assert model(torch.zeros(3, *shape)).shape == (3, 10)


def test_f1_normalises_before_each_relu() -> None:
    """Keskar's F1: five times linear, BatchNorm, ReLU, then linear.

    Catches: BatchNorm after the ReLU, or before the outputs.
    """
    kinds = [type(layer) for layer in build(F1(), (1, 28, 28))]
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [nn.Flatten, *(block * 5), nn.Linear]


@pytest.mark.parametrize("init", ["default", "he_normal", "glorot_uniform"])
def test_seed_decides_weights_and_touches_nothing_else(init: str) -> None:
    """The same seed gives the same bits, and the global random state is as before.

    Catches: drawing from the global generator; seeding it and leaving it so.
    """
    spec = Mlp(init=init)
    torch.manual_seed(1)
    first, before = build(spec, seed=3), torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(5)
    again, other = build(spec, seed=3), build(spec, seed=4)
    for name, weights in first.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name]), name
        if name.endswith("weight"):
            assert not torch.equal(weights, other.state_dict()[name]), name
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("init", "variance"),
    [("default", 1 / (3 * 64)), ("he_normal", 2 / 64), ("glorot_uniform", 2 / 576)],
)
def test_weights_have_the_variance_of_their_scheme(init: str, variance: float) -> None:
    """2/n for He, 2/(n+m) for Glorot, 1/(3n) for PyTorch's own, within 5 %.

    Catches: exchanging fan-in and fan-out; leaving the default in place.
    """
    weights = build(Mlp(hidden=(512,), init=init)).linear1
    assert weights.weight.var().item() == pytest.approx(variance, rel=0.05)
    assert bool((weights.bias == 0).all()) == (init != "default")


def test_convolution_of_a_vector_is_refused() -> None:
    """What has no height and width is no image."""
    with pytest.raises(
        UsageError, match=r"needs images .* got examples of shape \(20,\); use model"
    ):
        build(SmallCnn(), (20,))

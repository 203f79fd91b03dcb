"""Every network of the table under every loss, with micro-batches and clipping."""

import copy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from noisekit.train.data.section import TensorPair
from noisekit.train.data.update_batches import UpdateBatches
from noisekit.train.gradients import GradientRules
from noisekit.train.gradients.step import GradientStep
from noisekit.train.losses import LOSSES, find_loss
from noisekit.train.models import (
    C1,
    C2,
    F1,
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
from noisekit.train.models.build import OwnNetwork
from noisekit.train.models.random_layers import may_draw

CLASSES = 4
SMALL, LARGE = (2, 8, 8), (3, 32, 32)
NETWORKS: dict[str, tuple[NetworkSection, tuple[int, ...]]] = {
    "mlp": (Mlp(hidden=(5, 5)), SMALL),
    "f1": (F1(), SMALL),
    "small_cnn": (SmallCnn(width=2), SMALL),
    "c1": (C1(dropout=False), SMALL),
    "c2": (C2(dropout=False), LARGE),
    "c3": (C1(name="c3", dropout=False), SMALL),
    "c4": (C2(name="c4", dropout=False), LARGE),
    "alexnet": (AlexNet(norm="batch_convolutions"), SMALL),
    "resnet": (ResNet(depth=8, norm="group"), SMALL),
    "vgg11_bn": (Vgg11(hidden=(8,), dropout=0.0), LARGE),
    "resnet50": (ResNet50(), LARGE),
    "gpt": (Gpt(layers=1, width=8), (6,)),
}
DEEP = {"c2", "c4", "vgg11_bn", "resnet50"}
"""Where a pass takes so long that one loss has to do."""


def test_the_list_has_every_network() -> None:
    """Catches: a network that is added to the table and not tried here."""
    union = get_args(get_args(ModelSpec)[0])
    names = {
        name
        for member in union
        if (kind := get_args(member)[0]) is not OwnNetwork
        for name in get_args(kind.model_fields["name"].annotation)
    }
    assert names == set(NETWORKS)


def examples(spec: NetworkSection, shape: tuple[int, ...]) -> TensorPair:
    generator = torch.Generator().manual_seed(0)
    if spec.reads_tokens:
        tokens = torch.randint(CLASSES, (6, shape[0] + 1), generator=generator)
        return TensorPair(tokens[:, :-1], tokens[:, 1:])
    inputs = torch.randn(6, *shape, generator=generator)
    return TensorPair(inputs, torch.randint(CLASSES, (6,), generator=generator))


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
@pytest.mark.parametrize("microbatch", [None, 4])
@pytest.mark.parametrize(
    ("name", "loss_name"),
    [
        (name, loss)
        for name in NETWORKS
        for loss in LOSSES
        if name not in DEEP or loss == "squared_error"
    ],
)
def test_gradient_is_that_of_the_mean_over_examples(
    name: str, loss_name: str, microbatch: int | None, clip_norm: float | None
) -> None:
    """From per-example losses, summed over ragged parts; clipped as a whole.

    Catches: a loss of another shape than the network's outputs; parts that count
    alike; a parameter that is left out of the limit.
    """
    spec, shape = NETWORKS[name]
    loss, train = find_loss(loss_name), examples(spec, shape)
    model = build_model(spec, input_shape=shape, num_classes=CLASSES, seed=0)
    assert not may_draw(model) or name == "resnet50"
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = UpdateBatches(train, seed=0, device="cpu")
    batch = batches.batch(0, 6, microbatch=microbatch)
    step = GradientStep(model, loss.mean, optimizer, batch, None)
    found = GradientRules(clip_norm=clip_norm).fill(step)

    total = torch.zeros(())
    for part in batch:
        total = total + loss.per_example(twin(part.inputs), part.targets).sum() / 6
    total.backward()
    torch.testing.assert_close(found, total.detach(), rtol=1e-5, atol=1e-6)
    wanted = norm_of(twin)
    assert wanted > 1e-3
    factor = 1.0 if clip_norm is None else clip_norm / wanted
    for (key, one), other in zip(
        model.named_parameters(), twin.parameters(), strict=True
    ):
        torch.testing.assert_close(
            one.grad,
            other.grad * factor,
            rtol=2e-3,
            atol=2e-4 * float(factor * wanted),
            msg=lambda text, key=key: f"{key}: {text}",
        )
    wrong = loss.wrong(twin(train.inputs), train.targets)
    assert wrong.shape == (6,)


def norm_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()]).norm()

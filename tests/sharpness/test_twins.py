"""Twins of the same function: what stays, and what a rescaling changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.rescaling.chains import free_scales
from noisekit.sharpness.rescaling.twins import (
    rescale_layers,
    rescale_neurons,
    rescaled_twin,
    sharpened_twin,
)
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, built


def perceptron() -> nn.Sequential:
    return built(
        nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def image_chain(groups: int = 1) -> nn.Sequential:
    return built(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 4, 2, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 6, 2, padding=1, groups=groups),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def nested() -> nn.Sequential:
    return built(
        nn.Sequential(nn.Linear(8, 5), nn.PReLU()),
        nn.Sequential(nn.Sequential(nn.Linear(5, 4, bias=False), nn.Identity())),
        nn.Linear(4, 3),
    )


def normalised() -> nn.Sequential:
    return built(
        nn.Linear(8, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 4),
        nn.BatchNorm1d(4, affine=False),
        nn.GELU(),
        nn.Linear(4, 3),
    )


CHAINS = {
    "perceptron": perceptron,
    "images": image_chain,
    "grouped": lambda: image_chain(groups=2),
    "nested": nested,
    "normalised": normalised,
}


def batch(num_examples: int = 24) -> tuple[Tensor, Tensor]:
    generator = seeded(4)
    inputs = torch.randn(num_examples, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (num_examples,), generator=generator)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(batch()[0])


def dense_hessian(model: nn.Module) -> Tensor:
    model.eval()
    loss = reference.flat_loss(model, LOSS, *batch())
    return reference.dense_hessian(loss, reference.flat_weights(model))


def top_eigenvalue(model: nn.Module) -> float:
    return float(torch.linalg.eigvalsh(dense_hessian(model))[-1])


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("way", ["layers", "neurons"])
def test_rescaled_copies_have_the_same_function(name: str, way: str) -> None:
    """Outputs agree to rounding, weights do not, and the original is untouched.

    Catches: biases of deeper layers not multiplied; columns of a flattened or grouped
    layer divided by other channels' factors; statistics that stay behind.
    """
    model = CHAINS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if way == "layers":
        twin = rescale_layers(model, 3.0, batch=batch())
    else:
        twin = rescale_neurons(model, 5.0, batch=batch(), generator=seeded())
    torch.testing.assert_close(outputs(twin), outputs(model), rtol=1e-9, atol=1e-12)
    changed = twin.state_dict()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert sum(not torch.equal(changed[k], v) for k, v in before.items()) >= 3


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_powers_of_two_keep_every_bit(factor: float) -> None:
    """Without BatchNorm a factor of a power of two changes no bit of the outputs.

    Catches: a factor applied by way of its logarithm.
    """
    model = perceptron()
    twin = rescale_layers(model, factor, batch=batch())
    assert torch.equal(outputs(twin), outputs(model))
    assert torch.equal(twin[0].weight, factor * model[0].weight)
    assert torch.equal(twin[2].weight, model[2].weight)
    assert torch.equal(twin[2].bias, factor * model[2].bias)
    assert torch.equal(twin[4].weight, model[4].weight / factor)
    assert torch.equal(twin[4].bias, model[4].bias)


@pytest.mark.parametrize("way", ["layers", "neurons"])
def test_lambda_max_changes_and_the_weighted_trace_does_not(way: str) -> None:
    """The Hessian is scaled on both sides, which leaves ``sum w^2 H_ii`` alone.

    Catches: a rescaling of one layer only that keeps the predictions by chance; a
    measure called invariant that is not.
    """
    model = perceptron()
    if way == "layers":
        twin = rescale_layers(model, 4.0, batch=batch())
    else:
        twin = rescale_neurons(model, 4.0, batch=batch(), generator=seeded(1))
    weights = [reference.flat_weights(m) for m in (model, twin)]
    hessians = [dense_hessian(m) for m in (model, twin)]
    scale = weights[0] / weights[1]
    torch.testing.assert_close(
        hessians[1], scale[:, None] * hessians[0] * scale, rtol=1e-7, atol=1e-10
    )
    traces = [float(w**2 @ h.diag()) for w, h in zip(weights, hessians, strict=True)]
    assert traces[0] == pytest.approx(traces[1], rel=1e-6)
    ratio = top_eigenvalue(twin) / top_eigenvalue(model)
    assert not 0.8 < ratio < 1.25


@pytest.mark.parametrize("name", CHAINS)
def test_twin_is_sharper_and_predicts_the_same(name: str) -> None:
    """Both eigenvalues are those of dense Hessians, and the twin's is larger.

    Catches: a twin that is flatter; an eigenvalue predicted and never measured; D
    multiplied where it divides.
    """
    model = CHAINS[name]()
    twin = rescaled_twin(
        model, LOSS, [batch()], factor=4.0, tol=1e-6, generator=seeded()
    )
    assert twin.lambda_max.value == pytest.approx(top_eigenvalue(model), rel=1e-5)
    want = top_eigenvalue(twin.model)
    assert twin.twin_lambda_max.value == pytest.approx(want, rel=1e-5)
    assert twin.ratio == pytest.approx(want / twin.lambda_max.value, rel=1e-5)
    assert twin.ratio > 1.5
    assert twin.output_change < 1e-12
    torch.testing.assert_close(
        outputs(twin.model), outputs(model), rtol=1e-9, atol=1e-12
    )
    assert twin.divided in dict(model.named_modules())


def test_twin_divides_the_layer_that_carries_the_eigenvector() -> None:
    """A large factor multiplies the eigenvalue by nearly its square.

    Catches: always dividing the same layer.
    """
    flat, steep = perceptron(), perceptron()
    with torch.no_grad():
        steep[0].weight.div_(20)
        steep[0].bias.div_(20)
        steep[2].weight.mul_(20)
    twins = [
        rescaled_twin(m, LOSS, [batch()], factor=8.0, generator=seeded())
        for m in (flat, steep)
    ]
    assert all(twin.ratio > 20 for twin in twins)
    assert [(t.divided, t.multiplied) for t in twins] == [("2", "4"), ("0", "2")]


def test_twin_under_batch_statistics() -> None:
    """With the batch's own statistics the loss stays up to BatchNorm's constant.

    Catches: a twin compared under statistics that are not used.
    """
    stateless = built(
        nn.Linear(8, 6),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    stateless[0].weight.data.mul_(0.4)  # so that this is the layer to divide
    for model in (normalised(), stateless):
        risk = EmpiricalRisk(model, LOSS, [batch()], bn="batch")
        twin = rescaled_twin(risk, generator=seeded())
        other = EmpiricalRisk(twin.model, LOSS, [batch()], bn="batch")
        assert twin.ratio > 2
        assert other.value() == pytest.approx(risk.value(), rel=1e-3)


def test_free_scales_name_where_they_are() -> None:
    """Every stretch is listed with its source, its sink and its channels.

    Catches: a stretch across GELU; a BatchNorm without weights taken as a source.
    """
    found = [(s.source, s.sink, s.num_channels) for s in free_scales(normalised())]
    assert found == [("0", "1", 6), ("1", "3", 6), ("3", "4", 4)]
    found = [(s.source, s.sink, s.num_channels) for s in free_scales(nested())]
    assert found == [("0.0", "1.0.0", 5), ("1.0.0", "2", 4)]
    bare = built(
        nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 3)
    )
    assert [(s.source, s.sink) for s in free_scales(bare)] == [("0", "1")]


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


def shared() -> nn.Sequential:
    layer = nn.Linear(8, 8)
    return built(layer, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branched(), "known for nn.Sequential only, got Branched; pass the sequential"),
        (built(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 3)), "Linear, GELU, Linear"),
        (built(nn.Linear(8, 3)), "got Linear; there is no rescaled twin"),
        (shared(), "needs to keep the function, got outputs that differ by"),
    ],
)
def test_networks_that_are_refused(model: nn.Module, message: str) -> None:
    """What has no known rescaling, or is changed by it, is refused with the reason.

    Catches: GELU taken for ReLU; a shared layer scaled at its first use only.
    """
    with pytest.raises(UsageError, match=message):
        rescale_layers(model, 4.0, batch=batch())


def test_factors_that_are_refused() -> None:
    """Only positive factors keep a ReLU network; a twin needs one above 1.

    Catches: a negative factor, which turns ReLU around; a twin that is the original.
    """
    with pytest.raises(UsageError, match=r"a positive and finite factor, got -2\.0"):
        rescale_layers(perceptron(), -2.0, batch=batch())
    with pytest.raises(UsageError, match="a positive and finite factor, got 0"):
        rescale_neurons(perceptron(), 0, batch=batch())
    with pytest.raises(UsageError, match=r"factor needs to be above 1.* got 1\.0"):
        rescaled_twin(perceptron(), LOSS, [batch()], factor=1.0)


def test_factor_too_small_to_raise_the_eigenvalue_is_refused() -> None:
    """Where no layer carries enough of the eigenvector, a larger factor is asked for.

    Catches: a control that is flatter than what it controls.
    """
    model = perceptron()
    with torch.no_grad():  # all curvature is in the last layer's bias
        model[4].weight.zero_()
        model[2].weight.zero_()
        model[2].bias.zero_()
    with pytest.raises(UsageError, match="a sharper twin needs a factor other than 4"):
        rescaled_twin(model, LOSS, [batch()], generator=seeded())


@pytest.mark.parametrize("times", [3.0, 1000.0])
@pytest.mark.parametrize("name", ["perceptron", "grouped", "normalised"])
def test_sharpened_twin_has_the_eigenvalue_that_was_asked_for(
    name: str, times: float
) -> None:
    """By the dense Hessian of the twin itself, within five percent.

    Catches: a factor from the asymptotic law alone, which is off for small targets; a
    target taken as a ratio.
    """
    model = CHAINS[name]()
    before = top_eigenvalue(model)
    twin = sharpened_twin(
        model, LOSS, [batch()], target=times * before, tol=1e-5, generator=seeded()
    )
    assert twin.ratio == pytest.approx(times, rel=0.051)
    assert top_eigenvalue(twin.model) == pytest.approx(
        twin.twin_lambda_max.value, rel=1e-4
    )
    torch.testing.assert_close(
        outputs(twin.model), outputs(model), rtol=1e-8, atol=1e-9
    )
    assert twin.factor > times**0.5 * 0.9


def test_targets_that_are_refused() -> None:
    """A twin cannot be flatter on purpose, nor sharper where no layer carries it.

    Catches: an endless search; a twin that is the original.
    """
    model = perceptron()
    with pytest.raises(UsageError, match=r"above the model's own .*, got 1e-06 and"):
        sharpened_twin(model, LOSS, [batch()], target=1e-6, generator=seeded())
    with torch.no_grad():  # all curvature is in the last layer's bias
        for index in (0, 2, 4):
            model[index].weight.zero_()
        model[2].bias.zero_()
    with pytest.raises(UsageError, match=r"target=100 needs to be within reach, got"):
        sharpened_twin(model, LOSS, [batch()], target=100.0, generator=seeded())

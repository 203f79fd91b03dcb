"""Networks that train at the edge of stability, in seconds.

A network of tanh units on forty examples of a smooth function, in double precision:
trained with all of them at once its sharpness rises until it meets the threshold.
"""

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.measures.batch import batch_sharpness
from noisekit.sharpness.measures.eigenvalues import lambda_max
from noisekit.sharpness.measures.stability import (
    SGDRule,
    edge_of_stability_ratio,
    stability_threshold,
)
from tests.randomness import seeded

LOSS = nn.MSELoss()


def smooth(num_examples: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(num_examples, 4, generator=seeded()).double()
    targets = torch.sin(2 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3] / 2
    return inputs, targets


def network(width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    return layers.double()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.2},
        {"lr": 0.4},
        {"lr": 0.3, "momentum": 0.5},
        {"lr": 0.15, "momentum": 0.5, "nesterov": True},
    ],
    ids=str,
)
def test_full_batch_training_settles_at_the_threshold(options: dict) -> None:
    """Averaged over late training ``lambda_max`` is within 5 % of it.

    It starts at half of it or less, so that it has to rise there.

    Catches: ``2 / lr`` for all; half or double the threshold; ``1 - beta`` for
    ``1 + beta``.
    """
    data = [smooth(40)]
    model = network(16)
    rule = SGDRule(**options)
    risk = EmpiricalRisk(model, LOSS, data)
    start = lambda_max(risk, generator=seeded())
    optimizer = torch.optim.SGD(model.parameters(), **options)
    ratios = []
    for step in range(2600):
        if step >= 1400 and step % 60 == 0:
            top = lambda_max(risk, tol=1e-2, generator=seeded())
            ratios.append(edge_of_stability_ratio(top, rule).value)
        optimizer.zero_grad()
        LOSS(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
    assert start.value < stability_threshold(rule)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)


def test_small_batch_training_settles_by_batch_sharpness() -> None:
    """Averaged over late training batch sharpness is near ``2 / lr``.

    It rises from half of that, and ``lambda_max`` stays clearly below: the edge of
    small batches is not that of the whole data.

    Catches: the full Hessian along batch gradients, which stays below as well.
    """
    inputs, targets = smooth(40)
    model = network(32)
    edge = stability_threshold(SGDRule(lr=0.2), kind="small_batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    generator = seeded(1)
    data = [(inputs, targets)] * 8

    def now() -> float:
        return batch_sharpness(
            model, LOSS, data, batch_size=8, generator=generator
        ).value

    start, late, tops = now(), [], []
    for step in range(6000):
        if step >= 3000 and step % 200 == 0:
            late.append(now() / edge)
            top = lambda_max(model, LOSS, data[:1], tol=1e-2, generator=generator)
            tops.append(top.value / edge)
        chosen = torch.randint(40, (8,), generator=generator)
        optimizer.zero_grad()
        LOSS(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    settled = sum(late) / len(late)
    assert start < 0.7 * edge
    assert settled == pytest.approx(1, abs=0.12)
    assert sum(tops) / len(tops) < 0.9 * settled

"""The network and data that the curvature and sharpness benchmarks share."""

import itertools

import torch
from torch import Tensor, nn

BATCH = 512
Batches = list[tuple[Tensor, Tensor]]
LOSS = nn.CrossEntropyLoss()


def problem(num_examples: int, width: int, steps: int) -> tuple[nn.Module, Batches]:
    """Return a 784-wide network of five hidden layers, trained a little, and data."""
    torch.manual_seed(0)
    sizes = [784, *[width] * 5, 10]
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    centres = torch.randn(10, 784)
    targets = torch.randint(10, (num_examples,))
    inputs = 0.35 * centres[targets] + torch.randn(num_examples, 784)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        rows = torch.arange(256 * step, 256 * (step + 1)) % num_examples
        optimizer.zero_grad()
        LOSS(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))

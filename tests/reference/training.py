"""Training as plainly as it can be written, for comparison."""

import math

import torch
from torch import Tensor, nn


def mean_loss_and_error(
    model: nn.Module, inputs: Tensor, targets: Tensor
) -> tuple[float, float]:
    """Mean cross-entropy and share of errors, one example at a time."""
    model.eval()
    total, wrong = 0.0, 0
    for example, target in zip(inputs, targets.tolist(), strict=True):
        outputs = model(example.unsqueeze(0))[0].tolist()
        highest = max(outputs)
        rest = math.log(sum(math.exp(value - highest) for value in outputs))
        total += highest + rest - outputs[target]
        wrong += outputs.index(highest) != target
    model.train()
    return total / len(targets), wrong / len(targets)


def train_by_hand(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    *,
    rate: float,
    momentum: float = 0.0,
) -> None:
    """Heavy-ball gradient descent: ``v = momentum v + g; w = w - rate v``."""
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for inputs, targets in batches:
        outputs = model(inputs)
        likelihood = outputs.log_softmax(1)[torch.arange(len(targets)), targets]
        gradients = torch.autograd.grad(-likelihood.mean(), list(model.parameters()))
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), gradients, velocity, strict=True):
                v.mul_(momentum).add_(g)
                p.sub_(rate * v)

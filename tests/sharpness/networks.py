"""Small networks in double precision, and data for them."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from noisekit.sharpness import SHARPNESS_MEASURES, Measure
from tests.randomness import seeded

LOSS = nn.CrossEntropyLoss()


def rectified(*, norm: bool = False, bias: bool = True) -> nn.Sequential:
    """A ReLU network of 5 inputs and 3 classes, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias)]
        if norm:
            layers.insert(1, nn.BatchNorm1d(6))
        return nn.Sequential(*layers).double()


def built(*layers: nn.Module) -> nn.Sequential:
    """A double-precision chain with random weights, biases and statistics."""
    model = nn.Sequential(*layers).double()
    generator = seeded(11)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0, generator=generator)
            elif value.is_floating_point():
                value.normal_(0.0, 0.5, generator=generator)
    return model


class FailsAfter:
    """A cross-entropy that raises after a number of calls.

    Not a module, since the state of modules is restored.
    """

    def __init__(self, calls: float) -> None:
        self.calls = calls

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("the loss failed")
        return nn.functional.cross_entropy(outputs, targets)


def classes(num_examples: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Random inputs and classes."""
    generator = seeded(seed)
    inputs = torch.randn(num_examples, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (num_examples,), generator=generator)


def ragged(num_examples: int = 30, num_first: int = 23) -> list[tuple[Tensor, Tensor]]:
    """The same in two batches of unequal size."""
    inputs, targets = classes(num_examples)
    return [
        (inputs[:num_first], targets[:num_first]),
        (inputs[num_first:], targets[num_first:]),
    ]


def state_of(model: nn.Module) -> list[object]:
    """Everything that a measurement has to give back, to be compared."""
    tensors = [t.detach().clone().tolist() for t in model.state_dict().values()]
    gradients = [p.grad is None for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return [tensors, gradients, modes, hooks]


def quick(
    names: Iterable[str] = SHARPNESS_MEASURES, **settings: object
) -> list[Measure]:
    """Measures with settings laid over the usual ones, where they have them."""
    return [
        replace(measure, **{k: v for k, v in settings.items() if k in measure.settings})
        for name in names
        for measure in SHARPNESS_MEASURES[name]
    ]

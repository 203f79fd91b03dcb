"""What a probe costs: interleaved rounds of plain, probed and other packages' steps.

Run as ``python tests/benchmarks/bench_probe.py [rounds]``. Only ratios to the plain
step of the same round mean anything; medians and quartiles are shown. Processor time of
one thread is measured, which other processes disturb least.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from noisekit.probes import attach

Step = Callable[[], object]
Build = Callable[[], tuple[nn.Module, Tensor]]


def m1() -> tuple[nn.Module, Tensor]:
    """Keskar's F1 without BatchNorm: 784, 5 x 512, 10; batch 256."""
    widths = [784, 512, 512, 512, 512, 512]
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10)), torch.randn(256, 784)


def m2() -> tuple[nn.Module, Tensor]:
    """A convolutional net on 3 x 32 x 32 without normalisation; batch 128."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 10),
    )
    return model, torch.randn(128, 3, 32, 32)


def prepared(build: Build) -> tuple[nn.Module, torch.optim.SGD, Tensor, Tensor]:
    torch.manual_seed(0)
    model, inputs = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return model, optimizer, inputs, torch.randint(10, (len(inputs),))


def plain(build: Build, *, every: int | None = None) -> Step:
    model, optimizer, inputs, targets = prepared(build)
    loss_fn = nn.CrossEntropyLoss()
    if every is not None:
        attach(model, optimizer, every=every)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()

    return step


def backpack_norms(build: Build) -> Step:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model, optimizer, inputs, targets = prepared(build)
    model, loss_fn = extend(model), extend(nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        with backpack(BatchL2Grad()):
            loss_fn(model(inputs), targets).backward()
        optimizer.step()

    return step


def opacus_norms(build: Build) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, optimizer, inputs, targets = prepared(build)
    wrapped = GradSampleModuleFastGradientClipping(model, use_ghost_clipping=True)
    loss_fn = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(wrapped(inputs), targets).backward()
        wrapped.get_norm_sample()
        optimizer.step()

    return step


def contenders(build: Build) -> Iterator[tuple[str, Step, int]]:
    """Yield a name, a step, and how many steps are timed as one."""
    yield "plain", plain(build), 1
    yield "noisekit, every step", plain(build, every=1), 1
    yield "noisekit, every 10 steps", plain(build, every=10), 10
    with suppress(ImportError):
        yield "BackPACK BatchL2Grad", backpack_norms(build), 1
    with suppress(ImportError):
        yield "Opacus ghost norms", opacus_norms(build), 1


def seconds(step: Step, count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - start) / count


def bench(name: str, build: Build, rounds: int) -> None:
    entries = list(contenders(build))
    for _, step, _ in entries:
        seconds(step, 11)  # beyond the closure checks of the first readings
    ratios: dict[str, list[float]] = {label: [] for label, _, _ in entries}
    for _ in range(rounds):
        base = 0.0
        for label, step, count in entries:
            took = seconds(step, count)
            base = base or took
            ratios[label].append(took / base)
    print(f"{name}: ratio to a plain step, median [quartiles] of {rounds} rounds")
    for label, values in ratios.items():
        low, middle, high = torch.tensor(values).quantile(
            torch.tensor([0.25, 0.5, 0.75])
        )
        print(f"  {label:26s} {middle:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    torch.set_num_threads(1)
    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    bench("M1", m1, num_rounds)
    bench("M2", m2, num_rounds)

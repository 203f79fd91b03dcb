"""Epsilon-sharpness: corner to corner against L-BFGS-B, in gradient evaluations.

All searches run on the same network and data in the same process, in interleaved
rounds; times are given as ratios of one gradient evaluation. Run it as a script::

    python tests/benchmarks/bench_epsilon.py --rounds 3
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from problems import LOSS, problem
from torch import Tensor

from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness import EpsilonSharpness, epsilon_sharpness


def plain_gradient(risk: EmpiricalRisk) -> Tensor:
    """Return the gradient as a training loop would make it, the unit of the table."""
    total = torch.zeros(risk.layout.num_params)
    for inputs, targets in risk.batches:
        loss = LOSS(risk.model(inputs), targets) * len(targets) / risk.num_examples
        parts = torch.autograd.grad(loss, risk.parameters)
        total += torch.cat([part.reshape(-1) for part in parts])
    return total


def searches(epsilon: float) -> dict[str, Callable[[EmpiricalRisk], EpsilonSharpness]]:
    """Return the searches that are compared, by name."""

    def search(**options: object) -> Callable[[EmpiricalRisk], EpsilonSharpness]:
        def run(risk: EmpiricalRisk) -> EpsilonSharpness:
            generator = torch.Generator().manual_seed(0)
            return epsilon_sharpness(
                risk, epsilon=epsilon, generator=generator, **options
            )

        return run

    return {
        "vertex, 3 iterations": search(max_iter=3),
        "vertex, 10 iterations": search(),
        "L-BFGS-B, 10 iterations": search(method="lbfgsb"),
        "vertex, 100 columns": search(subspace_dim=100),
        "L-BFGS-B, 100 columns": search(subspace_dim=100, method="lbfgsb"),
    }


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    """Print sharpness and cost of every search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, batches = problem(options.examples, options.width, options.steps)
    risk = EmpiricalRisk(model, LOSS, batches)
    print(f"{risk.layout.num_params} parameters, {risk.num_examples} examples")
    print(f"{'search':26} {'epsilon':>8} {'phi [%]':>9} {'gradients':>9} {'time':>6}")
    for epsilon in (1e-3, 5e-4):
        runs = searches(epsilon)
        found = {name: run(risk) for name, run in runs.items()}
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                unit = seconds(lambda: plain_gradient(risk))
                ratios[name].append(seconds(lambda run=run: run(risk)) / unit)
        for name, got in found.items():
            cost = statistics.median(ratios[name])
            figures = f"{epsilon:8g} {got.value:9.2f} {got.num_grads:9d} {cost:6.1f}"
            print(f"{name:26} {figures}")


if __name__ == "__main__":
    main()

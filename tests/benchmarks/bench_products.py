"""The cost of one product, by operator and form, in gradient evaluations.

All run on the same data in the same process, in rounds of a gradient and a product;
what counts is the ratio of the shortest times. One operator is held at a time. Run it
as a script::

    python tests/benchmarks/bench_products.py --rounds 5
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from networks import NETWORKS
from torch import Tensor, nn

from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import (
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    RiskOperator,
)

ROOM = 2**34


class ClassesSecond(nn.Module):
    """Puts the axis of classes where the loss and the Fisher matrix expect it."""

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(-1, 1)


def operators_of(risk: EmpiricalRisk) -> dict[str, Callable[[], RiskOperator]]:
    """Return what is timed, by name, to be made one after the other."""
    hessian = partial(HessianOperator, risk)
    fisher = partial(FisherOperator, risk)
    covariance = partial(GradientCovarianceOperator, risk)
    newton = partial(GGNOperator, risk)
    return {
        "Hessian, graph kept": partial(hessian, memory_budget=ROOM),
        "Hessian, graph rebuilt": partial(hessian, form="rebuilt"),
        "Hessian, linearised": partial(hessian, form="linearised", memory_budget=ROOM),
        "Hessian, forward over reverse": partial(hessian, form="forward_over_reverse"),
        "Hessian, finite difference": partial(hessian, form="finite_difference"),
        "Gauss-Newton, graph kept": partial(newton, memory_budget=ROOM),
        "Gauss-Newton, rebuilt": partial(newton, memory_budget=1),
        "Fisher, graph kept": partial(fisher, memory_budget=ROOM),
        "covariance, graph kept": partial(covariance, memory_budget=ROOM),
    }


def seconds(action: Callable[[], object]) -> float:
    """Return the processor time of a call, which other work disturbs least."""
    began = time.process_time()
    action()
    return time.process_time() - began


def measure(name: str, rounds: int) -> None:
    """Print the ratios of one network, on two batches."""
    network = NETWORKS[name]
    model, inputs, targets = network.made()
    risk = EmpiricalRisk(
        nn.Sequential(model, ClassesSecond()),
        nn.CrossEntropyLoss(),
        [(inputs, targets), (inputs, targets)],
    )
    vector = torch.randn(risk.layout.num_params)
    gradient = min(seconds(risk.value_and_grad) for _ in range(3))
    print(f"{name}: {network.title}; one gradient of both {gradient:.3f} s")
    for key, make in operators_of(risk).items():
        with make() as operator:
            first = seconds(lambda o=operator: o @ vector)
            best = gradient = float("inf")
            for _ in range(rounds):
                gradient = min(gradient, seconds(risk.value_and_grad))
                best = min(best, seconds(lambda o=operator: o @ vector))
            trial = operator.trial if isinstance(operator, HessianOperator) else None
        reason = f"  ({trial.reason})" if trial and trial.reason else ""
        print(
            f"  {key:30s} {best / gradient:5.2f}   first {first / gradient:6.1f}"
            f"{reason}",
            flush=True,
        )


def main() -> None:
    """Measure all networks, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    for name in [asked.network] if asked.network else list(NETWORKS):
        measure(name, asked.rounds)


if __name__ == "__main__":
    main()

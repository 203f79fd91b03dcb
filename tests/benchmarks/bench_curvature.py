"""Top Hessian eigenvalues: ours against PyHessian and curvlinops with ``eigsh``.

All run on the same network and data in the same process, in interleaved rounds, and
times are given as ratios of a gradient evaluation. Run it as a script::

    python tests/benchmarks/bench_curvature.py --rounds 5
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from problems import LOSS, Batches, problem
from pyhessian import hessian
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator, top_eigenpairs


@dataclass(frozen=True)
class Answer:
    """Eigenvalues, best first, and the passes over the data that they took."""

    values: list[float]
    passes: float


def exact_values(model: nn.Module, batches: Batches, k: int) -> list[float]:
    """Return the top eigenvalues in double precision, by ``eigsh`` to 1e-10."""
    double = [(x.double(), y) for x, y in batches]
    copy = nn.Sequential(*model)
    before = {name: p.data for name, p in copy.named_parameters()}
    copy.double()
    parameters = list(copy.parameters())
    sizes = [p.numel() for p in parameters]
    total = sum(len(y) for _, y in double)
    graphs = [
        torch.autograd.grad(
            len(y) / total * LOSS(copy(x), y), parameters, create_graph=True
        )
        for x, y in double
    ]

    def product(vector: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(vector.reshape(-1)).split(sizes)
        parts = [g.view_as(p) for g, p in zip(given, parameters, strict=True)]
        out = torch.zeros(sum(sizes), dtype=torch.float64)
        for graph in graphs:
            terms = torch.autograd.grad(graph, parameters, parts, retain_graph=True)
            out += torch.cat([t.reshape(-1) for t in terms])
        return out.numpy()

    operator = LinearOperator((sum(sizes),) * 2, matvec=product, dtype=np.float64)
    values = eigsh(operator, k=k, which="LA", tol=1e-10, return_eigenvectors=False)
    for name, parameter in copy.named_parameters():
        parameter.data = before[name]
    return sorted(values.tolist(), reverse=True)


def ours(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run noisekit with its defaults, set-up included."""
    generator = torch.Generator().manual_seed(seed)
    with HessianOperator(model, LOSS, batches) as H:
        pairs = top_eigenpairs(H, k, generator=generator)
    return Answer(pairs.values.tolist(), pairs.num_matvecs)


class CountingLoader:
    """A list of batches that counts how often it was read."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.passes += 1
        return iter(self.batches)


def by_pyhessian(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run PyHessian with its defaults."""
    torch.manual_seed(seed)
    model.zero_grad()
    loader = CountingLoader(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = hessian(model, LOSS, dataloader=loader, cuda=False)
        values, _ = peer.eigenvalues(top_n=k)
    model.zero_grad()
    return Answer(values, loader.passes)


def by_curvlinops(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run curvlinops' operator in SciPy's ``eigsh`` at a tolerance of 1e-3."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(
        model, LOSS, parameters, batches, check_deterministic=False
    ).to_scipy()
    count = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return operator @ vector.astype(np.float32)

    counted = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
    start = np.random.default_rng(seed).standard_normal(operator.shape[0])
    values = eigsh(
        counted, k=k, which="LA", tol=1e-3, v0=start, return_eigenvectors=False
    )
    return Answer(sorted(values.tolist(), reverse=True), count)


def gradient(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run one gradient evaluation over the data, the unit of the table."""
    del k, seed
    parameters = list(model.parameters())
    for inputs, targets in batches:
        torch.autograd.grad(LOSS(model(inputs), targets), parameters)
    return Answer([], 1)


METHODS: dict[str, Callable[[nn.Module, Batches, int, int], Answer]] = {
    "gradient": gradient,
    "noisekit": ours,
    "PyHessian": by_pyhessian,
    "curvlinops + eigsh": by_curvlinops,
}


def compare(model: nn.Module, batches: Batches, k: int, rounds: int) -> None:
    """Print time, passes and largest relative error of each method."""
    exact = exact_values(model, batches, k)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    answers: dict[str, list[Answer]] = {name: [] for name in METHODS}
    for seed in range(rounds):
        for name, method in METHODS.items():
            begin = time.perf_counter()
            answers[name].append(method(model, batches, k, seed))
            seconds[name].append(time.perf_counter() - begin)
    print(f"\ntop {k}: {', '.join(f'{value:.4f}' for value in exact)}")
    print(f"{'method':20}{'gradients (spread)':>24}{'/ PyHessian':>14}", end="")
    print(f"{'passes':>8}{'worst error':>13}")
    for name, times in seconds.items():
        units = [t / u for t, u in zip(times, seconds["gradient"], strict=True)]
        ratios = [t / p for t, p in zip(times, seconds["PyHessian"], strict=True)]
        errors = [
            max(abs(a - b) / b for a, b in zip(answer.values, exact, strict=True))
            for answer in answers[name]
            if answer.values
        ]
        spread = f"({min(units):.1f}-{max(units):.1f})"
        passes = statistics.median(answer.passes for answer in answers[name])
        print(f"{name:20}{statistics.median(units):>11.1f} {spread:>12}", end="")
        print(f"{statistics.median(ratios):>14.2f}{passes:>8.0f}", end="")
        print(f"{max(errors, default=0.0):>13.1e}")


def products_to_error(model: nn.Module, batches: Batches, rounds: int) -> None:
    """Print how many products reach a relative error of the top eigenvalue."""
    (exact,) = exact_values(model, batches, 1)
    risk = EmpiricalRisk(model, LOSS, batches)
    needed: dict[float, list[int]] = {1e-2: [], 1e-3: [], 1e-4: []}
    with HessianOperator.from_risk(risk) as H:
        for seed in range(rounds):
            errors = []
            for budget in range(4, 14):
                generator = torch.Generator().manual_seed(seed)
                pairs = top_eigenpairs(
                    H, tol=1e-9, max_matvecs=budget, generator=generator
                )
                errors.append(abs(float(pairs.values[0]) - exact) / exact)
            for wanted, counts in needed.items():
                counts.append(
                    next((i for i, e in enumerate(errors, 4) if e < wanted), 99)
                )
    print("\nproducts to a relative error of the top eigenvalue, median (range)")
    for wanted, counts in needed.items():
        middle = statistics.median(counts)
        print(f"{wanted:8.0e}: {middle:.0f} ({min(counts)}-{max(counts)})")


def main() -> None:
    """Read the arguments and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    model, batches = problem(arguments.examples, arguments.width, arguments.steps)
    for k in (1, 5):
        compare(model, batches, k, arguments.rounds)
    products_to_error(model, batches, arguments.rounds)


if __name__ == "__main__":
    main()

"""Hessian eigenvalues, traces and densities: their cost beside the peers'.

All run on the same network and data in the same process, in interleaved rounds, and
times (of the processor, which other work on the machine disturbs least) are given as
ratios of a gradient evaluation. Run it as a script::

    python tests/benchmarks/bench_curvature.py --rounds 5
    python tests/benchmarks/bench_curvature.py --quick
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from eigen_peers import (
    Answer,
    by_curvlinops,
    by_eigenthings,
    by_pyhessian,
    exact_values,
    gradient,
    ours,
)
from largest_memory import largest_memory
from problems import BATCH, LOSS, Batches, problem
from torch import nn

from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import (
    HessianOperator,
    spectral_density,
    top_eigenpairs,
    trace,
)
from noisekit.sharpness import track_sharpness

METHODS: dict[str, Callable[[nn.Module, Batches, int, int], Answer]] = {
    "gradient": gradient,
    "noisekit": ours,
    "PyHessian": by_pyhessian,
    "curvlinops + eigsh": by_curvlinops,
    "eigenthings": by_eigenthings,
}


def compare(model: nn.Module, batches: Batches, k: int, rounds: int) -> None:
    """Print time, passes and largest relative error of each method."""
    exact = exact_values(model, batches, k)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    answers: dict[str, list[Answer]] = {name: [] for name in METHODS}
    for seed in range(rounds):
        for name, method in METHODS.items():
            begin = time.process_time()
            answers[name].append(method(model, batches, k, seed))
            seconds[name].append(time.process_time() - begin)
    print(f"\ntop {k}: {', '.join(f'{value:.4f}' for value in exact)}")
    print(f"{'method':20}{'gradients (spread)':>26}{'ours / this':>13}", end="")
    print(f"{'passes':>8}{'worst error':>13}")
    for name, times in seconds.items():
        units = [t / u for t, u in zip(times, seconds["gradient"], strict=True)]
        ratios = [o / t for o, t in zip(seconds["noisekit"], times, strict=True)]
        errors = [
            max(abs(a - b) / b for a, b in zip(answer.values, exact, strict=True))
            for answer in answers[name]
            if answer.values
        ]
        spread = f"({min(units):.1f}-{max(units):.1f})"
        passes = statistics.median(answer.passes for answer in answers[name])
        print(f"{name:20}{statistics.median(units):>12.1f} {spread:>13}", end="")
        print(f"{statistics.median(ratios):>13.2f}{passes:>8.1f}", end="")
        print(f"{max(errors, default=0.0):>13.1e}", flush=True)


def products_to_error(model: nn.Module, batches: Batches, rounds: int) -> None:
    """Print how many products reach a relative error of the top eigenvalue."""
    (exact,) = exact_values(model, batches, 1)
    print("\nproducts to a relative error of the top eigenvalue, median (range)")
    with HessianOperator(EmpiricalRisk(model, LOSS, batches)) as H:
        for start, label in ((None, "first an eighth"), ("random", "random start")):
            needed: dict[float, list[int]] = {1e-2: [], 1e-3: [], 1e-4: []}
            for seed in range(rounds):
                errors = []
                for budget in range(1, 16):
                    pairs = top_eigenpairs(
                        H,
                        tol=1e-9,
                        max_matvecs=budget,
                        generator=torch.Generator().manual_seed(seed),
                        start=start,
                    )
                    errors.append(abs(float(pairs.values[0]) - exact) / exact)
                    if errors[-1] < min(needed):
                        break
                for wanted, counts in needed.items():
                    reached = (i for i, e in enumerate(errors, 1) if e < wanted)
                    counts.append(next(reached, 99))
            cells = [
                f"{wanted:.0e}: {statistics.median(counts):.0f} "
                f"({min(counts)}-{max(counts)})"
                for wanted, counts in needed.items()
            ]
            print(f"{label:20}{'   '.join(cells)}", flush=True)


def unit_of(model: nn.Module, batches: Batches) -> float:
    """Return the seconds of one gradient evaluation, the median of five."""
    times = []
    for _ in range(5):
        begin = time.process_time()
        gradient(model, batches, 1, 0)
        times.append(time.process_time() - begin)
    return statistics.median(times)


def tracking(model: nn.Module, batches: Batches, visits: int) -> None:
    """Print what a visit of the tracker costs while the network is trained on."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    tracker = track_sharpness(
        model, LOSS, batches, optimizer=optimizer, generator=generator
    )
    print("\ntracking, 20 steps between visits")
    print("visit  lambda_max   error  products  of an eighth  gradients  overlap")
    for visit in range(visits):
        unit = unit_of(model, batches)
        begin = time.process_time()
        reading = tracker.update(20 * visit)
        spent = (time.process_time() - begin) / unit
        with HessianOperator(model, LOSS, batches) as H:
            tight = top_eigenpairs(H, tol=1e-5, generator=generator, start="random")
        exact = float(tight.values[0])
        error = abs(reading.lambda_max.value - exact) / exact
        overlap = "" if reading.overlap is None else f"{reading.overlap:.2f}"
        print(f"{visit:5}{exact:12.3f}{error:8.0e}{reading.num_matvecs:10}", end="")
        print(
            f"{reading.num_screening_matvecs:14}{spent:11.1f}{overlap:>9}", flush=True
        )
        for step in range(20):
            inputs, targets = batches[step % len(batches)]
            optimizer.zero_grad()
            LOSS(model(inputs[:256]), targets[:256]).backward()
            optimizer.step()
        optimizer.zero_grad()
    model.load_state_dict(before)


def traces_and_density(model: nn.Module, batches: Batches) -> None:
    """Print what traces and a density cost, and how sure they are."""
    unit = unit_of(model, batches)
    print("\ntraces and density")
    with HessianOperator(model, LOSS, batches) as H:
        for method in ("hutchinson", "hutch++", "xtrace"):
            begin = time.process_time()
            found = trace(
                H,
                num_matvecs=30,
                method=method,
                generator=torch.Generator().manual_seed(0),
            )
            spent = (time.process_time() - begin) / unit
            print(f"trace, {method:12}30 products, {spent:6.1f} gradients: {found}")
        begin = time.process_time()
        density = spectral_density(H, num_probes=2, num_steps=20)
        spent = (time.process_time() - begin) / unit
        print(
            f"density: {density.num_matvecs} products, {spent:.1f} gradients, ", end=""
        )
        print(f"{len(density.atoms)} outliers", flush=True)


def scaling(width: int, examples: int) -> None:
    """Print products, time and memory against parameters, data and ``k``."""
    print("\nscaling: parameters, examples, k; products, seconds, gradients, memory")
    print("memory: most live bytes beyond data and kept graphs, in parameter vectors")
    settings = [
        (width // 2, examples, 1),
        (width, examples, 1),
        (width, examples // 2, 1),
        (width, examples * 2, 1),
        (width, examples, 3),
        (width, examples, 10),
    ]
    for wide, count, k in settings:
        model, batches = problem(count, wide, 50)
        size = sum(p.numel() for p in model.parameters())
        unit = unit_of(model, batches)
        begin = time.process_time()
        ours(model, batches, k, 0)
        seconds = time.process_time() - begin
        with HessianOperator(model, LOSS, batches) as H:
            H @ torch.zeros(size)
            pairs, most = largest_memory(
                lambda H=H, k=k: top_eigenpairs(
                    H, k, generator=torch.Generator().manual_seed(0), start="random"
                ),
                at_least=size,
            )
        print(f"{size:10}{count:8}{k:4}{pairs.num_matvecs:5}{seconds:8.2f}", end="")
        print(f"{seconds / unit:8.1f}{most / size:8.1f}", flush=True)


def main() -> None:
    """Read the arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="small and once")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.examples = 1, 2 * BATCH
        arguments.width, arguments.steps = 64, 50
    model, batches = problem(arguments.examples, arguments.width, arguments.steps)
    for k in (1, 5):
        compare(model, batches, k, arguments.rounds)
    products_to_error(model, batches, arguments.rounds)
    tracking(model, batches, 2 if arguments.quick else 6)
    traces_and_density(model, batches)
    scaling(arguments.width // 2, arguments.examples // 2)


if __name__ == "__main__":
    main()

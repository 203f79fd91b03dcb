"""What a probe costs: interleaved rounds of plain, probed and other packages' steps.

Run as ``python tests/benchmarks/bench_probe.py [--quick] [--rounds N] [M1 M2 ...]``.
Only ratios to the plain step of the same round mean anything; medians and quartiles are
shown. Processor time of one thread is measured, which other processes disturb least.
A row that cannot be measured says why.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from networks import NETWORKS, Network
from peer_steps import PEERS, Prepared, UnavailableError

from noisekit.core.errors import CoupledExamplesError
from noisekit.integrations import attach

Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: What is measured.
        build: Makes the step.
        steps: Steps that are timed as one.
        slow: Whether a few rounds have to do.
    """

    label: str
    build: Callable[[Network], Step]
    steps: int = 1
    slow: bool = False
    ratios: list[float] = field(default_factory=list)


def prepared(network: Network) -> Prepared:
    """Return everything that one training step needs."""
    model, inputs, targets = network.made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return Prepared(model, network.loss_fn(), optimizer, inputs, targets)


def plain(network: Network) -> Step:
    """A training step without a probe."""
    return prepared(network).step


def probed(**options: object) -> Callable[[Network], Step]:
    """Return what makes a step with a probe attached."""

    def build(network: Network) -> Step:
        parts = prepared(network)
        attach(parts.model, parts.optimizer, **options)
        return parts.step

    return build


def micro_batches(network: Network) -> Step:
    """Four micro-batches, which other people's estimates of the noise take."""
    parts = prepared(network)
    pieces = zip(parts.inputs.chunk(4), parts.targets.chunk(4), strict=True)
    pairs = list(pieces)

    def step() -> None:
        parts.optimizer.zero_grad()
        for inputs, targets in pairs:
            (parts.loss_fn(parts.model(inputs), targets) / 4).backward()
        parts.optimizer.step()

    return step


def ghosts(network: Network) -> Step:
    """The batch replayed in four parts, as where examples are coupled."""
    parts = prepared(network)
    attach(
        parts.model,
        parts.optimizer,
        loss_fn=parts.loss_fn,
        estimator="ghost",
        ghost_batch=len(parts.inputs) // 4,
    )
    return parts.step


def rows() -> Iterator[Row]:
    """Yield the table's lines; the first is the unit."""
    yield Row("plain", plain)
    yield Row("noisekit, every step", probed(every=1))
    yield Row("noisekit, every 10 steps", probed(every=10), steps=10)
    yield Row("a random quarter of the rows", probed(estimator="rows"))
    yield Row("chunks, 4", probed(estimator="chunks"))
    yield Row("random signs", probed(estimator="random_signs"))
    yield Row("ghost batches, a quarter each", ghosts)
    yield Row("replace, every step", probed(exact_bits=False))
    yield Row("replace, every 10 steps", probed(exact_bits=False, every=10), steps=10)
    replaced_chunks = probed(exact_bits=False, estimator="chunks")
    yield Row("replace, chunks, 4", replaced_chunks)
    yield Row("with second moments", probed(quantities="gsnr"))
    moments = probed(exact_bits=False, quantities="gsnr")
    yield Row("replace, with second moments", moments)
    yield Row("4 micro-batches", micro_batches)
    for label, peer in PEERS.items():
        yield Row(
            label,
            lambda network, peer=peer: peer(prepared(network)),
            slow=label.startswith(("torch.func", "Cockpit")),
        )


def seconds(step: Step, count: int) -> float:
    """Processor time of one step."""
    start = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - start) / count


def built(row: Row, network: Network) -> Step | None:
    """Return the row's step, warm; print why there is none."""
    try:
        step = row.build(network)
        if not row.slow:
            seconds(step, 11)  # beyond the closure checks of the first readings
        else:
            step()
    except (UnavailableError, CoupledExamplesError) as error:
        reason = str(error).partition(";")[0]
        print(f"  {row.label:30s} not measured: {reason}", flush=True)
        return None
    return step


def bench(name: str, network: Network, rounds: int) -> None:
    """Measure and print one network's table."""
    print(f"{name}: {network.title}", flush=True)
    steps = [(row, step) for row in rows() if (step := built(row, network))]
    for number in range(rounds):
        unit = 0.0
        for row, step in steps:
            if row.slow and number >= 2:
                continue
            took = seconds(step, row.steps)
            unit = took if row.build is plain else unit
            row.ratios.append(took / unit)
    print(f"  ratio to a plain step, median [quartiles] of {rounds} rounds")
    for row, _ in steps:
        levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        ratios = torch.tensor(row.ratios, dtype=torch.float64)
        low, middle, high = ratios.quantile(levels).tolist()
        print(f"  {row.label:30s} {middle:7.2f} [{low:.2f}, {high:.2f}]", flush=True)


def main() -> None:
    """Read the arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help=", ".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.networks or NETWORKS:
        bench(name, NETWORKS[name], 3 if arguments.quick else arguments.rounds)


if __name__ == "__main__":
    main()

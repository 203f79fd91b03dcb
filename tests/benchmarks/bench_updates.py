"""What an update of a recipe's run costs beside a loop written by hand.

``python -m tests.benchmarks.bench_updates [ROUNDS]``: processor time of one thread, of
pieces of 128 updates of both loops in turn, with the evaluations that lie in them.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from noisekit.core.randomness import stream
from noisekit.train.data.datasets import load_data
from noisekit.train.models import build_model
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.environment import computing
from noisekit.train.runs.origin import start_state
from noisekit.train.runs.progress import ProgressReporter, no_progress
from noisekit.train.runs.series import SeriesMeasurements
from noisekit.train.runs.state import TrainState
from noisekit.train.runs.training import Training
from tests.train.run_specs import new_run, run_spec

PIECE = 128
CASES: dict[str, dict[str, Any]] = {
    "batch 8": {"training": {"batch_size": 8}},
    "batch 128": {"training": {"batch_size": 128}},
    "batch 8, momentum": {
        "training": {"batch_size": 8},
        "optimizer": {"momentum": 0.9},
    },
    "batch 8, evaluated every epoch": {
        "training": {"batch_size": 8},
        "evaluation": {"every": {"epochs": 1}},
    },
    "batch 8, train alone evaluated": {
        "training": {"batch_size": 8},
        "evaluation": {"every": {"epochs": 1}, "splits": ["train"]},
    },
    "batch 8 to 64, rate scaled": {
        "training": {"batch_size": 8},
        "optimizer": {"reference_batch": 8, "scaling": "linear"},
        "batch_policy": {
            "name": "growth",
            "factor": 2,
            "every": {"updates": 800},
            "max": 64,
        },
    },
}


def case(**sections: Any) -> RunSpec:
    """Return a run of the digits' small network."""
    training = {**sections.pop("training"), "stop": {"updates": 10**6}}
    return run_spec(
        data={"train": 1024, "validation": 128, "test": 256},
        model={"name": "mlp", "hidden": [64, 64]},
        training=training,
        compute={"checkpoint_updates": 10**6},
        **{"evaluation": {"every": {"updates": 10**6}}, **sections},
    )


def by_hand(spec: RunSpec) -> Iterator[None]:
    """Train as the run does, with nothing that it does not ask for."""
    data = load_data(spec.data)
    model = build_model(
        spec.model, input_shape=data.input_shape, num_classes=10, seed=spec.seed
    )
    optimizer = spec.optimizer.build(model.parameters())
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    count, place, epoch, update = spec.data.train, 0, 0, 0
    order = torch.randperm(count, generator=stream(spec.seed, "order", 0))
    size, grows = spec.training.batch_size, spec.batch_policy.name == "growth"
    every = spec.clock.updates_to(spec.clock.span(spec.evaluation.every), size)
    while True:
        if grows:
            size = min(64, 8 * 2 ** (update // 800))
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * size / 8
        if place + size > count:
            epoch, place = epoch + 1, 0
            order = torch.randperm(count, generator=stream(spec.seed, "order", epoch))
        rows = order[place : place + size]
        place += size
        optimizer.zero_grad()
        outputs = model(data.train.inputs.index_select(0, rows))
        loss = cross_entropy(outputs, data.train.targets.index_select(0, rows))
        loss.backward()
        optimizer.step()
        update += 1
        if update % every == 0:
            model.eval()
            with torch.no_grad():
                for name in spec.evaluation.splits:
                    outputs = model(parts[name].inputs)
                    loss = cross_entropy(outputs, parts[name].targets, reduction="sum")
                    wrong = (outputs.argmax(1) != parts[name].targets).sum()
                    float(loss), float(wrong)
            model.train()
        yield


def by_noisekit(spec: RunSpec, folder: Path) -> Iterator[None]:
    """Train as a recipe's run does."""
    splits = load_data(spec.data)
    data = {"train": splits.train, "validation": splits.validation}
    data["test"] = splits.test
    model = build_model(spec.model, input_shape=(64,), num_classes=10, seed=spec.seed)
    run, state = new_run(spec, folder), TrainState.start(spec, model)
    report = ProgressReporter(spec.run_id, no_progress)
    starts = start_state(spec, run, state, None)
    series = SeriesMeasurements(spec, lambda: model, data)
    with (
        run.lock(),
        computing(spec.compute),
        Training(
            spec,
            run,
            data,
            state=state,
            starts=starts,
            series=series,
            report=report,
            threads=1,
        ) as training,
    ):
        while True:
            training.advance()
            yield


def seconds(loop: Iterator[None]) -> float:
    """Return the processor time of a piece of a loop."""
    began = time.process_time()
    for _ in range(PIECE):
        next(loop)
    return time.process_time() - began


def compared(name: str, rounds: int, folder: Path) -> str:
    """Return one line: both costs, and the median and quartiles of their ratio."""
    spec = case(**{key: dict(value) for key, value in CASES[name].items()})
    ours, hand = by_noisekit(spec, folder), by_hand(spec)
    seconds(ours), seconds(hand)  # the first also set things up
    found = [(seconds(ours), seconds(hand)) for _ in range(rounds)]
    low, middle, high = statistics.quantiles((a / b for a, b in found), n=4)
    mine, theirs = (min(column) / PIECE * 1e6 for column in zip(*found, strict=True))
    ours.close()
    return (
        f"{name:32s} {mine:6.0f} {theirs:6.0f} us   "
        f"{mine / theirs:.2f}, median {middle:.2f} ({low:.2f} to {high:.2f})"
    )


def main() -> None:
    """Print a line per case."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print("shortest time of an update, ours and by hand; ratio of these; of pieces")
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(CASES):
            print(compared(name, rounds, Path(folder) / f"case{number}"), flush=True)


if __name__ == "__main__":
    main()

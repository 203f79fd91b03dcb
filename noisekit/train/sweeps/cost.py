"""What a sweep would cost, from timing a few steps of each kind of run."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from noisekit.train.data.datasets import load_data
from noisekit.train.data.section import TensorPair
from noisekit.train.models import build_model
from noisekit.train.recipes.probe_spec import ProbeSpec
from noisekit.train.recipes.recipe import Recipe
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.timeline import most_examples, updates_by_batch
from noisekit.train.runs.environment import computing
from noisekit.train.section import run_id_of

_TIMING_SECONDS = 2.0
_TIMED_EXAMPLES = 2048
"""Most examples that are timed at once; larger sets are scaled up from there."""

_OPTIMIZER_COPIES = 2
"""Most copies of the parameters that an optimizer's state holds, as Adam's does."""

_WORKER_START_SECONDS = 4.0
_ROW_BYTES = 250
_ESTIMATOR_BYTES = 56
"""Of a row, for each estimator that is read beside the reading's own."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a sweep would cost. Counts of training are upper bounds; time is a guess.

    Attributes:
        num_runs: Runs, over arms and seeds.
        updates: Optimizer steps of all runs together, if none stops early.
        gradient_evaluations: Gradients of single examples that those take.
        hessian_products: Products with the Hessian that measuring takes, about.
        disk_bytes: Size of the set of runs, about [bytes].
        seconds: Wall time, about [s].
        workers: Processes at the same time.
    """

    num_runs: int
    updates: int
    gradient_evaluations: int
    hessian_products: int
    disk_bytes: int
    seconds: float
    workers: int

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return each kind of cost and its amount, in words."""
        return (
            ("runs", f"{self.num_runs}, {self.workers} at the same time"),
            ("updates", f"at most {self.updates:,}"),
            ("gradient evaluations", f"at most {self.gradient_evaluations:,} examples"),
            ("Hessian products", f"about {self.hessian_products:,}"),
            ("disk", f"about {self.disk_bytes / 1e6:,.0f} MB"),
            ("time", f"about {duration(self.seconds)} on this machine"),
        )


@dataclass(frozen=True, slots=True)
class _Timing:
    """Seconds of one update, of one pass over all splits, of one Hessian product.

    Attributes:
        updates: Seconds of an update, by batch size: of one size or two.
        evaluation: Seconds of a pass over all splits.
        product: Seconds of a Hessian product.
        num_params: Parameters of the network.
    """

    updates: Mapping[int, float]
    evaluation: float
    product: float
    num_params: int

    def update(self, size: int) -> float:
        """Return the seconds of an update: a line through the sizes that were timed."""
        low, high = min(self.updates), max(self.updates)
        if low == high:
            return self.updates[low]
        slope = (self.updates[high] - self.updates[low]) / (high - low)
        return self.updates[low] + slope * (size - low)


def estimate_cost(recipe: Recipe, *, workers: int | None = None) -> Cost:
    """Return what ``run`` would cost here; takes about two seconds itself.

    Args:
        recipe: The experiment.
        workers: Processes at the same time; the recipe's number if left out.
    """
    specs = recipe.run_specs()
    count = max(1, recipe.compute.workers if workers is None else workers)
    count = min(count, len(specs))
    kinds = {_kind(spec): spec for spec in specs}
    budget = _TIMING_SECONDS / len(kinds)
    timings = {kind: _time_run(spec, budget) for kind, spec in kinds.items()}
    of_runs = {s.run_id: _run_seconds(s, timings[_kind(s)]) for s in specs}
    seconds = max(sum(of_runs.values()) / count, longest_chain(specs, of_runs))
    return Cost(
        num_runs=len(specs),
        updates=sum(sum(updates_by_batch(spec).values()) for spec in specs),
        gradient_evaluations=sum(map(most_examples, specs)),
        hessian_products=sum(_products(spec) for spec in specs),
        disk_bytes=sum(_disk(s, timings[_kind(s)].num_params) for s in specs),
        seconds=seconds + (_WORKER_START_SECONDS if workers != 0 else 0.0),
        workers=count,
    )


def longest_chain(specs: Sequence[RunSpec], seconds: Mapping[str, float]) -> float:
    """Return the time of the longest chain of runs that start one from the other."""
    by_id = {spec.run_id: spec for spec in specs}

    def until_done(spec: RunSpec) -> float:
        own = seconds[spec.run_id]
        if spec.start is None:
            return own
        return own + until_done(by_id[run_id_of(spec.start.arm, spec.seed)])

    return max(map(until_done, specs))


def duration(seconds: float) -> str:
    """Return a time in words, such as ``3 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _kind(spec: RunSpec) -> tuple[object, ...]:
    """Return what decides how long a step takes."""
    planned = updates_by_batch(spec)
    return (
        spec.data.model_copy(update={"split_seed": 0}),
        spec.model,
        (min(planned), max(planned)),
        spec.training.microbatch,
        spec.training.loss,
        spec.compute,
    )


def _reading_updates(probe: ProbeSpec) -> float:
    """Return what a reading costs, in updates like the one that it reads, about.

    A replay of ghost batches is a forward and a backward pass, a draw of signs the
    latter alone, which is two thirds of an update; micro-batches are there anyway.
    """
    costs = {
        "rows": probe.row_share,
        "accumulation": 0.1,
        "random_signs": 2 / 3 * probe.num_signs,
    }
    return sum(costs.get(name, 1.0) for name in probe.estimator)


def _run_seconds(spec: RunSpec, timing: _Timing) -> float:
    every = spec.probe.every
    read = _reading_updates(spec.probe) / every if every else 0.0
    training = sum(
        count * timing.update(size) for size, count in updates_by_batch(spec).items()
    )
    return (
        training * (spec.training.passes_per_update + read)
        + _num_evaluations(spec) * timing.evaluation
        + _products(spec) * timing.product
    )


def _num_evaluations(spec: RunSpec) -> int:
    clock = spec.clock
    span = clock.span(spec.evaluation.every)
    every = clock.updates_to(span, spec.training.batch_size)
    return spec.max_updates // max(1, every) + 1


def _products(spec: RunSpec) -> int:
    """Return the Hessian products of all snapshots; a gradient counts as a half."""
    gradients = sum(
        item.typical_cost()
        for snapshot in spec.snapshot_names
        for name in spec.measure.measures_at(snapshot)
        for item in spec.measure.measures(name)
    )
    return math.ceil(gradients / 2)


def _disk(spec: RunSpec, num_params: int) -> int:
    states = _OPTIMIZER_COPIES * len(spec.kept_optimizers)
    tensors = (len(spec.snapshot_names) + states) * num_params * 4
    readings = spec.max_updates // spec.probe.every if spec.probe.every else 0
    rows = readings + _num_evaluations(spec)
    beside = readings * (len(spec.probe.estimator) - 1) * _ESTIMATOR_BYTES
    outcomes = len(spec.snapshot_names) * spec.data.test * 8
    return tensors + rows * _ROW_BYTES + beside + outcomes


def _time_run(spec: RunSpec, budget: float) -> _Timing:
    data = load_data(spec.data)
    device, dtype = spec.compute.device, getattr(torch, spec.compute.dtype)
    with computing(spec.compute):
        model = build_model(
            spec.model,
            input_shape=data.input_shape,
            num_classes=data.num_classes,
            seed=spec.seed,
        ).to(device, dtype)
        parameters = list(model.parameters())

        def batch(size: int) -> tuple[Tensor, Tensor]:
            first = TensorPair(data.train.inputs[:size], data.train.targets[:size])
            pair = first.to(device, dtype)
            return pair.inputs, pair.targets

        loss_fn = spec.training.find_loss().mean

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss_fn(model(batch[0]), batch[1])

        optimizer = torch.optim.SGD(parameters, lr=0.0)
        planned = updates_by_batch(spec)
        sizes = {min(size, spec.data.train) for size in (min(planned), max(planned))}
        share = budget / 2 / len(sizes)
        updates = {
            size: _seconds(partial(_update, loss, optimizer, batch(size)), share)
            for size in sizes
        }
        part = min(_TIMED_EXAMPLES, spec.data.train)
        forward = _seconds(lambda: _forward(loss, batch(part)), budget / 4)
        product = _seconds(_product(loss, parameters, batch(part)), budget / 4)
    evaluated = spec.data.train + spec.data.validation + spec.data.test
    measured = spec.measure.num_examples or spec.data.train
    return _Timing(
        updates=updates,
        evaluation=forward * evaluated / part,
        product=product * measured / part,
        num_params=sum(parameter.numel() for parameter in parameters),
    )


def _seconds(action: Callable[[], None], budget: float) -> float:
    """Return the mean time of an action, from as many repeats as the budget allows."""
    action()  # the first one also sets things up
    started, repeats = time.perf_counter(), 0
    while repeats == 0 or time.perf_counter() - started < budget:
        action()
        repeats += 1
    return (time.perf_counter() - started) / repeats


_BatchLoss = Callable[[tuple[Tensor, Tensor]], Tensor]


def _update(
    loss: _BatchLoss, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss(batch))
    optimizer.step()
    _finish(batch[0])


def _forward(loss: _BatchLoss, batch: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        loss(batch)
    _finish(batch[0])


def _product(
    loss: _BatchLoss, parameters: list[nn.Parameter], batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    """Return what multiplies by the Hessian, with the graph kept between products."""
    gradients = torch.autograd.grad(loss(batch), parameters, create_graph=True)
    vector = [gradient.detach() for gradient in gradients]

    def product() -> None:
        torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        _finish(batch[0])

    return product


def _finish(tensor: Tensor) -> None:
    """Wait for the device, so that its work is timed and not its queue."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)

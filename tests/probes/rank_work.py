"""What every process of a distributed test does; the tests judge what comes back."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from noisekit.core import distributed
from noisekit.core.errors import NoisekitError
from noisekit.integrations import attach
from noisekit.probes import Probe, Reading

Row = dict[str, Any]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def tied() -> nn.Module:
    """A weight used twice, whose norms wait for the end of the backward pass."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model.double()


def normalised() -> nn.Module:
    """BatchNorm over a rank's own micro-batch, whose examples it couples."""
    torch.manual_seed(1)
    layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(*layers).double()


def batch(rank: int, size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return one rank's examples; other ranks and seeds have other ones."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    inputs = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (size,), generator=generator)


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def summed_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


class LengthLoss(nn.Module):
    """Over tokens, where class ``k`` stands for a sequence of ``k + 1``."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = functional.cross_entropy(outputs, targets, reduction="none")
        counts = targets + 1
        total = (counts * losses).sum()
        return total / counts.sum() if self.reduction == "mean" else total


def lengths_of(targets: Tensor) -> Tensor:
    return targets + 1


def row_of(reading: Reading) -> Row:
    """Return what a reading says, as plain values."""
    return {
        **reading.row(),
        "layers": [
            (layer.grad_sq_norm.value, layer.variance_trace.value)
            for layer in reading.layers
        ],
        "reason": reading.coverage.reason,
        "missing": dict(reading.coverage.missing),
        "examples": None
        if reading.example_sq_norms is None
        else reading.example_sq_norms.tolist(),
        "estimates": {
            name: (noise.variance_trace.value, noise.debiased_grad_sq_norm.value)
            for name in reading.estimates
            for noise in (reading.noise(name),)
            if noise is not None
        },
        "clip_factor": float(reading.clip_factor or 0.0),
    }


def trained(
    rank: int,
    sizes: Callable[[int, int], list[int]],
    *,
    build: Callable[[], nn.Module] = mlp,
    steps: int = 1,
    wrapping: dict[str, bool] | None = None,
    compiled: str = "",
    synchronise: Callable[[int, int], bool] = lambda i, last: i == last,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = loss_of,
    clip: float | None = None,
    measured_by: Callable[[Tensor, Tensor], Tensor] | None = None,
    **options: Any,
) -> tuple[Probe, nn.Module]:
    """Train with ``sizes(rank, step)`` examples per micro-batch, and a probe."""
    model = build()
    inner = torch.compile(model, backend="eager") if compiled == "inside" else model
    wrapped = DistributedDataParallel(inner, **(wrapping or {}))
    called = (
        torch.compile(wrapped, backend="eager") if compiled == "outside" else wrapped
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(called, optimizer, loss_fn=measured_by, **options)
    for step in range(steps):
        optimizer.zero_grad()
        counts = sizes(rank, step)
        for i, size in enumerate(counts):
            inputs, targets = batch(rank, size, seed=10 * step + i)
            synced = synchronise(i, len(counts) - 1)
            with nullcontext() if synced else wrapped.no_sync():
                loss = loss_fn(called(inputs), targets)
                (loss / len(counts)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return probe, model


def alike(rank: int, step: int) -> list[int]:
    return [4]


def growing(rank: int, step: int) -> list[int]:
    return [rank + 2]


def two_parts(rank: int, step: int) -> list[int]:
    return [rank + 2, 3]


def _same_training(rank: int) -> dict[str, list[Tensor]]:
    """Parameters after three steps, with and without a probe."""
    found = {}
    for probed in (True, False):
        model = mlp().float()
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if probed:
            probe = attach(wrapped, optimizer)
        for step in range(3):
            inputs, targets = batch(rank, 4, seed=step)
            optimizer.zero_grad()
            loss_of(wrapped(inputs.float()), targets).backward()
            optimizer.step()
        found["probed" if probed else "plain"] = [
            p.detach() for p in model.parameters()
        ]
    assert len(probe.readings) == 3
    return found


def _counted(rank: int) -> dict[str, Any]:
    """All-reduces that the probe asks for in six steps, of which two are read."""
    calls: list[int] = []
    plain = distributed.dist.all_reduce

    def counting(tensor: Tensor, **options: Any) -> Any:
        calls.append(tensor.dim())
        return plain(tensor, **options)

    distributed.dist.all_reduce = counting
    try:
        probe, _ = trained(rank, growing, steps=6, every=3)
    finally:
        distributed.dist.all_reduce = plain
    seen = [reading.examples_seen for reading in probe.readings]
    return {"calls": calls, "seen": seen, "total": probe.examples_seen}


def _uneven(rank: int, *, initial: bool, parts: int = 1) -> dict[str, Any]:
    """Rank ``k`` has inputs for ``k + 1`` steps, each of ``parts`` micro-batches."""
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(wrapped, optimizer)
    joined = Join([wrapped, probe.joinable], divide_by_initial_world_size=initial)
    with joined:
        for _ in range(rank + 1):
            optimizer.zero_grad()
            for i in range(parts):
                inputs, targets = batch(rank, rank + 2, seed=i)
                with nullcontext() if i == parts - 1 else wrapped.no_sync():
                    (loss_of(wrapped(inputs), targets) / parts).backward()
            optimizer.step()
    rows = [row_of(reading) for reading in probe.readings]
    return {"rows": rows, "step": probe.step, "seen": probe.examples_seen}


def _measured(rank: int) -> dict[str, Any]:
    """A measurement after a step, and a probe that goes on where this one was."""
    probe, model = trained(rank, growing, steps=2, every=2, measured_by=loss_of)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    reading = probe.measure(*batch(rank, 5, seed=77))
    kept = zip(before, model.parameters(), strict=True)
    wrapped = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    second = attach(wrapped, optimizer)
    second.load_state_dict(probe.state_dict())
    return {
        "row": row_of(reading),
        "same": all(a is None or torch.equal(a, p.grad) for a, p in kept),
        "weights": [p.detach().clone() for p in model.parameters()],
        "seen": (probe.examples_seen, second.examples_seen, second.step),
    }


def _broken_on_one_rank(rank: int) -> Row:
    """The last rank sends two forward passes into one backward pass."""
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(wrapped, optimizer)
    inputs, targets = batch(rank, 4)
    loss = loss_of(wrapped(inputs), targets)
    if rank == dist.get_world_size() - 1:
        loss = loss + loss_of(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return row_of(probe.readings[0])


def _refusals(rank: int) -> dict[str, str]:
    """What is raised, by what was tried."""
    found: dict[str, str] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except NoisekitError as error:
            found[name] = str(error)

    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    note("budget", lambda: attach(wrapped, optimizer, budget=0.03))
    nested = nn.Sequential(wrapped)
    note("nested", lambda: attach(nested, optimizer))
    with attach(model, optimizer, on_error="raise"):
        note("inner", lambda: wrapped(batch(rank, 2)[0]))
    with attach(wrapped, optimizer, on_error="raise"), wrapped.join():
        note("unjoined", lambda: wrapped(batch(rank, 2)[0]))
    synced = DistributedDataParallel(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(synced)
    own = torch.optim.SGD(synced.parameters(), lr=0.1)
    note("synced", lambda: attach(synced, own, estimator="accumulation"))
    options: dict[str, Any] = {"estimator": "norm_layers", "calibrate_every": 2}
    note("calibrated", lambda: attach(wrapped, optimizer, **options))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, sharded in (
        ("fsdp", fully_shard(mlp(), mesh=mesh)),
        ("tensor", parallelize_module(mlp(), mesh, {"0": ColwiseParallel()})),
    ):
        own = torch.optim.SGD(sharded.parameters(), lr=0.1)
        note(name, lambda m=sharded, o=own: attach(m, o))  # type: ignore[misc]
    return found


def everything(rank: int, world_size: int) -> dict[str, Any]:
    """All of one process' work, since starting processes is what takes long."""
    found: dict[str, Any] = {}

    def note(name: str, *args: Any, **options: Any) -> None:
        probe, _ = trained(rank, *args, **options)
        found[name] = [row_of(reading) for reading in probe.readings]

    note("alike", alike, steps=2)
    note("bucket_view", alike, steps=2, wrapping={"gradient_as_bucket_view": True})
    note("static_graph", alike, steps=2, wrapping={"static_graph": True})
    note("tied", alike, build=tied, wrapping={"gradient_as_bucket_view": True})
    note("growing", growing)
    note("summed", growing, loss_fn=summed_loss, loss_reduction="sum")
    note("two_parts", two_parts)
    note("two_syncs", two_parts, synchronise=lambda i, last: True)
    note("never", two_parts, synchronise=lambda i, last: False)
    note("clipped", alike, clip=1e-3)
    names = ("per_example", "accumulation", "chunks", "ranks")
    for side in ("inside", "outside"):
        note(side, alike, compiled=side, estimator="per_example")
        torch.compiler.reset()
    note("side_by_side", two_parts, estimator=names, num_chunks=2)
    note("ranks", growing, estimator=("ranks", "per_example"))
    note("coupled", growing, build=normalised)
    note("coupled_parts", two_parts, build=normalised)
    note("coupled_unevenly", lambda rank, step: [3] * (1 + rank), build=normalised)
    lengths = LengthLoss()
    counted = {"unit": "token", "tokens": lengths_of, "example_weights": lengths_of}
    note("tokens", growing, loss_fn=lengths, measured_by=lengths, **counted)
    sums = LengthLoss("sum")
    counted_sums = {"loss_fn": sums, "measured_by": sums, "loss_reduction": "sum"}
    note("summed_tokens", growing, **counted_sums, **counted)
    note("uncounted", growing, measured_by=lengths, **counted)
    note("single", lambda rank, step: [1])
    found["same_training"] = _same_training(rank)
    found["counted"] = _counted(rank)
    found["uneven"] = _uneven(rank, initial=True)
    found["uneven_active"] = _uneven(rank, initial=False)
    found["uneven_parts"] = _uneven(rank, initial=True, parts=2)
    found["measured"] = _measured(rank)
    found["broken"] = _broken_on_one_rank(rank)
    found["refusals"] = _refusals(rank)
    return copy.deepcopy(found)

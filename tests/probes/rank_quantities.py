"""What every process of the tests of quantities over ranks does."""

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from noisekit.core.errors import NoisekitError
from noisekit.core.vocabulary import QuantityName
from noisekit.integrations import attach
from noisekit.probes import Reading, hessian_weighted_noise
from noisekit.probes.step_metrics.metric_set import METRICS
from tests.probes import rank_work
from tests.probes.quantity_problems import problem

OVER_RANKS: tuple[QuantityName, ...] = (
    "norm_test",
    "gradient_diversity",
    "cabs",
    "cabs_conv_compat",
    "update_size",
    "distance_from_start",
    "gradient_cosine",
    "hessian_noise_scale",
)


def everything(rank: int, size: int) -> dict[str, Any]:
    return {
        "mean": _trained(rank, size, "mean", even=True),
        "sum": _trained(rank, size, "sum", even=False),
        "refused": {name: _refusal(name) for name in METRICS},
        "frozen": _frozen(rank),
    }


def share(rank: int, size: int, count: int, *, even: bool) -> slice:
    """The rows of one rank; where they are not even, the last has the fewest."""
    step = count // size
    if even:
        return slice(rank * step, (rank + 1) * step)
    first = count - (size - 1)  # one row for every rank but the first
    return slice(0, first) if rank == 0 else slice(first + rank - 1, first + rank)


def _trained(rank: int, size: int, reduction: str, *, even: bool) -> dict[str, Any]:
    """Two steps on the same examples as one process."""
    model, inputs, targets = problem("conv")
    inputs, targets = inputs.repeat(4, 1, 1, 1), targets.repeat(4)
    inputs = inputs + torch.linspace(0, 1, len(inputs))[:, None, None, None].double()
    rows = share(rank, size, len(inputs), even=even)
    wrapped = DistributedDataParallel(model)
    loss_fn = rank_work.loss_of if reduction == "mean" else rank_work.summed_loss
    # Ranks' gradients are averaged: of sums, that is the whole over the ranks.
    rate = 0.1 if reduction == "mean" else 0.1 * size / len(inputs)
    probe = attach(
        wrapped,
        torch.optim.SGD(model.parameters(), lr=rate),
        loss_fn=loss_fn,
        loss_reduction=reduction,  # type: ignore[arg-type]
        quantities=OVER_RANKS,
        num_chunks=3,
        hessian_every=1,
    )
    optimizer = probe._steps.optimizer
    for _ in range(2):
        optimizer.zero_grad()
        probe.loss_fn(wrapped(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    return row_of(probe.readings[-1])


def row_of(reading: Reading) -> dict[str, Any]:
    """A reading's quantities, as plain values."""
    return {
        "values": {n: q.values.tolist() for n, q in reading.quantities.items()},
        "missing": dict(reading.coverage.missing),
    }


def _refusal(name: Any) -> str:
    wrapped = DistributedDataParallel(rank_work.mlp())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    try:
        attach(
            wrapped, optimizer, loss_fn=rank_work.loss_of, quantities=(name,)
        ).detach()
    except NoisekitError as error:
        return str(error)
    return ""


def _frozen(rank: int) -> str:
    wrapped = DistributedDataParallel(rank_work.mlp())
    try:
        hessian_weighted_noise(wrapped, rank_work.loss_of, [rank_work.batch(rank, 4)])
    except NoisekitError as error:
        return str(error)
    return ""

"""Estimators other than per-example over two processes, against one in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from noisekit.integrations import attach
from tests.probes.rank_work import Row, batch, loss_of, row_of, summed_loss
from tests.processes import run_in_processes
from tests.reference import noise as reference

NUM_RANKS = 2
SIZES = (4, 6)
"""Examples of each rank's batch."""

Answers = list[dict[str, Any]]


def normalised() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def _read(
    rank: int,
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = loss_of,
    kind: type[torch.optim.Optimizer] = torch.optim.SGD,
    lr: float = 0.1,
    steps: int = 1,
    alike: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Readings of steps, and what the last one started from.

    Args:
        rank: Whose data, unless they are ``alike``.
        loss_fn: Called through the probe.
        kind: Of the optimizer.
        lr: Its learning rate.
        steps: How many.
        alike: Whether every rank has the data of the first.
        **options: Of ``attach``.
    """
    model = normalised()
    wrapped = DistributedDataParallel(model)
    optimizer = kind(model.parameters(), lr=lr)
    probe = attach(wrapped, optimizer, loss_fn=loss_fn, **options)
    for _ in range(steps):
        weights = [p.detach().clone() for p in model.parameters()]
        moments = [
            optimizer.state[p]["exp_avg_sq"].clone()
            for p in model.parameters()
            if p in optimizer.state
        ]
        optimizer.zero_grad()
        own = 0 if alike else rank
        inputs, targets = batch(own, SIZES[own])
        probe.loss_fn(wrapped(inputs), targets).backward()
        optimizer.step()
    rows = [row_of(reading) for reading in probe.readings]
    return {"rows": rows, "weights": weights, "moments": moments}


def _work(rank: int, world_size: int) -> dict[str, Any]:
    names = ("chunks", "rows", "norm_layers")
    two_steps: dict[str, Any] = {"kind": torch.optim.Adam, "steps": 2}
    return {
        "parts": _read(rank, estimator=names, num_chunks=2, row_share=0.5),
        "summed": _read(
            rank,
            estimator=names,
            num_chunks=2,
            row_share=0.5,
            loss_fn=summed_loss,
            loss_reduction="sum",
        ),
        "ghost": _read(rank, estimator="ghost", ghost_batch=2),
        "ghost_summed": _read(
            rank,
            estimator="ghost",
            ghost_batch=2,
            loss_fn=summed_loss,
            loss_reduction="sum",
        ),
        "preconditioned": _read(
            rank, estimator=("per_example", "preconditioned"), **two_steps
        ),
        "signs": _read(rank, estimator="random_signs", num_signs=2),
        "alike": _read(rank, estimator="random_signs", alike=True, lr=0.0, steps=8),
    }


@pytest.fixture(scope="module")
def answers() -> Answers:
    return run_in_processes(_work, NUM_RANKS)


def gradients(weights: list[Tensor] | None = None) -> list[dict[str, Tensor]]:
    """By rank, the gradient of each of its examples' own losses."""
    found = []
    for rank, size in enumerate(SIZES):
        model = normalised()
        for parameter, value in zip(model.parameters(), weights or [], strict=False):
            parameter.data.copy_(value)
        inputs, targets = batch(rank, size)
        found.append(
            reference.example_gradients(
                model, functional.cross_entropy, inputs, targets
            )
        )
    return found


def flat(rows: dict[str, Tensor], part: str = "") -> Tensor:
    return torch.cat([g.flatten(1) for name, g in rows.items() if part in name], 1)


def example_weights(*, summed: bool) -> list[Tensor]:
    """By rank; means of ranks weigh the same, examples of sums do."""
    return [
        torch.full(
            (size,), 1 / sum(SIZES) if summed else 1 / (NUM_RANKS * size)
        ).double()
        for size in SIZES
    ]


def estimates(answers: Answers, name: str, estimator: str) -> tuple[float, float]:
    """Trace and squared norm, on which the ranks agree."""
    found = [answer[name]["rows"][-1]["estimates"][estimator] for answer in answers]
    assert found[0] == found[1]
    pair: tuple[float, float] = found[0]
    return pair


def solved(sum_sq: float, norm: float, weight_sq: float) -> tuple[float, float]:
    """``tr Σ`` and ``|G|²`` from means ``A (|G|² + tr)`` and ``|G|² + A tr``."""
    trace = (sum_sq / weight_sq - norm) / (1 - weight_sq)
    return trace, norm - weight_sq * trace


@pytest.mark.parametrize("name", ["parts", "summed"])
def test_chunks_of_all_ranks_are_units(answers: Answers, name: str) -> None:
    """Two of each rank, of 2 and of 3 examples.

    Catches: chunks of one size supposed; ranks that weigh the same in a sum.
    """
    weights, means, sizes = [], [], []
    shares = example_weights(summed=name == "summed")
    for rows, share in zip(gradients(), shares, strict=True):
        for part, own in zip(flat(rows).chunk(2), share.chunk(2), strict=True):
            means.append(part.mean(0))
            weights.append(float(own.sum()))
            sizes.append(float(len(part)))
    expected = reference.unit_noise(
        torch.stack(means),
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(sizes, dtype=torch.float64),
    )
    assert estimates(answers, name, "chunks") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["parts", "summed"])
def test_rows_stand_for_their_own_rank_s_examples(answers: Answers, name: str) -> None:
    """Half of either rank's; the norm of the mean is that of all examples.

    Catches: one factor for all ranks' rows; the rows' own mean gradient.
    """
    sum_sq, weight_sq, mean = 0.0, 0.0, torch.zeros(())
    shares = example_weights(summed=name == "summed")
    for rows, share in zip(gradients(), shares, strict=True):
        own, n = flat(rows), len(share)
        drawn = torch.Generator().manual_seed(0)
        chosen = torch.randperm(n, generator=drawn)[: n // 2]
        sum_sq += float(share[0] ** 2 * own[chosen].square().sum()) * n / (n // 2)
        weight_sq += float(share.square().sum())
        mean = mean + share @ own
    expected = solved(sum_sq, float(mean.square().sum()), weight_sq)
    assert estimates(answers, name, "rows") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["parts", "summed"])
def test_normalisation_layers_of_all_ranks(answers: Answers, name: str) -> None:
    """Catches: a part's noise set against the whole's reduced gradient."""
    rows = torch.cat([flat(rows, "1.") for rows in gradients()])
    weights = torch.cat(example_weights(summed=name == "summed"))
    expected = reference.unit_noise(rows, weights)
    found = estimates(answers, name, "norm_layers")
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["ghost", "ghost_summed"])
def test_ghosts_are_averaged_over_ranks(answers: Answers, name: str) -> None:
    """Each rank's replays have a mean of their own: 2 and 3 ghosts of 2 examples.

    Catches: norms of two ranks' means added as if they were one mean's parts;
    weights by size, which replays do not have.
    """
    sum_sq, norm, weight_sq = 0.0, 0.0, 0.0
    for rows in gradients():
        ghosts = torch.stack([part.mean(0) for part in flat(rows).split(2)])
        count = len(ghosts)
        sum_sq += float(ghosts.square().sum()) / count**2 / NUM_RANKS
        norm += float(ghosts.mean(0).square().sum()) / NUM_RANKS
        weight_sq += 1 / count / NUM_RANKS
    trace, expected_norm = solved(sum_sq, norm, weight_sq)
    found = estimates(answers, name, "ghost")
    assert found == pytest.approx((2 * trace, expected_norm), rel=1e-6)


def test_preconditioned_noise_of_all_ranks(answers: Answers) -> None:
    """Catches: the rank's own preconditioned gradient; second moments that moved on."""
    answer = answers[0]["preconditioned"]
    rows = torch.cat([flat(rows) for rows in gradients(answer["weights"])])
    moment = torch.cat([m.flatten() for m in answer["moments"]])
    scale = 1 / ((moment / (1 - 0.999)).sqrt() + 1e-8)
    weights = torch.cat(example_weights(summed=False))
    expected = reference.unit_noise(scale * rows, weights)
    found = estimates(answers, "preconditioned", "preconditioned")
    assert found == pytest.approx(expected, rel=1e-5)


def signed_sq_norms(rows: Tensor) -> Tensor:
    """``|mean of s_i g_i|²`` for all signs, of which the first is positive."""
    count = len(rows)
    signs = torch.tensor(
        [(1, *s) for s in itertools.product((1, -1), repeat=count - 1)]
    )
    return (signs.double() @ rows / count).square().sum(1)


def test_signs_are_counted_by_rank(answers: Answers) -> None:
    """The sum is one of those that some signs give, averaged over two draws.

    Catches: cross terms of ranks, which no rank knows; a sum where a mean is meant.
    """
    first, second = (signed_sq_norms(flat(rows)) for rows in gradients())
    trace, norm = estimates(answers, "signs", "random_signs")
    weights = torch.cat(example_weights(summed=False))
    weight_sq = float(weights.square().sum())
    mean = weights @ torch.cat([flat(rows) for rows in gradients()])
    sum_sq = weight_sq * (trace * (1 - weight_sq) + float(mean.square().sum()))
    # Two draws of each rank: every pair of two draws' means.
    means = [(v[:, None] + v[None, :]).flatten() / 2 for v in (first, second)]
    possible = (means[0][:, None] + means[1][None, :]).flatten() / NUM_RANKS**2
    assert float((possible / sum_sq - 1).abs().min()) < 1e-7
    assert norm == pytest.approx(float(mean.square().sum()) - weight_sq * trace)


def test_ranks_draw_signs_of_their_own(answers: Answers) -> None:
    """On the same batch, the ranks' signed sums differ.

    Equal signs would leave the mean right, and its error larger than it says: what
    the signs of two ranks bring would not average out.

    Catches: one seed for all ranks.
    """
    steps: list[Row] = answers[0]["alike"]["rows"]
    equal = signed_sq_norms(flat(gradients()[0])) / NUM_RANKS
    weight_sq = 1 / (NUM_RANKS * SIZES[0])
    differ = 0
    for step in steps:
        trace, _ = step["estimates"]["random_signs"]
        found = weight_sq * (trace * (1 - weight_sq) + step["grad_sq_norm"])
        differ += int(float((equal / found - 1).abs().min()) > 1e-6)
    assert differ > len(steps) / 2

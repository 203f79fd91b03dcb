"""Sums and gathers over processes, and which processes a model belongs to."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from noisekit.core.distributed import (
    Ranks,
    gather_over_ranks,
    ranks_of,
    sum_over_ranks,
)
from noisekit.core.errors import UsageError
from tests.processes import run_in_processes


def _work(rank: int, world_size: int) -> dict[str, Any]:
    wrapped = DistributedDataParallel(nn.Linear(2, 2))
    ranks = ranks_of(wrapped)
    own = torch.tensor([[float(rank + 1), 1.0], [0.0, 2.0]]).t()  # not contiguous
    total, rows = sum_over_ranks(own, ranks), gather_over_ranks(own, ranks)
    first = dist.new_group([0])
    refusal = ""
    try:
        alone = ranks_of(first).alone
    except UsageError as error:
        alone, refusal = None, str(error)
    return {
        "ranks": (ranks.size, ranks.rank, ranks.alone),
        "of_group": ranks_of(dist.group.WORLD).size,
        "of_plain_model": ranks_of(wrapped.module).alone,
        "own": own,
        "total": total,
        "rows": rows,
        "group_of_one": alone,
        "refusal": refusal,
    }


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return run_in_processes(_work, 2)


def test_sum_is_over_all_and_leaves_the_own_part(answers: list[dict[str, Any]]) -> None:
    """Catches: an all-reduce in place, which changes the caller's statistics."""
    for rank, answer in enumerate(answers):
        assert answer["total"].tolist() == [[3.0, 0.0], [2.0, 4.0]]
        assert answer["own"].tolist() == [[rank + 1.0, 0.0], [1.0, 2.0]]


def test_gather_keeps_the_order_of_the_ranks(answers: list[dict[str, Any]]) -> None:
    """Catches: rows in order of arrival; a transposed layout taken for a plain one."""
    for answer in answers:
        assert answer["rows"].shape == (2, 2, 2)
        for rank in range(2):
            assert torch.equal(answer["rows"][rank], answers[rank]["own"])


def test_ranks_are_those_of_the_wrapper(answers: list[dict[str, Any]]) -> None:
    """A model that is not wrapped is alone even where a default group exists.

    Catches: a sum over ranks that train different models.
    """
    for rank, answer in enumerate(answers):
        assert answer["ranks"] == (2, rank, False)
        assert answer["of_group"] == 2
        assert answer["of_plain_model"]


def test_group_of_somebody_else_is_refused(answers: list[dict[str, Any]]) -> None:
    """Catches: a process that waits for a group that it is not in."""
    assert answers[0]["group_of_one"] is True
    assert answers[1]["refusal"] == (
        "process_group needs a group that this process belongs to, got one that rank 1 "
        "is not in; call this on the group's ranks only."
    )


def test_alone_is_the_identity() -> None:
    """Catches: a group asked for where none was made."""
    tensor = torch.arange(3.0)
    for source in (None, nn.Linear(1, 1)):
        ranks = ranks_of(source)
        assert ranks == Ranks()
        assert ranks.alone
        assert sum_over_ranks(tensor, ranks) is tensor
        assert torch.equal(gather_over_ranks(tensor, ranks), tensor[None])

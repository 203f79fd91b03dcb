"""Which examples each update sees."""

import torch

from noisekit.core.batch_order import BatchOrder
from noisekit.core.randomness import stream


def order(seed: int = 0) -> BatchOrder:
    return BatchOrder(seed, num_examples=100, device="cpu")


def seen(batches: BatchOrder, begin: int, *counts: int) -> list[int]:
    parts = []
    for count in counts:
        parts.append(batches.indices(begin, count))
        begin += count
    listed: list[int] = torch.cat(parts).tolist()
    return listed


def test_a_pass_sees_every_example_once() -> None:
    """Catches: sampling with replacement; passes of other lengths."""
    batches = order()
    sizes = [16] * 6 + [4]
    assert sorted(seen(batches, 0, *sizes)) == list(range(100))
    assert sorted(seen(batches, 100, *sizes)) == list(range(100))


def test_a_stretch_is_what_the_named_permutations_say() -> None:
    """Each pass is the permutation of its own stream, whatever the batch size.

    Catches: a stream that depends on the batch size, which would unpair the arms and
    change the bits of recorded runs.
    """
    wanted = torch.cat(
        [torch.randperm(100, generator=stream(7, "order", epoch)) for epoch in (0, 1)]
    ).tolist()
    assert seen(order(7), 0, *[10] * 20) == wanted
    assert seen(order(7), 0, *[50] * 4) == wanted
    assert seen(order(7), 0, 30, 70, 1, 99) == wanted


def test_a_stretch_runs_on_into_the_next_pass() -> None:
    """Also over several passes; the next stretch goes on where it ended.

    Catches: a batch cut at the end of a pass; a cursor that starts anew there.
    """
    wanted = seen(order(), 0, *[100] * 4)
    assert seen(order(), 90, 16) == wanted[90:106]
    assert seen(order(), 90, 16, 16) == wanted[90:122]
    assert seen(order(), 50, 230) == wanted[50:280]


def test_passes_and_seeds_differ() -> None:
    """Catches: one permutation for all passes, or for all seeds."""
    batches = order()
    assert seen(batches, 0, 100) != seen(batches, 100, 100)
    assert seen(batches, 0, 100) != seen(order(seed=1), 0, 100)


def test_any_place_can_be_asked_for_first() -> None:
    """Catches: a resumed run that starts over with the first pass's order."""
    straight = order()
    wanted = [straight.indices(cursor, 16).tolist() for cursor in range(0, 400, 16)]
    assert order().indices(272, 16).tolist() == wanted[17]
    assert straight.indices(16, 16).tolist() == wanted[1]

"""Which examples each update sees."""

import torch

from noisekit.train.data.batch_order import BatchOrder
from tests.train.run_specs import run_spec


def order(batch_size: int, *, seed: int = 0, drop_last: bool = False) -> BatchOrder:
    spec = run_spec(
        seed=seed,
        data={"train": 100},
        training={
            "batch_size": batch_size,
            "drop_last": drop_last,
            "allow_ragged": not drop_last,
        },
    )
    return BatchOrder(spec, num_examples=100, device="cpu")


def epoch_of(batches: BatchOrder, first: int, count: int) -> list[int]:
    parts = [batches.indices(update) for update in range(first, first + count)]
    listed: list[int] = torch.cat(parts).tolist()
    return listed


def test_an_epoch_sees_every_example_once() -> None:
    """Catches: sampling with replacement; a ragged last batch left out unasked."""
    batches = order(16)
    assert sorted(epoch_of(batches, 0, 7)) == list(range(100))
    assert len(batches.indices(6)) == 4
    assert sorted(epoch_of(batches, 7, 7)) == list(range(100))


def test_dropping_the_last_batch_starts_the_next_epoch() -> None:
    """Catches: epochs counted with the batch that was dropped."""
    batches = order(16, drop_last=True)
    assert len(set(epoch_of(batches, 0, 6))) == 96
    assert len(set(epoch_of(batches, 6, 6))) == 96


def test_arms_of_one_seed_have_the_same_order() -> None:
    """Small batches cut the same permutations that large ones do.

    Catches: a stream that depends on the batch size, which would unpair the arms.
    """
    small, large = order(10), order(50)
    assert epoch_of(small, 0, 10) == epoch_of(large, 0, 2)
    assert epoch_of(small, 10, 10) == epoch_of(large, 2, 2)


def test_epochs_and_seeds_differ() -> None:
    """Catches: one permutation for all epochs, or for all seeds."""
    batches = order(50)
    assert epoch_of(batches, 0, 2) != epoch_of(batches, 2, 2)
    assert epoch_of(batches, 0, 2) != epoch_of(order(50, seed=1), 0, 2)


def test_any_update_can_be_asked_for_first() -> None:
    """Catches: a resumed run that starts over with the first epoch's order."""
    straight = order(16)
    wanted = [straight.indices(update).tolist() for update in range(20)]
    assert order(16).indices(17).tolist() == wanted[17]

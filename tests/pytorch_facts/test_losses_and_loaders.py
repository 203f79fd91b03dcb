"""What losses and loaders do, as far as an empirical risk rests on it."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
CLASSES = torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize(("reduction", "ratio"), [("mean", 1.0), ("sum", 2.0)])
def test_a_duplicated_batch_tells_means_from_sums(reduction: str, ratio: float) -> None:
    """So a loss of anybody's is found out without looking into it."""
    loss = nn.CrossEntropyLoss(reduction=reduction)
    once = float(loss(LOGITS, CLASSES))
    twice = float(loss(LOGITS.repeat(2, 1), CLASSES.repeat(2)))
    assert twice / once == pytest.approx(ratio)


IGNORING = torch.tensor([0, -100, 1, 2])
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 5.0]).double()


def mean_of_halves(loss: nn.Module, targets: Tensor) -> float:
    halves = [loss(LOGITS[:2], targets[:2]), loss(LOGITS[2:], targets[2:])]
    return float(torch.stack(halves).mean())


@pytest.mark.parametrize(
    ("loss", "targets", "counts"),
    [
        (nn.CrossEntropyLoss(), IGNORING, [1.0, 2.0]),
        (nn.CrossEntropyLoss(CLASS_WEIGHTS), CLASSES, [6.0, 7.0]),
    ],
    ids=["ignored targets", "class weights"],
)
def test_a_split_batch_shows_what_a_mean_divides_by(
    loss: nn.Module, targets: Tensor, counts: list[float]
) -> None:
    """A duplicated one does not: the ratio is 1 whatever the divisor counts."""
    whole = float(loss(LOGITS, targets))
    doubled = float(loss(LOGITS.repeat(2, 1), targets.repeat(2)))
    assert doubled == pytest.approx(whole)
    assert mean_of_halves(loss, targets) != pytest.approx(whole, rel=1e-3)
    halves = [
        float(loss(LOGITS[:2], targets[:2])),
        float(loss(LOGITS[2:], targets[2:])),
    ]
    weighted = sum(c * h for c, h in zip(counts, halves, strict=True)) / sum(counts)
    assert weighted == pytest.approx(whole)
    plain = nn.CrossEntropyLoss()
    assert mean_of_halves(plain, CLASSES) == pytest.approx(
        float(plain(LOGITS, CLASSES))
    )


def loader(*, shuffle: bool, generator: torch.Generator | None = None) -> DataLoader:
    data = TensorDataset(torch.arange(8.0))
    return DataLoader(data, batch_size=4, shuffle=shuffle, generator=generator)


@pytest.mark.parametrize("shuffle", [False, True])
def test_iterating_moves_the_loader_s_generator(shuffle: bool) -> None:
    """And leaves the global one. So a measurement gives it back."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state(), torch.get_rng_state()
    list(loader(shuffle=shuffle, generator=generator))
    assert not torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("shuffle", [False, True])
def test_without_one_iterating_moves_the_global_generator(shuffle: bool) -> None:
    """Also where nothing is shuffled: a base seed for workers is drawn."""
    before = torch.get_rng_state()
    list(loader(shuffle=shuffle))
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_shuffling_loader_has_other_batches_each_time() -> None:
    """So batches are kept: an operator's products must be of one matrix."""
    shuffling = loader(shuffle=True, generator=torch.Generator().manual_seed(0))
    first, second = ([batch[0] for batch in shuffling] for _ in range(2))
    assert not torch.equal(torch.cat(first), torch.cat(second))

"""Freezing data, and reading again what is too large to freeze."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from noisekit.core.batches import count_examples, take_examples
from noisekit.core.data import HeldBatches, freeze
from noisekit.core.errors import DataChangedError, UsageError
from noisekit.core.risk import EmpiricalRisk
from tests.cases import RAGGED, mlp, seeded

LOSS = nn.CrossEntropyLoss()
INPUTS = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double()
DATA = TensorDataset(INPUTS, torch.arange(10) % 3)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Adds fresh noise each time an example is read."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index] + torch.randn(4), torch.tensor(index % 3)


class Drifting:
    """Gives other data on each pass, whatever the random state."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield INPUTS + self.passes, torch.arange(10) % 3


def test_shuffling_loader_is_the_same_data_on_each_pass() -> None:
    """Catches: an operator that changes between two products."""
    frozen = freeze(DataLoader(DATA, batch_size=4, shuffle=True))
    first = [x.clone() for x, _ in frozen]
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, frozen, strict=True))
    assert frozen.num_examples == 10
    assert len(frozen) == 3


def test_num_examples_cuts_the_last_batch() -> None:
    """Catches: stopping at a batch's border, with more or fewer than asked."""
    frozen = freeze(DataLoader(DATA, batch_size=4), num_examples=6)
    assert [len(y) for _, y in frozen] == [4, 2]
    assert torch.equal(torch.cat([x for x, _ in frozen]), INPUTS[:6])


def test_loader_that_fills_one_buffer_again_is_copied() -> None:
    """Catches: keeping references, which gives the last batch many times."""

    def reusing() -> Iterator[tuple[Tensor, Tensor]]:
        buffer = torch.empty(2, 4, dtype=torch.float64)
        for rows in INPUTS.split(2):
            yield buffer.copy_(rows), torch.zeros(2, dtype=torch.long)

    assert torch.equal(torch.cat([x for x, _ in freeze(reusing())]), INPUTS)


def test_slices_are_frozen_too() -> None:
    frozen = freeze(RAGGED)
    assert isinstance(frozen[:2], HeldBatches)
    assert frozen[:2].num_examples == 8
    assert torch.equal(frozen[1][0], RAGGED[1][0])


def test_freeze_refuses_what_is_not_there() -> None:
    loader = DataLoader(DATA, batch_size=4)
    with pytest.raises(UsageError, match="needs 11 examples, got a loader of 10"):
        freeze(loader, num_examples=11)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        freeze(loader, num_examples=0)
    with pytest.raises(UsageError, match="memory_budget=100 bytes, got more after 0"):
        freeze(loader, memory_budget=100)


def test_hash_is_of_the_examples_not_of_their_order() -> None:
    """Catches: calling a shuffled or differently batched data set another one."""
    hashes = {
        freeze(DataLoader(DATA, batch_size=size, shuffle=shuffle)).data_hash()
        for size, shuffle in ((4, False), (4, True), (3, True))
    }
    assert len(hashes) == 1
    changed = INPUTS.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], changed.new_tensor(9.0))
    other = freeze(DataLoader(TensorDataset(changed, DATA.tensors[1]), batch_size=4))
    assert other.data_hash() not in hashes


def test_hash_tells_pairings_apart() -> None:
    """Catches: hashing inputs and targets separately."""
    swapped = TensorDataset(INPUTS, DATA.tensors[1].flip(0))
    assert (
        freeze(DataLoader(swapped)).data_hash() != freeze(DataLoader(DATA)).data_hash()
    )


@pytest.mark.parametrize("shuffle", [False, True])
def test_data_beyond_the_budget_give_the_same_risk(shuffle: bool) -> None:
    """Catches: weights by the position of a batch, where shuffling regroups them."""
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weights)
    loader = DataLoader(DATA, batch_size=4, shuffle=shuffle)
    held = EmpiricalRisk(seeded(mlp)(), loss, loader)
    streamed = EmpiricalRisk(seeded(mlp)(), loss, loader, memory_budget=100)
    assert not isinstance(streamed.batches, HeldBatches)
    assert streamed.num_examples == 10
    assert streamed.num_batches == 3
    assert streamed.data_hash == held.data_hash
    for _ in range(2):
        assert streamed.value() == pytest.approx(held.value(), rel=1e-12)


def test_augmentation_is_refused_where_data_are_read_again() -> None:
    """Catches: an operator that differs from product to product."""
    torch.manual_seed(0)
    with pytest.raises(DataChangedError, match=r"same data on each pass.*nk\.freeze"):
        EmpiricalRisk(seeded(mlp)(), LOSS, Drifting(), memory_budget=100).value()


def test_augmentation_is_drawn_once_where_data_are_held() -> None:
    loader = DataLoader(Augmented(), batch_size=4)
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, loader)
    assert risk.value() == risk.value()


def test_shuffling_is_refused_where_the_grouping_matters() -> None:
    """With ``bn="batch"`` another grouping is another function."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()

    class Regrouping:
        passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.passes += 1
            order = torch.arange(10).roll(self.passes)
            for rows in order.split(5):
                yield INPUTS[rows], DATA.tensors[1][rows]

    with pytest.raises(DataChangedError, match="same data on each pass"):
        EmpiricalRisk(model, LOSS, Regrouping(), bn="batch", memory_budget=100).value()


def test_iterator_beyond_the_budget_is_refused() -> None:
    with pytest.raises(DataChangedError, match=r"an iterator .*can be read once"):
        EmpiricalRisk(seeded(mlp)(), LOSS, iter(DataLoader(DATA)), memory_budget=100)


def test_examples_are_counted_and_taken_along_the_right_axis() -> None:
    """Time-first, flattened and nested batches.

    Catches: taking time steps or tokens for examples.
    """
    time_first = (torch.arange(12.0).view(3, 4), torch.arange(4))
    assert count_examples(time_first) == 4
    inputs, targets = take_examples(time_first, torch.tensor([2, 0]))
    assert inputs.tolist() == [[2, 0], [6, 4], [10, 8]]
    assert targets.tolist() == [2, 0]
    flattened = (torch.zeros(2, 3), torch.arange(6))
    assert count_examples(flattened) == 2
    assert take_examples(flattened, torch.tensor([1]))[1].tolist() == [3, 4, 5]
    nested = ({"a": torch.arange(3), "scale": torch.tensor(2.0)}, None)
    assert count_examples(nested) == 3
    assert take_examples(nested, torch.tensor([1]))[0]["a"].tolist() == [1]

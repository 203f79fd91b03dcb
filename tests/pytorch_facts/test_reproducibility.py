"""What equal bits of two runs depend on, as far as a run's recipe states it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads_given_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_is_part_of_the_bits() -> None:
    """Sums are cut into as many parts as there are threads.

    So the number is a field of the recipe, and checked when a run is gone on with.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1_000_003, generator=generator).square()
    means = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        means.append(float(values.mean()))
    assert means[0] == means[2]
    assert means[0] != means[1]
    assert means[0] == pytest.approx(means[1], rel=1e-5)

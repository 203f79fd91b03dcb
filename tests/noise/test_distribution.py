"""The streaming histogram, against sorting all values."""

import math

import pytest
import torch

from noisekit.core.errors import UsageError
from noisekit.noise import LogHistogram


def lognormal(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator).mul(2).exp()


def test_quantiles_are_right_up_to_one_bin() -> None:
    """Catches: an edge off by one bin, a quantile of the bins instead of values."""
    values = lognormal(5000, 0)
    histogram = LogHistogram.empty(low=1e-6, high=1e6, num_bins=480)
    for part in values.split(300):
        histogram = histogram.add(part)
    for share in (0.01, 0.25, 0.5, 0.9, 0.999):
        truth = float(torch.quantile(values, share, interpolation="lower"))
        ratio = histogram.quantile(share) / truth
        assert 1 / histogram.bin_ratio <= ratio <= histogram.bin_ratio


def test_every_value_is_counted_in_its_bin() -> None:
    histogram = LogHistogram.empty(low=1.0, high=1000.0, num_bins=3)
    histogram = histogram.add(torch.tensor([0.0, 0.5, 2.0, 20.0, 30.0, 200.0, 5000.0]))
    assert histogram.counts.tolist() == [2, 1, 2, 1, 1]
    assert histogram.edges.tolist() == pytest.approx([1.0, 10.0, 100.0, 1000.0])


def test_merging_is_counting_together() -> None:
    """Catches: averages of quantiles, the usual way to merge them wrongly."""
    a, b = lognormal(100, 1), lognormal(400, 2)
    empty = LogHistogram.empty()
    together = empty.add(torch.cat([a, b]))
    assert torch.equal(empty.add(a).merge(empty.add(b)).counts, together.counts)


def test_what_is_no_norm_is_counted_apart() -> None:
    """Catches: NaN cast to an index, which corrupts some other bin."""
    bad = torch.tensor([math.nan, math.inf, -1.0, 2.0])
    histogram = LogHistogram.empty().add(bad)
    assert int(histogram.num_invalid) == 3
    assert int(histogram.counts.sum()) == 1


def test_ends_and_nothing() -> None:
    empty = LogHistogram.empty(low=1.0, high=2.0, num_bins=4)
    assert math.isnan(empty.quantile(0.5))
    assert empty.add(torch.zeros(3)).quantile(0.5) == 0.0
    assert empty.add(torch.full((3,), 9.0)).quantile(0.5) == math.inf


def test_adding_does_not_synchronize() -> None:
    """On the meta device every read of a value raises."""
    histogram = LogHistogram.empty(device="meta")
    assert histogram.add(torch.ones(8, device="meta")).counts.device.type == "meta"


def test_bad_input_is_named() -> None:
    with pytest.raises(UsageError, match="0 < low < high"):
        LogHistogram.empty(low=0.0)
    with pytest.raises(UsageError, match=r"share in \[0, 1\], got 2"):
        LogHistogram.empty().quantile(2)
    with pytest.raises(UsageError, match="same bins"):
        LogHistogram.empty().merge(LogHistogram.empty(num_bins=3))


def test_printed_it_is_a_line() -> None:
    """Catches: every bin on the screen."""
    histogram = LogHistogram.empty().add(torch.tensor([1.0, 2.0, 3.0, math.nan]))
    middle = histogram.quantile(0.5)
    assert str(histogram).startswith(f"3 values, median {middle:.3g}, nine in ten from")
    assert str(histogram).endswith("; 1 invalid")
    assert "counts" not in repr(histogram)

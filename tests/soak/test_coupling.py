"""Random models with and without a planted coupling of their examples."""

import collections

import pytest
import torch

from tests.probes import planted

NUM_PER_KIND = 50


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_planted_couplings_are_found_and_others_read_exactly() -> None:
    """Fifty random models for each of ten kinds of coupling, and as many without.

    Catches: a share of misses or of false alarms that a few models do not show.
    """
    missed: collections.Counter[str] = collections.Counter()
    for kind in planted.COUPLINGS:
        for seed in range(NUM_PER_KIND):
            reading, *_ = planted.reading_of(seed, kind)
            missed[kind] += reading.coverage.complete
    refused, wrong = [], []
    num_without = NUM_PER_KIND * len(planted.COUPLINGS)
    for seed in range(num_without):
        reading, model, inputs, targets = planted.reading_of(seed, None)
        if reading.coverage.reason is not None or reading.example_sq_norms is None:
            refused.append(seed)
            continue
        expected = planted.losses_apart(model, inputs, targets)
        if not torch.allclose(reading.example_sq_norms, expected, rtol=1e-7, atol=1e-9):
            wrong.append(seed)
    print(f"{num_without} with a coupling: missed {dict(+missed)}")
    print(f"{num_without} without: refused {refused}, wrong {wrong}")
    assert not +missed
    assert not refused
    assert not wrong

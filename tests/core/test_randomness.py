"""Named random streams."""

import subprocess
import sys

import torch

from noisekit.core.randomness import stream, stream_seed


def test_seed_of_a_name_is_fixed_for_ever() -> None:
    """Old runs must be repeatable: another number breaks them.

    Catches: Python's ``hash``, which differs from process to process.
    """
    assert stream_seed(0, "init") == 1519069808562059438


def test_other_processes_agree() -> None:
    code = "from noisekit.core.randomness import *; print(stream_seed(3, 'data', 7))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(printed) == stream_seed(3, "data", 7)


def test_names_and_seeds_make_different_streams() -> None:
    """Catches: names glued together, so that ("a", "bc") is ("ab", "c")."""
    seeds = {
        stream_seed(0),
        stream_seed(1),
        stream_seed(0, "a"),
        stream_seed(1, "a"),
        stream_seed(0, "a", "bc"),
        stream_seed(0, "ab", "c"),
        stream_seed(0, "abc"),
        stream_seed(0, "probe", 1),
        stream_seed(0, "probe", 11),
    }
    assert len(seeds) == 9


def test_seeds_fit_a_signed_64_bit_integer() -> None:
    """Catches: seeds that JSON readers or generators refuse."""
    assert all(0 <= stream_seed(seed, "x") < 2**63 for seed in range(100))


def test_stream_repeats_and_leaves_the_global_state() -> None:
    """Catches: seeding the global generator."""
    before = torch.get_rng_state()
    first = torch.randn(5, generator=stream(0, "probe"))
    again = torch.randn(5, generator=stream(0, "probe"))
    other = torch.randn(5, generator=stream(0, "start"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)

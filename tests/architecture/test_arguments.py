"""Odd values of the arguments that all functions share, for every public function."""

import pytest

from tests import odd_arguments

SHARED = frozenset({"model", "loss_fn", "batches", "params"})
NUM_CALLS = 250
RUNS = frozenset({"run", "resume"})


@pytest.mark.filterwarnings("ignore")
def test_shared_arguments_are_refused_in_words() -> None:
    """A wrong kind, a swapped order, a data set, an optimizer, NaN, an empty batch.

    Catches: a function that reaches for an attribute of what it was not given.
    """
    calls = [
        call
        for call in odd_arguments.calls()
        if call.parameter in SHARED and call.name not in RUNS
    ]
    step = max(1, len(calls) // NUM_CALLS)
    faults = [odd_arguments.fault_of(call) for call in calls[::step]]
    assert [fault for fault in faults if fault] == []

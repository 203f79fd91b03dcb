"""Odd values of every argument, for every public function and method."""

import inspect
from pathlib import Path

import pytest

import noisekit as nk
from tests import odd_arguments

SHARED = frozenset({"model", "loss_fn", "batches", "params"})
NUM_SHARED = 150


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a relative path names be made in a directory of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_elsewhere")
def test_shared_arguments_are_refused_in_words() -> None:
    """A wrong kind, a swapped order, a data set, an optimizer, NaN, an empty batch.

    Catches: a function that reaches for an attribute of what it was not given.
    """
    calls = [call for call in odd_arguments.calls() if call.parameter in SHARED]
    step = max(1, len(calls) // NUM_SHARED)
    faults = [odd_arguments.fault_of(call) for call in calls[::step]]
    assert [fault for fault in faults if fault] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_elsewhere")
def test_every_argument_is_refused_in_words() -> None:
    """One odd value for each parameter; the soak takes all of them.

    Catches: a number that is compared before it is known to be one; a message without
    the argument's name or without what it got.
    """
    calls = odd_arguments.one_for_each_parameter()
    faults = [odd_arguments.fault_of(call) for call in calls]
    assert [fault for fault in faults if fault] == []


def test_every_public_function_checks_its_arguments() -> None:
    """By ``checked``, or as a dataclass by ``check_settings``.

    Catches: a new public function without a check.
    """
    unchecked = [
        name
        for name, get, _ in odd_arguments.functions()
        if inspect.isfunction(get()) and not hasattr(get(), "__wrapped__")
    ]
    assert unchecked == ["attach"]  # whose options are checked together
    assert nk.attach.__doc__

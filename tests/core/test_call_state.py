"""What a call may change beside its inputs and parameters."""

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.layers.call_state import CallState, attributes_given_back


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("other", torch.zeros(2))
        self.last: Tensor | None = None
        self.all: list[int] = []
        self.cache: dict[str, int] = {}


def test_writes_in_place_and_replacements_are_noticed() -> None:
    """Catches: a buffer assigned anew, whose number of writes starts from zero."""
    module = _Counter()
    state = CallState.of(module, copying=True)
    assert not state.has_written(module)
    module.count += 1
    assert state.has_written(module)
    assert state.copies["count"] == 0
    state = CallState.of(module, copying=False)
    module.count = torch.ones(())
    assert state.has_written(module)
    assert state.copies == {}


def test_draws_are_noticed() -> None:
    """Catches: a state that is compared with itself."""
    module = nn.Linear(2, 2)
    state = CallState.of(module, copying=False)
    assert not state.has_drawn(module)
    torch.rand(1)
    assert state.has_drawn(module)


def _interrupted(model: nn.Sequential) -> None:
    with attributes_given_back(model):
        model[0].last = None
        model[0].all.append(2)
        model[0].cache["b"] = 2
        model[0].new = 3
        raise KeyError


def test_attributes_are_given_back_after_an_exception() -> None:
    """Catches: values restored and containers not; new attributes that stay."""
    model = nn.Sequential(_Counter())
    kept = torch.ones(3)
    model[0].last, model[0].all, model[0].cache = kept, [1], {"a": 1}
    with pytest.raises(KeyError):
        _interrupted(model)
    assert model[0].last is kept
    assert model[0].all == [1]
    assert model[0].cache == {"a": 1}
    assert not hasattr(model[0], "new")

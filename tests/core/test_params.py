"""Selecting, flattening and splitting parameters."""

import pytest
import torch
from torch import nn

from noisekit.core.errors import DeviceMismatchError, NoParametersError, UsageError
from noisekit.core.params import flatten, layout_of, select_parameters
from tests.cases import PartlyUsedNetwork, TiedNetwork


def test_shared_parameter_is_listed_once_under_its_first_name() -> None:
    """Catches: counting a tied weight twice, which doubles its part of every norm."""
    model = TiedNetwork()
    chosen = select_parameters(model)
    assert list(chosen) == ["encoder.weight", "decoder.bias"]
    assert layout_of(chosen).num_params == 16 + 4


def test_shared_parameter_may_be_named_by_either_name() -> None:
    """Catches: patterns that see only the first name of a tied weight."""
    chosen = select_parameters(TiedNetwork(), "decoder.*")
    assert list(chosen) == ["encoder.weight", "decoder.bias"]


def test_frozen_parameters_are_left_out() -> None:
    """Catches: measuring parameters that training does not move."""
    assert list(select_parameters(PartlyUsedNetwork())) == [
        "unused.weight",
        "unused.bias",
        "head.weight",
        "head.bias",
    ]


def test_patterns_keep_the_order_of_the_model() -> None:
    """Catches: an order that depends on how the caller listed the patterns."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(select_parameters(model, ["1.*", "0.weight"])) == [
        "0.weight",
        "1.weight",
        "1.bias",
    ]


def test_pattern_without_match_lists_what_there_is() -> None:
    """Catches: silently measuring nothing for a mistyped name."""
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        NoParametersError,
        match=r"got 'fc\.\*', which matches none; there are: 0\.weight",
    ):
        select_parameters(model, ["0.weight", "fc.*"])


def test_empty_selection_is_refused() -> None:
    with pytest.raises(NoParametersError, match="at least one name or pattern"):
        select_parameters(nn.Linear(2, 2), [])


def test_model_without_trainable_parameter_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(
        NoParametersError, match=r"got 2 parameters without requires_grad in Linear"
    ):
        select_parameters(model)


def test_split_inverts_flatten_without_copies() -> None:
    """Catches: wrong order of elements, and parts that are not views."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(3, 1))
    named = select_parameters(model)
    layout = layout_of(named)
    vector = flatten(named.values()).detach()
    parts = layout.split(vector)
    for part, parameter in zip(parts, named.values(), strict=True):
        assert torch.equal(part, parameter)
    parts[0].zero_()
    assert torch.equal(vector[: layout.sizes[0]], torch.zeros(layout.sizes[0]))


def test_flatten_of_one_tensor_is_a_copy() -> None:
    """Catches: a "copy" of a single parameter that changes with training."""
    parameter = torch.ones(3)
    flat = flatten([parameter])
    parameter.zero_()
    assert torch.equal(flat, torch.ones(3))


def test_split_refuses_a_wrong_length() -> None:
    layout = layout_of(select_parameters(nn.Linear(2, 2)))
    with pytest.raises(UsageError, match=r"needs shape \(6,\), got \(5,\)"):
        layout.split(torch.zeros(5))


def test_fingerprint_tells_layouts_apart() -> None:
    """Catches: comparing vectors of models whose parameters differ in shape."""
    wide, narrow = nn.Linear(2, 6), nn.Linear(3, 4)
    prints = {layout_of(select_parameters(m)).fingerprint for m in (wide, narrow)}
    again = layout_of(select_parameters(nn.Linear(2, 6))).fingerprint
    assert len(prints) == 2
    assert again in prints


def test_mixed_types_are_widened() -> None:
    """Catches: rounding a float32 parameter to the type of a half-precision one."""
    named = {"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.zeros(2)}
    assert layout_of(named).dtype == torch.float32


def test_parameters_on_two_devices_are_refused() -> None:
    named = {"a": torch.zeros(1), "b": torch.zeros(1, device="meta")}
    with pytest.raises(DeviceMismatchError, match="one device, got cpu, meta"):
        layout_of(named)

"""Normalisation layers read with the statistics that their own graph keeps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from noisekit.core.layers import rule as layer_rules
from noisekit.core.layers.normalisation import ChannelNormRule, FeatureNormRule
from noisekit.core.layers.rule import LayerCall, LayerRule
from tests.reference import noise as reference

CASES: dict[str, tuple[LayerRule, Callable[[], nn.Module], tuple[int, ...], int]] = {
    "layer_norm": (FeatureNormRule(), lambda: nn.LayerNorm(6), (4, 5, 6), 0),
    "layer_norm_time_first": (FeatureNormRule(), lambda: nn.LayerNorm(6), (4, 5, 6), 1),
    "layer_norm_flat": (FeatureNormRule(), lambda: nn.LayerNorm(6), (4, 6), 0),
    "layer_norm_two_axes": (
        FeatureNormRule(),
        lambda: nn.LayerNorm((5, 6)),
        (4, 3, 5, 6),
        0,
    ),
    "group_norm": (ChannelNormRule(), lambda: nn.GroupNorm(2, 6), (4, 6, 5), 0),
    "group_norm_flat": (ChannelNormRule(), lambda: nn.GroupNorm(2, 6), (4, 6), 0),
}


class _Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def captured(name: str) -> tuple[LayerRule, LayerCall, dict[str, Tensor]]:
    """A call with its own statistics, and the gradients of its examples."""
    rule, build, shape, axis = CASES[name]
    torch.manual_seed(0)
    layer = build().double()
    inputs = (3 + torch.randn(shape, dtype=torch.float64)).requires_grad_()
    output = layer(inputs)
    grads = torch.randn_like(output.detach())
    call = LayerCall(layer, (inputs.detach(),), {}, (axis,), shape[axis], [grads])
    call.statistics = rule.statistics(output)
    expected = reference.module_gradients(layer, inputs.detach(), grads, axis=axis)
    return rule, call, expected


@pytest.mark.parametrize("rows_at_once", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_saved_statistics_are_those_of_the_rows(
    name: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: the first rows' statistics for all; positions on the examples' axis."""
    rule, call, expected = captured(name)
    assert len(call.statistics) == 2
    elements = call.input[0].numel() * rows_at_once
    monkeypatch.setattr(layer_rules, "CHUNK_ELEMENTS", elements)
    got = rule.sq_norms(call, ("weight", "bias"))
    for parameter, norms in reference.sq_norms(expected).items():
        torch.testing.assert_close(got[parameter], norms)


@pytest.mark.parametrize("name", CASES)
def test_the_input_is_not_normalised_again(name: str) -> None:
    """Catches: statistics that are captured and then computed anew."""
    rule, call, _ = captured(name)
    with _Operations() as operations:
        rule.sq_norms(call, ("weight", "bias"))
    again = {"native_layer_norm", "native_group_norm", "var_mean", "mean"}
    assert not operations.names & again


def test_statistics_behind_saved_tensor_hooks_are_left_alone() -> None:
    """Unpacking them would recompute what a checkpoint has dropped.

    Catches: a look at the graph that runs the layer once more.
    """
    found = []
    layer = nn.LayerNorm(6)

    def body(x: Tensor) -> Tensor:
        output: Tensor = layer(x)
        found.append(FeatureNormRule().statistics(output))
        return output

    inputs = torch.randn(4, 6, requires_grad=True)
    checkpoint(body, inputs, use_reentrant=False).sum().backward()
    assert found == [()]  # the recomputation stops once it has what it needs


def test_a_large_mean_keeps_digits_in_single_precision() -> None:
    """Catches: variances as differences of squares, which lose all digits here."""
    torch.manual_seed(0)
    inputs, grads = 300 + torch.randn(4, 9, 6), torch.randn(4, 9, 6)
    layer = nn.LayerNorm(6)
    call = LayerCall(layer, (inputs,), {}, (0,), 4, [grads])
    got = FeatureNormRule().sq_norms(call, ("weight",))["weight"]
    double = reference.module_gradients(layer.double(), inputs.double(), grads.double())
    expected = reference.sq_norms(double)["weight"]
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=0.0)

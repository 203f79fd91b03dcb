"""Layer rules on half-precision activations, against the same numbers in double."""

import copy

import pytest
import torch
from torch import nn

from noisekit.core.layers.per_example import assign_sites
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.layers.rule import LayerCall, row_sq_norms
from tests.core.test_per_example import CASES, Case
from tests.reference import noise as reference

# PyTorch's own remark on even kernels; that case is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

RULED = [case for case in CASES if case.rule != "replay"]
TIGHT = 2e-4
"""Of single precision; rounding to half, once, would leave a thousandth."""


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "anew"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RULED, ids=lambda c: c.name)
def test_half_precision_is_widened_before_anything_else(
    case: Case, dtype: torch.dtype, kept: bool
) -> None:
    """Gradients of hundreds, whose squares and sums float16 does not hold.

    With the statistics that a normalisation has kept, in half precision, and without.

    Catches: sums, statistics and products in half precision, widened afterwards.
    """
    torch.manual_seed(0)
    module = case.build().to(dtype)
    if case.indices:
        inputs = torch.randint(case.indices, case.shape)
    else:
        inputs = torch.randn(case.shape).to(dtype).requires_grad_()
    (site,) = assign_sites(module, list(module.parameters()))
    assert not isinstance(site.rule, ModuleReplay)
    rule, names, count = site.rule, list(site.params), case.shape[case.axis]
    output = module(inputs)
    grads = (300 * torch.randn(output.shape)).to(dtype)
    call = LayerCall(module, (inputs.detach(),), {}, (case.axis,), count, [grads])
    double = copy.deepcopy(module).double()
    if isinstance(double, nn.RMSNorm):
        double.eps = torch.finfo(dtype).eps  # the layer's default follows its input
    statistics = rule.statistics(output)
    if kept:
        call.statistics = statistics
    rounded = kept and any(s.dtype == dtype for s in statistics)
    rtol = 4 * torch.finfo(dtype).eps if rounded else TIGHT
    wide = inputs.detach() if case.indices else inputs.detach().double()
    expected = reference.module_gradients(double, wide, grads.double(), axis=case.axis)
    rows = slice(0, count)
    norms = rule.sq_norms(call, names)
    some = rule.example_grads(call, names, rows)
    sums = rule.summed_grads(call, names, rows)
    squares = rule.square_sums(call, names)
    for name in names:
        own, scale = expected[name], float(expected[name].abs().max())
        found = norms[name].double()
        torch.testing.assert_close(
            found, reference.sq_norms(expected)[name], rtol=rtol, atol=0.0
        )
        for got, want, size in (
            (some[name], own, scale),
            (sums[name], own.sum(0), scale),
            (squares[name], own.square().sum(0), scale**2),
        ):
            torch.testing.assert_close(
                got.double(), want, rtol=rtol, atol=0.1 * rtol * size
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_of_half_precision_gradients_hold_their_squares(
    dtype: torch.dtype,
) -> None:
    """As replays in half precision give them; 160,000 is beyond float16.

    Catches: a norm that is taken in single precision, rounded to half, and squared.
    """
    norms = row_sq_norms(torch.full((2, 4), 200.0).to(dtype))
    torch.testing.assert_close(norms, torch.full((2,), 160_000.0))

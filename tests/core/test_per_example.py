"""Layer rules and replay against one vector-Jacobian product per example."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from noisekit.core.errors import BatchSizeError
from noisekit.core.layers import rule as layer_rules
from noisekit.core.layers.batch_axis import WHOLE, axis_of_examples
from noisekit.core.layers.per_example import (
    assign_sites,
    example_sq_norms,
    summed_grads,
)
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.layers.rule import LayerCall
from tests.reference import noise as reference

# PyTorch's own remark on even kernels; that case is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@dataclass(frozen=True)
class Case:
    """A layer, the shape of its input, and the rule that should read it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rule: str
    axis: int = 0
    indices: int = 0


def _batch_norm() -> nn.Module:
    layer = nn.BatchNorm2d(4).eval()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


CASES = (
    Case("linear", lambda: nn.Linear(5, 3), (7, 5), "linear"),
    Case("linear_no_bias", lambda: nn.Linear(5, 3, bias=False), (7, 5), "linear"),
    Case("linear_gram", lambda: nn.Linear(20, 30), (4, 3, 20), "linear"),
    Case("linear_product", lambda: nn.Linear(3, 2), (4, 9, 3), "linear"),
    Case("linear_4d", lambda: nn.Linear(3, 2), (4, 2, 5, 3), "linear"),
    Case("linear_time_first", lambda: nn.Linear(3, 2), (6, 4, 3), "linear", axis=1),
    Case("conv", lambda: nn.Conv2d(3, 4, 3), (5, 3, 8, 7), "convolution"),
    Case(
        "conv_stride_padding",
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1),
        (5, 2, 8, 8),
        "convolution",
    ),
    Case(
        "conv_groups_dilation",
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False),
        (5, 4, 9, 8),
        "convolution",
    ),
    Case(
        "conv_same_even",
        lambda: nn.Conv2d(3, 4, (2, 4), padding="same"),
        (5, 3, 6, 6),
        "convolution",
    ),
    Case(
        "conv_reflect",
        lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
        (5, 3, 6, 6),
        "convolution",
    ),
    Case(
        "conv_circular_same",
        lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
        (5, 3, 6, 6),
        "convolution",
    ),
    Case(
        "conv_gram",
        lambda: nn.Conv2d(16, 32, 3, groups=2, padding=1),
        (4, 16, 2, 2),
        "convolution",
    ),
    Case(
        "conv_depthwise",
        lambda: nn.Conv2d(4, 4, 3, groups=4),
        (4, 4, 5, 5),
        "convolution",
    ),
    Case("layer_norm", lambda: nn.LayerNorm(6), (5, 6), "normalisation"),
    Case("layer_norm_seq", lambda: nn.LayerNorm((3, 6)), (5, 4, 3, 6), "normalisation"),
    Case("rms_norm", lambda: nn.RMSNorm(6), (5, 4, 6), "normalisation"),
    Case("group_norm", lambda: nn.GroupNorm(2, 4), (5, 4, 3, 3), "normalisation"),
    Case("batch_norm_eval", _batch_norm, (5, 4, 3, 3), "normalisation"),
    Case("embedding", lambda: nn.Embedding(4, 3), (5, 6), "embedding", indices=4),
    Case(
        "embedding_padding",
        lambda: nn.Embedding(4, 3, padding_idx=1),
        (5, 6),
        "embedding",
        indices=4,
    ),
    Case("embedding_wide", lambda: nn.Embedding(40, 3), (5, 6), "embedding", indices=9),
    Case("embedding_1d", lambda: nn.Embedding(4, 3), (5,), "embedding", indices=4),
    Case("conv1d", lambda: nn.Conv1d(3, 4, 2), (5, 3, 6), "convolution"),
    Case(
        "conv_transposed",
        lambda: nn.ConvTranspose2d(2, 3, 3),
        (4, 2, 4, 4),
        "convolution",
    ),
    Case("prelu", lambda: nn.PReLU(3), (4, 3, 2), "replay"),
    Case(
        "weight_norm",
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        (5, 4),
        "replay",
    ),
    Case(
        "transformer_layer",
        lambda: nn.TransformerEncoderLayer(8, 2, 9, 0.0, batch_first=True),
        (3, 4, 8),
        "replay",
    ),
)
IDS = [case.name for case in CASES]


def captured(case: Case, dtype: torch.dtype) -> tuple[nn.Module, LayerCall, Tensor]:
    """A call of the case's layer, with a random output gradient."""
    torch.manual_seed(0)
    module = case.build().to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if case.indices:
        inputs = torch.randint(case.indices, case.shape)
    else:
        inputs = torch.randn(case.shape, dtype=dtype)
    grads = torch.randn_like(module(inputs).detach())
    count = case.shape[case.axis]
    call = LayerCall(module, (inputs,), {}, (case.axis,), count, [grads])
    return module, call, grads


def rule_of(module: nn.Module) -> layer_rules.LayerRule:
    """The rule of a module that is read at one site as a whole, else replay."""
    sites = assign_sites(module, list(module.parameters()))
    whole = len(sites) == 1 and sites[0].module is module
    return sites[0].rule if whole else ModuleReplay()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_squared_norms_are_those_of_one_product_per_example(case: Case) -> None:
    """Catches: norms of the summed gradient, positions squared one by one, wrong pads.

    Also a rule that is chosen for a layer which it does not fit.
    """
    module, call, grads = captured(case, torch.float64)
    rule = rule_of(module)
    assert rule.name == case.rule
    names = [name for name, _ in module.named_parameters()]
    got = rule.sq_norms(call, names)
    expected = reference.sq_norms(
        reference.module_gradients(module, call.args[0], grads, axis=case.axis)
    )
    for name in names:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_of_some_rows_are_those_rows(case: Case) -> None:
    """Catches: a slice that starts at zero, examples mixed between groups."""
    module, call, grads = captured(case, torch.float64)
    names = [name for name, _ in module.named_parameters()]
    rows = slice(1, call.num_examples - 1)
    got = rule_of(module).example_grads(call, names, rows)
    expected = reference.module_gradients(module, call.args[0], grads, axis=case.axis)
    for name in names:
        torch.testing.assert_close(got[name], expected[name][rows])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_inner_products_with_a_direction(case: Case) -> None:
    """Catches: a bias counted in the products of the weight alone; padding rows."""
    module, call, grads = captured(case, torch.float64)
    name, parameter = next(iter(module.named_parameters()))
    direction = torch.randn_like(parameter)
    got = rule_of(module).inner_products(call, {name: direction})
    expected = reference.module_gradients(module, call.args[0], grads, axis=case.axis)
    products = (expected[name] * direction).flatten(1).sum(1)
    torch.testing.assert_close(got, products)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float32_agrees_with_float64(case: Case) -> None:
    """Catches: squares accumulated in less than float32."""
    module, call, _ = captured(case, torch.float32)
    names = [name for name, _ in module.named_parameters()]
    got = rule_of(module).sq_norms(call, names)
    double = module.double()
    wide = LayerCall(
        double,
        tuple(a.double() if a.is_floating_point() else a for a in call.args),
        {},
        call.axes,
        call.num_examples,
        [g.double() for g in call.grads if g is not None],
    )
    expected = rule_of(double).sq_norms(wide, names)
    for name in names:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(
            got[name].double(), expected[name], rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_small_working_memory_changes_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a last chunk that is dropped or counted twice."""
    module, call, _ = captured(case, torch.float64)
    names = [name for name, _ in module.named_parameters()]
    at_once = rule_of(module).sq_norms(call, names)
    monkeypatch.setattr(layer_rules, "CHUNK_ELEMENTS", 1)
    one_by_one = rule_of(module).sq_norms(call, names)
    for name in names:
        torch.testing.assert_close(one_by_one[name], at_once[name])


def test_half_precision_squares_do_not_overflow() -> None:
    """float16 gradients of 1,000 have squares beyond float16.

    Catches: squaring before widening.
    """
    layer = nn.Linear(2, 2).half()
    inputs = torch.full((3, 2), 100.0).half()
    call = LayerCall(layer, (inputs,), {}, (0,), 3, [torch.full((3, 2), 1000.0).half()])
    got = rule_of(layer).sq_norms(call, ("weight",))["weight"]
    torch.testing.assert_close(got, torch.full((3,), 4 * 1e10))


def test_two_calls_of_one_layer_add_up_before_squaring() -> None:
    """Catches: adding the squared norms of the calls, which loses cross terms."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    (site,) = assign_sites(layer, list(layer.parameters()))
    calls, total = [], torch.zeros(5, 3, 4, dtype=torch.float64)
    for _ in range(2):
        inputs = torch.randn(5, 4, dtype=torch.float64)
        grads = torch.randn(5, 3, dtype=torch.float64)
        calls.append((site, LayerCall(layer, (inputs,), {}, (0,), 5, [grads])))
        total += grads[:, :, None] * inputs[:, None, :]
    got = example_sq_norms(calls, layer.weight)
    torch.testing.assert_close(got, total.square().sum((1, 2)))
    torch.testing.assert_close(summed_grads(calls, layer.weight), total.sum(0))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = parametrizations.weight_norm(nn.Linear(4, 2))


def test_parameters_are_placed_where_a_call_uses_them() -> None:
    """Catches: the projection of attention read at a module that is never called."""
    model = _Attention()
    sites = assign_sites(model, list(model.parameters()))
    places = {name: site.path for site in sites for name in site.params}
    assert places["token"] == ""
    assert places["scales.0"] == ""
    assert places["in_proj_weight"] == "attention"
    assert places["out_proj.weight"] == "attention"
    assert places["parametrizations.weight.original0"] == "head"
    assert all(isinstance(site.rule, ModuleReplay) for site in sites)


def test_a_parameter_shared_by_a_layer_without_a_rule_is_read_around_both() -> None:
    """Catches: reading only one of the places that use it."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Bilinear(3, 3, 1))
    model[1].weight = nn.Parameter(torch.zeros(1, 3, 3))
    shared = nn.Parameter(torch.zeros(3, 3))
    model[0].weight = shared
    model[1].register_parameter("extra", shared)
    (site,) = assign_sites(model, [shared])
    assert site.path == ""
    assert set(site.params) == {"0.weight"}


def test_axis_of_examples_is_found_by_size() -> None:
    """Catches: taking the first axis whatever its length."""
    found = axis_of_examples((9, 4, 3), 4, among=range(2), where="x")
    assert found == 1
    assert axis_of_examples((9, 5, 3), 4, among=range(2), where="x") is None
    assert axis_of_examples((9, 1, 3), 1, among=range(2), where="x") == WHOLE


def test_ambiguous_axis_is_refused_with_the_place() -> None:
    """Catches: a time axis as long as the batch, taken for it."""
    message = r"2 axes of that length \(0, 1\) in shape \(4, 4, 3\) at input 0 of enc;"
    with pytest.raises(BatchSizeError, match=message):
        axis_of_examples((4, 4, 3), 4, among=range(2), where="input 0 of enc")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_sums_over_some_rows_are_sums_of_their_gradients(case: Case) -> None:
    """Catches: the whole batch summed whatever the rows; a bias without positions."""
    module, call, grads = captured(case, torch.float64)
    names = [name for name, _ in module.named_parameters()]
    rows = slice(1, call.num_examples - 1)
    got = rule_of(module).summed_grads(call, names, rows)
    expected = reference.module_gradients(module, call.args[0], grads, axis=case.axis)
    assert set(got) == set(names)
    for name in names:
        torch.testing.assert_close(got[name], expected[name][rows].sum(0))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_square_sums_are_sums_of_squared_gradients(case: Case) -> None:
    """Catches: the square of the sum; positions or equal tokens squared one by one."""
    module, call, grads = captured(case, torch.float64)
    names = [name for name, _ in module.named_parameters()]
    got = rule_of(module).square_sums(call, names)
    expected = reference.module_gradients(module, call.args[0], grads, axis=case.axis)
    assert set(got) == set(names)
    for name in names:
        torch.testing.assert_close(got[name], expected[name].square().sum(0))

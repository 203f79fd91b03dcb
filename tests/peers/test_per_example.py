"""Layers that other packages leave out or read wrongly, each read exactly here.

Where a package is run, its own failure is asserted, so that a release that mends it
shows up. Where it is not, its formula is written down as the counter-example.
"""

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import BatchL2Grad
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.layers.linear import LinearRule
from noisekit.core.layers.rule import LayerCall
from noisekit.integrations import attach
from noisekit.probes import Reading
from tests.probes.networks import Headed
from tests.probes.routes import attention
from tests.reference import noise as reference

# The packages' own remarks: on hooks of theirs, and on layers that they leave out.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Extension saving to batch_l2:UserWarning"),
]


class _Scale(nn.Module):
    """A bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _called_twice(core: nn.Module, x: Tensor) -> Tensor:
    hidden: Tensor = core(core(x).tanh())
    return hidden


def _attended(core: nn.Module, x: Tensor) -> Tensor:
    return attention(core, x).mean(1)


def _pooled(core: nn.Module, x: Tensor) -> Tensor:
    pooled: Tensor = core(x).mean((1, 2))
    return pooled


MODELS = {
    "layer_norm": (lambda: Headed(nn.LayerNorm(6), 6), (4, 6)),
    "bare_parameter": (lambda: Headed(_Scale(), 6), (4, 6)),
    "called_twice": (lambda: Headed(nn.Linear(6, 6), 6, _called_twice), (4, 6)),
    "attention": (
        lambda: Headed(nn.MultiheadAttention(6, 2, batch_first=True), 6, _attended),
        (4, 5, 6),
    ),
    "linear_4d": (lambda: Headed(nn.Linear(6, 6), 6, _pooled), (4, 2, 3, 6)),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    return model, inputs, torch.randint(3, shape[:1])


def reading_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Reading:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer) as probe:
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return probe.readings[0]


@pytest.mark.parametrize("name", MODELS)
def test_ours_is_one_backward_per_example(name: str) -> None:
    """Catches: for each of these models, what the other packages do with it."""
    model, inputs, targets = problem(name)
    reading = reading_of(model, inputs, targets)
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    for layer in reading.layers:
        trace = reference.variance_trace([grads[layer.name]])
        assert layer.variance_trace.value == pytest.approx(trace, rel=1e-9)


def _read_by_backpack(name: str) -> dict[str, bool]:
    """Which parameters get per-example norms."""
    model, inputs, targets = problem(name)
    extended, loss = extend(model), extend(nn.CrossEntropyLoss())
    with backpack(BatchL2Grad()):
        loss(extended(inputs), targets).backward()
    return {n: hasattr(p, "batch_l2") for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["layer_norm", "bare_parameter"])
def test_backpack_leaves_out_a_core_without_a_word_in_its_results(name: str) -> None:
    """A total over what it returns misses the parameters of the core."""
    found = _read_by_backpack(name)
    assert not any(read for n, read in found.items() if n.startswith("core."))
    assert found["head.weight"]


def test_backpack_breaks_off_where_a_layer_is_called_twice() -> None:
    """It keeps one call's input and output on the module, none for the other."""
    with pytest.raises(AttributeError, match="has no attribute 'output'"):
        _read_by_backpack("called_twice")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("linear_4d", AttributeError),
        ("called_twice", NotImplementedError),
        ("attention", TypeError),
    ],
)
def test_opacus_breaks_off(name: str, error: type[Exception]) -> None:
    """Ghost norms of a 4-D input, of a layer called twice, and of attention."""
    model, inputs, targets = problem(name)
    wrapped = GradSampleModuleFastGradientClipping(model)
    with pytest.raises(error):
        _ghost_norms(wrapped, inputs, targets)


def _ghost_norms(
    wrapped: GradSampleModuleFastGradientClipping, inputs: Tensor, targets: Tensor
) -> Tensor:
    functional.cross_entropy(wrapped(inputs), targets).backward()
    norms: Tensor = wrapped.get_norm_sample()
    return norms


def test_a_bias_is_summed_over_tokens_before_it_is_squared() -> None:
    """Counter-example: nanoGNS squares token by token and averages over features.

    Catches: cross terms between the tokens of one example lost.
    """
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    inputs = torch.randn(4, 7, 5, dtype=torch.float64)
    grads = torch.randn(4, 7, 3, dtype=torch.float64)
    call = LayerCall(layer, (inputs,), {}, (0,), 4, [grads])
    ours = LinearRule().sq_norms(call, ("bias",))["bias"]
    expected = reference.sq_norms(reference.module_gradients(layer, inputs, grads))
    torch.testing.assert_close(ours, expected["bias"])
    theirs = grads.square().sum(1).mean(1)
    assert ((theirs - ours).abs() > 0.3 * ours).all()


def test_every_example_of_the_batch_counts() -> None:
    """Counter-example: gns-pytorch takes the first quarter of the batch for all of it.

    Catches: a batch in some order, such as by class or by length, read in part.
    """
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    inputs = torch.randn(16, 6, dtype=torch.float64) * torch.linspace(1, 4, 16)[:, None]
    targets = torch.randint(3, (16,))
    reading = reading_of(model, inputs, targets)
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    expected = reference.variance_trace(list(grads.values()))
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)
    quarter = reference.variance_trace([rows[:4] for rows in grads.values()])
    assert quarter < 0.5 * expected

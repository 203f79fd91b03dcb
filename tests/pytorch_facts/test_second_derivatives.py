"""What second derivatives do in PyTorch and Lanczos does anywhere; no operator is run.

A version of PyTorch that mends one of these facts allows a faster form of product, or
one refusal less.
"""

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():  # forward mode warns of its own tools
        warnings.filterwarnings("ignore", message=".*torch.jit")
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def loss_of(outputs: Tensor | tuple[Tensor, object]) -> Tensor:
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    return output.square().mean()


def forward_over_reverse(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The Hessian times ones, by pushing them through the gradient."""
    point = {name: p.detach() for name, p in module.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in point.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(functional_call(module, parameters, (inputs,)))

    product: dict[str, Tensor] = jvp(grad(loss), (point,), (ones,))[1]
    return product


def reverse_over_reverse(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The same by differentiating the sum of the gradient."""
    named = dict(module.named_parameters())
    first = torch.autograd.grad(
        loss_of(module(inputs)), list(named.values()), create_graph=True
    )
    total = torch.stack([part.sum() for part in first]).sum()
    second = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
    return dict(zip(named, second, strict=True))


class Attention(nn.Module):
    """One head of self-attention in the kernel that PyTorch picks."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.project(x)[:, None].chunk(3, -1)
        return functional.scaled_dot_product_attention(queries, keys, values)


TOKENS = torch.tensor([[1, 2, 1], [0, 4, 3]])
NORMALISED = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize(
    ("build", "shape", "match"),
    [
        (Attention, (2, 3, 4), "scaled_dot_product_flash_attention"),
        (lambda: nn.LSTM(4, 3, batch_first=True), (2, 5, 4), "mkldnn_rnn_layer"),
        (lambda: NORMALISED.train(), (6, 4), "in-place operation"),
    ],
    ids=["fused attention", "LSTM", "BatchNorm in training"],
)
def test_forward_over_reverse_is_not_written_for_every_layer(
    build: Callable[[], nn.Module], shape: tuple[int, ...], match: str
) -> None:
    """So forms are tried on a batch before they are used."""
    with pytest.raises((RuntimeError, NotImplementedError), match=match):
        forward_over_reverse(build(), torch.randn(shape))


def test_fused_attention_has_no_second_derivative_at_all() -> None:
    """So products are taken with the kernel that is written in single operations."""
    module, inputs = Attention(), torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="attention_for_cpu_backward is not impl"):
        reverse_over_reverse(module, inputs)
    with sdpa_kernel(SDPBackend.MATH):
        found = forward_over_reverse(module, inputs)
        expected = reverse_over_reverse(module, inputs)
    torch.testing.assert_close(found, expected)


def test_an_lstm_in_double_precision_is_another_kernel() -> None:
    """So what holds in one precision is tried anew in the other."""
    module, inputs = nn.LSTM(4, 3, batch_first=True).double(), torch.randn(2, 5, 4)
    found = forward_over_reverse(module, inputs.double())
    torch.testing.assert_close(found, reverse_over_reverse(module, inputs.double()))


@pytest.mark.parametrize("product", [forward_over_reverse, reverse_over_reverse])
def test_embedding_bags_have_no_second_derivative_either_way(
    product: Callable[[nn.Module, Tensor], object],
) -> None:
    """So they are named, and finite differences are what is left."""
    with pytest.raises(NotImplementedError, match="_embedding_bag"):
        product(nn.EmbeddingBag(5, 3, mode="sum"), TOKENS)
    product(nn.Embedding(5, 3), TOKENS)


def test_a_gru_cannot_be_mapped_over_examples() -> None:
    """So replays fall back to a loop; an LSTM can be mapped."""
    inputs = torch.randn(2, 5, 4)
    for kind in (nn.LSTM, nn.GRU):
        module = kind(4, 3, batch_first=True)
        point = {name: p.detach() for name, p in module.named_parameters()}

        def loss(
            parameters: dict[str, Tensor], one: Tensor, module: nn.Module = module
        ) -> Tensor:
            return loss_of(functional_call(module, parameters, (one[None],)))

        if kind is nn.LSTM:
            rows = vmap(grad(loss), (None, 0))(point, inputs)
            assert rows["weight_ih_l0"].shape == (2, 12, 4)
        else:
            with pytest.raises(RuntimeError, match="doesn't match the broadcast"):
                vmap(grad(loss), (None, 0))(point, inputs)


def test_differences_of_single_precision_gradients_are_noise() -> None:
    """At a step that is right in double precision no digit is left.

    So finite differences are taken in double precision.
    """
    errors = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        layer = nn.Linear(50, 50).to(dtype)
        inputs = torch.randn(20, 50).to(dtype)
        module = nn.Sequential(layer, nn.Tanh())
        exact = reverse_over_reverse(module, inputs)["0.weight"]
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                for p in layer.parameters():
                    p.add_(sign * 1e-8)
            loss = loss_of(module(inputs))
            slopes.append(torch.autograd.grad(loss, layer.weight)[0])
            with torch.no_grad():
                for p in layer.parameters():
                    p.sub_(sign * 1e-8)
        product = (slopes[0] - slopes[1]) / 2e-8
        errors[dtype] = float((product - exact).norm() / exact.norm())
    assert errors[torch.float64] < 1e-5
    assert errors[torch.float32] > 0.1


def lanczos(spectrum: Tensor, start: Tensor, num_steps: int) -> tuple[float, float]:
    """Largest Ritz value and its residual, with full orthogonalisation."""
    basis = [start / start.norm()]
    alphas, betas = [], []
    for _ in range(num_steps):
        product = spectrum * basis[-1]
        alphas.append(float(product @ basis[-1]))
        for _ in range(2):
            for vector in basis:
                product = product - (product @ vector) * vector
        betas.append(float(product.norm()))
        basis.append(product / product.norm())
    inner = torch.tensor(betas[:-1]).double()
    matrix = torch.diag(torch.tensor(alphas).double())
    matrix = matrix + torch.diag(inner, 1) + torch.diag(inner, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), betas[-1] * abs(float(vectors[-1, -1]))


def test_a_small_residual_bounds_an_eigenvalue_not_the_largest() -> None:
    """A start near the eigenvector of 9 looks converged there; the truth is 10.

    So starts are mixed with random directions, and steps have a minimum.
    """
    spectrum = torch.cat([torch.linspace(0, 8.5, 3000), torch.tensor([9.0, 10.0])])
    spectrum = spectrum.double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3002, generator=generator, dtype=torch.float64)
    start = 1e-4 * noise / noise.norm()
    start[3000] += 1.0
    value, residual = lanczos(spectrum, start, 5)
    assert residual < 1e-3 * value
    assert value == pytest.approx(9.0, abs=1e-3)
    assert float((spectrum - value).abs().min()) <= residual  # what it does bound
    value, _ = lanczos(spectrum, noise, 60)
    assert value == pytest.approx(10.0, rel=1e-3)


def test_a_batch_s_curvature_at_a_vector_is_of_first_order() -> None:
    """``v' H_b v`` at the whole's top vector moves as the batches' own top values do.

    So one more product gives the data's error, which no residual tells.
    """
    torch.manual_seed(0)
    whole = torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.5])).double()
    values = {}
    for size in (1e-2, 1e-3):
        change = torch.randn(4, 4, dtype=torch.float64)
        own = whole + size * (change + change.T)
        truth = float(torch.linalg.eigvalsh(own)[-1])
        values[size] = abs(truth - float(own[0, 0]))
        assert abs(truth - 5.0) > 10 * values[size]
    assert math.log10(values[1e-2] / values[1e-3]) == pytest.approx(2, abs=1)

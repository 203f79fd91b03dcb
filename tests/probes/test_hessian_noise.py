"""Noise that counts curvature: at frozen weights, and on a schedule while training."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import BatchSizeError, CoupledExamplesError
from noisekit.integrations import attach
from noisekit.noise import HessianNoiseScale
from noisekit.noise.step_quantity import HessianForms
from noisekit.probes import Reading
from noisekit.probes.dataset_curvature import hessian_weighted_noise
from tests.probes.quantity_problems import N, problem, rows_of
from tests.reference import noise as reference

MODELS = ("mlp", "conv", "tied")


def truth(name: str) -> tuple[Tensor, Tensor]:
    """Every example's gradient, and the dense Hessian."""
    model, inputs, targets = problem(name)
    loss_fn = functional.cross_entropy
    grads = reference.example_gradients(model, loss_fn, inputs, targets)
    return rows_of(grads), reference.dense_hessian(model, loss_fn, inputs, targets)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_frozen_measure_matches_dense_matrices(name: str, reduction: str) -> None:
    """``tr(HΣ)`` with every example's gradient, ``G'HG`` over pairs of examples.

    Catches: ``ḡ'Hḡ`` with the noise in it, 1/n for 1/(n - 1), a sum's factor n.
    """
    model, inputs, targets = problem(name)
    rows, hessian = truth(name)
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / (N - 1)
    forms = rows @ hessian @ rows.T
    pairs = (forms.sum() - forms.trace()) / (N * (N - 1))

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction=reduction)

    loss_fn.reduction = reduction  # type: ignore[attr-defined]
    batches = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    found = hessian_weighted_noise(model, loss_fn, batches)
    assert found.noise_curvature.value == pytest.approx(
        float((hessian @ covariance).trace()), rel=1e-6
    )
    assert found.gradient_curvature.value == pytest.approx(float(pairs), rel=1e-6)


def test_chunks_are_unbiased_for_the_same_population() -> None:
    """Averaged over shufflings, chunks of 3 give what single examples do.

    Catches: a chunk's size left out.
    """
    model, inputs, targets = problem("mlp")
    loss_fn = functional.cross_entropy
    exact = hessian_weighted_noise(model, loss_fn, [(inputs, targets)])
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        order = torch.randperm(N, generator=generator)
        batch = (inputs[order], targets[order])
        chunks = hessian_weighted_noise(model, loss_fn, [batch], chunk_size=3)
        found.append((chunks.noise_curvature.value, chunks.gradient_curvature.value))
    sample = torch.tensor(found, dtype=torch.float64)
    errors = sample.std(0) / len(sample) ** 0.5
    wanted = (exact.noise_curvature.value, exact.gradient_curvature.value)
    for mean, error, value in zip(sample.mean(0), errors, wanted, strict=True):
        assert abs(float(mean) - value) < 4 * float(error)


def forms_of(
    model: nn.Module, inputs: Tensor, targets: Tensor, **options: object
) -> tuple[Reading, HessianForms]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss_fn = functional.cross_entropy
    probe = attach(
        model,
        optimizer,
        loss_fn=loss_fn,
        quantities="hessian_noise_scale",
        **options,  # type: ignore[arg-type]
    )
    probe.loss_fn(model(inputs), targets).backward()
    optimizer.step()
    probe.detach()
    optimizer.zero_grad()
    found = probe.readings[-1].quantities["hessian_noise_scale"]
    assert isinstance(found, HessianForms)
    return probe.readings[-1], found


@pytest.mark.parametrize("name", MODELS)
def test_forms_take_gradients_and_curvature_from_different_halves(name: str) -> None:
    """Against dense Hessians of the halves, which are then averaged.

    Catches: the Hessian of the chunks' own examples, rows of the other half.
    """
    model, inputs, targets = problem(name)
    loss_fn = functional.cross_entropy
    rows, _ = truth(name)
    chunks = rows.reshape(6, 2, -1).mean(1)
    first = reference.dense_hessian(model, loss_fn, inputs[:6], targets[:6])
    other = reference.dense_hessian(model, loss_fn, inputs[6:], targets[6:])
    wanted = chunks[:3] @ other @ chunks[:3].T + chunks[3:] @ first @ chunks[3:].T
    _, found = forms_of(model, inputs, targets, num_chunks=3)
    torch.testing.assert_close(found.values, wanted / 2, rtol=1e-8, atol=1e-12)
    assert found.chunk_size == 2


def test_readings_are_unbiased() -> None:
    """Fresh examples of a known population, at frozen weights: both parts on average.

    Regression on one output, whose Hessian is quadratic in the inputs, so that a
    Hessian of the same examples is far off.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    weights = model.weight.detach().clone()
    generator = torch.Generator().manual_seed(1)
    size, draws = 24, 300

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        return inputs, noise

    # y = noise, w fixed: g = 2 x (x'w - y), E H = 2 I, G = 2 w,
    # E|g|² = 4 (E|x|²(x'w)² + E|x|² y²) = 4 ((3 + 2)|w|² + 3).
    sq_norm = float(weights.square().sum())
    signal = 2 * 4 * sq_norm
    noise = 2 * (4 * (5 * sq_norm + 3) - 4 * sq_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(
        model,
        optimizer,
        loss_fn=functional.mse_loss,
        quantities="hessian_noise_scale",
        hessian_every=1,
    )
    for _ in range(draws):
        optimizer.zero_grad()
        inputs, targets = drawn(size)
        probe.loss_fn(model(inputs), targets).backward()
        optimizer.step()
    table = probe.frame()
    for column, wanted in (
        ("noise_curvature", noise),
        ("gradient_curvature", signal),
    ):
        error = float(table[column].std()) / draws**0.5
        assert abs(float(table[column].mean()) - wanted) < 4 * error
        assert error < 0.1 * wanted


def test_ghost_batches_are_the_chunks_of_a_coupled_model() -> None:
    """BatchNorm in training mode: chunks normalised by themselves, state given back.

    Catches: running statistics of the replays; chunks of another size.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    inputs = torch.randn(24, 5, dtype=torch.float64)
    targets = torch.arange(24) % 3
    loss_fn = functional.cross_entropy
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = [
        torch.cat(
            [
                grad.flatten()
                for grad in torch.autograd.grad(
                    loss_fn(model(inputs[rows]), targets[rows]),
                    list(model.parameters()),
                )
            ]
        )
        for rows in torch.arange(24).split(4)
    ]
    model.load_state_dict(before)
    _, found = forms_of(
        model, inputs, targets, estimator="ghost", ghost_batch=4, num_chunks=3
    )
    assert found.chunk_size == 4
    ghosts = torch.stack(parts)

    def half(rows: Tensor) -> Tensor:
        losses = [loss_fn(model(inputs[r]), targets[r]) for r in rows.split(4)]
        mean, parameters = torch.stack(losses).mean(), list(model.parameters())
        grads = torch.autograd.grad(mean, parameters, create_graph=True)
        flat = torch.cat([grad.flatten() for grad in grads])
        columns = [
            torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat
        ]
        return torch.stack([torch.cat([c.flatten() for c in col]) for col in columns])

    first, other = half(torch.arange(12)), half(torch.arange(12, 24))
    wanted = ghosts[:3] @ other @ ghosts[:3].T + ghosts[3:] @ first @ ghosts[3:].T
    torch.testing.assert_close(found.values, wanted / 2, rtol=1e-8, atol=1e-10)


def test_a_reading_has_the_scale_and_its_parts() -> None:
    """Catches: a ratio without its parts, which cannot be averaged over steps."""
    model, inputs, targets = problem("mlp")
    reading, forms = forms_of(model, inputs, targets, num_chunks=3)
    noise = forms.noise
    assert isinstance(noise, HessianNoiseScale)
    assert forms.estimate.status == noise.hessian_noise_scale.status
    row = reading.row()
    assert row["noise_curvature"] == noise.noise_curvature.value
    assert row["gradient_curvature"] == noise.gradient_curvature.value


def test_too_few_examples_are_said_so() -> None:
    model, inputs, targets = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(
        model,
        optimizer,
        loss_fn=functional.cross_entropy,
        quantities="hessian_noise_scale",
    )
    probe.loss_fn(model(inputs[:7]), targets[:7]).backward()
    optimizer.step()
    assert dict(probe.readings[-1].coverage.missing) == {
        "hessian_noise_scale": "7 examples do not make two halves of 4 chunks of 1"
    }


class _OnceOnly(torch.autograd.Function):
    """A kernel whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return 2 * grad


class OnceOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _OnceOnly.apply(self.linear(x))
        return out


def test_kernels_without_a_second_derivative_are_said_so() -> None:
    """Training goes on.

    Catches: an exception out of somebody's loop; zeros, which autograd gives where such
    a kernel cuts the graph.
    """
    torch.manual_seed(0)
    model = OnceOnly()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(
        model,
        optimizer,
        loss_fn=functional.cross_entropy,
        quantities="hessian_noise_scale",
        num_chunks=3,
    )
    probe.loss_fn(model(torch.randn(12, 5)), torch.arange(12) % 3).backward()
    optimizer.step()
    assert dict(probe.readings[-1].coverage.missing) == {
        "hessian_noise_scale": "no Hessian-vector products: a kernel of the model has "
        "a derivative that is not differentiable"
    }


def test_frozen_measure_refuses_what_has_no_answer() -> None:
    model, inputs, targets = problem("mlp")
    loss_fn = functional.cross_entropy
    message = (
        "hessian_weighted_noise needs a chunk_size that divides every batch, got 5 and "
        "batches of 12 to 12 examples; use chunk_size=1."
    )
    with pytest.raises(BatchSizeError, match=f"^{re.escape(message)}$"):
        hessian_weighted_noise(model, loss_fn, [(inputs, targets)], chunk_size=5)
    coupled = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(CoupledExamplesError, match="got bn='batch', which couples"):
        hessian_weighted_noise(coupled, loss_fn, [(inputs, targets)], bn="batch")

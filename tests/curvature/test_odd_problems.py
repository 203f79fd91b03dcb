"""Problems of many kinds against a dense Hessian by differences, in float64.

The reference moves one coordinate at a time, computes the mean over all examples by a
plain loop, and shares no code with the library.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import noisekit as nk
from noisekit.core.errors import NoisekitError

Batches = list[tuple[Any, Any]]

SIZES = (5, 3, 4)
STEP = 1e-5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(count: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(
        classes, (count,), generator=torch.Generator().manual_seed(seed)
    )


def classified(*sizes: int, width: int = 4) -> Batches:
    """Batches of the sizes given, with classes for targets."""
    return [(drawn(n, width, seed=n), labels(n, seed=n)) for n in sizes or SIZES]


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double()


def mlp(*, width: int = 4, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 5), activation(), nn.Linear(5, 3))


class Tied(nn.Module):
    """One matrix on both sides, and used twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.table(tokens).mean(1))
        logits: Tensor = self.out(hidden)
        return logits


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return logits


class Checkpointed(nn.Module):
    """A part that is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.body, x, use_reentrant=False)
        logits: Tensor = self.head(hidden.tanh())
        return logits


class Attention(nn.Module):
    """Scaled dot-product attention by PyTorch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x[:, None, :] * drawn(1, 3, 1, seed=8)).chunk(3, -1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        logits: Tensor = self.head(mixed.mean(1))
        return logits


class Recurrent(nn.Module):
    """An LSTM, whose fused kernels have no second derivative on some devices."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cell(x.view(len(x), 2, 2))[0][:, -1])
        return logits


class Named(nn.Module):
    """Takes one mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.body(data["x"])
        return logits


class Jacobian(nn.Module):
    """Differentiates its own body by ``torch.func``."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.func.vmap(
            torch.func.grad(lambda row: self.body(row).tanh().sum())
        )(x)
        logits: Tensor = self.head(slope)
        return logits


class Complex(nn.Module):
    """Complex weights, whose real and imaginary parts are coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(3, dtype=torch.complex128) * (0.5 + 0.2j))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * self.filter
        logits: Tensor = self.head(torch.fft.irfft(spectrum, n=4))
        return logits


@dataclass(frozen=True)
class Problem:
    """A problem with what it needs to be measured.

    Attributes:
        name: What is odd about it.
        make: Makes the model.
        batches: The data.
        loss_fn: The loss of one batch.
        weight: What one batch counts, given its targets; its examples by default.
        params: Parameters that are measured; all by default.
        options: Further arguments.
    """

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[], Iterable[tuple[Any, Any]]] = classified
    loss_fn: Callable[[Any, Any], Tensor] = functional.cross_entropy
    weight: Callable[[Any], float] = len
    params: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def frozen_part() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def generated() -> Iterator[tuple[Any, Any]]:
    yield from classified()


CLASS_WEIGHTS = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
IGNORED = [(drawn(4, 4), torch.tensor([-100, 1, 2, -100])), *classified(3)]

PROBLEMS = (
    Problem("unequal batches", mlp),
    Problem("one example", mlp, lambda: classified(1)),
    Problem("an empty batch between", mlp, lambda: [*classified(4), *classified(0)]),
    Problem("a generator", mlp, generated),
    Problem("tied weights", Tied, lambda: [
        (labels(3 * n, 6, seed=n).view(n, 3), labels(n, 6, seed=n)) for n in SIZES
    ]),
    Problem("a frozen part", frozen_part),
    Problem("a part of the parameters", mlp, params="2.*"),
    Problem("a layer called twice", Twice),
    Problem("checkpointing", Checkpointed),
    Problem("attention", Attention),
    Problem("an LSTM", Recurrent),
    Problem("ReLU in place", lambda: nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    )),
    Problem("one mapping", Named, lambda: [({"x": x}, y) for x, y in classified()]),
    Problem("ignored targets", mlp, lambda: IGNORED,
            weight=lambda y: float((y != -100).sum())),
    Problem("classes of weight zero", mlp, loss_fn=nn.CrossEntropyLoss(CLASS_WEIGHTS),
            weight=lambda y: float(CLASS_WEIGHTS[y].sum())),
    Problem("label smoothing", mlp, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1)),
    Problem("squares over elements", mlp,
            lambda: [(x, drawn(len(x), 3, seed=9)) for x, _ in classified()],
            functional.mse_loss),
    Problem("a sum over examples", mlp, loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            weight=lambda y: 1.0 / sum(SIZES)),
    Problem("complex weights", Complex),
    Problem("torch.func inside", Jacobian),
)  # fmt: skip


def mean_loss(problem: Problem, model: nn.Module) -> Tensor:
    """The mean over all that counts, batch after batch."""
    is_sum = getattr(problem.loss_fn, "reduction", "") == "sum"
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for inputs, targets in problem.batches():
        if len(targets):
            weight = problem.weight(targets)
            total = total + weight * problem.loss_fn(model(inputs), targets)
            count += weight
    return total if is_sum else total / count


def dense_hessian(problem: Problem, model: nn.Module) -> Tensor:
    """Central differences of gradients, one real coordinate at a time."""
    chosen = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and (problem.params is None or name.startswith("2."))
    ]
    views = [torch.view_as_real(p.data) if p.is_complex() else p.data for p in chosen]

    def slope() -> Tensor:
        grads = torch.autograd.grad(mean_loss(problem, model), chosen)
        return torch.cat(
            [(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in grads]
        )

    rows = []
    for view in views:
        flat = view.view(-1)
        for i in range(len(flat)):
            start = float(flat[i])
            flat[i] = start + STEP
            ahead = slope()
            flat[i] = start - STEP
            rows.append((ahead - slope()) / (2 * STEP))
            flat[i] = start
    return torch.stack(rows)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_products_agree_with_a_dense_hessian(problem: Problem) -> None:
    """All columns of the operator, to the differences' own accuracy.

    Catches: batches weighted as equals; a tied weight differentiated at one of its
    places; a part that autograd leaves out; the real part of a weight alone.
    """
    model = built(problem.make)
    expected = dense_hessian(problem, model)
    with nk.HessianOperator(
        model,
        problem.loss_fn,
        problem.batches(),
        params=problem.params,
        **problem.options,
    ) as hessian:
        found = hessian @ torch.eye(len(expected), dtype=torch.float64)
    scale = expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=float(1e-7 * scale))


def test_a_function_of_parameters_is_refused_with_the_way_out() -> None:
    """``f(params, x)`` of functional code.

    Catches: an attribute error of a function.
    """
    with pytest.raises(NoisekitError, match="wrap a function in a module"):
        nk.lambda_max(lambda params, x: x, functional.cross_entropy, classified())  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", [nk.lambda_max, nk.fisher_rao_norm])
def test_a_cut_model_is_refused(measure: Callable[..., object]) -> None:
    """Outputs that are detached from the parameters.

    Catches: a curvature of zero for what cannot be differentiated.
    """

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.body(x).detach()
            return outputs

    with pytest.raises(NoisekitError, match="detach"):
        measure(built(Cut), functional.cross_entropy, classified())

"""Hessian products against dense Hessians, and what they do to the model."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator
from tests.cases import (
    CASES,
    COUNTS,
    RAGGED,
    Case,
    batch_norm_network,
    classes,
    mlp,
    seeded,
)
from tests.reference import curvature as reference

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("form", ["kept", "rebuilt"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_match_the_dense_hessian(case: Case, form: Any) -> None:
    """Every kind of model, loss and batch in the table.

    Catches: batches averaged with equal weights, sum losses divided by the number of
    batches, unused parameters that crash, tied ones counted twice.
    """
    H = HessianOperator(
        case.build(),
        case.loss_fn,
        case.batches,
        normaliser=case.normaliser,
        form=form,
    )
    assert_close(H.to_dense(), case.hessian(), rtol=1e-9, atol=1e-12)
    assert H.form == form
    assert H.num_matvecs == H.shape[0]


def test_quadratic_has_its_matrix_as_hessian() -> None:
    """``F(w) = w' A w / 2`` whatever the data."""
    matrix = torch.from_numpy(reference.symmetric_with_spectrum([5, 2, 0, -1, -3]))

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(5, dtype=torch.float64))

        def forward(self, inputs: Tensor) -> Tensor:
            value = self.w @ matrix @ self.w / 2
            return value.expand(len(inputs))

    H = HessianOperator(Quadratic(), lambda o, t: o.mean(), RAGGED)
    assert_close(H.to_dense(), matrix, rtol=1e-12, atol=1e-14)


def test_linear_regression_has_a_known_hessian() -> None:
    """Mean squared error of ``w'x``: the Hessian is ``2 X'X / n``.

    Catches: a factor 2, ``n`` of the last batch only.
    """
    inputs = torch.cat([x for x, _ in RAGGED])
    model = nn.Linear(4, 1, bias=False).double()
    batches = [(x, x[:, :1]) for x, _ in RAGGED]
    H = HessianOperator(model, nn.MSELoss(), batches)
    assert_close(H.to_dense(), 2 * inputs.T @ inputs / 10, rtol=1e-12, atol=1e-14)


def test_linear_loss_has_a_zero_hessian() -> None:
    """Catches: a crash where the gradient does not depend on the parameters."""
    model = nn.Linear(4, 1).double()
    H = HessianOperator(model, lambda o, t: o.mean(), RAGGED)
    assert torch.equal(H.to_dense(), torch.zeros(5, 5, dtype=torch.float64))


def test_two_operators_in_a_row_are_the_same() -> None:
    """Catches: gradients accumulated into ``.grad``, which doubles the second one."""
    model = seeded(mlp)()
    first = HessianOperator(model, LOSS, RAGGED).to_dense()
    second = HessianOperator(model, LOSS, RAGGED).to_dense()
    assert torch.equal(first, second)
    assert all(p.grad is None for p in model.parameters())


def test_budget_decides_how_many_graphs_are_kept() -> None:
    """Part kept, part rebuilt, and the same products.

    Catches: keeping all whatever it costs; counting a kept batch again.
    """
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    whole = HessianOperator(risk)
    wanted = whole.to_dense()
    assert (whole.form, whole.num_kept_batches) == ("kept", 3)
    with risk.evaluating():
        per_batch = whole._share_bytes(1.0, RAGGED[0])
    some = HessianOperator(risk, memory_budget=int(1.5 * per_batch))
    assert_close(some.to_dense(), wanted, rtol=1e-12, atol=1e-15)
    assert (some.form, some.num_kept_batches) == ("mixed", 1)
    none = HessianOperator(risk, memory_budget=100)
    assert_close(none.to_dense(), wanted, rtol=1e-12, atol=1e-15)
    assert none.form == "rebuilt"


def test_shuffling_data_beyond_the_budget_give_the_same_products() -> None:
    """Catches: another operator on each pass over a shuffling loader."""
    inputs = torch.cat([x for x, _ in RAGGED])
    targets = torch.cat([y for _, y in RAGGED])
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=True)
    H = HessianOperator(seeded(mlp)(), LOSS, loader, memory_budget=64)
    _, want = reference.gradient_and_hessian(seeded(mlp)(), LOSS, RAGGED, counts=COUNTS)
    assert_close(H.to_dense(), torch.from_numpy(want), rtol=1e-9, atol=1e-12)
    assert H.form == "rebuilt"


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_batch_norm_policy_is_what_is_differentiated(bn: Any) -> None:
    """Catches: constant statistics where they are meant to depend on the weights."""
    H = HessianOperator(seeded(batch_norm_network)(), LOSS, RAGGED, bn=bn).to_dense()
    model = seeded(batch_norm_network)().train(bn == "batch")
    parameters = list(model.parameters())
    loss = reference.total_loss(model, LOSS, RAGGED, counts=COUNTS, reduction="mean")
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    product = torch.autograd.grad(sum(g.sum() for g in gradient), parameters)
    want = reference.flat(product, parameters)
    assert_close(H @ torch.ones(len(want), dtype=torch.float64), want)


def test_batch_norm_statistics_do_not_move() -> None:
    """Catches: products that update running statistics, ten of them ten times."""
    model = seeded(batch_norm_network)().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for bn in ("running", "recalibrated", "batch"):
        H = HessianOperator(model, LOSS, RAGGED, bn=bn, form="rebuilt")
        for _ in range(10):
            H @ torch.ones(H.shape[0])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_subset_is_a_diagonal_block() -> None:
    whole = HessianOperator(seeded(mlp)(), LOSS, RAGGED).to_dense()
    block = HessianOperator(seeded(mlp)(), LOSS, RAGGED, params="3.*").to_dense()
    assert_close(block, whole[-18:, -18:], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("through_data", [False, True])
def test_operator_follows_the_weights(through_data: bool) -> None:
    """A training step between two products is seen, however it was made.

    Catches: products with a graph kept from old weights.
    """
    model = seeded(mlp)()
    H = HessianOperator(model, LOSS, RAGGED)
    old = H.to_dense()
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.data if through_data else parameter).mul_(1.5)
    fresh = HessianOperator(model, LOSS, RAGGED).to_dense()
    assert torch.equal(H.to_dense(), fresh)
    assert not torch.allclose(old, fresh)


def test_operator_follows_running_statistics() -> None:
    """Catches: watching parameters only."""
    model = seeded(batch_norm_network)()
    H = HessianOperator(model, LOSS, RAGGED)
    old = H.to_dense()
    model[1].running_mean += 0.5
    fresh = HessianOperator(model, LOSS, RAGGED).to_dense()
    assert torch.equal(H.to_dense(), fresh)
    assert not torch.allclose(old, fresh)


def test_kept_graphs_survive_a_measurement_elsewhere() -> None:
    """Catches: rebuilding after each use of the model, or an error of autograd."""
    model = seeded(batch_norm_network)()
    risk = EmpiricalRisk(model, LOSS, RAGGED, bn="recalibrated")
    H = HessianOperator(risk)
    before = H.to_dense()
    graphs = list(H._kept)
    risk.value(risk.vector() + 1.0)
    assert torch.equal(H.to_dense(), before)
    assert H._kept == graphs


def test_closing_frees_the_graph() -> None:
    """Catches: a reference cycle that keeps the graph until the garbage collector."""
    gc.disable()
    try:
        operator = HessianOperator(seeded(mlp)(), LOSS, RAGGED)
        with operator as H:
            H @ torch.ones(H.shape[0])
            watched = weakref.ref(H._kept[0][1])
        assert watched() is None
        other = HessianOperator(seeded(mlp)(), LOSS, RAGGED)
        other @ torch.ones(other.shape[0])
        watched = weakref.ref(other._kept[0][1])
        del other
        assert watched() is None
    finally:
        gc.enable()


def test_closed_operator_builds_again() -> None:
    H = HessianOperator(seeded(mlp)(), LOSS, RAGGED)
    before = H.to_dense()
    H.close()
    assert torch.equal(H.to_dense(), before)


def test_compiled_model_has_products() -> None:
    """Catches: PyTorch's refusal to differentiate a compiled graph twice."""
    compiled = torch.compile(seeded(mlp)(), backend="aot_eager")
    plain = HessianOperator(seeded(mlp)(), LOSS, RAGGED).to_dense()
    assert torch.equal(HessianOperator(compiled, LOSS, RAGGED).to_dense(), plain)
    parts = nn.Sequential(torch.compile(seeded(mlp)(), backend="aot_eager"))
    assert torch.equal(HessianOperator(parts, LOSS, RAGGED).to_dense(), plain)


def test_compiled_model_is_still_compiled_afterwards() -> None:
    """Catches: eager execution left switched on."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(seeded(mlp)(), backend=backend)
    HessianOperator(compiled, LOSS, RAGGED).to_dense()
    assert not graphs
    compiled(RAGGED[0][0])
    assert len(graphs) == 1


def test_half_precision_products_are_added_in_single() -> None:
    """Many batches that are the same have the product of one of them.

    Catches: sums over batches in eight bits, which stop growing.
    """
    ((inputs, targets),) = classes((8,), 4)
    batch = (inputs.bfloat16(), targets)
    model = seeded(mlp)().bfloat16()
    one = HessianOperator(model, LOSS, [batch], form="rebuilt")
    many = HessianOperator(model, LOSS, [batch] * 512, form="rebuilt")
    vector = torch.linspace(-1, 1, one.shape[0]).bfloat16()
    want = (one @ vector).double()
    error = (many @ vector).double() - want
    assert float(error.norm() / want.norm()) < 0.01


def test_operation_without_second_derivative_is_explained() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = nn.EmbeddingBag(6, 3, mode="sum")
            self.head = nn.Linear(3, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.bags(tokens)))

    tokens = torch.arange(12).view(4, 3) % 6
    H = HessianOperator(Bags(), LOSS, [(tokens, torch.arange(4) % 3)])
    with pytest.raises(
        UsageError,
        match=r"needs second derivatives of every .* got one without: .*EmbeddingBag "
        r"by Embedding and a sum, for one\), leave .* or take form='finite_difference'",
    ):
        H @ torch.ones(H.shape[0])


def test_forms_are_checked() -> None:
    with pytest.raises(
        UsageError, match=r"'auto', 'kept', .* 'finite_difference', got 'fast'"
    ):
        HessianOperator(seeded(mlp)(), LOSS, RAGGED, form="fast")  # type: ignore[arg-type]
    loader = DataLoader(TensorDataset(*RAGGED[0]), batch_size=2)
    with pytest.raises(UsageError, match="form='kept' needs the data in memory"):
        HessianOperator(seeded(mlp)(), LOSS, loader, form="kept", memory_budget=8)

"""Gauss-Newton products against matrices written out, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from noisekit.core.errors import UsageError
from noisekit.curvature import GGNOperator, HessianOperator
from tests.cases import CASES, RAGGED, Case, batch_norm_network, mlp, seeded
from tests.reference import curvature as reference

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_match_the_dense_matrix(case: Case) -> None:
    """Every kind of model, loss and batch in the table; positive semi-definite.

    Catches: batches averaged with equal weights (2.7 % off on ragged ones in a peer),
    a loss Hessian without the loss's own divisor, unused parameters, tied ones.
    """
    want = reference.gauss_newton(
        case.build(),
        case.loss_fn,
        case.batches,
        counts=case.counts,
        reduction=case.reduction,
    )
    G = GGNOperator(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    dense = G.to_dense()
    assert_close(dense, torch.from_numpy(want), rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-12
    assert G.num_kept_batches == len(case.batches)


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_rebuilt_products_are_the_same(case: Case) -> None:
    """Catches: graphs that only work while they are kept."""
    options = {"normaliser": case.normaliser}
    kept = GGNOperator(case.build(), case.loss_fn, case.batches, **options)
    rebuilt = GGNOperator(kept.risk, memory_budget=1)
    assert_close(rebuilt.to_dense(), kept.to_dense(), rtol=1e-12, atol=1e-15)
    assert rebuilt.num_kept_batches == 0


def test_linear_model_has_its_hessian_as_gauss_newton_matrix() -> None:
    """Without curvature of the model nothing is left out."""
    model = seeded(lambda: nn.Linear(4, 3))()
    got = GGNOperator(model, LOSS, RAGGED).to_dense()
    want = HessianOperator(model, LOSS, RAGGED).to_dense()
    assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_block_equals_its_columns_bit_for_bit() -> None:
    G = GGNOperator(seeded(mlp)(), LOSS, RAGGED, memory_budget=10**4)
    block = torch.randn(G.shape[0], 3, generator=torch.Generator().manual_seed(0))
    together = G @ block.double()
    for i in range(3):
        assert torch.equal(together[:, i], G @ block[:, i].double())


def test_compiled_model_has_products() -> None:
    """Catches: PyTorch's refusal to differentiate a compiled graph twice."""
    compiled = torch.compile(seeded(mlp)(), backend="aot_eager")
    plain = GGNOperator(seeded(mlp)(), LOSS, RAGGED).to_dense()
    assert torch.equal(GGNOperator(compiled, LOSS, RAGGED).to_dense(), plain)


def test_batch_statistics_are_differentiated() -> None:
    """With ``bn='batch'`` outputs depend on all examples of their batch."""
    model = seeded(batch_norm_network)()
    got = GGNOperator(model, LOSS, RAGGED, bn="batch").to_dense()
    total = torch.zeros_like(got)
    for inputs, targets in RAGGED:
        outputs = model.train()(inputs)
        jacobian = torch.from_numpy(
            reference.output_jacobian(outputs, list(model.parameters()))
        )
        curvature = torch.autograd.functional.hessian(
            lambda z, targets=targets: LOSS(z, targets), outputs.detach()
        ).reshape(outputs.numel(), -1)
        total += len(targets) / 10 * jacobian.T @ curvature @ jacobian
    assert_close(got, total, rtol=1e-9, atol=1e-12)


# PyTorch's forward-mode derivatives, which the peer uses, warn about themselves.
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_peer_weighs_ragged_batches_alike() -> None:
    """hessian-eigenthings averages batch means; ours is the whole data's matrix.

    Catches: the same here.
    """
    from hessian_eigenthings import GGNOperator as Peer

    model = seeded(mlp)().eval()
    ragged = [RAGGED[0], (RAGGED[1][0][:1], RAGGED[1][1][:1])]
    whole = [tuple(torch.cat(parts) for parts in zip(*ragged, strict=True))]
    vector = torch.linspace(-1, 1, 43, dtype=torch.float64)
    ours = [GGNOperator(model, LOSS, data) @ vector for data in (ragged, whole)]
    assert_close(ours[0], ours[1], rtol=1e-10, atol=1e-13)
    peer = Peer(
        model,
        ragged,
        lambda m, batch: m(batch[0]),
        lambda outputs, batch: LOSS(outputs, batch[1]),
    )
    assert not torch.allclose(peer @ vector, ours[1], rtol=1e-2)


class Wrapped(nn.Module):
    """Returns its logits inside a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = seeded(mlp)()

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(inputs)}


def test_outputs_that_are_no_tensor_are_refused() -> None:
    G = GGNOperator(Wrapped(), lambda o, t: LOSS(o["logits"], t), RAGGED)
    with pytest.raises(UsageError, match="returns one floating-point tensor, got a di"):
        G @ torch.ones(43)


def _concave(outputs: Tensor, targets: Tensor) -> Tensor:
    return LOSS(outputs, targets) - 0.3 * outputs.square().mean()


def _linear(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.nll_loss(outputs, targets)


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (_concave, r"convex in the model's outputs, got curvature -0\.\d+ along one"),
        (_linear, r"curves in the model's outputs, got .* linear in them \(_linear\)"),
        (nn.NLLLoss(), r"linear in them \(NLLLoss\), whose matrix is zero; let the"),
    ],
)
def test_losses_without_a_convex_part_are_refused(loss_fn: Any, match: str) -> None:
    """Catches: an indefinite matrix called Gauss-Newton; a silent zero."""
    G = GGNOperator(seeded(mlp)(), loss_fn, RAGGED)
    with pytest.raises(UsageError, match=match):
        G @ torch.ones(43)


def test_penalty_inside_the_loss_is_refused() -> None:
    """Catches: a matrix that leaves the penalty's curvature out without a word."""
    model = seeded(mlp)()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSS(outputs, targets) + model[0].weight.square().sum()

    G = GGNOperator(model, loss_fn, RAGGED)
    with pytest.raises(
        UsageError, match=r"function of outputs and targets.*weight_dec"
    ):
        G @ torch.ones(43)
    assert (GGNOperator(model, LOSS, RAGGED, weight_decay=2.0).weight_decay) == {
        "0.weight": 2.0,
        "0.bias": 2.0,
        "3.weight": 2.0,
        "3.bias": 2.0,
    }

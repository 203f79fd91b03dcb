"""Forms of the Hessian product: equal where they exist, and said where they do not."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator
from noisekit.curvature.operators import hvp_selection as trials
from noisekit.curvature.operators.hvp_methods import finite_difference, linearised
from tests.cases import (
    CASES,
    RAGGED,
    Case,
    Recurrent,
    batch_norm_network,
    classes,
    mlp,
    seeded,
)

LOSS = nn.CrossEntropyLoss()


_TRACED = {"convolutional", "tied", "recurrent", "regression"}
_REFUSED = {
    ("recurrent", "linearised"): r"linearised differs by 0\.\d+",
    ("regression", "linearised"): r"linearised failed: RuntimeError: Zero",
    ("regression", "forward_over_reverse"): r"forward_over_reverse failed: Runtime",
}


@pytest.mark.parametrize(
    ("case", "form"),
    [
        *((case, "forward_over_reverse") for case in CASES),
        *((case, "linearised") for case in CASES if case.name in _TRACED),
    ],
    ids=str,
)
def test_forward_forms_match_the_dense_hessian(case: Case, form: Any) -> None:
    """Or fall back and say so.

    A traced LSTM is right once and wrong from the second product on; tracing a squared
    error ends the process.

    Catches: a trial of one vector; tied weights replaced under one name only, sums
    weighted as means, the form that was refused still in use.
    """
    H = HessianOperator(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser, form=form
    )
    vectors = torch.eye(H.shape[0], dtype=torch.float64)[:, ::4]
    want = case.hessian()[:, ::4]
    assert_close(H @ vectors, want, rtol=1e-9, atol=1e-12)
    if (case.name, form) in _REFUSED:
        assert re.match(_REFUSED[case.name, form], H.trial.reason)
        assert H.form == "kept"
    else:
        assert (H.trial.form, H.trial.reason, H.form) == (form, "", form)
        assert H.trial.error < 1e-10


@pytest.mark.parametrize("case", CASES, ids=str)
def test_finite_differences_match_within_their_stated_error(case: Case) -> None:
    """Catches: a step that grows with the vector, one-sided differences."""
    H = HessianOperator(
        case.build(),
        case.loss_fn,
        case.batches,
        normaliser=case.normaliser,
        form="finite_difference",
    )
    vectors = 100 * torch.eye(H.shape[0], dtype=torch.float64)[:, ::7]
    want = 100 * case.hessian()[:, ::7]
    assert float((H @ vectors - want).norm() / want.norm()) < 1e-7
    assert H.trial.form == H.form == "finite_difference"
    assert H.trial.error < 1e-6


def test_finite_differences_of_a_float32_model_are_taken_in_double() -> None:
    """Catches: differences of float32 gradients, with an error of order one.

    At the same step, in float32, this model's product has no correct digit.
    """
    double = HessianOperator(seeded(mlp)(), LOSS, RAGGED).to_dense()
    batches = [(x.float(), y) for x, y in RAGGED]
    model = seeded(mlp)().float()
    with HessianOperator(model, LOSS, batches, form="finite_difference") as H:
        assert H.dtype == torch.float32
        error = (H.to_dense().double() - double).norm() / double.norm()
        _, block = next(H.blocks())
        assert (block.dtype, block.form) == (torch.float32, "finite_difference")
        assert (block @ torch.ones(25)).dtype == torch.float32
    assert float(error) < 1e-6
    risk = EmpiricalRisk(model, LOSS, batches)
    vector = torch.ones(43)
    with risk.evaluating():
        narrow = finite_difference(1e-5)(risk, 0.4, batches[0])(vector)
    with H.risk.evaluating():
        wide = finite_difference(1e-5)(H.risk, 0.4, batches[0])(vector)
    assert float((narrow - wide).norm() / wide.norm()) > 0.01
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Bags(nn.Module):
    """EmbeddingBag, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(6, 3, mode="sum")
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bags(tokens)))


class Sums(Bags):
    """The same by Embedding and a sum, with the same weights."""

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.bags.weight
        return self.head(torch.tanh(nn.functional.embedding(tokens, weight).sum(1)))


TOKENS = [(torch.arange(12).view(4, 3) % 6, torch.arange(4) % 3)]


def test_finite_differences_where_double_backward_is_impossible() -> None:
    """Never by themselves: only ``form='finite_difference'`` asks for them."""
    H = HessianOperator(seeded(Bags)(), LOSS, TOKENS, form="finite_difference")
    want = HessianOperator(seeded(Sums)(), LOSS, TOKENS).to_dense()
    assert_close(H.to_dense(), want, rtol=1e-5, atol=1e-8)


def test_zero_vector_has_a_zero_product() -> None:
    """Catches: a division by the length of the vector."""
    H = HessianOperator(seeded(mlp)(), LOSS, RAGGED, form="finite_difference")
    assert torch.equal(H @ torch.zeros(43), torch.zeros(43, dtype=torch.float64))


# PyTorch's forward-mode derivatives, which the peer uses, warn about themselves.
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_peers_difference_step_grows_with_the_vector() -> None:
    """hessian-eigenthings moves by ``eps |v|``: signs of n entries move too far.

    Catches: the same here, where the product of 1000 v is a thousand times that of v.
    """
    from hessian_eigenthings import HessianOperator as Peer
    from hessian_eigenthings.loss_fns import supervised_loss

    model = seeded(mlp)().eval()
    ours = HessianOperator(model, LOSS, RAGGED[:1], form="finite_difference")
    peer = Peer(model, RAGGED[:1], supervised_loss(LOSS), method="finite_difference")
    vector = torch.linspace(-1, 1, 43, dtype=torch.float64)
    for operator, faithful in ((ours, True), (peer, False)):
        small, large = operator @ vector, operator @ (1e5 * vector)
        error = float((large / 1e5 - small).norm() / small.norm())
        assert (error < 1e-6) is faithful


@pytest.mark.parametrize("form", ["linearised", "forward_over_reverse", "fastest"])
def test_a_form_that_disagrees_is_not_used(
    form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: trusting a form for having run without an error."""

    def twice(risk: Any, weight: float, batch: Any) -> Any:
        right = trials.reverse_over_reverse(risk, weight, batch)
        return lambda vector: 2 * right(vector)

    monkeypatch.setattr(
        trials, "_FORMS", {"linearised": twice, "forward_over_reverse": twice}
    )
    H = HessianOperator(seeded(mlp)(), LOSS, RAGGED, form=form)
    want = HessianOperator(seeded(mlp)(), LOSS, RAGGED).to_dense()
    assert_close(H.to_dense(), want, rtol=1e-12, atol=1e-15)
    assert H.trial.form == "reverse_over_reverse"
    assert H.trial.reason.endswith("differs by 1")


@pytest.mark.parametrize("quick", [False, True])
def test_fastest_is_what_the_stopwatch_says(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of forms that agree; the reason names what was slower."""
    seconds = iter([1.0, 2.0] if quick else [2.0, 1.0])
    monkeypatch.setattr(trials, "_seconds", lambda product, vector: next(seconds))
    H = HessianOperator(seeded(mlp)(), LOSS, RAGGED, form="fastest")
    want = HessianOperator(seeded(mlp)(), LOSS, RAGGED).to_dense()
    assert_close(H.to_dense(), want, rtol=1e-10, atol=1e-14)
    assert H.form == ("linearised" if quick else "kept")
    reason = "" if quick else "linearised takes 2 s on a batch, not 1 s"
    assert H.trial.reason == reason


def test_default_reads_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are promised: nothing may depend on how fast the machine is."""
    monkeypatch.setattr(trials, "_seconds", None)
    monkeypatch.setattr(trials.time, "perf_counter", None)
    for form in ("auto", "linearised", "forward_over_reverse", "finite_difference"):
        H = HessianOperator(seeded(mlp)(), LOSS, RAGGED, form=form)  # type: ignore[arg-type]
        H @ torch.ones(43)


@pytest.mark.parametrize(
    ("build", "form"),
    [
        (mlp, "auto"),
        (mlp, "rebuilt"),
        (mlp, "linearised"),
        (mlp, "forward_over_reverse"),
        (Recurrent, "auto"),
    ],
)
def test_block_equals_its_columns_bit_for_bit(build: Any, form: Any) -> None:
    batches = classes((4, 2), 3, 2) if build is Recurrent else RAGGED
    H = HessianOperator(seeded(build)(), LOSS, batches, form=form)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(H.shape[0], 3, generator=generator, dtype=torch.float64)
    together = H @ block
    assert H.num_matvecs == 3
    for i in range(3):
        assert torch.equal(together[:, i], H @ block[:, i])


def test_block_shares_the_forward_pass() -> None:
    """Catches: a forward pass for each column of a block."""
    model = seeded(mlp)()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    H = HessianOperator(model, LOSS, RAGGED, form="rebuilt")
    H @ torch.ones(43)  # and the check of the derivatives
    calls.clear()
    H @ torch.ones(43, 5)
    assert len(calls) == 3


def test_linearised_follows_the_weights_and_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not fit goes by the graph.

    Catches: a trace of old weights; traces of everything whatever the budget, or of
    what is dropped after one pass.
    """
    model = seeded(mlp)()
    graph = HessianOperator(model, LOSS, RAGGED)
    graph @ torch.ones(43)
    with graph.risk.evaluating():
        budget = int(6.0 * graph._share_bytes(0.4, RAGGED[0]))
    H = HessianOperator(model, LOSS, RAGGED, form="linearised", memory_budget=budget)
    H @ torch.ones(43)
    traced: list[float] = []

    def counted(risk: Any, weight: float, batch: Any) -> Any:
        traced.append(weight)
        return linearised(risk, weight, batch)

    monkeypatch.setitem(trials._FORMS, "linearised", counted)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    fresh = HessianOperator(model, LOSS, RAGGED).to_dense()
    assert_close(H.to_dense(), fresh, rtol=1e-10, atol=1e-14)
    assert (H.form, H.num_kept_batches) == ("mixed", 1)
    assert traced == [0.4, 0.4]  # the trial, and the batch that is kept


def test_batch_norm_on_batch_statistics_has_no_traced_form() -> None:
    """Functional BatchNorm updates statistics in place, which tracing refuses.

    Catches: statistics that move during the trial.
    """
    model = seeded(batch_norm_network)()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    H = HessianOperator(model, LOSS, RAGGED, bn="batch", form="linearised")
    want = HessianOperator(model, LOSS, RAGGED, bn="batch").to_dense()
    assert_close(H.to_dense(), want, rtol=1e-10, atol=1e-14)
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_trial_of_a_linear_loss_is_exact() -> None:
    """Catches: a relative error of a zero product, zero over zero."""
    model = nn.Linear(4, 1).double()
    H = HessianOperator(model, lambda o, t: o.mean(), RAGGED, form="linearised")
    assert torch.equal(H.to_dense(), torch.zeros(5, 5, dtype=torch.float64))
    assert not math.isnan(H.trial.error)

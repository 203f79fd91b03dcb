"""What all operators of a risk share: precision, blocks, batches, what they leave."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.testing import assert_close

from noisekit.core.errors import NoParametersError, UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import (
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    RiskOperator,
    as_operator,
)
from tests.cases import (
    CASES,
    RAGGED,
    Recurrent,
    TiedNetwork,
    batch_norm_network,
    classes,
    mlp,
    seeded,
)

LOSS = nn.CrossEntropyLoss()
Build = Callable[..., RiskOperator]
OPERATORS: dict[str, Build] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": FisherOperator,
    "monte_carlo": partial(FisherOperator, kind="monte_carlo"),
    "empirical": partial(FisherOperator, kind="empirical"),
    "covariance": GradientCovarianceOperator,
    "batch_covariance": partial(GradientCovarianceOperator, per="batch"),
}
every_operator = pytest.mark.parametrize(
    "build", list(OPERATORS.values()), ids=list(OPERATORS)
)


def bfloat_and_float(build: Any) -> tuple[nn.Module, nn.Module]:
    """A model whose weights are bfloat16, and one with the same in float32."""
    narrow = seeded(build)().bfloat16()
    return narrow, seeded(build)().bfloat16().float()


@pytest.mark.parametrize(
    ("model", "shape"),
    [(mlp, (4,)), (batch_norm_network, (4,)), (TiedNetwork, (4,)), (Recurrent, (3, 2))],
)
@pytest.mark.parametrize("kind", ["hessian", "ggn", "covariance"])
def test_narrow_models_are_measured_in_float32(
    kind: str, model: Any, shape: tuple[int, ...]
) -> None:
    """Bit for bit the products of a float32 model of the same weights.

    Catches: eight bits in the forward pass, which leave no digit of a curvature;
    weights converted for good; a shared weight copied twice.
    """
    narrow, wide = bfloat_and_float(model)
    batches = [(x.bfloat16(), y) for x, y in classes((4, 2), *shape)]
    same = [(x.float(), y) for x, y in batches]
    build = OPERATORS[kind]
    before = {name: t.clone() for name, t in narrow.state_dict().items()}
    measured = build(narrow, LOSS, batches)
    assert measured.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(measured.shape[0], generator=generator)
    assert torch.equal(measured @ vector, build(wide, LOSS, same) @ vector)
    after = narrow.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    narrow(batches[0][0])


def test_narrow_models_are_followed_and_keep_live_graphs() -> None:
    """Catches: gradients cast back by accumulators of a graph that still lives."""
    narrow, _ = bfloat_and_float(mlp)
    batches = [(x.bfloat16(), y) for x, y in RAGGED]
    alive = LOSS(narrow(batches[0][0]), batches[0][1])
    H = HessianOperator(narrow, LOSS, batches)
    vector = torch.ones(43)
    first = H @ vector
    assert bool((first.bfloat16().float() != first).any())
    with torch.no_grad():
        narrow[0].weight.mul_(2.0)
    assert torch.equal(H @ vector, HessianOperator(narrow, LOSS, batches) @ vector)
    alive.sum()


def test_displaced_narrow_models_are_evaluated_between_their_numbers() -> None:
    """Catches: a small step that rounds away in the model's own type."""
    narrow, wide = bfloat_and_float(mlp)
    batches = [(x.bfloat16(), y) for x, y in RAGGED]
    risk = EmpiricalRisk(narrow, LOSS, batches).in_precision(torch.float32)
    assert risk.in_precision(torch.float32) is risk
    same = EmpiricalRisk(wide, LOSS, [(x.float(), y) for x, y in batches])
    point = risk.vector() + 1e-5
    assert risk.value(point) == same.value(point) != same.value()
    assert_close(risk.value_and_grad(point)[1], same.value_and_grad(point)[1])


def test_narrow_models_of_tokens_pass_the_check_of_the_loss() -> None:
    """Token indices do not tell how coarse the arithmetic is.

    Catches: parts and repeats of a batch compared in eight bits, to four digits.
    """
    case = next(case for case in CASES if case.name == "ignored_tokens")
    H = HessianOperator(case.build().bfloat16(), case.loss_fn, case.batches)
    wide = HessianOperator(case.build().bfloat16().float(), case.loss_fn, case.batches)
    vector = torch.ones(H.shape[0])
    assert torch.equal(H @ vector, wide @ vector)


def test_class_weights_are_widened_with_the_model() -> None:
    """Catches: a loss module of another type than the outputs."""
    narrow, wide = bfloat_and_float(mlp)
    weights = torch.tensor([0.5, 1.0, 2.0])
    batches = [(x.bfloat16(), y) for x, y in RAGGED]
    loss_fn = nn.CrossEntropyLoss(weight=weights.bfloat16())
    H = HessianOperator(narrow, loss_fn, batches)
    same = HessianOperator(
        wide, nn.CrossEntropyLoss(weight=weights), [(x.float(), y) for x, y in batches]
    )
    assert torch.equal(H @ torch.ones(43), same @ torch.ones(43))
    assert loss_fn.weight.dtype == torch.bfloat16


@every_operator
def test_blocks_are_those_of_the_whole(build: Build) -> None:
    """By layer, by tensor, and by pattern, over the same data.

    Catches: blocks of other data or draws; parameters in another order.
    """
    whole = build(seeded(mlp)(), LOSS, RAGGED)
    dense = whole.to_dense()
    spans = {"0": slice(0, 25), "3": slice(25, 43)}
    for name, block in whole.blocks():
        assert_close(
            block.to_dense(), dense[spans[name], spans[name]], rtol=1e-9, atol=1e-13
        )
        assert type(block) is type(whole)
        assert block.num_matvecs == block.shape[0]
    names = [name for name, _ in whole.blocks(by="tensor")]
    assert names == ["0.weight", "0.bias", "3.weight", "3.bias"]
    biases = whole.restricted_to("*.bias")
    rows = [*range(20, 25), *range(40, 43)]
    assert_close(biases.to_dense(), dense[rows][:, rows], rtol=1e-9, atol=1e-13)


def test_blocks_are_checked() -> None:
    H = HessianOperator(seeded(mlp)(), LOSS, RAGGED)
    with pytest.raises(UsageError, match="by needs to be 'layer' or 'tensor', got 'mo"):
        list(H.blocks(by="module"))  # type: ignore[arg-type]
    with pytest.raises(NoParametersError, match="got 'head', which matches none"):
        H.restricted_to("head")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_operators_add_up_to_the_whole(case: Any) -> None:
    """``H = sum of c_b H_b / sum c_b``, for means and for sums.

    Catches: weights of examples where tokens count; sums not divided.
    """
    H = HessianOperator(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(H.shape[0], generator=generator, dtype=torch.float64)
    parts = [(weight, part @ vector) for weight, part in H.batch_operators()]
    want = torch.tensor([c / sum(case.counts) for c in case.counts])
    assert_close(torch.tensor([w for w, _ in parts]), want)
    assert_close(sum(w * p for w, p in parts), H @ vector, rtol=1e-9, atol=1e-13)
    before = H.num_matvecs
    weights, forms = H.batch_forms(vector)
    assert H.num_matvecs == before + 1
    assert_close(weights.float(), want)
    assert_close(forms, torch.stack([vector @ p for _, p in parts]))


def test_batches_of_recalibrated_data_share_the_statistics_of_all() -> None:
    """Catches: each batch measured under statistics of its own."""
    model = seeded(batch_norm_network)()
    H = HessianOperator(model, LOSS, RAGGED, bn="recalibrated")
    parts = sum(w * part.to_dense() for w, part in H.batch_operators())
    assert_close(parts, H.to_dense(), rtol=1e-9, atol=1e-13)


@every_operator
def test_streamed_data_are_the_same_data(build: Build) -> None:
    """Catches: operators that need all data in memory."""

    class Stream:
        def __iter__(self) -> Any:
            return iter(RAGGED)

    kept = build(seeded(mlp)(), LOSS, RAGGED)
    streamed = build(seeded(mlp)(), LOSS, Stream(), memory_budget=8)
    if isinstance(kept, FisherOperator):
        streamed.seed = kept.seed
    assert_close(streamed.to_dense(), kept.to_dense(), rtol=1e-10, atol=1e-14)
    assert (kept.num_kept_batches, streamed.num_kept_batches) == (3, 0)


@every_operator
def test_memory_does_not_grow_with_the_data(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch's graph at a time, without waiting for the garbage collector.

    Catches: graphs in a list, or in a reference cycle, until the pass is over.
    """
    operator = build(seeded(mlp)(), LOSS, RAGGED * 4, memory_budget=1)
    operator @ torch.ones(43)
    original, made, alive = operator._passing_share, [], []

    def watched(*args: Any) -> Callable[[Tensor], Tensor]:
        alive.append(sum(reference() is not None for reference in made))
        share = original(*args)
        made.append(weakref.ref(share))
        return share

    monkeypatch.setattr(operator, "_passing_share", watched)
    gc.disable()
    try:
        operator @ torch.ones(43, 2)
    finally:
        gc.enable()
    assert alive == [0] * 12


class Failing(nn.Module):
    """Raises on the second batch of any pass, once told to.

    The class counts, since the state of a model is restored at every pass.
    """

    left = 10**6

    def __init__(self) -> None:
        super().__init__()
        self.inner = seeded(batch_norm_network)()
        Failing.left = 10**6

    def forward(self, inputs: Tensor) -> Tensor:
        Failing.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner(inputs)


@every_operator
@pytest.mark.parametrize("narrow", [False, True])
def test_an_exception_leaves_the_model_as_it_was(build: Build, narrow: bool) -> None:
    """Modes, buffers, gradients, weights and random state, bit for bit.

    Catches: a model held in another mode or type by a generator that was not closed.
    """
    model = Failing().train()
    batches: Any = RAGGED
    if narrow:
        model = model.bfloat16()
        batches = [(x.bfloat16(), y) for x, y in RAGGED]
    LOSS(model(batches[0][0]), batches[0][1]).backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    tensors = [*model.parameters(), *model.buffers()]
    grads = [p.grad for p in model.parameters()]
    torch.manual_seed(0)
    random = torch.get_rng_state()
    operator = build(model, LOSS, batches, memory_budget=1)
    operator @ torch.ones(operator.shape[0])
    Failing.left = 1
    try:
        operator @ torch.ones(operator.shape[0])
    except KeyboardInterrupt as error:
        caught = error  # holds the frames of all that was interrupted
    assert caught.__traceback__ is not None
    now = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in state.items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@every_operator
def test_other_solvers_take_our_operators(build: Build) -> None:
    """SciPy's eigenvalues, and curvlinops' sum with a matrix of its own."""
    operator = build(seeded(mlp)(), LOSS, RAGGED)
    dense = operator.to_dense()
    values = eigsh(operator.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    want = torch.linalg.eigvalsh(dense)[-2:]
    assert_close(torch.from_numpy(values).sort()[0], want, rtol=1e-8, atol=1e-12)
    block = torch.eye(43, dtype=torch.float64)[:, :3]
    product = operator.to_scipy() @ block.numpy()
    assert_close(torch.from_numpy(product), dense[:, :3], rtol=1e-9, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_curvlinops_traces_our_operator() -> None:
    from curvlinops import hutchinson_trace

    H = HessianOperator(seeded(mlp)(), LOSS, RAGGED)
    torch.manual_seed(0)
    estimates = [hutchinson_trace(H, 10) for _ in range(20)]  # type: ignore[arg-type]
    mean, spread = torch.stack(estimates).mean(), torch.stack(estimates).std()
    assert abs(float(mean - H.to_dense().trace())) < 4 * float(spread) / 20**0.5


# PyTorch's forward-mode derivatives, which the peers use, warn about themselves.
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_peers_operators_are_operators_here() -> None:
    """hessian-eigenthings has a size and no shape; curvlinops takes tensors.

    Catches: a peer refused for what its attributes are called; products that still
    hold the peer's graph.
    """
    from curvlinops import GGNLinearOperator
    from hessian_eigenthings import GGNOperator as Eigenthings

    model = seeded(mlp)().eval()
    whole = [tuple(torch.cat(parts) for parts in zip(*RAGGED, strict=True))]
    want = GGNOperator(model, LOSS, whole).to_dense()
    peers: list[Any] = [
        GGNLinearOperator(model, LOSS, list(model.parameters()), whole),
        Eigenthings(
            model,
            whole,
            lambda m, batch: m(batch[0]),
            lambda outputs, batch: LOSS(outputs, batch[1]),
        ),
    ]
    for peer in peers:
        dense = as_operator(peer).to_dense()
        assert_close(dense, want, rtol=1e-8, atol=1e-12)
        assert not dense.requires_grad
    ours = as_operator(peers[1]) - GGNOperator(model, LOSS, whole)
    assert float(ours.to_dense().abs().max()) < 1e-12

"""Fisher matrices against loops over classes and targets, and drawn against exact."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from noisekit.core.errors import DataChangedError, UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import FisherOperator, GGNOperator, MonteCarlo
from tests.cases import CASES, CLASS_WEIGHTS, RAGGED, Case, mlp, seeded
from tests.reference import curvature as reference

LOSS = nn.CrossEntropyLoss()
REGRESSION = {"regression", "own_loss_sum"}
CATEGORICAL = [case for case in CASES if case.name not in REGRESSION]
_REGRESSION_CASE = next(case for case in CASES if case.name == "regression")


def weight_of(case: Case) -> Any:
    """How the targets of a case count, written out by hand."""
    if "class_weights" in case.name:
        return lambda target: float(CLASS_WEIGHTS[target])
    return lambda target: float(target != -100)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("case", CATEGORICAL, ids=str)
def test_products_match_a_loop_over_targets(case: Case, observed: bool) -> None:
    """Exact and empirical; ignored tokens, class weights, sums, ragged batches.

    Catches: padding counted as class 0, class weights left out or squared, a division
    by examples where the loss divides by tokens.
    """
    F = FisherOperator(
        case.build(),
        case.loss_fn,
        case.batches,
        kind="empirical" if observed else "true",
        likelihood="categorical",
        normaliser=case.normaliser,
    )
    want = reference.categorical_fisher(
        case.build(), case.batches, weight_of=weight_of(case), observed=observed
    )
    assert_close(F.to_dense(), torch.from_numpy(want), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CATEGORICAL, ids=str)
def test_gauss_newton_is_the_fisher_matrix_of_cross_entropy(case: Case) -> None:
    options = {"normaliser": case.normaliser}
    F = FisherOperator(
        case.build(), case.loss_fn, case.batches, likelihood="categorical", **options
    )
    G = GGNOperator(case.build(), case.loss_fn, case.batches, **options)
    assert_close(F.to_dense(), G.to_dense(), rtol=1e-9, atol=1e-13)


def test_gaussian_is_half_of_squared_errors_gauss_newton_matrix() -> None:
    """A squared error is the log-likelihood of variance one half.

    Catches: a factor 2, a division by examples where the loss divides by elements.
    """
    case = _REGRESSION_CASE
    F = FisherOperator(case.build(), case.loss_fn, case.batches)
    G = GGNOperator(case.build(), case.loss_fn, case.batches)
    assert F.likelihood == "gaussian"
    assert_close(2 * F.to_dense(), G.to_dense(), rtol=1e-10, atol=1e-13)


def test_gaussian_empirical_takes_whole_examples() -> None:
    """``g_i`` has all outputs of an example: their cross terms count.

    Catches: each output as an example of its own.
    """
    case = _REGRESSION_CASE
    F = FisherOperator(case.build(), case.loss_fn, case.batches, kind="empirical")
    model = case.build().eval()
    want = torch.zeros(F.shape, dtype=torch.float64)
    for inputs, targets in case.batches:
        for x, y in zip(inputs, targets, strict=True):
            loss = (model(x) - y).square().sum() / 2
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            flat = torch.cat([g.reshape(-1) for g in gradient])
            want += torch.outer(flat, flat) / 30
    assert_close(F.to_dense(), want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_draws_are_without_bias(likelihood: Any) -> None:
    """The mean over 400 seeds lies within 4.5 standard errors, entry by entry.

    Catches: observed targets in the place of drawn ones, draws from other
    probabilities, a sum over draws instead of their mean.
    """
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED, params="3.bias")
    exact = FisherOperator(risk, likelihood=likelihood).to_dense()
    draws = torch.stack(
        [
            FisherOperator(
                risk,
                kind=MonteCarlo(2, torch.Generator().manual_seed(seed)),
                likelihood=likelihood,
            ).to_dense()
            for seed in range(400)
        ]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() < 4.5 * error).all())


def test_drawn_operator_is_one_matrix() -> None:
    """Kept, rebuilt, asked twice, batch by batch: the same draws.

    Catches: new draws on each product, which no eigenvalue survives.
    """

    def operator(**more: Any) -> FisherOperator:
        kind = MonteCarlo(3, torch.Generator().manual_seed(1))
        return FisherOperator(seeded(mlp)(), LOSS, RAGGED, kind=kind, **more)

    kept, rebuilt = operator(), operator(memory_budget=1)
    dense = kept.to_dense()
    assert torch.equal(kept.to_dense(), dense)
    assert_close(rebuilt.to_dense(), dense, rtol=1e-12, atol=1e-15)
    parts = sum(w * part.to_dense() for w, part in kept.batch_operators())
    assert_close(parts, dense, rtol=1e-12, atol=1e-15)
    assert_close(dense, dense.T, rtol=1e-12, atol=1e-15)
    other = FisherOperator(kept.risk, kind=MonteCarlo(3))
    assert not torch.allclose(other.to_dense(), dense)


def test_draws_on_streamed_data_need_an_order() -> None:
    """Catches: draws that go to other examples once a loader shuffles anew."""

    class Reversing:
        step = 1

        def __iter__(self) -> Any:
            return iter(RAGGED[:: self.step])

    loader = Reversing()
    F = FisherOperator(seeded(mlp)(), LOSS, loader, kind="monte_carlo", memory_budget=8)
    F @ torch.ones(F.shape[0])
    loader.step = -1
    with pytest.raises(DataChangedError, match="same data on each pass"):
        F @ torch.ones(F.shape[0])
    inputs = torch.cat([x for x, _ in RAGGED])
    targets = torch.cat([y for _, y in RAGGED])
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    steady = FisherOperator(
        seeded(mlp)(), LOSS, loader, kind="monte_carlo", memory_budget=8
    )
    vector = torch.ones(steady.shape[0])
    assert torch.equal(steady @ vector, steady @ vector)


class Tokens(nn.Module):
    """Logits of a vocabulary at each place, ``(n, places, classes)``."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 3)
        self.head = nn.Linear(3, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class ClassesSecond(Tokens):
    """The same, ``(n, classes, places)``, as PyTorch's loss takes them."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).transpose(1, 2)


def permuted(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.transpose(1, 2), targets)


def flattened(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    one_each = functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), reduction="none"
    )
    return ((1 - (-one_each).exp()) ** 2 * one_each).mean()


@pytest.mark.parametrize("loss_fn", [permuted, flattened, focal])
@pytest.mark.parametrize("kind", ["true", "empirical", MonteCarlo(2)])
@pytest.mark.parametrize("places", [3, 5, 7])
def test_classes_of_tokens_are_where_the_loss_has_them(
    loss_fn: Any, kind: Any, places: int
) -> None:
    """Also where there are as many places as classes.

    Catches: time taken for classes, since it is the second axis; a shape that decides.
    """
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, (4, places), generator=generator)
    targets = torch.randint(5, (4, places), generator=generator)
    if isinstance(kind, MonteCarlo):
        kind = MonteCarlo(2, torch.Generator().manual_seed(0))
    got = FisherOperator(
        seeded(Tokens)(), loss_fn, [(tokens, targets)], kind=kind,
        likelihood="categorical",
    )  # fmt: skip
    if isinstance(kind, MonteCarlo):
        kind = MonteCarlo(2, torch.Generator().manual_seed(0))
    want = FisherOperator(seeded(ClassesSecond)(), LOSS, [(tokens, targets)], kind=kind)
    assert_close(got.to_dense(), want.to_dense(), rtol=1e-9, atol=1e-12)


def test_no_axis_of_classes_is_refused() -> None:
    """Catches: an axis guessed where the loss has none."""
    tokens = torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(3))
    model = seeded(Tokens)()
    F = FisherOperator(
        model, lambda o, t: o.square().mean(), [(tokens, tokens)],
        likelihood="categorical",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"one axis of classes, .* got axes none"):
        F @ torch.ones(F.shape[0])


def test_empirical_is_not_the_fisher_matrix() -> None:
    """Catches: one of them given for the other."""
    true = FisherOperator(seeded(mlp)(), LOSS, RAGGED).to_dense()
    empirical = FisherOperator(seeded(mlp)(), LOSS, RAGGED, kind="empirical")
    assert not torch.allclose(empirical.to_dense(), true, rtol=0.1)


def test_soft_targets_are_residuals_of_probabilities() -> None:
    """Class probabilities as targets: ``g = J'(p - q)``."""
    batches = [(x, functional.one_hot(y, 3).double()) for x, y in RAGGED]
    hard = FisherOperator(seeded(mlp)(), LOSS, RAGGED, kind="empirical")
    soft = FisherOperator(seeded(mlp)(), LOSS, batches, kind="empirical")
    assert_close(soft.to_dense(), hard.to_dense(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"kind": "exact"},
            r"'empirical' or a MonteCarlo, got 'exact'",
        ),
        ({"likelihood": "poisson"}, r"'categorical' or 'gaussian', got 'poisson'"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        FisherOperator(seeded(mlp)(), LOSS, RAGGED, **options)


def test_fewer_than_one_draw_is_refused() -> None:
    with pytest.raises(UsageError, match=r"num_samples needs to be at least 1, got 0"):
        MonteCarlo(num_samples=0)


def test_a_loss_of_ones_own_needs_the_likelihood() -> None:
    with pytest.raises(UsageError, match=r"got None and a loss that does not tell"):
        FisherOperator(seeded(mlp)(), lambda o, t: LOSS(o, t), RAGGED)


def test_outputs_without_classes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    batches = [(x, y.double()) for x, y in RAGGED]
    loss_fn = nn.BCEWithLogitsLoss()
    risk = EmpiricalRisk(model, loss_fn, [(x, (y > 1).to(x)) for x, y in batches])
    F = FisherOperator(risk, likelihood="categorical")
    with pytest.raises(UsageError, match=r"at least 2 classes .* shape \(\d,\); give"):
        F @ torch.ones(5)


def test_targets_that_are_none_of_the_likelihood_are_refused() -> None:
    F = FisherOperator(
        seeded(mlp)(), LOSS, RAGGED, kind="empirical", likelihood="gaussian"
    )
    with pytest.raises(
        UsageError, match=r"values of the shape of the outputs \(4, 3\)"
    ):
        F @ torch.ones(43)


def test_normalisers_that_do_not_add_up_are_refused() -> None:
    """Catches: weights made up where the loss's own cannot be told apart."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSS(outputs, targets)

    risk = EmpiricalRisk(
        seeded(mlp)(),
        loss_fn,
        RAGGED,
        normaliser=lambda targets: float(len(targets)) ** 2,
        check=False,
    )
    F = FisherOperator(risk, likelihood="categorical")
    with pytest.raises(UsageError, match=r"adds up over targets, got 4 from .* and 16"):
        F @ torch.ones(43)

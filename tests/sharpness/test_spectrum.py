"""Eigenvalues and traces of the Hessian against dense matrices."""

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature.operators.ggn import GGNOperator
from noisekit.sharpness.measures.eigenvalues import (
    gauge_fixed_lambda_max,
    lambda_max,
    lambda_min,
)
from noisekit.sharpness.measures.spectral_norms import (
    effective_dimension,
    hessian_frobenius_norm,
)
from noisekit.sharpness.measures.traces import hessian_trace, weighted_hessian_trace
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS


def plain() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def normalised(*, eps: float = 1e-5) -> nn.Sequential:
    """A BatchNorm network with statistics and rows that are all different."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(5, 6),
            nn.BatchNorm1d(6, eps=eps),
            nn.ReLU(),
            nn.Linear(6, 4, bias=False),
            nn.BatchNorm1d(4, eps=eps),
            nn.Tanh(),
            nn.Linear(4, 3),
        ).double()
        for norm in (model[1], model[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
    return model


def data(num_examples: int = 30) -> tuple[Tensor, Tensor]:
    generator = seeded(5)
    inputs = torch.randn(num_examples, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (num_examples,), generator=generator)


def ragged(num_first: int = 23) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = data()
    return [
        (inputs[:num_first], targets[:num_first]),
        (inputs[num_first:], targets[num_first:]),
    ]


def dense_hessian(model: nn.Module) -> Tensor:
    """The Hessian of a model in evaluation mode, every entry."""
    model.eval()
    loss = reference.flat_loss(model, LOSS, *data())
    return reference.dense_hessian(loss, reference.flat_weights(model))


def test_extreme_eigenvalues_are_those_of_the_dense_hessian() -> None:
    """Both ends of the spectrum, on ragged batches, within the bound.

    Catches: the eigenvalue of largest magnitude at both ends; averages of batch
    averages; a bound that is no bound.
    """
    values = torch.linalg.eigvalsh(dense_hessian(plain()))
    risk = EmpiricalRisk(plain(), LOSS, ragged())
    assert values[0] < -1e-3
    for got, want in (
        (lambda_max(risk, tol=1e-5, generator=seeded()), float(values[-1])),
        (lambda_min(risk, tol=1e-5, generator=seeded()), float(values[0])),
    ):
        assert got.value == pytest.approx(want, rel=1e-4)
        assert got.bound is not None
        assert abs(got.value - want) <= got.bound + 1e-12
        assert got.error_source is ErrorSource.SOLVER
        assert got.status is Status.OK
        assert got.num_matvecs > 0


def test_public_function_measures_the_parameters_it_is_told() -> None:
    """``lambda_max`` with ``params`` is that of the diagonal block.

    Catches: ``params`` that is not passed on.
    """
    block = dense_hessian(plain())[-21:, -21:]
    got = lambda_max(
        plain(), LOSS, ragged(), params="2.*", tol=1e-6, generator=seeded()
    )
    want = float(torch.linalg.eigvalsh(block)[-1])
    assert got.value == pytest.approx(want, rel=1e-5)


def test_public_functions_are_those_of_their_risks() -> None:
    """Each measures the parameters that it is told, with the draws that it is given.

    Catches: ``params`` or ``generator`` that is not passed on.
    """
    risk = EmpiricalRisk(plain(), LOSS, ragged(), params="2.*")
    for public, of_risk in (
        (lambda_min, lambda_min),
        (hessian_trace, hessian_trace),
        (hessian_frobenius_norm, hessian_frobenius_norm),
        (effective_dimension, effective_dimension),
        (weighted_hessian_trace, weighted_hessian_trace),
    ):
        want = of_risk(risk, generator=seeded())
        got = public(plain(), LOSS, ragged(), params="2.*", generator=seeded())
        assert got.value == pytest.approx(want.value, rel=1e-9)


def test_pyhessian_gives_the_same_answer() -> None:
    """The other method agrees with the dense Hessian, by another way.

    Catches: ``method`` that is ignored.
    """
    want = float(torch.linalg.eigvalsh(dense_hessian(plain()))[-1])
    risk = EmpiricalRisk(plain(), LOSS, ragged())
    got = lambda_max(risk, method="pyhessian", tol=1e-6, generator=seeded())
    ours = lambda_max(risk, tol=1e-6, generator=seeded())
    assert got.value == pytest.approx(want, rel=1e-3)
    assert got.num_matvecs != ours.num_matvecs


def test_traces_lie_within_their_error() -> None:
    """Plain and weighted trace are within four standard errors of the dense ones.

    Catches: weights that are not squared; a trace of the wrong operator.
    """
    hessian = dense_hessian(plain())
    weights = reference.flat_weights(plain())
    risk = EmpiricalRisk(plain(), LOSS, ragged())
    got = hessian_trace(risk, num_matvecs=40, generator=seeded())
    weighted = weighted_hessian_trace(risk, num_matvecs=200, generator=seeded())
    for estimate, want in (
        (got, float(hessian.trace())),
        (weighted, float(weights**2 @ hessian.diag())),
    ):
        assert estimate.stderr is not None
        assert abs(estimate.value - want) < 4 * estimate.stderr
        assert 4 * estimate.stderr < abs(want)
        assert 1 < estimate.num_samples <= estimate.num_matvecs
    assert (got.num_matvecs, weighted.num_matvecs) == (40, 200)


def test_norm_and_dimension_lie_within_their_errors() -> None:
    """Against dense eigenvalues: of the Hessian, and of Gauss-Newton.

    Catches: the square in place of the norm; a dimension of the Hessian, whose
    negative eigenvalues do not count directions.
    """
    risk = EmpiricalRisk(plain(), LOSS, ragged())
    norm = hessian_frobenius_norm(risk, num_matvecs=300, generator=seeded())
    assert abs(norm.value - float(dense_hessian(plain()).norm())) < 4 * norm.stderr
    assert 10 * norm.stderr < norm.value
    with GGNOperator(risk) as gauss_newton:
        values = torch.linalg.eigvalsh(gauss_newton.to_dense())
    dimension = effective_dimension(
        risk, shift=0.05, num_probes=60, num_steps=57, generator=seeded()
    )
    want = float((values / (values + 0.05)).sum())
    assert abs(dimension.value - want) < 4 * dimension.stderr
    assert 5 * dimension.stderr < want


def test_budget_that_is_too_small_is_told() -> None:
    """Out of products the status says so and the bound is large.

    Catches: an unconverged value that looks like a converged one.
    """
    risk = EmpiricalRisk(plain(), LOSS, ragged())
    for method in (lambda_max, lambda_min):
        got = method(risk, tol=1e-8, max_matvecs=3, generator=seeded())
        assert got.status is Status.NOT_CONVERGED
        assert got.num_matvecs == 3
    for model, measure in (
        (plain(), lambda_max),
        (normalised(), gauge_fixed_lambda_max),
    ):
        got = measure(model, LOSS, ragged(), tol=1e-8, max_matvecs=3)
        assert got.status is Status.NOT_CONVERGED
        assert got.num_matvecs == 3


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gauge_fixed_value_is_that_of_a_twin_rescaled_by_hand(eps: float) -> None:
    """It equals the dense top eigenvalue of the network with rows of norm 1.

    Catches: one norm for the whole layer; biases or statistics that do not follow; D
    and its inverse exchanged; a BatchNorm constant that is scaled with the variance;
    an error over data along the eigenvector as it is, not times D.
    """
    twin = reference.unit_row_twin(normalised(eps=eps))
    inputs, _ = data()
    with torch.no_grad():
        torch.testing.assert_close(
            twin.eval()(inputs), normalised(eps=eps).eval()(inputs), rtol=1e-9, atol=0
        )
    want = float(torch.linalg.eigvalsh(dense_hessian(twin))[-1])
    got = gauge_fixed_lambda_max(
        normalised(eps=eps),
        LOSS,
        ragged(),
        tol=1e-6,
        generator=seeded(),
        data_error=True,
    )
    by_hand = lambda_max(
        twin, LOSS, ragged(), tol=1e-6, generator=seeded(), data_error=True
    )
    assert got.stderr == pytest.approx(by_hand.stderr, rel=1e-3)
    raw = float(torch.linalg.eigvalsh(dense_hessian(normalised(eps=eps)))[-1])
    assert got.value == pytest.approx(want, rel=1e-6)
    assert raw != pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("bn", ["running", "recalibrated", "batch"])
def test_gauge_fixed_value_does_not_see_the_length_of_rows(bn: str) -> None:
    """Rows a quarter as long change the raw eigenvalue, not the gauge-fixed one.

    Catches: a measure that counts how far training has lengthened the rows.
    """
    model, shorter = normalised(eps=1e-9), normalised(eps=1e-9)
    with torch.no_grad():
        shorter[0].weight.div_(4)
        shorter[0].bias.div_(4)
        shorter[1].running_mean.div_(4)
        shorter[1].running_var.div_(16)
    risks = [EmpiricalRisk(m, LOSS, ragged(), bn=bn) for m in (model, shorter)]
    fixed = [
        gauge_fixed_lambda_max(r, tol=1e-6, generator=seeded()).value for r in risks
    ]
    raw = [lambda_max(r, tol=1e-6, generator=seeded()).value for r in risks]
    assert risks[0].value() == pytest.approx(risks[1].value(), rel=1e-4)
    assert fixed[0] == pytest.approx(fixed[1], rel=1e-3)
    assert raw[1] > 1.1 * raw[0]


class Residual(nn.Module):
    """Convolution and BatchNorm inside a module of its own, with a skip connection."""

    def __init__(self, *, early_skip: bool = False, in_place: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 3)
        self.early_skip, self.in_place = early_skip, in_place

    def forward(self, inputs: Tensor) -> Tensor:
        before = self.conv(inputs.view(-1, 1, 1, 5))
        if self.in_place:
            before += 1
        after = self.norm(before).relu() + (before if self.early_skip else 0)
        return self.head(after.mean((2, 3)))


def residual(**options: bool) -> Residual:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Residual(**options).double()


def test_rows_are_found_in_any_module() -> None:
    """A network that is no chain is measured as well, by output channels.

    Catches: looking at neighbours in a Sequential only; norms over input channels.
    """
    model = residual()
    twin = residual()
    with torch.no_grad():
        for row in range(3):
            length = model.conv.weight[row].norm()
            twin.conv.weight[row] /= length
            twin.conv.bias[row] /= length
            spread = (1 + 1e-5) / length**2
            twin.norm.running_var[row] = spread - 1e-5
    want = float(torch.linalg.eigvalsh(dense_hessian(twin))[-1])
    got = gauge_fixed_lambda_max(model, LOSS, ragged(), tol=1e-6, generator=seeded())
    assert got.value == pytest.approx(want, rel=1e-6)


def test_model_is_given_back_without_hooks() -> None:
    """Weights, statistics and mode are as before, and no hook stays behind.

    Catches: rescaling in place without undoing it; hooks left on the layers.
    """
    model = normalised().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gauge_fixed_lambda_max(model, LOSS, ragged(), generator=seeded())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_networks_without_such_rows_are_refused() -> None:
    """No BatchNorm, or none that weights feed directly, leaves nothing to fix.

    Catches: returning the raw eigenvalue under the other name; a BatchNorm fed through
    an in-place change taken as fed by the layer itself.
    """
    with pytest.raises(UsageError, match="straight into a BatchNorm, got none in Seq"):
        gauge_fixed_lambda_max(plain(), LOSS, ragged())
    with pytest.raises(UsageError, match="got none in Residual; use lambda_max"):
        gauge_fixed_lambda_max(residual(in_place=True), LOSS, ragged())


def test_rows_that_also_go_elsewhere_are_refused() -> None:
    """A skip connection before the BatchNorm makes the length of rows matter.

    Catches: a rescaling that is trusted without running the network.
    """
    with pytest.raises(UsageError, match=r"needs to keep the function.*conv\.weight"):
        gauge_fixed_lambda_max(residual(early_skip=True), LOSS, ragged())


def test_rows_of_zeros_are_refused() -> None:
    """A row without length is named.

    Catches: a division by zero that ends as NaN.
    """
    model = normalised()
    with torch.no_grad():
        model[3].weight[2] = 0
    with pytest.raises(UsageError, match=r"only zeros in row 2 of 3\.weight; prune"):
        gauge_fixed_lambda_max(model, LOSS, ragged())


def test_unknown_method_is_refused() -> None:
    """The message lists both methods.

    Catches: falling back to Lanczos without a word.
    """
    with pytest.raises(UsageError, match="'lanczos' or 'pyhessian', got 'power'"):
        lambda_max(plain(), LOSS, ragged(), method="power")


def test_data_error_of_the_top_eigenvalue_covers() -> None:
    """Over 100 samples of regression data the intervals hold the population's value.

    The spread over samples is that of the standard error.

    Catches: weights of ragged batches left out; the spread over batches for the error
    of their mean; a residual in place of a standard error.
    """
    scales = torch.tensor([1.0, 0.3, 0.2, 0.1]).sqrt().double()
    found = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(600, 4, generator=generator).double() * scales
        targets = torch.zeros(600, 1).double()
        model = nn.Linear(4, 1, bias=False).double()
        sizes = [40] * 12 + [20] * 6
        batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
        found.append(
            lambda_max(
                model, nn.MSELoss(), batches, generator=generator, data_error=True
            )
        )
    covered = sum(e.interval().contains(2.0) for e in found)
    values = torch.tensor([e.value for e in found])
    mean_error = sum(e.stderr for e in found) / len(found)
    assert covered >= 88
    assert mean_error == pytest.approx(float(values.std()), rel=0.25)
    assert found[0].error_source is ErrorSource.DATA
    assert found[0].bound is not None
    assert found[0].dof == 17


def test_data_error_needs_a_vector_and_several_batches() -> None:
    """Catches: an error of zero from one batch; PyHessian's vector given for ours."""
    inputs = torch.randn(30, 3)
    data = [(inputs, torch.zeros(30, 1))]
    single = lambda_max(nn.Linear(3, 1), nn.MSELoss(), data, data_error=True)
    assert single.stderr is None
    with pytest.raises(UsageError, match="data_error needs method='lanczos'"):
        lambda_max(
            nn.Linear(3, 1),
            nn.MSELoss(),
            data,
            method="pyhessian",
            data_error=True,
        )

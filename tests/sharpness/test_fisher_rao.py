"""The Fisher-Rao norm and relative flatness against plain loops."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import FisherOperator
from noisekit.sharpness.measures.fisher_rao import fisher_rao_norm
from noisekit.sharpness.measures.relative_flatness import (
    relative_flatness,
)
from tests.cases import CASES
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, classes, ragged, rectified, state_of


def test_norm_is_that_of_the_definition() -> None:
    """One backward pass per example and class gives the same, and its spread.

    Catches: the observed class in place of the expectation (empirical Fisher);
    averages of batch averages; the error over batches in place of examples.
    """
    inputs, _ = classes(30)
    each = np.array(reference.fisher_rao_by_class(rectified(), inputs))
    got = fisher_rao_norm(rectified(), LOSS, ragged())
    assert got.value == pytest.approx(each.mean(), rel=1e-10)
    assert got.stderr == pytest.approx(each.std(ddof=1) / math.sqrt(30), rel=1e-10)
    assert got.error_source is ErrorSource.DATA
    assert got.num_samples == 30


def test_homogeneous_networks_have_it_from_their_outputs() -> None:
    """Without biases ``J w`` is the number of layers times the outputs.

    Catches: a derivative along the normalised weights, or of one layer only.
    """
    model = rectified(bias=False)
    inputs, targets = classes(30)
    outputs = 2 * model(inputs).detach()
    chances = model(inputs).detach().softmax(1)
    mean = (chances * outputs).sum(1)
    want = float(((chances * outputs**2).sum(1) - mean**2).mean())
    got = fisher_rao_norm(model, LOSS, [(inputs, targets)])
    assert got.value == pytest.approx(want, rel=1e-12)
    goal = torch.zeros(30, 3).double()
    got = fisher_rao_norm(model, nn.MSELoss(), [(inputs, goal)])
    assert got.value == pytest.approx(float(outputs.square().mean()), rel=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if isinstance(case.loss_fn, nn.CrossEntropyLoss | nn.MSELoss)
    ],
    ids=str,
)
def test_norm_is_the_quadratic_form_of_the_fisher_matrix(case) -> None:
    """For every model and loss it is ``w . F w`` with the operator's ``F``.

    Catches: ignored tokens or class weights that count otherwise than in the loss.
    """
    risk = EmpiricalRisk(case.build(), case.loss_fn, case.batches)
    weights = risk.vector()
    with FisherOperator(risk) as fisher:
        want = float(weights @ (fisher @ weights))
    assert fisher_rao_norm(risk).value == pytest.approx(want, rel=1e-9)


def test_intervals_over_examples_cover_as_often_as_they_say() -> None:
    """Catches: an error that is too small by the root of the batch size."""
    model = rectified()
    want = fisher_rao_norm(model, LOSS, [classes(50_000)]).value
    covered = 0
    for seed in range(200):
        risk = EmpiricalRisk(model, LOSS, [classes(60, 100 + seed)], check=False)
        covered += fisher_rao_norm(risk).interval().contains(want)
    assert 0.88 <= covered / 200 <= 0.985


def test_rescaled_neurons_do_not_change_it() -> None:
    """A twin of the same function has the same norm, to rounding."""
    model, twin = rectified(), rectified()
    factors = torch.tensor([4.0, 0.25, 2.0, 8.0, 1.0, 0.5]).double()
    with torch.no_grad():
        twin[0].weight.mul_(factors[:, None])
        twin[0].bias.mul_(factors)
        twin[2].weight.div_(factors)
    values = [fisher_rao_norm(m, LOSS, ragged()).value for m in (model, twin)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_likelihoods_that_do_not_fit_are_refused() -> None:
    """Catches: a loss of one's own taken for a cross-entropy."""

    def own_loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(UsageError, match="got None of function; set likelihood="):
        fisher_rao_norm(rectified(), own_loss, ragged())
    got = fisher_rao_norm(rectified(), own_loss, ragged(), likelihood="categorical")
    assert got.value == pytest.approx(
        fisher_rao_norm(rectified(), LOSS, ragged()).value
    )
    with pytest.raises(UsageError, match="'categorical' or 'gaussian', got 'poisson'"):
        fisher_rao_norm(rectified(), LOSS, ragged(), likelihood="poisson")


class Lists(nn.Module):
    """A model that returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = rectified()

    def forward(self, inputs):
        return [self.inner(inputs)]


def test_outputs_that_are_no_tensor_are_refused() -> None:
    def first(outputs, targets):
        return LOSS(outputs[0], targets)

    with pytest.raises(UsageError, match=r"one tensor \(n, outputs, ...\), got a list"):
        fisher_rao_norm(Lists(), first, ragged(), likelihood="categorical")


def test_relative_flatness_is_that_of_the_definition() -> None:
    """Each layer's sum over pairs of rows, within its error.

    Catches: columns in place of rows; the diagonal pairs only, which is the weighted
    trace of whole rows; cross terms between layers that do not cancel.
    """
    model = rectified()
    loss = reference.flat_loss(model, LOSS, *classes(30))
    dense = reference.dense_hessian(loss, reference.flat_weights(model))
    wanted = {
        "0.weight": reference.relative_flatness_of_matrix(
            model[0].weight.detach(), dense[:30, :30]
        ),
        "2.weight": reference.relative_flatness_of_matrix(
            model[2].weight.detach(), dense[36:54, 36:54]
        ),
    }
    got = relative_flatness(model, LOSS, ragged(), num_matvecs=1500, generator=seeded())
    assert set(got) == set(wanted)
    for name, want in wanted.items():
        assert abs(got[name].value - want) < 4 * got[name].stderr, name
        assert got[name].stderr < 0.25 * abs(want), name
        assert got[name].num_matvecs == 1500


def test_relative_flatness_sees_neurons_but_not_layers() -> None:
    """With the same probes, a layer's factor changes nothing, neurons' own do.

    Catches: trusting the name: it is not invariant to every rescaling.
    """

    def values(factors: torch.Tensor) -> list[float]:
        model = rectified()
        with torch.no_grad():
            model[0].weight.mul_(factors[:, None])
            model[0].bias.mul_(factors)
            model[2].weight.div_(factors)
        risk = EmpiricalRisk(model, LOSS, ragged())
        found = relative_flatness(risk, num_matvecs=200, generator=seeded())
        return [estimate.value for estimate in found.values()]

    plain = values(torch.ones(6).double())
    layers = values(torch.full((6,), 4.0).double())
    neurons = values(torch.tensor([4.0, 0.25, 2.0, 8.0, 1.0, 0.5]).double())
    assert layers == pytest.approx(plain, rel=1e-9)
    assert neurons[1] != pytest.approx(plain[1], rel=0.2)


def test_models_are_given_back_and_too_little_is_refused() -> None:
    model = rectified(norm=True).train()
    before = state_of(model)
    relative_flatness(model, LOSS, ragged(), num_matvecs=2, generator=seeded())
    fisher_rao_norm(model, LOSS, ragged())
    assert state_of(model) == before
    with pytest.raises(UsageError, match="at least two axes, got none"):
        relative_flatness(rectified(), LOSS, ragged(), params="*bias")
    with pytest.raises(UsageError, match="at least 2 for an error estimate, got 1"):
        relative_flatness(rectified(), LOSS, ragged(), num_matvecs=1)

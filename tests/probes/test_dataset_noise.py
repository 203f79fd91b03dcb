"""Gradient noise at frozen weights, and the self-check."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import (
    BatchSizeError,
    CoupledExamplesError,
    LayerReadError,
    UsageError,
)
from noisekit.core.layers.chunks import chunk_sq_norms
from noisekit.core.risk import EmpiricalRisk
from noisekit.integrations import attach
from noisekit.probes import example_sq_norms, gradient_noise, self_check
from tests.probes.models import CASES as ALL_CASES
from tests.probes.models import MLP, Case, dropout_model
from tests.reference import noise as reference

# Reentrant checkpoints cannot be differentiated by torch.autograd.grad.
CASES = [case for case in ALL_CASES if "reentrant" not in case.name]
IDS = [case.name for case in CASES]
Batches = list[tuple[Tensor, Tensor]]


def ragged(case: Case) -> Batches:
    """Two batches of different sizes."""
    inputs, targets = case.data()
    more, classes = case.data(seed=3)
    return [(inputs, targets), (more[:-2], classes[:-2])]


def joined(batches: Batches) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_noise_of_a_data_set(case: Case, reduction: str) -> None:
    """Catches: equal weights for batches of unequal size; a sum loss scaled wrongly."""
    model, batches = case.model().eval(), ragged(case)
    noise = gradient_noise(model, nn.CrossEntropyLoss(reduction=reduction), batches)
    inputs, targets = joined(batches)
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    rows = list(grads.values())
    expected = torch.cat([g.flatten(1) for g in rows], 1)
    torch.testing.assert_close(noise.example_sq_norms, expected.square().sum(1))
    mean = float(expected.mean(0).square().sum())
    assert noise.grad_sq_norm.value == pytest.approx(mean)
    trace, norm = reference.variance_trace(rows), reference.debiased_grad_sq_norm(rows)
    assert noise.variance_trace.value == pytest.approx(trace)
    assert noise.debiased_grad_sq_norm.value == pytest.approx(norm)


def test_errors_are_those_of_the_jackknife() -> None:
    """Catches: inner products of another direction, or of the last batch alone."""
    model, batches = MLP.model(), ragged(MLP)
    noise = gradient_noise(model, nn.CrossEntropyLoss(), batches)
    grads = reference.example_gradients(
        model, functional.cross_entropy, *joined(batches)
    )
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    left_out = [
        [reference.variance_trace([part]), reference.debiased_grad_sq_norm([part])]
        for i in range(len(rows))
        for part in (torch.cat([rows[:i], rows[i + 1 :]]),)
    ]
    n = len(rows)
    spread = torch.tensor(left_out).var(0, correction=0) * (n - 1)
    assert noise.variance_trace.stderr == pytest.approx(
        float(spread[0].sqrt()), rel=1e-4
    )
    error = noise.debiased_grad_sq_norm.stderr
    assert error == pytest.approx(float(spread[1].sqrt()), rel=1e-4)


def test_the_model_is_given_back() -> None:
    """Catches: gradients, modes or hooks left behind."""
    model = dropout_model().double().train()
    inputs, targets = MLP.data()
    functional.cross_entropy(model(inputs), targets).backward()
    grads = [p.grad for p in model.parameters()]
    state = torch.get_rng_state()
    gradient_noise(model, nn.CrossEntropyLoss(), [(inputs, targets)])
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert model[1].training
    assert not any(module._forward_hooks for module in model.modules())


def test_an_attached_probe_does_not_see_a_measurement() -> None:
    """Catches: frozen-weight passes counted into a training step."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    functional.cross_entropy(model(inputs), targets).backward()
    gradient_noise(model, nn.CrossEntropyLoss(), [(inputs, targets)])
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    assert probe.readings[0].batch_size == 2 * len(inputs)
    assert probe.readings[0].coverage.complete


def test_norms_alone() -> None:
    """Catches: another order than the batches'."""
    model, batches = MLP.model(), ragged(MLP)
    found = example_sq_norms(model, nn.CrossEntropyLoss(), batches, params="2.*")
    grads = reference.example_gradients(
        model, functional.cross_entropy, *joined(batches)
    )
    expected = sum(
        norms for name, norms in reference.sq_norms(grads).items() if name[0] == "2"
    )
    torch.testing.assert_close(found, expected)


def test_recalibrated_batch_norm_is_allowed_and_batch_statistics_are_not() -> None:
    """Catches: rows of a coupled batch read as examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    batches = ragged(MLP)
    loss = nn.CrossEntropyLoss()
    assert gradient_noise(model, loss, batches, bn="recalibrated").num_examples == 10
    with pytest.raises(CoupledExamplesError, match="got bn='batch', which couples"):
        gradient_noise(model, loss, batches, bn="batch")


def test_two_examples_have_no_error() -> None:
    inputs, targets = MLP.data()
    with pytest.raises(BatchSizeError, match="needs 3 examples, got 2"):
        gradient_noise(MLP.model(), nn.CrossEntropyLoss(), [(inputs[:2], targets[:2])])


def test_a_loss_that_calls_the_model_twice_is_refused() -> None:
    """Catches: two passes read as one."""
    model, (inputs, targets) = MLP.model(), MLP.data()

    def loss(outputs: Tensor, classes: Tensor) -> Tensor:
        again = model(torch.zeros(len(outputs), 6, dtype=outputs.dtype))
        return functional.cross_entropy(outputs + again, classes)

    with pytest.raises(LayerReadError, match="2 forward passes went into one backward"):
        example_sq_norms(model, loss, [(inputs, targets)])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_self_check_passes_where_the_probe_is_right(case: Case) -> None:
    """Catches: a brute force that runs another model or another loss."""
    model = case.model(torch.float32)
    check = self_check(model, nn.CrossEntropyLoss(), case.data(torch.float32))
    assert check.passed, str(check)
    assert "the probe agrees with brute force on" in str(check)


def test_the_self_check_fails_where_examples_see_each_other() -> None:
    """A layer may couple gradients alone; the closure check cannot see that.

    Catches: a self-check that compares the probe with itself.
    """

    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.layer(x)
            return outputs + (outputs.mean(0) - outputs.mean(0).detach())

    torch.manual_seed(0)
    check = self_check(Coupled(), nn.CrossEntropyLoss(), MLP.data(torch.float32))
    assert not check.passed
    assert "the probe disagrees with brute force on 6 examples" in str(check)


def test_the_self_check_is_of_every_estimator() -> None:
    """Catches: an estimator that no user's model is ever checked with."""
    check = self_check(MLP.model(), nn.CrossEntropyLoss(), MLP.data())
    names = {"rows", "chunks", "accumulation", "random_signs"}
    assert set(check.estimators) == names
    assert max(check.estimators.values()) < 1e-10


def test_the_self_check_knows_weighted_losses() -> None:
    """Catches: single examples' losses compared as if all weighed the same."""
    weight = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(weight=weight, reduction=reduction)
        check = self_check(MLP.model(), loss, MLP.data())
        assert check.passed, str(check)


def test_a_wrong_estimator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a verdict on per-example norms alone."""

    def doubled(site, call, names, chunks):
        found = chunk_sq_norms(site, call, names, chunks)
        return {name: 2 * norms for name, norms in found.items()}

    monkeypatch.setattr("noisekit.probes.capture.unit_norms.chunk_sq_norms", doubled)
    check = self_check(MLP.model(), nn.CrossEntropyLoss(), MLP.data())
    assert not check.passed
    assert "largest relative error 1.0e+00 (estimator chunks; tolerance" in str(check)


def test_printed_noise_is_a_few_lines() -> None:
    """Catches: every example's norm on the screen."""
    noise = gradient_noise(MLP.model(), nn.CrossEntropyLoss(), ragged(MLP))
    assert str(noise).splitlines() == [
        f"gradient noise of {noise.num_examples} examples:",
        f"  simple noise scale: {noise.simple_noise_scale}",
        f"  tr Σ: {noise.variance_trace}",
        f"  |G|²: {noise.debiased_grad_sq_norm}",
    ]
    assert "tensor" not in repr(noise)


def test_a_risk_takes_the_place_of_model_loss_and_data() -> None:
    """With the parameters of the risk, or some of them; the data are read once.

    Catches: all parameters measured where the risk has a part of them; a second risk
    built from the first.
    """
    model, (inputs, targets) = MLP.model(), MLP.data()
    passes = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        passes.append(1)
        yield from zip(inputs.split(3), targets.split(3), strict=True)

    class Data:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return batches()

    risk = EmpiricalRisk(model, functional.cross_entropy, Data(), params="2.*")
    built = len(passes)
    noise = gradient_noise(risk)
    wanted = gradient_noise(model, functional.cross_entropy, Data(), params="2.*")
    assert str(noise) == str(wanted)
    assert list(noise.coverage) == ["2.weight", "2.bias"]
    assert len(passes) == built + built
    one = example_sq_norms(risk, params="2.bias")
    assert one.sum() < noise.example_sq_norms.sum()
    check = self_check(risk)
    assert check.passed
    assert check.num_examples == 3
    with pytest.raises(UsageError, match="got loss_fn= beside it"):
        gradient_noise(risk, functional.cross_entropy)

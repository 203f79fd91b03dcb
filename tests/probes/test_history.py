"""Readings of a training step against one backward pass per example."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.results import Status
from noisekit.integrations import attach
from noisekit.probes import Reading
from tests.probes.models import CASES, IDS, MLP, Case, random_attention
from tests.reference import noise as reference

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def read(model: nn.Module, loss: Loss, batches: list, **options: object) -> Reading:
    """The reading of a step over the micro-batches; sites may have to widen first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, **options) as probe:  # type: ignore[arg-type]
        for _ in range(4):
            optimizer.zero_grad()
            for inputs, targets in batches:
                loss(model(inputs), targets).backward()
            optimizer.step()
            if probe.readings[-1].coverage.complete:
                break
    return probe.readings[-1]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reading_is_one_backward_per_example(case: Case, reduction: str) -> None:
    """The table of models against the slow loop, in total and per parameter.

    Catches: cross terms of shared weights lost, time taken for examples, the scale of
    a sum loss, a layer that is used behind its module's back.
    """
    model, (inputs, targets) = case.model(), case.data()
    loss = mean_loss if reduction == "mean" else sum_loss
    reading = read(model, loss, [(inputs, targets)], loss_reduction=reduction)
    assert reading.coverage.reason is None
    assert set(reading.coverage.methods.values()) == case.ways
    grads = reference.example_gradients(model, mean_loss, inputs, targets)
    rows = list(grads.values())
    expected = sum(norms for norms in reference.sq_norms(grads).values())
    assert reading.example_sq_norms is not None
    torch.testing.assert_close(reading.example_sq_norms, expected, rtol=1e-6, atol=0)
    mean = sum(float(g.mean(0).square().sum()) for g in rows)
    assert reading.grad_sq_norm.value == pytest.approx(mean, rel=1e-6)
    trace = reference.variance_trace(rows)
    assert reading.variance_trace.value == pytest.approx(trace, rel=1e-6)
    norm = reference.debiased_grad_sq_norm(rows)
    assert reading.debiased_grad_sq_norm.value == pytest.approx(norm, rel=1e-5)
    for layer in reading.layers:
        own = reference.variance_trace([grads[layer.name]])
        assert layer.variance_trace.value == pytest.approx(own, rel=1e-5, abs=1e-14)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float32_reading(case: Case) -> None:
    """Catches: sums accumulated below float32."""
    model, (inputs, targets) = case.model(torch.float32), case.data(torch.float32)
    reading = read(model, mean_loss, [(inputs, targets)])
    double, (wide, _) = case.model(), case.data()
    grads = reference.example_gradients(double, mean_loss, wide, targets)
    expected = reference.variance_trace(list(grads.values()))
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", [MLP, CASES[1], CASES[3]], ids=lambda c: c.name)
def test_accumulated_micro_batches_are_one_step(case: Case, reduction: str) -> None:
    """Catches: the last micro-batch's norms against the whole step's gradient."""
    model = case.model()
    parts = [case.data(seed=seed) for seed in (2, 3, 4)]
    count = len(parts)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if reduction == "sum":
            return sum_loss(outputs, targets)
        return mean_loss(outputs, targets) / count

    reading = read(model, loss, parts, loss_reduction=reduction)
    inputs, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    grads = reference.example_gradients(model, mean_loss, inputs, targets)
    rows = list(grads.values())
    assert reading.batch_size == len(inputs)
    trace = reference.variance_trace(rows)
    assert reading.variance_trace.value == pytest.approx(trace, rel=1e-6)
    mean = sum(float(g.mean(0).square().sum()) for g in rows)
    assert reading.grad_sq_norm.value == pytest.approx(mean, rel=1e-6)


def test_unequal_micro_batches_of_a_mean_loss_weigh_the_same() -> None:
    """Examples of a smaller micro-batch then weigh more.

    Catches: dividing by the number of examples as if they weighed the same.
    """
    model = MLP.model()
    inputs, targets = MLP.data()
    parts = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    reading = read(model, lambda o, t: mean_loss(o, t) / 2, parts)
    grads = reference.example_gradients(model, mean_loss, inputs, targets)
    weights = torch.tensor([1 / 8] * 4 + [1 / 4] * 2, dtype=torch.float64)
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    effective = 1 / float(weights.square().sum())
    spread = effective * float((weights**2 * rows.square().sum(1)).sum())
    mean = float((weights[:, None] * rows).sum(0).square().sum())
    expected = (spread - mean) / (1 - 1 / effective)
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(reading.example_sq_norms, rows.square().sum(1))
    assert reading.coverage.note is not None
    assert "micro-batches of 2 to 4 examples weigh the same" in reading.coverage.note


def test_micro_batches_may_weigh_by_their_size() -> None:
    """Catches: the equal weights of a plain mean taken for unequal ones."""
    model = MLP.model()
    inputs, targets = MLP.data()
    parts = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    reading = read(
        model,
        lambda o, t: mean_loss(o, t) * len(t) / 6,
        parts,
        microbatch_weights="by_size",
    )
    grads = reference.example_gradients(model, mean_loss, inputs, targets)
    expected = reference.variance_trace(list(grads.values()))
    assert reading.variance_trace.value == pytest.approx(expected)
    assert reading.coverage.note is None


def test_batch_axis_may_be_another() -> None:
    """Catches: ``batch_dim`` ignored."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.layer(x).tanh().sum(0)
            return hidden

    torch.manual_seed(0)
    model = TimeFirst().double()
    inputs = torch.randn(7, 5, 4, dtype=torch.float64)
    targets = torch.randint(3, (5,))
    reading = read(model, mean_loss, [(inputs, targets)], batch_dim=1)
    grads = reference.example_gradients(model, mean_loss, inputs, targets, batch_dim=1)
    expected = reference.variance_trace(list(grads.values()))
    assert reading.batch_size == 5
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)


def test_random_layers_are_read_with_the_draws_of_the_step() -> None:
    """Dropout inside attention: the step's own masks, one masked gradient each.

    Catches: replaying single examples, which draws other masks.
    """
    torch.manual_seed(1)
    model = random_attention().double()
    inputs, targets = CASES[5].data()
    reading = read_with_seed(model, inputs, targets, seed=3)
    torch.manual_seed(3)
    outputs = model(inputs)
    named = dict(model.named_parameters())
    expected = []
    for i in range(len(inputs)):
        own = functional.cross_entropy(outputs[i : i + 1], targets[i : i + 1])
        grads = torch.autograd.grad(own, list(named.values()), retain_graph=True)
        expected.append(sum(g.square().sum() for g in grads[1:]))  # all but the table
    found = reading.example_sq_norms
    torch.testing.assert_close(found, torch.stack(expected))


def read_with_seed(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, seed: int
) -> Reading:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, params=["attention.*", "head.*"]) as probe:
        torch.manual_seed(seed)
        mean_loss(model(inputs), targets).backward()
        optimizer.step()
    return probe.readings[0]


def test_random_replay_leaves_the_random_state_alone() -> None:
    """Catches: a replay that sets the generator back to before the step."""
    model = random_attention().double()
    inputs, targets = CASES[5].data()
    states = []
    for probed in (False, True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        probe = attach(model, optimizer) if probed else None
        torch.manual_seed(3)
        mean_loss(model(inputs), targets).backward()
        states.append(torch.get_rng_state())
        if probe is not None:
            probe.detach()
    assert torch.equal(*states)


def test_chosen_parameters_only() -> None:
    """Catches: ``params`` that selects layers but sums all of them."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    reading = read(model, mean_loss, [(inputs, targets)], params="2.*")
    grads = reference.example_gradients(model, mean_loss, inputs, targets)
    chosen = [grads["2.weight"], grads["2.bias"]]
    assert [layer.name for layer in reading.layers] == ["2.weight", "2.bias"]
    expected = reference.variance_trace(chosen)
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)


def test_a_time_axis_as_long_as_the_batch_is_told_apart_at_one_batch_size() -> None:
    """A model of one batch size only, which no smaller batch could tell.

    Catches: the first axis taken, which gives a fraction of the truth.
    """

    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.layer(x.view(4, 4, 3).transpose(0, 1)).sum(0)
            return hidden

    torch.manual_seed(0)
    model, inputs = OneSize().double(), torch.randn(4, 4, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    losses = model(inputs).square().sum(1)
    parameters = list(model.parameters())
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    losses.mean().backward()
    optimizer.step()
    expected = reference.variance_trace([torch.stack(rows)])
    assert probe.readings[0].variance_trace.value == pytest.approx(expected, rel=1e-9)


def test_one_example_has_a_gradient_but_no_noise() -> None:
    """Catches: a division by n - 1 = 0."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    reading = read_once(model, inputs[:1], targets[:1])
    assert reading.grad_sq_norm.value > 0
    assert reading.variance_trace.status is Status.UNAVAILABLE
    assert reading.coverage.reason == "noise needs 2 examples per step, got 1"


def test_micro_batches_of_one_example_make_a_step() -> None:
    """Catches: refusing a pass of one example although the step has more."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    parts = [(inputs[i : i + 1], targets[i : i + 1]) for i in range(6)]
    reading = read(model, lambda o, t: mean_loss(o, t) / 6, parts)
    grads = reference.example_gradients(model, mean_loss, inputs, targets)
    expected = reference.variance_trace(list(grads.values()))
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)


def read_once(model: nn.Module, inputs: Tensor, targets: Tensor) -> Reading:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer) as probe:
        mean_loss(model(inputs), targets).backward()
        optimizer.step()
    return probe.readings[0]


def test_a_row_has_plain_values_and_the_statistics_behind_them() -> None:
    """Catches: tensors in a row; statistics from which the values do not follow."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    row = read(model, mean_loss, [(inputs, targets)]).row()
    assert all(type(value) in (int, float, str) for value in row.values())
    n = row["num_units"]
    trace = n * (row["mean_sq_norm"] - row["grad_sq_norm"]) / (n - 1)
    assert row["variance_trace"] == pytest.approx(trace)
    assert row["estimator"] == "per_example"
    assert row["unit"] == "example"

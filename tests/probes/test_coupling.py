"""BatchNorm in training mode: no per-example readings, ghost batches instead."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import BatchSizeError, CoupledExamplesError
from noisekit.core.results import Status
from noisekit.integrations import attach
from noisekit.probes.capture.step_weights import LossReduction
from tests.reference import noise as reference


def build(*, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ).to(dtype)


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


def ghost_gradients(
    model: nn.Module, inputs: Tensor, targets: Tensor, size: int
) -> Tensor:
    rows = []
    for part, classes in zip(inputs.split(size), targets.split(size), strict=True):
        loss = functional.cross_entropy(model(part), classes)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_coupled_examples_have_a_gradient_but_no_noise() -> None:
    """Catches: rows of the batch read as examples, which is biased."""
    model, (inputs, targets) = build(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    functional.cross_entropy(model(inputs), targets).backward()
    norm = sum(float(p.grad.square().sum()) for p in model.parameters())
    optimizer.step()
    reading = probe.readings[0]
    assert reading.grad_sq_norm.value == pytest.approx(norm)
    for estimate in (
        reading.variance_trace,
        reading.debiased_grad_sq_norm,
        reading.simple_noise_scale,
    ):
        assert estimate.status is Status.UNAVAILABLE
    assert reading.example_sq_norms is None
    reason = "BatchNorm in training mode couples the examples (1)"
    assert reading.coverage.reason == reason
    assert probe.simple_noise_scale().status is Status.UNAVAILABLE


def test_statistics_of_the_batch_couple_in_evaluation_mode_too() -> None:
    """Catches: looking at the mode alone; without running statistics it lies."""
    model = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))
    model = model.double().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    inputs, targets = data()
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    assert not probe.readings[0].coverage.complete


def test_per_example_readings_can_be_insisted_on() -> None:
    """Catches: silence where the user asked for what does not exist."""
    model, (inputs, targets) = build(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer, estimator="per_example", on_error="raise")
    message = "use estimator='ghost' with ghost_batch=, or put BatchNorm in eval"
    with pytest.raises(CoupledExamplesError, match=message):
        model(inputs)
    model.eval()
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    assert probe.readings[0].coverage.complete


@pytest.mark.parametrize("module", [True, False], ids=["module", "function"])
def test_ghost_batches_are_real_forwards_on_parts(module: bool) -> None:
    """Their covariance times their size is the noise of an example.

    Catches: parts normalised by the whole batch; a size that is left out.
    """
    model, (inputs, targets) = build(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = nn.CrossEntropyLoss() if module else functional.cross_entropy
    probe = attach(model, optimizer, estimator="ghost", ghost_batch=6, loss_fn=loss_fn)
    rows = ghost_gradients(build(), inputs, targets, 6)
    loss = loss_fn if module else probe.loss_fn
    loss(model(inputs), targets).backward()
    optimizer.step()
    reading = probe.readings[0]
    assert reading.estimator == "ghost(6)"
    assert set(reading.coverage.methods.values()) == {"ghost batches of 6"}
    trace = 6 * float(rows.var(0, correction=1).sum())
    assert reading.variance_trace.value == pytest.approx(trace)
    gram = rows @ rows.T
    norm = float(gram.sum() - gram.trace()) / 12
    assert reading.debiased_grad_sq_norm.value == pytest.approx(norm)
    row = reading.row()
    assert (row["unit"], row["unit_size"], row["num_units"]) == ("chunk", 6.0, 4)


def test_ghost_batches_of_a_sum_loss_mean_the_same() -> None:
    """Catches: gradients of a sum taken for those of a mean."""
    model, (inputs, targets) = build(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    probe = attach(
        model,
        optimizer,
        estimator="ghost",
        ghost_batch=6,
        loss_fn=loss_fn,
        loss_reduction="sum",
    )
    rows = ghost_gradients(build(), inputs, targets, 6)
    loss_fn(model(inputs), targets).backward()
    optimizer.step()
    trace = 6 * float(rows.var(0, correction=1).sum())
    assert probe.readings[0].variance_trace.value == pytest.approx(trace)


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def counts_of(targets: Tensor) -> Tensor:
    return CLASS_WEIGHTS[targets.clamp(min=0)] * (targets >= 0)


class OwnMean(nn.Module):
    """The same mean written by hand: over no example it is not a number."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        chosen = outputs.log_softmax(1).gather(1, targets.clamp(min=0)[:, None])
        losses, counts = -chosen[:, 0], counts_of(targets)
        return (counts * losses).sum() / counts.sum()


@pytest.mark.parametrize("kind", ["mean", "sum", "own"])
def test_ghost_batches_weigh_by_what_their_examples_count(kind: str) -> None:
    """Class weights and ignored targets: a ghost batch has fewer effective examples.

    Catches: every ghost batch weighing the same; a ghost batch without any example
    that counts, whose mean is not a number; sizes as if all examples counted.
    """
    model, (inputs, targets) = build(), data(18)
    targets[12:] = -100
    targets[:6] = torch.tensor([0, 0, 1, 2, 2, 2])
    own = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    rows = []
    for part, classes in zip(inputs[:12].split(6), targets[:12].split(6), strict=True):
        twin = build()
        grads = torch.autograd.grad(own(twin(part), classes), list(twin.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    counts = CLASS_WEIGHTS[targets[:12]].view(2, 6)
    weights = counts.sum(1) / counts.sum()
    sizes = counts.sum(1).square() / counts.square().sum(1)
    expected = reference.unit_noise(torch.stack(rows), weights, sizes)
    reduction: LossReduction = "sum" if kind == "sum" else "mean"
    known = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction=reduction)
    loss = OwnMean() if kind == "own" else known
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(
        model,
        optimizer,
        estimator="ghost",
        ghost_batch=6,
        loss_fn=loss,
        loss_reduction=reduction,
        example_weights=counts_of if kind == "own" else None,
    )
    loss(model(inputs), targets).backward()
    optimizer.step()
    (reading,) = probe.readings
    found = (reading.variance_trace.value, reading.debiased_grad_sq_norm.value)
    assert found == pytest.approx(expected)
    assert reading.estimator == "ghost(6)"
    assert reading.row()["unit_size"] < 6
    assert reading.row()["weight_sq_sum"] == pytest.approx(
        float(weights.square().sum())
    )


def test_ghost_batches_change_no_bit_of_the_training() -> None:
    """Catches: running statistics or random numbers used up by the replay."""
    results = []
    for probed in (False, True):
        model = nn.Sequential(build(dtype=torch.float32), nn.Dropout(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_fn = nn.CrossEntropyLoss()
        if probed:
            attach(model, optimizer, estimator="ghost", ghost_batch=6, loss_fn=loss_fn)
        inputs, targets = data()
        torch.manual_seed(7)
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(model(inputs.float()), targets).backward()
            optimizer.step()
        results.append((model.state_dict(), torch.get_rng_state()))
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name]), name
    assert torch.equal(results[0][1], results[1][1])


def test_a_loss_that_the_probe_does_not_see_is_named() -> None:
    """Catches: a reading without noise that does not say what to do."""
    model, (inputs, targets) = build(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(
        model,
        optimizer,
        estimator="ghost",
        ghost_batch=6,
        loss_fn=functional.cross_entropy,
    )
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    reason = "the loss was not called through probe.loss_fn"
    assert probe.readings[0].coverage.reason == reason


def test_a_ragged_batch_without_two_ghosts_is_noted_while_training() -> None:
    """Catches: a long run that dies at the last batch of its first epoch."""
    model, (inputs, targets) = build(), data(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = nn.CrossEntropyLoss()
    probe = attach(model, optimizer, estimator="ghost", ghost_batch=6, loss_fn=loss_fn)
    loss_fn(model(inputs), targets).backward()
    optimizer.step()
    assert probe.readings[0].coverage.reason is not None
    message = (
        r"needs two of 6 examples, got a batch of 8; use a ghost_batch of at most 4"
    )
    with pytest.raises(BatchSizeError, match=message):
        probe.measure(inputs, targets)


def test_ghost_batches_are_replayed_on_schedule_only() -> None:
    """Catches: a replay at each step whatever ``every`` says."""
    model, (inputs, targets) = build(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = nn.CrossEntropyLoss()
    calls = []
    loss_fn.register_forward_hook(lambda *_: calls.append(1))
    attach(model, optimizer, estimator="ghost", ghost_batch=6, loss_fn=loss_fn, every=3)
    for _ in range(3):
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 3 + 4

"""A noise scale does not depend on how the loop writes its loss."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import NormaliserError
from noisekit.core.results import Status
from noisekit.integrations import attach
from noisekit.probes import Reading
from tests.probes.models import MLP, Case
from tests.reference import noise as reference

BATCH = Case("batch", MLP.build, (24, 6), MLP.ways)
NAMES = ("per_example", "rows", "chunks", "accumulation", "random_signs")


def step(
    *, reduction: str, parts: int, loss_scale: float, names: tuple[str, ...] = NAMES
) -> Reading:
    """One step over the same 24 examples, however the loop cuts and scales it."""
    model, (inputs, targets) = BATCH.model(), BATCH.data()
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(
        model,
        optimizer,
        estimator=names,
        loss_reduction=reduction,  # type: ignore[arg-type]
        num_chunks=24 // parts,
        row_share=1.0,
        scaler=scaler,
    )
    for part, classes in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        loss = functional.cross_entropy(model(part), classes, reduction=reduction)
        scaler.scale(loss / (parts if reduction == "mean" else 1)).backward()
    scaler.step(optimizer)
    return probe.readings[0]


WAYS = list(itertools.product(["mean", "sum"], [1, 2, 4], [1.0, 1024.0]))


@pytest.mark.parametrize(("reduction", "parts", "loss_scale"), WAYS)
def test_reduction_accumulation_and_loss_scale_change_nothing(
    reduction: str, parts: int, loss_scale: float
) -> None:
    """Per-example, all rows, and chunks of one example give the batch's covariance.

    Catches: absolute norms of a sum; the square of the loss scale left in; weights
    within a micro-batch taken for those in the step.
    """
    model = BATCH.model()
    grads = reference.example_gradients(model, functional.cross_entropy, *BATCH.data())
    trace = reference.variance_trace(list(grads.values()))
    norm = reference.debiased_grad_sq_norm(list(grads.values()))
    found = step(reduction=reduction, parts=parts, loss_scale=loss_scale)
    for name in ("per_example", "rows", "chunks"):
        noise = found.noise(name)
        assert noise is not None
        assert noise.variance_trace.value == pytest.approx(trace, rel=1e-9), name
        assert noise.debiased_grad_sq_norm.value == pytest.approx(norm, rel=1e-7), name


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_and_signs_are_as_invariant(parts: int) -> None:
    """Catches: a scale of the reduction in estimators that see gradients only."""
    traces = [
        [
            noise.variance_trace.value
            for name in ("accumulation", "random_signs")
            for noise in (reading.noise(name),)
            if noise is not None
        ]
        for reduction, loss_scale in itertools.product(["mean", "sum"], [1.0, 1024.0])
        for reading in (step(reduction=reduction, parts=parts, loss_scale=loss_scale),)
    ]
    assert all(found == pytest.approx(traces[0], rel=1e-9) for found in traces)
    assert len(traces[0]) == 2


# ------------------------------------------------------------------ weighted losses


def weighted_rows(
    model: nn.Module, inputs: Tensor, targets: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Each example's own gradient, and its weight in a mean that counts ``counts``."""
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    return torch.cat([g.flatten(1) for g in grads.values()], 1), counts / counts.sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_leave_fewer_effective_examples(reduction: str) -> None:
    """Catches: ``n`` where ``1 / sum w²`` belongs."""
    model, (inputs, targets) = BATCH.model(), BATCH.data()
    class_weights = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=class_weights, reduction=reduction)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(
        model,
        optimizer,
        loss_fn=loss,
        estimator=NAMES,
        row_share=1.0,
        loss_reduction=reduction,  # type: ignore[arg-type]
    )
    counts = class_weights[targets]
    rows, weights = weighted_rows(BATCH.model(), inputs, targets, counts)
    loss(model(inputs), targets).backward()
    optimizer.step()
    reading = probe.readings[0]
    trace, norm = reference.unit_noise(rows, weights)
    for name in ("per_example", "rows"):
        noise = reading.noise(name)
        assert noise is not None
        assert noise.variance_trace.value == pytest.approx(trace, rel=1e-5)
        assert noise.debiased_grad_sq_norm.value == pytest.approx(norm, rel=1e-5)
    assert reading.example_sq_norms is not None
    own = rows.square().sum(1)
    torch.testing.assert_close(reading.example_sq_norms, own, rtol=1e-5, atol=0)
    chunks = (weights[:, None] * rows).view(4, 6, -1).sum(1)
    sums = weights.view(4, 6).sum(1)
    sizes = sums**2 / weights.view(4, 6).square().sum(1)
    expected = reference.unit_noise(chunks / sums[:, None], sums, sizes)
    found = reading.noise("chunks")
    assert found is not None
    assert found.variance_trace.value == pytest.approx(expected[0], rel=1e-5)


def test_class_weights_across_micro_batches() -> None:
    """Each mean divides by its own weights.

    Catches: one normaliser for the step, where each micro-batch has its own.
    """
    model, (inputs, targets) = BATCH.model(), BATCH.data()
    class_weights = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=class_weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer, loss_fn=loss)
    for part, classes in zip(inputs.chunk(2), targets.chunk(2), strict=True):
        (loss(model(part), classes) / 2).backward()
    optimizer.step()
    counts = class_weights[targets].view(2, 12)
    weights = (counts / counts.sum(1, keepdim=True) / 2).flatten()
    rows, _ = weighted_rows(BATCH.model(), inputs, targets, counts.flatten())
    trace, _ = reference.unit_noise(rows, weights)
    assert probe.readings[0].variance_trace.value == pytest.approx(trace, rel=1e-5)


class Tagger(nn.Module):
    """Scores for every token of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.embedding(tokens).tanh())
        return scores.transpose(1, 2)  # classes on axis 1, as cross-entropy wants


def test_sequences_weigh_by_their_counted_tokens() -> None:
    """A mean over tokens that are not ignored: longer sequences weigh more.

    Catches: sequences that weigh the same; a sequence of padding alone dividing by 0.
    """
    torch.manual_seed(0)
    model = Tagger().double()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (6, 5), generator=generator)
    targets = torch.randint(4, (6, 5), generator=generator)
    lengths = [5, 4, 3, 2, 1, 0]
    for row, length in zip(targets, lengths, strict=True):
        row[length:] = -100
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer, loss_fn=loss, unit="sequence")
    loss(model(tokens), targets).backward()
    optimizer.step()
    rows = []
    for one, classes, length in zip(tokens[:5], targets, lengths, strict=False):
        own = functional.cross_entropy(model(one[None]), classes[None])
        grads = torch.autograd.grad(own, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
        assert length
    weights = torch.tensor(lengths[:5], dtype=torch.float64) / 15
    trace, norm = reference.unit_noise(torch.stack(rows), weights)
    reading = probe.readings[0]
    assert reading.variance_trace.value == pytest.approx(trace, rel=1e-5)
    assert reading.debiased_grad_sq_norm.value == pytest.approx(norm, rel=1e-5)
    assert reading.row()["unit"] == reading.unit == "sequence"
    assert reading.example_sq_norms is not None
    assert float(reading.example_sq_norms[5]) == 0.0


def test_a_batch_of_one_counted_example_has_no_noise() -> None:
    """Catches: a division by ``1 - 1/n`` with one effective example."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer, loss_fn=loss)
    targets = targets.clone()
    targets[1:] = -100
    loss(model(inputs), targets).backward()
    optimizer.step()
    assert probe.readings[0].variance_trace.status is Status.UNAVAILABLE


def test_weights_of_a_loss_of_one_s_own() -> None:
    """Catches: a function that is taken and never called."""
    model, (inputs, targets) = BATCH.model(), BATCH.data()
    counts = torch.linspace(0.1, 2.0, 24, dtype=torch.float64)

    def loss(outputs: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        classes, weights = pair
        own = functional.cross_entropy(outputs, classes, reduction="none")
        return (own * weights).sum() / weights.sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer, loss_fn=loss, example_weights=lambda pair: pair[1])
    probe.loss_fn(model(inputs), (targets, counts)).backward()
    optimizer.step()
    rows, weights = weighted_rows(BATCH.model(), inputs, targets, counts)
    trace, _ = reference.unit_noise(rows, weights)
    assert probe.readings[0].variance_trace.value == pytest.approx(trace, rel=1e-9)
    measured = probe.measure(inputs, (targets, counts))
    assert measured.variance_trace.value == pytest.approx(trace, rel=1e-9)


def test_weights_need_one_number_per_example() -> None:
    """Catches: a broadcast over the wrong axis."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(
        model,
        optimizer,
        loss_fn=functional.cross_entropy,
        example_weights=lambda classes: torch.ones(len(classes), 1),
        on_error="raise",
    )
    with pytest.raises(NormaliserError, match=r"shape \(6,\), .* got \(6, 1\)"):
        probe.loss_fn(model(inputs), targets)

"""Every estimator on a training step, against gradients taken one unit at a time."""

import itertools
from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import CoupledExamplesError
from noisekit.core.layers.linear import LinearRule
from noisekit.core.layers.rule import LayerCall
from noisekit.integrations import attach
from noisekit.probes import Probe, Reading
from noisekit.probes.capture.microbatch_gradients import OwnGradients
from tests.probes.models import CASES, MLP, Case, random_attention
from tests.reference import noise as reference

Batches = list[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]

# Reentrant checkpoints cannot be differentiated a second time.
READ = [case for case in CASES if "reentrant" not in case.name]


def attached(model: nn.Module, **options: object) -> tuple[Probe, torch.optim.SGD]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return attach(model, optimizer, **options), optimizer  # type: ignore[arg-type]


def read(
    model: nn.Module,
    batches: Batches,
    loss: Loss = functional.cross_entropy,
    **options: object,
) -> Reading:
    """The first reading in which every site is read; sites may have to widen."""
    probe, optimizer = attached(model, **options)
    with probe:
        for _ in range(4):
            optimizer.zero_grad()
            for inputs, targets in batches:
                (loss(model(inputs), targets) / len(batches)).backward()
            optimizer.step()
            if probe.readings[-1].coverage.complete:
                break
    assert probe.readings[-1].coverage.reason is None
    return probe.readings[-1]


def rows_of(case: Case, model: nn.Module) -> Tensor:
    """Gradients of the case's examples, ``(N, P)``."""
    grads = reference.example_gradients(model, functional.cross_entropy, *case.data())
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


def assert_noise(reading: Reading, name: str, expected: tuple[float, float]) -> None:
    found = reading.noise(name)
    assert found is not None, reading.coverage.missing
    assert found.variance_trace.value == pytest.approx(expected[0], rel=1e-6)
    assert found.debiased_grad_sq_norm.value == pytest.approx(expected[1], rel=1e-5)


# ------------------------------------------------------------------ rows of the batch


@pytest.mark.parametrize("case", READ, ids=lambda c: c.name)
def test_rows_are_a_random_subset(case: Case) -> None:
    """The chosen examples' norms stand for all; the gradient's norm is the whole's.

    Catches: other rows in each layer; shared weights without their cross terms; the
    norm of the subset's gradient in place of the batch's.
    """
    model, n = case.model(), case.data()[0].shape[case.batch_dim]
    reading = read(model, [case.data()], estimator="rows", row_share=0.5)
    rows = rows_of(case, model)
    drawn = torch.Generator().manual_seed(0)
    possible = []
    for _ in range(4):  # one draw per reading, until every site was found
        chosen = torch.randperm(n, generator=drawn)[: round(n / 2)]
        mean_sq = float(rows[chosen].square().sum(1).mean())
        norm = float(rows.mean(0).square().sum())
        possible.append((mean_sq - norm) / (1 - 1 / n))
    trace = reading.variance_trace.value
    assert min(abs(trace / value - 1) for value in possible) < 1e-6
    assert reading.estimator == "rows"
    assert all("of" in way for way in reading.coverage.methods.values())
    assert reading.moments is not None
    assert reading.moments.num_read == round(n / 2)


def test_all_rows_are_the_per_example_reading() -> None:
    """Catches: a factor for rows that were not left out."""
    names = ("rows", "per_example")
    reading = read(MLP.model(), [MLP.data()], estimator=names, row_share=1.0)
    for column in ("variance_trace", "debiased_grad_sq_norm"):
        rows, every = (getattr(reading.noise(name), column) for name in names)
        assert rows.value == pytest.approx(every.value)
        assert rows.stderr == pytest.approx(every.stderr)


def test_fewer_rows_have_a_wider_interval() -> None:
    """Catches: an error as if all examples had been read."""
    case = Case("big", MLP.build, (400, 6), MLP.ways)
    names = ("per_example", "rows")
    reading = read(case.model(), [case.data()], estimator=names)
    every, rows = (reading.noise(name) for name in names)
    assert every is not None
    assert rows is not None
    ratio = rows.variance_trace.stderr / every.variance_trace.stderr
    assert 1.5 < ratio < 2.5  # a quarter of the rows


def test_rows_of_random_layers_use_the_step_s_own_draws() -> None:
    """Catches: a replay of some rows, which draws other masks."""
    torch.manual_seed(1)
    model = random_attention().double()
    names = ("per_example", "rows")
    probe, optimizer = attached(
        model, estimator=names, row_share=1 / 4, params=["attention.*", "head.*"]
    )
    torch.manual_seed(3)
    inputs, targets = CASES[5].data()
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    reading = probe.readings[0]
    assert reading.example_sq_norms is not None
    chosen = torch.randperm(4, generator=torch.Generator().manual_seed(0))[:1]
    expected = reading.example_sq_norms[chosen].mean()
    torch.testing.assert_close(reading.estimates["rows"].mean_sq_norm, expected)


def test_rows_cost_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: norms of all examples, of which a quarter is then used."""
    from noisekit.core.layers.linear import LinearRule

    seen: list[int] = []
    whole = LinearRule.sq_norms

    def counted(self: LinearRule, call, names):
        seen.append(call.num_examples)
        return whole(self, call, names)

    probe, optimizer = attached(MLP.model(), estimator="rows", row_share=1 / 3)
    model = probe._recorder.model
    for _ in range(2):  # the first reading is checked on all examples
        functional.cross_entropy(model(MLP.data()[0]), MLP.data()[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        probe._recorder.wanted.closure = False
        monkeypatch.setattr(LinearRule, "sq_norms", counted)
    assert set(seen) == {2}


# ------------------------------------------------------------------ chunks of the batch


@pytest.mark.parametrize("case", READ, ids=lambda c: c.name)
def test_chunks_are_sums_over_parts_of_the_batch(case: Case) -> None:
    """Three chunks, of unequal size where the batch does not divide.

    Catches: chunks that weigh the same whatever their size; shared weights without
    cross terms; a chunk's noise reported per chunk.
    """
    model, n = case.model(), case.data()[0].shape[case.batch_dim]
    reading = read(model, [case.data()], estimator="chunks", num_chunks=3)
    bounds = [k * n // 3 for k in range(4)]
    sizes = torch.tensor([b - a for a, b in itertools.pairwise(bounds)])
    rows = rows_of(case, model).split(sizes.tolist())
    means = torch.stack([part.mean(0) for part in rows])
    expected = reference.unit_noise(means, sizes.double() / n, sizes.double())
    assert_noise(reading, "chunks", expected)
    assert reading.estimator == f"chunks({n / 3:g})"


def test_sums_over_chunks_have_to_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule whose sums leave an example out is found; a replay reads the layer then.

    Catches: a check of the examples' own gradients alone, which chunks never use.
    """
    whole = LinearRule.summed_grads

    def short(
        self: LinearRule, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        return whole(self, call, names, slice(rows.start, rows.stop - 1))

    monkeypatch.setattr(LinearRule, "summed_grads", short)
    model = MLP.model()
    inputs, targets = MLP.data()
    probe, optimizer = attached(model, estimator="chunks", num_chunks=3)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason is not None
    assert "did not add up to the gradient of" in reason
    bounds = [k * len(inputs) // 3 for k in range(4)]
    sizes = torch.tensor([b - a for a, b in itertools.pairwise(bounds)]).double()
    rows = rows_of(MLP, MLP.model()).split(sizes.long().tolist())
    means = torch.stack([part.mean(0) for part in rows])
    expected = reference.unit_noise(means, sizes / len(inputs), sizes)
    assert_noise(probe.readings[-1], "chunks", expected)


def test_chunks_of_wide_layers_go_by_inner_products() -> None:
    """Catches: products within a chunk that leave its pairs of examples out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3)).double()
    case = Case("wide", lambda: model, (12, 40), frozenset())
    reading = read(model, [case.data()], estimator=("chunks", "per_example"))
    means = rows_of(case, model).view(4, 3, -1).mean(1)
    quarter = torch.full((4,), 0.25, dtype=torch.float64)
    expected = reference.unit_noise(means, quarter, 12 * quarter)
    assert_noise(reading, "chunks", expected)


@pytest.mark.parametrize("name", ["per_example", "rows", "chunks", "random_signs"])
def test_parts_of_a_coupled_batch_are_refused(name: str) -> None:
    """Catches: rows and chunks of a batch under BatchNorm, which are biased."""
    model = batch_norm_model()
    probe, _ = attached(model, estimator=name, on_error="raise")
    assert not probe.readings
    with pytest.raises(CoupledExamplesError, match=f"estimator='{name}' needs"):
        model(MLP.data()[0])


# ------------------------------------------------------------------ micro-batches


def batch_norm_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def parts_of(sizes: list[int]) -> Batches:
    case = Case("many", MLP.build, (sum(sizes), 6), MLP.ways)
    inputs, targets = case.data()
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def part_gradients(model: nn.Module, batches: Batches) -> Tensor:
    rows = []
    for inputs, targets in batches:
        loss = functional.cross_entropy(model(inputs), targets)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("build", [batch_norm_model, MLP.model])
def test_micro_batches_of_a_step_are_units(
    build: Callable[[], nn.Module], set_to_none: bool
) -> None:
    """Also where BatchNorm couples a micro-batch's examples.

    Catches: the last micro-batch against the sum; running sums in place of increments;
    the first one lost where ``.grad`` was None.
    """
    model, batches = build(), parts_of([5, 5, 5, 5])
    probe, optimizer = attached(model, estimator="accumulation")
    expected = part_gradients(build(), batches)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        for inputs, targets in batches:
            (functional.cross_entropy(model(inputs), targets) / 4).backward()
        optimizer.step()
    quarter = torch.full((4,), 0.25, dtype=torch.float64)
    for reading in probe.readings:
        assert reading.estimator == "accumulation(5)"
        assert set(reading.coverage.methods.values()) == {"micro-batches of 5"}
        noise = reference.unit_noise(expected, quarter, 20 * quarter)
        assert_noise(reading, "accumulation", noise)
        layers = sum(layer.variance_trace.value for layer in reading.layers)
        assert layers == pytest.approx(reading.variance_trace.value)


@pytest.mark.parametrize("by_size", [True, False])
def test_unequal_micro_batches_count_by_their_weights(by_size: bool) -> None:
    """Catches: micro-batches of one size supposed; weights by size where all alike."""
    sizes = [3, 6, 9]
    model, batches = MLP.model(), parts_of(sizes)
    probe, optimizer = attached(
        model,
        estimator="accumulation",
        microbatch_weights="by_size" if by_size else "equal",
    )
    for inputs, targets in batches:
        share = len(inputs) / 18 if by_size else 1 / 3
        (functional.cross_entropy(model(inputs), targets) * share).backward()
    optimizer.step()
    count = torch.tensor(sizes, dtype=torch.float64)
    weights = count / 18 if by_size else torch.full((3,), 1 / 3).double()
    expected = reference.unit_noise(part_gradients(model, batches), weights, count)
    assert_noise(probe.readings[0], "accumulation", expected)


def test_gradients_are_dropped_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a second copy of all gradients held through the backward pass."""
    monkeypatch.setattr("noisekit.probes.capture.microbatch_gradients.HELD_BYTES", 100)
    batches = parts_of([5, 5, 5])
    model = MLP.model()
    reading = read(model, batches, estimator="accumulation")
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    rows = part_gradients(model, batches)
    assert_noise(reading, "accumulation", reference.unit_noise(rows, third, 15 * third))


def test_the_first_micro_batch_s_gradient_is_not_copied() -> None:
    """Catches: a reference that turns the move into ``.grad`` into a copy."""
    model = MLP.model()
    probe, _ = attached(model, estimator="accumulation")
    seen: list[int] = []
    model[0].weight.register_hook(lambda grad: seen.append(grad.data_ptr()))
    inputs, targets = MLP.data()
    functional.cross_entropy(model(inputs), targets).backward()
    assert model[0].weight.grad is not None
    assert seen == [model[0].weight.grad.data_ptr()]
    assert probe._recorder.own_gradients.wanted


def test_a_gradient_that_is_not_accumulated_is_no_micro_batch() -> None:
    """Catches: what ``autograd.grad`` brings counted in, or kept."""
    model, batches = MLP.model(), parts_of([5, 5])
    probe, optimizer = attached(model, estimator="accumulation")
    parameters = list(model.parameters())
    for inputs, targets in batches:
        penalty = functional.cross_entropy(model(inputs), targets)
        torch.autograd.grad(penalty, parameters)
        (functional.cross_entropy(model(inputs), targets) / 2).backward()
    optimizer.step()
    half = torch.full((2,), 0.5, dtype=torch.float64)
    expected = reference.unit_noise(part_gradients(model, batches), half, 10 * half)
    assert_noise(probe.readings[0], "accumulation", expected)


def test_what_other_backward_passes_bring_is_not_kept() -> None:
    """Catches: the signed gradients, or a replay's, held until the next step."""
    model, batches = MLP.model(), parts_of([5, 5])
    probe, _ = attached(model, estimator=("accumulation", "random_signs"))
    for inputs, targets in batches:
        functional.cross_entropy(model(inputs), targets).backward()
    own = probe._recorder.own_gradients
    assert not own._held
    assert not own._fresh


def test_one_micro_batch_has_no_spread() -> None:
    """Catches: a division by zero; a reason that does not say what is missing."""
    probe, optimizer = attached(batch_norm_model(), estimator="accumulation")
    inputs, targets = MLP.data()
    functional.cross_entropy(probe._recorder.model(inputs), targets).backward()
    optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason == "noise of micro-batches needs 2 in a step, got 1"


def test_two_passes_in_one_backward_are_no_micro_batches() -> None:
    """Catches: the sum of two passes taken for one of them."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    probe, optimizer = attached(model, estimator="accumulation")
    for _ in range(2):
        first = functional.cross_entropy(model(inputs), targets)
        (first + functional.cross_entropy(model(-inputs), targets)).backward()
    optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason == "2 forward passes went into one backward pass"


def test_two_backward_passes_of_one_pass_are_no_micro_batches() -> None:
    """Catches: two terms of one loss taken for two samples of it."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    probe, optimizer = attached(model, estimator="accumulation")
    for _ in range(2):
        outputs = model(inputs)
        functional.cross_entropy(outputs, targets).backward(retain_graph=True)
        outputs.square().mean().backward()
    optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason == "two backward passes went through one forward pass"


def test_auto_takes_what_there_is() -> None:
    """Per-example where examples have gradients of their own, else micro-batches.

    Catches: rows of a coupled batch; silence where accumulation would tell.
    """
    assert read(MLP.model(), parts_of([5, 5])).estimator == "per_example"
    coupled = read(batch_norm_model(), parts_of([5, 5]))
    assert coupled.estimator == "accumulation(5)"
    assert list(coupled.estimates) == ["accumulation"]
    probe, optimizer = attached(batch_norm_model())
    inputs, targets = MLP.data()
    functional.cross_entropy(probe._recorder.model(inputs), targets).backward()
    optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason == "BatchNorm in training mode couples the examples (1)"


def test_hooks_of_micro_batches_are_made_only_where_they_are_needed() -> None:
    """Catches: a Python call per parameter and backward pass for nothing."""
    probe, _ = attached(MLP.model())
    own: OwnGradients = probe._recorder.own_gradients
    assert not own._handles
    assert not any(p._backward_hooks for p in probe._recorder.parameters)
    coupled, _ = attached(batch_norm_model())
    assert coupled._recorder.own_gradients._handles
    coupled.detach()
    assert not any(p._backward_hooks for p in coupled._recorder.parameters)

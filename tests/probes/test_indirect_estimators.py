"""Random signs, normalisation layers, ghost batches, preconditioned noise."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import ClosureError
from noisekit.core.results import Status
from noisekit.integrations import attach
from tests.probes.models import CASES, MLP, Case
from tests.probes.test_estimators import (
    assert_noise,
    attached,
    batch_norm_model,
    parts_of,
    read,
    rows_of,
)
from tests.reference import noise as reference

# Their outputs have the examples on axis 0, whatever their inputs.
SIGNED = [c for c in CASES if c.batch_dim == 0 and "reentrant" not in c.name]


# ------------------------------------------------------------------ random signs


@pytest.mark.parametrize("case", SIGNED, ids=lambda c: c.name)
def test_signs_weigh_the_examples(case: Case) -> None:
    """One more backward pass gives ``|sum s_i u_i|²`` with the signs that were drawn.

    Catches: signs per output entry in place of examples; a factor n; the training's
    own gradient changed by the extra pass.
    """
    model = case.model()
    reading = read(model, [case.data()], estimator="random_signs", num_signs=2)
    rows, n = rows_of(case, model), case.data()[0].shape[0]
    drawn = torch.Generator().manual_seed(0)
    signs = [2.0 * torch.randint(2, (n,), generator=drawn) - 1 for _ in range(2)]
    sums = [((s.double() @ rows) / n).square().sum() for s in signs]
    norm = rows.mean(0).square().sum()
    trace = float((n * torch.stack(sums).mean() - norm) / (1 - 1 / n))
    assert reading.variance_trace.value == pytest.approx(trace, rel=1e-6)
    assert reading.grad_sq_norm.value == pytest.approx(float(norm), rel=1e-6)
    assert set(reading.coverage.methods.values()) == {"random signs, 2 drawn"}


def test_signs_add_up_over_micro_batches() -> None:
    """Catches: the last micro-batch's signed gradient alone."""
    model, batches = MLP.model(), parts_of([6, 6])
    reading = read(model, batches, estimator="random_signs")
    drawn = torch.Generator().manual_seed(0)
    total = 0.0
    for inputs, targets in batches:
        grads = reference.example_gradients(
            model, functional.cross_entropy, inputs, targets
        )
        rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
        signs = 2.0 * torch.randint(2, (6,), generator=drawn) - 1
        total += float(((signs.double() @ rows) / 12).square().sum())
    assert float(reading.estimates["random_signs"].sum_sq_norm) == pytest.approx(total)


def test_chance_of_the_signs_is_in_the_error() -> None:
    """Catches: an error of the examples alone, or none at all."""
    case = Case("big", MLP.build, (200, 6), MLP.ways)
    for draws in (1, 8):
        reading = read(
            case.model(), [case.data()], estimator="random_signs", num_signs=draws
        )
        trace = reading.variance_trace
        assert trace.stderr == pytest.approx(
            trace.value * math.sqrt(2 / draws), rel=0.1
        )


def test_signs_leave_the_training_s_bits() -> None:
    """Catches: an extra pass that accumulates, draws numbers or frees the graph."""
    results = []
    for probed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if probed:
            attach(model, optimizer, estimator="random_signs")
        inputs, targets = MLP.data(torch.float32)
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        results.append((model.state_dict(), torch.get_rng_state()))
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name])
    assert torch.equal(results[0][1], results[1][1])


def test_reentrant_checkpoints_are_named() -> None:
    """Catches: an exception out of the training's own backward pass."""
    case = next(case for case in CASES if case.name == "checkpoint_reentrant")
    probe, optimizer = attached(case.model(), estimator="random_signs")
    inputs, targets = case.data()
    functional.cross_entropy(probe._recorder.model(inputs), targets).backward()
    optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason is not None
    assert reason.startswith("no second backward pass: ")
    assert "torch.utils.checkpoint is incompatible" in reason  # no half sentence


def test_an_output_without_an_axis_of_examples_is_named() -> None:
    """Catches: signs broadcast over whatever axis comes first."""

    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.layer(x)
            return hidden.mean(0)

    probe, optimizer = attached(Averaged().double(), estimator="random_signs")
    probe._recorder.model(MLP.data()[0]).sum().backward()
    optimizer.step()
    assert probe.readings[0].coverage.reason == (
        "random signs need an output with 6 examples on axis 0, got shape (3,)"
    )


def test_two_outputs_are_named() -> None:
    """Catches: the part that both outputs share counted twice."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.first(x)
            return hidden, self.second(hidden)

    probe, optimizer = attached(Two().double(), estimator="random_signs")
    hidden, outputs = probe._recorder.model(MLP.data()[0])
    (hidden.square().mean() + outputs.square().mean()).backward()
    optimizer.step()
    assert probe.readings[0].coverage.reason == (
        "random signs need one backward pass through one output of the model"
    )


def test_a_penalty_is_not_in_the_signed_gradient() -> None:
    """It does not go through the model's outputs.

    Catches: a closure that is checked for per-example readings only.
    """
    probe, optimizer = attached(MLP.model(), estimator="random_signs", on_error="raise")
    model, (inputs, targets) = probe._recorder.model, MLP.data()

    def step() -> None:
        penalty = model[0].weight.square().sum()
        (functional.cross_entropy(model(inputs), targets) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the layer's own call does not explain it; the whole model's may
    with pytest.raises(ClosureError, match="A penalty on the weights"):
        step()


def test_two_backward_passes_of_one_output_are_named() -> None:
    """Catches: the second term's contributions left out."""
    probe, optimizer = attached(MLP.model(), estimator="random_signs")
    inputs, targets = MLP.data()
    outputs = probe._recorder.model(inputs)
    functional.cross_entropy(outputs, targets).backward(retain_graph=True)
    outputs.square().mean().backward()
    optimizer.step()
    assert probe.readings[0].coverage.reason == (
        "random signs need one backward pass through one output of the model"
    )


def test_evaluations_with_gradients_are_not_collected() -> None:
    """Catches: the graph of every batch of a validation kept until the next step."""
    probe, optimizer = attached(MLP.model(), estimator="random_signs")
    model, (inputs, targets) = probe._recorder.model, MLP.data()
    loss = functional.cross_entropy(model(inputs), targets)
    model(inputs)  # one in between, that forgot no_grad
    loss.backward()
    assert probe._recorder.signed is not None
    assert len(probe._recorder.signed._outputs) == 1  # of the evaluation
    for _ in range(20):
        model(inputs)
    assert len(probe._recorder.signed._outputs) <= 4
    optimizer.step()
    assert probe.readings[0].coverage.complete


def test_outputs_are_let_go_after_the_step() -> None:
    """Catches: the graph of every evaluation kept until the program ends."""
    probe, optimizer = attached(MLP.model(), estimator="random_signs")
    model, (inputs, targets) = probe._recorder.model, MLP.data()
    model(inputs)  # an evaluation that forgot no_grad
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    assert probe._recorder.signed is not None
    assert not probe._recorder.signed._outputs
    assert not probe._recorder.signed._found


# ------------------------------------------------------------------ norm layers


def norm_model(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.LayerNorm(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(6, 8), middle, nn.ReLU(), nn.Linear(8, 3)).double()


def test_norm_layers_alone_are_an_uncalibrated_proxy() -> None:
    """Catches: noise of a few layers set against the whole model's gradient."""
    model = norm_model()
    reading = read(model, [MLP.data()], estimator="norm_layers")
    grads = reference.example_gradients(model, functional.cross_entropy, *MLP.data())
    own = [grads["1.weight"], grads["1.bias"]]
    trace = reference.variance_trace(own)
    assert reading.variance_trace.value == pytest.approx(trace)
    norm = reference.debiased_grad_sq_norm(own)
    assert reading.debiased_grad_sq_norm.value == pytest.approx(norm)
    note = "of the normalisation layers alone: an uncalibrated proxy"
    assert reading.coverage.note == note
    methods = reading.coverage.methods
    assert methods["1.weight"] == "normalisation"
    assert methods["0.weight"] == "not read: normalisation layers stand for it"


def test_norm_layers_are_calibrated_by_full_readings() -> None:
    """``tr Σ`` of the norm layers times the ratio; the gradient's norm is the whole's.

    Catches: a ratio of this step alone; calibration at every step; the norm layers'
    own gradient in ``|G|²``.
    """
    model = norm_model()
    probe, optimizer = attached(
        model, estimator=("norm_layers", "per_example"), calibrate_every=2
    )
    case = Case("several", MLP.build, (12, 6), MLP.ways)
    whole, part = [], []
    for seed in range(4):
        inputs, targets = case.data(seed=seed)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        grads = reference.example_gradients(
            model, functional.cross_entropy, inputs, targets
        )
        whole.append(reference.variance_trace(list(grads.values())))
        part.append(reference.variance_trace([grads["1.weight"], grads["1.bias"]]))
        rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    # Beside "per_example" every reading is a full one.
    expected = part[3] * sum(whole) / sum(part)
    last = probe.readings[3]
    assert last.variance_trace.value == pytest.approx(expected)
    norm = float(rows.mean(0).square().sum()) - expected / 12
    assert last.debiased_grad_sq_norm.value == pytest.approx(norm)
    assert last.coverage.note == "a proxy, calibrated by 4 full readings"


def test_full_readings_come_as_often_as_said() -> None:
    """Catches: the whole model read at every step, which the proxy is to spare."""
    model = norm_model()
    probe, optimizer = attached(model, estimator="norm_layers", calibrate_every=2)
    notes = []
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(MLP.data()[0]), MLP.data()[1]).backward()
        optimizer.step()
        notes.append(probe.readings[-1].coverage.note)
    counts = [note.split()[4] for note in notes if note is not None]
    # The second one is full since the closure is checked at it, on all layers.
    assert counts == ["1", "2", "3", "3"]


def test_a_model_without_norm_layers_has_no_proxy() -> None:
    """Catches: a sum over nothing that reads as no noise."""
    model = norm_model(norm=False)
    probe, optimizer = attached(model, estimator=("per_example", "norm_layers"))
    functional.cross_entropy(model(MLP.data()[0]), MLP.data()[1]).backward()
    optimizer.step()
    missing = probe.readings[0].coverage.missing["norm_layers"]
    assert missing == "the model has no normalisation layer whose parameters are read"


# ------------------------------------------------------------------ ghost batches


def test_ghost_batches_of_every_micro_batch_are_read() -> None:
    """Catches: the last micro-batch's ghosts alone; a small one counted as a whole."""
    model, batches = batch_norm_model(), parts_of([12, 8])
    loss = nn.CrossEntropyLoss()
    probe, optimizer = attached(model, estimator="ghost", ghost_batch=4, loss_fn=loss)
    traces, norms = [], []
    for inputs, targets in batches:
        rows = []
        for part, classes in zip(inputs.split(4), targets.split(4), strict=True):
            value = functional.cross_entropy(batch_norm_model()(part), classes)
            del value
            twin = batch_norm_model()
            functional.cross_entropy(twin(part), classes).backward()
            rows.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
        traces.append(4 * reference.variance_trace([torch.stack(rows)]))
        norms.append(reference.debiased_grad_sq_norm([torch.stack(rows)]))
        (loss(model(inputs), targets) / 2).backward()
    optimizer.step()
    reading = probe.readings[0]
    shares = (3 / 5, 2 / 5)
    trace, norm = (
        sum(s * v for s, v in zip(shares, values, strict=True))
        for values in (traces, norms)
    )
    assert_noise(reading, "ghost", (trace, norm))
    assert reading.coverage.note == "averaged over 2 micro-batches"
    assert reading.row()["num_units"] == 5


# ------------------------------------------------------------------ preconditioned


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_preconditioned_noise(kind: type[torch.optim.Optimizer], name: str) -> None:
    """``tr(P Σ P)`` and ``|P G|²`` with the state that the step starts from.

    Catches: second moments without their bias correction, or after the step; squares
    of a shared weight's calls added without cross terms.
    """
    case = next(case for case in CASES if case.name == name)
    model = case.model()
    optimizer = kind(model.parameters(), lr=0.01)
    probe = attach(model, optimizer, estimator=("auto", "preconditioned"))
    for step in range(3):
        inputs, targets = case.data(seed=step)
        rows = reference.example_gradients(
            model, functional.cross_entropy, inputs, targets
        )
        scaled = {
            n: rows[n] * scale_by_hand(optimizer, p)
            for n, p in model.named_parameters()
        }
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if step == 0:
            missing = probe.readings[0].coverage.missing["preconditioned"]
            expected = "the optimizer has no second moments before its first step"
            assert missing == expected
            continue
        found = list(scaled.values())
        trace = reference.variance_trace(found)
        norm = reference.debiased_grad_sq_norm(found)
        assert_noise(probe.readings[-1], "preconditioned", (trace, norm))


def scale_by_hand(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    state = optimizer.state[parameter]
    if not state:
        return torch.ones_like(parameter)
    if "square_avg" in state:
        return 1 / (state["square_avg"].sqrt() + 1e-8)
    corrected = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
    return 1 / (corrected.sqrt() + 1e-8)


def test_one_step_of_preconditioned_noise_has_no_interval() -> None:
    """Only averages over steps have one.

    Catches: an error of zero where the spread was not read.
    """
    model, (inputs, targets) = MLP.model(), MLP.data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    probe = attach(model, optimizer, estimator=("auto", "preconditioned"))
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    found = probe.readings[1].noise("preconditioned")
    assert found is not None
    assert found.variance_trace.stderr == math.inf
    scale = found.simple_noise_scale
    assert (scale.interval().low, scale.interval().high) == (0.0, math.inf)
    assert scale.status in (Status.NOT_RESOLVED, Status.NO_SIGNAL)

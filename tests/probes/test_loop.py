"""What a training loop may do around a probe, and what the probe must not do to it."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from noisekit.core.errors import ClosureError
from noisekit.core.layers import rule as layer_rules
from noisekit.core.results import Status
from noisekit.integrations import attach
from noisekit.probes import Probe
from noisekit.probes.capture.accumulation import GradientWatch
from tests.probes.models import CASES, IDS, MLP, Case, dropout_model, random_attention
from tests.reference import noise as reference

Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(model(inputs), targets)


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor
) -> None:
    optimizer.zero_grad()
    loss_of(model, inputs, targets).backward()
    optimizer.step()


def setup(case: Case = MLP) -> tuple[nn.Module, torch.optim.SGD, Tensor, Tensor]:
    model = case.model()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), *case.data()


def expected_trace(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    grads = reference.example_gradients(
        copy.deepcopy(model), functional.cross_entropy, inputs, targets
    )
    return reference.variance_trace(list(grads.values()))


# ------------------------------------------------------------------ no bit changes


def trained(build: Callable[[], nn.Module], data: tuple[Tensor, Tensor], probed: bool):
    torch.manual_seed(5)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    probe = attach(model, optimizer) if probed else None
    grads = []
    for _ in range(3):
        plain_step(model, optimizer, *data)
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    if probe is not None:
        assert len(probe.readings) == 3
    modes = [module.training for module in model.modules()]
    return model.state_dict(), grads, torch.get_rng_state(), modes


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_attaching_changes_no_bit(case: Case) -> None:
    """Parameters, gradients, buffers, random state, modes of three steps.

    Catches: a replay that draws numbers or updates buffers, a hook that replaces a
    gradient, a batch run on one example less that is not undone.
    """
    build, data = lambda: case.model(torch.float32), case.data(torch.float32)
    assert_same_bits(trained(build, data, False), trained(build, data, True))


@pytest.mark.parametrize("build", [dropout_model, random_attention])
def test_attaching_changes_no_draw(build: Callable[[], nn.Module]) -> None:
    """Catches: masks that come out differently since a probe drew in between."""
    inputs = torch.randn(5, 6) if build is dropout_model else torch.randn(5, 5, 8)
    data = inputs, torch.randint(3, (5,), generator=torch.Generator().manual_seed(0))
    assert_same_bits(trained(build, data, False), trained(build, data, True))


def test_attaching_changes_no_batch_statistics() -> None:
    """Catches: running statistics moved twice in a step."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    data = MLP.data(torch.float32)
    assert_same_bits(trained(build, data, False), trained(build, data, True))


def assert_same_bits(plain: tuple, probed: tuple) -> None:
    for name, tensor in plain[0].items():
        assert torch.equal(tensor, probed[0][name]), name
    for before, after in zip(plain[1], probed[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(plain[2], probed[2])
    assert plain[3] == probed[3]


# ------------------------------------------------------------------ forms of a step


def test_zeroing_in_place_starts_a_new_step() -> None:
    """Catches: zeroed gradients taken for accumulated ones."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        expected = expected_trace(model, inputs, targets)
        loss_of(model, inputs, targets).backward()
        optimizer.step()
        reading = probe.readings[-1]
        assert reading.batch_size == len(inputs)
        assert reading.variance_trace.value == pytest.approx(expected)


def test_zeroing_in_place_is_noticed_without_asking_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: gradients compared with zero, which synchronises at every step."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    plain_step(model, optimizer, inputs, targets)

    def asked(self: GradientWatch) -> bool:
        raise AssertionError("values were asked for")

    monkeypatch.setattr(GradientWatch, "_all_zero", asked)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        for _ in range(2):
            (loss_of(model, inputs, targets) / 2).backward()
        optimizer.step()
    assert all(reading.coverage.complete for reading in probe.readings)


def test_gradients_that_are_never_zeroed_are_noticed() -> None:
    """Catches: this step's noise set against two steps' gradient."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    plain_step(model, optimizer, inputs, targets)
    loss_of(model, inputs, targets).backward()
    optimizer.step()
    reading = probe.readings[-1]
    assert reading.variance_trace.status is Status.UNAVAILABLE
    assert reading.coverage.reason == "gradients of the step before were not zeroed"


def test_gradients_scaled_between_micro_batches_are_noticed() -> None:
    """Catches: contributions that are no longer what they were."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    loss_of(model, inputs, targets).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(0.5)
    loss_of(model, inputs, targets).backward()
    optimizer.step()
    reason = probe.readings[-1].coverage.reason
    assert reason == "gradients were changed between two backward passes"


def test_reading_is_from_before_clipping() -> None:
    """Catches: norms of clipped gradients."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    loss_of(model, inputs, targets).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert probe.readings[0].grad_sq_norm.value == pytest.approx(float(norm) ** 2)


def test_autograd_grad_is_no_step() -> None:
    """An adversarial perturbation before the step runs through the same layers.

    Catches: rows of a pass that accumulated nothing counted in.
    """
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    perturbed = inputs.clone().requires_grad_()
    torch.autograd.grad(loss_of(model, perturbed, targets), perturbed)
    torch.autograd.grad(loss_of(model, inputs, targets), list(model.parameters()))
    plain_step(model, optimizer, inputs, targets)
    reading = probe.readings[0]
    assert reading.examples_seen == len(inputs)
    assert reading.coverage.complete


def test_evaluation_in_between_is_not_read() -> None:
    """Catches: the last forward pass taken for the step's own."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    expected = expected_trace(model, inputs, targets)
    optimizer.zero_grad()
    loss = loss_of(model, inputs, targets)
    with torch.no_grad():
        model(inputs[:2])
    model(inputs[:3])  # an evaluation that forgot no_grad
    loss.backward()
    optimizer.step()
    reading = probe.readings[0]
    assert reading.batch_size == len(inputs)
    assert reading.variance_trace.value == pytest.approx(expected)


def test_an_exception_in_a_step_leaves_the_next_clean() -> None:
    """Catches: passes of the broken step counted into the next one."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)

    def broken(grad: Tensor) -> None:
        raise RuntimeError("out of memory, say")

    loss = loss_of(model, inputs, targets)
    handle = model[0].weight.register_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(inputs[:, :2])
    expected = expected_trace(model, inputs, targets)
    plain_step(model, optimizer, inputs, targets)
    assert len(probe.readings) == 1
    assert probe.readings[0].batch_size == len(inputs)
    assert probe.readings[0].variance_trace.value == pytest.approx(expected)


def test_a_closure_is_read_at_its_last_evaluation() -> None:
    """Catches: a hook before the step, which sees the gradient of the step before."""
    model, _, inputs, targets = setup()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    probe = attach(model, optimizer)
    traces = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        traces.append(expected_trace(model, inputs, targets))
        loss = loss_of(model, inputs, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(probe.readings) == 1
    assert probe.readings[0].batch_size == len(inputs)
    assert probe.readings[0].variance_trace.value == pytest.approx(traces[-1])


def test_a_scaler_s_skipped_step_gives_no_reading() -> None:
    """Catches: readings of inf gradients, and of scaled ones.

    The skipped step's examples must not enter the next reading either.
    """
    model, optimizer, inputs, targets = setup()
    model = model.float()
    inputs = inputs.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    probe = attach(model, optimizer, scaler=scaler)
    for overflow in (True, False):
        optimizer.zero_grad(set_to_none=False)
        expected = expected_trace(model, inputs, targets)
        factor = float("inf") if overflow else 1.0
        scaler.scale(loss_of(model, inputs, targets) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [reading.step for reading in probe.readings] == [1]
    assert probe.readings[0].batch_size == len(inputs)
    assert probe.readings[0].variance_trace.value == pytest.approx(expected, rel=1e-4)


def test_autocast_reads_within_its_rounding() -> None:
    """Catches: norms computed in bfloat16 since backward runs under autocast."""
    model, optimizer, inputs, targets = setup()
    model, inputs = model.float(), inputs.float()
    expected = expected_trace(model, inputs, targets)
    probe = attach(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, inputs, targets).backward()
    optimizer.step()
    reading = probe.readings[0]
    assert reading.coverage.complete
    assert reading.variance_trace.value == pytest.approx(expected, rel=0.03)
    assert reading.moments.sum_sq_norm.dtype == torch.float32


def test_two_forward_passes_in_one_backward_pass_are_not_paired_up() -> None:
    """Catches: row i of two batches taken for one example."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    (loss_of(model, inputs, targets) + loss_of(model, -inputs, targets)).backward()
    optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason == "2 forward passes went into one backward pass"


def test_two_backward_passes_through_one_forward_pass_are_noticed() -> None:
    """Catches: squared norms added where gradients have to be."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    outputs = model(inputs)
    functional.cross_entropy(outputs, targets).backward(retain_graph=True)
    outputs.square().mean().backward()
    optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason == "two backward passes went through one forward pass"


def test_a_model_used_by_its_parts_has_no_examples() -> None:
    """Catches: rows counted without knowing how many examples there are."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    functional.cross_entropy(model[2](model[1](model[0](inputs))), targets).backward()
    optimizer.step()
    reading = probe.readings[0]
    assert reading.grad_sq_norm.value > 0
    reason = reading.coverage.reason
    assert reason is not None
    assert reason.startswith("the model's own forward was not called in this step")


# ------------------------------------------------------------------ the closure check


def test_a_penalty_in_the_loss_is_refused_at_the_first_readings() -> None:
    """Catches: per-example gradients that leave the penalty out."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer, on_error="raise")

    def backward() -> None:
        optimizer.zero_grad()
        penalty = 0.01 * model[0].weight.square().sum()
        (loss_of(model, inputs, targets) + penalty).backward()

    backward()  # the layer's own call does not explain it; the whole model's may
    optimizer.step()
    assert not probe.readings[0].coverage.complete
    with pytest.raises(ClosureError, match=r"gradient for 0\.weight\. A penalty on"):
        backward()


def test_a_penalty_that_starts_later_is_flagged_and_training_goes_on() -> None:
    """Catches: a check at the first reading only; a check that kills a long run."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    for step in range(14):
        optimizer.zero_grad()
        penalty = 0.1 * model[0].weight.square().sum() if step >= 9 else 0.0
        (loss_of(model, inputs, targets) + penalty).backward()
        optimizer.step()
    assert probe.readings[8].coverage.complete
    unread = probe.readings[-1].coverage.unread
    assert list(unread) == ["0.weight"]
    assert "did not add up to the gradient of 0.weight" in unread["0.weight"]


def test_checks_become_rarer_but_never_stop() -> None:
    """Catches: a check at every reading, which costs more than the reading."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    checked = []
    for step in range(1, 30):
        if probe._recorder.wanted.closure:
            checked.append(step)
        plain_step(model, optimizer, inputs, targets)
    assert checked == [1, 2, 11]


# ------------------------------------------------------------------ copies


def test_copies_of_a_probed_model_are_inert() -> None:
    """Catches: an averaged copy that feeds the original's readings, or carries it."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    plain_step(model, optimizer, inputs, targets)
    clone, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for other in (clone, loaded, averaged):
        other.zero_grad()
        loss_of(other, inputs, targets).backward()
    assert len(probe.readings) == 1
    expected = expected_trace(model, inputs, targets)
    plain_step(model, optimizer, inputs, targets)
    assert probe.readings[1].batch_size == len(inputs)
    assert probe.readings[1].variance_trace.value == pytest.approx(expected)


def test_a_shallow_copy_is_not_the_model() -> None:
    """It shares the hooks themselves, as replicas do.

    Catches: a call of the copy opened as a pass of the model.
    """
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    loss_of(copy.copy(model), inputs, targets).backward()
    optimizer.step()
    reason = probe.readings[0].coverage.reason
    assert reason is not None
    assert reason.startswith("the model's own forward was not called in this step")


def test_a_copied_optimizer_has_no_probe() -> None:
    """Catches: a copy whose steps are read as the original's."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    plain_step(model, optimizer, inputs, targets)
    copy.deepcopy(optimizer).step()
    assert len(probe.readings) == 1


def test_two_probes_do_not_disturb_each_other() -> None:
    """Replays of one are calls of the model to the other.

    Catches: a probe that records what another one replays.
    """
    case = CASES[5]
    model, optimizer, inputs, targets = setup(case)
    probes: list[Probe] = [attach(model, optimizer) for _ in range(2)]
    for _ in range(2):
        plain_step(model, optimizer, inputs, targets)
    rows = [[reading.row() for reading in probe.readings] for probe in probes]
    assert rows[0] == rows[1]
    assert all(reading.coverage.complete for reading in probes[1].readings)


# ------------------------------------------------------------------ devices


META = [case for case in CASES if "square" not in case.name]


@pytest.mark.parametrize("case", META, ids=lambda c: c.name)
def test_a_probed_step_never_asks_the_device(case: Case) -> None:
    """On the meta device every transfer to the host raises.

    Catches: ``.item()``, ``.cpu()`` or a branch on a value in the step's path; a
    tensor made on another device.
    """
    model = case.model(torch.float32).to("meta")
    inputs, targets = (tensor.to("meta") for tensor in case.data(torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, inputs, targets).backward()
        optimizer.step()
    assert all(r.layer_sq_norms.is_meta for r in probe.readings)
    if probe.readings[-1].coverage.complete:
        assert probe.readings[-1].example_sq_norms.is_meta


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


def test_per_example_gradients_are_never_held_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 examples of 100 x 100 weights, with working memory for four of them.

    Catches: forming the gradients of the whole batch, in a reading or in its check.
    """
    monkeypatch.setattr(layer_rules, "CHUNK_ELEMENTS", 4 * 100 * 100)
    model = nn.Sequential(nn.Linear(100, 100), nn.Flatten(), nn.Linear(200, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, params="0.*")
    inputs, targets = torch.randn(64, 2, 100), torch.randint(3, (64,))
    loss = loss_of(model, inputs, targets)
    largest = _Largest()
    with largest:
        loss.backward()
    assert 100 * 100 <= largest.numel <= 4 * 100 * 100

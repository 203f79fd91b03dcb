"""Optimizers' steps around a probe: clipping, scaling, closures, several optimizers."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import NoParametersError
from noisekit.integrations import attach
from noisekit.probes import Probe
from noisekit.probes.capture.step_record import StepRecord
from noisekit.probes.ranks.sums import RankPart, RankSums
from noisekit.probes.step_result import StepResult
from tests.probes.models import MLP
from tests.reference import noise as reference

Clip = Callable[[nn.Module], object]


def setup() -> tuple[nn.Module, torch.optim.SGD, Tensor, Tensor]:
    model = MLP.model()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), *MLP.data()


def backward(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = functional.cross_entropy(model(inputs), targets)
    loss.backward()
    return loss


def expected_trace(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    grads = reference.example_gradients(
        copy.deepcopy(model), functional.cross_entropy, inputs, targets
    )
    return reference.variance_trace(list(grads.values()))


def grad_norm(model: nn.Module) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


# ------------------------------------------------------------------ clipping

CLIPS: dict[str, Clip] = {
    "norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-2),
    "norm, one by one": lambda m: nn.utils.clip_grad_norm_(
        m.parameters(), 1e-2, foreach=False
    ),
    "value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-3),
    "a part": lambda m: nn.utils.clip_grad_norm_(m[0].parameters(), 1e-2),
    "by hand": lambda m: [p.grad.mul_(0.25) for p in m.parameters()],
    "replaced": lambda m: [setattr(p, "grad", p.grad / 2) for p in m.parameters()],
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clip_factor_is_what_the_norm_was_multiplied_by(clip: Clip) -> None:
    """The reading itself is from before.

    Catches: a factor from the threshold alone, which is wrong for clipping by value
    or of a part; norms of clipped gradients.
    """
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    backward(model, inputs, targets)
    before = grad_norm(model)
    clip(model)
    after = grad_norm(model)
    optimizer.step()
    reading = probe.readings[0]
    assert after < 0.99 * before
    assert reading.grad_sq_norm.value == pytest.approx(before**2)
    assert float(reading.clip_factor) == pytest.approx(after / before)


def test_gradients_that_nobody_touched_have_factor_one() -> None:
    """Clipping with a threshold out of reach multiplies by one as well.

    Catches: a factor that carries rounding where nothing was done.
    """
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    backward(model, inputs, targets)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, inputs, targets)
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    optimizer.step()
    assert probe.readings[0].clip_factor == 1.0
    assert float(probe.readings[1].clip_factor) == pytest.approx(1.0)


def test_clip_factor_of_scaled_gradients() -> None:
    """Gradients are unscaled in between, which is no clipping.

    Catches: the loss scale taken for a part of the factor.
    """
    model, optimizer, inputs, targets = setup()
    model, inputs = model.float(), inputs.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    probe = attach(model, optimizer, scaler=scaler)
    for clipped in (True, False):
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(inputs), targets)).backward()
        scaler.unscale_(optimizer)
        before = grad_norm(model)
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        scaler.step(optimizer)
        scaler.update()
        reading = probe.readings[-1]
        expected = 1e-2 / before if clipped else 1.0
        assert float(reading.clip_factor) == pytest.approx(expected, rel=1e-3)
        assert reading.grad_sq_norm.value == pytest.approx(before**2, rel=1e-5)


# ------------------------------------------------------------------ scaling


def test_steps_that_a_fused_optimizer_skips_are_dropped() -> None:
    """It is called for every step, and finds out on the device.

    Catches: a reading of infinite gradients, in the list and in what sinks are given.
    """
    for sinks in ((), ([].append,)):
        model, _, inputs, targets = setup()
        model, inputs = model.float(), inputs.float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        probe = attach(model, optimizer, scaler=scaler, sinks=sinks)
        for overflow in (True, False):
            optimizer.zero_grad()
            expected = expected_trace(model, inputs, targets)
            factor = float("inf") if overflow else 1.0
            loss = functional.cross_entropy(model(inputs), targets)
            scaler.scale(loss * factor).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert [reading.step for reading in probe.readings] == [2]
        reading = probe.readings[0]
        assert reading.variance_trace.value == pytest.approx(expected, rel=1e-4)
        if sinks:
            assert sinks[0].__self__ == probe.readings


def test_a_scaler_that_is_switched_off_scales_nothing() -> None:
    """Catches: its idle scale taken for a factor in the gradients."""
    model, optimizer, inputs, targets = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=False)
    probe = attach(model, optimizer, scaler=scaler)
    expected = expected_trace(model, inputs, targets)
    scaler.scale(functional.cross_entropy(model(inputs), targets)).backward()
    scaler.step(optimizer)
    assert probe.readings[0].variance_trace.value == pytest.approx(expected)


# ------------------------------------------------------------------ closures


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_that_zeroes_runs_and_clips(keyword: bool) -> None:
    """The form that trainers give to every optimizer, also to those that need none.

    Catches: the gradient of the step before; clipping in the closure not seen.
    """
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    norms = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, inputs, targets)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e-2)))
        return loss

    for _ in range(2):
        if keyword:
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)
    for reading, norm in zip(probe.readings, norms, strict=True):
        assert reading.grad_sq_norm.value == pytest.approx(norm**2)
        assert float(reading.clip_factor) == pytest.approx(1e-2 / norm, rel=1e-3)
        assert reading.coverage.note is None


def test_the_evaluation_that_is_read_is_stated() -> None:
    """LBFGS evaluates several times in a step.

    Catches: a reading that does not say which gradient it is of.
    """
    model, _, inputs, targets = setup()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    probe = attach(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, inputs, targets)

    optimizer.step(closure)
    note = probe.readings[0].coverage.note
    assert note == "the last of 3 evaluations in the step"


# ------------------------------------------------------------------ optimizers


def test_each_of_two_optimizers_has_its_own_parameters() -> None:
    """One backward pass, two steps, a probe for each.

    Catches: parameters of the other optimizer, whose gradient this step does not use;
    a record that the first step takes from the second.
    """
    model, _, inputs, targets = setup()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[2].parameters(), lr=0.1)
    probes = [attach(model, first), attach(model, second)]
    for _ in range(2):
        model.zero_grad()
        grads = reference.example_gradients(
            copy.deepcopy(model), functional.cross_entropy, inputs, targets
        )
        backward(model, inputs, targets)
        first.step()
        second.step()
        for probe, names in zip(probes, (("0.", 4), ("2.", 4)), strict=True):
            own = [grad for name, grad in grads.items() if name.startswith(names[0])]
            reading = probe.readings[-1]
            expected = reference.variance_trace(own)
            assert reading.variance_trace.value == pytest.approx(expected)
            assert [layer.name[:2] for layer in reading.layers] == [names[0]] * 2
    assert [probe.step for probe in probes] == [2, 2]


def test_parameters_of_another_optimizer_are_refused() -> None:
    """Catches: a probe that waits for gradients which its steps never use."""
    model, _, _, _ = setup()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    message = r"updates, got only others \(2\.weight, 2\.bias\); attach with the optim"
    with pytest.raises(NoParametersError, match=message):
        attach(model, optimizer, params="2.*")


def test_parameter_groups_and_schedulers() -> None:
    """Catches: parameters of the first group only; a step that a scheduler wraps."""
    model, _, inputs, targets = setup()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
    probe = attach(model, optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(3):
        optimizer.zero_grad()
        expected = expected_trace(model, inputs, targets)
        backward(model, inputs, targets)
        optimizer.step()
        scheduler.step()
        assert probe.readings[-1].variance_trace.value == pytest.approx(expected)
    assert probe.step == 3


def test_parameters_that_join_later_are_told() -> None:
    """Catches: layers unfrozen in mid-training that no reading mentions."""
    model, _, inputs, targets = setup()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    backward(model, inputs, targets)
    optimizer.step()
    model[0].requires_grad_(True)
    backward(model, inputs, targets)
    optimizer.step()
    assert probe.readings[0].coverage.note is None
    assert probe.readings[1].coverage.note == (
        "2 parameters became trainable after the probe was attached and are not read: "
        "attach anew"
    )


def test_gradients_set_by_hand_have_a_norm_and_no_examples() -> None:
    """As sharpness-aware and federated loops set them.

    Catches: no reading at all; the noise of a pass that accumulated nothing.
    """
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    for _ in range(2):
        loss = functional.cross_entropy(model(inputs), targets)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        norm = grad_norm(model)
        optimizer.step()
        reading = probe.readings[-1]
        assert reading.grad_sq_norm.value == pytest.approx(norm**2)
        assert reading.coverage.reason == (
            "no backward pass was seen that has left this gradient"
        )
    assert probe.step == 2


def test_a_step_without_a_gradient_gives_no_reading() -> None:
    """Catches: the norm of gradients that are not there."""
    model, optimizer, _, _ = setup()
    probe = attach(model, optimizer)
    optimizer.step()
    assert probe.step == 1
    assert probe.readings == []


# ------------------------------------------------------------------ penalties


def test_a_gradient_penalty_has_no_examples_and_says_so() -> None:
    """Double backward through the same layers; micro-batches still tell the noise.

    Catches: the first differentiation's rows counted as the step's; per-example
    gradients that leave the penalty out; a training that a closure check ends.
    """
    model, optimizer, inputs, targets = setup()
    model[1] = nn.Tanh()
    names = ("per_example", "accumulation")
    probe = attach(model, optimizer, estimator=names)
    for parts in (1, 2, 2):
        optimizer.zero_grad()
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            leaf = x.clone().requires_grad_()
            loss = functional.cross_entropy(model(leaf), y)
            (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
            ((loss + slope.square().sum()) / parts).backward()
        before = grad_norm(model)
        optimizer.step()
        reading = probe.readings[-1]
        assert reading.grad_sq_norm.value == pytest.approx(before**2)
        assert set(reading.estimates) == ({"accumulation"} if parts > 1 else set())
        assert reading.coverage.reason == (
            "the gradient was differentiated once more, as for a gradient penalty, "
            "whose part in it no layer's call tells"
        )


def test_gradients_that_keep_their_graph_are_read_as_any() -> None:
    """As second-order optimizers ask for them.

    Catches: a graph that is kept taken for a penalty.
    """
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    expected = expected_trace(model, inputs, targets)
    loss = functional.cross_entropy(model(inputs), targets)
    parameters = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of the reference cycle
        loss.backward(create_graph=True)
    torch.autograd.grad(sum(p.grad.sum() for p in parameters), parameters)
    optimizer.step()
    assert probe.readings[0].variance_trace.value == pytest.approx(expected)
    optimizer.zero_grad()


def test_adversarial_examples_are_the_step_s_examples() -> None:
    """Catches: the pass that made the perturbation counted beside the step's own."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    leaf = inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(functional.cross_entropy(model(leaf), targets), leaf)
    perturbed = (inputs + 0.1 * slope.sign()).detach()
    expected = expected_trace(model, perturbed, targets)
    backward(model, perturbed, targets)
    optimizer.step()
    assert probe.readings[0].variance_trace.value == pytest.approx(expected)
    assert probe.examples_seen == len(inputs)


# ------------------------------------------------------------------ devices


def test_no_step_asks_the_device() -> None:
    """Clipping, accumulation, a closure, a budget and sums over ranks.

    On the meta device every transfer to the host raises. Catches: a clip factor that is
    compared with one, counts copied from the host, a clock that waits.
    """
    model, _, inputs, targets = setup()
    model, inputs, targets = model.to("meta"), inputs.to("meta"), targets.to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer, estimator=("per_example", "accumulation"))

    def closure() -> None:
        optimizer.zero_grad()
        for _ in range(2):
            (functional.cross_entropy(model(inputs), targets) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    results, make = [], probe._result

    def result(record: StepRecord) -> StepResult:
        results.append(make(record))
        return results[-1]

    probe._result = result  # type: ignore[method-assign]
    for step in range(4):
        if step % 2:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    reading = probe.readings[-1]
    assert isinstance(reading.clip_factor, Tensor)
    assert reading.clip_factor.is_meta
    layout = RankSums(4, ("per_example", "accumulation"), "sum", 4)
    packed = layout.packed(RankPart(results[-1], 6, 6.0))
    assert packed.is_meta
    assert packed.shape == layout.absent(packed.device).shape


# ------------------------------------------------------------------ life span


def test_a_probe_that_was_detached_can_be_followed_by_another() -> None:
    """Catches: hooks left behind, which read every pass twice."""
    model, optimizer, inputs, targets = setup()
    probes: list[Probe] = []
    for _ in range(2):
        with attach(model, optimizer) as probe:
            optimizer.zero_grad()
            expected = expected_trace(model, inputs, targets)
            backward(model, inputs, targets)
            optimizer.step()
        probes.append(probe)
        assert probe.readings[0].variance_trace.value == pytest.approx(expected)
    assert [len(probe.readings) for probe in probes] == [1, 1]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_only_a_distributed_model_is_joinable() -> None:
    """Catches: a None that ``Join`` fails on."""
    model, optimizer, _, _ = setup()
    message = "got one process; leave the probe out of Join"
    with pytest.raises(ValueError, match=message):
        _ = attach(model, optimizer).joinable

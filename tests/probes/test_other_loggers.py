"""Where loggers take a gradient's norm, and the wrong numbers that come of it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.integrations import attach
from tests.probes.models import MLP


def setup() -> tuple[nn.Module, torch.optim.SGD, Tensor, Tensor]:
    model = MLP.model()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), *MLP.data()


def norm(model: nn.Module) -> float:
    return float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())


def backward(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = functional.cross_entropy(model(inputs), targets)
    loss.backward()
    return loss


def test_hooks_of_parameters_log_micro_batches() -> None:
    """One entry per backward pass, scaled and before reductions, as ``watch`` logs.

    The probe's reading is of the step.
    """
    model, optimizer, inputs, targets = setup()
    logged: list[float] = []
    model[0].weight.register_hook(lambda grad: logged.append(float(grad.norm())))
    probe = attach(model, optimizer)
    for x, y in zip(inputs.chunk(2), targets.chunk(2), strict=True):
        (functional.cross_entropy(model(x), y) / 2).backward()
    truth = float(model[0].weight.grad.norm())
    optimizer.step()
    assert len(logged) == 2
    assert all(entry != pytest.approx(truth, rel=0.05) for entry in logged)
    assert sum(logged) > 1.05 * truth  # nor do they add up
    reading = probe.readings[0]
    assert reading.layers[0].grad_sq_norm.value == pytest.approx(truth**2)


@pytest.mark.parametrize("scale", [2.0, 2.0**16])
def test_norms_right_after_a_scaled_backward_pass_carry_the_scale(scale: float) -> None:
    """Trainers have logged these, one after another."""
    model, optimizer, inputs, targets = setup()
    model, inputs = model.float(), inputs.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    probe = attach(model, optimizer, scaler=scaler)
    scaler.scale(functional.cross_entropy(model(inputs), targets)).backward()
    logged = norm(model)
    scaler.unscale_(optimizer)
    truth = norm(model)
    scaler.step(optimizer)
    assert logged == pytest.approx(scale * truth, rel=1e-5)
    assert probe.readings[0].grad_sq_norm.value == pytest.approx(truth**2, rel=1e-5)


def test_norms_before_a_step_with_a_closure_are_the_last_step_s() -> None:
    """A trainer that gives every optimizer a closure runs the backward pass in it."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    logged: list[float] = []
    optimizer.register_step_pre_hook(
        lambda *_: logged.append(norm(model) if model[0].weight.grad is not None else 0)
    )
    truths = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, inputs, targets)
        truths.append(norm(model))
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert logged == pytest.approx([0.0, *truths[:2]])
    norms = [reading.grad_sq_norm.value**0.5 for reading in probe.readings]
    assert norms == pytest.approx(truths)


def test_norms_at_the_step_are_those_that_clipping_has_left() -> None:
    """A constant, once clipping sets in: it says nothing of the gradient."""
    model, optimizer, inputs, targets = setup()
    probe = attach(model, optimizer)
    logged, truths = [], []
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, inputs, targets)
        truths.append(norm(model))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        logged.append(norm(model))
        optimizer.step()
    assert logged == pytest.approx([1e-2] * 3, rel=1e-3)
    norms = [reading.grad_sq_norm.value**0.5 for reading in probe.readings]
    assert norms == pytest.approx(truths)

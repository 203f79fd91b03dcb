"""How far steps move the parameters, and how the gradient turns."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.vocabulary import QuantityName
from noisekit.integrations import attach
from noisekit.noise.step_quantity import StepQuantity
from tests.probes.quantity_problems import RATE, problem, value


def test_movement_is_that_of_the_parameters() -> None:
    """Update, distance and cosine with momentum and clipping, over several steps.

    Catches: the gradient's length for the update's, a gradient after clipping, a
    distance from the last reading.
    """
    model, inputs, targets = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    names: tuple[QuantityName, ...] = (
        "update_size",
        "distance_from_start",
        "gradient_cosine",
    )
    probe = attach(model, optimizer, quantities=names, every=2)
    parameters = list(model.parameters())

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()

    start, last = flat(list(parameters)), None
    for step in range(5):
        optimizer.zero_grad()
        rows = torch.arange(step, step + 6)
        functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        grads = [p.grad.clone() for p in parameters if p.grad is not None]
        nn.utils.clip_grad_value_(parameters, 0.01)
        before = flat(list(parameters))
        optimizer.step()
        if step % 2:
            continue
        after, reading = flat(list(parameters)), probe.readings[-1]
        assert value(reading, "update_size") == pytest.approx(
            float((after - before).norm())
        )
        assert value(reading, "distance_from_start") == pytest.approx(
            float((after - start).norm())
        )
        if last is None:
            assert "gradient_cosine" in reading.coverage.missing
        else:
            found = reading.quantities["gradient_cosine"]
            assert isinstance(found, StepQuantity)
            wanted = functional.cosine_similarity(flat(grads), flat(last), dim=0)
            assert found.value == pytest.approx(float(wanted))
            layer = functional.cosine_similarity(flat(grads[:1]), flat(last[:1]), dim=0)
            assert found.layers[0].value == pytest.approx(float(layer))
        last = grads


def test_a_closure_s_step_moves_from_where_it_began() -> None:
    """Catches: parameters copied after the first of LBFGS' evaluations."""
    model, inputs, targets = problem("mlp")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    probe = attach(model, optimizer, quantities=("update_size", "distance_from_start"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    reading = probe.readings[-1]
    distance = value(reading, "distance_from_start")
    assert value(reading, "update_size") == pytest.approx(distance)

"""The table of models, losses and reductions against one backward per example."""

import pytest
import torch
from torch import Tensor

from noisekit.integrations import attach
from noisekit.probes import Reading, self_check
from tests.probes.architectures import (
    ARCHITECTURES,
    LOSSES,
    RULES,
    Architecture,
    Loss,
)
from tests.probes.exactness import assert_agree
from tests.reference import noise as reference

# PyTorch's own remark on a slower kernel; that case is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

MAX_WIDENINGS = 4
"""Steps until every parameter is read at a module that accounts for it."""


def reading_of(case: Architecture, loss: Loss, dtype: torch.dtype) -> Reading:
    """Return the first reading that tells every example's gradient."""
    model, inputs = case.model(dtype), case.inputs(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(
        model,
        optimizer,
        loss_fn=loss.value,
        # Contributions are compared: what examples weigh has tests of its own.
        example_weights=lambda _: torch.ones(len(inputs[0])),
        loss_reduction=loss.reduction,
    ) as probe:
        for _ in range(MAX_WIDENINGS):
            optimizer.zero_grad()
            outputs = model(*inputs)
            probe.loss_fn(outputs, loss.targets(outputs)).backward()
            optimizer.step()
            if probe.readings[-1].coverage.complete:
                break
    return probe.readings[-1]


def expected_of(case: Architecture, loss: Loss) -> dict[str, Tensor]:
    """``g_i`` by parameter: the contribution, in the units of the mean gradient."""
    model, inputs = case.model(), case.inputs()
    targets = loss.targets(model(*inputs))
    grads = reference.contributions(model, loss.value, inputs, targets)
    factor = len(inputs[0]) if loss.reduction == "mean" else 1
    return {name: factor * rows for name, rows in grads.items()}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
def test_every_example_and_layer_is_exact(case: Architecture, loss: Loss) -> None:
    """In float64, to nine digits, whatever the loss divides by.

    Catches: cross terms of shared weights and repeated calls lost, positions or queries
    taken for examples, ``n`` put for the sum of class weights or of tokens that count.
    """
    reading = reading_of(case, loss, torch.float64)
    assert_agree(reading, expected_of(case, loss), 1e-9)


@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
def test_single_precision_keeps_three_digits(case: Architecture) -> None:
    """Catches: sums of squares below float32; statistics that cancel.

    Also a layer that is read by a dearer way than the one meant for it.
    """
    reading = reading_of(case, LOSSES[0], torch.float32)
    assert_agree(reading, expected_of(case, LOSSES[0]), 1e-3)
    ways = {w for way in reading.coverage.methods.values() for w in way.split()}
    kinds = {"linear", "convolution", "normalisation", "embedding", "replay"}
    kinds |= {"recurrent"}
    assert ways & kinds == case.ways


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
def test_half_precision_keeps_a_digit(case: Architecture, dtype: torch.dtype) -> None:
    """Catches: products of half-precision squares, which overflow or vanish.

    Also statistics, kept in single precision, that meet half-precision inputs.
    """
    reading = reading_of(case, LOSSES[0], dtype)
    assert reading.coverage.reason is None
    assert reading.example_sq_norms is not None
    assert reading.example_sq_norms.dtype == torch.float32
    total = sum(reference.sq_norms(expected_of(case, LOSSES[0])).values())
    torch.testing.assert_close(
        reading.example_sq_norms.double(),
        total,
        rtol=0.1,
        atol=0.02 * float(total.max()),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["queries", "experts", "gru_packed", "u_net"])
def test_the_self_check_agrees(name: str, dtype: torch.dtype) -> None:
    """Catches: a gradient that is zero but for rounding, compared digit by digit."""
    case = next(case for case in ARCHITECTURES if case.name == name)
    model, inputs = case.model(dtype), case.inputs(dtype)
    targets = LOSSES[0].targets(model(*inputs))
    batch = (inputs if len(inputs) > 1 else inputs[0], targets)
    check = self_check(model, LOSSES[0].value, batch)
    assert check.passed, str(check)


# Their own forwards ask for values: which rows an expert gets, how long a sequence is.
ASKING = {"experts", "gru_packed"}
META = [case for case in ARCHITECTURES if case.name not in ASKING]


@pytest.mark.parametrize("case", META, ids=lambda case: case.name)
def test_no_layer_asks_the_device(case: Architecture) -> None:
    """On the meta device every transfer to the host raises.

    Catches: ``.item()``, ``unique`` or a branch on a value in a rule or a replay; a
    tensor made on another device.
    """
    model = case.model(torch.float32).to("meta")
    inputs = [tensor.to("meta") for tensor in case.inputs(torch.float32)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    for _ in range(MAX_WIDENINGS):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()
        if probe.readings[-1].coverage.complete:
            break
    assert probe.readings[-1].coverage.complete
    norms = probe.readings[-1].example_sq_norms
    assert norms is not None
    assert norms.is_meta

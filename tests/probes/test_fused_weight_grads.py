"""Gradients that the probe computes itself: equal, seen by nobody, and taken back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from noisekit.core.errors import UsageError
from noisekit.core.layers import rule as layer_rules
from noisekit.integrations import attach
from tests.probes.models import CASES, IDS, Case
from tests.probes.replaced import (
    ConvNet,
    assert_like_plain,
    conv_net,
    data,
    loss_of,
    one_step,
    ran,
    same_bits,
)
from tests.reference import noise as reference


@contextmanager
def weight_gradients_by_autograd() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the convolution weights whose whole gradient autograd computes."""
    found: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                grad, weight, mask = args[0], args[2], args[10]
                if mask[1] and grad.shape[0] > 1:
                    found.append(tuple(weight.shape))
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found


# ----------------------------------------------------------------------- equal values


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_and_readings_of_every_model(case: Case) -> None:
    """Catches: a layer that lost its gradient, or that is counted twice when shared.

    Also one whose examples lie on another axis than the first.
    """

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, *case.data()).backward()
            optimizer.step()

    assert_like_plain(case.model(), run)


@pytest.mark.parametrize("elements", [1, 2**21])
@pytest.mark.parametrize("estimator", ["auto", "chunks", ("auto", "rows", "chunks")])
def test_convolutions_and_sequences(
    estimator: Any, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one example at a time in the working memory, and with all.

    Catches: norms of chunks given out as those of examples, a bias forgotten, the
    last part of a gradient in place of the sum.
    """
    monkeypatch.setattr(layer_rules, "CHUNK_ELEMENTS", elements)
    assert_like_plain(conv_net(), one_step, estimator=estimator)


def test_readings_are_those_of_one_backward_pass_per_example() -> None:
    """Catches: pieces in the units of the summed gradient, or of a single chunk."""
    model = conv_net()
    _, (reading,) = ran(model, one_step, exact_bits=False)
    expected = reference.example_gradients(model, functional.cross_entropy, *data())
    assert float(reading.variance_trace.value) == pytest.approx(
        reference.variance_trace(list(expected.values())), rel=1e-9
    )


def test_float32_gradients_differ_by_rounding_only() -> None:
    """Catches: parts summed in less than float32."""
    model = conv_net(torch.float32)
    plain, _ = ran(model, one_step)
    grads, _ = ran(model, one_step, exact_bits=False)
    exact, _ = ran(conv_net(), one_step)
    for name, grad in grads.items():
        scale = float(exact[name].norm())
        error = float((grad.double() - exact[name]).norm())
        own = float((plain[name].double() - exact[name]).norm())
        assert error < max(4 * own, 1e-6 * scale)


def test_element_wise_squares_come_from_the_same_parts() -> None:
    """Adam's noise and the signal-to-noise ratio need every example's gradient.

    Catches: squares of sums over chunks of examples.
    """
    found = []
    for exact_bits in (True, False):
        model = conv_net()
        optimizer = torch.optim.Adam(model.parameters())
        with attach(
            model,
            optimizer,
            estimator=("auto", "preconditioned"),
            quantities="gsnr",
            exact_bits=exact_bits,
        ) as probe:
            for _ in range(2):
                one_step(model, optimizer)
        reading = probe.readings[-1]
        found.append(
            (
                float(reading.estimates["preconditioned"].sum_sq_norm),
                reading.quantities["gsnr"].values,
            )
        )
    (wanted_noise, wanted_ratios), (noise, ratios) = found
    assert noise == pytest.approx(wanted_noise, rel=1e-6)
    torch.testing.assert_close(ratios, wanted_ratios)


def test_autograd_leaves_the_replaced_gradients_out() -> None:
    """Catches: a mode that computes the layer's gradient as well, and is no faster."""
    with weight_gradients_by_autograd() as exact:
        ran(conv_net(), one_step, exact_bits=True)
    with weight_gradients_by_autograd() as replaced:
        ran(conv_net(), one_step, exact_bits=False)
    assert len(exact) > 0
    assert replaced == []


# --------------------------------------------------------------------- training idioms


def test_accumulation_and_evaluation_in_between() -> None:
    """Catches: gradients that replace what had accumulated; graphs without grad."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for seed in (3, 4):
            (loss_of(model, *data(seed=seed)) / 2).backward()
            with torch.no_grad():
                assert not model(data()[0]).requires_grad
        optimizer.step()

    assert_like_plain(conv_net(), run)


def test_input_gradients_are_no_step() -> None:
    """Catches: parts of another loss taken for those of the step (FGSM)."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        inputs, targets = data()
        inputs.requires_grad_()
        loss = 3 * loss_of(model, inputs, targets)
        (direction,) = torch.autograd.grad(loss, inputs)
        moved = (inputs + 0.1 * direction.sign()).detach()
        loss_of(model, moved, targets).backward()
        optimizer.step()

    assert_like_plain(conv_net(), run)


def test_a_graph_kept_for_two_losses() -> None:
    """Catches: the second of two backward passes without a gradient."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss = loss_of(model, *data())
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        optimizer.step()

    assert_like_plain(conv_net(), run)


def test_frozen_weights_and_parameters_that_are_not_read() -> None:
    """Catches: a constant in place of a parameter that nobody hands its gradient."""
    model = conv_net()
    model.first.weight.requires_grad_(False)
    assert_like_plain(model, one_step, params=["first*", "grouped*", "positions.bias"])


def test_steps_that_are_not_read_keep_their_bits() -> None:
    """Catches: layers replaced on every step."""
    model = conv_net(torch.float32)
    assert not same_bits(model, one_step)
    plain, _ = ran(model, one_step)
    grads, _ = ran(model, one_step, exact_bits=False, every=lambda step: step > 1)
    assert all(torch.equal(grad, plain[name]) for name, grad in grads.items())


def test_autocast_keeps_the_bits() -> None:
    """Catches: a float32 sum where the layer's own gradient is rounded to bfloat16."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, *data(torch.float32))
        loss.backward()
        optimizer.step()

    assert same_bits(conv_net(torch.float32), run)


def test_checkpointed_layers_keep_their_bits() -> None:
    """Catches: a replaced layer inside a forward pass that is run again."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ConvNet()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return logits

    torch.manual_seed(1)
    assert same_bits(Checkpointed(), one_step)


def test_differentiating_twice_is_refused() -> None:
    """Catches: a gradient penalty that silently misses the weights' part."""
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = data()
    inputs.requires_grad_()
    with attach(model, optimizer, exact_bits=False):
        loss = loss_of(model, inputs, targets)
        message = r"exact_bits=False needs .* got create_graph=True .*exact_bits=True"
        with pytest.raises(UsageError, match=message):
            torch.autograd.grad(loss, inputs, create_graph=True)

"""Quantities that a step or a loop cannot give: what is said instead."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from noisekit.core.errors import UsageError
from noisekit.core.vocabulary import QuantityName
from noisekit.integrations import attach
from tests.probes.quantity_problems import RATE, problem


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE)


def test_a_loss_called_twice_is_no_whole_loss() -> None:
    """Catches: CABS with the loss of an auxiliary head."""
    model, inputs, targets = problem("mlp")
    optimizer = optimizer_of(model)
    probe = attach(
        model, optimizer, loss_fn=functional.cross_entropy, quantities="cabs"
    )
    outputs = model(inputs)
    loss = probe.loss_fn(outputs, targets) + 0.1 * probe.loss_fn(outputs, targets)
    loss.backward()
    optimizer.step()
    assert dict(probe.readings[-1].coverage.missing) == {
        "cabs": "the loss was called more than once in a pass: it may be a part only"
    }


def test_a_loss_that_is_not_seen_is_said_so() -> None:
    """Catches: the loss of an earlier step."""
    model, inputs, targets = problem("mlp")
    optimizer = optimizer_of(model)
    names: tuple[QuantityName, ...] = ("cabs", "hessian_noise_scale")
    probe = attach(model, optimizer, loss_fn=functional.cross_entropy, quantities=names)
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    reason = "the loss was not seen: call it through probe.loss_fn"
    assert dict(probe.readings[-1].coverage.missing) == dict.fromkeys(names, reason)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            _sgd,
            {"quantities": ("norm_test", "noise")},
            "quantities needs to be one of 'norm_test', 'inner_product_test', "
            "'orthogonality_test', 'gradient_diversity', 'cabs', 'cabs_conv_compat', "
            "'gsnr', 'evidence_stopping', 'grad_histogram', 'update_size', "
            "'distance_from_start', 'gradient_cosine', 'hessian_noise_scale', or a "
            "StepMetric of your own, got 'noise'.",
        ),
        (
            _sgd,
            {"quantities": ("gsnr", "gsnr")},
            "quantities needs each name once, got gsnr, gsnr.",
        ),
        (
            _adam,
            {"quantities": "cabs", "loss_fn": functional.cross_entropy},
            "quantities='cabs' needs torch.optim.SGD, whose learning rate the rule is "
            "about, got Adam; leave it out.",
        ),
        (
            _sgd,
            {"quantities": "cabs"},
            "quantities='cabs' needs the loss to be seen, got loss_fn=None; give it to "
            "attach() and call it through probe.loss_fn.",
        ),
        (
            _sgd,
            {
                "quantities": "hessian_noise_scale",
                "hessian_every": 0,
                "loss_fn": functional.cross_entropy,
            },
            "hessian_every needs to be at least 1, got 0.",
        ),
        (
            _sgd,
            {
                "quantities": "hessian_noise_scale",
                "num_chunks": 2,
                "loss_fn": functional.cross_entropy,
            },
            "quantities='hessian_noise_scale' needs num_chunks of 3 or more in each "
            "half of the batch, got 2.",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    build: Callable[[nn.Module], torch.optim.Optimizer],
    options: dict[str, object],
    message: str,
) -> None:
    model, _, _ = problem("mlp")
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        attach(model, build(model), **options)  # type: ignore[arg-type]


def test_histograms_that_were_not_asked_for_are_refused() -> None:
    model, _, _ = problem("mlp")
    probe = attach(model, optimizer_of(model))
    message = (
        "gradient_norms needs quantities=('grad_histogram',), got others; name it in "
        "attach()."
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        _ = probe.gradient_norms


def test_nothing_is_kept_that_was_not_asked_for() -> None:
    """Catches: copies of the parameters, and hooks, whether or not they are wanted."""
    model, inputs, targets = problem("mlp")
    optimizer = optimizer_of(model)
    probe = attach(model, optimizer)
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    assert not probe.readings[-1].quantities
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    probe.detach()
    with attach(model, optimizer, quantities=("update_size",)):
        assert len(optimizer._optimizer_step_pre_hooks) == 2
    assert not optimizer._optimizer_step_pre_hooks

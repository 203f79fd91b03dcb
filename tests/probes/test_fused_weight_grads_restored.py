"""Layers whose gradients were replaced, given back as they were."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noisekit.integrations import attach
from tests.probes.replaced import ConvNet, conv_net, data, loss_of, one_step, ran


def shadowed(model: nn.Module) -> list[str]:
    names = ("weight", "bias")
    return [
        name
        for name, module in model.named_modules()
        if any(n in vars(module) for n in names)
    ]


@pytest.mark.parametrize("wrong", [torch.zeros(6, 3, 7, 7), torch.zeros(6, 2, 4, 4)])
def test_a_failed_forward_pass_leaves_the_model_whole(wrong: Tensor) -> None:
    """In a replaced layer itself, or behind it.

    Catches: constants left in front of the parameters, which train no more.
    """
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain, _ = ran(model, one_step)
    with attach(model, optimizer, exact_bits=False) as probe:
        with pytest.raises(RuntimeError):
            model(wrong.double())
        assert shadowed(model) == []
        one_step(model, optimizer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])
    assert probe.readings[-1].coverage.reason is None


def test_an_interrupt_is_undone_by_the_next_pass_or_by_detaching() -> None:
    """Hooks that run after errors do not run after Ctrl-C.

    Catches: shadows that stay until the end of the training.
    """

    class Interrupted(nn.Conv2d):
        forward = nn.Conv2d.forward
        broken = False

        def _conv_forward(self, *args: Any) -> Tensor:
            if self.broken:
                raise KeyboardInterrupt
            return super()._conv_forward(*args)

    model = conv_net()
    model.first.__class__ = Interrupted
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for repair in ("step", "detach"):
        with attach(model, optimizer, exact_bits=False) as probe:
            Interrupted.broken = True
            with pytest.raises(KeyboardInterrupt):
                one_step(model, optimizer)
            Interrupted.broken = False
            assert shadowed(model) == ["first"]
            if repair == "step":
                one_step(model, optimizer)
                assert shadowed(model) == []
                assert model.first.weight.grad is not None
            else:
                probe.detach()
                assert shadowed(model) == []


def test_copies_of_the_model_are_free_of_the_probe() -> None:
    """Catches: a copy that trains the original's weights, or none."""
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, exact_bits=False) as probe:
        one_step(model, optimizer)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    fresh = conv_net()
    fresh.load_state_dict(model.state_dict())
    for copied in copies:
        copied.zero_grad()
        loss_of(copied, *data()).backward()
        loss_of(fresh, *data()).backward()
        for got, wanted in zip(copied.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(got.grad, wanted.grad)
        fresh.zero_grad()
    assert len(probe.readings) == 1


def test_detaching_gives_back_every_bit_and_hook() -> None:
    """Catches: a hook that stays on a layer."""
    model = conv_net(torch.float32)
    own = [dict(vars(module)) for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, exact_bits=False):
        one_step(model, optimizer)
    for module, before in zip(model.modules(), own, strict=True):
        assert vars(module).keys() == before.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


def test_nothing_is_asked_of_the_values() -> None:
    """A read step on the meta device, where every look at a value raises.

    Catches: a transfer to the host in the replaced gradient.
    """
    with torch.device("meta"):
        model = ConvNet()
        inputs, targets = torch.empty(6, 2, 7, 7), torch.empty(6, dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, exact_bits=False) as probe:
        probe._recorder.verified = True
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, inputs, targets).backward()
            optimizer.step()
    assert model.first.weight.grad is not None

"""What recomputation, saved tensors and compilation do; none of these runs a probe."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def batch(size: int = 6) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------- recomputation


@pytest.mark.parametrize("early_stop", [True, False])
def test_recomputation_with_and_without_early_stop(early_stop: bool) -> None:
    """Early stop leaves the last layer's forward hook out, not its pre-hook."""
    model, events = mlp(), []
    model[2].register_forward_pre_hook(lambda *_: events.append("before"))
    model[2].register_forward_hook(lambda *_: events.append("after"))
    with set_checkpoint_early_stop(early_stop):
        output = checkpoint(model, batch().requires_grad_(), use_reentrant=False)
        assert events == ["before", "after"]
        output.sum().backward()
    assert events[2:] == (["before"] if early_stop else ["before", "after"])


def test_reentrant_recomputation_is_a_run_inside_a_run() -> None:
    """It accumulates there; so runs of the engine may be nested."""
    model, tasks = mlp(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: tasks.append(torch._C._current_graph_task_id())
        )
    hidden = model[0](batch())
    checkpoint(model[2], hidden, use_reentrant=True).sum().backward()
    assert len(tasks) == 4
    assert len(set(tasks)) == 2


@pytest.fixture
def _without_collection() -> Iterator[None]:
    """Memory is given back by counting references, or not at once."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_collection")
@pytest.mark.parametrize("pins", [True, False])
def test_a_hook_that_holds_an_input_undoes_checkpointing(pins: bool) -> None:
    """What was to be computed again stays in memory until the backward pass.

    So nothing is kept of a forward pass whose saved tensors are packed away.
    """
    layer, seen = nn.Linear(4, 4), []

    def on_forward(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        (own,) = args
        seen.append(weakref.ref(own))
        held = own if pins else None
        output.register_hook(lambda grad: None if held is None else held.sum())

    layer.register_forward_hook(on_forward)
    output = checkpoint(
        lambda x: layer(x.tanh()), batch().requires_grad_(), use_reentrant=False
    )
    assert output.requires_grad
    assert (seen[0]() is not None) is pins


def test_saved_tensor_hooks_tell_that_they_are_active() -> None:
    """So a forward pass under a checkpoint is known as one while it runs."""
    layer, active = nn.Linear(4, 4), []
    layer.register_forward_hook(
        lambda *_: active.append(
            torch._C._autograd._top_saved_tensors_default_hooks(True)
        )
    )
    layer(batch())
    checkpoint(layer, batch().requires_grad_(), use_reentrant=False)
    assert active[0] is None
    assert active[1] is not None


# ------------------------------------------------------------- compilation


def compiled(model: nn.Module, **options: bool) -> nn.Module:
    torch.compiler.reset()
    wrapped: nn.Module = torch.compile(model, backend="eager", **options)  # type: ignore[assignment]
    return wrapped


def test_a_compiled_wrapper_s_hooks_fire_and_its_layers_do_not() -> None:
    """Per-parameter hooks always fire."""
    model, events = mlp(), []
    wrapped = compiled(model)
    wrapped(batch())
    model[0].register_forward_hook(lambda *_: events.append("layer"))
    wrapped.register_forward_hook(lambda *_: events.append("wrapper"))
    model[0].weight.register_post_accumulate_grad_hook(
        lambda _: events.append("parameter")
    )
    model[0].bias.register_hook(lambda _: events.append("parameter"))
    wrapped(batch()).sum().backward()
    assert events == ["wrapper", "parameter", "parameter"]


def test_hooks_can_tell_that_they_are_being_traced() -> None:
    """So one that was there before compiling can leave nothing in the code."""
    model, calls = mlp(), []

    class Hook:
        def __call__(self, *_: object) -> None:
            if torch.compiler.is_compiling():
                return
            calls.append(True)

    for module in model.modules():
        module.register_forward_hook(Hook())
    wrapped = compiled(model, fullgraph=True)
    wrapped(batch())
    wrapped(batch())
    assert calls == []
    model(batch())
    assert len(calls) == 4


def test_modules_compiled_in_place_trace_their_own_hooks() -> None:
    """So a hook that leaves nothing in the code is not called either."""
    torch.compiler.reset()
    model, calls = mlp(), []
    model.register_forward_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    model.compile(backend="eager")
    model(batch())
    model(batch())
    assert calls == [True, True]
    assert model._compiled_call_impl is not None

"""What PyTorch's data parallelism does, as far as probes rest on it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_in_processes

ENGINE = torch.autograd.Variable._execution_engine
FORMS: dict[str, dict[str, bool]] = {
    "plain": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "both": {"gradient_as_bucket_view": True, "static_graph": True},
}


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def _sq_norm(model: nn.Module) -> float:
    return float(
        sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    )


def _own_sq_norm(rank: int, step: int) -> float:
    model = _mlp()
    model(_batch(rank, step)).square().mean().backward()
    return _sq_norm(model)


def _backward(rank: int, form: dict[str, bool]) -> list[dict[str, float]]:
    """What is in ``.grad`` at each moment of three backward passes."""
    model = _mlp()
    wrapped = DistributedDataParallel(model, **form)
    seen: dict[str, float] = {}

    def second() -> None:
        seen["second"] = _sq_norm(model)

    def first() -> None:
        seen["first"] = _sq_norm(model)
        ENGINE.queue_callback(second)

    def hook(parameter: Tensor) -> None:
        if "hook" not in seen:
            ENGINE.queue_callback(first)
        own = 0.0 if parameter.grad is None else float(parameter.grad.square().sum())
        seen["hook"] = seen.get("hook", 0.0) + own

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    found = []
    for step in range(3):
        seen.clear()
        model.zero_grad()
        wrapped(_batch(rank, step)).square().mean().backward()
        found.append(
            {**seen, "after": _sq_norm(model), "own": _own_sq_norm(rank, step)}
        )
    return found


def _sharded(rank: int) -> list[str]:
    """Which hooks a fully sharded model fires in a step."""
    model, events = _mlp(), []
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    parameter = next(model.parameters())
    events.append(type(parameter).__name__)
    parameter.register_hook(lambda grad: events.append("tensor hook"))
    parameter.register_post_accumulate_grad_hook(lambda p: events.append("accumulated"))

    def on_forward(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(lambda grad: events.append("output hook"))

    model[2].register_forward_hook(on_forward)
    model(_batch(rank, 0)).square().mean().backward()
    return events


def _work(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: _backward(rank, form) for name, form in FORMS.items()
    }
    found["sharded"] = _sharded(rank)
    wrapped = DistributedDataParallel(_mlp())
    active = DistributedDataParallel._get_active_ddp_module
    inside: list[bool] = []
    wrapped.module.register_forward_hook(lambda *_: inside.append(active() is wrapped))
    wrapped(_batch(rank, 0))
    found["active"] = (inside, active() is None)
    with wrapped.no_sync():
        found["no_sync"] = wrapped.require_backward_grad_sync
    wrapped.register_comm_hook(None, allreduce_hook)
    try:
        wrapped.register_comm_hook(None, allreduce_hook)
    except RuntimeError as error:
        found["second hook"] = str(error)
    return found


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return run_in_processes(_work, 2)


Answers = list[dict[str, Any]]


@pytest.mark.parametrize("form", FORMS)
def test_the_reduced_gradient_is_seen_by_a_callback_s_callback(
    answers: Answers, form: str
) -> None:
    """The hook after accumulation sees the rank's own; in between it depends.

    So own norms are taken in the hook, and the applied gradient's in the second
    callback, which needs no communication of its own.
    """
    for answer in answers:
        for step in answer[form]:
            assert step["hook"] == pytest.approx(step["own"])
            assert step["second"] == step["after"]
    reduced = [[step["after"] for step in answer[form]] for answer in answers]
    assert reduced[0] == reduced[1]


def test_in_between_the_gradient_is_nobody_s(answers: Answers) -> None:
    """Buckets are copied back at the end; views of them are written to all along.

    So at the end of a backward pass ``.grad`` must not be read for either purpose.
    """
    for step in answers[0]["plain"]:
        assert step["first"] == pytest.approx(step["own"])
        assert step["first"] != pytest.approx(step["after"])
    for step in answers[0]["bucket view"]:
        assert step["first"] != pytest.approx(step["own"])


def test_sharded_parameters_have_no_tensor_hooks(answers: Answers) -> None:
    """Output hooks fire, and those after accumulation, on the shard of the sum.

    So such models are refused, not half read.
    """
    for answer in answers:
        events = answer["sharded"]
        assert events[0] == "DTensor"
        assert "output hook" in events
        assert "accumulated" in events
        assert "tensor hook" not in events


def test_a_wrapper_is_known_to_what_it_calls(answers: Answers) -> None:
    """So a probe of the inner model finds out that it is one of several."""
    for answer in answers:
        assert answer["active"] == ([True], True)
        assert answer["no_sync"] is False


def test_a_second_communication_hook_is_refused(answers: Answers) -> None:
    """So a probe leaves that place to its user."""
    for answer in answers:
        assert "can only be called once" in answer["second hook"]


def _gradients(rank: int, world_size: int) -> dict[bool, Tensor]:
    """The reduced gradient, with and without a communication hook."""
    found = {}
    for hooked in (False, True):
        model = _mlp().float()
        wrapped = DistributedDataParallel(model)
        if hooked:
            wrapped.register_comm_hook(None, allreduce_hook)
        wrapped(_batch(rank, 0).float()).square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found[hooked] = torch.cat([grad.flatten() for grad in grads])
    return found


def test_a_communication_hook_changes_bits() -> None:
    """At three ranks, by an all-reduce that does the same as none.

    So a probe reads beside the reduction and takes no part in it.
    """
    found = run_in_processes(_gradients, 3)[0]
    assert not torch.equal(found[False], found[True])
    torch.testing.assert_close(found[False], found[True])

"""What a probe is not attached to: reason and way out in every message."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from noisekit.core.errors import (
    BatchSizeError,
    DeviceMismatchError,
    NoParametersError,
    UsageError,
)
from noisekit.probes import attach


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_compiled_model_is_refused() -> None:
    """Catches: hooks that a compiled model never calls."""
    model = mlp()
    message = "drops module hooks silently; attach to the model before it is compiled"
    with pytest.raises(UsageError, match=message):
        attach(torch.compile(model), sgd(model))  # type: ignore[arg-type]


def test_a_model_compiled_in_place_is_refused() -> None:
    """Catches: looking for the wrapper only; a part may be compiled too."""
    model = mlp()
    model[0].compile()
    with pytest.raises(UsageError, match=r"got Linear at 0 from torch\.compile"):
        attach(model, sgd(model))


def test_data_parallel_is_refused() -> None:
    """Catches: a part of the batch taken for all of it."""
    model = mlp()
    message = r"got DataParallel at the top \(DataParallel\): each rank sees a part"
    with pytest.raises(UsageError, match=message):
        attach(nn.DataParallel(model), sgd(model))


def test_distributed_data_parallel_is_refused() -> None:
    """Catches: ranks that each report their own noise as the step's."""

    class DistributedDataParallel(nn.Module):
        """Stands for PyTorch's, which needs a process group to exist."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = mlp()
    with pytest.raises(UsageError, match="combining ranks is not built yet"):
        attach(DistributedDataParallel(model), sgd(model))


def test_a_scripted_model_is_refused() -> None:
    """Catches: hooks on a model that runs without Python."""

    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(UsageError, match="attach to the module that was scripted"):
        attach(Scripted(), sgd(mlp()))


def test_sparse_gradients_are_refused() -> None:
    """Catches: a failure in the middle of the first backward pass."""
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    with pytest.raises(UsageError, match="needs dense gradients, got Embedding at 0"):
        attach(model, sgd(model))


def test_no_model() -> None:
    with pytest.raises(UsageError, match=r"needs an nn\.Module, got function"):
        attach(mlp, sgd(mlp()))  # type: ignore[arg-type]


def test_no_optimizer() -> None:
    with pytest.raises(UsageError, match=r"needs a torch\.optim\.Optimizer, got list"):
        attach(mlp(), [])  # type: ignore[arg-type]


def test_somebody_else_s_optimizer() -> None:
    """Catches: a probe that waits for steps which never touch its model."""
    with pytest.raises(UsageError, match="SGD without any parameter of Sequential"):
        attach(mlp(), sgd(mlp()))


def test_nothing_to_train() -> None:
    model = mlp()
    optimizer = sgd(model)
    model.requires_grad_(False)
    with pytest.raises(NoParametersError, match="at least one trainable parameter"):
        attach(model, optimizer)


def test_a_model_on_two_devices() -> None:
    """Catches: an error out of the first backward pass."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).to("meta"))
    with pytest.raises(DeviceMismatchError, match="one device, got cpu, meta"):
        attach(model, sgd(model))


OPTIONS: list[tuple[dict[str, object], str]] = [
    ({"every": 0}, "every needs to be 1 or more steps, got 0"),
    (
        {"estimator": "exact"},
        "estimator needs to be one of 'auto', 'per_example', 'ghost', got 'exact'",
    ),
    (
        {"loss_reduction": "none"},
        "loss_reduction needs to be one of 'mean', 'sum', got 'none'",
    ),
    (
        {"microbatch_weights": "alike"},
        "microbatch_weights needs to be one of 'equal', 'by_size', got 'alike'",
    ),
    ({"unit": "token"}, "unit needs to be one of 'example', got 'token'"),
    (
        {"estimator": "ghost"},
        "needs loss_fn= and ghost_batch=, got loss_fn=None, ghost_batch=None",
    ),
    ({"ghost_batch": 0}, "ghost_batch needs 1 or more examples, got 0"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda x: str(x)[:30])
def test_options(options: dict[str, object], message: str) -> None:
    """Catches: an option that is accepted and ignored."""
    model = mlp()
    with pytest.raises(UsageError, match=message):
        attach(model, sgd(model), **options)  # type: ignore[arg-type]


def test_an_input_without_a_batch_axis() -> None:
    """Catches: an index error from inside a hook."""
    model = mlp()
    attach(model, sgd(model), batch_dim=1)
    message = r"needs a batch axis batch_dim=1, got a first input of shape \(4,\)"
    with pytest.raises(BatchSizeError, match=message):
        model(torch.zeros(4))


@pytest.mark.parametrize("call", [lambda p: p.measure(None, None), lambda p: p.loss_fn])
def test_what_needs_the_loss_asks_for_it(call: Callable[..., object]) -> None:
    model = mlp()
    probe = attach(model, sgd(model))
    with pytest.raises(
        UsageError, match="needs the loss, got loss_fn=None; give it to"
    ):
        call(probe)


def test_a_foreign_state() -> None:
    model = mlp()
    probe = attach(model, sgd(model))
    message = "got a state without examples_seen, num_readings, replayed"
    with pytest.raises(UsageError, match=message):
        probe.load_state_dict({"step": 3})

"""What a probe is not attached to: reason and way out in every message."""

import re
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
from noisekit.integrations import attach


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_data_parallel_is_refused() -> None:
    """Catches: a part of the batch taken for all of it."""
    model = mlp()
    message = (
        "attach needs a model that is called as a whole, got DataParallel at the top: "
        "its replicas live for one call and see parts of the batch; use "
        "DistributedDataParallel, whose ranks are read together."
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        attach(nn.DataParallel(model), sgd(model))


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "DeepSpeedEngine"])
def test_sharded_wrappers_are_refused(name: str) -> None:
    """Stand-ins of that name, since the real ones need process groups and packages.

    Catches: norms of the shards that this rank happens to hold.
    """
    wrapper: type[nn.Module] = type(name, (nn.Sequential,), {})
    model = mlp()
    message = f"got {name} at the top, which shards them: hooks see a shard of the grad"
    with pytest.raises(UsageError, match=re.escape(message)):
        attach(wrapper(model), sgd(model))


@pytest.mark.parametrize("base", [nn.Module, object])
def test_pipelines_are_refused(base: type) -> None:
    """A stage is no module, a traced pipeline is one.

    Catches: some layers' noise in the name of the model's.
    """
    stage = type("_PipelineStageBase", (base,), {})
    own = type("PipelineStage", (stage,), {})
    message = (
        "attach needs the whole model on every rank, got PipelineStage (pipeline "
        "parallelism): this rank has some layers only and no loss; measure at frozen "
        "weights with gradient_noise on the whole model."
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        attach(own(), sgd(mlp()))


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
    with pytest.raises(
        UsageError, match=r"model needs to be a torch.nn.Module, got function"
    ):
        attach(mlp, sgd(mlp()))  # type: ignore[arg-type]


def test_no_optimizer() -> None:
    with pytest.raises(UsageError, match=r"needs a torch\.optim\.Optimizer, got list"):
        attach(mlp(), [])  # type: ignore[arg-type]


def test_a_wrapper_that_is_an_optimizer_in_name() -> None:
    """Trainers wrap optimizers like this, without the hooks of one.

    Catches: an attribute error, or a probe that waits for steps it is never told of.
    """

    class Wrapped(torch.optim.Optimizer):
        def __init__(self, **inner: torch.optim.Optimizer) -> None:
            vars(self).update(inner)
            (self.param_groups,) = (each.param_groups for each in inner.values())

    message = "got a Wrapped that wraps another; give the optimizer inside the wrapper"
    model = mlp()
    with pytest.raises(UsageError, match=message):
        attach(model, Wrapped(hidden=sgd(model)))
    inner = sgd(model)
    with attach(model, Wrapped(optimizer=Wrapped(optimizer=inner))) as probe:
        model(torch.ones(2, 4)).sum().backward()
        inner.step()
    assert len(probe.readings) == 1


def test_a_list_of_optimizers() -> None:
    """Catches: a refusal that does not say that several probes are the way out."""
    model = mlp()
    several = [
        torch.optim.SGD(child.parameters(), lr=0.1) for child in (model[0], model[2])
    ]
    message = (
        "attach needs a torch.optim.Optimizer, got list of 2: readings are of one "
        "optimizer's steps; attach once for each, and each probe reads the parameters "
        "of its own."
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        attach(model, several)  # type: ignore[arg-type]
    probes = [attach(model, optimizer) for optimizer in several]
    model(torch.ones(2, 4)).sum().backward()
    for optimizer in several:
        optimizer.step()
    read = [probe.readings[0].coverage.methods.keys() for probe in probes]
    assert read == [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}]


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
    ({"every": 0}, "every needs to be at least 1 or a function, got 0"),
    (
        {"estimator": "exact"},
        "estimator needs to be one of 'auto', 'per_example', 'rows', 'chunks', "
        "'accumulation', 'ranks', 'random_signs', 'norm_layers', 'ghost', "
        "'preconditioned', or a NoiseEstimator of your own, got 'exact'",
    ),
    (
        {"loss_reduction": "none"},
        "loss_reduction needs to be 'mean' or 'sum', got 'none'",
    ),
    (
        {"microbatch_weights": "alike"},
        "microbatch_weights needs to be 'equal' or 'by_size', got 'alike'",
    ),
    (
        {"unit": "word"},
        "unit needs to be one of 'example', 'sequence', 'token', got 'word'",
    ),
    ({"estimator": ()}, "estimator needs one or more different names, got ()"),
    (
        {"estimator": ("rows", "rows")},
        "needs one or more different names, got ('rows', 'rows')",
    ),
    (
        {"estimator": "preconditioned"},
        "needs an estimator in front of it, got it first; write estimator=('auto', "
        "'preconditioned')",
    ),
    ({"row_share": 0.0}, "row_share needs to be positive, got 0.0"),
    ({"num_chunks": 1}, "num_chunks needs to be at least 2, got 1"),
    ({"num_signs": 0}, "num_signs needs to be at least 1, got 0"),
    ({"calibrate_every": 0}, "calibrate_every needs to be at least 1, got 0"),
    (
        {"estimator": ("auto", "preconditioned")},
        "needs one of Adam, AdamW, NAdam, RMSprop, got SGD; leave it out",
    ),
    (
        {"example_weights": len},
        "example_weights= needs the loss to be seen, got loss_fn=None",
    ),
    (
        {"estimator": "ghost"},
        "needs loss_fn= and ghost_batch=, got loss_fn=None, ghost_batch=None",
    ),
    (
        {"on_error": "ignore"},
        "on_error needs to be 'warn' or 'raise', got 'ignore'",
    ),
    ({"ghost_batch": 0}, "ghost_batch needs to be at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda x: str(x)[:30])
def test_options(options: dict[str, object], message: str) -> None:
    """Catches: an option that is accepted and ignored."""
    model = mlp()
    with pytest.raises(UsageError, match=re.escape(message)):
        attach(model, sgd(model), **options)  # type: ignore[arg-type]


def test_an_input_without_a_batch_axis() -> None:
    """Catches: an index error from inside a hook."""
    model = mlp()
    attach(model, sgd(model), batch_dim=1, on_error="raise")
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
    message = "got a state without examples_seen, left_out, noise, num_readings, quan"
    with pytest.raises(UsageError, match=message):
        probe.load_state_dict({"step": 3})

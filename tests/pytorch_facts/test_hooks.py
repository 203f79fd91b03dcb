"""What PyTorch does, as far as probes rest on it; none of these tests runs a probe.

A version of PyTorch that breaks one of these facts breaks the design, not a detail.
"""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

ENGINE = torch.autograd.Variable._execution_engine


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def batch(size: int = 6) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ hooks of modules


def test_output_hooks_see_the_layer_s_own_gradient_before_in_place_calls() -> None:
    """So a forward hook with a tensor hook captures a layer under an in-place ReLU."""
    model, seen = mlp(), []

    def capture(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(seen.append)

    handle = model[0].register_forward_hook(capture)
    model(batch()).sum().backward()
    handle.remove()
    weight_grad = seen[0].T @ batch()
    torch.testing.assert_close(weight_grad, model[0].weight.grad)


def test_full_backward_hooks_fail_under_in_place_calls() -> None:
    """So they are not used; they insert a node besides."""
    model = mlp()
    model[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="BackwardHookFunction is a view"):
        model(batch())
    plain, hooked = nn.Linear(4, 5), nn.Linear(4, 5)
    hooked.register_full_backward_hook(lambda *_: None)
    assert type(plain(batch()).grad_fn).__name__ == "AddmmBackward0"
    assert "BackwardHook" in type(hooked(batch()).grad_fn).__name__


def test_functional_use_of_a_child_s_weight_fires_no_hook() -> None:
    """So contributions are checked against the gradient: attention does this."""
    attention, called = nn.MultiheadAttention(4, 2, batch_first=True), []
    attention.out_proj.register_forward_hook(lambda *_: called.append(True))
    inputs = batch(6).view(2, 3, 4)
    attention(inputs, inputs, inputs)[0].sum().backward()
    assert called == []
    assert attention.out_proj.weight.grad is not None


def test_a_wrong_batch_axis_adds_up_to_the_right_gradient() -> None:
    """So the closure does not tell it, and ambiguous shapes are traced or refused."""
    layer, inputs = nn.Linear(4, 3), torch.randn(5, 5, 4)
    layer(inputs).square().sum().backward()
    output_grad = 2 * layer(inputs).detach()
    norms = []
    for axis in (0, 1):
        rows = [
            torch.einsum(
                "to,ti->oi", *(t.select(axis, i) for t in (output_grad, inputs))
            )
            for i in range(5)
        ]
        torch.testing.assert_close(torch.stack(rows).sum(0), layer.weight.grad)
        norms.append(float(sum(row.square().sum() for row in rows)))
    assert norms[0] != pytest.approx(norms[1], rel=0.05)


def test_batch_norm_in_training_couples_the_examples() -> None:
    """So an example's gradient is not its own, and parts of a batch are biased."""
    layer, inputs = nn.BatchNorm1d(4, affine=False), batch().requires_grad_()
    (grad,) = torch.autograd.grad(layer(inputs)[0].square().sum(), inputs)
    assert (grad[1:].abs().sum(1) > 0).all()
    (grad,) = torch.autograd.grad(layer.eval()(inputs)[0].square().sum(), inputs)
    assert (grad[1:] == 0).all()


def test_parts_of_a_normalised_batch_tell_another_noise() -> None:
    """Rows and chunks of 500 batches of 8, against the spread of the batches.

    So rows and chunks are refused under BatchNorm, and micro-batches are read.
    """
    torch.manual_seed(0)
    layer, norm = nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(4, 3, generator=generator)
    wholes, by_rows, by_chunks = [], 0.0, 0.0
    for _ in range(500):
        inputs = 1 + torch.randn(8, 4, generator=generator)
        targets = inputs @ teacher + torch.randn(8, 3, generator=generator)
        hidden = layer(inputs)
        loss = (norm(hidden) - targets).square().sum(1).mean()
        (grad,) = torch.autograd.grad(loss, hidden)
        rows = 8 * torch.einsum("no,ni->noi", grad, inputs).flatten(1)
        wholes.append(rows.mean(0))
        by_rows += float(rows.var(0).sum()) / 500
        by_chunks += float(2 * rows.view(4, 2, -1).mean(1).var(0).sum()) / 500
    truth = float(8 * torch.stack(wholes).var(0).sum())
    assert by_rows / truth > 1.5
    assert by_chunks / truth > 1.5


def test_copies_of_hooks() -> None:
    """A bound method carries its owner along; a function on a copy feeds the original.

    So hooks are objects with weak references and an inert copy.
    """

    class Owner:
        def __init__(self) -> None:
            self.calls = 0

        def hook(self, *_: object) -> None:
            self.calls += 1

    model, owner, calls = mlp(), Owner(), []
    model.register_forward_hook(owner.hook)
    model[0].register_forward_hook(lambda *_: calls.append(True))
    clone = copy.deepcopy(model)
    clone(batch())
    assert owner.calls == 0  # the clone's hook belongs to a clone of the owner
    assert next(iter(clone._forward_hooks.values())).__self__.calls == 1
    assert calls == [True]
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(model)


# ------------------------------------------------------------- hooks of parameters


def test_a_parameter_s_hook_sees_what_one_backward_pass_adds() -> None:
    """Once and whole, also where several layers share it; ``.grad`` holds the sum."""
    shared, seen = nn.Linear(4, 4), []
    shared.weight.register_hook(lambda grad: seen.append(grad.clone()))
    for _ in range(2):
        shared(shared(batch())).sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0] + seen[1], shared.weight.grad)


def test_post_accumulate_hooks_see_the_sum_and_return_nothing() -> None:
    layer, seen = nn.Linear(4, 4), []
    layer.weight.register_post_accumulate_grad_hook(
        lambda parameter: seen.append(parameter.grad.clone())
    )
    for _ in range(2):
        layer(batch()).sum().backward()
    torch.testing.assert_close(2 * seen[0], seen[1])
    layer.bias.register_post_accumulate_grad_hook(lambda parameter: 1)
    with pytest.raises(TypeError, match="but hook returned 'int'"):
        layer(batch()).sum().backward()


def test_autograd_grad_fires_output_hooks_and_accumulates_nothing() -> None:
    """So a pass counts only where a parameter's own hook fires in the same run."""
    layer, outputs, accumulated = nn.Linear(4, 4), [], []
    layer.weight.register_post_accumulate_grad_hook(accumulated.append)

    def hook(grad: Tensor) -> None:
        outputs.append(torch._C._current_graph_task_id())

    output = layer(batch())
    output.register_hook(hook)
    torch.autograd.grad(output.sum(), layer.weight, retain_graph=True)
    assert len(outputs) == 1
    assert accumulated == []
    output.sum().backward()
    assert len(set(outputs)) == 2  # every run has a number of its own
    assert -1 not in outputs
    assert len(accumulated) == 1
    assert torch._C._current_graph_task_id() == -1


def test_gradients_that_can_be_differentiated_again_say_so() -> None:
    """So a gradient penalty is noticed before its backward pass."""
    layer, kept = nn.Linear(4, 4), []
    inputs = batch().requires_grad_()
    hidden = layer(inputs)
    hidden.register_hook(lambda grad: kept.append(grad.requires_grad))
    loss = hidden.square().sum()
    torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.autograd.grad(loss, inputs, create_graph=True)
    assert kept == [False, True]


def test_callbacks_of_the_engine_may_queue_another_one() -> None:
    """So what others do when a backward pass ends can be waited for."""
    layer, order = nn.Linear(4, 4), []

    def first() -> None:
        order.append("first")
        ENGINE.queue_callback(lambda: order.append("queued by the first"))

    def hook(parameter: Tensor) -> None:
        if not order:
            order.append("hook")
            ENGINE.queue_callback(first)
            ENGINE.queue_callback(lambda: order.append("second"))

    layer.weight.register_post_accumulate_grad_hook(hook)
    layer(batch()).sum().backward()
    assert order == ["hook", "first", "second", "queued by the first"]


# ------------------------------------------------------------------ optimizers


def test_step_pre_hooks_come_before_the_closure() -> None:
    """So they see no gradient, or the last step's; they may replace the closure."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen, evaluations = [], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch()).square().sum()
        loss.backward()
        return loss

    def before(_: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        seen.append(model[0].weight.grad)
        (own, given) = args

        def watched() -> Tensor:
            evaluations.append(True)
            return given()

        return (own, watched), kwargs

    optimizer.register_step_pre_hook(before)
    optimizer.step(closure)
    optimizer.step(closure)
    assert seen[0] is None
    assert seen[1] is not None
    assert len(evaluations) == 2


def test_a_skipped_step_fires_no_hook_unless_the_optimizer_is_fused() -> None:
    """A fused one is called, and told on the device whether to do anything."""
    fired = {}
    for fused in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        hook: Callable[..., None] = lambda o, *_: fired.setdefault(  # noqa: E731
            o.defaults["fused"], getattr(o, "found_inf", None)
        )
        optimizer.register_step_post_hook(hook)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(batch()).sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert list(fired) == [True]
    assert bool(fired[True])


def test_writes_to_gradients_are_counted_but_not_unscaling() -> None:
    """So clipping is noticed without looking at values, a no-op one as well."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(batch()).sum()).backward()
    grad = model[0].weight.grad
    assert grad is not None
    versions = [grad._version]
    scaler.unscale_(optimizer)
    versions.append(grad._version)
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    versions.append(grad._version)
    optimizer.zero_grad(set_to_none=False)
    versions.append(grad._version)
    assert versions[0] == versions[1] < versions[2] < versions[3]


def test_the_scale_can_be_had_without_waiting() -> None:
    """``get_scale`` turns it into a number; it is later overwritten in place."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(batch()).sum() * float("inf")).backward()
    scale = scaler._get_scale_async()
    assert isinstance(scale, Tensor)
    assert scale.item() == 4.0
    scaler.step(optimizer)
    scaler.update()
    assert scale.item() == 2.0


def test_optimizers_leave_the_gradient_as_it_is() -> None:
    """So a write that is counted between backward and step was somebody else's."""
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        for foreach in (False, True):
            model = mlp()
            optimizer = kind(
                model.parameters(), lr=0.1, weight_decay=0.1, foreach=foreach
            )
            model(batch()).sum().backward()
            before = [p.grad._version for p in model.parameters()]
            optimizer.step()
            assert before == [p.grad._version for p in model.parameters()]


def test_half_precision_squares_overflow() -> None:
    """So norms are taken in float32 or wider."""
    grad = torch.full((4,), 300.0, dtype=torch.float16)
    assert grad.square().sum().isinf()
    assert torch.full((4,), 1e-4, dtype=torch.float16).square().sum() == 0
    assert grad.float().square().sum() == 4 * 90_000


# ------------------------------------------------------------- devices


SYNCHRONISING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.sum() > 0),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "unique": lambda t: torch.unique(t),
    "nonzero": lambda t: torch.nonzero(t),
    "mask": lambda t: t[t > 0],
    "other device": lambda t: t + torch.ones(3),
}


@pytest.mark.parametrize("ask", SYNCHRONISING.values(), ids=SYNCHRONISING)
def test_the_meta_device_refuses_what_would_wait_on_a_gpu(
    ask: Callable[[Tensor], object],
) -> None:
    """So it stands in for one: a step that runs there never asks for values."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        ask(torch.ones(3, device="meta"))


def test_kernels_that_fill_need_no_copy_from_the_host() -> None:
    """So counts get onto a device by filling; scalars of the host may be mixed in."""
    filled = torch.full((2,), 3.0, device="meta")
    assert (filled * torch.tensor(2.0)).is_meta
    assert torch.cat([filled, filled.new_zeros(1)]).shape == (3,)


def test_embedding_sums_by_an_equality_mask() -> None:
    """Squared norms of a table's gradient without ``unique``, which waits."""
    tokens = torch.tensor([[1, 2, 1], [0, 0, 0]])
    grads = torch.randn(2, 3, 4)
    same = (tokens[:, :, None] == tokens[:, None, :]).float()
    norms = (same * (grads @ grads.transpose(1, 2))).sum((1, 2))
    for row, norm in enumerate(norms):
        table = torch.zeros(3, 4).index_add_(0, tokens[row], grads[row])
        assert float(norm) == pytest.approx(float(table.square().sum()), rel=1e-5)


def test_a_vector_jacobian_product_needs_neither_loss_nor_targets() -> None:
    """A module's own call, its inputs and output gradient give every example's part."""
    module, inputs = nn.GRU(4, 3, batch_first=True), torch.randn(2, 5, 4)
    output, _ = module(inputs)
    seen: list[Tensor] = []
    output.register_hook(seen.append)
    functional.cross_entropy(output[:, -1], torch.tensor([0, 2])).backward()
    whole = [p.grad for p in module.parameters()]
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(2):
            again, _ = module(inputs[i : i + 1])
            parts.append(
                torch.autograd.grad(
                    again, list(module.parameters()), seen[0][i : i + 1]
                )
            )
    for grad, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(first + second, grad)

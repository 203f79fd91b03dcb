"""Attaching changes no bit of a training, whatever its loop looks like."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from noisekit.integrations import attach
from noisekit.probes import Probe


class Net(nn.Module):
    """Everything that a probe could move: draws, buffers, in-place calls, modes."""

    def __init__(self, *, norm: bool = True, recompute: str = "") -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        self.middle = nn.Sequential(
            nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 8)
        )
        self.head = nn.Linear(8, 3)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm(self.first(x)), inplace=True)
        if self.recompute:
            hidden = checkpoint(
                self.middle, hidden, use_reentrant=self.recompute == "reentrant"
            )
        else:
            hidden = self.middle(hidden)
        logits: Tensor = self.head(hidden)
        return logits


@dataclass
class Loop:
    """A training under way, to which an idiom does its step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    probes: list[Probe]
    extra: dict[str, Any] = field(default_factory=dict)

    def batch(self, step: int, size: int = 6) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(size, 6, generator=generator)
        return inputs, torch.randint(3, (size,), generator=generator)

    def loss(self, step: int, size: int = 6) -> Tensor:
        inputs, targets = self.batch(step, size)
        return functional.cross_entropy(self.model(inputs), targets)


Idiom = Callable[[Loop, int], None]


def plain(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    loop.loss(step).backward()
    loop.optimizer.step()


def zeroed_in_place(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad(set_to_none=False)
    loop.loss(step).backward()
    loop.optimizer.step()


def accumulated(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    for part, size in enumerate((3, 2, 4)):
        (loop.loss(10 * step + part, size) / 3).backward()
    loop.optimizer.step()


def clipped(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    loop.loss(step).backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
    loop.optimizer.step()


def scaled(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    factor = float("inf") if step == 1 else 1.0
    loop.scaler.scale(loop.loss(step) * factor).backward()
    loop.scaler.unscale_(loop.optimizer)
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def autocast(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loop.loss(step)
    loss.backward()
    loop.optimizer.step()


def closure(loop: Loop, step: int) -> None:
    def evaluate() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss(step)
        loss.backward()
        return loss

    loop.optimizer.step(evaluate)  # type: ignore[arg-type]


def scheduled(loop: Loop, step: int) -> None:
    if not loop.extra:
        loop.extra["schedule"] = torch.optim.lr_scheduler.ExponentialLR(
            loop.optimizer, 0.5
        )
    plain(loop, step)
    loop.extra["schedule"].step()


def two_optimizers(loop: Loop, step: int) -> None:
    if not loop.extra:
        groups = [{"params": loop.model.first.parameters(), "lr": 0.01}]  # type: ignore[union-attr]
        loop.extra["second"] = torch.optim.Adam(groups)
        if loop.probes:
            loop.probes.append(attach(loop.model, loop.extra["second"]))
    loop.model.zero_grad()
    loop.loss(step).backward()
    loop.optimizer.step()
    loop.extra["second"].step()


def adversarial(loop: Loop, step: int) -> None:
    inputs, targets = loop.batch(step)
    leaf = inputs.clone().requires_grad_()
    loss = functional.cross_entropy(loop.model(leaf), targets)
    (slope,) = torch.autograd.grad(loss, leaf)
    loop.optimizer.zero_grad()
    perturbed = inputs + 0.1 * slope.sign()
    functional.cross_entropy(loop.model(perturbed), targets).backward()
    loop.optimizer.step()


def penalised(loop: Loop, step: int) -> None:
    inputs, targets = loop.batch(step)
    leaf = inputs.clone().requires_grad_()
    loss = functional.cross_entropy(loop.model(leaf), targets)
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    loop.optimizer.zero_grad()
    (loss + slope.square().sum()).backward()
    loop.optimizer.step()


def evaluated(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    loss = loop.loss(step)
    loop.model.eval()
    with torch.no_grad():
        loop.loss(step + 100)
    loop.loss(step + 200)  # somebody forgot
    loop.model.train()
    loss.backward()
    loop.optimizer.step()


def interrupted(loop: Loop, step: int) -> None:
    def broken(grad: Tensor) -> None:
        raise RuntimeError("out of memory, say")

    loop.optimizer.zero_grad()
    handle = loop.model.head.weight.register_hook(broken)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.loss(step).backward()
    handle.remove()
    plain(loop, step)


def averaged(loop: Loop, step: int) -> None:
    plain(loop, step)
    if not loop.extra:
        loop.extra["average"] = torch.optim.swa_utils.AveragedModel(loop.model)
    loop.extra["average"].update_parameters(loop.model)
    copy.deepcopy(loop.model)(loop.batch(step)[0]).sum().backward()


def attached_anew(loop: Loop, step: int) -> None:
    plain(loop, step)
    if loop.probes:
        loop.probes.pop().detach()
        loop.probes.append(attach(loop.model, loop.optimizer))


def measured(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    loop.loss(step).backward()
    for probe in loop.probes:
        probe.measure(*loop.batch(step + 100))
    loop.optimizer.step()


def frozen_and_thawed(loop: Loop, step: int) -> None:
    loop.model.first.requires_grad_(step != 1)  # type: ignore[union-attr]
    plain(loop, step)


IDIOMS: tuple[Idiom, ...] = (
    plain,
    zeroed_in_place,
    accumulated,
    clipped,
    scaled,
    autocast,
    closure,
    scheduled,
    two_optimizers,
    adversarial,
    penalised,
    evaluated,
    interrupted,
    averaged,
    attached_anew,
    measured,
    frozen_and_thawed,
)


def outcome(
    idiom: Idiom, build: Callable[[], nn.Module], *, probed: bool, **options: Any
) -> list[Tensor]:
    """Parameters, gradients, buffers, random state and modes after four steps."""
    torch.manual_seed(3)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=idiom is scaled)
    probes = []
    if probed:
        loss_fn = functional.cross_entropy if idiom is measured else None
        probes.append(
            attach(model, optimizer, scaler=scaler, loss_fn=loss_fn, **options)
        )
    loop = Loop(model, optimizer, scaler, probes)
    for step in range(4):
        idiom(loop, step)
    assert len(loop.probes) >= probed
    assert all(probe.step > 0 for probe in loop.probes if idiom is not attached_anew)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    modes = torch.tensor([module.training for module in model.modules()])
    state = [tensor.clone() for tensor in model.state_dict().values()]
    return [*state, *grads, torch.get_rng_state(), modes]


def assert_same_bits(
    idiom: Idiom, build: Callable[[], nn.Module], **options: Any
) -> None:
    before = outcome(idiom, build, probed=False)
    after = outcome(idiom, build, probed=True, **options)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "layer norm"])
@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom.__name__)
def test_no_bit_changes(idiom: Idiom, norm: bool) -> None:
    """With examples that are coupled, and with examples that are read.

    Catches: a closure that is called once more, gradients that a hook holds or
    replaces, draws and statistics of a replay, a mode that is not given back.
    """
    assert_same_bits(idiom, lambda: Net(norm=norm))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("form", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("idiom", [plain, accumulated, autocast])
def test_no_bit_changes_under_checkpointing(
    idiom: Idiom, form: str, early_stop: bool
) -> None:
    """Layers run again in the backward pass, with the same draws.

    Catches: a recomputation that is captured as a second call, draws in between.
    """
    with set_checkpoint_early_stop(early_stop):
        assert_same_bits(idiom, lambda: Net(norm=False, recompute=form))


ESTIMATORS: dict[str, dict[str, Any]] = {
    "rows": {"estimator": "rows"},
    "chunks": {"estimator": "chunks", "num_chunks": 2},
    "signs": {"estimator": "random_signs"},
    "side by side": {"estimator": ("auto", "accumulation", "chunks"), "num_chunks": 2},
    "every other": {"every": 2},
    "budget": {"budget": 0.5},
}


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("idiom", [plain, accumulated, clipped])
def test_no_bit_changes_whatever_is_read(idiom: Idiom, options: dict[str, Any]) -> None:
    """Catches: rows drawn from the global generator, signed passes that accumulate."""
    assert_same_bits(idiom, lambda: Net(norm=False), **options)

"""What a replayed call depends on beside its inputs, and what it must leave alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from noisekit.core.errors import CoupledExamplesError
from noisekit.integrations import attach
from tests.probes.exactness import (
    assert_agree,
    data,
    expected_now,
    readings_of,
    seeded,
)
from tests.probes.networks import Headed
from tests.reference import noise as reference

# PyTorch's own remark on hooks that compute a weight; they are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


# ------------------------------------------------------------------------ buffers


class _Running(nn.Module):
    """Divides by a running scale that it updates after use while training."""

    def __init__(self, *, from_step: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6))
        self.register_buffer("scale", torch.tensor(1.0))
        self.from_step = from_step
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x) * self.weight / self.scale
        self.step += 1
        if self.training and self.step >= self.from_step:
            self.scale = self.scale * 1.5
        return hidden


NORMS = {
    "parametrization": parametrizations.spectral_norm,
    "hook": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", NORMS)
def test_power_iterations_are_those_of_the_step(kind: str) -> None:
    """A replay starts from the vectors that the call found, not from those it left.

    Catches: a weight that has had one iteration more; vectors that examples share and
    that each replay moves on.
    """
    model = seeded(lambda: Headed(NORMS[kind](nn.Linear(6, 5)), 5))
    inputs, targets = data(4, 6)
    for reading in readings_of(model, inputs, targets, steps=1):
        assert_agree(reading, expected_now(model, inputs, targets), 1e-9)


def test_a_buffer_read_before_it_is_written_has_its_old_value() -> None:
    """Catches: buffers taken from after the call, which the closure would show."""
    model = seeded(lambda: Headed(_Running(), 6))
    inputs, targets = data(4, 6)
    readings = readings_of(model, inputs, targets)
    assert all(reading.coverage.complete for reading in readings)
    used = model.core.scale.clone() / 1.5
    model.core.scale = used
    assert_agree(readings[-1], expected_now(model, inputs, targets), 1e-9)


def test_buffers_that_start_to_change_are_replayed_from_before_the_call() -> None:
    """Catches: a replay with a buffer that the call has already written to."""
    model = seeded(lambda: Headed(_Running(from_step=3), 6))
    readings = readings_of(model, *data(4, 6), steps=5)
    assert [reading.coverage.complete for reading in readings] == [True] * 5


@pytest.mark.parametrize("kind", NORMS)
def test_a_replay_writes_to_no_buffer(kind: str) -> None:
    """Catches: power iterations of the replay left in the model."""
    states = []
    for probed in (False, True):
        model = seeded(lambda: Headed(NORMS[kind](nn.Linear(6, 5)), 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if probed:
            attach(model, optimizer)
        inputs, targets = data(4, 6)
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --------------------------------------------------------------- other attributes


class _Remembering(nn.Module):
    """Keeps what it computed, for a penalty or for a plot."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.last: Tensor | None = None
        self.all: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * self.weight
        self.all.append(self.last)
        self.calls += 1
        return self.last


def test_what_a_module_keeps_of_its_call_is_left_alone() -> None:
    """Catches: an activation of one replayed example, where the batch's should be.

    Also lists that grow, and counters that count replays.
    """
    model = seeded(lambda: Headed(_Remembering(), 6))
    inputs, targets = data(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer)
    functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    assert probe.readings[0].coverage.complete
    assert model.core.calls == 1
    assert len(model.core.all) == 1
    assert model.core.last is model.core.all[0]
    assert model.core.last.shape == (4, 6)


def test_recomputation_is_not_asked_for_statistics() -> None:
    """Unpacking what a checkpointed layer has saved would run it once more.

    Catches: statistics taken from the graph whatever hooks are on saved tensors.
    """
    calls = []
    block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh())
    block.register_forward_pre_hook(lambda *_: calls.append(1))

    def route(core: nn.Module, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(core, x, use_reentrant=False)
        return hidden

    model = seeded(lambda: Headed(block, 6, route))
    inputs, targets = data(4, 6)
    (first, second) = readings_of(model, inputs, targets, steps=2)
    assert_agree(second, expected_now(model, inputs, targets), 1e-9)
    assert first.coverage.complete
    # Two steps of a forward pass and its recomputation, and the reference's own four
    # examples twice; copies of the model call copies of this hook.
    assert len(calls) == 2 * 2 + 4 * 2


# ----------------------------------------------------------------------- precision


def _folded(core: nn.Module, x: Tensor) -> Tensor:
    hidden: Tensor = core[0](x)
    return core[1](hidden)[0]


MIXED = {
    "linear": lambda: Headed(nn.Linear(6, 5), 5),
    "recurrent": lambda: Headed(
        nn.ModuleList([nn.Linear(6, 6), nn.LSTM(6, 5, batch_first=True)]), 5, _folded
    ),
    "encoder": lambda: Headed(
        nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 6
    ),
    "convolutions": lambda: Headed(
        nn.Sequential(nn.Conv1d(5, 5, 3), nn.GroupNorm(1, 5), nn.PReLU(5)), 4
    ),
}


HALVES = [
    (name, dtype)
    for name in MIXED
    for dtype in (torch.bfloat16, torch.float16)
    # PyTorch has no recurrent kernel in float16 on a CPU.
    if (name, dtype) != ("recurrent", torch.float16)
]


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_autocast_is_read_to_its_own_precision(name: str, dtype: torch.dtype) -> None:
    """Catches: a replay outside autocast, whose inputs are half and weights single."""
    torch.manual_seed(1)
    model = MIXED[name]()
    inputs, targets = data(4, 5, 6)
    single = inputs.float()
    classes = targets[:, None].expand(-1, 5).flatten()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer)
    with torch.autocast("cpu", dtype):
        outputs = model(single)
    functional.cross_entropy(outputs.float().flatten(0, 1), classes).backward()
    optimizer.step()
    double = model.double()
    grads = reference.contributions(
        double,
        lambda o, t: functional.cross_entropy(o.flatten(0, 1), t),
        (inputs,),
        classes,
    )
    expected = {name: len(inputs) * rows for name, rows in grads.items()}
    assert_agree(probe.readings[0], expected, 5e-2)


def test_a_gradient_that_is_zero_but_for_rounding_is_no_failure() -> None:
    """Softmax does not see a bias on the keys; what arrives has no digits to compare.

    Catches: a closure judged relative to nothing, which breaks off training.
    """

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.query(x) @ self.key(x).mT
            return scores.softmax(-1) @ x

    torch.manual_seed(1)
    model = Headed(Attention(), 6, lambda core, x: core(x).mean(1))
    inputs, targets = data(16, 9, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer)
    functional.cross_entropy(model(inputs.float()), targets).backward()
    optimizer.step()
    assert probe.readings[0].coverage.complete


# ------------------------------------------------------------------------ refusals


class _OneSize(nn.Module):
    """Mixes examples by a matrix of the batch's own size."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix @ x


def test_a_call_that_no_example_can_repeat_says_so() -> None:
    """Catches: the replay's own error raised in the middle of somebody's backward."""
    model = seeded(lambda: Headed(_OneSize(), 6))
    readings = readings_of(model, *data(4, 6))
    (reason,) = set(readings[-1].coverage.unread.values())
    assert reason.startswith("the model: replaying Headed on one example: ")


def test_counts_over_the_batch_couple_the_examples() -> None:
    """Catches: an embedding whose gradient is divided by counts, read as if not.

    The message names the layer and what to do.
    """
    table = nn.Embedding(7, 6, scale_grad_by_freq=True)
    model = seeded(lambda: Headed(table, 6, lambda core, x: core(x).mean(1)))
    tokens, targets = torch.randint(7, (4, 5)), torch.randint(3, (4,))
    (reading,) = readings_of(model, tokens, targets, steps=1)
    reason = "scale_grad_by_freq=True couples the examples (core)"
    assert reading.coverage.reason == reason
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, estimator="per_example", on_error="raise")
    with pytest.raises(CoupledExamplesError, match=r"or switch that off\.$"):
        model(tokens)

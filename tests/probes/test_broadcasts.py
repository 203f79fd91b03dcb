"""Parameters and tables that are broadcast over examples, read without a replay."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.integrations import attach
from noisekit.probes import Reading

D, T = 6, 4


class Tokens(nn.Module):
    """Sequences that meet a tensor of no example, in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.into, self.inner = nn.Linear(4, D), nn.Linear(D, D)
        self.head, self.drop = nn.Linear(D, 3), nn.Dropout(0.3)
        self.table = nn.Embedding(T + 3, D)
        self.bare = nn.Parameter(torch.randn(1, T + 3, D))

    def forward(self, x: Tensor) -> Tensor:
        meet = getattr(self, f"_{self.way}")
        hidden: Tensor = meet(self.into(x), self.bare, *x.shape[:2])
        hidden = self.drop(torch.tanh(self.inner(self.drop(hidden))))
        logits: Tensor = self.head(hidden.mean(1))
        return logits

    def _slice(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return h + p[:, :t]

    def _index(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return h + p[0, :t]

    def _minus(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return torch.sub(h, p[:, :t], alpha=2.0)

    def _twice(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return torch.tanh(h + p[:, :t]) - p[:, :t]

    def _time_first(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return (h.transpose(0, 1) + p[0, :t].unsqueeze(1)).transpose(0, 1)

    def _expanded(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return torch.cat([p[:, :1].expand(n, -1, -1), h], 1)

    def _repeated(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return torch.cat([p[:, :1].repeat(n, 1, 1), h], 1)

    def _one_for_all(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return h + p[:, :1]

    def _looked_up(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        found: Tensor = self.table(torch.arange(t))
        return h + found

    def _looked_up_twice(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        place = torch.arange(t)[None]
        return h + self.table(place) + self.table(place + 1)

    # Ways that the graph does not explain, so that a module is replayed.

    def _reversed(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return (h.flip(0) + p[:, :t]).flip(0)

    def _merged(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return (h.reshape(n * t, -1) + p[0, :1]).reshape(n, t, -1)

    def _stacked(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        both = torch.cat([h, p[:, :1].expand(n, t, -1)], 0)
        return both[:n] + both[n:]

    def _squared(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return h + p[:, :t] + p.square().sum()

    def _scaled(self, h: Tensor, p: Tensor, n: int, t: int) -> Tensor:
        return h * p[:, :t]


READ = (
    *("slice", "index", "minus", "twice", "time_first", "expanded", "repeated"),
    "one_for_all",
)
LOOKED_UP = ("looked_up", "looked_up_twice")
REPLAYED = ("reversed", "merged", "stacked", "squared", "scaled")


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of all examples, with equal draws on each call."""
    torch.manual_seed(9)
    targets = torch.arange(len(inputs)) % 3
    return functional.cross_entropy(model(inputs), targets, reduction="none")


def expected_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """``|g_i|²`` by a backward pass per example, dropout masks included."""
    norms = []
    for loss in loss_of(model, inputs):
        grads = torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, materialize_grads=True
        )
        norms.append(sum(grad.square().sum() for grad in grads))
    return torch.stack(norms)


def model_of(way: str) -> nn.Module:
    torch.manual_seed(1)
    return Tokens(way).double()


def readings_of(
    model: nn.Module, inputs: Tensor, *, steps: int, **options: object
) -> list[Reading]:
    """Of steps that move nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, on_error="raise", **options) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, inputs).mean().backward()
            optimizer.step()
    return probe.readings


def inputs_of(count: int) -> Tensor:
    drawn = torch.Generator().manual_seed(2)
    return torch.randn(count, T, 4, dtype=torch.float64, generator=drawn)


@pytest.mark.parametrize("count", [6, T], ids=["six", "as many as positions"])
@pytest.mark.parametrize("way", [*READ, *LOOKED_UP, *REPLAYED])
def test_every_example_is_exact_from_the_first_reading(way: str, count: int) -> None:
    """With dropout, whose masks are those of the step.

    Catches: a sign, a factor or one of two uses left out; positions taken for
    examples; rows in another order taken for the examples in theirs; a use of the
    parameter that the graph does not explain taken for none.
    """
    model, inputs = model_of(way), inputs_of(count)
    readings = readings_of(model, inputs, steps=2)
    assert all(reading.coverage.complete for reading in readings)
    for reading in readings:
        torch.testing.assert_close(reading.example_sq_norms, expected_of(model, inputs))
    methods = readings[-1].coverage.methods
    if way in REPLAYED:
        assert methods["bare"] == "replay of the model"
    elif way in LOOKED_UP:
        assert methods["table.weight"] == "embedding"
    else:
        assert methods["bare"] == "broadcast"


def test_another_batch_is_read_as_well() -> None:
    """Catches: the axis sought by the size of the first batch."""
    model = model_of("expanded")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, on_error="raise") as probe:
        for count in (6, 3, T, 7):
            optimizer.zero_grad()
            inputs = inputs_of(count)
            loss_of(model, inputs).mean().backward()
            optimizer.step()
            reading = probe.readings[-1]
            torch.testing.assert_close(
                reading.example_sq_norms, expected_of(model, inputs)
            )
            assert reading.coverage.methods["bare"] == "broadcast"


def test_a_forward_pass_that_changes_is_followed() -> None:
    """The reading says what is missing, and the next one is whole.

    Catches: a broadcast that was there once taken for granted.
    """
    model, inputs = model_of("slice"), inputs_of(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, on_error="raise") as probe:
        for way in ("slice", "scaled", "scaled"):
            model.way = way
            optimizer.zero_grad()
            loss_of(model, inputs).mean().backward()
            optimizer.step()
    first, second, third = probe.readings
    assert first.coverage.complete
    assert set(second.coverage.unread) == {"bare"}
    assert third.coverage.complete
    torch.testing.assert_close(third.example_sq_norms, expected_of(model, inputs))


@pytest.mark.filterwarnings("ignore::noisekit.core.errors.ProbeAdvice")
@pytest.mark.filterwarnings("ignore::noisekit.core.errors.ProbeWarning")
def test_a_use_outside_the_model_is_found() -> None:
    """Catches: a penalty on the parameter, which no output of the model shows."""
    model, inputs = model_of("slice"), inputs_of(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            (loss_of(model, inputs).mean() + model.bare.square().sum()).backward()
            optimizer.step()
    assert all("bare" in reading.coverage.unread for reading in probe.readings)


class WithLoss(nn.Module):
    """A model that returns its loss, of which no example has an output."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, D), nn.Linear(D, 7)
        self.places = nn.Parameter(torch.randn(T, D))

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.table(words) + self.places)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_a_loss_inside_the_model_is_no_obstacle() -> None:
    """Catches: examples sought in the model's outputs alone."""
    torch.manual_seed(0)
    model, count = WithLoss().double(), 6
    words, targets = torch.randint(7, (2, count, T))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, on_error="raise") as probe:
        model(words, targets).backward()
        optimizer.step()
    expected = []
    for i in range(count):
        one = model(words[i : i + 1], targets[i : i + 1])
        grads = torch.autograd.grad(one, list(model.parameters()))
        expected.append(sum(grad.square().sum() for grad in grads))
    reading = probe.readings[0]
    assert reading.coverage.complete
    torch.testing.assert_close(reading.example_sq_norms, torch.stack(expected))


@pytest.mark.parametrize("options", [{"estimator": "chunks"}, {"estimator": "rows"}])
def test_chunks_and_rows_are_read_alike(options: dict[str, str]) -> None:
    """Catches: gradients that cannot be cut into chunks, or chosen from."""
    for way in ("expanded", "looked_up"):
        model, inputs = model_of(way), inputs_of(8)
        (reading,) = readings_of(model, inputs, steps=1, **options)
        assert reading.coverage.complete


def test_a_pass_without_backward_leaves_no_graph_behind() -> None:
    """Catches: hooks on a node of the graph that keep the graph alive."""
    model, inputs = model_of("slice"), inputs_of(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, on_error="raise"):
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, inputs).mean().backward()
            optimizer.step()
        gc.disable()
        try:
            inputs = inputs.clone().requires_grad_()
            outputs = model(inputs)
            watch = weakref.ref(inputs)
            del inputs, outputs
            model(inputs_of(6)).mean().backward()  # drops what the last pass has left
            assert watch() is None
        finally:
            gc.enable()

"""Recurrent layers against one backward pass per example."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from noisekit.integrations import attach
from noisekit.probes import Reading

IN, H, N, T = 5, 4, 6, 7


class Recurrent(nn.Module):
    """A recurrent layer whose outputs and last states are all part of the loss."""

    def __init__(self, kind: type[nn.RNNBase], *, given: bool, **options: object):
        super().__init__()
        self.layer = kind(IN, H, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.count = directions * self.layer.num_layers
        self.start, self.head = nn.Linear(IN, H), nn.Linear(directions * H, 3)
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        state: tuple[object, ...] = ()
        if self.given:
            h = self.start(x.mean(1)).tanh()[None].expand(self.count, -1, -1)
            state = ((h, 2 * h) if isinstance(self.layer, nn.LSTM) else h,)
        x = x if self.layer.batch_first else x.transpose(0, 1)
        outputs, last = self.layer(x, *state)
        if isinstance(self.layer, nn.LSTM):
            last = last[0] + 3 * last[1]
        over = 1 if self.layer.batch_first else 0
        logits: Tensor = self.head(outputs).mean(over) + last.sum(0)[:, :3]
        return logits


def losses_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of all examples, with equal draws on each call."""
    torch.manual_seed(9)
    targets = torch.arange(len(inputs)) % 3
    return functional.cross_entropy(model(inputs), targets, reduction="none")


def reading_of(model: nn.Module, inputs: Tensor) -> Reading:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, on_error="raise", quantities="gsnr") as probe:
        losses_of(model, inputs).mean().backward()
        optimizer.step()
    return probe.readings[0]


def expected_of(model: nn.Module, inputs: Tensor) -> Tensor:
    norms = []
    for loss in losses_of(model, inputs):
        grads = torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, materialize_grads=True
        )
        norms.append(sum(grad.square().sum() for grad in grads))
    return torch.stack(norms)


OPTIONS = {
    "time first": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "dropout between layers": {"num_layers": 2, "dropout": 0.4},
}


@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_every_example_is_exact(
    kind: type[nn.RNNBase], options: dict[str, object], given: bool
) -> None:
    """From the first reading on, whatever the layer's options.

    Catches: a gate in another order; the reset gate's factor left out of the hidden
    side; a direction or a last state that is not run; states after a step taken for
    those before it.
    """
    torch.manual_seed(0)
    model = Recurrent(kind, given=given, **options).double()
    inputs = torch.randn(N, T, IN, dtype=torch.float64)
    reading = reading_of(model, inputs)
    assert reading.coverage.complete
    assert reading.coverage.methods["layer.weight_hh_l0"] == "recurrent"
    torch.testing.assert_close(reading.example_sq_norms, expected_of(model, inputs))


def test_a_relu_is_its_own_cell() -> None:
    """Catches: tanh for every cell without gates."""
    torch.manual_seed(0)
    model = Recurrent(nn.RNN, given=False, nonlinearity="relu").double()
    inputs = torch.randn(N, T, IN, dtype=torch.float64)
    reading = reading_of(model, inputs)
    torch.testing.assert_close(reading.example_sq_norms, expected_of(model, inputs))


def test_other_weights_than_its_own_are_replayed() -> None:
    """Catches: a pruned layer read as if its mask were not there."""
    torch.manual_seed(0)
    model = Recurrent(nn.LSTM, given=False).double()
    prune.l1_unstructured(model.layer, "weight_hh_l0", amount=0.5)
    reading = reading_of(model, torch.randn(N, T, IN, dtype=torch.float64))
    methods = reading.coverage.methods
    assert methods["layer.weight_hh_l0_orig"].startswith("replay of")

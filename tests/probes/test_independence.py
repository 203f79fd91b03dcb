"""Runs of a copy with other examples: which axis, which order, whose outputs."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.integrations import attach
from noisekit.probes import Reading
from tests.probes import planted
from tests.probes.exactness import (
    assert_agree,
    data,
    expected_now,
    readings_of,
    seeded,
)
from tests.probes.networks import Headed
from tests.reference import noise as reference


class _Flipped(nn.Module):
    """Calls its layer on the examples in reverse, and turns them back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x.flip(0)).tanh()
        return hidden.flip(0)


def test_rows_in_another_order_are_read_around_the_layer() -> None:
    """Their sum closes, and each layer's own noise is right: only examples are mixed.

    Catches: row ``i`` of a layer's input taken for example ``i``.
    """
    model = seeded(lambda: Headed(_Flipped(), 6))
    inputs, targets = data(4, 6)
    first, second = readings_of(model, inputs, targets, steps=2)
    reason = "core.linear: its rows are not the batch's examples in their order"
    assert set(first.coverage.unread.values()) == {reason}
    assert set(first.coverage.unread) == {"core.linear.weight", "core.linear.bias"}
    assert second.coverage.methods["core.linear.weight"] == "replay of core"
    assert_agree(second, expected_now(model, inputs, targets), 1e-9)


class _Centred(nn.Module):
    """Subtracts the batch's mean, as no layer of PyTorch's own does."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("shape", [(4, 6), (300, 6)])
def test_examples_coupled_by_a_custom_module_are_refused(
    shape: tuple[int, ...],
) -> None:
    """Catches: contributions read as if each were its own example's gradient."""
    model = seeded(lambda: Headed(nn.Sequential(nn.Linear(6, 6), _Centred()), 6))
    readings = readings_of(model, *data(*shape), steps=2)
    reason = "outputs for an example depend on the others in the batch"
    assert [reading.coverage.reason for reading in readings] == [reason, reason]
    assert readings[0].grad_sq_norm.value > 0


class _Similarities(nn.Module):
    """Compares all examples of the batch with each other, as contrastive models do."""

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.detached = detached

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden: Tensor = self.linear(x)
        similarities = hidden @ hidden.T
        return hidden, similarities.detach() if self.detached else similarities


@pytest.mark.parametrize("detached", [False, True])
def test_outputs_for_pairs_of_examples_are_refused(detached: bool) -> None:
    """Their entries are the same in a smaller batch, and still no example's own.

    Catches: gradients of one row of the batch taken for those of an example; a matrix
    that is only looked at taken for a part of the loss.
    """
    torch.manual_seed(0)
    model = _Similarities(detached=detached)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer) as probe:
        hidden, similarities = model(torch.randn(7, 6))
        outputs = hidden if detached else similarities
        functional.cross_entropy(outputs, torch.arange(7) % 5).backward()
        optimizer.step()
    reason = "outputs for an example depend on the others in the batch"
    assert probe.readings[0].coverage.reason == (None if detached else reason)


def test_random_models_are_compared_with_the_same_draws() -> None:
    """Catches: other dropout masks in another run taken for coupled examples."""
    model = seeded(lambda: Headed(nn.Sequential(nn.Linear(6, 6), nn.Dropout()), 6))
    assert all(r.coverage.complete for r in readings_of(model, *data(4, 6)))


class _Loop(nn.Module):
    """A cell, called once for every time step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for step in x.unbind(1):
            state = self.cell(step, state)
        logits: Tensor = self.head(state)
        return logits


def test_the_model_itself_runs_once_a_step() -> None:
    """Whatever is tried is tried on copies, also for lengths that were not seen.

    Catches: a second forward pass of the user's own modules.
    """
    model = seeded(_Loop)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    runs = []
    model.cell.register_forward_pre_hook(lambda *_: runs.append(1))
    with attach(model, optimizer) as probe:
        for length in (3, 5, 4):
            inputs, targets = data(4, length, 6)
            optimizer.zero_grad()
            before = len(runs)
            outputs = model(inputs)
            taken = len(runs) - before
            assert taken == length
            functional.cross_entropy(outputs, targets).backward()
            optimizer.step()
            reading = probe.readings[-1]
            grads = reference.contributions(
                model, functional.cross_entropy, (inputs,), targets
            )
            expected = {name: len(inputs) * rows for name, rows in grads.items()}
            assert_agree(reading, expected, 1e-9)


class _Bags(nn.Module):
    """Bags of one batch size only, given as a matrix or by offsets."""

    def __init__(self, *, offsets: bool) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(7, 4, mode="sum")
        self.head = nn.Linear(4, 3)
        self.offsets = offsets

    def forward(self, tokens: Tensor) -> Tensor:
        if len(tokens) == 4:  # a run on one example less
            raise ValueError("needs another batch size")
        if not self.offsets:
            return self.head(self.bags(tokens))
        starts = torch.arange(len(tokens)) * tokens.shape[1]
        return self.head(self.bags(tokens.flatten(), starts))


def first_reading(model: nn.Module, tokens: Tensor, targets: Tensor) -> Reading:
    """Of a step that moves no weight."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer) as probe:
        functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
    return probe.readings[0]


def test_a_matrix_of_bags_has_them_on_its_first_axis() -> None:
    """Five bags of five tokens, where sizes alone leave a doubt.

    Catches: the layer's own documented axis not asked for.
    """
    model = seeded(lambda: _Bags(offsets=False))
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(7, (5, 5), generator=generator), torch.arange(5) % 3
    grads = reference.example_gradients(
        model, functional.cross_entropy, tokens, targets
    )
    reading = first_reading(model, tokens, targets)
    assert reading.coverage.reason is None
    expected = reference.variance_trace(list(grads.values()))
    assert reading.variance_trace.value == pytest.approx(expected)


def test_bags_by_offsets_have_no_axis_of_examples() -> None:
    """One token per bag: indices and offsets are as many as the examples.

    Catches: offsets cut into rows, which start from zero and mean the rest.
    """
    model = seeded(lambda: _Bags(offsets=True))
    reading = first_reading(model, torch.arange(5)[:, None], torch.arange(5) % 3)
    expected = "bags: its rows are not the batch's examples in their order"
    assert reading.coverage.unread == {"bags.weight": expected}


# ------------------------------------------------------------------ a planted coupling

NUM_PLANTED = 3
"""Random models per kind of coupling; the soak takes 50."""


@pytest.mark.parametrize("coupling", planted.COUPLINGS)
def test_a_planted_coupling_is_found(coupling: str) -> None:
    """With and without dropout, in every place, whatever else the model does.

    Catches: draws that switch the check off; coupling within groups, in one direction,
    through a few examples, or in sorted rows; a run that fails and counts as passed.
    """
    for seed in range(NUM_PLANTED):
        reading, *_ = planted.reading_of(seed, coupling)
        assert not reading.coverage.complete, (seed, planted.draw(seed))


def test_nothing_planted_is_read_exactly() -> None:
    """Sorted, routed, merged and time-major rows, with and without dropout.

    Catches: such rows taken for coupling, or for the examples in their order.
    """
    for seed in range(10 * NUM_PLANTED):
        reading, model, inputs, targets = planted.reading_of(seed, None)
        assert reading.coverage.reason is None, (seed, planted.draw(seed))
        assert reading.example_sq_norms is not None
        torch.testing.assert_close(
            reading.example_sq_norms,
            planted.losses_apart(model, inputs, targets),
            msg=lambda text, seed=seed: f"{planted.draw(seed)}: {text}",
        )

"""Layers that draw: which may, and whose numbers they get."""

import pytest
import torch
from torch import nn

from noisekit.train.models.random_layers import may_draw, seeded_draws


class OwnLayer(nn.Module):
    """Of whose randomness nothing is known."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs."""
        return inputs


@pytest.mark.parametrize(
    ("layer", "draws"),
    [
        (nn.Linear(2, 2), False),
        (nn.Dropout(0.0), False),
        (nn.Dropout(0.1), True),
        (nn.AlphaDropout(0.1), True),
        (nn.RReLU(), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.LSTM(2, 2), False),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), True),
        (nn.TransformerEncoderLayer(4, 2), True),
        (OwnLayer(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_may_draw(layer: nn.Module, draws: bool) -> None:
    """Catches: a dropout that is an attribute and no layer."""
    assert may_draw(nn.Sequential(nn.Linear(2, 2), layer)) is draws


def test_draws_are_those_of_their_name() -> None:
    """The same name gives the same mask; another update or part another one.

    Catches: seeding once per run; a generator that is left seeded.
    """
    device = torch.device("cpu")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = {}
    for names in [(0, 1), (0, 2), (1, 1), (0, 1)]:
        with seeded_draws(5, "layers", *names, device=device):
            mask = nn.functional.dropout(torch.ones(64))
        if names in found:
            assert torch.equal(found[names], mask)
        found[names] = mask
    masks = [tuple(mask.tolist()) for mask in found.values()]
    assert len(set(masks)) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_is_given_back_after_an_error() -> None:
    """Catches: a loop that goes on with a seeded generator."""
    before = torch.get_rng_state()
    with (
        pytest.raises(ZeroDivisionError),
        seeded_draws(5, "layers", device=torch.device("cpu")),
    ):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)

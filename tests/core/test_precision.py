"""A model computed in a wider type, and given back bit for bit."""

import pytest
import torch
from torch import nn

from noisekit.core.precision import Precision, is_narrower
from tests.cases import Recurrent, TiedNetwork, batch_norm_network, classes, seeded


def test_narrower_is_said_of_real_floating_types_only() -> None:
    """Catches: token indices turned into floats."""
    assert is_narrower(torch.zeros(1, dtype=torch.bfloat16), torch.float32)
    assert is_narrower(torch.zeros(1), torch.float64)
    assert not is_narrower(torch.zeros(1), torch.float32)
    assert not is_narrower(torch.zeros(1, dtype=torch.float64), torch.float32)
    assert not is_narrower(torch.zeros(1, dtype=torch.int8), torch.float32)


@pytest.mark.parametrize("build", [batch_norm_network, TiedNetwork, Recurrent])
def test_outputs_are_those_of_the_converted_model(build: type[nn.Module]) -> None:
    """Buffers too; and afterwards the same objects are in their places.

    Catches: an LSTM that goes on with weights it holds on the side.
    """
    shape = (3, 2) if build is Recurrent else (4,)
    model = seeded(build)().half().eval()
    inputs = classes((4,), *shape)[0][0].half()
    before = [*model.parameters(), *model.buffers()]
    plain = model(inputs)
    precision = Precision(torch.float32)
    with precision.held(model, "no module"), torch.no_grad():
        leaves = precision.leaves_of(model.parameters())
        got = model(precision.convert({"x": inputs, "n": 3})["x"])
        assert {leaf.dtype for leaf in leaves} == {torch.float32}
        with precision.held(model):
            assert precision.leaves_of(before[:1])[0] is leaves[0]
        assert precision.leaves_of(before[:1])[0] is leaves[0]
    assert torch.equal(got, seeded(build)().half().float().eval()(inputs.float()))
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert torch.equal(model(inputs), plain)
    assert precision.leaves_of(before[:1]) == (before[0],)


def test_model_is_given_back_after_an_exception() -> None:
    model = seeded(TiedNetwork)().half()
    before = list(model.parameters())
    precision = Precision(torch.float32)
    shared = []

    def interrupted() -> None:
        with precision.held(model):
            shared.append(model.decoder.weight is model.encoder.weight)
            shared.append(model.decoder.weight is not before[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert shared == [True, True]
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_no_precision_changes_nothing() -> None:
    model = seeded(TiedNetwork)()
    precision = Precision()
    inputs = torch.ones(2, 4)
    with precision.held(model):
        assert precision.leaves_of(model.parameters()) == tuple(model.parameters())
    assert precision.convert(inputs) is inputs

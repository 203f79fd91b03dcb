"""Readings that go over to the host in one piece."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from noisekit.integrations import attach
from noisekit.probes import Reading
from noisekit.probes.host_copy import HostCopy, on_its_way
from tests.probes.models import MLP


def reading(*, weighted: bool = False, scaled: bool = False) -> Reading:
    """A reading by three estimators, with or without weights that are tensors."""
    model, (inputs, targets) = MLP.model(), MLP.data()
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(
        model,
        optimizer,
        estimator=("per_example", "rows", "chunks"),
        loss_fn=loss if weighted else None,
        quantities=("norm_test", "gsnr", "update_size"),
    )
    (loss if weighted else functional.cross_entropy)(model(inputs), targets).backward()
    if scaled:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    return probe.readings[0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_nothing_is_lost_on_the_way(weighted: bool, scaled: bool) -> None:
    """Catches: tensors exchanged with each other, or rounded to float32."""
    before = reading(weighted=weighted, scaled=scaled)
    after = HostCopy(before).resolved()
    assert after.row() == before.row()
    for old, new in zip(before.layers, after.layers, strict=True):
        assert old == new
    assert before.example_sq_norms is not None
    assert after.example_sq_norms is not None
    assert torch.equal(before.example_sq_norms, after.example_sq_norms)
    assert after.coverage == before.coverage


def test_a_copy_keeps_no_memory_of_the_device() -> None:
    """Catches: up to 10,000 readings that stay on the device beside their copies."""
    copy = HostCopy(reading())
    waiting = copy._reading
    assert waiting.layer_sq_norms.numel() == 0
    assert waiting.example_sq_norms is not None
    assert waiting.example_sq_norms.numel() == 0


def test_what_is_on_the_host_is_not_copied() -> None:
    """Catches: a second reading for each one on a CPU."""
    own = reading()
    assert on_its_way(own) is own

"""Weight decay's curvature: in where asked for, by parameter, never by itself."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from noisekit.core.errors import UsageError
from noisekit.curvature import FisherOperator, GGNOperator, HessianOperator
from tests.cases import RAGGED, mlp, seeded

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, FisherOperator])
def test_one_factor_is_added_to_the_diagonal(kind: Any) -> None:
    """Catches: decay left out, doubled (a penalty ``λ|w|²``), or in by default."""
    model = seeded(mlp)()
    plain = kind(model, LOSS, RAGGED)
    decayed = kind(model, LOSS, RAGGED, weight_decay=0.3)
    eye = torch.eye(plain.shape[0], dtype=torch.float64)
    assert_close(decayed.to_dense(), plain.to_dense() + 0.3 * eye)
    assert set(plain.weight_decay.values()) == {0.0}
    assert set(decayed.weight_decay.values()) == {0.3}


def test_curvature_is_that_of_what_sgd_descends() -> None:
    """SGD adds ``λ w`` to the gradient: its derivative is the operator.

    Catches: groups confused; biases decayed though their group says no.
    """
    model = seeded(mlp)()
    groups = [
        {"params": [model[0].weight, model[3].weight], "weight_decay": 0.1},
        {"params": [model[0].bias, model[3].bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    H = HessianOperator(model, LOSS, RAGGED, weight_decay=optimizer)
    assert H.weight_decay == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "3.weight": 0.1,
        "3.bias": 0.0,
    }
    vector = torch.linspace(-1, 1, H.shape[0], dtype=torch.float64)
    product = H @ vector

    def step_from(point: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for p, part in zip(
                model.parameters(), H.risk.layout.split(point), strict=True
            ):
                p.copy_(part)
        _, gradient = H.risk.value_and_grad()
        for p, part in zip(
            model.parameters(), H.risk.layout.split(gradient), strict=True
        ):
            p.grad = part.clone()
        optimizer.step()
        return point - H.risk.vector()

    start = H.risk.vector()
    difference = step_from(start + 1e-5 * vector) - step_from(start - 1e-5 * vector)
    assert_close(product, difference / 2e-5, rtol=1e-6, atol=1e-8)


def test_blocks_keep_their_own_decay() -> None:
    model = seeded(mlp)()
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.1},
        {"params": list(model[3].parameters()), "weight_decay": 0.2},
    ]
    H = HessianOperator(
        model, LOSS, RAGGED, weight_decay=torch.optim.SGD(groups, lr=1.0)
    )
    whole = H.to_dense()
    for name, block in H.blocks():
        at = slice(0, 25) if name == "0" else slice(25, 43)
        assert_close(block.to_dense(), whole[at, at], rtol=1e-10, atol=1e-14)


def test_decay_that_is_no_term_of_the_risk_is_refused() -> None:
    model = seeded(mlp)()
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    with pytest.raises(
        UsageError, match=r"got AdamW, whose decay of 0\.1 is decoupled"
    ):
        HessianOperator(model, LOSS, RAGGED, weight_decay=adamw)
    none = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    assert not any(
        HessianOperator(model, LOSS, RAGGED, weight_decay=none).weight_decay.values()
    )
    part = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"without '3.weight' \(2 missing\); choose"):
        HessianOperator(model, LOSS, RAGGED, weight_decay=part)
    with pytest.raises(
        UsageError, match=r"weight_decay needs to be at least 0 .* got -1"
    ):
        HessianOperator(model, LOSS, RAGGED, weight_decay=-1.0)

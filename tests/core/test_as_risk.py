"""One way in: a model with its loss and data, or a risk that has them already."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import NoParametersError, UsageError
from noisekit.core.risk import EmpiricalRisk, as_risk
from tests.cases import RAGGED, batch_norm_network, mlp, seeded

LOSS = nn.CrossEntropyLoss()


class CountingLoader:
    """The ragged batches, and how many passes over them were begun."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Begin a pass."""
        self.passes += 1
        return iter(RAGGED)


def refusal(*args: Any, **options: Any) -> str:
    """The message with which the arguments are refused."""
    with pytest.raises(UsageError) as caught:
        as_risk(*args, **options)
    return str(caught.value)


def test_both_ways_in_give_the_same_function() -> None:
    """Catches: a setting that is dropped on the way into the risk."""
    model = seeded(batch_norm_network)()
    settings: dict[str, Any] = {
        "bn": "batch",
        "normaliser": lambda targets: 2.0 * len(targets),
        "params": "0.*",
    }
    built = EmpiricalRisk(model, LOSS, RAGGED, **settings)
    passed = as_risk(model, LOSS, RAGGED, **settings)
    assert as_risk(built) is built
    assert (passed.bn, passed.layout.names) == ("batch", ("0.weight", "0.bias"))
    assert passed.normalisers == built.normalisers == [8.0, 8.0, 4.0]
    assert passed.value() == built.value()


def test_settings_have_the_defaults_of_a_risk() -> None:
    """Catches: ``bn=None`` handed on as a policy."""
    risk = as_risk(seeded(batch_norm_network)(), LOSS, RAGGED)
    assert risk.bn == "running"
    assert risk.normalisers == [4.0, 4.0, 2.0]


def test_params_beside_a_risk_narrow_it_down() -> None:
    """The risk itself keeps its parameters.

    Catches: ``params`` ignored beside a risk, or the risk changed in place.
    """
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    part = as_risk(risk, params="3.*")
    assert part.layout.names == ("3.weight", "3.bias")
    assert len(risk.layout.names) == 4
    assert part.batches is risk.batches
    with pytest.raises(NoParametersError, match="which matches none"):
        as_risk(risk, params="9.*")


def test_what_is_stated_beside_a_risk_is_refused() -> None:
    """Catches: another loss, other data or settings silently left out."""
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    assert refusal(risk, LOSS, RAGGED, bn="batch", normaliser=len) == (
        "an EmpiricalRisk has its own loss, data and settings, got loss_fn=, batches=, "
        "bn=, normaliser= beside it; state them where the risk is built."
    )
    assert "got bn= beside it" in refusal(risk, bn="running")


@pytest.mark.parametrize(
    ("args", "missing"),
    [((), "loss_fn"), ((LOSS,), "batches"), ((None, []), "loss_fn")],
)
def test_what_is_missing_beside_a_model_is_named(args: Any, missing: str) -> None:
    """Catches: a ``None`` that fails deep inside the first measurement."""
    assert refusal(nn.Linear(4, 3), *args) == (
        "(model, loss_fn, batches) or an EmpiricalRisk is needed, got a Linear "
        f"without {missing}."
    )


def test_a_risk_reads_its_data_once() -> None:
    """Several uses of one risk begin no further pass over the loader.

    Catches: a risk that is built anew from the one that was passed.
    """
    loader = CountingLoader()
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, loader)
    for params in (None, "0.*", "3.*"):
        part = as_risk(risk, params=params)
        part.value()
        part.value_and_grad()
        part.in_precision(torch.float64).evaluate(part.vector() + 1.0)
    assert loader.passes == 1

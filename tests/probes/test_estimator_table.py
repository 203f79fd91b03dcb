"""Every estimator on the whole table of models, by the self-check."""

import pytest

from noisekit.probes import self_check
from tests.probes.architectures import ARCHITECTURES, LOSSES, Architecture

# PyTorch's own remark on a slower kernel; that case is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
def test_every_estimator_is_exact_on_every_model(case: Architecture) -> None:
    """Rows, chunks and micro-batches, and random signs where there is one output.

    Against one backward pass per example, to eight digits.

    Catches: a rule whose call cannot be narrowed to some rows, or sums over a slice of
    the wrong axis; statistics of a normalisation layer that stay with all rows.
    """
    model, inputs = case.model().eval(), case.inputs()
    targets = LOSSES[0].targets(model(*inputs))
    batch = (inputs if len(inputs) > 1 else inputs[0], targets)
    check = self_check(model, LOSSES[0].value, batch)
    assert {"rows", "chunks", "accumulation"} <= set(check.estimators)
    assert max(check.estimators.values()) < 1e-8, check.estimators

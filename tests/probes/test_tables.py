"""The tables of estimators and step metrics against the vocabulary."""

from typing import get_args

import pytest

from noisekit.core.vocabulary import (
    ESTIMATORS,
    QUANTITIES,
    STEP_COLUMNS,
    EstimatorName,
    QuantityName,
)
from noisekit.probes import ProbeOptions
from noisekit.probes.estimators import estimator_set
from noisekit.probes.step_metrics.metric_set import METRICS
from noisekit.records import table


def test_the_vocabulary_names_every_estimator() -> None:
    """Catches: an estimator that no annotation or run directory knows, or twice."""
    assert tuple(estimator_set.ESTIMATORS) == ("auto", *get_args(EstimatorName))
    columns = {column.name for column in table("steps").columns}
    assert {f"{name}_mean_sq_norm" for name in ESTIMATORS} <= columns


def test_the_vocabulary_names_every_step_metric_and_its_values() -> None:
    """Catches: a metric without a definition, a column that no metric fills."""
    assert set(METRICS) == set(get_args(QuantityName))
    values = [name for metric in METRICS.values() for name in metric.columns()]
    assert sorted(values) == sorted(STEP_COLUMNS)
    assert set(values) <= QUANTITIES.keys()
    assert set(values) <= {column.name for column in table("steps").columns}


@pytest.mark.parametrize(
    "kind", [*estimator_set.ESTIMATORS.values(), *METRICS.values()]
)
def test_settings_are_options_of_a_probe(kind: type) -> None:
    """Catches: a setting that attach() cannot pass on, or that has two defaults."""
    options = ProbeOptions(ghost_batch=2)
    settings = {name: getattr(options, name) for name in kind.settings}
    assert kind(**settings).name == kind.name
    if settings:
        with pytest.raises(TypeError, match="required"):
            kind()

"""An estimator and a step metric of the user's own, through a probe's options."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from noisekit.core.errors import UsageError
from noisekit.core.results import Unavailable
from noisekit.integrations import attach
from noisekit.probes import (
    MetricStep,
    NoiseEstimator,
    Probe,
    StepInputs,
    StepMetric,
    StepNoise,
    StepQuantity,
)
from noisekit.probes.capture.recorder import Recorder
from noisekit.probes.capture.step_record import StepRecord
from noisekit.probes.context import ProbeContext
from noisekit.probes.step_metrics.metric import State
from tests.probes.models import MLP
from tests.reference import noise as reference


class GradientL1(StepMetric):
    """``|g|_1`` of the step's gradient, before anybody clips it."""

    name = "gradient_l1"

    def set_up(self, context: ProbeContext) -> None:
        self._parameters = context.recorder.parameters

    def on_gradient(self, record: StepRecord) -> None:
        grads = [p.grad for p in self._parameters if p.grad is not None]
        self._norms = torch.stack([grad.abs().sum() for grad in grads])

    def measure(
        self, step: StepInputs, noise: StepNoise | Unavailable
    ) -> State | Unavailable:
        return {"norms": self._norms}

    def value(self, step: MetricStep) -> StepQuantity:
        norms = step.tensor("norms")
        return StepQuantity(torch.cat((norms.sum().reshape(1), norms)))


class NoiseOverNorm(StepMetric):
    """Two values that follow from the reading."""

    name = "noise_over_norm"
    quantities = ("trace_over_norm", "largest_share")

    def value(self, step: MetricStep) -> dict[str, StepQuantity] | Unavailable:
        reading = step.reading
        if reading.moments is None or reading.example_sq_norms is None:
            return Unavailable("it needs estimator='per_example'")
        trace, _ = reading.moments.trace_and_norm()
        norms = reading.example_sq_norms
        return {
            "trace_over_norm": StepQuantity((trace / norms.mean()).reshape(1)),
            "largest_share": StepQuantity((norms.max() / norms.sum()).reshape(1)),
        }


class HalfBatches(NoiseEstimator):
    """Noise from the first and the second half of a batch."""

    name = "half_batches"
    reads_calls = True

    def request(self, recorder: Recorder, num_readings: int) -> None:
        recorder.wanted.examples = True
        recorder.units.request.num_chunks = 2

    def noise(self, step: StepInputs) -> StepNoise | Unavailable:
        fault = step.call_fault(lambda p: p.chunk_norms)
        if fault:
            return fault
        tables = [step.table(p.chunk_norms) for p in step.passes]
        count = 2 * len(tables)
        moments, layers = step.units(tables, 1 / count)
        return StepNoise(self.name, f"{self.name}(3)", step.methods, moments, layers)


def train(probe: Probe, num_steps: int = 2) -> Tensor:
    """Steps without a change of the weights; returns the gradient's sum of sizes."""
    model, optimizer = probe._recorder.model, probe._steps.optimizer
    inputs, targets = MLP.data()
    for _ in range(num_steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        size = torch.stack([p.grad.abs().sum() for p in model.parameters()]).sum()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    return size


def attached(**options: object) -> Probe:
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return attach(model, optimizer, **options)  # type: ignore[arg-type]


def test_a_metric_of_one_s_own() -> None:
    """Beside one of ours; its values are in readings, tables and prints.

    Catches: a metric that is called after clipping, or whose columns are lost.
    """
    probe = attached(quantities=["norm_test", GradientL1(), NoiseOverNorm()])
    expected = train(probe)
    reading = probe.readings[-1]
    assert list(reading.quantities) == [
        "norm_test",
        "gradient_l1",
        "trace_over_norm",
        "largest_share",
    ]
    found = reading.quantities["gradient_l1"]
    assert found.value == pytest.approx(float(expected))
    assert len(found.layers) == len(reading.layers)
    norms = reading.example_sq_norms
    assert norms is not None
    frame = probe.frame()
    assert frame["largest_share"].iloc[-1] == pytest.approx(
        float(norms.max() / norms.sum())
    )
    assert "quantities: norm_test, gradient_l1" in str(reading)


def test_a_metric_that_has_no_value_keeps_its_columns() -> None:
    """Catches: rows of one run with different columns; a reason that is lost."""
    probe = attached(estimator="chunks", quantities=NoiseOverNorm())
    train(probe, 1)
    reading = probe.readings[0]
    assert reading.coverage.missing == {
        "noise_over_norm": "it needs estimator='per_example'"
    }
    assert {"trace_over_norm", "largest_share"} <= reading.row().keys()


def test_an_estimator_of_one_s_own() -> None:
    """Alone and beside one of ours, against the gradients of the two halves.

    Catches: an instance whose requests are not captured, or whose name is refused.
    """
    probe = attached(estimator=("per_example", HalfBatches()))
    train(probe)
    reading = probe.readings[-1]
    model, (inputs, targets) = MLP.model(), MLP.data()
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    halves = rows.unflatten(0, (2, -1)).mean(1)
    size = len(inputs) // 2
    trace, _ = reading.estimates["half_batches"].trace_and_norm()
    wanted = size * reference.variance_trace([halves])
    assert float(trace) == pytest.approx(wanted, rel=1e-9)
    assert "half_batches_mean_sq_norm" in reading.row()
    scale = probe.simple_noise_scale(estimator="half_batches")
    alone = attached(estimator=HalfBatches())
    train(alone)
    assert alone.readings[0].estimator == "half_batches(3)"
    assert alone.simple_noise_scale().value == pytest.approx(scale.value, nan_ok=True)


@pytest.mark.parametrize("option", ["estimator", "quantities"])
def test_what_is_neither_a_name_nor_an_instance(option: str) -> None:
    """Catches: the class itself, or one of the other kind, taken for an instance."""
    other = HalfBatches() if option == "quantities" else GradientL1()
    kind = "StepMetric" if option == "quantities" else "NoiseEstimator"
    for wrong in (GradientL1, HalfBatches, (other,), ("nonsense",)):
        with pytest.raises(UsageError, match=f"or a {kind} of your own, got"):
            attached(**{option: wrong if isinstance(wrong, tuple) else (wrong,)})

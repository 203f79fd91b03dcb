"""A run's model at frozen weights, ready to be measured on the run's data."""

import json
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from noisekit.core.randomness import preserve_rng_state, stream
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import HessianOperator
from noisekit.records.files import plain
from noisekit.sharpness import Measurement, MeasurementContext, SGDRule
from noisekit.sharpness.measurement import take
from noisekit.train.data.section import TensorPair
from noisekit.train.recipes.optimizers import Sgd
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.state import Row


class MeasuredModel:
    """Takes measures of a model; holds the risk and the graph of its gradient.

    Attributes:
        model: The model, in evaluation mode; weights are loaded into it.
    """

    def __init__(
        self, spec: RunSpec, model: nn.Module, data: Mapping[str, TensorPair]
    ) -> None:
        self.model = model.eval()
        self._spec = spec
        self._data = data
        self._hessian: HessianOperator | None = None

    def close(self) -> None:
        """Free the kept graph."""
        if self._hessian is not None:
            self._hessian.close()

    def measure(
        self,
        name: str,
        *,
        step: int,
        learning_rate: float,
        phase: int = 0,
        lambda_max: Estimate | None = None,
    ) -> list[Measurement]:
        """Take a measure of the present weights.

        Streams are named by seed and update: what is measured does not depend on what
        was measured before, and the global generators stay as they are.

        Args:
            name: A measure of the recipe.
            step: Updates that led to the weights.
            learning_rate: Rate of the last of them.
            phase: Its phase.
            lambda_max: The largest eigenvalue, where it is known.
        """
        if self._hessian is None:
            self._hessian = HessianOperator(self._risk())
        context = MeasurementContext(
            self._hessian.risk,
            stream=partial(stream, self._spec.seed, "measure", step),
            update_rule=_update_rule(self._spec, learning_rate, phase),
            hessian=self._hessian,
            lambda_max=lambda_max,
        )
        with preserve_rng_state():
            taken = list(take(self._spec.measure.measures(name), context))
        return [item for found in taken for item in found.measurements]

    @property
    def examples(self) -> list[int]:
        """The training examples that every run of the data is measured on."""
        count = len(self._data["train"])
        if self._spec.measure.num_examples is None:
            return list(range(count))
        generator = stream(self._spec.data.split_seed, "measured examples")
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order[: self._spec.measure.num_examples]

    def _risk(self) -> EmpiricalRisk:
        """Return the risk over the examples that all runs are measured on."""
        train, settings = self._data["train"], self._spec.measure
        inputs, targets = train.inputs, train.targets
        if settings.num_examples is not None:
            chosen = torch.tensor(self.examples, device=targets.device)
            inputs, targets = inputs[chosen], targets[chosen]
        size = self._spec.evaluation.batch_size
        batches = zip(
            torch.split(inputs, size), torch.split(targets, size), strict=True
        )
        return EmpiricalRisk(
            self.model,
            self._spec.training.find_loss().mean,
            list(batches),
            bn=settings.bn,
        )


def measurement_row(measure: str, item: Measurement) -> Row:
    """Return a row of the measurements table, without where it was taken."""
    estimate = item.estimate
    interval = estimate.interval() if estimate.has_error else None
    detail = dict(item.detail)
    if item.data_stderr is not None:
        detail["data_stderr"] = item.data_stderr
    return {
        "measure": measure,
        "quantity": item.quantity,
        "variant": item.variant,
        "value": estimate.value,
        "stderr": estimate.stderr,
        "bound": estimate.bound,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "error_source": estimate.error_source,
        "num_samples": estimate.num_samples,
        "status": estimate.status.value,
        "num_matvecs": estimate.num_matvecs,
        "num_grads": estimate.num_grads,
        "detail": json.dumps(plain(detail)),
    }


def _update_rule(spec: RunSpec, learning_rate: float, phase: int) -> SGDRule | None:
    """The rule of the update that led to weights; ``None`` of another optimizer."""
    optimizer = spec.in_phases[phase].optimizer
    scaled = optimizer.layer_scaling is not None
    if not isinstance(optimizer, Sgd) or scaled or learning_rate <= 0:
        return None
    return SGDRule(
        lr=learning_rate,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        weight_decay=optimizer.weight_decay,
    )

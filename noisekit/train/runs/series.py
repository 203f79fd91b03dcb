"""Measures along a run, of weights that are not kept."""

import time
from collections.abc import Callable, Mapping

from torch import nn

from noisekit.train.data.section import TensorPair
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.measured_model import MeasuredModel, measurement_row
from noisekit.train.runs.state import Row


class SeriesMeasurements:
    """Takes the measures of a recipe's series.

    Weights are copied into a model of their own: the model that is trained has hooks
    and a mode, and none of its bits may change.
    """

    def __init__(
        self,
        spec: RunSpec,
        build: Callable[[], nn.Module],
        data: Mapping[str, TensorPair],
    ) -> None:
        self._spec = spec
        self._build = build
        self._data = data
        self._measured: MeasuredModel | None = None
        self._loaded = -1

    def close(self) -> None:
        """Free the kept graph."""
        if self._measured is not None:
            self._measured.close()

    def rows(
        self,
        measure: str,
        model: nn.Module,
        *,
        step: int,
        learning_rate: float,
        phase: int,
    ) -> list[Row]:
        """Take one measure of a model's weights, and return its rows.

        Args:
            measure: A name of the recipe.
            model: Whose weights are measured.
            step: Updates that led to them.
            learning_rate: Rate of the last of them.
            phase: Its phase.
        """
        began = time.monotonic()
        if self._measured is None:
            self._measured = MeasuredModel(self._spec, self._build(), self._data)
        if self._loaded != step:
            self._measured.model.load_state_dict(model.state_dict())
            self._loaded = step
        items = self._measured.measure(
            measure, step=step, learning_rate=learning_rate, phase=phase
        )
        share = (time.monotonic() - began) / max(1, len(items))
        return [
            {"step": step, **measurement_row(measure, item), "seconds": share}
            for item in items
        ]

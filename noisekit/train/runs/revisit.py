"""A trained network of a run, as it was at a snapshot, with its data and its loss."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from noisekit.core.arguments import checked
from noisekit.core.errors import RunDirectoryError
from noisekit.core.evaluation_mode import BatchNormPolicy, batch_norms
from noisekit.core.risk import LossFn
from noisekit.records import Runs
from noisekit.train.data.datasets import DataSplits, load_data
from noisekit.train.data.section import TensorPair
from noisekit.train.models import build_model
from noisekit.train.recipes.run_spec import RunSpec

_CHUNK = 4096
"""Examples per batch when a whole split is measured; bounds the memory of one pass."""


@dataclass(frozen=True)
class Revisited:
    """What ``revisit`` returns.

    Attributes:
        spec: The run's full description.
        model: The network with the snapshot's weights, in evaluation mode, on the CPU.
    """

    spec: RunSpec
    model: nn.Module

    @property
    def loss_fn(self) -> LossFn:
        """The loss that the run was trained with, as a mean over examples."""
        return self.spec.training.find_loss().mean

    @property
    def bn_along_a_line(self) -> BatchNormPolicy:
        """What BatchNorm should normalise with between two networks.

        Statistics that are interpolated, or worse extrapolated, belong to no weights;
        without BatchNorm there are none.
        """
        return "recalibrated" if batch_norms(self.model) else "running"

    @cached_property
    def data(self) -> DataSplits:
        """The examples that the run saw, split as it saw them."""
        return load_data(self.spec.data)

    def batches(
        self, split: Literal["train", "validation", "test"]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return all examples of a split, in as few batches as memory allows."""
        weight = next(self.model.parameters())
        pair: TensorPair = getattr(self.data, split).to(weight.device, weight.dtype)
        parts = (torch.split(tensor, _CHUNK) for tensor in (pair.inputs, pair.targets))
        return list(zip(*parts, strict=True))


@checked
def revisit(runs: Runs, run_id: str, snapshot: str) -> Revisited:
    """Return the network of a run as it was at a snapshot.

    Raises:
        RunDirectoryError: If there is no such run or snapshot.
    """
    weights = runs.weights(run_id, snapshot)
    spec = _spec_of(runs, run_id)
    data = load_data(spec.data)
    model = build_model(
        spec.model,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        seed=spec.seed,
    ).to(getattr(torch, spec.compute.dtype))
    model.load_state_dict({name: torch.from_numpy(v) for name, v in weights.items()})
    return Revisited(spec, model.eval())


def _spec_of(runs: Runs, run_id: str) -> RunSpec:
    for run in runs.directories:
        if run.manifest.run_id == run_id:
            return RunSpec.from_table(run.manifest.recipe)
    raise RunDirectoryError(f"needs a run of {runs.set_dir}, got {run_id!r}.")

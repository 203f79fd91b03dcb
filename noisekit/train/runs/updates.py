"""One optimizer step: examples, rate, settings and gradient, as planned."""

from torch import Tensor

from noisekit.core.risk import LossFn
from noisekit.train.data.section import TensorPair
from noisekit.train.data.update_batches import UpdateBatches
from noisekit.train.gradients.step import GradientStep
from noisekit.train.models.random_layers import may_draw
from noisekit.train.recipes.optimizers import Settings
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.recipes.update_plan import PlannedUpdate
from noisekit.train.runs.state import TrainState


class Updates:
    """Fills gradients and sets the optimizer, each a function of the plan alone."""

    def __init__(self, spec: RunSpec, train: TensorPair, loss_fn: LossFn) -> None:
        self._seed = spec.seed
        self._loss_fn = loss_fn
        self._batches = UpdateBatches(
            train,
            seed=spec.seed,
            device=spec.compute.device,
            order=0 if spec.start is None else spec.start.order,
        )
        self._draws: bool | None = None
        self._settings: Settings = {}

    def gradient(self, state: TrainState, planned: PlannedUpdate) -> Tensor:
        """Fill ``.grad`` for an update, set the optimizer, and return the loss."""
        groups = state.optimizer.param_groups
        for group in groups:
            group["lr"] = planned.learning_rate
        if planned.settings is not self._settings:
            self._settings = planned.settings
            for group in groups:
                group.update(self._settings)
        state.optimizer.zero_grad()
        batch = self._batches.batch(
            planned.begin,
            planned.num_examples,
            microbatch=planned.microbatch,
            augment=planned.augment,
        )
        names = self._names_of_draws(state)
        step = GradientStep(state.model, self._loss_fn, state.optimizer, batch, names)
        return planned.rules.fill(step)

    def _names_of_draws(self, state: TrainState) -> tuple[int | str, ...] | None:
        """Return the stream of what layers draw in this update, if any may draw."""
        if self._draws is None:
            self._draws = may_draw(state.model)
        names = (self._seed, "layers", state.position.updates)
        return names if self._draws else None

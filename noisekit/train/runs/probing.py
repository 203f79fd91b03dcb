"""The probe of a run, as its recipe and its batch policies ask for it."""

from collections.abc import Callable, Sequence

from noisekit.core.randomness import stream
from noisekit.core.risk import LossFn
from noisekit.integrations import attach
from noisekit.probes import Probe, Reading
from noisekit.train.losses import Loss
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.state import TrainState


def attach_probe(
    spec: RunSpec,
    state: TrainState,
    loss: Loss,
    *,
    every: int,
    sinks: Sequence[Callable[[Reading], object]],
) -> tuple[Probe | None, LossFn]:
    """Attach the probe, if one is asked for; return it with the loss to train by.

    Args:
        spec: The run.
        state: Has the model and the optimizer.
        loss: The loss.
        every: Updates from one reading to the next; 0 means none.
        sinks: Receive the readings.
    """
    if every == 0:
        return None, loss.mean
    wanted = spec.probe
    replays = "ghost" in wanted.estimator
    probe = attach(
        state.model,
        state.optimizer,
        loss_fn=loss.mean if replays else None,
        every=every,
        estimator=wanted.estimator,
        row_share=wanted.row_share,
        num_chunks=wanted.num_chunks,
        num_signs=wanted.num_signs,
        generator=stream(spec.seed, "probe"),
        ghost_batch=wanted.ghost_batch,
        microbatch_weights="by_size",
        sinks=sinks,
    )
    # Where the loss is called, the probe sees a batch's targets.
    return probe, probe.loss_fn if replays else loss.mean

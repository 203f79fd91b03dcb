"""The probe of a run, as its recipe and its batch policies ask for it."""

from collections.abc import Callable

from noisekit.core.randomness import stream
from noisekit.core.risk import LossFn
from noisekit.integrations import attach
from noisekit.probes import Probe, Reading
from noisekit.train.losses import Loss
from noisekit.train.recipes.run_spec import RunSpec
from noisekit.train.runs.observations import Observations
from noisekit.train.runs.state import TrainState


def attach_probe(
    spec: RunSpec,
    state: TrainState,
    loss: Loss,
    *,
    observations: Observations,
    sink: Callable[[Reading], object],
) -> tuple[Probe | None, LossFn]:
    """Attach the probe, if one is asked for; return it with the loss to train by.

    Args:
        spec: The run.
        state: Has the model and the optimizer.
        loss: The loss.
        observations: What batch policies need.
        sink: Receives the readings.
    """
    wanted = spec.probe
    every = observations.readings_every(wanted.every)
    if every == 0:
        return None, loss.mean
    quantities = tuple(dict.fromkeys((*wanted.quantities, *observations.quantities)))
    # Where the loss is called, the probe sees a batch's targets.
    sees_loss = "ghost" in wanted.estimator or bool(quantities)
    probe = attach(
        state.model,
        state.optimizer,
        loss_fn=loss.mean if sees_loss else None,
        every=every,
        estimator=wanted.estimator,
        row_share=wanted.row_share,
        num_chunks=wanted.num_chunks,
        num_signs=wanted.num_signs,
        generator=stream(spec.seed, "probe"),
        ghost_batch=wanted.ghost_batch,
        microbatch_weights="by_size",
        quantities=quantities,
        sinks=(sink,),
    )
    return probe, probe.loss_fn if sees_loss else loss.mean

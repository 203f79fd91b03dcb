"""What a probe is asked to do, as one value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from noisekit.core.params import ParameterPatterns
from noisekit.core.risk import LossFn
from noisekit.core.vocabulary import QuantityName
from noisekit.probes.capture.example_weights import ExampleWeights
from noisekit.probes.capture.hooks import OnError
from noisekit.probes.capture.tokens import TokenCounts
from noisekit.probes.estimators.assembly import LossReduction, MicrobatchWeights
from noisekit.probes.estimators.choice import Estimator, Unit
from noisekit.probes.reading import Reading

if TYPE_CHECKING:
    import torch

Sink = Callable[[Reading], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """The options of ``attach``, which documents them."""

    loss_fn: LossFn | None = None
    every: int | Callable[[int], bool] = 1
    budget: float | None = None
    repeatable: bool = False
    estimator: Estimator | tuple[Estimator, ...] = "auto"
    row_share: float = 0.25
    num_chunks: int = 4
    num_signs: int = 1
    calibrate_every: int | None = None
    generator: "torch.Generator | None" = None
    ghost_batch: int | None = None
    example_weights: ExampleWeights | None = None
    loss_reduction: LossReduction = "mean"
    microbatch_weights: MicrobatchWeights = "equal"
    batch_dim: int = 0
    unit: Unit = "example"
    tokens: TokenCounts | None = None
    params: ParameterPatterns = None
    scaler: "torch.amp.GradScaler | None" = None
    exact_bits: bool = True
    on_error: OnError = "warn"
    quantities: tuple[QuantityName, ...] = ()
    hessian_every: int = 100
    sinks: tuple[Sink, ...] = ()

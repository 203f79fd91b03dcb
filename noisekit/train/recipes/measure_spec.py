"""The section of a recipe that says what is measured at the snapshots."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from noisekit.train.section import PositiveFloat, PositiveInt, Section, Split

MeasureName = Literal[
    "adaptive_average_sharpness",
    "adaptive_worst_case_sharpness",
    "average_sharpness",
    "batch_sharpness",
    "edge_of_stability_ratio",
    "effective_dimension",
    "epsilon_sharpness",
    "example_grad_sq_norm",
    "fisher_rao_norm",
    "gauge_fixed_lambda_max",
    "grad_norm",
    "hessian_frobenius_norm",
    "hessian_trace",
    "lambda_max",
    "lambda_max_pyhessian",
    "lambda_min",
    "logit_normalised_average_sharpness",
    "logit_normalised_worst_case_sharpness",
    "m_sharpness",
    "pac_bayes_flatness",
    "pac_bayes_sharpness",
    "relative_flatness",
    "simple_noise_scale",
    "weighted_hessian_trace",
    "worst_case_sharpness",
]
"""What may be measured at a snapshot, by its name in the vocabulary."""

ALWAYS_RECORDED = (
    *(f"{split}_{kind}" for split in get_args(Split) for kind in ("loss", "error")),
    "weight_norm",
    "distance_from_start",
)
"""What every snapshot has without being asked."""


class MeasureSpec(Section):
    """What is measured at the snapshots, and how hard.

    Attributes:
        num_examples: Training examples that the risk is taken over: the first of a
            seeded permutation that all runs share. All of them if left out.
        everywhere: Measures taken at every snapshot.
        at: Further measures by snapshot.
        epsilon: Sizes of the box of epsilon-sharpness.
        subspace_dim: Dimension of its random subspace; the full space if left out.
        max_iter: Iterations of its search.
        tol: Relative residual at which an eigenvalue counts as converged.
        max_matvecs: Most Hessian products for one eigenvalue.
        trace_matvecs: Hessian products for one trace.
        shift: Curvature that counts as a half in the effective dimension.
        rho: Radius of worst-case sharpness.
        adaptive_rho: The same in units of the weights.
        sigma: Standard deviation of the noise of average sharpness.
        adaptive_sigma: The same in units of the weights.
        ascent_steps: Steps of an ascent, beside the one of SAM.
        num_draws: Draws of the noise.
        group_size: Examples in a group of m-sharpness.
        batch_size: Examples in a batch of batch sharpness; those of an evaluation
            batch if left out.
        bn: What BatchNorm normalises by while measuring.
        examples: Splits of which each example's outcome is recorded.
    """

    num_examples: PositiveInt | None = None
    everywhere: tuple[MeasureName, ...] = ()
    at: dict[str, tuple[MeasureName, ...]] = Field(default_factory=dict)
    epsilon: tuple[PositiveFloat, ...] = (1e-3, 5e-4)
    subspace_dim: PositiveInt | None = None
    max_iter: PositiveInt = 10
    tol: PositiveFloat = 1e-3
    max_matvecs: PositiveInt = 200
    trace_matvecs: PositiveInt = 32
    shift: PositiveFloat = 1e-2
    rho: PositiveFloat = 0.05
    adaptive_rho: PositiveFloat = 0.5
    sigma: PositiveFloat = 0.01
    adaptive_sigma: PositiveFloat = 0.1
    ascent_steps: PositiveInt = 10
    num_draws: Annotated[int, Field(ge=2)] = 16
    group_size: PositiveInt = 128
    batch_size: PositiveInt | None = None
    bn: Literal["running", "recalibrated", "batch"] = "running"
    examples: tuple[Split, ...] = ("test",)

    def measures_at(self, snapshot: str) -> tuple[MeasureName, ...]:
        """Return what is measured at ``snapshot``, each once, in a fixed order."""
        return tuple(dict.fromkeys((*self.everywhere, *self.at.get(snapshot, ()))))

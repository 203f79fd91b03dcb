"""Drawing on the user's axes, with the user's settings, from the user's tables."""

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from pandas import DataFrame

import noisekit as nk
from noisekit import figures
from noisekit.core.errors import UsageError
from noisekit.figures import Plot
from tests.figures import samples
from tests.figures.test_contract import FIGURES


def user_axes(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Return what ``plt.subplots`` gives."""
    figure = Figure()
    return figure, figure.subplots(rows, columns, squeeze=False)


DRAWN_ON: dict[str, tuple[tuple[int, int], Callable[[object], Plot]]] = {
    "forest": ((2, 1), lambda ax: figures.claim_forest(samples.contrasts(), ax=ax)),
    "paired": (
        (1, 1),
        lambda ax: figures.paired_arms(
            samples.measurements(num_seeds=2),
            "lambda_max",
            snapshots=["loss_0.05"],
            ax=ax,
        ),
    ),
    "ratios": (
        (1, 1),
        lambda ax: figures.descriptive_ratios(
            figures.paired_ratios(
                samples.measurements(num_seeds=2),
                quantities=["hessian_trace"],
                snapshot="loss_0.05",
                treatment="large_low",
                reference="small_low",
                comparison="same rate",
            ),
            ax=ax,
        ),
    ),
    "spectrum": (
        (1, 2),
        lambda ax: figures.spectral_density(samples.spectrum(), ax=ax),
    ),
    "sharpness": (
        (1, 1),
        lambda ax: figures.sharpness_against_loss(
            samples.measurements(num_seeds=2), samples.snapshots(num_seeds=2), ax=ax
        ),
    ),
    "curves": (
        (3, 2),
        lambda ax: figures.training_curves(samples.evaluations(num_seeds=2), ax=ax),
    ),
    "trade-off": (
        (1, 1),
        lambda ax: figures.batch_size_tradeoff(samples.tradeoff(), ax=ax),
    ),
    "timeline": (
        (2, 2),
        lambda ax: figures.timeline(samples.planned_settings(), ax=ax),
    ),
    "tuning": (
        (1, 1),
        lambda ax: figures.rate_tuning(samples.tuning_grid(), chosen={16: 0.1}, ax=ax),
    ),
    "line": ((1, 1), lambda ax: figures.linear_path(samples.paths(num_seeds=2), ax=ax)),
    "plane": ((1, 1), lambda ax: figures.loss_surface(samples.loss_plane(), ax=ax)),
    "around": ((1, 1), lambda ax: figures.loss_lines(samples.loss_around(), ax=ax)),
    "noise": (
        (1, 3),
        lambda ax: figures.noise_over_training(samples.steps(num_seeds=2), ax=ax),
    ),
    "batch sizes": (
        (1, 2),
        lambda ax: figures.grad_sq_norm_against_batch_size(
            *samples.batch_draws(), num_examples=samples.NUM_EXAMPLES, ax=ax
        ),
    ),
    "histograms": (
        (1, 2),
        lambda ax: figures.example_norm_histograms(
            samples.examples(num_seeds=1), snapshots=["start", "loss_0.05"], ax=ax
        ),
    ),
}


@pytest.mark.parametrize("name", DRAWN_ON)
def test_every_figure_draws_on_the_users_axes(name: str) -> None:
    """Catches: a new figure beside the user's; a legend outside of the panels."""
    (rows, columns), draw = DRAWN_ON[name]
    figure, axes = user_axes(rows, columns)
    plot = draw(axes if axes.size > 1 else axes[0, 0])
    assert plot.figure is figure
    assert not figure.legends
    assert all(ax.has_data() for ax in axes.ravel())


def test_every_figure_is_tried() -> None:
    """Catches: a figure that is added without ``ax=``."""
    public = {name for name in figures.__all__ if name.islower()}
    helpers = {
        "arm_styles",
        "paired_ratios",
        "snapshot_words",
        "themed",
        "windowed_noise",
        "writable_folder",
        "write_table",
    }
    assert len(public - helpers) == len(DRAWN_ON) == len(FIGURES) - 2


def test_the_users_axes_keep_the_users_settings() -> None:
    """Catches: noisekit's fonts on axes of the user's."""
    with mpl.rc_context({"font.size": 13.0, "axes.labelsize": 17.0}):
        _, axes = user_axes(1, 1)
        figures.linear_path(samples.paths(num_seeds=2), ax=axes[0, 0])
        assert axes[0, 0].xaxis.label.get_fontsize() == 17.0
        ours = figures.linear_path(samples.paths(num_seeds=2))
        assert ours.figure.axes[0].xaxis.label.get_fontsize() == 7.5
        assert mpl.rcParams["font.size"] == 13.0


def test_another_number_of_axes_is_refused() -> None:
    """Catches: panels dropped in silence."""
    _, axes = user_axes(1, 2)
    with pytest.raises(UsageError, match="needs 3 axes, one per panel, got 2; make"):
        figures.noise_over_training(samples.steps(num_seeds=1), ax=axes)


def loop_frame(num: int = 40) -> DataFrame:
    """Return what ``probe.frame()`` holds of one loop: no arm, no seed, no epoch."""
    source = np.random.default_rng(0)
    return DataFrame(
        {
            "step": np.arange(1, num + 1),
            "batch_size": 32,
            "grad_sq_norm": 1.0 + source.random(num),
            "variance_trace": 10.0 + source.random(num),
            "debiased_grad_sq_norm": 0.5 + source.random(num),
            "my_score": 2.0 + 5.0 * source.random(num),
        }
    )


def test_a_probes_own_frame_can_be_drawn() -> None:
    """Catches: "needs the columns arm, seed" about noisekit's own table."""
    plot = nk.figures.noise_over_training(loop_frame())
    assert set(plot.table["quantity"]) >= {"simple_noise_scale"}
    curves = nk.figures.training_curves(loop_frame(), quantities=["grad_sq_norm"])
    assert curves.figure.axes[0].get_xlabel() == "Update"


def test_columns_of_ones_own_can_be_drawn() -> None:
    """The axis starts at zero and holds all values.

    Catches: a vocabulary closed to the user's columns; an axis that ends at 1.
    """
    plot = nk.figures.training_curves(loop_frame(), quantities=["my_score"])
    [ax] = plot.figure.axes
    assert ax.get_ylabel() == "My score"
    low, high = ax.get_ylim()
    assert low == 0.0
    assert high > loop_frame()["my_score"].max() > 5.0
    assert plot.caption.startswith("My score against updates.")


@pytest.mark.parametrize(
    "values", [[10.0, 9.0, 11.0], [3.0, 90.0, 2.0], [-4.0, 1.0, 5]]
)
def test_no_value_lies_outside_the_axis(values: list[float]) -> None:
    """Catches: a weight norm of 10 above an axis that ends at 1; a negative one cut."""
    rows = DataFrame({"step": [0, 1, 2], "weight_norm": values})
    [ax] = figures.training_curves(rows, quantities=["weight_norm"]).figure.axes
    low, high = ax.get_ylim()
    assert low <= min(values)
    assert max(values) <= high


def test_seeds_are_joined_between_two_arms_only() -> None:
    """Catches: a zigzag across four arms that have no order."""
    for arms, joined in ((["small_low", "large_low"], True), (None, False)):
        plot = figures.paired_arms(
            samples.measurements(num_seeds=3),
            "lambda_max",
            snapshots=["loss_0.05"],
            arms=arms,
        )
        lines = [line for line in plot.figure.axes[0].lines if line.get_lw() == 0.4]
        assert bool(lines) is joined
        assert ("joined across arms" in plot.caption) is joined


def test_thresholds_have_their_values() -> None:
    """Catches: "unstable above" without a number."""
    plot = figures.sharpness_against_loss(
        samples.measurements(num_seeds=2),
        samples.snapshots(num_seeds=2),
        thresholds={"small_low": 40.0},
    )
    words = [text.get_text() for text in plot.figure.axes[0].texts]
    assert words == ["unstable above 40"]


def test_rounding_of_small_norms_is_marked() -> None:
    """Catches: a notch that single precision makes, taken for a finding."""
    norms = 10.0 ** np.linspace(-20, 2, 400)
    table = DataFrame({"example_grad_sq_norm": norms, "arm": "a", "snapshot": "end"})
    marked = figures.example_norm_histograms(table, snapshots=["end"])
    assert "single precision rounds probabilities near 1" in marked.caption
    large = table[table["example_grad_sq_norm"] > 1e-6]
    plain = figures.example_norm_histograms(large, snapshots=["end"])
    assert "single precision" not in plain.caption

"""What every figure keeps to, whatever it shows."""

import itertools
import re
from collections.abc import Callable

import matplotlib as mpl
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from noisekit import figures
from noisekit.figures import Plot
from tests.figures import samples


def paired(*snapshots: str) -> Plot:
    return figures.paired_arms(
        samples.measurements(num_seeds=4), "lambda_max", snapshots=snapshots
    )


def ratios() -> Plot:
    table = figures.paired_ratios(
        samples.measurements(num_seeds=4),
        quantities=["hessian_trace", "weighted_hessian_trace"],
        snapshot="loss_0.05",
        treatment="large_low",
        reference="small_low",
        comparison="same rate",
    )
    return figures.descriptive_ratios(table)


def batch_sizes() -> Plot:
    draws, moments = samples.batch_draws()
    return figures.grad_sq_norm_against_batch_size(
        draws, moments, num_examples=samples.NUM_EXAMPLES
    )


FIGURES: dict[str, Callable[[], Plot]] = {
    "claims": lambda: figures.claim_forest(samples.contrasts()),
    "paired, one snapshot": lambda: paired("loss_0.05"),
    "paired, four snapshots": lambda: paired("loss_1", "loss_0.5", "loss_0.2", "final"),
    "ratios": ratios,
    "spectrum": lambda: figures.spectral_density(samples.spectrum()),
    "sharpness": lambda: figures.sharpness_against_loss(
        samples.measurements(num_seeds=3), samples.snapshots(num_seeds=3)
    ),
    "curves": lambda: figures.training_curves(samples.evaluations(num_seeds=3)),
    "timeline": lambda: figures.timeline(samples.planned_settings()),
    "tuning": lambda: figures.rate_tuning(
        samples.tuning_grid(), chosen={16: 0.1, 128: 0.5}
    ),
    "line": lambda: figures.linear_path(samples.paths(num_seeds=3)),
    "plane": lambda: figures.loss_surface(samples.loss_plane()),
    "plane, linear": lambda: figures.loss_surface(
        samples.loss_plane(), loss_scale="linear", what="Filter-normalised directions."
    ),
    "lines around": lambda: figures.loss_lines(samples.loss_around()),
    "noise": lambda: figures.noise_over_training(samples.steps(num_seeds=3)),
    "batch sizes": batch_sizes,
    "trade-off": lambda: figures.batch_size_tradeoff(samples.tradeoff()),
    "histograms": lambda: figures.example_norm_histograms(
        samples.examples(num_seeds=1), snapshots=["start", "loss_0.05"]
    ),
}


@pytest.fixture(scope="module", params=FIGURES)
def drawn(request: pytest.FixtureRequest) -> Plot:
    settings, open_figures = dict(mpl.rcParams), len(Gcf.figs)
    plot = FIGURES[request.param]()
    assert dict(mpl.rcParams) == settings, "rcParams changed"
    assert len(Gcf.figs) == open_figures, "pyplot holds the figure"
    with figures.themed():
        FigureCanvasAgg(plot.figure).draw()  # lays the figure out
    return plot


def texts(plot: Plot) -> list[Text]:
    return [
        text
        for text in plot.figure.findobj(Text)
        if text.get_visible() and text.get_text().strip()
    ]


def test_globals_are_untouched_and_the_table_has_rows(drawn: Plot) -> None:
    """Catches: drawing through pyplot, which keeps figures and follows its backend.

    The fixture compares the settings before and after.
    """
    assert len(drawn.table) > 0
    assert re.fullmatch(r"[a-z_]+", drawn.name)


def test_captions_are_whole_sentences(drawn: Plot) -> None:
    """Catches: double spaces or full stops where an optional part is left out."""
    assert drawn.caption.endswith(".")
    assert "  " not in drawn.caption
    assert ".." not in drawn.caption
    assert drawn.caption[0].isupper()


def test_no_letter_is_smaller_than_seven_points(drawn: Plot) -> None:
    """Catches: text that cannot be read at the printed size."""
    assert {
        t.get_text(): t.get_fontsize() for t in texts(drawn) if t.get_fontsize() < 7
    } == {}


def test_columns_fit_a_paper(drawn: Plot) -> None:
    """Catches: a figure that a journal has to scale, and its text with it."""
    width, height = drawn.figure.get_size_inches()
    assert width in (figures.ONE_COLUMN, figures.TWO_COLUMNS)
    assert height < 6


def test_text_stays_inside_the_figure(drawn: Plot) -> None:
    """Catches: labels and numbers that are cut off at the edge."""
    box, outside = drawn.figure.bbox, outside_ticks(drawn)
    for text in (text for text in texts(drawn) if id(text) not in outside):
        extent = text.get_window_extent()
        assert extent.x0 >= box.x0 - 1, text.get_text()
        assert extent.x1 <= box.x1 + 1, text.get_text()
        assert extent.y0 >= box.y0 - 1, text.get_text()
        assert extent.y1 <= box.y1 + 1, text.get_text()


def test_tick_labels_do_not_overlap(drawn: Plot) -> None:
    """Catches: arm names or powers of ten printed over one another."""
    for ax in drawn.figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            labels = [
                label
                for label in shown_labels(ax, axis.axis_name)
                if label.get_text().strip()
            ]
            boxes = [label.get_window_extent() for label in labels]
            for first, second in itertools.pairwise(boxes):
                assert not first.overlaps(second), [t.get_text() for t in labels]


def test_legend_entries_are_distinct(drawn: Plot) -> None:
    """Catches: two arms under one name."""
    for legend in drawn.figure.legends:
        labels = [text.get_text() for text in legend.get_texts()]
        assert len(labels) == len(set(labels))
        assert len(labels) <= 6


def shown_labels(ax: Axes, which: str) -> list[Text]:
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1
        for tick in axis.get_major_ticks()
        if tick.label1.get_visible() and low <= tick.get_loc() <= high
    ]


def outside_ticks(plot: Plot) -> set[int]:
    """Return labels of ticks beyond the ends of their axis, which are not drawn."""
    labels = set()
    for ax in plot.figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    labels |= {id(tick.label1), id(tick.label2)}
    return labels

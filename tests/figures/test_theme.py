"""One look: arms told apart, plain ticks, no global setting touched."""

import itertools

import matplotlib as mpl
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pandas import DataFrame

from noisekit.core.errors import UsageError
from noisekit.core.vocabulary import QUANTITIES
from noisekit.figures import arm_styles, themed, training_curves
from noisekit.figures.canvas import draw_levels
from noisekit.figures.theme import (
    in_three_digits,
    log_limits,
    plain_log_ticks,
    snapshot_words,
    styles_of,
    two_line_label,
)
from tests.figures import samples


def luminance(color: str) -> float:
    red, green, blue = to_rgb(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_arms_differ_in_colour_marker_and_line() -> None:
    """Catches: a palette or a list of markers that repeats within a 2 x 2 design."""
    styles = list(arm_styles(samples.runs()).values())
    for first, second in itertools.combinations(styles, 2):
        assert first.color != second.color
        assert first.marker != second.marker
        assert first.linestyle != second.linestyle


def test_seven_arms_have_seven_colours_that_show_on_white() -> None:
    """Catches: the palette's yellow and grey, which vanish on paper."""
    styles = styles_of({str(i): str(i) for i in range(7)})
    colors = [style.color for style in styles.values()]
    assert len(set(colors)) == 7
    assert max(map(luminance, colors)) < 0.75


def test_arms_are_ordered_by_their_factors() -> None:
    """Catches: the order of the run names, in which large comes before small."""
    runs = samples.runs().sort_values("run_id")
    assert list(arm_styles(runs)) == [
        "small_low",
        "small_high",
        "large_low",
        "large_high",
    ]
    assert arm_styles(runs)["large_high"].label == "batch 128, rate 0.4"


def test_arms_that_factors_do_not_tell_apart_keep_their_names() -> None:
    """Catches: two arms with one label in a legend."""
    runs = DataFrame(
        {"arm": ["b_plain", "a_momentum"], "batch_size": 16, "learning_rate": 0.1}
    )
    labels = [style.label for style in arm_styles(runs).values()]
    assert labels == ["b plain", "a momentum"]


def test_a_missing_factor_falls_back_to_names() -> None:
    """Catches: 'batch nan' in a legend."""
    runs = DataFrame(
        {"arm": ["x", "y"], "batch_size": [16, None], "learning_rate": [0.1, 0.1]}
    )
    assert [style.label for style in arm_styles(runs).values()] == ["x", "y"]


def test_settings_are_as_before_also_after_an_error() -> None:
    """Catches: rcParams.update without a context."""
    before = dict(mpl.rcParams)
    with themed():
        assert mpl.rcParams["pdf.fonttype"] == 42
    assert dict(mpl.rcParams) == before
    with pytest.raises(UsageError):
        training_curves(samples.evaluations(num_seeds=1), quantities=["no_such"])
    assert dict(mpl.rcParams) == before


def test_no_text_is_set_below_seven_points() -> None:
    """Catches: relative sizes such as 'small', which fall below it."""
    with themed():
        sizes = {k: v for k, v in mpl.rcParams.items() if k.endswith("size")}
    for key in ("font.size", "axes.labelsize", "axes.titlesize", "legend.fontsize"):
        assert sizes[key] >= 7
    assert min(sizes["xtick.labelsize"], sizes["ytick.labelsize"]) >= 7


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.5, 2.7, ["0.5", "0.7", "1", "1.5", "2"]),
        (0.4, 60.0, ["0.5", "1", "2", "5", "10", "20", "50"]),
        (0.0001, 3.0, ["0.0001", "0.001", "0.01", "0.1", "1"]),
        (1e-7, 1e-4, ["$10^{-7}$", "$10^{-6}$", "$10^{-5}$", "$10^{-4}$"]),
    ],
)
def test_log_ticks_are_written_plainly(
    low: float, high: float, wanted: list[str]
) -> None:
    """Catches: 10^0 beside 2, one tick on a short axis, plain and power mixed."""
    ax = Figure().subplots()
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    plain_log_ticks(ax.yaxis)
    ticks = [t for t in ax.yaxis.get_major_locator()() if low <= t <= high]
    written = [ax.yaxis.get_major_formatter()(tick, 0) for tick in ticks]
    assert set(wanted) <= set(written)
    assert len({"^" in text for text in written}) == 1


def test_log_limits_skip_what_has_no_logarithm() -> None:
    """Catches: limits of zero or NaN, which blank the panel."""
    assert log_limits([float("nan"), -1.0, 0.0, 2.0, 8.0], pad=2.0) == (1.0, 16.0)
    assert log_limits([0.0]) == (0.1, 10.0)


@pytest.mark.parametrize("name", sorted(QUANTITIES))
def test_two_line_labels_say_what_the_vocabulary_says(name: str) -> None:
    """Catches: a label that loses symbol or unit on the way to the second line."""
    assert two_line_label(name).replace("\n", " ") == QUANTITIES[name].axis_label


def test_arms_at_one_level_share_a_line_in_turn() -> None:
    """Catches: one arm's line hiding the other's at the same height."""
    ax = Figure().subplots()
    styles = arm_styles(samples.runs())
    levels = {"small_low": 16.0, "small_high": 16.0, "large_low": 128.0}
    draw_levels(ax, levels, styles)
    heights = [line.get_ydata()[0] for line in ax.lines]
    assert heights == [16.0, 16.0, 128.0]
    assert ax.lines[0].get_color() != ax.lines[1].get_color()
    # Private, since Matplotlib tells only '--' of a dashed line.
    patterns = [line._unscaled_dash_pattern for line in ax.lines]
    assert patterns[0][0] != patterns[1][0]


def test_names_and_numbers_in_words() -> None:
    """Catches: 'loss 0.05' taken for a test loss; '0.45' beside '0.563'."""
    assert snapshot_words("loss_0.05") == "training loss 0.05"
    assert snapshot_words("equal_epochs") == "equal epochs"
    assert [in_three_digits(x) for x in (0.45, 2.0, 128.0)] == ["0.450", "2.00", "128"]

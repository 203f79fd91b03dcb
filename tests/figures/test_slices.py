"""The loss around a solution: contours on a plane, and lines."""

import math

import numpy as np
import pytest
from matplotlib.contour import QuadContourSet
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import Plot, loss_lines, loss_surface
from tests.figures import samples


@pytest.fixture
def plane() -> DataFrame:
    return samples.loss_plane()


def contours(plot: Plot) -> tuple[QuadContourSet, QuadContourSet]:
    """The filled contours and the lines."""
    filled, lines = (
        c for c in plot.figure.axes[0].collections if isinstance(c, QuadContourSet)
    )
    return filled, lines


def test_the_first_direction_goes_to_the_right(plane: DataFrame) -> None:
    """The loss rises faster along the first direction, so the rings are upright.

    Catches: a grid that is transposed; rows in another order than the axes.
    """
    shuffled = plane.sample(frac=1.0, random_state=0)
    for table in (plane, shuffled):
        _, lines = contours(loss_surface(table, levels=[0.3]))
        [path] = lines.get_paths()
        width, height = np.ptp(path.vertices, axis=0)
        assert width < 0.6
        assert height > 1.2


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_levels_are_round_and_even_on_their_scale(plane: DataFrame, scale: str) -> None:
    """Fills span the whole range; lines are at numbers that read well.

    Catches: a top or a bottom that is left white; linear levels under a log norm.
    """
    plot = loss_surface(plane, loss_scale=scale)
    filled, lines = contours(plot)
    low, high = plane["loss"].min(), plane["loss"].max()
    assert (filled.levels[0], filled.levels[-1]) == (low, high)
    steps = np.diff(np.log(filled.levels) if scale == "log" else filled.levels)
    np.testing.assert_allclose(steps, steps[0])
    assert filled.norm(low) == pytest.approx(0.0)
    assert filled.norm(high) == pytest.approx(1.0)
    middle = (low * high) ** 0.5 if scale == "log" else (low + high) / 2
    assert filled.norm(middle) == pytest.approx(0.5)
    assert 3 <= len(lines.levels) <= 8
    assert all(f"{level:.3g}" in plot.caption for level in lines.levels)
    assert all(len(f"{level:.6g}") <= 5 for level in lines.levels)


def test_own_levels_are_drawn_where_the_loss_has_them(plane: DataFrame) -> None:
    """Catches: a level out of range that Matplotlib warns of, or that draws nothing."""
    _, lines = contours(loss_surface(plane, levels=[1e-9, 0.5, 2.0, 1e9]))
    assert list(lines.levels) == [0.5, 2.0]
    none = loss_surface(plane, levels=[1e9])
    assert len(none.figure.axes[0].collections) == 1


def test_points_without_a_loss_are_counted_and_left_grey(plane: DataFrame) -> None:
    """Infinite, NaN and, on a log scale, not positive.

    Catches: interpolation across a hole; a hole that shifts its row.
    """
    plane.loc[[0, 1], "loss"] = [math.inf, math.nan]
    plane.loc[2, "loss"] = -1.0
    plot = loss_surface(plane)
    assert "Left out: 3 points" in plot.caption
    assert len(plot.table) == len(plane) - 3
    linear = loss_surface(plane, loss_scale="linear")
    assert "Left out: 2 points" in linear.caption
    filled, _ = contours(plot)
    corner = filled.get_paths()
    assert not any(path.contains_point((-0.99, -0.99)) for path in corner)


def test_the_solution_is_marked_and_axes_are_equal(plane: DataFrame) -> None:
    """Catches: a mark at the lowest point, which may be another; a stretched basin."""
    plot = loss_surface(
        plane, axis_labels=("a", "b"), what="Directions are eigenvectors."
    )
    ax = plot.figure.axes[0]
    [mark] = ax.lines
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (0, 0)
    assert ax.get_aspect() == 1.0
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
    assert "Directions are eigenvectors. " in plot.caption + " "


def test_planes_that_cannot_be_drawn_are_refused(plane: DataFrame) -> None:
    """Catches: contours of a constant, of a line, or of two slices at once."""
    with pytest.raises(UsageError, match=r"a loss that varies .* got 1 everywhere"):
        loss_surface(plane.assign(loss=1.0))
    with pytest.raises(
        UsageError, match=r"grid of points, .* got 224 rows for 15 x 15"
    ):
        loss_surface(plane.iloc[1:])
    with pytest.raises(UsageError, match="grid of points"):
        loss_surface(plane.iloc[:15])
    with pytest.raises(UsageError, match="got 450 rows"):
        loss_surface(
            DataFrame(np.repeat(plane.to_numpy(), 2, 0), columns=plane.columns)
        )
    with pytest.raises(UsageError, match=r"levels that increase, got \[2\.0, 1\.0\]"):
        loss_surface(plane, levels=[2.0, 1.0])
    with pytest.raises(UsageError, match="without second"):
        loss_surface(plane.drop(columns="second"))
    with pytest.raises(EmptyDataError, match="finite and positive"):
        loss_surface(plane.assign(loss=-1.0))


def test_lines_are_told_apart_and_in_the_order_asked_for() -> None:
    """Catches: a legend in the table's order; points joined across labels."""
    table = samples.loss_around()
    plot = loss_lines(table, labels={"large": "batch 6000", "small": "batch 256"})
    [legend] = plot.figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["batch 6000", "batch 256"]
    ax = plot.figure.axes[0]
    drawn = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert [len(line.get_xdata()) for line in drawn] == [21, 21]
    assert max(drawn[0].get_ydata()) == pytest.approx(4.01)
    assert ax.get_yscale() == "log"


def test_one_line_needs_no_label() -> None:
    """Catches: a legend for a single line; a slice's own table refused."""
    table = samples.loss_around().query("label == 'small'").drop(columns="label")
    plot = loss_lines(table, loss_scale="linear", what="Along the top eigenvector")
    assert not plot.figure.legends
    assert "Along the top eigenvector." in plot.caption
    assert plot.figure.axes[0].get_yscale() == "linear"

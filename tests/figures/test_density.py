"""The spectrum over eigenvalues and over their magnitude."""

import itertools

import numpy as np
import pytest

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import spectral_density
from tests.figures.samples import spectrum


def test_outliers_are_lines_as_high_as_their_share() -> None:
    """Catches: outliers left out, or drawn as part of the bulk."""
    left, _ = spectral_density(spectrum()).figure.axes
    assert left.get_yscale() == "log"
    [marks] = [line for line in left.lines if line.get_marker() == "o"]
    assert list(marks.get_xdata()) == [15.0, 20.0]
    assert list(marks.get_ydata()) == [1e-3, 1e-3]
    assert left.get_xlim()[1] > 20.0


def test_signs_are_on_their_own_sides_and_mirror_each_other() -> None:
    """Equal magnitudes are equally far from the middle.

    Catches: a negative part folded onto the positive one; ticks of the wrong decade.
    """
    _, right = spectral_density(spectrum()).figure.axes
    negative, positive = (line.get_xdata() for line in right.lines[:2])
    assert max(negative) < 0 < min(positive)
    assert sorted(-np.asarray(negative)) == pytest.approx(sorted(positive))
    right.figure.canvas.draw()
    labels = [label.get_text() for label in right.get_xticklabels()]
    places = list(right.get_xticks())
    assert places == sorted(places)
    assert labels[0].startswith("$-10^")
    assert [x.replace("-10^", "10^", 1) for x in labels[: len(labels) // 2]] == (
        labels[: len(labels) // 2 - 1 : -1]
    )


def test_the_caption_counts_outliers_and_what_is_left_out() -> None:
    table = spectrum()
    table.loc[3, "value"] = np.nan
    caption = spectral_density(table).caption
    assert "2 outliers" in caption
    assert "not resolved from zero, 60 % of all" in caption
    assert "Left out: 1 value" in caption
    assert "stands apart" in spectral_density(spectrum(atoms=())).caption


def test_tables_that_cannot_be_drawn_are_refused() -> None:
    """Catches: blank axes."""
    table = spectrum()
    with pytest.raises(UsageError, match=r"needs the columns axis.*without low"):
        spectral_density(table.drop(columns="low"))
    with pytest.raises(EmptyDataError, match="density over the log axis, got none"):
        spectral_density(table[table["axis"] == "linear"])
    with pytest.raises(EmptyDataError, match="a share about zero, got none"):
        spectral_density(table[table["kind"] != "zero"])


def test_the_middle_says_how_many_are_not_told_from_zero() -> None:
    """Catches: a zone that hides most of the eigenvalues; ticks over each other."""
    _, right = spectral_density(spectrum()).figure.axes
    assert [text.get_text() for text in right.texts] == ["60 %"]
    right.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in right.get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))

"""The straight line between two solutions."""

import math

import pytest
from pandas import DataFrame

from noisekit.core.errors import EmptyDataError, UsageError
from noisekit.figures import linear_path
from tests.figures import samples


@pytest.fixture
def paths() -> DataFrame:
    return samples.paths(num_seeds=3)


def test_accuracy_is_in_percent_and_thick_lines_are_medians(paths: DataFrame) -> None:
    """Catches: an error drawn as accuracy; a mean, which one bad seed moves."""
    plot = linear_path(paths)
    assert plot.table["accuracy"].tolist() == pytest.approx(
        (100 * (1 - paths["error"])).tolist()
    )
    left, right = plot.figure.axes
    train = paths[paths["split"] == "train"]
    medians = train.groupby("alpha")["loss"].median()
    thick = [line for line in left.lines if line.get_linewidth() > 1]
    assert any(list(line.get_ydata()) == pytest.approx(list(medians)) for line in thick)
    assert right.get_ylabel() == "Accuracy [%]"
    assert left.get_ylabel() == "Cross-entropy loss"


def test_both_solutions_are_marked(paths: DataFrame) -> None:
    """Catches: start and end exchanged."""
    left, _ = linear_path(paths, start_label="A", end_label="B").figure.axes
    marks = {text.get_text(): text.xy[0] for text in left.texts}
    assert marks == {"A": 0.0, "B": 1.0}


def test_each_split_has_its_line(paths: DataFrame) -> None:
    """Catches: train and test data drawn alike."""
    plot = linear_path(paths)
    [legend] = plot.figure.legends
    styles = [line.get_linestyle() for line in legend.get_lines()]
    assert len(set(styles)) == 2
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["train data", "test data"]


def test_the_caption_counts_points_that_overflowed(paths: DataFrame) -> None:
    """Catches: a line that stops where the loss is infinite, without a word."""
    paths.loc[paths.index[:2], "loss"] = [math.inf, 0.0]
    plot = linear_path(paths)
    assert "Left out: 2 points" in plot.caption
    linear = linear_path(paths, loss_scale="linear")
    assert "Left out: 1 point that" in linear.caption


def test_tables_that_cannot_be_drawn_are_refused(paths: DataFrame) -> None:
    """Catches: blank axes."""
    with pytest.raises(UsageError, match="without alpha"):
        linear_path(paths.drop(columns="alpha"))
    with pytest.raises(EmptyDataError, match="got an empty table"):
        linear_path(paths.iloc[:0])
    with pytest.raises(EmptyDataError, match="needs finite and positive values"):
        linear_path(paths.assign(loss=math.nan))

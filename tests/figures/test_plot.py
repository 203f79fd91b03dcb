"""Saving a plot: every format, the same bytes each time, the table comes back."""

import io
import re
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib.figure import Figure
from pandas import DataFrame
from pandas.testing import assert_frame_equal

from noisekit.core.errors import StorageError
from noisekit.figures import FORMATS, Plot, linear_path, themed
from tests.figures import samples


@pytest.fixture(scope="module")
def plot() -> Plot:
    return linear_path(samples.paths(num_seeds=2))


@pytest.fixture(scope="module")
def saved(plot: Plot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return plot.save(tmp_path_factory.mktemp("saved") / "new" / "folder")


def inflated(pdf: bytes) -> bytes:
    """Return a PDF with its compressed streams opened."""
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, flags=re.DOTALL)
    opened = [zlib.decompressobj().decompress(s) for s in streams if s[:1] == b"x"]
    return b"\n".join([pdf, *opened])


def test_every_format_is_written_under_the_plots_name(
    plot: Plot, saved: dict[str, Path]
) -> None:
    """Catches: a format that is listed and not written, or named otherwise."""
    assert set(saved) == set(FORMATS)
    for ending, path in saved.items():
        assert path.name == f"{plot.name}.{ending}"
        assert path.stat().st_size > 500


def test_pdf_embeds_its_fonts_and_none_is_type_3(saved: dict[str, Path]) -> None:
    """Catches: Matplotlib's default font type 3, which journals refuse."""
    pdf = saved["pdf"].read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")
    opened = inflated(pdf)
    assert b"/FontFile2" in opened
    assert b"/Type3" not in opened


def test_figures_keep_their_printed_size(saved: dict[str, Path]) -> None:
    """Catches: a tight bounding box on saving, which scales the text in print."""
    box = re.search(rb"/MediaBox \[\s*([^\]]+)\]", saved["pdf"].read_bytes())
    assert box is not None
    width = float(box[1].split()[2]) / 72
    assert width == pytest.approx(3.4, abs=0.01)


def test_svg_is_well_formed_and_keeps_its_shapes(
    plot: Plot, saved: dict[str, Path]
) -> None:
    """Shortening leaves as many commands in each path as Matplotlib wrote.

    Catches: a pattern that eats a number or a command; one that rounds the scale of
    letters in ``transform`` to nothing.
    """
    root = ElementTree.fromstring(saved["svg"].read_bytes())
    paths = [e.get("d", "") for e in root.iter("{http://www.w3.org/2000/svg}path")]
    assert len(paths) > 50
    number = r"-?\d+(?:\.\d{1,2})?"
    command = rf"(?:[ML]{number} {number}|Q{number}(?: {number}){{3}}"
    command += rf"|C{number}(?: {number}){{5}}|z)"
    for path in paths:
        assert re.fullmatch(f"(?:{command})*", path), path[:80]
    scales = re.findall(r"scale\(([\d.]+)", saved["svg"].read_text())
    assert min(map(float, scales)) > 0


def test_svg_coordinates_are_matplotlibs_to_a_hundredth_of_a_point(plot: Plot) -> None:
    """Catches: rounding that loses a carry, a sign or a number."""
    buffer = io.BytesIO()
    with themed():
        plot.figure.savefig(buffer, format="svg")
    whole, short = (
        [
            float(number)
            for value in re.findall(rb' (?:d|x|y)="([^"]*)"', svg)
            for number in re.findall(rb"-?\d+(?:\.\d+)?", value)
        ]
        for svg in (buffer.getvalue(), plot.rendered("svg"))
    )
    assert len(whole) > 1000
    assert short == pytest.approx(whole, abs=0.00501, rel=0)


def test_svg_shortening_halves_long_lines(plot: Plot) -> None:
    """Catches: shortening that is not applied, so that a report weighs megabytes."""
    figure = Figure()
    ax = figure.subplots()
    xs = [i + (i % 7) / 3 for i in range(3000)]
    ax.plot(xs, [(x * x) % 17 for x in xs])
    drawn = Plot(figure, DataFrame({"x": xs}), "long", "A line.").rendered("svg")
    points = sum(map(len, re.findall(rb'd="[^"]*"', drawn)))
    assert points < 3000 * 16


def test_png_starts_as_one(saved: dict[str, Path]) -> None:
    """Catches: another format behind the ending."""
    assert saved["png"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_table_comes_back_from_both_files(
    plot: Plot, saved: dict[str, Path]
) -> None:
    """Catches: rounded numbers, an index written as a column, seeds as floats."""
    assert_frame_equal(pd.read_parquet(saved["parquet"]), plot.table)
    read = pd.read_csv(saved["csv"])
    assert_frame_equal(read, plot.table, check_dtype=False, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("ending", ["pdf", "svg", "png"])
def test_the_same_data_give_the_same_bytes(ending: str) -> None:
    """Catches: dates, versions and random identifiers in the files."""
    first, second = (
        linear_path(samples.paths(num_seeds=2)).rendered(ending) for _ in range(2)
    )
    assert first == second
    assert b"matplotlib.org" not in first


def test_rendering_does_not_follow_the_users_settings(plot: Plot) -> None:
    """Catches: a user's matplotlibrc that changes fonts when the figure is saved."""
    import matplotlib as mpl

    before = plot.rendered("svg")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": None}):
        assert plot.rendered("svg") == before


def test_a_folder_that_cannot_be_written_is_named(plot: Plot, tmp_path: Path) -> None:
    """Catches: a bare OSError without figure and folder."""
    taken = tmp_path / "taken"
    taken.write_text("a file, not a folder")
    with pytest.raises(StorageError) as refused:
        plot.save(taken)
    message = str(refused.value)
    assert "figure 'linear_path' needs a folder that can be written" in message
    assert str(taken) in message
    assert "name another folder" in message

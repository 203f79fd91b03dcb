"""The page: what stands where, that it stands alone, and that it is safe."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pandas import DataFrame

from noisekit.core.errors import StorageError
from noisekit.core.results import Interval
from noisekit.core.vocabulary import quantity
from noisekit.report import AnalysisResult, Rule, Table, build_report
from tests.report.samples import (
    HOSTILE,
    SHARPNESS,
    PageReader,
    changed,
    ids_in,
    judged,
    places,
    plot,
    provenance,
    read,
    result,
)


@pytest.fixture
def page(tmp_path: Path) -> PageReader:
    """A page with one of everything."""
    return read(build_report([result()], provenance(), tmp_path / "report.html"))


def test_the_page_reads_from_answer_to_reproduction(page: PageReader) -> None:
    """That a rule is broken comes before the verdicts, all rules after the tables.

    Catches: rules that are met before the verdicts; the recipe on top.
    """
    found = places(
        page.words,
        "Is it sharper?",
        "It was 2.4 times sharper.",
        "1 of 2 rules of a fair test is broken",
        "Ten or more paired seeds",
        "Claims and verdicts",
        "Figure 1. A line.",
        "Table 1. Noise by arm.",
        "Rules of a fair test",
        "1 of 2 are met",
        "Every run is complete",
        "The twin is sharper.",
        "Methods",
        quantity("variance_trace").definition,
        "mccandlish2018empirical",
        "Where this comes from",
        'name = "toy"',
        "Cost",
        "noisekit run toy --profile demo --out DIR",
    )
    assert found == sorted(found)


def test_nothing_is_asked_of_another_place(tmp_path: Path) -> None:
    """No script, and every address is in the page, in itself or beside it.

    Catches: namespaces, style sheets, fonts or icons fetched from elsewhere.
    """
    (tmp_path / "analyses" / "toy").mkdir(parents=True)
    plot().save(tmp_path / "analyses" / "toy")
    path = build_report([result()], provenance(), tmp_path / "report.html")
    text, page = path.read_text(), read(path)
    addresses = page.values("href") + page.values("src")
    assert any(address.endswith("curve.pdf") for address in addresses)
    for address in addresses:
        assert address.startswith(("#", "analyses/", "data:")), address
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags) - {"link"}
    assert page.tags.count("link") == 1
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_whatever_came_from_a_file_is_escaped(tmp_path: Path) -> None:
    """Catches: a template that marks any field safe, or autoescape left off."""
    hostile_claim = changed(
        SHARPNESS,
        name=HOSTILE,
        description=HOSTILE,
        treatment=HOSTILE,
        snapshot=HOSTILE,
        quantity=HOSTILE,
        paper=HOSTILE,
    )
    everything = result(
        name="toy",
        question=HOSTILE,
        answer=HOSTILE,
        rules=(Rule(HOSTILE, False, HOSTILE),),
        claims=judged(hostile_claim, not_comparable=HOSTILE),
        plots=(plot(caption=HOSTILE, title="--><script>alert(1)</script>"),),
        tables=(Table("t", DataFrame({HOSTILE: [HOSTILE]}), HOSTILE),),
        warnings=(HOSTILE,),
    )
    pairs = {HOSTILE: HOSTILE}
    origin = provenance(
        title=HOSTILE,
        arms=pairs,
        runs=Table("runs", DataFrame({"run_id": [HOSTILE]}), HOSTILE),
        recipe=HOSTILE,
        data=pairs,
        versions=pairs,
        host=pairs,
        costs=pairs,
        commands=(HOSTILE,),
        faults=(f"fault {HOSTILE}",),
    )
    page = read(build_report([everything], origin, tmp_path / "report.html"))
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.words.count(HOSTILE) > 20


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    """Two figures drawn alike share no id, and keep their clips and markers.

    Catches: ids left as Matplotlib writes them, so that a figure uses the clip path
    of another one; references that are not renamed with the ids.
    """
    results = [result(plots=(plot(), plot("again"))), result("more")]
    text = build_report(results, provenance(), tmp_path / "report.html").read_text()
    names = PageReader(text).values("id")
    assert len(names) == len(set(names))
    _, targets = ids_in(text)
    assert len(targets) >= 6
    assert targets <= set(names)


def test_every_figure_is_there_with_its_caption_and_name(tmp_path: Path) -> None:
    """Catches: a figure without a name for screen readers; numbers that start again."""
    captions = ["First of −1.", "Second.", "Third."]
    results = [
        result(plots=(plot("a", "First of -1."), plot("b", captions[1]))),
        result("more", plots=(plot("c", captions[2]),)),
    ]
    page = read(build_report(results, provenance(), tmp_path / "report.html"))
    assert page.tags.count("svg") == page.tags.count("figure") == 3
    assert page.tags.count("figcaption") == 3
    for number, caption in enumerate(captions, start=1):
        assert f"Figure {number}. {caption}" in page.words
    labels = [
        value
        for tag, name, value in page.attributes
        if (tag, name) == ("svg", "aria-label")
    ]
    assert labels == ["First of -1.", *captions[1:]]


def test_only_files_that_are_there_are_linked(tmp_path: Path) -> None:
    """Catches: links made from names alone; links that leave the report's folder."""
    folder = tmp_path / "analyses" / "toy"
    folder.mkdir(parents=True)
    (folder / "curve.csv").write_text("step\n")
    (folder / "noise.parquet").write_bytes(b"")
    page = read(build_report([result()], provenance(), tmp_path / "report.html"))
    assert [address for address in page.values("href") if "/" in address] == [
        "analyses/toy/curve.csv",
        "analyses/toy/noise.parquet",
    ]


def test_names_of_files_are_quoted_in_links(tmp_path: Path) -> None:
    """Catches: a space or an umlaut in the name of a file that breaks its link."""
    folder = tmp_path / "analyses" / "toy"
    folder.mkdir(parents=True)
    (folder / "a b?.csv").write_text("step\n")
    results = [result(plots=(plot("a b?"),), tables=())]
    page = read(build_report(results, provenance(), tmp_path / "report.html"))
    assert "analyses/toy/a%20b%3F.csv" in page.values("href")


def test_contrasts_stand_with_units_verdicts_and_the_papers_number(
    page: PageReader,
) -> None:
    """Primary ones come first although the recipe named a descriptive one before.

    Catches: fractions for points; hyphens for minus signs; the arms' internal names.
    """
    found = places(
        page.words, "Primary", "Same training loss", "Descriptive", "Same number of"
    )
    assert found == sorted(found)
    for words in (
        "λ max at training loss 0.05",
        "batch 128 against batch 16",
        "2.40 ×",
        "1.5 ×",
        "larger",
        "In the paper: 9 times larger",
        "−0.400 points",
        "−0.466 to −0.334",
        "0.5 points",
        "95 %; 6 pairs",
        "smaller within the margin",
    ):
        assert words in page.words, words


def test_a_contrast_without_pairs_shows_dashes(tmp_path: Path) -> None:
    """Catches: "nan", or an interval from 0 to infinity, in the table."""
    empty = judged(SHARPNESS, not_comparable="no pair of runs got there")
    endless = Interval(0.0, math.inf, 0.95)
    nothing = replace(empty[0], effect=math.nan, interval=endless, num_pairs=0)
    page = read(
        build_report([result(claims=(nothing,))], provenance(), tmp_path / "r.html")
    )
    assert "not comparable no pair of runs got there" in page.words
    assert "nan" not in page.words
    assert "∞" not in page.words


def test_a_smoke_run_is_not_judged(tmp_path: Path) -> None:
    """Catches: a verdict, or a claim to one, on runs that claim nothing."""
    unjudged = result(claims=judged(SHARPNESS, verdicts=False))
    page = read(build_report([unjudged], provenance(), tmp_path / "r.html"))
    assert "not judged" in page.words
    assert "verdict not-judged" in page.values("class")
    assert not {"verdict larger", "verdict smaller"} & set(page.values("class"))


def test_the_first_analysis_leads_and_the_others_follow(tmp_path: Path) -> None:
    """Catches: the second question or its warnings above the first one's figures."""
    other = AnalysisResult(
        name="other", question="How noisy?", answer="Quite.", warnings=("Careful.",)
    )
    page = read(build_report([result(), other], provenance(), tmp_path / "r.html"))
    found = places(
        page.words, "Is it sharper?", "Figure 1.", "Quite.", "Careful.", "Where this"
    )
    assert found == sorted(found)
    assert "#analysis-2" in page.values("href")
    assert page.words.count("How noisy?") == 2  # the pointer to it, and its heading


def test_a_result_without_contrasts_and_figures_has_no_empty_parts(
    tmp_path: Path,
) -> None:
    """Catches: headings above nothing, and a box of broken rules that are none."""
    bare = AnalysisResult(name="bare", question="Why?", answer="Because.")
    page = read(build_report([bare], provenance(), tmp_path / "r.html"))
    for heading in ("Contrasts", "Figures", "Tables", "Rules", "Before using"):
        assert heading not in page.words
    assert "Because." in page.words


def test_runs_that_claim_nothing_say_so_and_show_the_runs(tmp_path: Path) -> None:
    """Catches: a page that needs an analysis; runs hidden in a closed fold."""
    table = Table("runs", DataFrame({"run_id": ["mine"], "status": ["done"]}), "Runs.")
    page = read(
        build_report([], provenance(runs=table, faults=("torn",)), tmp_path / "r.html")
    )
    found = places(page.words, "claim nothing", "torn", "digits", "mine")
    assert found == sorted(found)
    assert ("details", "open", "") in page.attributes


def test_faults_of_the_runs_are_told_once(tmp_path: Path) -> None:
    """Catches: what the analysis warned of already, once more; faults left out."""
    origin = provenance(faults=("The twin is sharper.", "run 3 is torn"))
    page = read(build_report([result()], origin, tmp_path / "r.html"))
    assert page.words.count("The twin is sharper.") == 1
    assert page.words.count("run 3 is torn") == 1


def test_the_glossary_has_what_the_page_speaks_of(page: PageReader) -> None:
    """Catches: the whole vocabulary, or quantities of figures and tables left out."""
    glossary = page.words[page.words.index("What the quantities mean") :]
    for name in (
        "lambda_max",  # a contrast's quantity
        "train_loss",  # a column of a figure's table
        "variance_trace",  # a column of a table
    ):
        assert quantity(name).label in glossary
        assert quantity(name).definition in glossary
    assert quantity("epsilon_sharpness").label not in glossary


def test_a_report_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    """Catches: a bare OSError; a half-written page in place of the one before."""
    blocked = tmp_path / "report.html"
    blocked.mkdir()
    with pytest.raises(
        StorageError,
        match=r"the report needs a file.*report\.html.*"
        "Free some space or name another file",
    ):
        build_report([], provenance(), blocked)
    assert list(tmp_path.iterdir()) == [blocked]


def test_a_report_refoundthe_one_before(tmp_path: Path) -> None:
    """Catches: leftovers beside the page, and text appended to the old one."""
    out = tmp_path / "deep" / "report.html"
    assert build_report([result()], provenance(), str(out)) == out
    build_report([], provenance(), out)
    assert "Is it sharper?" not in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    """Catches: dates, addresses or set order in the page."""
    pages = [
        build_report([result()], provenance(), tmp_path / name).read_bytes()
        for name in ("a.html", "b.html")
    ]
    assert pages[0] == pages[1]

"""The main analysis: its sentence follows from the verdicts, by rule."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import noisekit as nk
from noisekit import figures, report, stats
from tests.analyses.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the analysis as a module."""
    return load_script("sharpness_vs_batch_size")


def test_smoke_profile_answers_nothing(script: ModuleType, smoke_runs: Path) -> None:
    """Catches: an answer from runs that claim nothing."""
    result = script.analyse(nk.open_runs(smoke_runs))
    assert result.answer.startswith("No verdict")
    assert {c.verdict for c in result.claims} == {stats.Verdict.NOT_JUDGED}


def test_answer_names_setting_ratios_and_error(
    script: ModuleType, smoke_runs: Path
) -> None:
    """The answer has every primary contrast, also where losses were not reached.

    Catches: a number in the answer that is not the contrast's own; a second name of
    an arm.
    """
    runs = nk.open_runs(smoke_runs)
    claiming = replace(runs, recipe={**runs.recipe, "verdicts": True})
    result = script.analyse(claiming)
    lines = result.answer.splitlines()
    assert lines[0] == "Digits, 1k-parameter MLP, SGD, one split, 2 seeds."
    assert lines[1].startswith("Batch 128, rate 0.05 against batch 16, rate 0.05: ")
    for claim in report.stated_claims(claiming):
        if claim.primary:
            assert figures.snapshot_words(claim.statistic.snapshot) in result.answer
    assert "could not be compared" in result.answer
    for name in runs.runs["arm"].unique():
        assert name not in result.answer
        assert name.replace("_", " ") not in result.answer


def test_any_set_of_runs_is_analysed(script: ModuleType, network_runs: Path) -> None:
    """Arms that differ in their network, under names of their own.

    Catches: names of one experiment's arms, contrasts or factors; a KeyError where no
    arm sets a batch size.
    """
    result = script.analyse(nk.open_runs(network_runs))
    lines = result.answer.splitlines()
    assert lines[0] == "Digits, MLP, SGD, one split, 2 seeds."
    assert lines[1].startswith("With batchnorm against plain: ")
    rules = {rule.name: rule for rule in result.rules}
    normalised = rules["BatchNorm sees the same number of examples in all arms"]
    assert not normalised.met
    assert "plain: no BatchNorm" in normalised.detail
    assert rules["Learning rate varied or tuned per batch size"].met


def test_analysis_draws_and_tabulates(script: ModuleType, smoke_runs: Path) -> None:
    """Catches: a figure of the issue that is missing, a table without a caption."""
    result = script.analyse(nk.open_runs(smoke_runs))
    names = {plot.name for plot in result.plots}
    assert names >= {"claims", "paired_test_error", "sharpness_against_loss"}
    tables = {table.name for table in result.tables}
    assert tables == {"pyhessian", "rank_correlation", "test_error_over_images"}
    assert all(item.caption for item in (*result.plots, *result.tables))
    assert any("rescaled twin" in text for text in result.warnings)


def test_ours_and_pyhessian_agree(script: ModuleType, smoke_runs: Path) -> None:
    """Both give the same eigenvalue of the same problem.

    Catches: another loss, other examples or another BatchNorm mode in one of them.
    """
    table = nk.open_runs(smoke_runs).measurements
    keys = ["run_id", "snapshot"]
    ours, theirs = (
        table[table["quantity"] == name].set_index(keys)["value"]
        for name in ("lambda_max", "lambda_max_pyhessian")
    )
    both = ours.to_frame("ours").join(theirs.rename("theirs"), how="inner")
    assert len(both) == 8
    np.testing.assert_allclose(both["ours"], both["theirs"], rtol=0.02)

"""The main analysis: its sentence follows from the verdicts, by rule."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import noisekit as nk
from noisekit import report, stats
from tests.analyses.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the analysis as a module."""
    return load_script("sharpness_vs_batch_size")


def judged(
    name: str, ratio: float, spread: float, **sample: str
) -> stats.ContrastResult:
    """Return a judged contrast of ten pairs with this mean ratio and log spread."""
    noise = np.linspace(-1, 1, 10) * spread
    contrast = stats.Contrast(
        name=name,
        quantity="lambda_max",
        treatment="large_low",
        reference="small_low",
        snapshot="loss_0.05",
        scale="ratio",
        margin=1.5,
        primary=True,
    )
    pairs = stats.PairedSample(
        seeds=tuple(range(10)),
        treatment=tuple(ratio * np.exp(noise)),
        reference=(1.0,) * 10,
        **sample,
    )
    return stats.judge([contrast], {name: pairs})[0]


@pytest.mark.parametrize(
    ("ratio", "spread", "words"),
    [
        (3.0, 0.1, "sharpness went up with batch size once loss was matched"),
        (0.3, 0.1, "sharpness went down with batch size"),
        (1.05, 0.1, "sharpness did not go with batch size"),
        (1.5, 0.5, "sharpness may go with batch size"),
    ],
)
def test_conclusion_follows_the_verdict(
    script: ModuleType, ratio: float, spread: float, words: str
) -> None:
    """Catches: a sentence written by hand, or from the point estimate alone."""
    result = judged("lambda_max_at_equal_loss", ratio, spread)
    sentence = script.conclusion({"lambda_max_at_equal_loss": result})
    assert words in sentence
    assert "by a margin of 1.5 times" in sentence
    assert sentence.endswith("cannot say whether sharpness causes the error.")


def test_unmatched_losses_give_no_conclusion(script: ModuleType) -> None:
    """Catches: a verdict on sharpness at different training losses."""
    result = judged(
        "lambda_max_at_equal_loss", 9.0, 0.1, not_comparable="losses are not matched"
    )
    sentence = script.conclusion({"lambda_max_at_equal_loss": result})
    assert "sharpness could not be compared with batch size" in sentence


def test_smoke_profile_answers_nothing(script: ModuleType, smoke_runs: Path) -> None:
    """Catches: an answer from runs that claim nothing."""
    result = script.analyse(nk.open_runs(smoke_runs))
    assert result.answer.startswith("No verdict")
    assert {c.verdict for c in result.contrasts} == {stats.Verdict.NOT_JUDGED}


def test_answer_names_setting_ratios_and_error(
    script: ModuleType, smoke_runs: Path
) -> None:
    """The sentence has what the recipe asks for, also where losses were not reached.

    Catches: a number in the sentence that is not the contrast's own.
    """
    runs = nk.open_runs(smoke_runs)
    claiming = replace(runs, recipe={**runs.recipe, "claims": True})
    contrasts = report.stated_contrasts(claiming)
    results = stats.judge(contrasts, report.paired_samples(claiming, contrasts))
    sentence = script.answer(claiming, results)
    found = {result.contrast.name: result for result in results}
    assert sentence.startswith("On digits (1k-parameter MLP, SGD, one split, 2 seeds)")
    epochs = found["lambda_max_at_equal_epochs"]
    assert f"{epochs.effect:.2f} times" in sentence
    error = found["test_error_at_equal_epochs"]
    assert f"{100 * error.effect:+.2f} points" in sentence
    assert "could not be compared" in sentence


def test_analysis_draws_and_tabulates(script: ModuleType, smoke_runs: Path) -> None:
    """Catches: a figure of the issue that is missing, a table without a caption."""
    result = script.analyse(nk.open_runs(smoke_runs))
    names = {plot.name for plot in result.plots}
    assert names >= {"contrasts", "paired_test_error", "sharpness_against_loss"}
    tables = {table.name for table in result.tables}
    assert tables == {"pyhessian", "test_error_over_images"}
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

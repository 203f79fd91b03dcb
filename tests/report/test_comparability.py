"""Paired samples from runs on disk, and each rule of a fair test met and broken."""

import math
from pathlib import Path

import pytest

from noisekit.core.errors import UsageError
from noisekit.records import Runs, RunStatus
from noisekit.report import (
    Rule,
    fades_with_loss,
    fair_test_rules,
    is_rescaling_invariant,
    loss_ratio,
    sample_of,
    stated_claims,
)
from noisekit.stats import values_at
from tests.report.samples import ERROR, SHARPNESS, changed, make_runs


def rule(runs: Runs, start: str) -> Rule:
    """Return the one rule whose name starts so."""
    found = [
        rule
        for rule in fair_test_rules(runs, (SHARPNESS, ERROR))
        if rule.name.startswith(start)
    ]
    assert len(found) == 1
    return found[0]


def test_values_are_read_by_seed_arm_and_snapshot(tmp_path: Path) -> None:
    """Test error is a column of the snapshots, sharpness a row of the measurements.

    Catches: rows of another arm or snapshot; a second setting of the measure in
    place of the first.
    """
    runs = make_runs(tmp_path)

    def by_seed(quantity: str, at: str = "loss_0.05", **more: str) -> dict[int, float]:
        rows = values_at(runs, quantity, at=at, group="large", **more)
        return dict(zip(rows["seed"], rows["value"], strict=True))

    assert by_seed("lambda_max") == {0: 128.0, 1: 129.0}
    assert by_seed("lambda_max", variant="other") == {0: 1280.0, 1: 1290.0}
    assert by_seed("test_error") == {0: 0.128, 1: 0.129}
    assert all(map(math.isnan, by_seed("lambda_max", at="never").values()))


def test_pairs_share_a_seed_and_a_missing_side_is_kept(tmp_path: Path) -> None:
    """Catches: pairing by position; a pair of which a side is missing dropped."""
    runs = make_runs(tmp_path, seeds={"small": (0, 1, 2), "large": (2, 1, 5)})
    sample = sample_of(runs, SHARPNESS)
    assert sample.seeds == (0, 1, 2, 5)
    assert sample.treatment[1:] == (129.0, 130.0, 133.0)
    assert sample.reference[:3] == (16.0, 17.0, 18.0)
    assert math.isnan(sample.treatment[0])
    assert math.isnan(sample.reference[3])
    assert sample.not_comparable is None


@pytest.mark.parametrize("ratio", [1.3, 1 / 1.3])
def test_unmatched_losses_do_not_compare(tmp_path: Path, ratio: float) -> None:
    """Sharpness fades with the loss, so either side may be the lower one.

    Catches: a rule that looks at one side only; one that bars test errors as well.
    """
    runs = make_runs(tmp_path, loss={"large": 0.05 * ratio})
    assert loss_ratio(runs, SHARPNESS) == pytest.approx(ratio)
    reason = sample_of(runs, SHARPNESS).not_comparable
    assert reason is not None
    assert reason.startswith("training losses are not matched: their ratio is")
    assert "1.25 is allowed" in reason
    assert sample_of(runs, ERROR).not_comparable is None
    broken = rule(runs, "Training loss matched for “Same training loss”")
    assert not broken.met
    assert broken.detail == reason


INVARIANT_MEASURES = (
    "adaptive_average_sharpness",
    "adaptive_worst_case_sharpness",
    "fisher_rao_norm",
    "gauge_fixed_lambda_max",
    "logit_normalised_average_sharpness",
    "logit_normalised_worst_case_sharpness",
    "relative_flatness",
    "weighted_hessian_trace",
)
RAW_MEASURES = (
    "average_sharpness",
    "batch_sharpness",
    "batch_sharpness_ratio_of_means",
    "edge_of_stability_ratio",
    "effective_dimension",
    "epsilon_sharpness",
    "grad_norm",
    "hessian_frobenius_norm",
    "hessian_trace",
    "lambda_max",
    "lambda_max_pyhessian",
    "lambda_min",
    "m_sharpness",
    "pac_bayes_flatness",
    "pac_bayes_sharpness",
    "step_sharpness",
    "worst_case_sharpness",
)


@pytest.mark.parametrize("measure", INVARIANT_MEASURES + RAW_MEASURES)
def test_no_measure_of_sharpness_escapes_the_check_of_losses(
    tmp_path: Path, measure: str
) -> None:
    """At losses 0.02 and 0.30 no measure of sharpness may be judged.

    Catches: a list of names kept by hand that falls behind the measures (14 of the
    23 escaped it).
    """
    runs = make_runs(tmp_path, loss={"small": 0.02, "large": 0.30}, measured=(measure,))
    claim = changed(SHARPNESS, quantity=measure)
    reason = sample_of(runs, claim).not_comparable
    assert reason is not None
    assert "their ratio is 15" in reason


def test_an_unknown_measure_is_compared_at_matched_loss_only(tmp_path: Path) -> None:
    """Catches: a user's own measure that escapes since the vocabulary lacks it."""
    runs = make_runs(tmp_path, loss={"large": 0.5}, measured=("my_sharpness",))
    claim = changed(SHARPNESS, quantity="my_sharpness")
    assert sample_of(runs, claim).not_comparable is not None


def test_errors_and_norms_of_weights_do_not_wait_for_equal_losses() -> None:
    """Catches: a rule that bars every contrast at unmatched losses."""
    for name in ("test_error", "weight_norm", "simple_noise_scale"):
        assert not fades_with_loss(name)


def test_gradients_shrink_with_the_loss() -> None:
    """Gradient noise in units of the loss is no quantity to compare at unequal losses.

    Catches: a verdict on tr Sigma of a run that has fitted its data and one that has
    not.
    """
    for name in ("grad_sq_norm", "variance_trace", "example_grad_sq_norm"):
        assert fades_with_loss(name)


def test_a_constant_beside_the_weights_breaks_the_invariance() -> None:
    """Catches: ASAM's eta of 0.01 counted as invariant by the measure's name."""
    name = "adaptive_worst_case_sharpness"
    assert is_rescaling_invariant(name, "adaptive=True,rho=0.5")
    assert not is_rescaling_invariant(name, "rho=0.5,norm=l2,eta=0.01")


def test_the_recipe_says_how_far_losses_may_differ(tmp_path: Path) -> None:
    """Catches: the default margin where the recipe states its own."""
    runs = make_runs(
        tmp_path, loss={"large": 0.065}, recipe={"rules": {"matched_loss": 1.4}}
    )
    assert sample_of(runs, SHARPNESS).not_comparable is None
    met = rule(runs, "Training loss matched")
    assert met.met
    assert met.detail == "ratio of training losses 1.3, allowed 1.4"


def test_a_snapshot_that_no_pair_reached_does_not_compare(tmp_path: Path) -> None:
    """Catches: a mean over no pair, NaN, that passes as matched."""
    runs = make_runs(tmp_path, kinds=("epochs", "updates"))
    assert math.isnan(loss_ratio(runs, SHARPNESS))
    reason = sample_of(runs, SHARPNESS).not_comparable
    assert reason == "no pair of runs reached the snapshot in both arms"


def test_too_few_seeds_do_not_compare(tmp_path: Path) -> None:
    """Catches: ``rules.min_pairs`` of the recipe left unread."""
    runs = make_runs(tmp_path, recipe={"rules": {"min_pairs": 5}})
    reason = sample_of(runs, ERROR).not_comparable
    assert reason == "2 paired seeds, 5 are needed for a verdict"


def test_budgets_are_compared_both_ways(tmp_path: Path) -> None:
    """Catches: equal epochs alone, or equal updates alone, counted as both."""
    met = rule(make_runs(tmp_path / "both"), "Budget")
    assert met.met
    assert "batch 128: 9 epochs, 600 updates" in met.detail
    assert not rule(make_runs(tmp_path / "one", kinds=("epochs",)), "Budget").met
    assert not rule(make_runs(tmp_path / "two", kinds=("updates",)), "Budget").met


def test_one_rate_for_all_batch_sizes_breaks_a_rule(tmp_path: Path) -> None:
    """A grid of rates at each batch size, or a rate chosen for each, is fair.

    Catches: two rates in all taken for two at each batch size.
    """
    grid = {"small": (0.1, 0.2), "large": (0.1, 0.2)}
    met = rule(make_runs(tmp_path / "grid", rates=grid), "Learning rate")
    assert met.met
    assert met.detail.startswith("batch 16: rates 0.1, 0.2; batch 128: rates 0.1, 0.2")
    one_each = {"small": (0.1,), "large": (0.2,)}
    assert not rule(make_runs(tmp_path / "one", rates=one_each), "Learning rate").met
    chosen = make_runs(
        tmp_path / "tuned",
        rates=one_each,
        recipe={"rules": {"rate_selection": "lowest validation loss"}},
    )
    assert rule(chosen, "Learning rate").met
    assert "lowest validation loss" in rule(chosen, "Learning rate").detail
    same = rule(make_runs(tmp_path / "same"), "Learning rate")
    assert not same.met
    assert same.detail.startswith("One rate for all batch sizes")


def test_raw_sharpness_alone_breaks_a_rule(tmp_path: Path) -> None:
    """Catches: any second measure taken for an invariant one."""
    met = rule(make_runs(tmp_path / "both"), "A rescaling-invariant")
    assert met.met
    assert met.detail.startswith("Weighted Hessian trace")
    raw = make_runs(tmp_path / "raw", measured=("lambda_max", "hessian_trace"))
    assert not rule(raw, "A rescaling-invariant").met


def test_every_invariant_measure_counts_as_one(tmp_path: Path) -> None:
    """Catches: a second list of names kept by hand (6 of these 8 did not count)."""
    assert all(map(is_rescaling_invariant, INVARIANT_MEASURES))
    assert not any(map(is_rescaling_invariant, RAW_MEASURES))
    runs = make_runs(tmp_path, measured=("lambda_max", "relative_flatness"))
    assert rule(runs, "A rescaling-invariant").met


def test_ten_seeds_are_asked_for(tmp_path: Path) -> None:
    """Catches: runs counted in place of seeds."""
    every = {"small": range(10), "large": range(10)}
    assert rule(make_runs(tmp_path / "ten", seeds=every, kinds=()), "Ten").met
    fewer = {"small": range(9), "large": range(9)}
    broken = rule(make_runs(tmp_path / "nine", seeds=fewer, kinds=()), "Ten")
    assert not broken.met
    assert broken.detail.startswith("9 in all arms; 9 seeds run; ")


@pytest.mark.parametrize(
    ("model", "met"),
    [
        ({"name": "mlp", "norm": "none"}, True),
        ({"name": "mlp", "norm": "batch"}, False),
        ({"name": "f1"}, False),
    ],
)
def test_batch_norm_is_told(tmp_path: Path, model: dict[str, str], met: bool) -> None:
    """Catches: F1, whose layers normalise without being asked, taken for plain."""
    runs = make_runs(
        tmp_path, seeds={"small": [0], "large": [0]}, recipe={"model": model}
    )
    assert rule(runs, "BatchNorm").met is met


def test_a_snapshot_chosen_by_its_error_breaks_a_rule(tmp_path: Path) -> None:
    """Catches: a rule that no run can break."""
    blind = rule(make_runs(tmp_path / "blind"), "Snapshots are taken")
    assert blind.met
    assert blind.detail == "taken by: epochs, loss, updates"
    best = make_runs(tmp_path / "best", kinds=("epochs", "best_validation"))
    assert not rule(best, "Snapshots are taken").met


def test_a_diverged_run_is_told(tmp_path: Path) -> None:
    """Catches: diverged runs counted as complete."""
    assert rule(make_runs(tmp_path / "whole"), "Every run").met
    status = {"large-seed1": RunStatus.DIVERGED}
    broken = rule(make_runs(tmp_path / "torn", status=status), "Every run")
    assert not broken.met
    assert broken.detail == "3 done, 1 diverged"


def test_each_contrast_on_sharpness_has_its_rule(tmp_path: Path) -> None:
    """Catches: one rule for all contrasts, or one for test errors."""
    other = changed(SHARPNESS, name="trace", quantity="hessian_trace")
    names = [
        found.name
        for found in fair_test_rules(make_runs(tmp_path), (SHARPNESS, ERROR, other))
        if found.name.startswith("Training loss")
    ]
    assert names == [
        "Training loss matched for “Largest Hessian eigenvalue: same training loss”",
        "Training loss matched for “Hessian trace: same training loss”",
    ]


def test_contrasts_are_those_of_the_recipe(tmp_path: Path) -> None:
    """Catches: contrasts made up or changed after the runs; faults in one passed by."""
    stated = {
        "name": "test",
        "quantity": "lambda_max",
        "treatment": "large",
        "reference": "small",
        "snapshot": "final",
        "scale": "ratio",
        "margin": 1.5,
    }
    runs = make_runs(tmp_path / "a", recipe={"contrasts": [stated]})
    (claim,) = stated_claims(runs)
    assert (claim.name, claim.margin, claim.primary) == ("test", 1.5, False)
    assert stated_claims(make_runs(tmp_path / "b")) == ()
    damaged = make_runs(
        tmp_path / "c", recipe={"contrasts": [stated | {"margin": "x"}]}
    )
    with pytest.raises(UsageError, match="margin"):
        stated_claims(damaged)

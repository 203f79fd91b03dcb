"""What is measured at snapshots, against the plain definitions."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from noisekit.core.errors import RecipeError, UsageError
from noisekit.core.references import allow_code
from noisekit.records import Runs, open_runs
from noisekit.sharpness import SHARPNESS_MEASURES
from noisekit.train.data.datasets import load_data
from noisekit.train.data.section import TensorPair
from noisekit.train.measures import own_measure
from noisekit.train.models import build_model
from noisekit.train.runs.loop import train_run
from noisekit.train.runs.progress import ProgressEvent
from noisekit.train.runs.snapshots import load_weights
from tests.train.run_specs import new_run, run_spec

EVERYTHING = [
    "lambda_max",
    "lambda_min",
    "lambda_max_pyhessian",
    "hessian_trace",
    "weighted_hessian_trace",
    "edge_of_stability_ratio",
    "grad_norm",
    "epsilon_sharpness",
    "simple_noise_scale",
    "example_grad_sq_norm",
]
SPEC = run_spec(
    data={"train": 64, "validation": 32, "test": 48},
    model={"name": "mlp", "hidden": [4]},
    training={"stop": {"updates": 60}},
    schedule={"name": "cosine"},
    snapshots={"at": {"late": {"updates": 60}}},
    measure={
        "at": {"final": EVERYTHING, "late": ["grad_norm", "hessian_trace"]},
        "settings": {
            "epsilon_sharpness": [{"epsilon": 1e-3}, {"subspace_dim": 5}],
            "lambda_max": {"tol": 1e-6},
            "lambda_min": {"tol": 1e-6},
            "edge_of_stability_ratio": {"tol": 1e-6},
            "hessian_trace": {"num_matvecs": 200},
            "weighted_hessian_trace": {"num_matvecs": 200},
        },
        "examples": ["test"],
    },
    compute={"dtype": "float64"},
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    run = new_run(SPEC, tmp_path_factory.mktemp("measured"))
    train_run(SPEC, run)
    return open_runs(run.path)


@pytest.fixture(scope="module")
def final(runs: Runs) -> pd.DataFrame:
    rows = runs.measurements
    return rows[rows["snapshot"] == "final"].set_index(["quantity", "variant"])


def value(final: pd.DataFrame, quantity: str, variant: str = "") -> float:
    return float(final.loc[(quantity, variant), "value"])


def trained_model(runs: Runs) -> tuple[nn.Module, TensorPair]:
    model = build_model(SPEC.model, input_shape=(1, 8, 8), num_classes=10, seed=0)
    model = model.double().eval()
    model.load_state_dict(load_weights(runs.directories[0], "final"))
    data = load_data(SPEC.data).train
    return model, TensorPair(data.inputs.double(), data.targets)


def example_gradients(runs: Runs) -> torch.Tensor:
    """One backward pass per example, as rows."""
    model, data = trained_model(runs)
    rows = []
    for x, y in zip(data.inputs, data.targets, strict=True):
        loss = cross_entropy(model(x[None]), y[None])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def hessian(runs: Runs) -> torch.Tensor:
    """The dense Hessian, row by row."""
    model, data = trained_model(runs)
    parameters = list(model.parameters())
    loss = cross_entropy(model(data.inputs), data.targets)
    parts = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([part.reshape(-1) for part in parts])
    rows = []
    for entry in gradient:
        found = torch.autograd.grad(entry, parameters, retain_graph=True)
        rows.append(torch.cat([part.reshape(-1) for part in found]))
    return torch.stack(rows)


def test_eigenvalues_are_those_of_the_dense_hessian(
    final: pd.DataFrame, hessian: torch.Tensor
) -> None:
    """Catches: magnitude in place of algebraic order; a Hessian of the sum."""
    eigenvalues = torch.linalg.eigvalsh(hessian)
    for name, wanted in (
        ("lambda_max", eigenvalues[-1]),
        ("lambda_min", eigenvalues[0]),
    ):
        row = final.loc[(name, "")]
        assert row["status"] == "ok"
        assert abs(row["value"] - float(wanted)) <= 1e-5 * float(eigenvalues[-1])
        assert row["num_matvecs"] > 0
    pyhessian = value(final, "lambda_max_pyhessian")
    assert pyhessian == pytest.approx(float(eigenvalues[-1]), rel=0.02)


def test_the_edge_uses_the_rate_that_led_there(final: pd.DataFrame) -> None:
    """Under a cosine the rate of the last update is small and not yet zero.

    Catches: the rate of the next update, which is zero here.
    """
    row = final.loc[("edge_of_stability_ratio", "")]
    rate = json.loads(row["detail"])["learning_rate"]
    assert 0 < rate < 1e-3
    assert row["value"] == pytest.approx(rate * value(final, "lambda_max") / 2)


def test_traces_lie_within_their_errors(
    runs: Runs, final: pd.DataFrame, hessian: torch.Tensor
) -> None:
    """Catches: a weighted trace with weights to the first power."""
    model, _ = trained_model(runs)
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    diagonal = hessian.diagonal()
    for name, wanted in (
        ("hessian_trace", diagonal.sum()),
        ("weighted_hessian_trace", (weights**2 * diagonal).sum()),
    ):
        row = final.loc[(name, "")]
        assert abs(row["value"] - float(wanted)) < 4 * row["stderr"], name
        assert row["low"] < row["value"] < row["high"]
        assert row["error_source"] == "probes"


def test_gradient_and_noise_are_those_of_single_examples(
    runs: Runs, final: pd.DataFrame
) -> None:
    """Catches: the variance over n in place of n - 1; norms that are not squared."""
    gradients = example_gradients(runs)
    mean = gradients.mean(0)
    assert value(final, "grad_norm") == pytest.approx(float(mean.norm()), rel=1e-9)
    variance = float((gradients - mean).square().sum() / (len(gradients) - 1))
    assert value(final, "variance_trace") == pytest.approx(variance, rel=1e-9)
    debiased = float(mean.square().sum()) - variance / len(gradients)
    assert value(final, "debiased_grad_sq_norm") == pytest.approx(debiased, rel=1e-9)
    scale = value(final, "simple_noise_scale")
    if debiased > 0:
        assert scale == pytest.approx(variance / debiased, rel=1e-9)


def test_each_example_has_its_norm(runs: Runs, final: pd.DataFrame) -> None:
    """Catches: norms in another order than the examples."""
    wanted = example_gradients(runs).square().sum(1)
    rows = runs.examples
    rows = rows[(rows["split"] == "train") & (rows["snapshot"] == "final")]
    assert list(rows["example"]) == list(range(64))
    found = torch.tensor(rows["example_grad_sq_norm"].to_numpy())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    mean = value(final, "example_grad_sq_norm")
    assert mean == pytest.approx(float(wanted.mean()))


def test_epsilon_sharpness_is_taken_in_both_spaces(final: pd.DataFrame) -> None:
    """Catches: variants that overwrite each other; a share without its sharpness."""
    variants = {
        quantity: sorted(final.loc[quantity].index)
        for quantity in ("epsilon_sharpness", "first_order_share")
    }
    wanted = ["epsilon=0.001", "epsilon=0.001,subspace_dim=5"]
    assert variants == {"epsilon_sharpness": wanted, "first_order_share": wanted}
    row = final.loc[("epsilon_sharpness", wanted[0])]
    detail = json.loads(row["detail"])
    assert detail["epsilon"] == 1e-3
    assert detail["displacement_norm"] > 0
    assert row["value"] > 0
    assert row["high"] == float("inf")


def test_outcomes_add_up_to_the_error(runs: Runs) -> None:
    """Catches: outcomes of one snapshot filed under another."""
    counted = runs.examples[runs.examples["split"] == "test"]
    shares = 1 - counted.groupby("snapshot")["correct"].mean()
    wanted = runs.snapshots.set_index("snapshot")["test_error"]
    assert shares.to_dict() == pytest.approx(wanted.to_dict())
    rows = runs.measurements.set_index(["snapshot", "quantity"])
    row = rows.loc[("final", "test_error")]
    error = wanted["final"]
    assert row["value"] == pytest.approx(error)
    assert row["stderr"] == pytest.approx((error * (1 - error) / 48) ** 0.5)


def test_equal_weights_are_measured_once(runs: Runs) -> None:
    """``late`` is the last update: what both ask for is found once and said twice.

    Catches: two random estimates of one quantity of one network.
    """
    rows = runs.measurements[runs.measurements["quantity"] == "hessian_trace"]
    late, final = rows.iloc[0], rows.iloc[1]
    assert (late["snapshot"], final["snapshot"]) == ("late", "final")
    assert late["value"] == final["value"]
    assert (late["num_matvecs"], final["num_matvecs"]) == (200, 0)


def test_a_measure_does_not_depend_on_what_was_measured_before(
    runs: Runs, final: pd.DataFrame, tmp_path: Path
) -> None:
    """Catches: one random stream that all measures draw from."""
    alone = run_spec(
        **{
            name: SPEC.model_dump(mode="json")[name]
            for name in ("data", "model", "training", "schedule", "compute")
        },
        measure={
            "at": {"final": ["hessian_trace"]},
            "settings": {"hessian_trace": {"num_matvecs": 200}},
        },
    )
    run = new_run(alone, tmp_path)
    train_run(alone, run)
    found = open_runs(run.path).measurements
    found = found[found["quantity"] == "hessian_trace"]
    assert float(found["value"].iloc[0]) == value(final, "hessian_trace")


def test_a_refused_measure_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    """Catches: a run that fails after hours since one measure does not exist there."""
    spec = run_spec(
        measure={"at": {"final": ["gauge_fixed_lambda_max", "grad_norm"]}},
        training={"stop": {"updates": 8}},
    )
    run = new_run(spec, tmp_path)
    train_run(spec, run)
    rows = open_runs(run.path).measurements.set_index("quantity")
    refused = rows.loc["gauge_fixed_lambda_max"]
    assert refused["status"] == "unavailable"
    assert refused[["value"]].isna().all()
    assert "BatchNorm" in json.loads(refused["detail"])["error"]
    assert rows.loc["grad_norm", "status"] == "ok"


def test_every_measure_of_sharpness_can_stand_in_a_recipe(tmp_path: Path) -> None:
    """Each gives rows of its quantity, with settings from the recipe.

    Catches: a name that recipes accept and that fails when its turn comes; the rate of
    plain SGD where the recipe has momentum.
    """
    rule = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.5}
    spec = run_spec(
        data={"train": 40, "validation": 16, "test": 16},
        model={"name": "mlp", "hidden": [4], "norm": "batch"},
        optimizer=rule,
        training={"epoch_end": "ragged", "stop": {"updates": 20}},
        evaluation={"batch_size": 20},
        measure={
            "at": {"final": sorted(SHARPNESS_MEASURES)},
            "settings": {
                "worst_case_sharpness": [
                    {"rho": 0.03},
                    {"rho": 0.03, "steps": 2},
                    {"rho": 0.03, "steps": 2, "norm": "linf"},
                ],
                "m_sharpness": {"batch_size": 8},
                "batch_sharpness": {"batch_size": 5},
                "hessian_trace": {"num_matvecs": 8},
            },
        },
        compute={"dtype": "float64"},
    )
    run = new_run(spec, tmp_path)
    train_run(spec, run)
    rows = open_runs(run.path).measurements
    refused = rows[rows["status"] == "unavailable"]
    assert list(refused["quantity"]) == [], list(refused["detail"])
    assert set(SHARPNESS_MEASURES) <= set(rows["measure"])
    variants = set(rows.loc[rows["quantity"] == "worst_case_sharpness", "variant"])
    assert variants == {
        "rho=0.03,steps=1",
        "rho=0.03,steps=2",
        "rho=0.03,steps=2,norm=linf",
    }
    found = rows.set_index("quantity")
    assert found.loc["batch_sharpness", "variant"] == "batch_size=5"
    assert json.loads(found.loc["lambda_max", "detail"])["data_stderr"] > 0
    edge = json.loads(found.loc["edge_of_stability_ratio", "detail"])
    assert edge["threshold"] == pytest.approx(2 * 1.5 / edge["learning_rate"])


def test_a_subset_is_the_same_for_all_runs(tmp_path: Path) -> None:
    """Catches: a subset that depends on the seed, so that runs are not comparable."""
    chosen = []
    for seed in (0, 1):
        spec = run_spec(
            seed=seed,
            run_id=f"toy-seed{seed}",
            measure={
                "num_examples": 20,
                "at": {"final": ["example_grad_sq_norm"]},
            },
            training={"stop": {"updates": 8}},
        )
        run = new_run(spec, tmp_path)
        train_run(spec, run)
        chosen.append(list(open_runs(run.path).examples["example"]))
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 20
    assert chosen[0] != list(range(20))


def test_measuring_is_told(tmp_path: Path) -> None:
    """Catches: minutes of measuring without a sign of life."""
    spec = run_spec(measure={"everywhere": ["grad_norm"], "examples": ["test"]})
    events: list[ProgressEvent] = []
    train_run(spec, new_run(spec, tmp_path), progress=events.append)
    told = [event for event in events if event.detail.startswith(("grad", "test"))]
    assert [event.detail for event in told] == [
        "grad_norm at start",
        "test_outcomes at start",
        "grad_norm at final",
        "test_outcomes at final",
    ]
    assert [(event.done, event.total) for event in told] == [
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 4),
    ]


def test_own_measure_stands_in_a_recipe(tmp_path: Path) -> None:
    """``module:Class`` is taken like ours, with settings, once its code is allowed.

    Catches: a name that only noisekit's own table knows; code that runs unasked;
    settings that are found wrong when their turn comes.
    """
    name = "tests.sharpness.own_measure:LargestWeight"
    spec = run_spec(
        training={"stop": {"updates": 8}},
        measure={
            "at": {"final": [name, "grad_norm"]},
            "settings": {name: [{}, {"power": 2}]},
        },
    )
    with pytest.raises(UsageError, match="runs only with --allow-code"):
        spec.measure.measures(name)
    run = new_run(spec, tmp_path)
    with allow_code():
        train_run(spec, run)
    rows = open_runs(run.path).measurements
    own = rows[rows["measure"] == name].set_index("variant")
    assert list(own["quantity"]) == ["largest_weight", "largest_weight"]
    first, second = own.loc["power=1", "value"], own.loc["power=2", "value"]
    assert second == pytest.approx(first**2)
    assert "ok" in set(rows.loc[rows["quantity"] == "grad_norm", "status"])

    wrong = run_spec(measure={"settings": {name: {"power": 0, "pover": 1}}})
    with allow_code():
        with pytest.raises(RecipeError, match=rf"measure\.settings\.{name}\.pover"):
            wrong.measure.measures(name)
        with pytest.raises(UsageError, match=r"subclass of noisekit\.Measure, got 'te"):
            own_measure("tests.sharpness.own_measure:NOT_A_MEASURE")

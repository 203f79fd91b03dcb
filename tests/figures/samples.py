"""Plausible synthetic tables, shaped as the store gives them."""

import math

import numpy as np
import pandas as pd
from numpy.random import Generator
from pandas import DataFrame

from noisekit.core.results import Interval
from noisekit.stats import ClaimResult, SeedSample, Verdict, contrast, judge

ARMS = {
    "small_low": (16, 0.05),
    "small_high": (16, 0.4),
    "large_low": (128, 0.05),
    "large_high": (128, 0.4),
}
TWO_ARMS = {"small": (256, 0.001), "large": (6000, 0.001)}
NUM_EXAMPLES = 1024
LOSSES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)


def rng(seed: int = 0) -> Generator:
    return np.random.default_rng(seed)


def runs(arms: dict[str, tuple[int, float]] = ARMS, num_seeds: int = 10) -> DataFrame:
    return DataFrame(
        [
            {
                "run_id": f"{arm}-seed{seed}",
                "arm": arm,
                "seed": seed,
                "status": "done",
                "batch_size": size,
                "learning_rate": rate,
            }
            for arm, (size, rate) in arms.items()
            for seed in range(num_seeds)
        ]
    )


def evaluations(
    arms: dict[str, tuple[int, float]] = ARMS, num_seeds: int = 10
) -> DataFrame:
    random, rows = rng(1), []
    for run in runs(arms, num_seeds).to_dict("records"):
        speed = 0.004 * run["learning_rate"] / 0.05 * random.uniform(0.85, 1.15)
        floor = random.uniform(0.02, 0.03)
        for step in range(0, 3841, 96):
            loss = 2.3 / (1 + speed * step) ** 1.6 * math.exp(random.normal(0, 0.08))
            seen = step * run["batch_size"]
            error = floor + 0.87 / (1 + 3 * speed * step) ** 1.5
            rows.append(
                run
                | {
                    "step": step,
                    "examples_seen": seen,
                    "epoch": seen / NUM_EXAMPLES,
                    "train_loss": loss,
                    "validation_loss": loss + 0.1,
                    "test_loss": loss + 0.12,
                    "train_error": max(0.0, round((error - floor) * 1024) / 1024),
                    "validation_error": round(error * 233) / 233,
                    "test_error": round(error * 540) / 540,
                }
            )
    return DataFrame(rows)


def snapshots(
    arms: dict[str, tuple[int, float]] = ARMS, num_seeds: int = 10
) -> DataFrame:
    random, rows = rng(2), []
    for run in runs(arms, num_seeds).to_dict("records"):
        end = 0.004 if run["batch_size"] < 100 else 0.03
        places = [(f"loss_{loss:g}", "loss", loss) for loss in LOSSES]
        places += [("equal_epochs", "epochs", 4 * end), ("final", "final", end)]
        for step, (name, kind, loss) in enumerate(places):
            rows.append(
                run
                | {
                    "snapshot": name,
                    "kind": kind,
                    "step": 100 * (step + 1),
                    "train_loss": loss * random.uniform(0.9, 1.0),
                    "test_error": 0.03 + random.normal(0, 0.004),
                    "weight_norm": 18 + 0.3 * step + random.normal(0, 0.1),
                    "distance_from_start": 3 + step + random.normal(0, 0.1),
                }
            )
    return DataFrame(rows)


def measurements(
    arms: dict[str, tuple[int, float]] = ARMS, num_seeds: int = 10
) -> DataFrame:
    random, rows = rng(3), []
    for place in snapshots(arms, num_seeds).to_dict("records"):
        ids = {k: place[k] for k in ("run_id", "arm", "seed", "snapshot")}
        rate = place["learning_rate"]
        sharp = 30 * place["train_loss"] ** 0.35 * (0.05 / rate) ** 0.25
        sharp *= 1.3 if place["batch_size"] > 100 else 1.0
        level = {
            "lambda_max": sharp,
            "hessian_trace": 9 * sharp,
            "weighted_hessian_trace": 4 * sharp**0.5,
            "epsilon_sharpness": 0.4 * sharp,
            "edge_of_stability_ratio": rate * sharp / 2,
            "simple_noise_scale": 300.0 / place["train_loss"] ** 0.5,
        }
        for name, value in level.items():
            rows.append(
                ids
                | {
                    "quantity": name,
                    "value": value * math.exp(random.normal(0, 0.15)),
                    "status": "ok",
                    "num_matvecs": 40,
                }
            )
    return DataFrame(rows)


def steps(arms: dict[str, tuple[int, float]] = ARMS, num_seeds: int = 10) -> DataFrame:
    random, rows = rng(4), []
    for run in runs(arms, num_seeds).to_dict("records"):
        size = run["batch_size"]
        for step in range(0, 3840, 10):
            truth = 2.0 / (1 + step / 60) ** 1.7
            variance = 40.0 / (1 + step / 150) * math.exp(random.normal(0, 0.2))
            squared = truth + variance / size * random.chisquare(20) / 20
            rows.append(
                run
                | {
                    "step": step,
                    "examples_seen": step * size,
                    "grad_sq_norm": squared,
                    "variance_trace": variance,
                    "debiased_grad_sq_norm": squared - variance / size,
                    "simple_noise_scale": math.nan,
                }
            )
    return DataFrame(rows)


def examples(num_seeds: int = 3) -> DataFrame:
    random, tables = rng(5), []
    for run in runs(ARMS, num_seeds).to_dict("records"):
        for snapshot, centre in (("start", 1.0), ("loss_0.05", -5.0)):
            spread = 0.6 if snapshot == "start" else 2.5
            shift = 0.8 if run["batch_size"] > 100 else 0.0
            norms = np.exp(random.normal(centre + shift, spread, size=NUM_EXAMPLES))
            tables.append(
                DataFrame({"example_grad_sq_norm": norms}).assign(
                    arm=run["arm"], seed=run["seed"], snapshot=snapshot, split="train"
                )
            )
    return pd.concat(tables, ignore_index=True)


def paths(num_seeds: int = 5) -> DataFrame:
    random, rows = rng(6), []
    for seed in range(num_seeds):
        for alpha in np.linspace(-1, 2, 25):
            wide, narrow = (alpha / 1.1) ** 4, ((alpha - 1) / 0.45) ** 2
            loss = 0.01 + min(wide, narrow + 0.005) * random.uniform(0.9, 1.1)
            for split, extra in (("train", 0.0), ("test", 0.12)):
                error = 0.9 * (1 - math.exp(-loss / 1.5)) + 0.2 * extra
                rows.append(
                    {
                        "seed": seed,
                        "split": split,
                        "alpha": float(alpha),
                        "loss": loss + extra,
                        "error": min(error, 0.9),
                    }
                )
    return DataFrame(rows)


def loss_plane(num_points: int = 15) -> DataFrame:
    axis = np.linspace(-1, 1, num_points)
    first, second = (grid.ravel() for grid in np.meshgrid(axis, axis, indexing="ij"))
    loss = 0.02 + 3 * first**2 + 0.4 * (second - 0.3 * first) ** 2 + first**4
    return DataFrame({"first": first, "second": second, "loss": loss})


def loss_around(num_points: int = 21) -> DataFrame:
    axis = np.linspace(-1, 1, num_points)
    lines = {"small": 0.02 + 0.5 * axis**2, "large": 0.01 + 4 * axis**2}
    return pd.concat(
        [DataFrame({"label": k, "first": axis, "loss": v}) for k, v in lines.items()],
        ignore_index=True,
    )


def batch_draws(num_draws: int = 12) -> tuple[DataFrame, DataFrame]:
    random, rows = rng(7), []
    truth = {"start": (0.6, 9.0), "loss_0.05": (0.002, 1.1)}
    for arm, (squared, variance) in truth.items():
        for size in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            mean = squared + variance / size * (1 - size / NUM_EXAMPLES)
            for _ in range(num_draws):
                norm = mean * random.chisquare(24) / 24
                rows.append({"arm": arm, "batch_size": size, "grad_sq_norm": norm})
    moments = DataFrame(
        [
            {"arm": arm, "grad_sq_norm": g, "variance_trace": s}
            for arm, (g, s) in truth.items()
        ]
    )
    return DataFrame(rows), moments


def tuning_grid() -> DataFrame:
    random, rows = rng(8), []
    for size, best in ((16, 0.1), (128, 0.5)):
        for rate in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
            for seed in range(100, 103):
                error = 0.03 + 0.02 * math.log(rate / best) ** 2
                error = round(error * math.exp(random.normal(0, 0.08)) * 233) / 233
                diverged = size == 16 and rate == 1.0 and seed > 100
                rows.append(
                    {
                        "batch_size": size,
                        "learning_rate": rate,
                        "seed": seed,
                        "validation_error": math.nan if diverged else error,
                    }
                )
    return DataFrame(rows)


def contrasts(*, verdicts: bool = True) -> list[ClaimResult]:
    random, seeds = rng(9), tuple(range(10))
    sharp = {"quantity": "lambda_max", "scale": "ratio", "margin": 1.5}
    asked = [
        contrast(
            name="test_error_equal_epochs",
            quantity="test_error",
            treatment="large_low",
            reference="small_low",
            snapshot="equal_epochs",
            scale="difference",
            margin=0.005,
            primary=True,
            paper="0.2 to 5.3 points worse (table 2)",
            description="Test error at equal epochs, same rate",
        ),
        contrast(
            name="sharpness_equal_epochs",
            treatment="large_low",
            reference="small_low",
            snapshot="equal_epochs",
            description="Largest eigenvalue at equal epochs",
            **sharp,  # type: ignore[arg-type]
        ),
        contrast(
            name="sharpness_matched_loss",
            treatment="large_low",
            reference="small_low",
            snapshot="loss_0.05",
            primary=True,
            paper="9 to 220 times (epsilon-sharpness, table 3)",
            description="Largest eigenvalue at equal training loss, same rate",
            **sharp,  # type: ignore[arg-type]
        ),
        contrast(
            name="sharpness_matched_rate_per_example",
            treatment="large_high",
            reference="small_low",
            snapshot="loss_0.05",
            primary=True,
            description="Largest eigenvalue at equal training loss, "
            "equal rate per example",
            **sharp,  # type: ignore[arg-type]
        ),
        contrast(
            name="sharpness_at_the_end",
            treatment="large_high",
            reference="small_high",
            snapshot="final",
            description="Largest eigenvalue at the end",
            **sharp,  # type: ignore[arg-type]
        ),
    ]
    centre = {
        "test_error_equal_epochs": 0.0124,
        "sharpness_equal_epochs": math.log(2.6),
        "sharpness_matched_loss": math.log(1.04),
        "sharpness_matched_rate_per_example": math.log(0.62),
        "sharpness_at_the_end": math.log(1.4),
    }
    data = {}
    for claim in asked:
        if claim.scale == "difference":
            reference = 0.03 + random.normal(0, 0.004, size=10)
            treatment = reference + random.normal(centre[claim.name], 0.004, size=10)
        else:
            reference = 12 * np.exp(random.normal(0, 0.2, size=10))
            effect = random.normal(centre[claim.name], 0.2, size=10)
            treatment = reference * np.exp(effect)
        data[claim.name] = SeedSample(
            seeds, tuple(map(float, treatment)), tuple(map(float, reference))
        )
    end = data["sharpness_at_the_end"]
    data["sharpness_at_the_end"] = SeedSample(
        end.seeds, end.treatment, end.reference, "training losses differ by 7 times"
    )
    return judge(asked, data, verdicts=verdicts)


def unmeasured() -> ClaimResult:
    """A contrast of which no pair was complete."""
    nothing = Interval(0.0, math.inf, 0.95)
    [*_, last] = contrasts()
    return ClaimResult(
        claim=last.claim,
        verdict=Verdict.NOT_COMPARABLE,
        reason="10 of 10 pairs are missing",
        effect=math.nan,
        interval=nothing,
        p_value=math.nan,
        num_pairs=0,
        num_missing=10,
        num_tests=1,
    )


def spectrum(*, atoms: tuple[float, ...] = (15.0, 20.0)) -> DataFrame:
    """A bulk on both sides of zero, on both axes, and outliers."""
    grid = np.linspace(-1.0, 2.0, 50)
    bulk = np.exp(-(grid**2) * 4)
    logs = np.concatenate([-np.logspace(1, -5, 40), np.logspace(-5, 1, 40)])
    share = np.exp(-((np.log10(np.abs(logs)) + 2) ** 2)) * np.where(logs < 0, 0.1, 0.4)
    tables = [
        DataFrame(
            {"axis": "linear", "kind": "density", "eigenvalue": grid, "value": bulk}
        ),
        DataFrame(
            {"axis": "log", "kind": "density", "eigenvalue": logs, "value": share}
        ),
        DataFrame(
            {
                "axis": "linear",
                "kind": "atom",
                "eigenvalue": list(atoms),
                "value": [1e-3] * len(atoms),
            }
        ),
        DataFrame({"axis": "log", "kind": "zero", "eigenvalue": 0.0, "value": [0.6]}),
    ]
    table = pd.concat(tables, ignore_index=True)
    return table.assign(low=0.8 * table["value"], high=1.2 * table["value"])


def planned_settings() -> DataFrame:
    """Arms of 1,024 examples: batch 32, doubled at epochs 2 and 4, and 128."""
    stretches = {
        "small": [(0, 6, 32, 0.1)],
        "growing": [(0, 2, 32, 0.1), (2, 4, 64, 0.05), (4, 6, 128, 0.025)],
        "large": [(0, 6, 128, 0.1)],
    }
    rows = []
    for arm, parts in stretches.items():
        step = 0
        for begin, end, size, rate in parts:
            for epoch in (begin, end):
                step += (epoch - begin) * 1024 // size
                rows.append(
                    {
                        "arm": arm,
                        "epoch": float(epoch),
                        "step": step,
                        "batch_size": size,
                        "learning_rate": rate,
                        "momentum": 0.9,
                        "microbatch": size,
                    }
                )
    return DataFrame(rows)


def tradeoff(noise_scale: float = 100.0, low: float = 60.0, high: float = 200.0):
    """Steps and examples over batch sizes, as advice has them."""
    sizes = 2.0 ** np.arange(2, 12)
    return pd.DataFrame(
        {
            "batch_size": sizes,
            "present": sizes == 32,
            "steps": 1 + noise_scale / sizes,
            "steps_low": 1 + low / sizes,
            "steps_high": 1 + high / sizes,
            "examples": 1 + sizes / noise_scale,
            "examples_low": 1 + sizes / high,
            "examples_high": 1 + sizes / low,
        }
    )

"""Runs, results and a reader of pages for the tests of the report."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pandas import DataFrame

from noisekit.figures import ONE_COLUMN, Plot
from noisekit.figures.canvas import canvas
from noisekit.figures.theme import themed
from noisekit.records import (
    Manifest,
    RunDirectory,
    Runs,
    RunStatus,
    open_runs,
    write_set,
)
from noisekit.report import AnalysisResult, Provenance, Rule, Table
from noisekit.stats import Claim, ClaimResult, SeedSample, contrast, judge

HOSTILE = "<script>alert(1)</script><img src=x onerror='a()'>\"'&"
ARMS = {"small": 16, "large": 128}

SHARPNESS = contrast(
    name="lambda_max_at_loss",
    quantity="lambda_max",
    treatment="large",
    reference="small",
    snapshot="loss_0.05",
    scale="ratio",
    margin=1.5,
    primary=True,
    paper="9 times larger",
    description="same training loss",
)
ERROR = contrast(
    name="error_at_epochs",
    quantity="test_error",
    treatment="large",
    reference="small",
    snapshot="equal_epochs",
    scale="difference",
    margin=0.005,
    description="same number of epochs",
)


def changed(claim: Claim, **parts: Any) -> Claim:
    """Return a claim with other fields, or other settings of its statistic."""
    settings = {"snapshot": "at", "quantity": "quantity", "treatment": "treatment"}
    own = {settings[key]: parts.pop(key) for key in set(parts) & set(settings)}
    return replace(claim, statistic=replace(claim.statistic, **own), **parts)


class PageReader(HTMLParser):
    """Collects what the tests ask of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(
        self, tag: str, attrs: Sequence[tuple[str, str | None]]
    ) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def read(path: Path) -> PageReader:
    return PageReader(path.read_text(encoding="utf-8"))


def places(text: str, *needles: str) -> list[int]:
    """Return where each needle first stands; all must be there."""
    found = [text.find(needle) for needle in needles]
    assert -1 not in found, dict(zip(needles, found, strict=True))
    return found


def ids_in(svg: str) -> tuple[set[str], set[str]]:
    """Return the ids of an SVG and those that it refers to."""
    return set(re.findall(r' id="([^"]*)"', svg)), set(
        re.findall(r'(?:url\(#|href="#)([^)"]*)', svg)
    )


@cache
def plot(name: str = "curve", caption: str = "A line.", title: str = "") -> Plot:
    """Draw a clipped line with markers, so that the SVG refers to ids of its own."""
    frame = DataFrame({"step": [0, 1, 2], "train_loss": [2.0, 1.0, 0.5]})
    with themed():
        drawn_on = canvas(size=(ONE_COLUMN, 2.0))
        [ax] = drawn_on.axes
        ax.plot(frame["step"], frame["train_loss"], marker="o")
        ax.set_title(title)
    return Plot(drawn_on.figure, frame, name, caption)


def judged(
    *chosen: Claim, verdicts: bool = True, not_comparable: str | None = None
) -> tuple[ClaimResult, ...]:
    """Judge claims on six pairs: ratios near 2.4, differences near -0.4 points."""
    values = {
        "ratio": [(2.3, 1.0), (2.4, 1.0), (2.5, 1.0), (2.2, 1.0), (2.6, 1.0), (2.4, 1)],
        "difference": [
            (0.020, 0.024),
            (0.021, 0.025),
            (0.022, 0.026),
            (0.020, 0.025),
            (0.021, 0.024),
            (0.020, 0.024),
        ],
    }
    data = {
        claim.name: SeedSample(
            tuple(range(6)),
            *(
                tuple(map(float, side))
                for side in zip(*values[claim.scale], strict=True)
            ),
            not_comparable=not_comparable,
        )
        for claim in chosen
    }
    return tuple(judge(chosen, data, verdicts=verdicts))


def result(name: str = "toy", **parts: object) -> AnalysisResult:
    """Return a result with one of everything, or what is given."""
    whole: dict[str, object] = {
        "question": "Is it sharper?",
        "answer": "It was 2.4 times sharper.",
        "rules": (
            Rule("Every run is complete", True, "6 done"),
            Rule("Ten or more paired seeds", False, "6 seeds"),
        ),
        "claims": judged(ERROR, SHARPNESS),
        "plots": (plot(),),
        "tables": (
            Table(
                "noise",
                DataFrame({"arm": ["small"], "variance_trace": [-0.25]}),
                "Noise by arm.",
            ),
        ),
        "warnings": ("The twin is sharper.",),
    }
    return AnalysisResult(name=name, **(whole | parts))  # type: ignore[arg-type]


def provenance(**parts: object) -> Provenance:
    whole: dict[str, object] = {
        "title": "toy · demo",
        "arms": {"small": "batch 16", "large": "batch 128"},
        "recipe": 'name = "toy"',
        "data": {"name": "digits"},
        "versions": {"noisekit": "0.1.0"},
        "host": {"cpus": "2"},
        "costs": {"runs": "12"},
        "commands": ("noisekit run toy --profile demo --out DIR",),
    }
    return Provenance(**(whole | parts))  # type: ignore[arg-type]


def make_runs(
    folder: Path,
    *,
    seeds: Mapping[str, Sequence[int]] | None = None,
    recipe: Mapping[str, object] | None = None,
    rates: Mapping[str, Sequence[float]] | None = None,
    loss: Mapping[str, float] | None = None,
    kinds: Sequence[str] = ("epochs", "updates", "loss"),
    measured: Sequence[str] = ("lambda_max", "weighted_hessian_trace"),
    status: Mapping[str, RunStatus] | None = None,
) -> Runs:
    """Write runs of two arms to disk, as a sweep does, and open them.

    The sharpness of a run is ``batch_size + seed``, its test error a thousandth.
    """
    write_set(folder, {"recipe": dict(recipe or {})})
    for arm, size in ARMS.items():
        for seed in (seeds or {}).get(arm, range(2)):
            run_id = f"{arm}-seed{seed}"
            factors: dict[str, object] = {"batch_size": size}
            if rates is not None:
                factors["learning_rate"] = rates[arm][seed % len(rates[arm])]
            manifest = Manifest(
                run_id=run_id,
                arm=arm,
                seed=seed,
                factors=factors,
                status=(status or {}).get(run_id, RunStatus.DONE),
                data={"name": "toy data"},
                costs={"train_seconds": 1.5, "updates": 600.0, "num_matvecs": 25.0},
            )
            run = RunDirectory.create(folder / "runs" / run_id, manifest)
            _fill(run, float(size + seed), (loss or {}).get(arm, 0.05), kinds, measured)
    return open_runs(folder)


def _fill(
    run: RunDirectory,
    value: float,
    loss: float,
    kinds: Sequence[str],
    measured: Sequence[str],
) -> None:
    names = {"epochs": "equal_epochs", "updates": "equal_updates", "loss": "loss_0.05"}
    with run.lock():
        with run.writer("evaluations") as writer:
            writer.append({"step": 600, "epoch": 9.0, "train_loss": loss})
        with run.writer("snapshots") as writer:
            for kind in kinds:
                writer.append(
                    {
                        "snapshot": names.get(kind, kind),
                        "kind": kind,
                        "step": 600,
                        "train_loss": loss,
                        "test_error": value / 1000,
                    }
                )
        with run.writer("measurements") as writer:
            for kind in kinds:
                for quantity in measured:
                    for variant, factor in (("", 1.0), ("other", 10.0)):
                        writer.append(
                            {
                                "snapshot": names.get(kind, kind),
                                "quantity": quantity,
                                "variant": variant,
                                "value": factor * value,
                            }
                        )

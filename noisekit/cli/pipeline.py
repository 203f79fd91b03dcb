"""From a folder of runs to analyses and a report."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from noisekit.core.errors import NoisekitError, NoVerdictError, UsageError
from noisekit.core.references import is_reference, resolve
from noisekit.records import Runs, open_runs
from noisekit.records.files import make_directory
from noisekit.report import (
    AnalysisResult,
    build_report,
    build_trial,
    provenance_of,
)
from noisekit.train.recipes.catalogue import find_analysis

Analyse = Callable[[Runs], AnalysisResult]
_OF_OWN_LOOPS = ("gradient_noise",)
"""Analyses of runs that ``nk.attach`` recorded, which belong to no recipe."""


def run_analysis(
    name: str, directory: Path, out: Path | None = None
) -> tuple[AnalysisResult, Path, list[str]]:
    """Run one analysis.

    Returns:
        Its result, where its figures and tables are, and the faults of the runs.
    """
    analyse = load_analysis(name)
    folder = out or directory / "analyses" / name
    make_directory(folder)
    runs = open_runs(directory)
    result = _result_of(analyse, runs)
    save(result, folder)
    return result, folder, runs.faults


def write_report(directory: Path, out: Path | None) -> tuple[str, Path, list[str]]:
    """Run the recipe's analyses and write the report.

    An analysis that cannot be made has its reason in the report, and the others are
    complete.

    Returns:
        The answer of the first analysis, empty if there is none, the report's path,
        and the faults of the runs.
    """
    path = out or directory / "report.html"
    make_directory(path.parent)
    runs = open_runs(directory)
    names = cast("Sequence[str]", runs.recipe.get("analyses", _OF_OWN_LOOPS))
    started = time.monotonic()
    folders = [directory / "analyses" / name.replace(":", ".") for name in names]
    results = [
        _made(name, runs, folder) for name, folder in zip(names, folders, strict=True)
    ]
    build_report(
        results,
        provenance_of(runs, analysis_seconds=time.monotonic() - started),
        path,
    )
    return (results[0].answer if results else ""), path, runs.faults


def write_trial(directories: Sequence[Path], out: Path) -> Path:
    """Write the claims of several sets of runs on one page, and return its path."""
    make_directory(out.parent)
    return build_trial([open_runs(path) for path in directories], out)


def _made(name: str, runs: Runs, folder: Path) -> AnalysisResult:
    """Return what an analysis found, or why it could not be made."""
    try:
        result = _result_of(load_analysis(name), runs)
    except NoisekitError as error:
        return AnalysisResult(
            name=name,
            question=name.replace("_", " ").capitalize(),
            answer=f"This analysis could not be made: {error}",
        )
    save(result, folder)
    return result


def _result_of(analyse: Analyse, runs: Runs) -> AnalysisResult:
    """Return what an analysis finds.

    Raises:
        NoVerdictError: If it fails on runs of which files are lost.
    """
    try:
        return analyse(runs)
    except NoisekitError:
        raise
    except Exception as error:
        if not runs.faults:
            raise
        raise NoVerdictError(
            f"the analysis needs whole runs, got {type(error).__name__} ({error}) from "
            f"runs with faults: {'; '.join(runs.faults)}."
        ) from error


def load_analysis(name: str) -> Analyse:
    """Return the ``analyse`` function of a bundled analysis, or the user's own.

    Raises:
        UsageError: If there is no such analysis, or it has no such function, or it is
            the user's own and may not be imported here.
    """
    if is_reference(name):
        return cast("Analyse", resolve(name))
    path = find_analysis(name)
    spec = importlib.util.spec_from_file_location(f"noisekit_analysis_{name}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"analysis {name!r} needs to be a Python file, got {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "analyse"):
        raise UsageError(f"analysis {path} needs a function analyse(runs).")
    return cast("Analyse", module.analyse)


def save(result: AnalysisResult, folder: Path) -> None:
    """Write the figures and tables of an analysis into a folder."""
    for plot in result.plots:
        plot.save(folder)
    for table in result.tables:
        table.save(folder)

"""Every example in a docstring runs and prints what it shows."""

import doctest
import importlib
import inspect
import io
from pathlib import Path

import numpy as np
import pytest
import torch

import noisekit as nk

ROOT = Path(__file__).resolve().parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "noisekit").rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(name: str) -> None:
    """Examples know ``torch``, ``np``, ``nk`` and the names of their own module.

    Catches: an example of a keyword, a unit or a number that has changed.
    """
    module = importlib.import_module(name)
    names = {"torch": torch, "np": np, "nk": nk, **vars(module)}
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names):
        torch.manual_seed(0)
        runner.run(test, out=report.write)
    assert runner.summarize(verbose=False).attempted
    assert not runner.failures, report.getvalue()


COMMON = """
    EmpiricalRisk FisherOperator GGNOperator GradientCovarianceOperator HessianOperator
    attach average_sharpness batch_sharpness check_invariance diagonal
    edge_of_stability_ratio effective_dimension epsilon_sharpness example_sq_norms
    fisher_rao_norm freeze frobenius_norm gradient_noise hessian_frobenius_norm
    hessian_trace hessian_weighted_noise interpolate lambda_max lambda_min load_recipe
    loss_slice measure pac_bayes_flatness quantity relative_flatness rescaled_twin
    self_check spectral_density stability_threshold top_eigenpairs trace
    track_sharpness weight_scaled weighted_hessian_trace worst_case_sharpness
"""


@pytest.mark.parametrize("name", COMMON.split())
def test_common_functions_have_an_example(name: str) -> None:
    """The examples of the names that users call most stay there.

    Catches: a docstring that is rewritten without its example.
    """
    assert ">>> " in (inspect.getdoc(getattr(nk, name)) or "")

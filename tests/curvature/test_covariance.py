"""Gradient covariances against gradients written out, example by example."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from noisekit.core.errors import BatchSizeError, CoupledExamplesError, UsageError
from noisekit.curvature import FisherOperator, GradientCovarianceOperator
from tests.cases import (
    CASES,
    RAGGED,
    Case,
    batch_norm_network,
    classes,
    mlp,
    seeded,
)
from tests.reference import curvature as reference

LOSS = nn.CrossEntropyLoss()


def single(batch: tuple[Any, Any], i: int) -> tuple[Any, Any]:
    """One example, still as a batch."""
    inputs, targets = batch
    if isinstance(inputs, dict):
        return {name: x[i : i + 1] for name, x in inputs.items()}, targets[i : i + 1]
    if isinstance(inputs, tuple):
        return tuple(x[i : i + 1] for x in inputs), targets[i : i + 1]
    return inputs[i : i + 1], targets[i : i + 1]


def example_gradients(case: Case) -> np.ndarray:
    """``g_i``: ``n`` times what example ``i`` adds to the gradient of the risk."""
    singles = [single(b, i) for b in case.batches for i in range(len(b[1]))]
    rows = reference.batch_gradients(case.build(), case.loss_fn, singles)
    if case.reduction == "sum":
        weights = np.ones(len(singles))
    elif case.name == "ignored_tokens":
        weights = np.array([float((t != -100).sum()) for _, t in singles])
    elif "class_weights" in case.name:
        table = np.array([0.2, 1.0, 3.0])
        weights = np.array([table[int(t)] for _, t in singles])
    elif case.name == "regression":
        weights = np.full(len(singles), 3.0)
    else:
        weights = np.ones(len(singles))
    return rows * (len(singles) * weights / sum(case.counts))[:, None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_per_example_covariance_of_every_case(case: Case) -> None:
    """Any loss: only its gradient in the outputs is needed.

    Catches: a divisor of the batch in place of that of all data, the mean of each
    batch subtracted, ``n`` for ``n - 1``, a time axis taken for examples.
    """
    S = GradientCovarianceOperator(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    want = np.cov(example_gradients(case), rowvar=False)
    assert_close(S.to_dense(), torch.from_numpy(want), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_per_batch_covariance_of_every_case(case: Case) -> None:
    """Weighted by what the losses divide by.

    Catches: batches counted alike; sums compared with means.
    """
    S = GradientCovarianceOperator(
        case.build(),
        case.loss_fn,
        case.batches,
        normaliser=case.normaliser,
        per="batch",
    )
    rows = reference.batch_gradients(case.build(), case.loss_fn, case.batches)
    counts = np.array(case.counts)
    if case.reduction == "sum":
        rows = rows / counts[:, None]
    weights = counts / counts.sum()
    off = rows - weights @ rows
    count = len(rows)
    want = count / (count - 1) * (off.T * weights) @ off
    assert_close(S.to_dense(), torch.from_numpy(want), rtol=1e-8, atol=1e-12)


def test_ragged_batches_give_the_per_example_covariance_without_bias() -> None:
    """The mean over all ways to cut 5 examples into 3 and 2, times the mean size.

    Catches: weights that make small batches' larger spread a bias.
    """
    ((inputs, targets),) = classes((5,), 4)
    model = seeded(mlp)()
    options: dict[str, Any] = {"params": "3.*"}
    want = GradientCovarianceOperator(model, LOSS, [(inputs, targets)], **options)
    ways = list(itertools.combinations(range(5), 3))
    total = torch.zeros(want.shape, dtype=torch.float64)
    for chosen in ways:
        rest = [i for i in range(5) if i not in chosen]
        cut = [(inputs[list(p)], targets[list(p)]) for p in (chosen, rest)]
        S = GradientCovarianceOperator(model, LOSS, cut, per="batch", **options)
        total += S.to_dense() * 2.5 / len(ways)
    assert_close(total, want.to_dense(), rtol=1e-9, atol=1e-13)


def test_without_centre_is_the_empirical_fisher_matrix() -> None:
    uncentred = GradientCovarianceOperator(
        seeded(mlp)(), LOSS, RAGGED, centred=False
    ).to_dense()
    fisher = FisherOperator(seeded(mlp)(), LOSS, RAGGED, kind="empirical")
    assert_close(uncentred, fisher.to_dense(), rtol=1e-9, atol=1e-13)


def test_operator_follows_the_mean_gradient() -> None:
    """Catches: the mean of old weights subtracted at new ones."""
    model = seeded(mlp)()
    S = GradientCovarianceOperator(model, LOSS, RAGGED)
    S.to_dense()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    fresh = GradientCovarianceOperator(model, LOSS, RAGGED).to_dense()
    assert torch.equal(S.to_dense(), fresh)


def test_time_first_and_flattened_tokens_are_examples() -> None:
    """Outputs ``(time, n, classes)`` and ``(n * time, classes)``.

    Catches: rows of other examples added up.
    """

    class TimeFirst(nn.Module):
        def __init__(self, flat: bool) -> None:
            super().__init__()
            self.flat = flat
            self.head = seeded(lambda: nn.Linear(4, 2))()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs = self.head(inputs)
            return outputs.flatten(0, 1) if self.flat else outputs.movedim(1, 0)

    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    goals = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)

    def time_first_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.movedim(0, 1) - targets).square().mean()

    first = GradientCovarianceOperator(
        TimeFirst(False), time_first_loss, [(inputs, goals)]
    )
    flat = GradientCovarianceOperator(
        TimeFirst(True), nn.MSELoss(), [(inputs, goals.flatten(0, 1))]
    )
    assert_close(first.to_dense(), flat.to_dense(), rtol=1e-10, atol=1e-13)


def test_coupled_examples_are_refused() -> None:
    model = seeded(batch_norm_network)()
    with pytest.raises(CoupledExamplesError, match="do not act on each other, got bn="):
        GradientCovarianceOperator(model, LOSS, RAGGED, bn="batch")
    per_batch = GradientCovarianceOperator(model, LOSS, RAGGED, bn="batch", per="batch")
    assert float(per_batch.to_dense().trace()) > 0


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match="per needs to be 'example' or 'batch', got"):
        GradientCovarianceOperator(seeded(mlp)(), LOSS, RAGGED, per="token")  # type: ignore[arg-type]
    S = GradientCovarianceOperator(seeded(mlp)(), LOSS, RAGGED[:1], per="batch")
    with pytest.raises(BatchSizeError, match="at least 2 gradients, got 1 batch; give"):
        S @ torch.ones(43)


def test_outputs_without_examples_are_refused() -> None:
    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3).double()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.inner(inputs).mean().expand(7)

    S = GradientCovarianceOperator(Reduced(), lambda o, t: o.mean(), RAGGED[:1])
    with pytest.raises(UsageError, match=r"an axis of 4 examples, got shape \(7,\)"):
        S @ torch.ones(15)

"""What the empirical risk refuses, and that the message says the way out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import (
    BatchSizeError,
    DeviceMismatchError,
    EmptyDataError,
    LossShapeError,
    NoParametersError,
    NormaliserError,
    UsageError,
)
from noisekit.core.risk import EmpiricalRisk
from tests.cases import CLASS_WEIGHTS, RAGGED, classes, mlp, seeded

LOSS = nn.CrossEntropyLoss()


def refused(
    error: type[Exception],
    match: str,
    *,
    model: nn.Module | None = None,
    loss_fn: Callable[..., Tensor] = LOSS,
    batches: Any = RAGGED,
    **options: Any,
) -> None:
    with pytest.raises(error, match=match):
        EmpiricalRisk(model or seeded(mlp)(), loss_fn, batches, **options)


@pytest.mark.parametrize(
    "batches", [[], iter(()), [(torch.zeros(0, 4), torch.zeros(0))]]
)
def test_no_data(batches: Any) -> None:
    refused(EmptyDataError, "at least one batch.*pass a list or", batches=batches)


def test_batch_instead_of_batches() -> None:
    """Catches: taking the rows of a tensor for batches."""
    refused(UsageError, r"got Tensor; a single batch is written", batches=RAGGED[0])


def test_batch_of_three() -> None:
    refused(UsageError, "got tuple of length 3", batches=[(1, 2, 3)])


def test_nothing_trainable() -> None:
    model = seeded(mlp)().requires_grad_(False)
    refused(NoParametersError, "set requires_grad_", model=model)


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"a tensor of shape \(4,\)"),
        (lambda o, t: 1.0, "a float"),
        (lambda o, t: t.sum(), r"a tensor of shape \(\) and type torch.int64"),
    ],
)
def test_loss_that_is_not_a_number(loss_fn: Callable[..., Tensor], got: str) -> None:
    refused(LossShapeError, f"got {got}.*reduce it with", loss_fn=loss_fn)


def test_data_on_another_device() -> None:
    """Catches: PyTorch's own message from deep inside the first layer."""
    batches = [(x.to("meta"), y.to("meta")) for x, y in RAGGED]
    refused(
        DeviceMismatchError, "parameters on cpu and a batch on meta", batches=batches
    )


def test_unknown_batch_norm_policy() -> None:
    refused(UsageError, "'running', 'recalibrated', 'batch', got 'eval'", bn="eval")


def test_batch_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    refused(UsageError, "use bn='batch'", model=model.double())


@pytest.mark.parametrize("bn", ["recalibrated", "batch"])
def test_batch_of_one_has_no_statistics(bn: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    refused(
        BatchSizeError,
        "needs at least 2 examples.*drop_last=True",
        model=model,
        batches=classes((4, 1), 4),
        bn=bn,
    )


def test_own_class_weights_need_a_normaliser() -> None:
    """Catches: weighting batches by examples where the loss divides by weights."""
    refused(
        NormaliserError,
        "divided by its number of examples.*needs normaliser=lambda",
        loss_fn=lambda o, t: functional.cross_entropy(o, t, weight=CLASS_WEIGHTS),
    )


def test_own_loss_that_ignores_targets_needs_a_normaliser() -> None:
    """The ignored target is in a middle batch, in the middle of the batch.

    Catches: a check that looks only at the first batch, or splits it blindly.
    """
    batches = [(x, y.clone()) for x, y in classes((6, 6, 6, 2), 4)]
    batches[2][1][3] = -100
    refused(
        NormaliserError,
        "needs normaliser=lambda",
        loss_fn=lambda o, t: functional.cross_entropy(o, t),
        batches=batches,
    )


def test_one_ignored_target_in_a_large_batch_is_found() -> None:
    """The check takes a few examples of a batch: they must show the fault.

    Catches: the first 64 examples, or every third.
    """
    ((inputs, targets),) = classes((200,), 4)
    for index in (70, 101, 150):
        marked = targets.clone()
        marked[index] = -100
        refused(
            NormaliserError,
            "needs normaliser=lambda",
            loss_fn=lambda o, t: functional.cross_entropy(o, t),
            batches=[(inputs, marked)],
        )


def test_wrong_normaliser() -> None:
    refused(
        NormaliserError,
        "divided by the normaliser",
        loss_fn=lambda o, t: functional.cross_entropy(o, t, weight=CLASS_WEIGHTS),
        normaliser=len,
    )


def test_normaliser_that_is_negative() -> None:
    refused(NormaliserError, "at least 0, got -1.0", normaliser=lambda targets: -1.0)


def test_all_targets_ignored() -> None:
    refused(
        NormaliserError,
        "are all targets ignored",
        batches=[(x, torch.full_like(y, -100)) for x, y in RAGGED],
    )


def test_loss_that_is_neither_mean_nor_sum() -> None:
    """Catches: guessing from ``reduction``, or from nothing."""
    refused(
        NormaliserError,
        "got 1.41421 times",
        loss_fn=lambda o, t: functional.cross_entropy(o, t, reduction="none").norm(),
    )


def test_loss_that_couples_examples() -> None:
    """A contrastive loss is not a mean over examples."""
    refused(
        NormaliserError,
        "examples act on each other.*normaliser=..., check=False\\) and pass it in",
        loss_fn=lambda o, t: (o - o.mean(0)).pow(2).mean(),
    )


def test_varying_target_lengths_need_a_normaliser() -> None:
    """Catches: taking examples for the divisor where batches differ in tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(6, (2, length), generator=generator),
            torch.randint(6, (2, length), generator=generator),
        )
        for length in (3, 5)
    ]
    model = nn.Embedding(6, 6).double()
    refused(
        NormaliserError,
        "differ in targets per example, got 3 to 5",
        model=model,
        loss_fn=lambda o, t: functional.cross_entropy(o.flatten(0, 1), t.flatten()),
        batches=batches,
    )


def test_batches_that_cannot_be_taken_apart() -> None:
    """Catches: an index error from inside the check."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(inputs.reshape(4, 4))

    refused(
        NormaliserError,
        "needs normaliser= where a batch cannot be taken apart, got RuntimeError",
        model=Fixed(),
        loss_fn=lambda outputs, targets: LOSS(outputs, targets),
        batches=RAGGED[:2],
    )
    stated = EmpiricalRisk(
        Fixed(),
        lambda outputs, targets: LOSS(outputs, targets),
        RAGGED[:2],
        normaliser=len,
    )
    known = EmpiricalRisk(Fixed(), LOSS, RAGGED[:2])
    for risk in (stated, known):
        assert not risk.checked
        assert risk.normalisers == [4.0, 4.0]
        assert risk.value() > 0.0


def test_model_that_draws_random_numbers_in_evaluation_mode() -> None:
    """Catches: functional dropout that ignores the mode, which makes noise of all."""

    class Noisy(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return functional.dropout(super().forward(inputs), 0.5)

    refused(UsageError, "same loss for the same data", model=Noisy(4, 3).double())


def test_wrong_vector_length() -> None:
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    with pytest.raises(UsageError, match=r"needs shape \(43,\), got \(3,\)"):
        risk.value(torch.zeros(3))

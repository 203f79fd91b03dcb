"""Sharpness along a training: right at every visit, and the training untouched."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.results import Status
from noisekit.curvature import HessianOperator
from noisekit.sharpness import SharpnessTracker, TrackedEigenvalues, track_sharpness

LOSS = nn.CrossEntropyLoss()
Batches = list[tuple[Tensor, Tensor]]


def problem(num_examples: int) -> tuple[nn.Module, Batches]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_examples, 10, generator=generator)
    targets = (inputs[:, :3]).argmax(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, list(zip(inputs.split(100), targets.split(100), strict=True))


def train(
    model: nn.Module, batches: Batches, tracker: SharpnessTracker | None, steps: int
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(steps):
        inputs, targets = batches[step % len(batches)]
        optimizer.zero_grad()
        LOSS(model(inputs), targets).backward()
        optimizer.step()
        if tracker is not None:
            tracker(step)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("num_examples", [300, 1200], ids=["warm", "screened"])
def test_every_visit_is_right(num_examples: int) -> None:
    """Against the dense Hessian at each visit, both ends, two values.

    Catches: a graph of old weights; a start that traps; the schedule off by one.
    """
    model, batches = problem(num_examples)
    tracker = track_sharpness(
        model,
        LOSS,
        batches,
        every=10,
        targets=TrackedEigenvalues(k=2, smallest=True),
        generator=generator(),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(31):
        reading = tracker(step)
        assert (reading is None) == (step % 10 != 0)
        if reading is not None:
            exact = torch.linalg.eigvalsh(
                HessianOperator(model, LOSS, batches).to_dense().double()
            )
            scale = float(exact.abs().max())
            found = [e.value for e in reading.eigenvalues]
            assert found == pytest.approx(exact.flip(0)[:2].tolist(), abs=3e-3 * scale)
            assert reading.lambda_min.value == pytest.approx(
                float(exact[0]), abs=3e-3 * scale
            )
        inputs, targets = batches[step % len(batches)]
        optimizer.zero_grad()
        LOSS(model(inputs), targets).backward()
        optimizer.step()
    overlaps = [reading.overlap for reading in tracker.readings]
    assert overlaps[0] is None
    assert all(0.0 <= overlap <= 1.0 + 1e-6 for overlap in overlaps[1:])
    assert max(overlaps[1:]) > 0.5


def test_unchanged_weights_have_the_same_vectors() -> None:
    """Catches: an overlap of vectors of different lengths, or not squared."""
    model, batches = problem(300)
    tracker = track_sharpness(
        model,
        LOSS,
        batches,
        targets=TrackedEigenvalues(k=2, tol=1e-5),
        generator=generator(),
    )
    first, second = tracker.update(), tracker.update()
    assert second.overlap == pytest.approx(1.0, abs=1e-3)
    assert (first.step, second.step) == (0, 100)
    assert first.edge_ratio is None
    assert second.num_screening_matvecs == 0


def test_tracking_changes_no_bit_of_the_training() -> None:
    """Catches: gradients left behind, a drawn global number, changed modes."""
    plain, batches = problem(1200)
    tracked = copy.deepcopy(plain)
    torch.manual_seed(3)
    train(plain, batches, None, 25)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    tracker = track_sharpness(tracked, LOSS, batches, every=5)
    train(tracked, batches, tracker, 25)
    assert len(tracker.readings) == 5
    assert torch.equal(torch.get_rng_state(), after)
    for mine, theirs in zip(tracked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "threshold"),
    [(0.0, False, 2 / 0.1), (0.9, False, 3.8 / 0.1), (0.9, True, 3.8 / (2.8 * 0.1))],
)
def test_ratio_to_the_threshold_of_the_optimizer(
    momentum: float, nesterov: bool, threshold: float
) -> None:
    """The rate at the visit counts, so schedules are followed.

    Catches: the rate at set-up; 2/eta whatever the momentum.
    """
    model, batches = problem(300)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=momentum, nesterov=nesterov
    )
    tracker = track_sharpness(model, LOSS, batches, optimizer=optimizer)
    reading = tracker.update(0)
    ratio = reading.lambda_max.value / threshold
    assert reading.edge_ratio.value == pytest.approx(ratio)
    optimizer.param_groups[0]["lr"] = 0.2
    again = tracker.update(1)
    assert again.edge_ratio.value == pytest.approx(2 * ratio, rel=1e-2)


def test_an_edge_ratio_of_a_sum_loss_is_refused() -> None:
    """Eigenvalues are those of the mean, the optimizer's steps those of the sum.

    Catches: a ratio that is too small by the number of examples in a step.
    """
    model, batches = problem(300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(UsageError, match="a tracker goes without optimizer="):
        track_sharpness(model, loss, batches, optimizer=optimizer)
    tracker = track_sharpness(model, loss, batches)
    assert tracker.update(0).edge_ratio is None
    assert repr(tracker) == "<SharpnessTracker every 100 steps: 1 taken>"


@pytest.mark.parametrize("file", ["torch", "safetensors"])
@pytest.mark.parametrize("visits", [0, 2])
def test_resumed_tracking_goes_on_with_the_same_bits(
    file: str, visits: int, tmp_path: Path
) -> None:
    """Through files that hold tensors and nothing that could run.

    Catches: vectors, random state or readings that are not in the state; objects that
    ``weights_only=True`` refuses; vectors that lie otherwise in memory and so round
    otherwise.
    """
    model, batches = problem(300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    targets = TrackedEigenvalues(k=2, smallest=True)
    options = {"targets": targets, "optimizer": optimizer}
    tracker = track_sharpness(model, LOSS, batches, generator=generator(), **options)
    for visit in range(visits):
        tracker.update(visit)
    path = tmp_path / "tracker"
    if file == "torch":
        torch.save(tracker.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        save_file(tracker.state_dict(), path)
        state = load_file(path)
    resumed = track_sharpness(model, LOSS, batches, **options)
    resumed.load_state_dict(state)
    assert resumed.readings == tracker.readings
    for step in (9, 10):
        assert tracker.update(step) == resumed.update(step)
    assert tracker.frame().equals(resumed.frame())


def test_a_state_belongs_to_a_model() -> None:
    model, batches = problem(300)
    tracker = track_sharpness(
        model, LOSS, batches, targets=TrackedEigenvalues(smallest=True)
    )
    tracker.update(0)
    state = tracker.state_dict()
    other = nn.Linear(10, 3)
    stranger = track_sharpness(other, LOSS, batches)
    with pytest.raises(UsageError, match="vectors of 33 parameters, got 171"):
        stranger.load_state_dict(state)


def test_the_table_has_a_row_for_each_visit() -> None:
    model, batches = problem(300)
    tracker = track_sharpness(model, LOSS, batches, targets=TrackedEigenvalues(k=2))
    tracker.update(0)
    tracker.update(50)
    table = tracker.frame()
    assert table["step"].tolist() == [0, 50]
    assert (table["lambda_max"] == table["lambda_1"]).all()
    assert (table["lambda_2"] <= table["lambda_1"]).all()


def test_a_training_that_blew_up_is_recorded() -> None:
    """Catches: an exception in the middle of a run; NaN vectors as the next start."""
    model, batches = problem(300)
    tracker = track_sharpness(model, LOSS, batches)
    weight = next(model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    assert tracker.update(0).lambda_max.status is Status.DIVERGED
    with torch.no_grad():
        weight.copy_(kept)
    assert tracker.update(1).lambda_max.status is Status.OK


def test_arguments_are_checked() -> None:
    model, batches = problem(300)
    with pytest.raises(UsageError, match="every needs to be at least 1, got 0"):
        track_sharpness(model, LOSS, batches, every=0)
    with pytest.raises(UsageError, match=r"torch.optim.SGD, got Adam"):
        track_sharpness(
            model, LOSS, batches, optimizer=torch.optim.Adam(model.parameters())
        )

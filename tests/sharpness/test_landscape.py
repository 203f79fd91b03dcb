"""The line through two solutions: its losses, its barrier, its valleys."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.sharpness.landscape.interpolation import Interpolation, interpolate
from noisekit.sharpness.landscape.slices import loss_slice
from tests.reference import sharpness as reference
from tests.sharpness.networks import FailsAfter

State = dict[str, Tensor]


def network(seed: int) -> nn.Sequential:
    """A small BatchNorm network whose statistics are not those of a new one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        ).double()
        model.train()
        for _ in range(seed):
            model(torch.randn(16, 4, dtype=torch.float64))
    return model


def data(num_examples: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(num_examples, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (num_examples,), generator=generator)


def bits(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), key


@pytest.fixture
def ends() -> tuple[State, State]:
    return bits(network(2)), bits(network(3))


def line(**arguments: object) -> Interpolation:
    """The line through the two ends on ragged batches."""
    inputs, targets = data()
    batches = [(inputs[:13], targets[:13]), (inputs[13:], targets[13:])]
    ends = {"start": bits(network(2)), "end": bits(network(3))}
    return interpolate(network(1), nn.CrossEntropyLoss(), batches, **(ends | arguments))


def test_every_point_is_that_of_a_loaded_copy(ends: tuple[State, State]) -> None:
    """Loss and error equal those of a copy that loaded the interpolated state dict.

    Catches: alpha and 1 - alpha exchanged; running statistics that stay behind;
    evaluation in training mode; averages of batch averages.
    """
    got = line()
    assert len(got.alphas) == 25
    for alpha, loss, error in zip(got.alphas, got.losses, got.errors, strict=True):
        want = reference.loss_and_error_between(network(1), *ends, alpha, data())
        assert (loss, error) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_exactly_the_two_solutions(dtype: torch.dtype) -> None:
    """At 0 and 1 the loss is bit for bit that of the solution itself.

    Catches: an end that went through rounding.
    """
    inputs, targets = data()
    batches = [(inputs.to(dtype), targets)]
    loss_fn = nn.CrossEntropyLoss()
    first, second = network(2).to(dtype), network(3).to(dtype)
    got = interpolate(
        network(1).to(dtype), loss_fn, batches, start=bits(first), end=bits(second)
    )
    for at, model in ((0.0, first), (1.0, second)):
        want = EmpiricalRisk(model, loss_fn, batches).evaluate()
        index = got.alphas.index(at)
        assert got.losses[index] == want.loss
        assert got.errors[index] == want.error


@pytest.mark.parametrize("other", [1e9, math.inf])
def test_ends_do_not_spoil_each_other(other: float) -> None:
    """An end is exact whatever the size of the other end's weights.

    Catches: an end computed as the other end plus the whole difference; zero times
    infinity.
    """
    model = nn.Linear(1, 1, bias=False).double()
    near = {"weight": torch.full((1, 1), 1 / 3, dtype=torch.float64)}
    far = {"weight": torch.full((1, 1), other, dtype=torch.float64)}
    ones = torch.ones(2, 1, dtype=torch.float64)

    def output(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    for start, end, at in ((near, far, 0.0), (far, near, 1.0)):
        got = interpolate(model, output, [(ones, ones)], start=start, end=end)
        assert got.losses[got.alphas.index(at)] == 1 / 3


@pytest.mark.parametrize(("num_points", "low"), [(10, -1.0), (25, -1.0), (7, -0.35)])
def test_both_ends_are_always_on_the_grid(num_points: int, low: float) -> None:
    """Whatever the grid, alpha is exactly 0 and exactly 1 once.

    Catches: a grid that steps over the solutions; 0 as 1e-17.
    """
    got = line(num_points=num_points, span=(low, 2.0))
    assert got.alphas.count(0.0) == got.alphas.count(1.0) == 1
    assert got.alphas[0] == low
    assert got.alphas[-1] == 2.0
    assert list(got.alphas) == sorted(set(got.alphas))
    assert num_points <= len(got.alphas) <= num_points + 2


def test_recalibrated_statistics_are_those_of_each_point() -> None:
    """BatchNorm is calibrated anew at every alpha, not once for the line.

    Catches: statistics of the model as it was given.
    """
    inputs, targets = data()
    start, end = bits(network(2)), bits(network(3))
    loss_fn = nn.CrossEntropyLoss()
    got = interpolate(
        network(1),
        loss_fn,
        [(inputs, targets)],
        start=start,
        end=end,
        num_points=4,
        bn="recalibrated",
    )
    assert got.bn == "recalibrated"
    for alpha, loss in zip(got.alphas, got.losses, strict=True):
        twin = network(1)
        for key, value in twin.state_dict().items():
            if value.is_floating_point():
                value.copy_((1 - alpha) * start[key] + alpha * end[key])
        twin[1].momentum = 1.0
        twin.train()(inputs)
        with torch.no_grad():
            want = float(loss_fn(twin.eval()(inputs), targets))
        assert loss == pytest.approx(want, rel=1e-9)


def test_variance_below_zero_is_a_loss_that_does_not_exist() -> None:
    """Far outside, an interpolated variance may be negative; the loss there is NaN.

    Catches: a variance cut off at zero, whose loss is that of no network.
    """
    end = bits(network(3))
    end["1.running_var"] += 5
    got = line(end=end)
    assert math.isnan(got.losses[0])
    assert all(math.isfinite(loss) for loss in got.losses[8:])


@pytest.mark.parametrize("bn", ["running", "recalibrated", "batch"])
@pytest.mark.parametrize("calls", [math.inf, 2])
def test_model_is_given_back_bit_for_bit(bn: str, calls: float) -> None:
    """Weights, statistics, counters, mode and random state are as before.

    Catches: a model left at the last point of the line, also when the loss raises.
    """
    model = network(1).train()
    model[1].eval()
    model[0].weight.data[0, 0] = -0.0
    before, rng = bits(model), torch.get_rng_state()
    ends = {"start": bits(network(2)), "end": bits(network(3))}
    risk = EmpiricalRisk(model, FailsAfter(math.inf), [data()], bn=bn)
    risk.loss_fn = FailsAfter(calls)
    if calls == math.inf:
        interpolate(risk, **ends)
    else:
        with pytest.raises(RuntimeError, match="the loss failed"):
            interpolate(risk, **ends)
    assert_same_bits(model, before)
    assert math.copysign(1, float(model[0].weight.detach()[0, 0])) == -1
    assert model.training
    assert not model[1].training
    assert torch.equal(torch.get_rng_state(), rng)


def test_state_dicts_are_not_changed_even_where_they_are_the_models_own() -> None:
    """A model's own live state dict may be one of the ends.

    Catches: an end that moves along while the model is moved.
    """
    model, other = network(2), bits(network(3))
    got = interpolate(
        model, nn.CrossEntropyLoss(), [data()], start=model.state_dict(), end=other
    )
    assert_same_bits(model, bits(network(2)))
    assert got.losses == pytest.approx(line().losses, rel=1e-9)


def test_regression_has_no_error_and_the_table_says_so() -> None:
    """Without classes the error column is NaN; the table has one row per point.

    Catches: an error of 0 for data that cannot be misclassified.
    """
    model = nn.Linear(2, 1)
    state = bits(model)
    batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
    got = interpolate(
        model, nn.MSELoss(), batches, start=state, end=state, num_points=4
    )
    frame = got.frame()
    assert list(frame.columns) == ["alpha", "loss", "error"]
    assert frame["alpha"].tolist() == [-1.0, 0.0, 1.0, 2.0]
    assert frame["error"].isna().all()
    assert got.num_examples == 4


def drawn(losses: list[float], alphas: list[float] | None = None) -> Interpolation:
    grid = alphas or [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    return Interpolation(
        tuple(grid), tuple(losses), (math.nan,) * len(grid), "running", 1
    )


def test_barrier_is_measured_from_the_chord() -> None:
    """Only the part between the ends counts, above the line that joins their losses.

    Catches: the maximum over the whole line; the height above the lower end.
    """
    assert drawn([9, 5, 1.0, 4.0, 2.0, 8, 9]).barrier == pytest.approx(2.5)
    assert drawn([9, 5, 1.0, 1.2, 2.0, 8, 9]).barrier == 0.0


def test_valleys_end_where_the_loss_has_risen_by_one() -> None:
    """Crossings are found by linear interpolation, on each side on their own.

    Catches: a width counted in grid points; a valley that leaps over a ridge; a level
    that is relative to the other end.
    """
    got = drawn([4.0, 2.0, 0.0, 3.0, 0.5, 4.5, 0.0])
    start, end = got.valley(0), got.valley(1)
    assert (start.left, start.right) == pytest.approx((-0.25, 0.5 / 3))
    assert (end.left, end.right) == pytest.approx((1 - 0.5 / 2.5, 1 + 0.5 / 4))
    assert start.half_width == pytest.approx((0.25 + 0.5 / 3) / 2)
    assert start.bounded
    assert end.bounded
    assert got.valley(0, rise=0.5).half_width == pytest.approx(start.half_width / 2)


def test_valley_that_leaves_the_line_says_so() -> None:
    """A valley that is not closed within the line is at least as wide as its part.

    Catches: the line's end reported as the valley's.
    """
    got = drawn([0.9, 0.5, 0.0, 0.2, 0.1, 5.0, 9.0])
    valley = got.valley(0)
    assert valley.left == -1.0
    assert not valley.bounded


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_valley_beside_losses_that_are_not_finite(beyond: float) -> None:
    """A loss that is not finite ends the valley at the last point that was.

    An infinite one is above every level; of NaN nothing is known.

    Catches: NaN that counts as inside, or spreads into the width, or bounds a valley.
    """
    got = drawn([beyond, beyond, 0.0, 0.5, 0.0, beyond, 0.0])
    valley = got.valley(0)
    bounded = beyond == math.inf
    assert (valley.left, valley.right, valley.bounded) == (0.0, 1.0, bounded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_points": 1}, "num_points needs to be at least 2, got 1"),
        ({"span": (0.2, 2.0)}, r"needs to contain both ends.* got \(0\.2, 2\.0\)"),
        ({"span": (-1, 0.9)}, r"needs to contain both ends.* got \(-1, 0\.9\)"),
        (
            {"start": {}},
            "start needs to be a state dict of this model, got no 0.weight",
        ),
        (
            {"end": {}},
            "end needs to be a state dict .* and 4 more; pass the state_dict",
        ),
    ],
)
def test_lines_that_are_refused(arguments: dict[str, object], message: str) -> None:
    """What is wrong is refused with its name, and with what would do.

    Catches: a missing key that leaves the model's own weight in place.
    """
    with pytest.raises(UsageError, match=message):
        line(**arguments)


def test_misfits_are_named() -> None:
    """Wrong shapes and unknown names are listed with both shapes.

    Catches: broadcasting a weight of another shape.
    """
    state = bits(network(2))
    state["0.weight"] = state["0.weight"][:1]
    state["5.weight"] = state["0.bias"]
    with pytest.raises(UsageError) as caught:
        line(end=state)
    assert "5.weight, which the model has not" in str(caught.value)
    assert "0.weight of shape (1, 4) instead of (8, 4)" in str(caught.value)


def test_valley_arguments_are_refused() -> None:
    """Only the two ends have valleys, and the level lies above them.

    Catches: an index into the grid; a negative rise that gives a negative width.
    """
    got = drawn([0.0] * 7)
    with pytest.raises(
        UsageError, match=r"at needs to be 0 \(start\) or 1 \(end\), got 2"
    ):
        got.valley(2)
    with pytest.raises(UsageError, match=r"rise needs to be positive, got 0\.0"):
        got.valley(0, rise=0.0)


def test_shared_weights_move_once() -> None:
    """A tied weight under two names is at the same point under both.

    Catches: interpolating the second name from what the first has already written.
    """
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    start, end = bits(model), {k: v + 1 for k, v in bits(model).items()}
    inputs = torch.eye(3)
    batches = [(inputs, torch.zeros(3, 3))]
    got = interpolate(model, nn.MSELoss(), batches, start=start, end=end, num_points=4)
    twin = copy.deepcopy(model)
    twin[0].weight.data += 2
    with torch.no_grad():
        want = float(twin(inputs).square().mean())
    assert got.losses[-1] == pytest.approx(want, rel=1e-5)


def test_curvilinear_path_is_cosine_and_sine_of_a_quarter_turn() -> None:
    """Weights go round, statistics straight, and the ends are exact.

    Catches: an angle in degrees or of a half turn; sine and cosine exchanged;
    variances multiplied by numbers that do not add up to one.
    """
    got = line(path="curvilinear", num_points=7)
    assert got.path == "curvilinear"
    start, end = bits(network(2)), bits(network(3))
    inputs, targets = data()
    for alpha, loss in zip(got.alphas, got.losses, strict=True):
        twin = network(1)
        for key, value in twin.state_dict().items():
            turn = alpha * math.pi / 2
            first, second = math.cos(turn), math.sin(turn)
            if "running" in key:
                first, second = 1 - alpha, alpha
            if value.is_floating_point():
                value.copy_(first * start[key] + second * end[key])
        with torch.no_grad():
            want = float(nn.CrossEntropyLoss()(twin.eval()(inputs), targets))
        assert loss == pytest.approx(want, rel=1e-9)
    straight = line(num_points=7)
    for alpha, loss, other in zip(got.alphas, got.losses, straight.losses, strict=True):
        assert (loss == other) == (alpha in {0.0, 1.0})
    with pytest.raises(UsageError, match="'linear' or 'curvilinear', got 'bent'"):
        line(path="bent")


def test_points_between_are_evaluated_together() -> None:
    """All but the ends go in stacks; where they do not, the reason is given.

    Catches: a path that falls back to the loop without a word.
    """
    together = line()
    assert together.num_batched == len(together.alphas) - 2
    assert together.loop_reason == ""
    alone = line(bn="batch")
    assert alone.num_batched == 0
    assert alone.loop_reason.startswith("bn='batch' recomputes statistics")


class Masked(nn.Module):
    """Has a mask of minus infinity and a counter beside its weights."""

    def __init__(self, seed: int, steps: int = 0, hidden: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 3).double()
        mask = torch.zeros(3, dtype=torch.float64)
        mask[hidden] = -math.inf
        self.register_buffer("mask", mask)
        self.register_buffer("steps", torch.tensor(steps))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.layer(inputs) + self.mask).softmax(1)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - nn.functional.one_hot(targets, 3)).square().mean()


@pytest.mark.parametrize(("hidden", "kept"), [(2, ("steps",)), (1, ("mask", "steps"))])
def test_buffers_that_cannot_be_interpolated_are_kept(
    hidden: int, kept: tuple[str, ...]
) -> None:
    """A mask of both ends stays; one of the end alone is named.

    Catches: zero times infinity, which made every loss NaN; counters in between.
    """
    start, end = bits(Masked(0)), bits(Masked(1, steps=7, hidden=hidden))
    got = interpolate(Masked(2), squared, [data()], start=start, end=end)
    assert all(math.isfinite(loss) for loss in got.losses)
    assert got.kept == kept
    assert str(got).endswith(f"{', '.join(kept)} as at the start")
    twin = Masked(0)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_((start[name] + end[name]) / 2)
        inputs, targets = data()
        want = float(squared(twin(inputs), targets))
    middle = interpolate(
        Masked(2), squared, [data()], start=start, end=end, num_points=3, span=(0, 1)
    )
    assert middle.losses[1] == pytest.approx(want, rel=1e-12)


def test_a_valley_does_not_end_at_a_loss_that_is_unknown() -> None:
    """Catches: NaN, which is below no level, taken for a wall."""
    losses = (math.nan, 1.0, 0.0, 0.5, math.inf)
    path = Interpolation((-2.0, -1.0, 0.0, 1.0, 2.0), losses, losses, "running", 1)
    valley = path.valley(0, rise=2.0)
    assert (valley.left, valley.right, valley.bounded) == (-1.0, 1.0, False)
    assert path.valley(0, rise=0.5).bounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_evaluated_in_single_precision(dtype: torch.dtype) -> None:
    """Lines and slices are those of a float32 model with the same weights.

    Catches: points rounded to 8 bits, whose steps are taken for curvature.
    """
    inputs, targets = data()
    narrow = [network(seed).to(dtype) for seed in (1, 2, 3)]
    wide = [copy.deepcopy(model).float() for model in narrow]
    before = bits(narrow[0])
    found = []
    for models, kind in ((narrow, dtype), (wide, torch.float32)):
        batches = [(inputs.to(dtype).to(kind), targets)]
        ends = {"start": bits(models[1]), "end": bits(models[2])}
        loss_fn = nn.CrossEntropyLoss()
        along = interpolate(models[0], loss_fn, batches, num_points=5, **ends)
        vector = torch.linspace(-1, 1, sum(p.numel() for p in models[0].parameters()))
        plane = loss_slice(
            models[0], loss_fn, batches, directions=[vector], extent=0.01, num_points=5
        )
        found.append([*along.losses, *plane.losses.tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-6, nan_ok=True)
    assert_same_bits(narrow[0], before)

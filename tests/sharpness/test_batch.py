"""Batch and step sharpness against dense Hessians and a real optimizer step."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.results import ErrorSource, Status
from noisekit.sharpness.jackknife import mean_of_ratios, ratio_of_means
from noisekit.sharpness.measures.batch import (
    batch_sharpness,
    step_sharpness,
)
from tests.randomness import seeded
from tests.reference import sharpness as reference
from tests.sharpness.networks import LOSS, classes, rectified, state_of
from tests.sharpness.quadratics import Point, Quadratic, at_rest, coupled


def batches_of(size: int, num_batches: int, rest: int = 0) -> list:
    """Batches of one size, and a ragged last one."""
    inputs, targets = classes(size * num_batches + rest)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def dense(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of one batch's loss."""
    loss = reference.flat_loss(model, LOSS, *batch)
    at = reference.flat_weights(model).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    return gradient, reference.dense_hessian(loss, at.detach())


def test_it_is_the_mean_of_the_batches_own_ratios() -> None:
    """Each batch's Hessian along its own gradient, and the error of their mean.

    Catches: the full Hessian, which is the gradient-noise interaction instead; the
    ratio of the means; the error of that ratio beside the mean of the ratios.
    """
    batches = batches_of(6, 8)
    found = [dense(rectified(), batch) for batch in batches]
    above = np.array([float(g @ h @ g) for g, h in found])
    below = np.array([float(g @ g) for g, _ in found])
    pairs = np.stack([above, below], 1)
    got = batch_sharpness(rectified(), LOSS, batches)
    ratios = above / below
    assert got.value == pytest.approx(ratios.mean(), rel=1e-10)
    stderr = ratios.std(ddof=1) / math.sqrt(8)
    assert got.estimate.stderr == pytest.approx(stderr, rel=1e-9)
    assert got.estimate.error_source is ErrorSource.DATA
    assert got.estimate.dof == 7
    np.testing.assert_allclose(got.ratios, ratios, rtol=1e-10)

    means = got.ratio_of_means
    assert means.value == pytest.approx(above.mean() / below.mean(), rel=1e-10)
    left_out = np.array([np.delete(pairs, i, 0).sum(0) for i in range(8)])
    logs = np.log(left_out[:, 0] / left_out[:, 1])
    gaps = logs - logs.mean()
    kurtosis = (gaps**4).mean() / (gaps**2).mean() ** 2
    assert means.dof == pytest.approx(min(7, 16 / (kurtosis - 1)), rel=1e-9)
    centre = 8 * math.log(means.value) - 7 * logs.mean()
    half = stats.t.ppf(0.975, means.dof) * math.sqrt(7 / 8 * (gaps**2).sum())
    interval = means.interval()
    assert interval.low == pytest.approx(math.exp(centre - half), rel=1e-9)
    assert interval.high == pytest.approx(math.exp(centre + half), rel=1e-9)
    ratios_left = left_out[:, 0] / left_out[:, 1]
    stderr = math.sqrt(7 / 8 * ((ratios_left - ratios_left.mean()) ** 2).sum())
    assert means.stderr == pytest.approx(stderr, rel=1e-9)
    assert means.value != pytest.approx(got.value, rel=1e-2)
    assert means.stderr != pytest.approx(got.estimate.stderr, rel=1e-2)
    assert interval.contains(means.value)


def test_batches_of_another_size_are_left_out_and_counted() -> None:
    """A ragged last batch has another batch sharpness.

    Catches: a batch of one example averaged in, whose gradient is far larger.
    """
    whole = batch_sharpness(rectified(), LOSS, batches_of(6, 4, rest=1)[:4])
    got = batch_sharpness(rectified(), LOSS, batches_of(6, 4, rest=1))
    assert got.value == whole.value
    assert got.batch_size == 6
    assert got.num_left_out == 1
    assert whole.num_left_out == 0


def test_batches_are_drawn_out_of_larger_ones() -> None:
    """Each given batch is cut at random, without an example twice.

    Catches: examples in order, which a sorted data set makes all of one class.
    """
    inputs, targets = classes(50)
    got, again, other = (
        batch_sharpness(
            rectified(), LOSS, [(inputs, targets)], batch_size=8, generator=seeded(s)
        )
        for s in (0, 0, 1)
    )
    assert got.batch_size == 8
    assert len(got.ratios) == 6
    assert got.num_left_out == 1
    assert torch.equal(got.ratios, again.ratios)
    assert not torch.equal(got.ratios, other.ratios)
    few = batch_sharpness(
        rectified(),
        LOSS,
        [(inputs, targets)],
        batch_size=8,
        num_batches=3,
        generator=seeded(),
    )
    assert torch.equal(few.ratios, got.ratios[:3])


def inner(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    return torch.stack([(left[k] * right[k]).sum() for k in left]).sum()


def pool_of(size: int, num_batches: int, momentum: float = 0.0) -> np.ndarray:
    """``s' H s`` and ``s' g`` of many batches, by one vectorized pass: ``(B, 2)``.

    The step ``s`` is the gradient and the momentum of that of some other data.
    """
    model = rectified()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    LOSS(model(classes(20, 2)[0]), classes(20, 2)[1]).backward()
    velocity = {name: p.grad for name, p in model.named_parameters()}

    def pair(inputs: Tensor, targets: Tensor) -> Tensor:
        def loss(at: dict[str, Tensor]) -> Tensor:
            return LOSS(torch.func.functional_call(model, at, (inputs,)), targets)

        gradient = torch.func.grad(loss)(weights)

        def slope(at: dict[str, Tensor]) -> Tensor:
            return inner(torch.func.grad(loss)(at), step)

        step = {k: g + momentum * velocity[k] for k, g in gradient.items()}
        product = torch.func.grad(slope)(weights)
        return torch.stack([inner(product, step), inner(gradient, step)])

    inputs, targets = classes(size * num_batches, 1)
    rows = (inputs.view(num_batches, size, 5), targets.view(num_batches, size))
    return torch.vmap(pair, chunk_size=2000)(*rows).numpy()


@pytest.fixture(scope="module", params=[8, 32], ids="batch_size={}".format)
def pool(request: pytest.FixtureRequest) -> np.ndarray:
    return pool_of(request.param, 4000)


@pytest.mark.parametrize("num_batches", [3, 5, 10, 40])
def test_intervals_cover_as_often_as_they_say(
    pool: np.ndarray, num_batches: int
) -> None:
    """Of other batches of the same size, for the mean and for the ratio.

    With batches of 8 the curvature varies by more than its mean from batch to batch.

    Catches: the spread of the ratios in place of the error of their mean; Fieller's
    set for the ratio, which holds the truth in 83 to 92 of 100 cases.
    """
    truth = (pool[:, 0] / pool[:, 1]).mean(), pool[:, 0].mean() / pool[:, 1].mean()
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(600):
        above, below = torch.from_numpy(pool[rng.integers(4000, size=num_batches)]).T
        covered += [
            mean_of_ratios(above / below).interval().contains(truth[0]),
            ratio_of_means(above, below).interval().contains(truth[1]),
        ]
    assert (covered / 600 >= 0.90).all(), covered / 600
    assert (covered / 600 <= 0.98).all(), covered / 600


def test_intervals_cover_along_steps_with_velocity() -> None:
    """Single ratios are wild there and may be negative; the ratio of means is not.

    Catches: a log of what is negative.
    """
    pool = pool_of(8, 4000, momentum=0.9)
    assert (pool[:, 1] < 0).mean() > 0.001
    truth = pool[:, 0].mean() / pool[:, 1].mean()
    rng = np.random.default_rng(0)
    for num_batches in (5, 40):
        covered = 0
        for _ in range(600):
            above, below = torch.from_numpy(
                pool[rng.integers(4000, size=num_batches)]
            ).T
            covered += ratio_of_means(above, below).interval().contains(truth)
        assert 0.90 <= covered / 600 <= 0.98


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("moving", [False, True])
def test_step_sharpness_is_along_the_step_that_would_be_taken(
    options: dict, moving: bool
) -> None:
    """The optimizer, let loose on a copy for each batch, gives the steps.

    Catches: a velocity that was already updated; the first step dampened, which
    PyTorch's is not; Nesterov's look-ahead forgotten; weight decay left out.
    """
    model = rectified()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    batches = batches_of(6, 5)
    if moving:
        for batch in batches[:3]:
            optimizer.zero_grad()
            LOSS(model(batch[0]), batch[1]).backward()
            optimizer.step()
        optimizer.zero_grad()
    decay = options.get("weight_decay", 0.0)
    ratios, at = [], reference.flat_weights(model)
    for batch in batches:
        gradient, hessian = dense(model, batch)
        gradient = gradient + decay * at
        hessian = hessian + decay * torch.eye(len(at)).double()
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        LOSS(twin(batch[0]), batch[1]).backward()
        twin_optimizer.step()
        step = (at - reference.flat_weights(twin)) / 0.1
        ratios.append(float(step @ hessian @ step / (step @ gradient)))
    state = copy.deepcopy(optimizer.state_dict())
    got = step_sharpness(model, LOSS, batches, optimizer=optimizer)
    np.testing.assert_allclose(got.ratios, ratios, rtol=1e-7)
    assert str(optimizer.state_dict()) == str(state)
    if not options:
        plain = batch_sharpness(model, LOSS, batches)
        assert got.value == pytest.approx(plain.value, rel=1e-12)


def test_without_gradient_there_is_no_ratio() -> None:
    """At an exact minimizer of every batch it is no signal, not 0 or NaN alone."""
    hessian, weights = coupled(4, 0)
    got = batch_sharpness(
        Point(weights), Quadratic(hessian), at_rest(weights, 4), batch_size=1
    )
    assert math.isnan(got.value)
    assert got.estimate.status is Status.NO_SIGNAL
    assert got.ratio_of_means.status is Status.NO_SIGNAL


def test_batch_norm_may_see_the_batch_as_in_training() -> None:
    """Under ``bn="batch"`` it is the training-mode loss, and nothing is updated.

    Catches: running statistics that move; the policy that is not passed on.
    """
    model = rectified(norm=True).train()
    before = state_of(model)
    batches = batches_of(8, 4)
    training = batch_sharpness(model, LOSS, batches, bn="batch")
    running = batch_sharpness(model, LOSS, batches)
    assert training.value != pytest.approx(running.value, rel=1e-2)
    assert state_of(model) == before
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(2)
    shorter = batch_sharpness(model, LOSS, batches, bn="batch", params="3.*")
    assert math.isfinite(shorter.value)


def test_bad_arguments_are_refused() -> None:
    batches = batches_of(6, 3)
    for options, message in (
        ({"batch_size": 7}, "at least as many examples, got at most 6; pass larger"),
        ({"batch_size": 0}, "batch_size needs to be at least 1, got 0"),
        ({"num_batches": 1}, "at least 2 for an error estimate, got 1"),
    ):
        with pytest.raises(UsageError, match=message):
            batch_sharpness(rectified(), LOSS, batches, **options)
    model = rectified()
    with pytest.raises(UsageError, match="got AdamW, whose steps depend"):
        step_sharpness(
            model, LOSS, batches, optimizer=torch.optim.AdamW(model.parameters())
        )

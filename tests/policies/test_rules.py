"""Adaptive rules: sequences computed by hand, and an independent CABS."""

import pytest

import noisekit as nk


def sizes_of(policy, readings):
    """Return the sizes that follow the readings, and the last state."""
    state, found = policy.start(), []
    for number, reading in enumerate(readings, 1):
        seen = nk.Observation(updates=number, epochs=number, **reading)
        state, decision = policy.next(state, seen)
        found.append(decision.batch_size)
    return found, state


# --------------------------------------------------------------------------- CABS


def cabs_readings(pairs, rate=0.1, size=2):
    """Return readings with a given *biased* variance ``xi`` of a batch of ``size``."""
    return [
        {
            "loss": loss,
            "variance_trace": xi * size / (size - 1),
            "batch_size": size,
            "learning_rate": rate,
        }
        for xi, loss in pairs
    ]


def test_cabs_sequence_of_the_official_rule():
    """Catches: bias-corrected averages (200 at once), the last loss for F, unbiased."""
    found, state = sizes_of(nk.CABS(), cabs_readings([(4000.0, 2.0)] * 400))
    assert found[:6] == [19, 36, 50, 63, 74, 84]
    assert found[-1] == 200
    assert state["held"] == 0
    raw = 0.1 * (4000 * 0.05) / (0.95 + 0.05 * 2)
    assert raw == pytest.approx(19.0476, abs=1e-4)


def test_cabs_rounds_half_to_even_then_clips():
    """Catches: int(x + .5), which gives 21, 22, 23, 24."""
    policy = nk.CABS(smoothing=0.0)
    pairs = [(xi, 1.0) for xi in (205.0, 215.0, 225.0, 235.0)]
    assert sizes_of(policy, cabs_readings(pairs))[0] == [20, 22, 22, 24]
    low = nk.CABS(smoothing=0.0, min=17)
    assert sizes_of(low, cabs_readings([(164.0, 1.0)]))[0] == [17]


def test_cabs_takes_the_biased_variance_of_the_batch_at_hand():
    """(m - 1) / m of the sample variance: at m = 2 CABS asks for half."""
    policy = nk.CABS(smoothing=0.0, min=2)
    for size in (2, 4, 16):
        reading = {
            "loss": 1.0,
            "variance_trace": 1000.0,
            "batch_size": size,
            "learning_rate": 0.1,
        }
        assert sizes_of(policy, [reading])[0] == [round(100 * (size - 1) / size)]


def test_cabs_conv_compat_takes_its_variance_as_it_is():
    policy = nk.CABS(smoothing=0.0, min=2, moments="conv_compat")
    assert [need.name for need in policy.needs] == [
        "learning_rate",
        "loss",
        "conv_compat_variance",
    ]
    reading = {"loss": 1.0, "conv_compat_variance": 300.0, "variance_trace": 9e9}
    reading |= {"batch_size": 2, "learning_rate": 0.1}
    assert sizes_of(policy, [reading])[0] == [30]


def test_cabs_without_a_loss_to_divide_by():
    """Zero over zero and negative losses hold; a loss of zero alone goes to max."""
    policy = nk.CABS(smoothing=0.0, batch_size=64)
    found, state = sizes_of(policy, cabs_readings([(0.0, 0.0), (100.0, -1.0)]))
    assert found == [64, 64]
    assert state["held"] == 2
    assert sizes_of(policy, cabs_readings([(100.0, 0.0)]))[0] == [2048]


def test_cabs_refuses_other_optimizers_and_momentum():
    import torch

    weight = torch.zeros(2, requires_grad=True)
    nk.CABS().check_optimizer(torch.optim.SGD([weight], lr=0.1))
    heavy = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    with pytest.raises(nk.NoisekitError, match=r"momentum=0.9: noise counts rate /"):
        nk.CABS().check_optimizer(heavy)
    nk.CABS(momentum="ignore").check_optimizer(heavy)
    with pytest.raises(nk.NoisekitError, match=r"needs torch\.optim\.SGD.*got Adam"):
        nk.CABS().check_optimizer(torch.optim.Adam([weight]))


# -------------------------------------------------------------------------- tests


def test_norm_test_grows_to_the_smallest_batch_that_passes():
    """.06 against .025 fails; 120 would pass, equality included."""
    reading = {"variance_trace": 3.0, "grad_sq_norm": 0.1}
    policy = nk.NormTest(theta=0.5)
    assert sizes_of(policy, [reading | {"batch_size": 50}])[0] == [120]
    assert sizes_of(policy, [reading | {"batch_size": n} for n in (50, 120)])[0] == [
        120,
        120,
    ]
    finite = nk.NormTest(theta=0.5, population_size=1000, max=1000)
    assert sizes_of(finite, [reading | {"batch_size": 50}])[0] == [108]
    state = {**policy.start(), "batch_size": 120}
    seen = nk.Observation(updates=1, batch_size=120, **reading)
    assert policy.next(state, seen)[1].reason.startswith("passes")


def test_norm_test_never_shrinks_and_bounds_its_growth():
    policy = nk.NormTest(theta=0.5, batch_size=64, max=256)
    weak = {"variance_trace": 3.0, "grad_sq_norm": 0.0, "batch_size": 64}
    strong = {"variance_trace": 1e-6, "grad_sq_norm": 10.0, "batch_size": 64}
    assert sizes_of(policy, [strong, weak, strong])[0] == [64, 256, 256]
    with pytest.raises(nk.NoisekitError, match="population_size=1000, got 2048"):
        nk.NormTest(population_size=1000)


def test_inner_product_test_grows_by_its_statistic():
    """N (statistic / theta)^2, rounded up: 32 (.3 / .2)^2 = 72."""
    reading = {"inner_product_test": 0.3, "batch_size": 32}
    assert sizes_of(nk.InnerProductTest(theta=0.2), [reading])[0] == [72]
    passing = {"inner_product_test": 0.1, "orthogonality_test": 4.0, "batch_size": 32}
    both = nk.InnerProductTest(theta=0.2, nu=2.0)
    assert sizes_of(both, [passing])[0] == [128]
    assert sizes_of(nk.InnerProductTest(theta=0.2), [passing])[0] == [16]


# -------------------------------------------------------------------- noise scale


def test_noise_scale_target_divides_averages_and_holds_without_signal():
    """Catches: an average of ratios; a clamp of negative |G|^2."""
    policy = nk.NoiseScaleTarget(min=8, max=1024, smoothing=0.0, min_readings=1)
    readings = [
        {"variance_trace": 40.0, "debiased_grad_sq_norm": norm, "batch_size": 8}
        for norm in (2.0, 1.0, -0.1, 0.01)
    ]
    found, state = sizes_of(policy, readings)
    assert found == [20, 40, 40, 1024]
    assert state["held"] == 1
    averaging = nk.NoiseScaleTarget(min=8, max=1024, smoothing=0.5, min_readings=2)
    # Averages (.5, .25) of (40, 80) and (2, 6): 50 / 3.5.
    pairs = [(40.0, 2.0), (80.0, 6.0)]
    readings = [
        {"variance_trace": trace, "debiased_grad_sq_norm": norm, "batch_size": 8}
        for trace, norm in pairs
    ]
    assert sizes_of(averaging, readings)[0] == [8, round(50 / 3.5)]


def test_negative_signal_counts_in_the_average():
    """Catches: dropping readings whose |G|^2 is negative, which biases the rest."""
    policy = nk.NoiseScaleTarget(min=8, max=1024, smoothing=0.5, min_readings=1)
    readings = [
        {"variance_trace": 40.0, "debiased_grad_sq_norm": norm, "batch_size": 8}
        for norm in (-1.0, 4.0)
    ]
    assert sizes_of(policy, readings)[0] == [8, round((0.25 + 0.5) * 40 / 1.75)]


def test_gradient_threshold_doubles_where_the_squared_norm_halves():
    policy = nk.GradientThreshold(
        min=16, max=100, smoothing=0.0, min_readings=2, rate=0.5
    )
    norms = (9.0, 8.0, 5.0, 4.0, 3.0, 2.0, 0.1, 0.01)
    readings = [{"debiased_grad_sq_norm": g, "batch_size": 16} for g in norms]
    found, state = sizes_of(policy, readings)
    assert found == [16, 16, 16, 32, 32, 64, 100, 100]
    assert policy.decision(state, "").rate_factor == 0.5**4
    assert sizes_of(policy, [*readings, {"batch_size": 9}])[1]["held"] == 1


# -------------------------------------------------------------------------- kicks


def kicked(policy, losses, *, per_epoch=4):
    """Return the size of every epoch; each has the same loss in all its updates."""
    state, found = policy.start(), []
    seen = nk.Observation()
    for epoch, loss in enumerate(losses):
        for place in range(per_epoch):
            state, decision = policy.next(state, seen)
            if place == 0:
                found.append(decision.batch_size)
            assert decision.batch_size == found[-1], "a change within an epoch"
            done = epoch * per_epoch + place + 1
            seen = nk.Observation(
                updates=done,
                epochs=done / per_epoch,
                batch_size=decision.batch_size,
                loss=loss,
            )
    return found, state


LOSSES = [1, 0.8, 0.64, 0.6, 0.59, 0.588, 0.9, 0.62, 0.55, 0.52, 0.515, 0.514, 0.8, 0.6]


def test_kicks_begin_where_the_loss_stalls_and_cool_down():
    """Worked out by hand: kicks in epochs 6 and 12 of the sequence.

    Catches: losses of before a kick counted after it; a pause one epoch short.
    """
    policy = nk.Kicks(
        criterion=nk.RelativeDecrease(window=2, below=0.05),
        length=nk.At(epochs=1),
        cooldown=nk.At(epochs=2),
    )
    found, state = kicked(policy, LOSSES)
    expected = [512] * len(LOSSES)
    for epoch in by_hand(LOSSES, window=2, below=0.05, length=1, cooldown=2):
        expected[epoch] = 32
    assert found == expected
    assert expected.count(32) == state["kicks"] == 2


def by_hand(losses, *, window, below, length, cooldown):
    """The state machine of the kicks, one loss an epoch; returns the kicks' epochs."""
    left = cool = 0
    history, kicks = [], []
    for epoch, loss in enumerate(losses):
        if left:
            kicks.append(epoch)
        history.append(loss)
        if left:
            left -= 1
            if left == 0:
                cool, history = cooldown, []
        elif cool:
            cool -= 1
        elif len(history) > window:
            before = history[-1 - window]
            if (before - loss) / before < below:
                left = length
    return kicks


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("cooldown", [0, 1, 5])
@pytest.mark.parametrize("window", [1, 3])
def test_kicks_agree_with_the_state_machine_by_epochs(length, cooldown, window):
    import random

    draw = random.Random(length + 10 * cooldown + 100 * window)
    losses = [draw.uniform(0.5, 1.0) for _ in range(60)]
    policy = nk.Kicks(
        criterion=nk.RelativeDecrease(window=window, below=0.1),
        length=nk.At(epochs=length),
        cooldown=nk.At(epochs=cooldown),
    )
    kicks = by_hand(losses, window=window, below=0.1, length=length, cooldown=cooldown)
    found, _ = kicked(policy, losses, per_epoch=3)
    assert [epoch for epoch, size in enumerate(found) if size == 32] == kicks
    assert kicks


def test_progress_is_prechelts():
    """P_k = 1000 (mean / min - 1): 25 of (.41, .40, .42)."""
    criterion = nk.Progress(window=3, below=25.1)
    assert criterion.holds([9.0, 0.41, 0.40, 0.42])
    assert not nk.Progress(window=3, below=24.9).holds([0.41, 0.40, 0.42])


def test_kicks_wait_for_patience():
    stalled = [0.5] * 12
    one = nk.Kicks(criterion=nk.RelativeDecrease(window=1, below=0.1))
    two = nk.Kicks(criterion=nk.RelativeDecrease(window=1, below=0.1), patience=3)
    assert kicked(one, stalled)[0].index(32) == 2
    assert kicked(two, stalled)[0].index(32) == 4


def test_decisions_at_intervals():
    """With a probe at updates 1, 11, 21 and every=10, each of its readings counts."""
    policy = nk.NormTest(theta=0.5, every=nk.At(updates=10))
    state, changes = policy.start(), []
    for update in range(1, 31):
        read = update % 10 == 1
        values = {"variance_trace": 3.0 * update, "grad_sq_norm": 0.1} if read else {}
        seen = nk.Observation(updates=update, batch_size=50, **values)
        state, decision = policy.next(state, seen)
        changes.append(decision.batch_size)
    assert [changes[k] for k in (0, 9, 10, 19, 20, 29)] == [
        120,
        120,
        1320,
        1320,
        2048,
        2048,
    ]
    assert state["held"] == 0


def test_cabs_is_the_official_program_for_ten_thousand_steps():
    """Equal integers, step by step, on gradients of softmax regression.

    The reference is NumPy alone: elementwise second moments less squared means. Every
    decided size is used for the next batch, so that one wrong size changes all after.
    """
    import numpy as np
    import torch

    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(2048, 6))
    labels = (inputs @ draw.normal(size=(6, 3)) + draw.normal(size=(2048, 3))).argmax(1)
    weights, rate = np.zeros((6, 3)), 0.3
    xi_average, loss_average, size = 0.0, 1.0, 4
    policy = nk.CABS(min=4, max=128, c=40.0)
    state, seen, visited = policy.start(), nk.Observation(), set()
    for step in range(1, 10_001):
        state, decision = policy.next(state, seen)
        assert decision.batch_size == size, step
        visited.add(size)
        rows = draw.integers(0, 2048, size)
        scores = inputs[rows] @ weights
        scores -= scores.max(1, keepdims=True)
        chances = np.exp(scores)
        chances /= chances.sum(1, keepdims=True)
        loss = float(-np.log(chances[np.arange(size), labels[rows]]).mean())
        residuals = chances.copy()
        residuals[np.arange(size), labels[rows]] -= 1
        grads = np.einsum("ni,nj->nij", inputs[rows], residuals)
        seen = nk.Observation(
            updates=step,
            batch_size=size,
            learning_rate=rate,
            loss=loss,
            variance_trace=float(torch.from_numpy(grads).var(0, correction=1).sum()),
        )
        # The official rule.
        mean = grads.mean(0)
        xi = float(((grads**2).mean(0) - mean**2).sum())
        loss_average = 0.95 * loss_average + 0.05 * loss
        xi_average = 0.95 * xi_average + 0.05 * xi
        raw = 40.0 * rate * xi_average / loss_average
        size = int(np.clip(np.round(raw), 4, 128))
        weights -= rate * mean
    assert len(visited) > 20

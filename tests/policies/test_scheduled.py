"""Scheduled policies: the sequences of the papers, and what the settings refuse."""

import itertools
import math
from fractions import Fraction

import pytest

import noisekit as nk
from noisekit.policies.point import At, num_reached


def decisions(policy, epochs):
    """Return the policy's decisions at the given epochs, asked one by one."""
    state, found = policy.start(), []
    for epoch in epochs:
        state, decision = policy.next(state, nk.Observation(epochs=epoch))
        found.append(decision)
    return found


# ------------------------------------------------------------------------- points


def test_change_takes_effect_where_the_starting_place_has_reached_the_point():
    """Catches: a change one update early or late."""
    point = At(updates=100)
    assert [point.reached(nk.Observation(updates=n)) for n in (99, 100, 101)] == [
        False,
        True,
        True,
    ]
    assert num_reached(nk.Observation(updates=199), (), point) == 1
    assert num_reached(nk.Observation(updates=200), (), point) == 2


def test_intervals_are_counted_exactly_where_floats_are_not():
    """Three tenths are three intervals of a tenth, and 1e8 intervals do not drift."""
    assert At(epochs=0.1).count(nk.Observation(epochs=0.3)) == 3
    assert At(share=0.1).count(nk.Observation(share=0.7)) == 7
    # Every update of a pass of 1,257 examples by 3, changes each third of an epoch.
    every = At(epochs=1 / 3)
    for cursor in range(0, 12_570, 3):
        exact = math.floor(Fraction(cursor, 1257) * 3)
        assert every.count(nk.Observation(epochs=cursor / 1257)) == exact, cursor
    assert At(epochs=0.1).count(nk.Observation(epochs=1e7 - 0.1)) == 10**8 - 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of updates, examples, epochs, share, got none"),
        ({"updates": 1, "epochs": 2}, "got updates, epochs"),
        ({"share": 1.5}, "share needs"),
        ({"epochs": -1}, "epochs needs to be at least 0"),
        ({"updates": 1.5}, "updates needs"),
    ],
)
def test_point_refuses(arguments, words):
    with pytest.raises(nk.NoisekitError, match=words):
        At(**arguments)


def test_share_of_a_run_of_unknown_length_is_refused():
    with pytest.raises(nk.NoisekitError, match="50 % of the run needs the length"):
        At(share=0.5).reached(nk.Observation(updates=3))


# ---------------------------------------------------------------------- sequences


def test_growth_floors_the_product():
    """Catches: flooring at every step (160, 176, 193), and floats of 1.1."""
    growth = nk.Growth(100, factor=1.1, every=At(updates=1), max=1000)
    sizes = [growth.size_after(k) for k in range(8)]
    assert sizes == [100, 110, 121, 133, 146, 161, 177, 194]
    assert growth.size_after(10**7) == 1000
    # In floats 100 * 1.4 ** 2 is below 196.
    assert nk.Growth(100, factor=1.4, every=At(updates=1), max=999).size_after(2) == 196


def test_adabatch_of_the_paper():
    """Catches: a decay of .375 in place of .75; the rate of another batch."""
    got = decisions(nk.AdaBatch(128, max=50_000), (0, 19.99, 20, 40, 60, 80, 99.9))
    assert [d.batch_size for d in got] == [128, 128, 256, 512, 1024, 2048, 2048]
    rates = [round(0.1 * d.rate_factor, 12) for d in got]
    assert rates == [0.1, 0.1, 0.075, 0.05625, 0.0421875, 0.031640625, 0.031640625]
    per_example = [d.rate_factor / d.batch_size * 128 for d in got]
    assert per_example[2:6] == [0.375**k for k in (1, 2, 3, 4)]


def test_adabatch_uncoupled_is_told_apart():
    """The control changes no batch, and is wrong in the rate at the first change."""
    right = decisions(nk.AdaBatch(128, max=50_000), (0, 20, 40))
    wrong = decisions(nk.AdaBatch(128, max=50_000, coupled=False), (0, 20, 40))
    assert [d.batch_size for d in right] == [d.batch_size for d in wrong]
    assert [d.rate_factor for d in wrong] == [1.0, 0.375, 0.140625]
    assert [d.rate_factor for d in right] == [1.0, 0.75, 0.5625]


def test_adabatch_at_its_cap():
    """The cap's share of the growth is taken from the rate, then the whole decay."""
    policy = nk.AdaBatch(256, max=49_920, every=At(epochs=1))
    got = decisions(policy, range(11))
    assert [d.batch_size for d in got[:8]] == [256 * 2**k for k in range(8)]
    assert [d.batch_size for d in got[8:]] == [49_920] * 3
    steps = [b.rate_factor / a.rate_factor for a, b in itertools.pairwise(got)]
    assert steps[:7] == [0.75] * 7
    assert steps[7:] == pytest.approx([0.75 * 0.76171875, 0.375, 0.375], rel=1e-14)


@pytest.mark.parametrize(
    ("policy", "sizes", "rates"),
    [
        (
            nk.GrowInsteadOfDecay(
                128, at=[At(epochs=e) for e in (60, 120, 160)], max=50_000
            ),
            [128, 640, 3200, 16_000],
            [1, 1, 1, 1],
        ),
        (
            nk.GrowInsteadOfDecay(
                3200, at=[At(epochs=e) for e in (60, 120, 160)], max=5120
            ),
            [3200, 5120, 5120, 5120],
            [1, 0.32, 0.064, 0.0128],
        ),
    ],
)
def test_growth_in_place_of_decay(policy, sizes, rates):
    """What max forbids, the rate takes over, with the noise scale as if it grew."""
    got = decisions(policy, (0, 60, 120, 160))
    assert [d.batch_size for d in got] == sizes
    assert [d.rate_factor for d in got] == pytest.approx(rates, rel=1e-14)
    noise = [d.rate_factor / d.batch_size for d in got]
    assert noise == pytest.approx([noise[0] / 5**k for k in range(4)], rel=1e-14)


def num_updates(policy, *, num_examples, epochs, ragged):
    """Walk a run on its clock, batches cut at an epoch's end or dropped there."""
    state, cursor, updates = policy.start(), 0, 0
    while cursor < epochs * num_examples:
        position = nk.Observation(updates=updates, epochs=cursor / num_examples)
        state, decision = policy.next(state, position)
        left = num_examples - cursor % num_examples
        if decision.batch_size > left and not ragged:
            cursor += left
            continue
        cursor += min(decision.batch_size, left)
        updates += 1
    return updates


def test_numbers_of_updates_of_the_papers():
    """Growth in place of decay: 78,200, 29,000, 6,500 and 2,360 updates."""
    run = {"num_examples": 50_000, "epochs": 200, "ragged": True}
    at = [At(epochs=e) for e in (60, 120, 160)]
    assert num_updates(nk.Constant(128), **run) == 78_200
    hybrid = nk.GrowInsteadOfDecay(128, at=at[:1], max=50_000)
    assert num_updates(hybrid, **run) == 34_520
    for start, cap, updates in ((128, 50_000, 29_000), (640, 5120, 6500)):
        policy = nk.GrowInsteadOfDecay(start, at=at, max=cap)
        assert num_updates(policy, **run) == updates
    assert num_updates(nk.GrowInsteadOfDecay(3200, at=at, max=5120), **run) == 2360


def test_updates_at_which_adabatch_changes():
    """Changes at updates 7,800, 11,700, 13,640 and 14,600, last batches dropped."""
    policy = nk.AdaBatch(128, max=50_000)
    ends = (20, 40, 60, 80)
    found = [
        num_updates(policy, num_examples=50_000, epochs=e, ragged=False) for e in ends
    ]
    assert found == [7800, 11_700, 13_640, 14_600]


def test_table_cycles_and_stays():
    policy = nk.Table((64, 256), every=At(epochs=5), cyclic=True)
    got = decisions(policy, (0, 5, 10, 15, 20))
    assert [d.batch_size for d in got] == [64, 256, 64, 256, 64]
    policy = nk.Table((64, 256), every=At(epochs=5))
    assert [d.batch_size for d in decisions(policy, (0, 5, 10))] == [64, 256, 256]
    policy = nk.Table((32, 512), at=[At(epochs=10)])
    assert [d.batch_size for d in decisions(policy, (9.99, 10))] == [32, 512]


# ----------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nk.Constant(0), "batch_size needs to be at least 1, got 0"),
        (lambda: nk.Constant(2.5), "batch_size needs to be an integer"),
        (lambda: nk.Table(()), "sizes needs batch sizes of 1 or more"),
        (lambda: nk.Table((8, 0), every=At(epochs=1)), "sizes needs batch sizes"),
        (lambda: nk.Table((8, 16)), "either at= .* or every= .*got neither"),
        (
            lambda: nk.Table((8, 16), at=[At(epochs=1)], every=At(epochs=1)),
            "got both",
        ),
        (
            lambda: nk.Table((8, 16), at=[At(epochs=1), At(epochs=2)]),
            "one point fewer than there are sizes, got 2 points for 2 sizes",
        ),
        (
            lambda: nk.Table((8, 16), at=[At(epochs=1)], cyclic=True),
            "cyclic=True needs every=",
        ),
        (
            lambda: nk.Table((8, 16, 32), at=[At(epochs=2), At(epochs=1)]),
            "ascending order",
        ),
        (
            lambda: nk.Table((8, 16, 32), at=[At(epochs=2), At(updates=9)]),
            "points on one clock",
        ),
        (lambda: nk.Table((8, 16), at=[10]), "at needs to be .* an At"),
        (
            lambda: nk.Growth(8, factor=1.0, every=At(epochs=1), max=64),
            "use Table for sizes that fall",
        ),
        (
            lambda: nk.Growth(8, factor=2, every=At(epochs=0), max=64),
            "every needs an interval longer than 0",
        ),
        (
            lambda: nk.Growth(128, factor=2, every=At(epochs=1), max=64),
            "max needs to be at least the batch size 128, got 64",
        ),
        (
            lambda: nk.Growth(8, factor=2, every=At(epochs=1), max=64, beyond="grow"),
            "beyond needs",
        ),
    ],
)
def test_settings_refused(build, words):
    with pytest.raises(nk.NoisekitError, match=words):
        build()


def test_printed_policy_names_rule_settings_and_source():
    text = str(nk.AdaBatch(128, max=50_000))
    assert "rate = rate0 d^k m / m0" in text
    assert "every=20 epochs" in text
    assert "arXiv:1712.02029" in text

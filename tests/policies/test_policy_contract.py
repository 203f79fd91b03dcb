"""What every policy keeps to: bounds, purity, JSON states, no look-ahead, gaps."""

import itertools
import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

import noisekit as nk
from noisekit.policies import POLICIES
from noisekit.policies.adaptive import Adaptive
from tests.policies.streams import EXAMPLES, VALUES, after, label, noisy, walk

every_policy = pytest.mark.parametrize("policy", EXAMPLES, ids=label)
adaptive = pytest.mark.parametrize(
    "policy", [p for p in EXAMPLES if p.needs], ids=label
)
with_bounds = pytest.mark.parametrize(
    "policy", [p for p in EXAMPLES if isinstance(p, Adaptive)], ids=label
)


def test_the_battery_covers_all_policies():
    assert {type(policy) for policy in EXAMPLES} == set(POLICIES)
    assert len({kind.name for kind in POLICIES}) == len(POLICIES)


@every_policy
def test_sizes_are_integers_within_bounds(policy):
    low, high = policy.bounds()
    _, decisions = walk(policy, noisy(0, gap=0.1, bad=(None, math.nan)), 120)
    sizes = [decision.batch_size for decision in decisions]
    assert all(type(size) is int and low <= size <= high for size in sizes)
    assert all(math.isfinite(d.rate_factor) and d.rate_factor > 0 for d in decisions)
    if not isinstance(policy, nk.Constant):
        assert len(set(sizes)) > 1, "the stream does not move the policy"


@every_policy
def test_bounds_hold_for_absurd_readings(policy):
    """Zero, negative, huge and infinite values end at a bound or hold the size."""
    low, high = policy.bounds()
    values = (0.0, -1.0, 1e300, 1e-300, math.inf, -math.inf)
    for value in values:
        observe = lambda update, size, v=value: dict.fromkeys(VALUES, v)  # noqa: E731
        _, decisions = walk(policy, observe, 40)
        assert all(low <= d.batch_size <= high for d in decisions), value


@every_policy
def test_state_is_json_at_every_update(policy):
    """A resume from a checkpoint's JSON at any update gives the same rest."""
    observe = noisy(1, gap=0.1)
    states, decisions = walk(policy, observe, 60)
    seen, state = nk.Observation(share=0.0), policy.start()
    for update in range(60):
        # The state goes through text before every single update.
        state = json.loads(json.dumps(state, allow_nan=False))
        state, decision = policy.next(state, seen)
        assert decision == decisions[update]
        assert json.loads(json.dumps(state)) == json.loads(json.dumps(states[update]))
        seen = after(seen, decision, observe, 400, 60)


@every_policy
def test_next_is_pure(policy):
    """Asked twice it says the same, and leaves the state that it was given."""
    observe, seen, state = noisy(2), nk.Observation(share=0.0), policy.start()
    for _ in range(40):
        before = json.dumps(state)
        first, second = policy.next(state, seen), policy.next(state, seen)
        assert first == second
        assert json.dumps(state) == before
        state, decision = first
        seen = after(seen, decision, observe, 400, 40)


@every_policy
def test_no_look_ahead(policy):
    """Readings from update 30 on change no decision before the one that sees them."""
    short, long = noisy(3), noisy(4)

    def switched(update, size):
        return (short if update < 30 else long)(update, size)

    _, same = walk(policy, short, 60)
    _, other = walk(policy, switched, 60)
    assert same[:30] == other[:30]


@every_policy
def test_equal_on_all_ranks(policy):
    """Copies of a policy, as on other processes, agree in every decision."""
    copy = pickle.loads(pickle.dumps(policy))
    assert copy == policy
    assert hash(copy) == hash(policy)
    assert walk(copy, noisy(5), 50) == walk(policy, noisy(5), 50)


@adaptive
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_missing_readings_hold_the_size_and_are_counted(policy, bad):
    observe = noisy(6)
    states, _ = walk(policy, observe, 30)
    state, held = states[-1], states[-1]["held"]
    seen = nk.Observation(
        updates=300, examples=30_000, epochs=75, batch_size=32, learning_rate=0.1
    )
    seen = replace(seen, **dict.fromkeys(VALUES, bad))
    new, decision = policy.next(state, seen)
    assert new["held"] == held + 1
    if isinstance(policy, Adaptive):
        assert decision.batch_size == state["batch_size"]
        assert "held: no finite" in decision.reason
        kept = {k: v for k, v in new.items() if k != "held"}
        assert kept == {k: v for k, v in state.items() if k != "held"}


@with_bounds
def test_constant_readings_give_a_monotone_sequence(policy):
    """Catches: a rule that oscillates without a cause."""

    def constant(update, size):
        values = dict.fromkeys(VALUES, 0.4)
        return values | {"variance_trace": 300.0, "conv_compat_variance": 300.0}

    _, decisions = walk(policy, constant, 150)
    sizes = [d.batch_size for d in decisions]
    # All adaptive ones start at their smallest size.
    assert sizes == sorted(sizes)


@adaptive
def test_scale_of_the_loss(policy):
    """A loss times 10 changes gradients by 10 and their squares by 100.

    All but CABS are invariant: it asks for ten times the batch.
    """

    def scaled(update, size):
        values = noisy(7)(update, size)
        scales = dict.fromkeys(VALUES, 100.0)
        scales |= {"loss": 10.0}
        scales |= {"inner_product_test": 1.0, "orthogonality_test": 1.0}
        return {name: values[name] * scales[name] for name in VALUES}

    plain = [d.batch_size for d in walk(policy, noisy(7), 60)[1]]
    large = [d.batch_size for d in walk(policy, scaled, 60)[1]]
    if isinstance(policy, nk.CABS):
        assert sum(large) > 2 * sum(plain)
    else:
        assert large == plain


@with_bounds
def test_hysteresis_leaves_out_small_changes(policy):
    wide = replace(policy, hysteresis=0.5)
    sizes = [d.batch_size for d in walk(wide, noisy(8), 120)[1]]
    changes = [(a, b) for a, b in itertools.pairwise(sizes) if a != b]
    assert changes
    assert all(abs(b - a) >= 0.5 * a for a, b in changes)


@every_policy
def test_policies_are_frozen_and_print_their_rule(policy):
    name = fields(policy)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(policy, name, 3)
    text = str(policy)
    assert type(policy).rule in text
    for refused in type(policy).refuses:
        assert refused in text
    for need in policy.needs:
        assert f"needs: {need.name}, every {need.every}" in text


def test_policies_of_one_example_are_refused_where_variance_is_needed():
    for kind in POLICIES:
        if issubclass(kind, Adaptive):
            with pytest.raises(nk.NoisekitError, match="one example has no variance"):
                kind(min=1)
            with pytest.raises(nk.NoisekitError, match=r"within \[min, max\]"):
                kind(min=8, max=16, batch_size=4)

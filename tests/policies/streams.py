"""Policies of every kind, and streams of observations to feed them."""

import random
from collections.abc import Sequence
from dataclasses import replace

import noisekit as nk
from noisekit.policies import Policy

EACH = nk.At(epochs=1)

EXAMPLES: tuple[Policy, ...] = (
    nk.Constant(32),
    nk.Table((16, 64, 32), every=nk.At(updates=7), cyclic=True),
    nk.Table((16, 64), at=[nk.At(share=0.5)]),
    nk.Growth(16, factor=1.5, every=EACH, max=300, beyond="rate"),
    nk.AdaBatch(16, every=EACH, max=256),
    nk.GrowInsteadOfDecay(16, at=[nk.At(epochs=1), nk.At(epochs=3)], max=256),
    nk.CABS(min=4, max=512),
    nk.CABS(min=4, max=512, hysteresis=0.2, moments="conv_compat"),
    nk.NormTest(min=4, max=512, theta=0.3),
    nk.NormTest(min=4, max=512, theta=0.3, smoothing=0.8, population_size=1000),
    nk.InnerProductTest(min=4, max=512, theta=0.2, nu=1.0, every=nk.At(updates=5)),
    nk.NoiseScaleTarget(min=4, max=512, min_readings=3),
    nk.NoiseScaleTarget(min=4, max=512, every=nk.At(examples=40), min_readings=3),
    nk.GradientThreshold(min=4, max=512, min_readings=3, rate=0.7, smoothing=0.5),
    nk.Kicks(
        batch_size=64, small=8, criterion=nk.RelativeDecrease(window=1, below=0.5)
    ),
    nk.Kicks(
        batch_size=64,
        small=8,
        cooldown=nk.At(updates=0),
        length=nk.At(updates=4),
        every=nk.At(updates=6),
        criterion=nk.Progress(window=2, below=200.0),
        patience=2,
    ),
)


def label(policy: Policy) -> str:
    """Return a name for the parametrised test."""
    return f"{policy.name}-{EXAMPLES.index(policy)}"


def walk(policy, observe, num_updates, *, num_examples=400, state=None, seen=None):
    """Ask the policy before every update, with what ``observe(update, size)`` says.

    Returns:
        The states and the decisions, one per update.
    """
    state = policy.start() if state is None else state
    seen = nk.Observation(share=0.0) if seen is None else seen
    states, decisions = [], []
    for _ in range(num_updates):
        state, decision = policy.next(state, seen)
        states.append(state)
        decisions.append(decision)
        seen = after(seen, decision, observe, num_examples, num_updates)
    return states, decisions


def after(seen, decision, observe, num_examples, num_updates):
    """Return what is observed once the decision's update has been taken."""
    updates = seen.updates + 1
    examples = seen.examples + decision.batch_size
    base = nk.Observation(
        updates=updates,
        examples=examples,
        epochs=examples / num_examples,
        share=min(1.0, updates / 100),
        batch_size=decision.batch_size,
        learning_rate=0.1 * decision.rate_factor,
    )
    return replace(base, **observe(updates, decision.batch_size))


VALUES = (
    "loss",
    "variance_trace",
    "conv_compat_variance",
    "grad_sq_norm",
    "debiased_grad_sq_norm",
    "inner_product_test",
    "orthogonality_test",
)


def noisy(seed: int, gap: float = 0.0, bad: Sequence[float | None] = (None,)):
    """Return readings of a falling loss that depend on the update and the size alone.

    Args:
        seed: Of the draws.
        gap: Share of values that are one of ``bad`` instead.
        bad: Values that stand for a missing one.
    """

    def observe(update: int, size: int) -> dict[str, float | None]:
        draw = random.Random(seed * 100_003 + update)  # of the update alone
        loss = 2.0 * 0.97**update * draw.uniform(0.8, 1.2)
        trace = 300.0 * draw.uniform(0.5, 1.5)
        signal = 20.0 * 0.95**update * draw.uniform(0.2, 1.8) - 0.5
        values = {
            "loss": loss,
            "variance_trace": trace,
            "conv_compat_variance": 0.9 * trace,
            "grad_sq_norm": abs(signal) + trace / size,
            "debiased_grad_sq_norm": signal,
            "inner_product_test": draw.uniform(0.05, 0.6),
            "orthogonality_test": draw.uniform(0.2, 3.0),
        }
        return {
            name: draw.choice(bad) if draw.random() < gap else value
            for name, value in values.items()
        }

    return observe

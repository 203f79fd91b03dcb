"""Advice about batch sizes: the trade-off, its interval, and what limits it."""

import math
import re

import pytest
import torch
from torch import nn

import noisekit as nk
from noisekit.core.results import Status


def watched(*, steps=60, signal=1.0, optimizer="SGD", norm=False, size=32, **options):
    """Train so many steps on data with a signal of this strength; return the probe."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 1, bias=False)]
    nn.init.zeros_(layers[0].weight)  # the gradient is that of the signal
    if norm:
        layers.insert(0, nn.BatchNorm1d(5))
    model = nn.Sequential(*layers).double()
    chosen = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-6)
    truth = signal * torch.ones(5, 1).double()
    with nk.attach(model, chosen, **options) as probe:
        for _ in range(steps):
            inputs = torch.randn(size, 5).double()
            targets = inputs @ truth + torch.randn(size, 1).double()
            chosen.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            chosen.step()
    return probe


def test_resolved_advice_is_the_trade_off_at_the_noise_scale():
    probe = watched()
    advice = probe.advise()
    scale = probe.simple_noise_scale()
    assert advice.noise_scale == scale
    # tr Σ = 4 E[y²|x|²] - |G|² = 160 - 20 and |G|² = 20, at weights of zero.
    assert advice.interval.contains(7.0)
    assert advice.interval.high < 10
    table = advice.table().set_index("batch_size")
    for size, row in table.iterrows():
        assert row["steps"] == 1 + scale.value / size
        assert row["examples"] == 1 + size / scale.value
        # In units of the fewest, (S - 1)(E - 1) = 1.
        assert (row["steps"] - 1) * (row["examples"] - 1) == pytest.approx(1)
        assert row["steps_low"] <= row["steps"] <= row["steps_high"]
        assert row["examples_low"] <= row["examples"] <= row["examples_high"]
    assert table.loc[32.0, "present"]
    assert table["present"].sum() == 1
    low, high = advice.interval.low, advice.interval.high
    assert f"95 % interval {low:,.4g} to {high:,.4g}" in advice.sentence
    assert "the present batch of 32" in advice.sentence
    text = str(advice)
    assert text.startswith(advice.sentence)
    assert len(re.findall(r"\(present\)", text)) == 1


def test_never_a_bare_number():
    """Whatever the readings, the words hold an interval, a bound, or a refusal."""
    for probe in (watched(), watched(signal=0.0), watched(steps=1), watched(steps=0)):
        sentence = probe.advise().sentence
        assert re.search(r"interval|no upper bound|do not resolve|No batch", sentence)


def test_noise_that_hides_the_signal():
    """Catches: a size advised from a ratio whose denominator is not resolved."""
    advice = watched(signal=0.0, steps=30).advise()
    assert math.isinf(advice.interval.high)
    assert advice.noise_scale.status in (Status.NOT_RESOLVED, Status.NO_SIGNAL)
    assert "not resolved: noise hides the gradient" in advice.limits[0]
    assert "interval" not in advice.sentence
    table = advice.table()
    assert table["steps_high"].isin([math.inf]).all()
    plot = nk.figures.batch_size_tradeoff(table)
    assert "no upper bound" in plot.caption


def test_nothing_read():
    advice = watched(steps=0).advise()
    assert advice.sentence == "No batch size can be advised: no step was read."
    assert "no step was read" in str(advice)
    assert len(advice.table()) == 0


def test_limits_are_named():
    few = watched(steps=5).advise().limits
    assert any("few steps: 5 readings, fewer than 20" in limit for limit in few)
    many = watched().advise().limits
    assert not any("few steps" in limit for limit in many)
    assert any("of steps 1 to 60" in limit for limit in many)
    adam = watched(optimizer="AdamW").advise().limits
    assert any("AdamW: the noise scale is about SGD" in limit for limit in adam)
    assert any("arXiv:2505.23971" in limit for limit in adam)
    assert not any("arXiv:2505.23971" in limit for limit in many)


@pytest.mark.filterwarnings("ignore::noisekit.core.errors.ProbeAdvice")
def test_batchnorm_is_named_and_its_noise_not_advised():
    advice = watched(norm=True).advise()
    assert any("BatchNorm couples the examples" in limit for limit in advice.limits)
    if advice.noise_scale.status is Status.UNAVAILABLE:
        assert advice.sentence.startswith("No batch size can be advised: ")


def test_window_and_candidates():
    probe = watched()
    advice = probe.advise(window=30, candidates=[10, 1000])
    assert list(advice.table()["batch_size"]) == [10.0, 32.0, 1000.0]
    assert any("of steps 31 to 60" in limit for limit in advice.limits)
    with pytest.raises(nk.NoisekitError, match="candidates needs batch sizes above 0"):
        probe.advise(candidates=[0])
    with pytest.raises(nk.NoisekitError, match="window"):
        probe.advise(window=0)


def test_last_reading_is_the_last():
    probe = watched(steps=3)
    assert probe.last_reading is not None
    assert probe.last_reading.step == 3
    assert probe.last_reading is probe.readings[-1]
    assert watched(steps=0).last_reading is None

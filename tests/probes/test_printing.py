"""What a probe and its readings look like when they are printed or looked at."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import ClosureError
from noisekit.integrations import attach
from noisekit.probes import Probe, Reading, self_check


def deep(num_layers: int = 30) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(num_layers)))


class _Scaled(nn.Module):
    """A parameter of its own, which is read by replaying the module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def probed(model: nn.Module, **options: object) -> Probe:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, **options) as probe:  # type: ignore[arg-type]
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    return probe


def loss_of(model: nn.Module) -> Tensor:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    return functional.cross_entropy(model(inputs), torch.arange(8) % 6)


def last(model: nn.Module, **options: object) -> Reading:
    return probed(model, **options).readings[-1]


def test_a_reading_is_printed_with_its_parts() -> None:
    """Catches: tensors and hundreds of parameters on the screen."""
    reading = last(deep(), quantities=("norm_test",))
    lines = str(reading).splitlines()
    assert lines[0] == "reading of step 2, 8 examples:"
    assert lines[1] == f"  |gradient|²: {reading.grad_sq_norm}"
    assert lines[2] == f"  tr Σ: {reading.variance_trace}"
    assert lines[3] == f"  |G|²: {reading.debiased_grad_sq_norm}"
    assert lines[4] == f"  simple noise scale: {reading.simple_noise_scale}"
    assert lines[5] == "  estimator: per_example"
    assert lines[6] == "  coverage: 60 parameters by linear"
    assert lines[7] == "  quantities: norm_test"
    assert len(lines) == 8


def test_a_reading_without_noise_is_printed_with_the_reason() -> None:
    """Catches: lines of NaN; a quantity that is missing without a word."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    lines = str(last(model, quantities=("norm_test",))).splitlines()
    assert lines[2].startswith("  coverage: no noise: BatchNorm in training mode")
    assert lines[3].startswith("  no norm_test: BatchNorm in training mode")
    assert "nan" not in "".join(lines)


def test_noise_in_tokens_is_printed_as_such() -> None:
    """Catches: a scale in tokens taken for one in sequences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6), nn.Flatten(0, 1))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    words = torch.arange(20).reshape(5, 4) % 6
    with attach(model, optimizer, loss_fn=loss_fn, unit="token") as probe:
        loss_fn(model(words), words.reshape(-1)).backward()
        optimizer.step()
    text = str(probe.readings[0])
    assert text.startswith("reading of step 1, 5 sequences:")
    assert "  simple noise scale in tokens: " in text
    assert str(probe.readings[0].tokens) == "20 tokens, 4 per effective sequence"


def test_what_a_notebook_shows_is_short() -> None:
    """Catches: a representation that lists every parameter of a large model."""
    probe = probed(deep(), quantities=("gsnr", "grad_histogram"))
    reading = probe.readings[-1]
    assert repr(probe) == "<Probe: 2 readings in 2 steps>"
    assert repr(reading) == (
        "Reading(step=2, batch_size=8, estimator='per_example', complete=True)"
    )
    assert repr(reading.coverage) == "Coverage(60 parameters by linear)"
    assert len(repr(reading.layers[0])) < 250
    assert repr(reading.quantities["gsnr"]) == "StepQuantity(61 values)"
    assert str(reading.quantities["gsnr"]) == f"{reading.quantities['gsnr'].estimate}"
    assert "tensor" not in repr(probe.gradient_norms)
    assert str(probe.gradient_norms).startswith("of examples: 16 values, median")


def test_the_curvature_forms_of_a_step_are_printed_as_their_scale() -> None:
    """Catches: a matrix on the screen."""
    model, loss_fn = deep(1), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(
        model, optimizer, loss_fn=loss_fn, quantities=("hessian_noise_scale",)
    ) as probe:
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
        loss_fn(model(inputs), torch.arange(16) % 6).backward()
        optimizer.step()
    forms = probe.readings[0].quantities["hessian_noise_scale"]
    assert repr(forms) == "HessianForms(chunk_size=2)"
    assert str(forms) == str(forms.estimate)


def test_many_replayed_modules_are_counted() -> None:
    """Catches: a line of coverage that names every block of a transformer."""
    few = nn.Sequential(nn.Linear(6, 6), *(_Scaled() for _ in range(3)))
    many = nn.Sequential(nn.Linear(6, 6), *(_Scaled() for _ in range(12)))
    ways = "replay of 1, replay of 2, replay of 3"
    assert str(last(few).coverage) == f"5 parameters by linear, {ways}"
    counted = "replay of 1 and of 11 more modules"
    assert str(last(many).coverage) == f"14 parameters by linear, {counted}"


def test_a_self_check_is_short() -> None:
    """Catches: an error for each parameter of a large model on the screen."""
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    found = self_check(deep(), functional.cross_entropy, (inputs, torch.arange(8) % 6))
    assert "weight" not in repr(found)
    assert len(repr(found)) < 300


def test_a_penalty_on_all_weights_names_some_of_them() -> None:
    """Catches: a message with all the names of a large model."""
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, on_error="raise") as probe:

        def backward() -> None:
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters())
            (loss_of(model) + penalty).backward()
            optimizer.step()

        backward()
        with pytest.raises(ClosureError, match=r"2\.weight and 55 more\. A penalty on"):
            backward()
        reason = probe.readings[0].coverage.reason
    assert reason is not None
    assert reason.endswith("0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 55 more")

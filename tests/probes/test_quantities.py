"""What a probe computes of the same pass, against per-example gradients by a loop."""

from collections.abc import Callable

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import SumGradSquared
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.vocabulary import QuantityName
from noisekit.integrations import attach
from noisekit.noise import SampleTest
from noisekit.noise.step_quantity import HessianForms, StepQuantity
from noisekit.probes.step_metrics.metric_set import METRICS
from tests.probes.quantity_problems import (
    ALL,
    MODELS,
    RATE,
    N,
    one_step,
    problem,
    rows_of,
    value,
)
from tests.reference import noise as reference

BY_ROWS: dict[str, Callable[[Tensor], float]] = {
    "norm_test": reference.norm_test,
    "inner_product_test": reference.inner_product_test,
    "orthogonality_test": reference.orthogonality_test,
    "gradient_diversity": reference.gradient_diversity,
    "gsnr": reference.signal_to_noise,
    "evidence_stopping": lambda rows: 1 - N * reference.signal_to_noise(rows),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"exact_bits": False}, {"estimator": ("chunks", "per_example")}],
    ids=["exact bits", "replaced gradients", "beside chunks"],
)
def test_criteria_match_one_backward_per_example(
    name: str, options: dict[str, object]
) -> None:
    """In total and per parameter, in float64, whatever else is read.

    Catches: cross terms of shared weights dropped, the tangent of another parameter,
    squares of sums for sums of squares, the denominator n for n - 1.
    """
    model, inputs, targets = problem(name)
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    names: tuple[QuantityName, ...] = tuple(BY_ROWS)  # type: ignore[assignment]
    reading, _ = one_step(model, (inputs, targets), names, **options)
    assert not reading.coverage.missing
    chunked = reading.estimator.startswith("chunks")
    for quantity, of_rows in BY_ROWS.items():
        if chunked and quantity in ("norm_test", "gradient_diversity"):
            continue  # from the reading's own noise, which is then that of chunks
        found = reading.quantities[quantity]
        assert isinstance(found, StepQuantity)
        assert found.value == pytest.approx(of_rows(rows_of(grads)), rel=1e-8), quantity
        by_layer = dict(zip(reading.coverage.methods, found.layers, strict=True))
        for layer, rows in grads.items():
            wanted = of_rows(rows.reshape(N, -1))
            assert by_layer[layer].value == pytest.approx(wanted, rel=1e-7), (
                quantity,
                layer,
            )


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_peer_agrees_until_gradients_are_accumulated(parts: int) -> None:
    """BackPACK's second moments, in the definition that Cockpit takes of them.

    The variance divides by n there, and after a second micro-batch the second moments
    are those of that one alone, against the gradient of both.
    """
    model, inputs, targets = problem("mlp")
    names: tuple[QuantityName, ...] = ("gsnr",)
    wanted = value(one_step(model, (inputs, targets), names)[0], "gsnr")
    model, inputs, targets = problem("mlp")
    extend(model)
    loss_fn = extend(nn.CrossEntropyLoss())
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        with backpack(SumGradSquared()):
            (loss_fn(model(x), y) / parts).backward()
    total, count = 0.0, 0
    for parameter in model.parameters():
        mean, squares = parameter.grad, parameter.sum_grad_squared
        assert mean is not None
        variance = N * squares - mean.square()
        varies = variance > 1e-12
        total += float((mean.square() / variance)[varies].sum())
        count += int(varies.sum())
    biased = (N - 1) / N * total / count
    if parts == 1:
        assert biased == pytest.approx(wanted, rel=1e-9)
    else:
        assert biased != pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_cabs_matches_its_definition(name: str) -> None:
    """``η ξ / F`` with the biased variance, per parameter and in total.

    Catches: the unbiased variance, a loss of another scale.
    """
    model, inputs, targets = problem(name)
    loss_fn = functional.cross_entropy
    grads = reference.example_gradients(model, loss_fn, inputs, targets)
    loss = float(loss_fn(model(inputs), targets).detach())
    reading, _ = one_step(model, (inputs, targets), ["cabs"])
    wanted = RATE * reference.biased_variance_trace(rows_of(grads)) / loss
    assert value(reading, "cabs") == pytest.approx(wanted)
    found = reading.quantities["cabs"]
    assert isinstance(found, StepQuantity)
    by_layer = dict(zip(reading.coverage.methods, found.layers, strict=True))
    for layer, rows in grads.items():
        part = RATE * reference.biased_variance_trace(rows.reshape(N, -1)) / loss
        assert by_layer[layer].value == pytest.approx(part), layer


def test_every_group_s_learning_rate_counts_for_its_own_parameters() -> None:
    """Catches: the first group's rate for all."""
    model, inputs, targets = problem("mlp")
    loss_fn = functional.cross_entropy
    grads = reference.example_gradients(model, loss_fn, inputs, targets)
    loss = float(loss_fn(model(inputs), targets).detach())
    optimizer = torch.optim.SGD(
        [{"params": p, "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
    )
    probe = attach(model, optimizer, loss_fn=loss_fn, quantities="cabs")
    probe.loss_fn(model(inputs), targets).backward()
    optimizer.step()
    wanted = sum(
        0.1 * (i + 1) * reference.biased_variance_trace(rows.reshape(N, -1)) / loss
        for i, rows in enumerate(grads.values())
    )
    assert value(probe.readings[-1], "cabs") == pytest.approx(wanted)


def position_moment(conv: nn.Conv2d, inputs: Tensor, output_grads: Tensor) -> float:
    """Sum over examples and positions of squared patch times squared gradient."""
    total, channels = 0.0, conv.out_channels // conv.groups
    padded = functional.pad(inputs, [conv.padding[0]] * 4, mode="constant")  # type: ignore[list-item]
    if conv.padding_mode == "circular":
        padded = functional.pad(inputs, [conv.padding[0]] * 4, mode="circular")  # type: ignore[list-item]
    size, step = conv.kernel_size[0], conv.stride[0]
    width = conv.in_channels // conv.groups
    for x, z in zip(padded, output_grads, strict=True):
        for i in range(z.shape[1]):
            for j in range(z.shape[2]):
                patch = x[:, i * step : i * step + size, j * step : j * step + size]
                for g in range(conv.groups):
                    own = patch[g * width : (g + 1) * width].square().sum()
                    grad = z[g * channels : (g + 1) * channels, i, j].square().sum()
                    total += float(own * grad)
    return total


def test_the_official_moment_counts_positions_apart() -> None:
    """Squares inside the weight gradient; exact for the dense layer behind.

    Catches: the exact moment under the other's name, biases left exact, the factor n.
    """
    model, inputs, targets = problem("conv")
    assert isinstance(model, nn.Sequential)
    loss_fn = functional.cross_entropy
    grads = reference.example_gradients(model, loss_fn, inputs, targets)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    hidden = inputs
    for index, layer in enumerate(model):
        before, hidden = hidden, layer(hidden)
        hidden.retain_grad()
        seen[index] = (before, hidden)
    loss = loss_fn(hidden, targets)
    loss.backward()
    wanted = 0.0
    for name, rows in grads.items():
        index = int(name.partition(".")[0])
        layer, exact = model[index], rows.reshape(N, -1)
        second = float(exact.square().mean(0).sum())
        if isinstance(layer, nn.Conv2d):
            before, after = seen[index]
            assert after.grad is not None
            # Gradients of a mean: n squares of parts that are 1/n each.
            if name.endswith("weight"):
                second = N * position_moment(layer, before.detach(), after.grad)
            else:
                second = N * float(after.grad.square().sum())
        wanted += second - float(exact.mean(0).square().sum())
    wanted *= RATE / float(loss.detach())
    model.zero_grad()
    reading, _ = one_step(model, (inputs, targets), ["cabs_conv_compat", "cabs"])
    assert value(reading, "cabs_conv_compat") == pytest.approx(wanted)
    assert value(reading, "cabs") != pytest.approx(wanted, rel=0.02)


def test_without_convolutions_both_forms_of_cabs_agree() -> None:
    model, inputs, targets = problem("mlp")
    reading, _ = one_step(model, (inputs, targets), ["cabs_conv_compat", "cabs"])
    assert value(reading, "cabs_conv_compat") == value(reading, "cabs")


def test_norms_of_single_examples_are_counted_over_the_run() -> None:
    """Catches: norms of contributions, smaller by n; steps that replace each other."""
    model, inputs, targets = problem("mlp")
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    norms = rows_of(grads).norm(dim=1)
    mean = float(rows_of(grads).mean(0).norm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer, quantities="grad_histogram")
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    last = probe.readings[-1]
    assert value(last, "example_grad_norm_max") == pytest.approx(float(norms.max()))
    median = value(last, "example_grad_norm_median")
    assert median == pytest.approx(float(norms.quantile(0.5)))
    upper = value(last, "example_grad_norm_q95")
    assert upper == pytest.approx(float(norms.quantile(0.95)))
    found = probe.gradient_norms
    assert int(found.examples.counts.sum()) == 3 * N
    assert int(found.batches.counts.sum()) == 3
    ratio = found.examples.bin_ratio
    assert found.batches.quantile(0.5) == pytest.approx(mean, rel=ratio - 1)
    in_the_middle = norms.sort().values[N // 2 - 1 : N // 2 + 1]
    assert float(in_the_middle[0]) / ratio < found.examples.quantile(0.5)
    assert found.examples.quantile(0.5) < float(in_the_middle[1]) * ratio


def test_a_statistic_becomes_a_test_with_any_limit() -> None:
    """Catches: the batch size that would pass, wrong by a square."""
    model, inputs, targets = problem("mlp")
    reading, _ = one_step(model, (inputs, targets), ["norm_test"])
    theta = value(reading, "norm_test")
    test = SampleTest.of_statistic(theta, reading.batch_size, limit=theta / 2)
    assert not test.passed
    assert test.batch_size == pytest.approx(4 * N)


def test_over_the_whole_data_diversity_is_the_noise_scale() -> None:
    """``n Δ = 1 + B_simple`` with the whole set as the batch, exactly.

    ``B_simple`` of a finite set divides by n; that of a reading is of its population.
    """
    model, inputs, targets = problem("mlp")
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    rows = rows_of(grads)
    reading, _ = one_step(model, (inputs, targets), ["gradient_diversity"])
    scale = reference.biased_variance_trace(rows) / float(rows.mean(0).square().sum())
    assert N * value(reading, "gradient_diversity") == pytest.approx(1 + scale)


def test_rows_have_the_same_columns_whatever_is_missing() -> None:
    """At the first step there is no cosine, and later no Hessian.

    Catches: a table that gets new columns after its first row.
    """
    model, inputs, targets = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    probe = attach(
        model,
        optimizer,
        loss_fn=functional.cross_entropy,
        quantities=ALL,
        hessian_every=2,
        num_chunks=3,
    )
    for _ in range(3):
        optimizer.zero_grad()
        probe.loss_fn(model(inputs), targets).backward()
        optimizer.step()
    columns = [set(reading.row()) for reading in probe.readings]
    assert columns[0] == columns[1] == columns[2]
    assert {
        name for metric in METRICS.values() for name in metric.columns()
    } <= columns[0]
    first, second, third = (reading.coverage.missing for reading in probe.readings)
    assert first == {
        "gradient_cosine": "there is no earlier reading to compare the gradient with"
    }
    assert second == {"hessian_noise_scale": "it is read once in 2 readings"}
    assert third == {}
    forms = probe.readings[2].quantities["hessian_noise_scale"]
    assert isinstance(forms, HessianForms)
    assert forms.values.shape == (3, 3)


def test_no_quantity_waits_for_the_device() -> None:
    """On the meta device every transfer to the host raises.

    Catches: a branch on a value, a Python number made of a tensor.
    """
    for name in ("mlp", "conv", "tied"):
        model, inputs, targets = problem(name)
        model = model.float().to("meta")
        reading, _ = one_step(
            model,
            (inputs.float().to("meta"), targets.to("meta")),
            hessian_every=1,
            num_chunks=3,
        )
        assert set(reading.coverage.missing) == {"gradient_cosine"}
        assert all(q.values.is_meta for q in reading.quantities.values())

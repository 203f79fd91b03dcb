"""Quantities of the same pass in loops as people write them."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.vocabulary import QuantityName
from noisekit.integrations import attach
from noisekit.noise import norm_statistic
from noisekit.probes import Probe
from tests.probes.quantity_problems import ALL, RATE, N, problem, rows_of, value
from tests.reference import noise as reference

OF_ANY_LOOP: tuple[QuantityName, ...] = (
    "norm_test",
    "gradient_diversity",
    "cabs",
    "gsnr",
    "evidence_stopping",
    "grad_histogram",
    "update_size",
    "distance_from_start",
)


def optimizer_of(model: nn.Module, rate: float = RATE) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate)


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def columns(probe: Probe) -> dict[str, float]:
    """The last reading's quantities, as a table has them."""
    reading = probe.readings[-1]
    return {name: value(reading, name) for name in reading.quantities}


def whole_batch() -> dict[str, float]:
    model, inputs, targets = problem("mlp")
    loss_fn = functional.cross_entropy
    optimizer = optimizer_of(model)
    probe = attach(model, optimizer, loss_fn=loss_fn, quantities=OF_ANY_LOOP)
    probe.loss_fn(model(inputs), targets).backward()
    optimizer.step()
    assert not probe.readings[-1].coverage.missing
    return columns(probe)


@pytest.mark.parametrize("num_parts", [2, 3, 4])
def test_accumulation_changes_nothing(num_parts: int) -> None:
    """The same examples in several micro-batches.

    Catches: second moments of the last micro-batch against the whole gradient, as in
    Cockpit, whose norm test falls from 1.21 to 0.70 so.
    """
    model, inputs, targets = problem("mlp")
    loss_fn = functional.cross_entropy
    optimizer = optimizer_of(model)
    probe = attach(model, optimizer, loss_fn=loss_fn, quantities=OF_ANY_LOOP)
    for x, y in zip(inputs.chunk(num_parts), targets.chunk(num_parts), strict=True):
        (probe.loss_fn(model(x), y) / num_parts).backward()
    optimizer.step()
    assert columns(probe) == pytest.approx(whole_batch(), rel=1e-5)


def test_peers_read_the_last_micro_batch_against_the_whole_gradient() -> None:
    """What goes wrong then: the statistic shrinks with the number of micro-batches."""
    model, inputs, targets = problem("mlp")
    grads = reference.example_gradients(
        model, functional.cross_entropy, inputs, targets
    )
    rows = rows_of(grads)
    whole, truth = rows.mean(0).square().sum(), reference.norm_test(rows)
    last = rows[-N // 4 :] / N
    found = float(norm_statistic(last.square().sum(), whole, 4 / N))
    assert found != pytest.approx(truth, rel=0.2)


def test_sum_losses_and_loss_scaling_change_nothing() -> None:
    """The mean gradient's quantities, whatever the loop multiplies.

    Catches: a loss scale in CABS or in the histogram; a factor n of a sum, also in the
    learning rate, which is of a step along the mean gradient.
    """
    model, inputs, targets = problem("mlp")
    optimizer = optimizer_of(model, RATE / N)
    probe = attach(
        model,
        optimizer,
        loss_fn=summed,
        loss_reduction="sum",
        quantities=OF_ANY_LOOP,
    )
    probe.loss_fn(model(inputs), targets).backward()
    optimizer.step()
    wanted = whole_batch()
    assert columns(probe) == pytest.approx(wanted, rel=1e-5)

    model, inputs, targets = problem("mlp")
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    probe = attach(
        model,
        optimizer,
        loss_fn=functional.cross_entropy,
        scaler=scaler,
        quantities=OF_ANY_LOOP,
    )
    scaler.scale(probe.loss_fn(model(inputs), targets)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert columns(probe) == pytest.approx(wanted, rel=1e-5)


def test_positions_apart_are_read_in_any_loop() -> None:
    """The official moment of convolutions, accumulated, scaled and summed.

    Catches: a loss scale or a factor n in the sums; the last micro-batch alone.
    """

    def cabs(loss_fn: Callable[[Tensor, Tensor], Tensor], parts: int) -> float:
        model, inputs, targets = problem("conv")
        summing = loss_fn is summed
        optimizer = optimizer_of(model, RATE / N if summing else RATE)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=parts > 1)
        probe = attach(
            model,
            optimizer,
            loss_fn=loss_fn,
            loss_reduction="sum" if summing else "mean",
            quantities="cabs_conv_compat",
            scaler=scaler,
        )
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            loss = probe.loss_fn(model(x), y) / (1 if summing else parts)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        return value(probe.readings[-1], "cabs_conv_compat")

    wanted = cabs(functional.cross_entropy, 1)
    assert cabs(functional.cross_entropy, 3) == pytest.approx(wanted, rel=1e-5)
    assert cabs(summed, 1) == pytest.approx(wanted, rel=1e-5)
    assert cabs(summed, 2) == pytest.approx(wanted, rel=1e-5)


def test_inner_products_need_the_whole_gradient_at_hand() -> None:
    """Catches: a direction that is the gradient of the last micro-batch, or half."""
    model, inputs, targets = problem("mlp")
    optimizer = optimizer_of(model)
    names: tuple[QuantityName, ...] = ("inner_product_test", "orthogonality_test")
    probe = attach(model, optimizer, quantities=names)
    for x, y in zip(inputs.chunk(2), targets.chunk(2), strict=True):
        (functional.cross_entropy(model(x), y) / 2).backward()
    optimizer.step()
    reading = probe.readings[-1]
    reason = (
        "the step's gradient is known only after its last micro-batch, when the "
        "examples of earlier ones are gone"
    )
    assert dict(reading.coverage.missing) == dict.fromkeys(names, reason)
    assert not reading.quantities
    assert math.isnan(float(reading.row()["inner_product_test"]))


def test_class_weights_count_in_every_criterion() -> None:
    """Examples that weigh unequally, in total and parameter by parameter.

    Catches: 1/n for the sum of squared weights, an unweighted loss in CABS.
    """
    model, inputs, targets = problem("mlp")
    chosen = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    loss_fn = nn.CrossEntropyLoss(weight=chosen)
    parts = rows_of(reference.contributions(model, loss_fn, [inputs], targets))
    weights = chosen[targets] / chosen[targets].sum()
    rows, share = parts / weights[:, None], float(weights.square().sum())
    sq_norm = float(parts.sum(0).square().sum())
    loss = float(loss_fn(model(inputs), targets).detach())

    def relative_error(rows: Tensor) -> float:
        trace, _ = reference.unit_noise(rows, weights)
        return share * trace

    along = (rows @ parts.sum(0))[:, None]
    ratios = []
    for column in rows.T:
        variance, _ = reference.unit_noise(column[:, None], weights)
        if abs(variance) > 1e-12:
            ratios.append(float((weights * column).sum() ** 2) / variance)
    wanted = {
        "norm_test": (relative_error(rows) / sq_norm) ** 0.5,
        "inner_product_test": relative_error(along) ** 0.5 / sq_norm,
        "gsnr": sum(ratios) / len(ratios),
        "evidence_stopping": 1 - sum(ratios) / len(ratios) / share,
        "cabs": RATE * (1 - share) * relative_error(rows) / share / loss,
    }
    optimizer = optimizer_of(model)
    names: tuple[QuantityName, ...] = tuple(wanted)  # type: ignore[assignment]
    probe = attach(model, optimizer, loss_fn=loss_fn, quantities=names)
    loss_fn(model(inputs), targets).backward()
    optimizer.step()
    found = columns(probe)
    del found["debiased_gsnr"]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_compiled_model_says_why_its_layers_are_not_read() -> None:
    """Per-parameter means still work: what moves, and what accumulation tells.

    Catches: numbers of layers whose calls were not seen.
    """
    model, inputs, targets = problem("mlp")
    compiled = torch.compile(model, backend="eager")
    optimizer = optimizer_of(model)
    names: tuple[QuantityName, ...] = ("gsnr", "norm_test", "update_size")
    probe = attach(compiled, optimizer, quantities=names)
    for x, y in zip(inputs.chunk(3), targets.chunk(3), strict=True):
        (functional.cross_entropy(compiled(x), y) / 3).backward()
    optimizer.step()
    reading = probe.readings[-1]
    assert set(reading.quantities) == {"norm_test", "update_size"}
    assert (
        "torch.compile keeps the calls of layers to itself"
        in (reading.coverage.missing["gsnr"])
    )


class Droppy(nn.Module):
    """Dropout and BatchNorm: random numbers and buffers to be given back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(torch.relu(self.norm(self.first(x)))))
        return out


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_reference_run_is_the_same(batch_norm: bool, attached: bool) -> None:
    """Parameters, buffers and random state after six steps, bit for bit.

    Catches: a replay that draws random numbers, updates running statistics, or leaves
    its gradients; norms that write to what they read.
    """

    def run(probed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Droppy()
        if not batch_norm:
            model.norm.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loss_fn = functional.cross_entropy
        if probed:
            probe = attach(
                model,
                optimizer,
                loss_fn=loss_fn,
                quantities=ALL,
                hessian_every=2,
                num_chunks=3,
                estimator=("ghost", "auto") if batch_norm else "auto",
                ghost_batch=2,
            )
            loss_fn = probe.loss_fn  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            inputs = torch.randn(N, 5, generator=generator)
            targets = torch.randint(3, (N,), generator=generator)
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
        return [*model.state_dict().values(), torch.get_rng_state()]

    for mine, plain in zip(run(attached), run(False), strict=True):
        assert torch.equal(mine, plain)


def test_coupled_examples_have_no_quantities_of_their_own() -> None:
    """BatchNorm in training mode: the reason is said, and what exists is read."""
    torch.manual_seed(0)
    model = Droppy()
    optimizer = optimizer_of(model)
    names: tuple[QuantityName, ...] = (
        "norm_test",
        "gsnr",
        "inner_product_test",
        "grad_histogram",
        "hessian_noise_scale",
    )
    loss_fn = functional.cross_entropy
    probe = attach(model, optimizer, loss_fn=loss_fn, quantities=names)
    for seed in range(2):
        inputs = torch.randn(N, 5, generator=torch.Generator().manual_seed(seed))
        (probe.loss_fn(model(inputs), torch.arange(N) % 3) / 2).backward()
    optimizer.step()
    reading = probe.readings[-1]
    coupled = "BatchNorm in training mode couples the examples (norm)"
    assert reading.estimator == f"accumulation({N})"
    assert value(reading, "norm_test") > 0
    missing = reading.coverage.missing
    assert missing["gsnr"] == missing["inner_product_test"] == coupled
    assert missing["hessian_noise_scale"] == coupled
    assert missing["grad_histogram"] == (
        "the examples' own norms are read by estimator='per_example' only"
    )


def test_a_resumed_run_goes_on_with_its_histogram_and_has_no_start() -> None:
    """Catches: a distance from the checkpoint under the name of that from the start."""
    model, inputs, targets = problem("mlp")
    optimizer = optimizer_of(model)
    names: tuple[QuantityName, ...] = ("grad_histogram", "distance_from_start")

    def steps(probe: Probe, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    with attach(model, optimizer, quantities=names) as probe:
        steps(probe, 2)
        state = copy.deepcopy(probe.state_dict())
        steps(probe, 1)
        wanted = probe.gradient_norms.batches.counts.sum()
    with attach(model, optimizer, quantities=names) as probe:
        probe.load_state_dict(state)
        steps(probe, 1)
        assert probe.gradient_norms.batches.counts.sum() == wanted
        missing = probe.readings[-1].coverage.missing
    assert dict(missing) == {
        "distance_from_start": "training had begun before the probe was attached"
    }


def test_lower_precision_is_read_in_float32() -> None:
    """Under bfloat16 autocast: finite, and close to full precision."""
    model, inputs, targets = problem("conv")
    model, inputs = model.float(), inputs.float()
    optimizer = optimizer_of(model)
    names: tuple[QuantityName, ...] = (
        "norm_test",
        "inner_product_test",
        "orthogonality_test",
        "gsnr",
    )
    found = []
    for enabled in (False, True):
        with attach(model, optimizer, quantities=names) as probe:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                functional.cross_entropy(model(inputs), targets).backward()
            optimizer.param_groups[0]["lr"] = 0.0
            optimizer.step()
            found.append(columns(probe))
            assert not probe.readings[-1].coverage.missing
    assert found[1] == pytest.approx(found[0], rel=0.1)

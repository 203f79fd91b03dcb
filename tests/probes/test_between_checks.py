"""What changes between two gradient-sum checks is noticed, at once or soon."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from noisekit.integrations import attach
from noisekit.probes import Reading
from noisekit.probes.probe import CHECK_EVERY
from tests.reference import noise as reference

X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3
Change = Callable[[nn.Module], object]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model.double()


def trained(change: Change, *, steps: int) -> tuple[nn.Module, list[Reading]]:
    """Readings of steps that move nothing, with a change before the fifth."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer) as probe:
        for step in range(steps):
            if step == 4:
                change(model)
            optimizer.zero_grad()
            functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    return model, probe.readings


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", amount=0.5)


def patched(model: nn.Module) -> None:
    first = model[0]
    first.forward = lambda x: 0.25 * functional.linear(x, first.weight, first.bias)


def parametrised(model: nn.Module) -> None:
    parametrizations.spectral_norm(model[2])


def hooked(model: nn.Module) -> None:
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))


@pytest.mark.parametrize(
    "change", [pruned, patched, parametrised, hooked], ids=lambda f: f.__name__
)
def test_another_structure_is_noticed_at_its_step(change: Change) -> None:
    """Every reading is right, or says why it is none.

    Catches: rules and hooks of the model as it was when the probe was attached.
    """
    model, readings = trained(change, steps=8)
    # Power iterations move the weights of a forward pass a little.
    expected = _expected(model)
    read = [r for r in readings[4:] if r.coverage.complete]
    assert read
    for reading in read:
        assert reading.variance_trace.value == pytest.approx(expected, rel=1e-2)


def _expected(model: nn.Module) -> float:
    """By one backward pass per example."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for loss in functional.cross_entropy(model(X), Y, reduction="none"):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return reference.variance_trace([torch.stack(rows)])


def test_scaled_gradients_are_noticed_at_their_step() -> None:
    """A hook on a parameter changes ``.grad``, which nothing in the graph explains.

    Catches: signatures of modules alone.
    """

    def scaled(model: nn.Module) -> None:
        model[0].weight.register_hook(lambda grad: 0.1 * grad)

    _, readings = trained(scaled, steps=6)
    assert readings[3].coverage.complete
    assert not readings[4].coverage.complete


def test_a_penalty_is_noticed_within_a_bounded_number_of_readings() -> None:
    """Nothing in the model's structure shows it.

    Catches: checks that become ever rarer; a check of every reading, which costs.
    """
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer)
    checked = []

    def step(penalty: float) -> None:
        checked.append(probe._recorder.wanted.closure)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X), Y)
        loss = loss + penalty * model[0].weight.square().sum()
        loss.backward()
        optimizer.step()

    for _ in range(CHECK_EVERY + 2):
        step(0.0)
    assert sum(checked) == 4  # readings 1, 2, 11 and 101
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(CHECK_EVERY):
            step(0.1)
    assert not probe.readings[-1].coverage.complete


# ----------------------------------------------------------- gradients and their steps


def test_clipping_through_data_is_seen() -> None:
    """Catches: factor 1 where only writes that autograd counts are looked at."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            (30 * functional.cross_entropy(model(X), Y)).backward()
            before = _norm(model)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.data.clamp_(-0.05, 0.05)
            expected = _norm(model) / before
            optimizer.step()
            factor = probe.readings[-1].clip_factor
            assert factor is not None
            assert float(factor) == pytest.approx(expected)


def _norm(model: nn.Module) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


def test_zeroing_through_data_starts_a_new_step() -> None:
    """Catches: gradients of the step before that are said not to be zeroed."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer) as probe:
        for _ in range(4):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.data.zero_()
            functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    assert all(reading.coverage.complete for reading in probe.readings)


class Logged(torch.optim.SGD):
    """Calls the step of its base, which has hooks of its own."""

    fails = False

    def step(self, closure: Callable[[], float] | None = None) -> Tensor | None:
        if self.fails:
            raise KeyError("planted")
        return super().step(closure)  # type: ignore[return-value]


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_inside_a_step_is_one(with_closure: bool) -> None:
    """Also after a step that has failed.

    Catches: steps 1, 3, 5, ...; a depth that an exception leaves behind.
    """
    torch.optim.SGD(network().parameters(), lr=0.1)  # gives the base its hooks
    model = network()
    optimizer = Logged(model.parameters(), lr=0.1)
    probe = attach(model, optimizer, every=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    def step() -> None:
        if with_closure:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()

    for number in range(6):
        optimizer.fails = number == 2
        if optimizer.fails:
            with pytest.raises(KeyError):
                step()
        else:
            step()
    assert probe.step == 5
    assert [reading.step for reading in probe.readings] == [1, 3, 5]

"""Gradient rules, against slow references in double precision."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from noisekit.train.data.section import TensorPair
from noisekit.train.data.update_batches import UpdateBatches
from noisekit.train.gradients import GradientRules, TrustRatio
from noisekit.train.gradients.adversarial import Adversarial
from noisekit.train.gradients.gradient_penalty import GradientPenalty
from noisekit.train.gradients.proximal import Proximal
from noisekit.train.gradients.step import GradientStep
from noisekit.train.gradients.terms import passes_per_update

NUM = 12


def network(*, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 6)]
    layers += [nn.BatchNorm1d(6)] if norm else []
    layers += [nn.Tanh()]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(6, 3)).double()


def data() -> TensorPair:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(NUM, 4, generator=generator, dtype=torch.float64)
    return TensorPair(inputs, torch.randint(3, (NUM,), generator=generator))


def step_of(
    model: nn.Module,
    *,
    microbatch: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    draws: tuple[int, ...] | None = None,
) -> GradientStep:
    batches = UpdateBatches(data(), seed=0, device="cpu")
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    batch = batches.batch(0, NUM, microbatch=microbatch)
    return GradientStep(model, cross_entropy, optimizer, batch, draws)


def parts_of(step: GradientStep) -> list[tuple[Tensor, Tensor]]:
    return [(part.inputs, part.targets) for part in step.batch]


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    loss = cross_entropy(model(inputs), targets)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def mean_of(gradients: Sequence[list[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
    return [
        sum(size * part[i] for part, size in zip(gradients, sizes, strict=True))
        / sum(sizes)
        for i in range(len(gradients[0]))
    ]


RULES = {
    "penalty": [GradientPenalty(kind="gradient_penalty", weight=0.5)],
    "adversarial": [Adversarial(kind="adversarial", epsilon=0.1)],
    "proximal": [Proximal(kind="proximal", weight=0.1)],
}

MICROBATCHES = [None, 4, 5]  # whole, even, ragged


@pytest.mark.parametrize("microbatch", MICROBATCHES)
def test_penalty_is_the_hessian_times_each_micro_batch_s_gradient(microbatch) -> None:
    """Against exact double backward; the difference has an error of order epsilon.

    Catches: twice the coefficient; the penalty of the whole batch's gradient; equal
    weights for ragged parts; weights that are not put back.
    """
    model = network()
    step = step_of(model, microbatch=microbatch)
    before = [p.detach().clone() for p in model.parameters()]
    rules = GradientRules(
        [GradientPenalty(kind="gradient_penalty", weight=0.5, epsilon=1e-5)]
    )
    loss = rules.fill(step)
    parameters = list(model.parameters())
    expected, sizes = [], []
    for inputs, targets in parts_of(step):
        first = torch.autograd.grad(
            cross_entropy(model(inputs), targets), parameters, create_graph=True
        )
        half_norm = sum(g.square().sum() for g in first) / 2
        second = torch.autograd.grad(half_norm, parameters)
        expected.append(
            [g.detach() + 0.5 * h for g, h in zip(first, second, strict=True)]
        )
        sizes.append(len(targets))
    for found, wanted in zip(grads(model), mean_of(expected, sizes), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for parameter, kept in zip(parameters, before, strict=True):
        assert torch.equal(parameter, kept)
    every = data()
    torch.testing.assert_close(
        loss, cross_entropy(model(every.inputs), every.targets).detach()
    )


def test_penalty_vanishes_at_a_stationary_point() -> None:
    """Catches: dividing by a norm of zero."""
    model = nn.Linear(4, 3).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    zeros = TensorPair(torch.zeros(3, 4).double(), torch.tensor([0, 1, 2]))
    batches = UpdateBatches(zeros, seed=0, device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = GradientStep(model, cross_entropy, optimizer, batches.batch(0, 3), None)
    GradientRules((GradientPenalty(kind="gradient_penalty", weight=1.0),)).fill(step)
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() < 1e-12


@pytest.mark.parametrize("microbatch", MICROBATCHES)
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_adversarial_mixes_the_loss_at_the_sign_of_the_slope(
    microbatch, weight
) -> None:
    """Against a loop over single examples, since no layer couples them.

    Catches: the sign downhill; a weight on the wrong part; adding instead of mixing.
    """
    model = network()
    step = step_of(model, microbatch=microbatch)
    term = Adversarial(kind="adversarial", epsilon=0.2, weight=weight)
    GradientRules((term,)).fill(step)
    every = data()
    expected = []
    for x, y in zip(every.inputs, every.targets, strict=True):
        x, y = x[None], y[None]
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(model(leaf), y), leaf)
        moved = plain(model, x + 0.2 * slope.sign(), y)
        clean = plain(model, x, y)
        expected.append(
            [(1 - weight) * a + weight * b for a, b in zip(clean, moved, strict=True)]
        )
    for found, wanted in zip(grads(model), mean_of(expected, [1] * NUM), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("microbatch", MICROBATCHES)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_proximal_takes_steps_on_one_batch_held_by_a_spring(microbatch, kind) -> None:
    """Against the run's optimizer on the whole objective, step by step.

    Catches: one step too many; the spring at the previous point instead of the first.
    """
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = (kind(m.parameters(), lr=0.05) for m in (model, twin))
    step = step_of(model, microbatch=microbatch, optimizer=optimizer)
    rules = GradientRules((Proximal(kind="proximal", weight=0.7, steps=4),))
    start = [p.detach().clone() for p in twin.parameters()]
    every = data()
    for _ in range(2):
        optimizer.zero_grad()
        rules.fill(step)
        optimizer.step()
        for _ in range(4):
            other.zero_grad()
            spring = sum(
                (p - s).square().sum()
                for p, s in zip(twin.parameters(), start, strict=True)
            )
            loss = cross_entropy(twin(every.inputs), every.targets) + 0.35 * spring
            loss.backward()
            other.step()
        start = [p.detach().clone() for p in twin.parameters()]
        for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)


def test_terms_do_not_depend_on_their_order() -> None:
    """Each is an addition to the plain gradient.

    Catches: an adversarial share that also mixes the penalty away.
    """
    terms = [
        GradientPenalty(kind="gradient_penalty", weight=0.5),
        Adversarial(kind="adversarial", epsilon=0.2),
    ]
    found = []
    for order in (terms, terms[::-1]):
        model = network()
        GradientRules(tuple(order)).fill(step_of(model))
        found.append(grads(model))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("microbatch", MICROBATCHES)
def test_clipping_limits_the_norm_of_the_whole(microbatch) -> None:
    """The direction stays; a norm below the limit stays to the last bit.

    Catches: a limit per parameter or per micro-batch.
    """
    free = network()
    GradientRules().fill(step_of(free, microbatch=microbatch))
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads(free)))
    for limit in (norm / 3, norm * 3):
        model = network()
        GradientRules(clip_norm=limit).fill(step_of(model, microbatch=microbatch))
        factor = min(1.0, limit / norm)
        for found, before in zip(grads(model), grads(free), strict=True):
            torch.testing.assert_close(found, before * factor, rtol=1e-5, atol=0)
            assert factor < 1 or torch.equal(found, before)


class PartlyUsed(nn.Module):
    """Has a layer that no output depends on, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.unused = nn.Linear(4, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Go through the frozen layer and the head."""
        return self.head(torch.tanh(self.frozen(inputs)))


@pytest.mark.parametrize("terms", RULES.values(), ids=RULES)
def test_parameters_without_a_gradient_stay_without_one(terms) -> None:
    """Optimizers skip them then, weight decay included.

    Catches: zeros in place of no gradient, which let weight decay in.
    """
    torch.manual_seed(0)
    model = PartlyUsed().double()
    before = [
        p.clone() for p in (*model.frozen.parameters(), *model.unused.parameters())
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    rules = GradientRules(tuple(terms), clip_norm=1.0, trust_ratio=TrustRatio(0.1, 0.1))
    rules.fill(step_of(model, optimizer=optimizer, microbatch=4))
    optimizer.step()
    after = (*model.frozen.parameters(), *model.unused.parameters())
    for parameter, kept in zip(after, before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, kept)
    assert model.head.weight.grad is not None


def test_clipping_comes_after_the_terms() -> None:
    """The limit holds for the sum, in the direction of the sum.

    Catches: terms that are added to a clipped gradient, or left out by it.
    """
    terms = (Adversarial(kind="adversarial", epsilon=0.2),)
    free, clipped = network(), network()
    GradientRules(terms).fill(step_of(free))
    GradientRules(terms, clip_norm=0.01).fill(step_of(clipped))
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads(free)))
    for found, before in zip(grads(clipped), grads(free), strict=True):
        torch.testing.assert_close(found, before * (0.01 / norm), rtol=1e-4, atol=0)


@pytest.mark.parametrize("microbatch", MICROBATCHES)
def test_without_rules_the_bits_are_those_of_a_plain_loop(microbatch) -> None:
    """Catches: anything that touches the gradient where nothing was asked for."""
    model, twin = network(), network()
    step = step_of(model, microbatch=microbatch)
    loss = GradientRules().fill(step)
    total = []
    for inputs, targets in parts_of(step):
        part = cross_entropy(twin(inputs), targets)
        part = part if microbatch is None else part * (len(targets) / NUM)
        part.backward()
        total.append(part.detach())
    assert torch.equal(
        loss, total[0] if microbatch is None else torch.stack(total).sum()
    )
    for found, wanted in zip(grads(model), grads(twin), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("terms", RULES.values(), ids=RULES)
def test_running_statistics_move_once_per_micro_batch(terms) -> None:
    """Passes beside the update's own leave BatchNorm's buffers alone.

    Catches: running statistics of shifted weights or of adversarial examples.
    """
    model, twin = network(norm=True), network(norm=True)
    GradientRules(tuple(terms)).fill(step_of(model, microbatch=4))
    GradientRules().fill(step_of(twin, microbatch=4))
    for found, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("terms", RULES.values(), ids=RULES)
def test_dropout_draws_the_same_in_all_passes_of_a_micro_batch(terms) -> None:
    """And the global generator is where it was.

    Catches: a forward difference between two networks of other masks, which is noise
    over epsilon.
    """
    draws = (3, 1, 5)
    model = network(dropout=0.5)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    GradientRules(tuple(terms)).fill(step_of(model, microbatch=4, draws=draws))
    assert torch.equal(torch.get_rng_state(), state)
    again = network(dropout=0.5)
    torch.manual_seed(9)
    GradientRules(tuple(terms)).fill(step_of(again, microbatch=4, draws=draws))
    for found, wanted in zip(grads(model), grads(again), strict=True):
        assert torch.equal(found, wanted)
        assert found.abs().max() < 5  # a difference of masks would be of order 1/eps
    other = network(dropout=0.5)
    GradientRules(tuple(terms)).fill(step_of(other, microbatch=4, draws=(3, 1, 6)))
    assert any(
        not torch.equal(a, b) for a, b in zip(grads(model), grads(other), strict=True)
    )


@pytest.mark.parametrize("microbatch", [None, 6])
@pytest.mark.parametrize(
    "terms",
    [[], *RULES.values(), [term for terms in RULES.values() for term in terms]],
    ids=str,
)
def test_passes_are_counted_right(terms, microbatch) -> None:
    """Against the calls of the model, whole batches at a time.

    Catches: a cost that leaves the passes beside the update out.
    """
    model, calls = network(), []
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    GradientRules(tuple(terms)).fill(step_of(model, microbatch=microbatch))
    wanted = passes_per_update(terms, several=microbatch is not None)
    assert sum(calls) == wanted * NUM

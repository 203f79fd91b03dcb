"""What examples weigh, however and wherever the loss is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import ProbeAdvice
from noisekit.integrations import attach
from noisekit.probes import Reading
from noisekit.probes.capture.loss_counts import LossCounts

DOUBLE = torch.float64
X = torch.randn(16, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(2))
CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 9.0], dtype=DOUBLE)
WEIGHTS = CLASS_WEIGHTS[Y] / CLASS_WEIGHTS[Y].sum()
MASK = torch.rand(16, generator=torch.Generator().manual_seed(9)) < 0.5
EVEN = torch.full((16,), 1 / 16, dtype=DOUBLE)
MASKED = MASK.double() / MASK.sum()

Model = nn.Module
Loss = nn.CrossEntropyLoss


def network() -> Model:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model.double()


def trace(losses: Tensor, weights: Tensor, model: Model) -> float:
    """``tr Σ`` by one backward pass per example's part of the loss."""
    parameters = list(model.parameters())
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    parts = torch.stack(rows)
    n = 1 / float(weights.square().sum())
    whole = float(parts.sum(0).square().sum())
    return (n * float(parts.square().sum()) - whole) / (1 - 1 / n)


def read(model: Model, step: Callable[[], Any], **options: Any) -> Reading:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, **options) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            step()
            optimizer.step()
    return probe.readings[-1]


# ---------------------------------------------------------- ways to call a known loss


def positional(model: Model, loss: Loss) -> None:
    loss(model(X), Y).backward()


def by_keyword(model: Model, loss: Loss) -> None:
    loss(model(X), target=Y).backward()


def after_a_look(model: Model, loss: Loss) -> None:
    outputs = model(X)
    with torch.no_grad():
        model(X + 0.1)
    loss(outputs, Y).backward()


def logged_once_more(model: Model, loss: Loss) -> None:
    outputs = model(X)
    value = loss(outputs, Y)
    loss(outputs.detach(), (Y + 1) % 3)
    value.backward()


def by_hand(model: Model, loss: Loss) -> None:
    losses = functional.cross_entropy(model(X), Y, reduction="none")
    (losses * WEIGHTS).sum().backward()


WAYS = (positional, by_keyword, after_a_look, logged_once_more, by_hand)


@pytest.mark.parametrize("given", [True, False], ids=["given", "not given"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_class_weights_are_found_whatever_the_call(way: Any, given: bool) -> None:
    """Catches: targets of another call or pass, or none seen at all."""
    model, loss = network(), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    options = {"loss_fn": loss} if given else {}
    reading = read(model, lambda: way(model, loss), **options)
    losses = functional.cross_entropy(model(X), Y, reduction="none") * WEIGHTS
    expected = trace(losses, WEIGHTS, model)
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)


def test_two_forward_passes_before_two_losses() -> None:
    """Catches: the second pass's weights taken for both."""
    model, loss = network(), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)

    def step() -> None:
        first, second = model(X[:8]), model(X[8:])
        losses = loss(first, Y[:8]), loss(second, Y[8:])
        for value in losses:
            (value / 2).backward()

    reading = read(model, step, loss_fn=loss)
    halves = [CLASS_WEIGHTS[y] / CLASS_WEIGHTS[y].sum() / 2 for y in (Y[:8], Y[8:])]
    weights = torch.cat(halves)
    losses = functional.cross_entropy(model(X), Y, reduction="none") * weights
    expected = trace(losses, weights, model)
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------- means of the loop's own


@dataclass(frozen=True)
class Mean:
    """How a loop makes a loss of the outputs, and what each example weighs in it."""

    loss: Callable[[Tensor], Tensor]
    parts: Callable[[Tensor], Tensor]
    weights: Tensor
    loss_fn: Loss | None = None


def _weighted(outputs: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, Y, weight=CLASS_WEIGHTS, reduction="none")


def _plain(outputs: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, Y, reduction="none")


_NONE = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction="none")
_SUM = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction="sum")
MEANS = {
    "none and a mean": Mean(
        lambda o: _NONE(o, Y).mean(), lambda o: _weighted(o) / 16, EVEN, _NONE
    ),
    "a sum over the count": Mean(
        lambda o: _SUM(o, Y) / 16, lambda o: _weighted(o) / 16, EVEN, _SUM
    ),
    "ignored targets": Mean(
        lambda o: functional.cross_entropy(o, Y.masked_fill(~MASK, -100)),
        lambda o: _plain(o) * MASKED,
        MASKED,
    ),
    "chosen rows": Mean(
        lambda o: functional.cross_entropy(o[MASK], Y[MASK]),
        lambda o: _plain(o) * MASKED,
        MASKED,
    ),
    "chosen rows, loss given": Mean(
        lambda o: nn.CrossEntropyLoss()(o[MASK], Y[MASK]),
        lambda o: _plain(o) * MASKED,
        MASKED,
        nn.CrossEntropyLoss(),
    ),
}


@pytest.mark.parametrize("name", MEANS)
def test_the_loop_s_own_mean_decides(name: str) -> None:
    """Catches: weights of a mean where the loop takes another, or masks unseen."""
    model, case = network(), MEANS[name]
    options = {} if case.loss_fn is None else {"loss_fn": case.loss_fn}
    reading = read(model, lambda: case.loss(model(X)).backward(), **options)
    expected = trace(case.parts(model(X)), case.weights, model)
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)


# -------------------------------------------------------------------------- sequences

T, B, V = 6, 8, 11


def language_model() -> Model:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 8), nn.Tanh(), nn.Linear(8, V))
    return model.double()


def sequences(*, time_first: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(V, (B, T), generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    labels[torch.arange(T)[None] >= lengths[:, None]] = -100
    return (tokens.T, labels.T) if time_first else (tokens, labels)


@pytest.mark.parametrize("given", [True, False], ids=["given", "not given"])
@pytest.mark.parametrize("time_first", [True, False], ids=["(T, B)", "(B, T)"])
def test_targets_are_counted_for_their_own_sequence(
    time_first: bool, given: bool
) -> None:
    """Catches: flattened time-major targets cut into sequences as if batch-major."""
    model, (tokens, labels) = language_model(), sequences(time_first=time_first)
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        loss(model(tokens).flatten(0, 1), labels.flatten()).backward()

    options = {"loss_fn": loss} if given else {}
    axis = 1 if time_first else 0
    reading = read(model, step, batch_dim=axis, **options)
    kept = (labels != -100).double()
    each = functional.cross_entropy(
        model(tokens).flatten(0, 1), labels.flatten(), reduction="none"
    )
    losses = each.view(labels.shape).sum(1 - axis) / kept.sum()
    expected = trace(losses, kept.sum(1 - axis) / kept.sum(), model)
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)


def test_a_mean_over_each_sequence_first() -> None:
    """Catches: long sequences that count more, as in a mean over all tokens."""
    model, (tokens, labels) = language_model(), sequences(time_first=False)
    kept = labels != -100
    loss = nn.CrossEntropyLoss(reduction="none")

    def losses() -> Tensor:
        each = loss(model(tokens).flatten(0, 1), labels.flatten()).view(B, T)
        return (each * kept).sum(1) / kept.sum(1)

    reading = read(model, lambda: losses().mean().backward(), loss_fn=loss)
    expected = trace(losses() / B, torch.full((B,), 1 / B, dtype=DOUBLE), model)
    assert reading.variance_trace.value == pytest.approx(expected, rel=1e-9)


# --------------------------------------------------------- losses that are not given


LABELS = (X[:, :3] > 0).double()


def smoothed(outputs: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, Y, reduction="none", label_smoothing=0.1)


def log_likelihood(outputs: Tensor) -> Tensor:
    return functional.nll_loss(outputs, Y, reduction="none")


def binary(outputs: Tensor) -> Tensor:
    each = functional.binary_cross_entropy_with_logits(
        outputs, LABELS, reduction="none"
    )
    return each.mean(1)


@pytest.mark.parametrize("weights", [WEIGHTS, EVEN], ids=["weighted", "even"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("each", [smoothed, log_likelihood, binary])
def test_losses_that_are_not_given_are_counted(
    each: Callable[[Tensor], Tensor], dtype: torch.dtype, weights: Tensor
) -> None:
    """Against one backward pass per example, whose losses weigh unequally.

    Catches: weights of every loss but the plain cross-entropy lost without a word.
    """
    model = network()
    if each is log_likelihood:
        model.append(nn.LogSoftmax(-1))
    expected = trace(each(model(X)) * weights, weights, model)
    model.to(dtype)
    own = weights.to(dtype)

    def loss() -> Tensor:
        return (each(model(X.to(dtype))) * own).sum()

    reading = read(model, lambda: loss().backward())
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}
    assert reading.variance_trace.value == pytest.approx(expected, rel=tolerance[dtype])


@pytest.mark.parametrize(
    ("factor", "note"), [(2.0**16, "multiplied by 65,536"), (16.0, "loss_reduction=")]
)
def test_a_loss_that_is_no_mean_is_flagged(factor: float, note: str) -> None:
    """An untold gradient scaler, or a sum.

    Catches: norms too large by the scale or the batch size, without a word.
    """
    model = network()
    loss = nn.CrossEntropyLoss()
    reading = read(model, lambda: (factor * loss(model(X), Y)).backward())
    assert note in str(reading.coverage)
    plain = read(model, lambda: loss(model(X), Y).backward())
    assert note not in str(plain.coverage)


# ---------------------------------------------------------------- the counts themselves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_confident_rows_are_counted_as_well(dtype: torch.dtype) -> None:
    """Where the target has all the probability, its own entry has no digits left.

    Catches: a count from the target's entry, zero over zero after some training.
    """
    logits = 30 * functional.one_hot(Y, 3).to(dtype)
    logits[3] = torch.tensor([0.0, 1.0, 2.0], dtype=dtype)
    logits.requires_grad_()
    weights = CLASS_WEIGHTS.to(dtype)
    functional.cross_entropy(logits, Y, weight=weights).backward()
    assert logits.grad is not None
    counts = LossCounts.of(logits.detach(), logits.grad, 0)
    assert counts is not None
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
    torch.testing.assert_close(counts.values, WEIGHTS, rtol=tolerance[dtype], atol=0.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o: o.square().mean(),
        lambda o: functional.mse_loss(o, X[:, :3]),
        lambda o: functional.multi_margin_loss(o, Y),
        lambda o: -o[torch.arange(16), Y].mean(),
    ],
    ids=["squares", "distances", "margin", "scores"],
)
def test_other_losses_tell_no_counts(loss: Callable[[Tensor], Tensor]) -> None:
    """Catches: counts read into any gradient."""
    logits = torch.randn(16, 3, dtype=DOUBLE, requires_grad=True)
    loss(logits).backward()
    assert logits.grad is not None
    assert LossCounts.of(logits.detach(), logits.grad, 0) is None


def test_parameters_of_the_loss_are_named_at_attach() -> None:
    """Proxies that the same optimizer updates are no part of the model.

    Catches: a gradient norm that leaves out a part of what is stepped, without a word.
    """
    model, proxies = network(), nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([*model.parameters(), proxies], lr=0.1)
    with pytest.warns(ProbeAdvice, match=r"1 tensors .*\(3, 2\)"):
        attach(model, optimizer).detach()


@pytest.mark.parametrize("given", [True, False])
def test_a_scaler_is_flagged_where_it_is_not_given(given: bool) -> None:
    """Catches: a known scaler named as unknown."""
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, scaler=scaler if given else None) as probe:
        loss = functional.cross_entropy(model(X), Y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert ("as by a gradient scaler" in str(probe.readings[0].coverage)) is not given

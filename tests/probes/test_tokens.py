"""Noise scales counted in tokens, of sequences that are sampled as a whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.errors import NormaliserError, UsageError
from noisekit.core.results import Ratio, Status
from noisekit.integrations import attach
from noisekit.noise.moments import GradientMoments
from noisekit.probes import Probe, gradient_noise
from noisekit.probes.host_copy import HostCopy
from noisekit.records.schema import table
from tests.reference import noise as reference

LENGTH, IGNORED = 12, -100


class LanguageModel(nn.Module):
    """Every token's scores depend on those before it, so that they are correlated."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.table(tokens).cumsum(1)))
        return scores.transpose(1, 2)  # classes on axis 1, as cross-entropy wants


def built() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel().double()


def sequences(count: int, *, ragged: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and lengths; a half of the ragged ones has one token."""
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(7, (count, LENGTH), generator=generator)
    targets = torch.randint(4, (count, LENGTH), generator=generator)
    lengths = torch.full((count,), LENGTH)
    if ragged:
        lengths[::2] = 1
        for row, length in zip(targets, lengths, strict=True):
            row[length:] = IGNORED
    return tokens, targets, lengths


def sums_over_tokens(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """``(N, P)``: each sequence's gradient, summed over its tokens."""

    def summed(outputs: Tensor, own: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, own, reduction="sum")

    rows = reference.example_gradients(model, summed, tokens, targets)
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def probed(inputs: Tensor, targets: Tensor, *, parts: int = 1, **options: Any) -> Probe:
    """A probe after one step over the sequences, in so many micro-batches."""
    model = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"loss_fn": nn.CrossEntropyLoss(), "unit": "token", **options}
    probe = attach(model, optimizer, **options)
    loss_fn = probe.loss_fn if options["loss_fn"] else functional.cross_entropy
    for part, own in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        (loss_fn(model(part), own) / parts).backward()
    optimizer.step()
    return probe


def test_one_step_counts_the_tokens_of_effective_sequences() -> None:
    """The noise that is in ``|g_B|²``, times the tokens of the batch, over ``|G|²``.

    Catches: the plain mean length, by which long sequences' larger part in the noise
    is lost; padding counted; ``tr Σ`` divided by tokens as if those were sampled.
    """
    tokens, targets, lengths = sequences(10)
    (reading,) = probed(tokens, targets).readings
    total = lengths.sum()
    contributions = sums_over_tokens(built(), tokens, targets) / total
    share = (lengths / total).square().sum()
    q = contributions.sum(0).square().sum()
    noise = (contributions.square().sum() - share * q) / (1 - share)
    row = reading.row()
    assert row["unit"] == reading.unit == "token"
    assert row["tokens"] == float(total)
    assert row["tokens_per_sequence"] == pytest.approx(float(total * share))
    assert row["tokens_per_sequence"] > 1.5 * float(total) / 10
    found = reading.simple_noise_scale
    assert row["simple_noise_scale"] == found.value
    assert found.value == pytest.approx(float(total * noise / (q - noise)))
    # The parts stay those of the sampling unit, with the same errors.
    (plain,) = probed(tokens, targets, unit="sequence").readings
    assert reading.variance_trace == plain.variance_trace
    assert reading.debiased_grad_sq_norm == plain.debiased_grad_sq_norm
    low, high = plain.simple_noise_scale.interval().low, found.interval().low
    assert high == pytest.approx(low * float(total * share))
    for counted, own in zip(reading.layers, plain.layers, strict=True):
        expected = own.simple_noise_scale.value * float(total * share)
        assert counted.simple_noise_scale.value == pytest.approx(expected, nan_ok=True)


def test_it_predicts_the_gradient_of_batches_counted_in_tokens() -> None:
    """``E|g_B|² = |G|² (1 + B/T)``, with ``B`` from the steps of a probe.

    Catches: a scale that holds for sequences of one length only; an average over steps
    of ratios, or of parts that do not weigh by tokens.
    """
    tokens, targets, lengths = sequences(60)
    sums, counts = sums_over_tokens(built(), tokens, targets), lengths.double()
    truth = reference.token_noise_scale(sums, counts)
    signal = float((sums.sum(0) / counts.sum()).square().sum())
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(60, shape, generator=generator)

    batches = drawn(20_000, 64)
    gradients = sums[batches].sum(1) / counts[batches].sum(1, keepdim=True)
    size = float(counts[batches].sum(1).mean())
    mean_sq = float(gradients.square().sum(1).mean())
    assert mean_sq == pytest.approx(signal * (1 + truth / size), rel=0.02)

    model = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = nn.CrossEntropyLoss()
    with attach(model, optimizer, loss_fn=loss, unit="token") as probe:
        for size_of_step in (16, 48) * 60:
            rows = drawn(size_of_step)
            optimizer.zero_grad()
            loss(model(tokens[rows]), targets[rows]).backward()
            optimizer.step()
    found = probe.simple_noise_scale()
    assert found.interval().low < truth < found.interval().high
    assert found.value == pytest.approx(truth, rel=0.2)
    assert isinstance(found.ratio, Ratio)
    of_tokens = [
        (r.tokens.total, r.tokens.per_sequence * r.variance_trace.value)
        for r in probe.readings
        if r.tokens is not None
    ]
    average = sum(t * v for t, v in of_tokens) / sum(t for t, _ in of_tokens)
    assert found.ratio.numerator == pytest.approx(average)
    traces = sum(r.variance_trace.value * r.batch_size for r in probe.readings)
    norms = sum(r.debiased_grad_sq_norm.value * r.batch_size for r in probe.readings)
    naive = traces / norms * float(counts.mean())
    assert naive < 0.75 * truth


@pytest.mark.parametrize("parts", [1, 3])
def test_sequences_of_one_length_count_their_positions(parts: int) -> None:
    """Without the loss the model's only input tells; it is that many times as much.

    Catches: the sequences' axis counted as well; micro-batches' tokens not added.
    """
    tokens, targets, _ = sequences(9, ragged=False)
    (counted,) = probed(tokens, targets, parts=parts, loss_fn=None).readings
    (seen,) = probed(tokens, targets, parts=parts).readings
    (plain,) = probed(tokens, targets, parts=parts, unit="sequence").readings
    expected = plain.simple_noise_scale.value * LENGTH
    for reading in (counted, seen):
        assert reading.tokens is not None
        assert reading.tokens.total == 9 * LENGTH
        assert reading.tokens.per_sequence == pytest.approx(LENGTH)
        assert reading.simple_noise_scale.value == pytest.approx(expected)


NAMES = ("per_example", "chunks", "accumulation", "ghost")


def test_every_estimator_is_counted_alike() -> None:
    """Whatever its units: what counts is the sequences' share in the noise.

    Catches: a chunk's or ghost batch's tokens taken for a sequence's.
    """
    tokens, targets, lengths = sequences(12)
    options = {"estimator": NAMES, "num_chunks": 3, "ghost_batch": 2, "parts": 2}
    (reading,) = probed(tokens, targets, **options).readings
    assert reading.tokens is not None
    assert reading.tokens.total == float(lengths.sum())
    for name in NAMES:
        noise = reading.noise(name)
        assert noise is not None
        ratio = noise.variance_trace.value / noise.debiased_grad_sq_norm.value
        assert noise.simple_noise_scale.ratio is not None
        scaled = noise.simple_noise_scale.ratio
        found = scaled.numerator / scaled.denominator
        assert found == pytest.approx(ratio * reading.tokens.per_sequence)


def test_class_weights_make_effective_tokens() -> None:
    """``(sum c)² / sum c²`` of the tokens that count.

    Catches: weights added up, which change with their scale.
    """
    tokens, targets, _ = sequences(8)
    weight = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    own = weight[targets[targets != IGNORED]]
    for scale in (1.0, 10.0):
        loss = nn.CrossEntropyLoss(weight=scale * weight)
        (reading,) = probed(tokens, targets, loss_fn=loss).readings
        assert reading.tokens is not None
        expected = own.sum() ** 2 / own.square().sum()
        assert reading.tokens.total == pytest.approx(float(expected))


def lengths_of(targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum(1)


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def test_a_loss_of_one_s_own_says_what_counts() -> None:
    """Catches: a function of the targets that is not asked, or not for its sum."""
    tokens, targets, _ = sequences(10)
    (known,) = probed(tokens, targets).readings
    (given,) = probed(
        tokens,
        targets,
        loss_fn=own_loss,
        tokens=lengths_of,
        example_weights=lengths_of,
    ).readings
    expected = known.simple_noise_scale.value
    assert given.simple_noise_scale.value == pytest.approx(expected)
    assert given.tokens is not None
    assert given.tokens.total == known.row()["tokens"]


@pytest.mark.parametrize("own", [False, True])
def test_frozen_weights_are_counted_in_tokens_too(own: bool) -> None:
    """All data, ragged batches of them: the noise of a mean over tokens, per token.

    Catches: how lengths vary taken for noise, which a mean over tokens does not see;
    the lengths of one batch taken for all; ``n`` put for ``n - 1``.
    """
    tokens, targets, lengths = sequences(20)
    batches = list(zip(tokens.split(7), targets.split(7), strict=True))
    sums, counts = sums_over_tokens(built(), tokens, targets), lengths.double()
    mean = sums.sum(0) / counts.sum()
    noise = reference.token_noise_scale(sums, counts) * mean.square().sum() * 20 / 19
    options: dict[str, Any] = {}
    if own:
        options = {"normaliser": lambda t: lengths_of(t).sum(), "tokens": lengths_of}
    loss = own_loss if own else nn.CrossEntropyLoss()
    found = gradient_noise(built(), loss, batches, unit="token", **options)
    variance = noise / counts.mean()
    signal = mean.square().sum() - variance / 20
    assert found.grad_sq_norm.value == pytest.approx(float(mean.square().sum()))
    assert found.variance_trace.value == pytest.approx(float(variance))
    assert found.debiased_grad_sq_norm.value == pytest.approx(float(signal))
    ratio = found.simple_noise_scale.ratio
    assert isinstance(ratio, Ratio)
    assert ratio.numerator == pytest.approx(float(noise))


def test_sequences_that_weigh_alike_have_no_shares() -> None:
    """A mean over sequences of each one's mean: tokens only convert the unit.

    Catches: sequences weighed by tokens in a loss that does not.
    """
    tokens, targets, lengths = sequences(12)

    def mean_of_means(outputs: Tensor, own: Tensor) -> Tensor:
        losses = functional.cross_entropy(outputs, own, reduction="none")
        return (losses.sum(1) / lengths_of(own)).mean()

    batches = list(zip(tokens.split(5), targets.split(5), strict=True))
    plain = gradient_noise(built(), mean_of_means, batches)
    counted = gradient_noise(
        built(), mean_of_means, batches, unit="token", tokens=lengths_of
    )
    assert counted.variance_trace.value == pytest.approx(plain.variance_trace.value)
    expected = plain.simple_noise_scale.interval().low * float(lengths.double().mean())
    assert counted.simple_noise_scale.interval().low == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {},
            "unit='token' needs a loss that tells which of several targets per "
            "sequence count, such as nn.CrossEntropyLoss, got function; give tokens=",
        ),
        (
            {"tokens": lambda t: 2 * lengths_of(t)},
            "needs a loss that is divided by its tokens or its sequences, got 26 for "
            "4 sequences of 52 tokens; give the normaliser= and tokens= that belong",
        ),
    ],
)
def test_a_data_set_s_tokens_are_not_guessed(options: Any, said: str) -> None:
    """Catches: positions counted for tokens; two counts that contradict each other."""
    tokens, targets, _ = sequences(4)
    with pytest.raises(UsageError) as caught:
        gradient_noise(
            built(),
            own_loss,
            [(tokens, targets)],
            unit="token",
            normaliser=lambda t: lengths_of(t).sum(),
            **options,
        )
    assert said in str(caught.value)


class Classifier(LanguageModel):
    """One target per sequence."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).mean(2)


def read(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    targets: Tensor,
    loss: Any,
    **more: Any,
) -> Probe:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = attach(model, optimizer, unit="token", **more)
    loss(model(*inputs), targets).backward()
    optimizer.step()
    return probe


class Masked(LanguageModel):
    """Told which positions are padding."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


def _masked() -> Probe:
    tokens, targets, _ = sequences(4)
    inputs = (tokens, targets != IGNORED)
    return read(Masked(), inputs, targets, functional.cross_entropy)


def _features() -> Probe:
    model = nn.Linear(3, 2)
    return read(model, (torch.ones(4, 3),), torch.ones(4).long(), nn.CrossEntropyLoss())


def _one_target() -> Probe:
    tokens, loss = sequences(4)[0], nn.CrossEntropyLoss()
    return read(Classifier(), (tokens,), torch.ones(4).long(), loss, loss_fn=loss)


def _elsewhere() -> Probe:
    tokens, targets, _ = sequences(4)
    seen = nn.CrossEntropyLoss()
    return read(built(), (tokens,), targets, functional.cross_entropy, loss_fn=seen)


UNKNOWN: list[tuple[Callable[[], Probe], str]] = [
    (
        _masked,
        "needs one input of token numbers (sequence, position), got (4, 12), (4, 12); "
        "give attach() the loss and call it through probe.loss_fn, or tokens= beside",
    ),
    (_features, "needs one input of token numbers (sequence, position), got (4, 3);"),
    (_one_target, "the targets are one per sequence, and tell nothing of its tokens"),
    (_elsewhere, "the loss was not called through probe.loss_fn"),
]


@pytest.mark.parametrize(("work", "said"), UNKNOWN)
def test_what_is_not_known_is_not_guessed(work: Callable[[], Probe], said: str) -> None:
    """The parts are there, the scale is not, and the coverage says what to do.

    Catches: padding counted as tokens; a scale in sequences called one in tokens.
    """
    probe = work()
    (reading,) = probe.readings
    assert said in reading.coverage.missing["tokens"]
    assert reading.simple_noise_scale.status is Status.UNAVAILABLE
    assert probe.simple_noise_scale().status is Status.UNAVAILABLE
    assert reading.variance_trace.value >= 0.0
    noise = reading.noise("per_example")
    assert noise is not None
    assert noise.simple_noise_scale.status is Status.UNAVAILABLE
    assert str(reading.row()["tokens"]) == "nan"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"unit": "sequence", "tokens": lengths_of, "loss_fn": own_loss},
            "tokens= belongs to unit='token', got unit='sequence'; leave one out.",
        ),
        (
            {"unit": "token", "tokens": lengths_of},
            "tokens= needs the targets to be seen, got loss_fn=None; give the loss to "
            "attach() and call it through probe.loss_fn.",
        ),
        (
            {"unit": "token", "loss_fn": own_loss},
            "unit='token' needs to know which targets count, got a loss of your own, "
            "own_loss; give tokens=, which of a batch's targets returns the number",
        ),
    ],
)
def test_what_could_never_be_known_is_refused(options: Any, said: str) -> None:
    """Catches: finding out after a day of training that no token was counted."""
    model = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(UsageError) as caught:
        attach(model, optimizer, **options)
    assert said in str(caught.value)


def test_tokens_are_one_number_per_sequence() -> None:
    """Catches: a total, or one number per position, taken as it comes."""
    tokens, targets, _ = sequences(4)
    with pytest.raises(NormaliserError, match=r"tokens needs to return .*shape \(4,\)"):
        probed(
            tokens,
            targets,
            loss_fn=own_loss,
            tokens=lambda t: (t != IGNORED).sum(),
            on_error="raise",
        )


def test_rows_and_copies_have_the_tokens() -> None:
    """A table's row tells the scale again, from its statistics and its tokens.

    Catches: a column that no table has; tokens that stay on the device, or that are
    exchanged with another tensor on the way to the host.
    """
    tokens, targets, _ = sequences(10)
    (reading,) = probed(tokens, targets, quantities=("norm_test",)).readings
    row = reading.row()
    assert row.keys() <= {column.name for column in table("steps").columns}
    parts = GradientMoments.from_columns(row).parts()  # type: ignore[arg-type]
    assert parts is not None
    again = parts.noise_scale(counted=float(row["tokens_per_sequence"]))
    assert again.simple_noise_scale.value == pytest.approx(row["simple_noise_scale"])
    copied = HostCopy(reading)
    assert copied._reading.tokens is not None
    assert copied._reading.tokens.values.numel() == 0
    there = copied.resolved().row()
    for name in ("tokens", "tokens_per_sequence"):
        assert there[name] == row[name]
    # Weights in float32 are divided by in double precision now.
    assert there["simple_noise_scale"] == pytest.approx(row["simple_noise_scale"])


def test_counting_never_waits_for_the_device() -> None:
    """On the meta device every transfer to the host raises."""
    tokens, targets, _ = sequences(4)
    model = built().to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = nn.CrossEntropyLoss()
    with attach(model, optimizer, loss_fn=loss, unit="token") as probe:
        loss(model(tokens.to("meta")), targets.to("meta")).backward()
        optimizer.step()
    assert probe.readings[0].tokens is not None
    assert probe.readings[0].tokens.values.is_meta

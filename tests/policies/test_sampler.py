"""The samplers in real loaders: order, lag, resume, ends of passes, mistakes."""

import itertools
import json
import math
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

import noisekit as nk
from noisekit.policies import quantities_for

NUM_EXAMPLES = 97


def target(**settings):
    """Return a policy that follows its last reading at once."""
    defaults = {"min": 2, "max": 64, "smoothing": 0.0, "min_readings": 1}
    return nk.NoiseScaleTarget(**defaults | {"hysteresis": 0.0} | settings)


def reading(update):
    """Return the numbers of an update: sizes go up and down from one to the next."""
    wanted = 3 + (update * 7) % 40
    return {"variance_trace": float(wanted), "debiased_grad_sq_norm": 1.0}


def loader_of(sampler, workers=0, prefetch=None, dataset=None):
    data = range(NUM_EXAMPLES) if dataset is None else dataset
    return DataLoader(
        data, batch_sampler=sampler, num_workers=workers, prefetch_factor=prefetch
    )


def run(sampler, *, updates, workers=0, prefetch=None):
    """Train for so many updates; return the batches, and the sizes decided."""
    batches, decided = [], []
    while len(batches) < updates:
        for batch in loader_of(sampler, workers, prefetch):
            batches.append(batch.tolist())
            decided.append(sampler.decision.batch_size)
            sampler.observe(**reading(sampler.num_updates))
            if len(batches) == updates:
                break
    return batches, decided


# ------------------------------------------------------------------- order and lag


@pytest.mark.parametrize(("workers", "prefetch"), [(0, None), (1, 1), (1, 2), (2, 2)])
def test_lag_is_workers_times_prefetch(workers, prefetch):
    """A size answers to the reading so many updates earlier, no more and no fewer.

    Catches: a policy that sees the reading of the batch it decides about.
    """
    sampler = nk.AdaptiveBatchSampler(10_000, target())
    loader = loader_of(sampler, workers, prefetch, dataset=range(10_000))
    lag = workers * (prefetch or 0)
    for update, batch in enumerate(itertools.islice(loader, 30)):
        answered = update - 1 - lag
        wanted = 2 if answered < 0 else 3 + (answered * 7) % 40
        assert len(batch) == wanted, update
        assert sampler.decision.batch_size == wanted
        sampler.observe(**reading(update))


def test_order_is_that_of_the_seed_whatever_the_sizes():
    """Catches: a stream that begins anew where the size changes."""
    flat = [i for batch in run(sampler_of(target()), updates=40)[0] for i in batch]
    same = [
        i for batch in run(sampler_of(nk.Constant(8)), updates=60)[0] for i in batch
    ]
    shared = min(len(flat), len(same))
    assert shared > 3 * NUM_EXAMPLES
    assert flat[:shared] == same[:shared]
    for begin in range(0, 3 * NUM_EXAMPLES, NUM_EXAMPLES):
        assert sorted(flat[begin : begin + NUM_EXAMPLES]) == list(range(NUM_EXAMPLES))
    other = run(sampler_of(nk.Constant(8), seed=1), updates=2)[0]
    assert other[0] != same[:8]


def sampler_of(policy, **options):
    return nk.AdaptiveBatchSampler(NUM_EXAMPLES, policy, **options)


def test_order_is_that_of_recipes():
    """The same seed gives the examples of a recorded run in the same order."""
    from noisekit.core.batch_order import BatchOrder

    order = BatchOrder(3, num_examples=NUM_EXAMPLES, device="cpu")
    batches, _ = run(sampler_of(nk.Constant(10), seed=3), updates=25)
    assert [i for batch in batches for i in batch] == order.indices(0, 250).tolist()


def test_cursor_goes_on_over_the_end_of_a_pass():
    """N 10, m 4: places 0-3, 4-7, then 8-9 and 0-1 of the next pass."""
    sampler = nk.AdaptiveBatchSampler(10, nk.Constant(4), shuffle=False)
    passes = [list(sampler) for _ in range(4)]
    assert passes[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert passes[1] == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert passes[2] == passes[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_ends_of_passes(workers):
    """Ragged batches are smaller, dropped ones left out; policies see whole passes."""
    growth = nk.Growth(4, factor=2, every=nk.At(epochs=1), max=8)
    found = {}
    for epoch_end in ("ragged", "drop"):
        sampler = nk.AdaptiveBatchSampler(
            10, growth, shuffle=False, epoch_end=epoch_end
        )
        passes = []
        for epoch in range(2):
            assert sampler.epoch == epoch
            passes.append([])
            for batch in loader_of(sampler, workers, dataset=range(10)):
                passes[-1].append(batch.tolist())
                sampler.observe()
        found[epoch_end] = passes
    first, second = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert found["drop"] == [first, second]
    assert found["ragged"] == [[*first, [8, 9]], [*second, [8, 9]]]


def test_readings_before_a_dropped_batch_count_once():
    """Catches: the last reading of a pass used up by the batch that is left out."""
    policy = nk.Kicks(
        batch_size=4,
        small=2,
        criterion=nk.RelativeDecrease(window=1, below=0.5),
        cooldown=nk.At(epochs=0),
    )
    sampler = nk.AdaptiveBatchSampler(10, policy, epoch_end="drop")
    sizes = []
    for _ in range(4):
        sizes.append([])
        for batch in sampler:
            sizes[-1].append(len(batch))
            sampler.observe(loss=1.0)
    assert sizes == [[4, 4], [4, 4], [2, 2, 2, 2, 2], [4, 4]]
    assert sampler.state_dict()["driver"]["policy"]["held"] == 0


def test_share_of_the_run():
    table = nk.Table((5, 10), at=[nk.At(share=0.5)])
    sampler = nk.AdaptiveBatchSampler(10, table, length=nk.At(epochs=4))
    sizes = [[len(batch) for batch in sampler] for _ in range(4)]
    assert sizes == [[5, 5], [5, 5], [10], [10]]
    with pytest.raises(nk.NoisekitError, match="needs the length of the run"):
        list(nk.AdaptiveBatchSampler(10, table))


# -------------------------------------------------------------------------- resume


@pytest.mark.parametrize(("workers", "prefetch"), [(0, None), (1, 2), (2, 1)])
@pytest.mark.parametrize("stop", [1, 5, 9, 20])
def test_killed_and_resumed_in_mid_pass(workers, prefetch, stop):
    """The examples are those of a run that was not killed, batch by batch.

    Catches: resuming from what was handed out; sizes decided anew without readings.
    """
    options = {"workers": workers, "prefetch": prefetch}
    whole, decided = run(sampler_of(target()), updates=stop + 20, **options)
    first = sampler_of(target())
    before, _ = run(first, updates=stop, **options)
    saved = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = sampler_of(target())
    second.load_state_dict(saved)
    assert second.num_updates == stop
    after, sizes = run(second, updates=20, **options)
    assert before + after == whole
    assert sizes == decided[stop:]


@pytest.mark.parametrize("policy", [nk.Kicks(batch_size=20, small=5), nk.CABS(min=2)])
def test_resume_keeps_averages_and_modes(policy):
    """All state of the policy is in the sampler's, readings not yet used included."""

    def train(sampler, updates, batches):
        while len(batches) < updates:
            for batch in loader_of(sampler, 1, 2):
                batches.append(batch.tolist())
                sampler.observe(
                    loss=1.0 + sampler.num_updates % 5,
                    variance_trace=900.0,
                    learning_rate=0.1,
                )
                if len(batches) == updates:
                    return batches
        return batches

    whole = train(sampler_of(policy), 60, [])
    assert len({len(batch) for batch in whole}) > 1
    sampler = sampler_of(policy)
    found = []
    for stop in (17, 18, 40, 60):
        train(sampler, stop, found)
        saved = json.loads(json.dumps(sampler.state_dict(), allow_nan=False))
        sampler = sampler_of(policy)
        sampler.load_state_dict(saved)
    assert found == whole


def test_state_refuses_what_it_is_not_of():
    saved = sampler_of(nk.Constant(4)).state_dict()
    for other, words in (
        (sampler_of(nk.Constant(4), seed=1), "seed=1 is needed, got one with seed=0"),
        (nk.AdaptiveBatchSampler(5, nk.Constant(4)), "num_examples=5 is needed"),
        (sampler_of(target()), "'noise_scale' is needed, got one of 'constant'"),
    ):
        with pytest.raises(nk.NoisekitError, match=words):
            other.load_state_dict(saved)


def test_state_without_any_observe_is_refused_when_it_is_used():
    sampler = sampler_of(nk.Constant(10))
    next(iter(sampler))
    fresh = sampler_of(nk.Constant(10))
    fresh.load_state_dict(sampler.state_dict())
    with pytest.raises(nk.NoisekitError, match="saved without any observe"):
        next(iter(fresh))


def test_a_loop_that_breaks_gets_what_it_did_not_use_again():
    sampler = sampler_of(nk.Constant(10))
    for number, batch in enumerate(loader_of(sampler, 2, 2)):
        if number == 3:
            unused = batch.tolist()
            break
        sampler.observe()
    assert next(iter(loader_of(sampler))).tolist() == unused


# ------------------------------------------------------------------- observations


def test_values_by_name_are_checked():
    sampler = sampler_of(target())
    next(iter(sampler))
    with pytest.raises(
        nk.NoisekitError, match=r"knows no value 'trace'.*needs variance"
    ):
        sampler.observe(trace=1.0)
    sampler.observe(**reading(0))
    with pytest.raises(nk.NoisekitError, match="got none; call it once after every"):
        sampler.observe(**reading(0))


def test_missing_value_warns_once():
    sampler = sampler_of(target())
    batches = iter(sampler)
    next(batches)
    with pytest.warns(
        UserWarning, match="NoiseScaleTarget needs debiased_grad_sq_norm"
    ):
        sampler.observe(variance_trace=3.0)
    next(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.observe(variance_trace=3.0)


def test_forgotten_observe_warns_where_readings_are_needed():
    sampler = nk.AdaptiveBatchSampler(3000, target(max=2))
    with pytest.warns(UserWarning, match="1024 batches were handed out"):
        list(sampler)
    list(nk.AdaptiveBatchSampler(3000, nk.Constant(2)))  # warnings are errors


def test_decision_at_hand_needs_observe_with_workers():
    sampler = sampler_of(nk.Constant(4))
    batches = iter(loader_of(sampler, 1, 2))
    next(batches)
    assert sampler.decision == nk.Decision(4, reason="constant")
    next(batches)
    with pytest.raises(nk.NoisekitError, match="4 batches were handed out and none"):
        _ = sampler.decision


def test_there_is_no_length():
    with pytest.raises(TypeError):
        len(sampler_of(nk.Constant(4)))
    with pytest.raises(TypeError):
        len(loader_of(sampler_of(nk.Constant(4))))


def test_sizes_are_at_most_the_data():
    sampler = nk.AdaptiveBatchSampler(10, nk.Constant(64))
    assert [len(batch) for batch in sampler] == [10]


# ------------------------------------------------------------- with a probe, trained


class Noisy(torch.nn.Module):
    """A linear model with its loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(5, 3)

    def forward(self, inputs):
        return self.linear(inputs)


def test_fed_by_a_probe():
    """CABS of the probe's readings is CABS of one backward pass per example."""
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(60, 5), torch.randint(0, 3, (60,))
    )
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_fn = torch.nn.CrossEntropyLoss()
    policy = nk.CABS(min=2, max=60, smoothing=0.0, c=4.0)
    sampler = nk.AdaptiveBatchSampler(data, policy, optimizer=optimizer)
    loader = DataLoader(data, batch_sampler=sampler)
    expected, sizes = 2, []
    with nk.attach(model, optimizer) as probe:
        for _ in range(3):
            for inputs, targets in loader:
                assert len(inputs) == expected
                sizes.append(expected)
                xi = biased_variance(model, loss_fn, inputs, targets)
                loss = loss_fn(model(inputs), targets)
                raw = 4.0 * 0.5 * xi / float(loss.detach())
                expected = min(max(round(raw), 2), 60)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                sampler.observe(probe, loss=loss)
    assert len(set(sizes)) > 3


def biased_variance(model, loss_fn, inputs, targets):
    """Sum of the elementwise biased variances, one backward pass per example."""
    rows = []
    for row, target in zip(inputs, targets, strict=True):
        loss = loss_fn(model(row[None]), target[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]).double())
    return float(torch.stack(rows).var(0, correction=0).sum())


def test_probe_that_skips_steps_leaves_them_out():
    """Catches: the reading of an older step taken for this one."""
    data = torch.utils.data.TensorDataset(torch.randn(40, 5), torch.zeros(40).long())
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = nk.AdaptiveBatchSampler(
        data, nk.NormTest(min=4, max=40, every=nk.At(updates=3))
    )
    with nk.attach(model, optimizer, every=3) as probe:
        for inputs, targets in DataLoader(data, batch_sampler=sampler):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            sampler.observe(probe)
            last = sampler.state_dict()["driver"]["readings"][-1]
            read = probe.step % 3 == 1
            assert (last["variance_trace"] is not None) is read


# ------------------------------------------------------------ gradient accumulation


@pytest.mark.parametrize(("workers", "prefetch"), [(0, None), (2, 3)])
def test_accumulated_updates_never_lag(workers, prefetch):
    sampler = nk.GradientAccumulation(NUM_EXAMPLES, target(), microbatch=4)
    loader = loader_of(sampler, workers, prefetch)
    seen, update_number = [], 0
    for _ in range(4):
        for update in sampler.updates(loader):
            rows = [microbatch.tolist() for microbatch in update]
            wanted = 2 if update_number == 0 else 3 + ((update_number - 1) * 7) % 40
            assert [len(row) for row in rows] == [4] * -(-wanted // 4)
            assert update.share == 1 / len(rows)
            assert update.decision.batch_size == 4 * len(rows)
            sampler.observe(**reading(update_number))
            update_number += 1
            seen += [index for row in rows for index in row]
    for begin in range(0, 3 * NUM_EXAMPLES, NUM_EXAMPLES):
        part = seen[begin : begin + NUM_EXAMPLES]
        assert sorted(part) == list(range(NUM_EXAMPLES))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 6, 13])
def test_accumulation_resumes_at_an_update(workers, stop):
    def train(sampler, count):
        found = []
        while len(found) < count:
            for update in sampler.updates(loader_of(sampler, workers)):
                found.append([row.tolist() for row in update])
                sampler.observe(**reading(sampler.num_updates))
                if len(found) == count:
                    break
        return found

    def fresh():
        return nk.GradientAccumulation(NUM_EXAMPLES, target(), microbatch=3, seed=4)

    whole = train(fresh(), stop + 10)
    first = fresh()
    before = train(first, stop)
    second = fresh()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + train(second, 10) == whole


def test_accumulated_gradient_is_that_of_the_whole_batch():
    torch.manual_seed(0)
    inputs, targets = torch.randn(24, 5).double(), torch.randint(0, 3, (24,))
    data = torch.utils.data.TensorDataset(inputs, targets)
    model = Noisy().double()
    loss_fn = torch.nn.CrossEntropyLoss()
    sampler = nk.GradientAccumulation(
        data, nk.Constant(24), microbatch=8, shuffle=False
    )
    for update in sampler.updates(DataLoader(data, batch_sampler=sampler)):
        for rows, labels in update:
            (update.share * loss_fn(model(rows), labels)).backward()
    found = model.linear.weight.grad.clone()
    model.zero_grad()
    loss_fn(model(inputs), targets).backward()
    torch.testing.assert_close(found, model.linear.weight.grad, rtol=1e-12, atol=0)


def test_accumulation_mistakes():
    with pytest.raises(nk.NoisekitError, match="at most the examples per process, 10"):
        nk.GradientAccumulation(10, nk.Constant(4), microbatch=11)
    sampler = nk.GradientAccumulation(10, nk.Constant(4), microbatch=2)
    with pytest.raises(nk.NoisekitError, match="got none; call it once in every pass"):
        sampler.observe()
    updates = sampler.updates(loader_of(sampler, dataset=range(10)))
    for _ in next(updates):
        break
    with pytest.raises(nk.NoisekitError, match="all its 2 micro-batches, got 1"):
        next(updates)
    with pytest.raises(nk.NoisekitError, match="got one without batches"):
        list(next(sampler.updates([])))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, nk.CABS), "policy needs to be a.* Policy, got the class CABS"),
        ((0, nk.Constant(4)), "needs an example per process, got 0 examples for 1"),
        ((range(0), nk.Constant(4)), "got 0 examples"),
    ],
)
def test_arguments_refused(arguments, words):
    with pytest.raises(nk.NoisekitError, match=words):
        nk.AdaptiveBatchSampler(*arguments)
    with pytest.raises(nk.NoisekitError, match="epoch_end needs"):
        nk.AdaptiveBatchSampler(10, nk.Constant(4), epoch_end="cut")
    with pytest.raises(nk.NoisekitError, match="decision needs"):
        nk.apply_rate(torch.optim.SGD([torch.zeros(1)], lr=0.1), 64)


def test_averages_hold_every_reading_also_those_at_the_end_of_a_pass():
    """With workers the last readings of a pass come after its last hand-out.

    Catches: only the latest reading kept until the next decision.
    """
    policy = nk.CABS(min=8, max=8)
    sampler = nk.AdaptiveBatchSampler(40, policy)
    loader = loader_of(sampler, 1, 4, dataset=range(40))
    readings = []
    for _ in range(3):
        for _ in loader:
            update = sampler.num_updates
            readings.append((1.0 + update % 4, 100.0 + update))
            loss, trace = readings[-1]
            sampler.observe(loss=loss, variance_trace=trace, learning_rate=0.1)
    assert len(readings) == 15
    saved = sampler.state_dict()["driver"]
    seen = len(readings) - len(saved["readings"])
    assert seen == 10  # the last batch was handed out before any of the last pass
    loss_average, variance = 1.0, 0.0
    for loss, trace in readings[:seen]:
        loss_average = 0.95 * loss_average + 0.05 * loss
        variance = 0.95 * variance + 0.05 * trace * 7 / 8
    assert saved["policy"]["loss"] == pytest.approx(loss_average, rel=1e-12)
    assert saved["policy"]["variance"] == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize(
    ("policy", "metric", "wanted"),
    [
        (
            nk.CABS(min=2, max=900, smoothing=0.0, c=50.0, moments="conv_compat"),
            "cabs_conv_compat",
            lambda value, size: round(50 * value),
        ),
        (
            nk.InnerProductTest(min=8, max=900, theta=0.05),
            "inner_product_test",
            lambda value, size: math.ceil(size * (value / 0.05) ** 2),
        ),
    ],
)
def test_step_metrics_of_a_probe_reach_their_policies(policy, metric, wanted):
    """The size is that of the probe's own metric, at the same step."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(1000, 1, 6, 6).double(), torch.randint(0, 3, (1000,))
    )
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(32, 3)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sampler = nk.AdaptiveBatchSampler(data, policy, optimizer=optimizer)
    quantities = quantities_for(need.name for need in policy.needs)
    assert quantities == (metric,)
    probe = nk.attach(
        model,
        optimizer,
        loss_fn=torch.nn.CrossEntropyLoss(),
        estimator="per_example",
        quantities=quantities,
    )
    expected = [policy.first_size]
    with probe:
        for inputs, targets in itertools.islice(loader_of(sampler, dataset=data), 4):
            assert len(inputs) == expected[-1]
            optimizer.zero_grad()
            loss = probe.loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            sampler.observe(probe, loss=loss)
            value = probe.last_reading.quantities[metric].value
            grown = wanted(value, len(inputs))
            low = expected[-1] if metric == "inner_product_test" else 2
            expected.append(min(max(grown, low), 900))
    assert len(set(expected)) > 2

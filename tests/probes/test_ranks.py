"""Readings of a model that several processes train together."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.probes import rank_work
from tests.processes import run_in_processes
from tests.reference import noise as reference

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def answers(request: pytest.FixtureRequest) -> Answers:
    """What each of two and of four processes has read."""
    return run_in_processes(rank_work.everything, request.param)


def gradients(rank: int, sizes: Sequence[int]) -> list[Tensor]:
    """``(n, P)`` by micro-batch: gradients at the first step's weights."""
    found = []
    for i, size in enumerate(sizes):
        inputs, targets = rank_work.batch(rank, size, seed=i)
        rows = reference.example_gradients(
            rank_work.mlp(), functional.cross_entropy, inputs, targets
        )
        found.append(torch.cat([row.flatten(1) for row in rows.values()], 1))
    return found


def means_of_means(
    num_ranks: int, sizes: Any, *, unit: str = "example"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, weights and sizes of all ranks' units, where losses are means."""
    rows, weights, lengths = [], [], []
    for rank in range(num_ranks):
        parts = gradients(rank, sizes(rank, 0))
        for part in parts:
            own = 1 / (num_ranks * len(parts))
            if unit == "example":
                rows.append(part)
                weights += [own / len(part)] * len(part)
                lengths += [1.0] * len(part)
            else:
                rows.append(part.mean(0, keepdim=True))
                weights.append(own)
                lengths.append(float(len(part)))
    as_tensor = torch.tensor([weights, lengths], dtype=torch.float64)
    return torch.cat(rows), as_tensor[0], as_tensor[1]


def assert_noise(row: dict[str, Any], rows: Tensor, weights: Tensor) -> None:
    trace, norm = reference.unit_noise(rows, weights)
    mean = (weights[:, None] * rows).sum(0)
    assert row["reason"] is None
    assert row["grad_sq_norm"] == pytest.approx(float(mean.square().sum()))
    assert row["variance_trace"] == pytest.approx(trace)
    assert row["debiased_grad_sq_norm"] == pytest.approx(norm, rel=1e-6, abs=1e-12)
    assert row["batch_size"] == row["num_units"] == len(rows)


def first(answers: Answers, name: str) -> dict[str, Any]:
    """The first reading, which all ranks agree on to the last bit."""
    rows = [dict(answer[name][0]) for answer in answers]
    for row in rows:
        del row["examples"]  # each rank knows those of its own
    assert all(str(row) == str(rows[0]) for row in rows)  # also where values are NaN
    return rows[0]


@pytest.mark.parametrize(
    "name", ["alike", "bucket_view", "static_graph", "clipped", "inside", "outside"]
)
def test_equal_batches_read_as_one_process_would(answers: Answers, name: str) -> None:
    """Whatever way gradients are reduced, compiled inside or outside the wrapper.

    Catches: the norm of a rank's own gradient, taken before the reduction; local norms
    as if the other ranks' examples were not there.
    """
    rows, weights, _ = means_of_means(len(answers), rank_work.alike)
    row = first(answers, name)
    assert_noise(row, rows, weights)
    assert row["variance_trace"] == pytest.approx(float(rows.var(0).sum()))


def test_layers_and_examples_are_the_step_s(answers: Answers) -> None:
    """Catches: layers left unsummed; ``|g_i|²`` scaled by the number of ranks."""
    rows, _, _ = means_of_means(len(answers), rank_work.alike)
    sizes = [p.numel() for p in rank_work.mlp().parameters()]
    parts = rows.split(sizes, 1)
    expected = [(float(p.mean(0).square().sum()), float(p.var(0).sum())) for p in parts]
    for layer, pair in zip(first(answers, "alike")["layers"], expected, strict=True):
        assert layer == pytest.approx(pair)
    for rank, answer in enumerate(answers):
        own = gradients(rank, [4])[0].square().sum(1)
        assert answer["alike"][0]["examples"] == pytest.approx(own.tolist())


def test_unequal_batches_weigh_by_rank_where_losses_are_means(
    answers: Answers,
) -> None:
    """Catches: every example weighing the same, though ranks' means are averaged."""
    rows, weights, _ = means_of_means(len(answers), rank_work.growing)
    assert len(set(weights.tolist())) == len(answers)
    assert_noise(first(answers, "growing"), rows, weights)


def test_unequal_batches_weigh_by_example_where_losses_are_sums(
    answers: Answers,
) -> None:
    """Catches: the local count where the mean over all examples is meant."""
    rows, _, _ = means_of_means(len(answers), rank_work.growing)
    weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    assert_noise(first(answers, "summed"), rows, weights)


def test_one_example_per_rank_is_enough(answers: Answers) -> None:
    """Catches: two examples asked of every rank."""
    rows, weights, _ = means_of_means(len(answers), lambda rank, step: [1])
    assert_noise(first(answers, "single"), rows, weights)


@pytest.mark.parametrize("name", ["two_parts", "two_syncs"])
def test_accumulation_with_and_without_no_sync(answers: Answers, name: str) -> None:
    """Catches: the norm of a micro-batch's gradient, which is not reduced yet."""
    rows, weights, _ = means_of_means(len(answers), rank_work.two_parts)
    assert_noise(first(answers, name), rows, weights)


def test_steps_that_never_synchronise_are_noticed(answers: Answers) -> None:
    """Catches: a reading of one rank's gradient in the name of all."""
    reason = answers[0]["never"][0]["reason"]
    assert reason == (
        "the last backward pass was under no_sync(), so that every rank applies a "
        "gradient of its own"
    )


def test_shared_weights_are_checked_before_the_reduction(answers: Answers) -> None:
    """Catches: contributions compared with a gradient that is half reduced."""
    assert first(answers, "tied")["reason"] is None


def test_estimators_side_by_side(answers: Answers) -> None:
    """Micro-batches of all ranks are units; ranks that accumulate are not.

    Catches: a rank's own micro-batches compared with the gradient of all.
    """
    row = first(answers, "side_by_side")
    rows, weights, sizes = means_of_means(
        len(answers), rank_work.two_parts, unit="microbatch"
    )
    expected = reference.unit_noise(rows, weights, sizes)
    assert row["estimates"]["accumulation"] == pytest.approx(expected, rel=1e-6)
    assert set(row["estimates"]) == {"per_example", "accumulation", "chunks"}
    assert (
        "estimator='accumulation' takes those of all ranks" in row["missing"]["ranks"]
    )


def test_ranks_as_units(answers: Answers) -> None:
    """Catches: unequal ranks taken for units of one size; the reduced gradient's norm.

    With BatchNorm or a compiled model there is no other way, at one micro-batch a step.
    """
    row = first(answers, "ranks")
    rows, weights, sizes = means_of_means(
        len(answers), rank_work.growing, unit="microbatch"
    )
    expected = reference.unit_noise(rows, weights, sizes)
    assert (row["variance_trace"], row["debiased_grad_sq_norm"]) == pytest.approx(
        expected, rel=1e-6
    )
    assert row["num_units"] == len(answers)
    assert row["estimator"].startswith("ranks(")


@pytest.mark.parametrize(
    ("name", "estimator"), [("coupled", "ranks"), ("coupled_parts", "accumulation")]
)
def test_coupled_examples_are_read_by_ranks_or_micro_batches(
    answers: Answers, name: str, estimator: str
) -> None:
    """BatchNorm in training mode: ``"auto"`` takes what exists, and says its size.

    Catches: no reading where no rank accumulates; a rank's gradient called a
    micro-batch's; ranks compared whose gradients are sums of several.
    """
    row = first(answers, name)
    rows, weights, sizes = [], [], []
    for rank in range(len(answers)):
        parts = (rank_work.growing if name == "coupled" else rank_work.two_parts)(
            rank, 0
        )
        for i, size in enumerate(parts):
            model = rank_work.normalised()
            inputs, targets = rank_work.batch(rank, size, seed=i)
            loss = functional.cross_entropy(model(inputs), targets)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([grad.flatten() for grad in grads]))
            weights.append(1 / (len(answers) * len(parts)))
            sizes.append(float(size))
    as_tensor = torch.tensor([weights, sizes], dtype=torch.float64)
    expected = reference.unit_noise(torch.stack(rows), *as_tensor)
    assert (row["variance_trace"], row["debiased_grad_sq_norm"]) == pytest.approx(
        expected, rel=1e-6
    )
    assert row["estimator"] == f"{estimator}({row['unit_size']:g})"
    assert row["num_units"] == len(rows)


def test_ranks_that_read_coupled_examples_differently_are_told(
    answers: Answers,
) -> None:
    """Catches: a rank's gradient and micro-batches' counted as units of one kind."""
    row = first(answers, "coupled_unevenly")
    assert row["reason"].endswith(
        "the ranks have read in different ways; name an estimator that all of them "
        "can take, such as 'accumulation'"
    )


@pytest.mark.parametrize("name", ["tokens", "summed_tokens"])
def test_tokens_are_counted_over_all_ranks(answers: Answers, name: str) -> None:
    """A rank's mean is over its own tokens, and each rank weighs the same; or a sum.

    Catches: one rank's tokens taken for all; weights as if one mean were over all.
    """
    row = first(answers, name)
    lengths = [rank_work.batch(rank, rank + 2)[1] + 1.0 for rank in range(len(answers))]
    weights = torch.cat([own / own.sum() / len(answers) for own in lengths])
    if name == "summed_tokens":
        weights = torch.cat(lengths) / torch.cat(lengths).sum()
    rows = torch.cat([gradients(rank, [rank + 2])[0] for rank in range(len(answers))])
    trace, norm = reference.unit_noise(rows, weights.double())
    total = float(torch.cat(lengths).sum())
    per_sequence = total * float(weights.square().sum())
    assert row["tokens"] == total
    assert row["tokens_per_sequence"] == pytest.approx(per_sequence)
    assert row["variance_trace"] == pytest.approx(trace)
    assert row["debiased_grad_sq_norm"] == pytest.approx(norm, rel=1e-6, abs=1e-12)
    if norm > 0:
        expected = trace / norm * per_sequence
        assert row["simple_noise_scale"] == pytest.approx(expected, rel=1e-5)


def test_tokens_that_a_rank_did_not_see_are_missing(answers: Answers) -> None:
    """Catches: zero tokens, and a noise scale of zero of them."""
    row = first(answers, "uncounted")
    assert "probe.loss_fn, so that no target was seen" in row["missing"]["tokens"]
    assert str(row["simple_noise_scale"]) == "nan"


def test_clip_factor_is_of_the_reduced_gradient(answers: Answers) -> None:
    """Catches: a factor that counts the reduction in."""
    row = first(answers, "clipped")
    expected = 1e-3 / row["grad_sq_norm"] ** 0.5
    assert row["clip_factor"] == pytest.approx(expected, rel=1e-2)
    assert first(answers, "alike")["clip_factor"] == 1.0


def test_one_all_reduce_per_reading(answers: Answers) -> None:
    """Steps that are not read ask for none; their examples are counted all the same.

    Catches: a second exchange, one per step, or counts of this rank alone.
    """
    per_step = sum(range(2, len(answers) + 2))
    for rank, answer in enumerate(answers):
        counted = answer["counted"]
        assert counted["calls"] == [1, 1]  # vectors
        assert counted["seen"] == [per_step, 4 * per_step]
        # The last two steps are not read: other ranks count as this one does.
        expected = 4 * per_step + 2 * len(answers) * (rank + 2)
        assert counted["total"] == expected


def test_training_keeps_its_bits(answers: Answers) -> None:
    """Catches: a reduction that the probe has changed or added to."""
    for answer in answers:
        same = answer["same_training"]
        pairs = zip(same["plain"], same["probed"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["uneven", "uneven_active", "uneven_parts"])
def test_uneven_inputs(answers: Answers, name: str) -> None:
    """Rank ``k`` has ``k + 1`` batches; those left read on, over whom is left.

    Also where steps accumulate two micro-batches, of which ranks without inputs hear.

    Catches: a sum that waits for ranks without inputs; their zeros taken for examples;
    the divisor of all ranks in the norm of the mean gradient.
    """
    last = answers[-1][name]
    assert [row["step"] for row in last["rows"]] == list(range(1, len(answers) + 1))
    for step, row in enumerate(last["rows"]):
        left = range(step, len(answers))
        repeats = 2 if name == "uneven_parts" else 1
        parts = [torch.cat(gradients(rank, [rank + 2] * repeats)) for rank in left]
        weights = [1 / (len(left) * len(part)) for part in parts for _ in part]
        assert_noise(row, torch.cat(parts), torch.tensor(weights, dtype=torch.float64))
    steps = {answer[name]["step"] for answer in answers}
    seen = {answer[name]["seen"] for answer in answers}
    assert steps == {len(answers)}
    assert seen == {repeats * sum((k + 1) * (k + 2) for k in range(len(answers)))}


def test_a_measurement_is_of_this_rank_s_batch(answers: Answers) -> None:
    """Catches: a measurement that waits for the others, or reduces over them."""
    for rank, answer in enumerate(answers):
        found = answer["measured"]
        model = rank_work.mlp()
        for parameter, value in zip(model.parameters(), found["weights"], strict=True):
            parameter.data.copy_(value)
        inputs, targets = rank_work.batch(rank, 5, seed=77)
        grads = reference.example_gradients(
            model, functional.cross_entropy, inputs, targets
        )
        trace = reference.variance_trace(list(grads.values()))
        assert found["same"]
        assert found["row"]["batch_size"] == 5
        assert found["row"]["variance_trace"] == pytest.approx(trace)


def test_a_saved_count_is_of_all_ranks(answers: Answers) -> None:
    """Catches: one rank's examples taken for everybody's after a resumption."""
    total = sum(range(2, len(answers) + 2))
    for rank, answer in enumerate(answers):
        expected = total + len(answers) * (rank + 2)  # the second step is not read
        assert answer["measured"]["seen"] == (expected, expected, 2)


def test_one_rank_without_a_reading_is_told_by_all(answers: Answers) -> None:
    """Catches: a vector of another length, which all-reduce hangs or fails on."""
    reasons = [answer["broken"]["reason"] for answer in answers]
    good = len(answers) - 1
    expected = f"only {good} of {len(answers)} ranks could read their examples"
    assert reasons[:-1] == [expected] * good
    assert reasons[-1] == "2 forward passes went into one backward pass"
    assert all(answer["broken"]["grad_sq_norm"] > 0 for answer in answers)


REFUSALS = {
    "budget": (
        "budget needs steps that the clock may choose, got a run where the clocks of "
        "{} ranks differ, and all must read one step; use every=."
    ),
    "nested": (
        "attach needs DistributedDataParallel around the whole model, got "
        "DistributedDataParallel at 0 inside it; wrap the model as a whole."
    ),
    "inner": (
        "a probe needs the model that gradients are averaged for, got one that "
        "DistributedDataParallel calls; attach to the wrapped model instead."
    ),
    "synced": (
        "estimator='accumulation' needs ranks whose gradients are independent, got "
        "SyncBatchNorm at 1, which couples the examples of {} ranks; use "
        "estimator='per_example' with BatchNorm in evaluation mode, or BatchNorm that "
        "is not synchronised."
    ),
    "calibrated": (
        "calibrate_every needs one process, got {} ranks: the ratio is not a sum over "
        "ranks; leave it out, or use estimator='rows'."
    ),
    "fsdp": (
        "attach needs whole parameters on every rank, got FSDPSequential at the top, "
        "which shards them: hooks see a shard of the gradient, or none; measure at "
        "frozen weights with gradient_noise on an unsharded copy, or train with "
        "DistributedDataParallel."
    ),
    "tensor": (
        "attach needs whole parameters on every rank, got 0.weight sharded as a "
        "DTensor (FSDP2 or tensor parallelism): its hooks see a shard of the gradient, "
        "or none; measure at frozen weights with gradient_noise on an unsharded copy, "
        "or train with DistributedDataParallel."
    ),
    "unjoined": (
        "a probe needs to know of uneven inputs, got a model that joins without it, so "
        "that its sums would wait for ranks that ran out; write: with Join([model, "
        "probe.joinable])."
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(answers: Answers, name: str) -> None:
    """Catches: ranks that hang, or read one rank's gradient as the step's."""
    expected = REFUSALS[name].format(len(answers))
    assert [answer["refusals"][name] for answer in answers] == [expected] * len(answers)

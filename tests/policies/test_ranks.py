"""Two processes: equal decisions, shares of one batch, gradients of one process."""

import json

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import noisekit as nk
from tests.processes import run_in_processes

NUM_EXAMPLES = 50


def policy():
    return nk.NoiseScaleTarget(
        min=3, max=30, smoothing=0.5, min_readings=1, hysteresis=0.0
    )


def numbers_of_one_rank(rank, world_size):
    """Each process observes its own numbers, one of them a NaN now and then."""
    sampler = nk.AdaptiveBatchSampler(NUM_EXAMPLES, policy())
    rows, sizes = [], []
    for _ in range(3):
        for batch in DataLoader(range(NUM_EXAMPLES), batch_sampler=sampler):
            update = sampler.num_updates
            rows.append(batch.tolist())
            sizes.append(sampler.decision.batch_size)
            trace = float("nan") if rank == 1 and update == 3 else 10.0 + update
            sampler.observe(
                variance_trace=trace + 5 * rank,
                debiased_grad_sq_norm=torch.tensor(1.0 + 0.1 * rank),
            )
    return rows, sizes, json.dumps(sampler.state_dict())


def test_processes_agree_whatever_each_observes():
    """Catches: a decision from one process's numbers; shares of unequal size."""
    (rows, sizes, state), (others, same, its_state) = run_in_processes(
        numbers_of_one_rank, 2
    )
    assert sizes == same
    assert state == its_state
    assert len(set(sizes)) > 3
    assert all(size % 2 == 0 and 4 <= size <= 30 for size in sizes)
    for own, other, size in zip(rows, others, sizes, strict=True):
        assert len(own) == len(other) == size // 2
    # Together they read the stream that one process reads.
    pairs = zip(rows, others, strict=True)
    merged = [i for a, b in pairs for both in zip(a, b, strict=True) for i in both]
    from noisekit.core.batch_order import BatchOrder

    order = BatchOrder(0, num_examples=NUM_EXAMPLES, device="cpu")
    assert merged == order.indices(0, len(merged)).tolist()


def trained(rank, world_size):
    """Train under DDP, or alone where there is one process, by two policies."""
    return [
        trained_by(rule, world_size)
        for rule in (
            nk.NormTest(min=4, max=48, theta=0.4, population_size=NUM_EXAMPLES),
            nk.Table((4, 16, 10), every=nk.At(updates=3)),
        )
    ]


def trained_by(rule, world_size):
    torch.manual_seed(0)
    inputs = torch.randn(NUM_EXAMPLES, 4).double()
    data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
    model = nn.Linear(4, 2).double()
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loss_fn = nn.CrossEntropyLoss()
    sampler = nk.AdaptiveBatchSampler(data, rule, seed=2)
    sizes = []
    with nk.attach(wrapped, optimizer) as probe:
        for _ in range(4):
            for rows, labels in DataLoader(data, batch_sampler=sampler):
                sizes.append(sampler.decision.batch_size)
                optimizer.zero_grad()
                loss_fn(wrapped(rows), labels).backward()
                optimizer.step()
                sampler.observe(probe)
    return sizes, model.weight.detach().clone()


def test_two_processes_train_as_one():
    """Decisions follow the whole batch, and its gradient is that of one process.

    Catches: a test of one process's share, which has half the examples; shares of
    unequal size, which DDP weighs equally.
    """
    ours, theirs = run_in_processes(trained, 2)
    for (sizes, weight), (same, others) in zip(ours, theirs, strict=True):
        assert sizes == same
        assert torch.equal(weight, others)
        assert len(set(sizes)) > 2
    (by_test, _), (by_table, expected) = trained(0, 1)
    (sizes, _), (same, weight) = ours
    # The first test is of the same four examples; its size is rounded up to an even.
    assert sizes[:2] == [by_test[0], by_test[1] + by_test[1] % 2]
    assert same == by_table
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12)


def microbatches(rank, world_size):
    sampler = nk.GradientAccumulation(NUM_EXAMPLES, policy(), microbatch=2)
    loader = DataLoader(range(NUM_EXAMPLES), batch_sampler=sampler, num_workers=1)
    found = []
    for update in sampler.updates(loader):
        found.append(([row.tolist() for row in update], update.decision.batch_size))
        sampler.observe(variance_trace=9.0 + rank, debiased_grad_sq_norm=1.0)
    return found


def test_processes_have_equally_many_microbatches():
    ours, theirs = run_in_processes(microbatches, 2)
    assert [size for _, size in ours] == [size for _, size in theirs]
    assert ours[1][1] == 12  # 9.5 rounded half to even to 10, then up to 2 x 2
    for (rows, size), (others, _) in zip(ours, theirs, strict=True):
        assert len(rows) == len(others) == size // 4
        assert not set(map(tuple, rows)) & set(map(tuple, others))


def test_one_process_per_group_is_alone():
    assert not dist.is_initialized()
    assert len(next(iter(nk.AdaptiveBatchSampler(10, nk.Constant(5))))) == 5

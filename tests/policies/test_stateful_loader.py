"""The sampler inside torchdata's StatefulDataLoader, which saves its state itself."""

import copy

import pytest

import noisekit as nk

NUM_EXAMPLES = 97

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@pytest.fixture(autouse=True, scope="module")
def torchdata():
    """Skip where it is not installed."""
    pytest.importorskip("torchdata.stateful_dataloader")


def loader_of(policy, workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    sampler = nk.AdaptiveBatchSampler(NUM_EXAMPLES, policy, seed=1)
    loader = StatefulDataLoader(
        range(NUM_EXAMPLES), batch_sampler=sampler, num_workers=workers
    )
    return sampler, loader


def train(sampler, loader, updates, *, observe=True, save_at=None):
    """Return the batches, and the loader's state after update ``save_at``."""
    found, saved = [], None
    while len(found) < updates:
        for batch in loader:
            found.append(batch.tolist())
            if observe:
                wanted = 3.0 + (sampler.num_updates * 7) % 20
                sampler.observe(variance_trace=wanted, debiased_grad_sq_norm=1.0)
            if len(found) == save_at:
                saved = copy.deepcopy(loader.state_dict())
            if len(found) == updates:
                break
    return found, saved


def target():
    return nk.NoiseScaleTarget(
        min=2, max=64, smoothing=0.0, min_readings=1, hysteresis=0.0
    )


@pytest.mark.parametrize("save_at", [1, 4, 9, 11])
def test_resume_without_workers_is_exact(save_at):
    whole, saved = train(*loader_of(target(), 0), 25, save_at=save_at)
    sampler, loader = loader_of(target(), 0)
    loader.load_state_dict(saved)
    rest, _ = train(sampler, loader, 25 - save_at)
    assert whole[:save_at] + rest == whole


@pytest.mark.parametrize("observe", [True, False])
@pytest.mark.parametrize("save_at", [1, 5, 9])
def test_scheduled_policies_resume_exactly_with_workers(observe, save_at):
    """Catches: a second pass that begins anew; batches that were only prefetched."""
    growth = nk.Growth(7, factor=1.3, every=nk.At(epochs=0.5), max=40)
    options = {"observe": observe}
    whole, saved = train(*loader_of(growth, 2), 20, save_at=save_at, **options)
    sampler, loader = loader_of(growth, 2)
    loader.load_state_dict(saved)
    rest, _ = train(sampler, loader, 20 - save_at, **options)
    assert whole[:save_at] + rest == whole


def test_adaptive_policies_lose_no_example_with_workers():
    """The stream goes on where it was, first in the sizes of the last decision."""
    whole, saved = train(*loader_of(target(), 2), 12, save_at=6)
    sampler, loader = loader_of(target(), 2)
    loader.load_state_dict(saved)
    rest, _ = train(sampler, loader, 12)
    before = [index for batch in whole[:6] for index in batch]
    after = [index for batch in rest for index in batch]
    from noisekit.core.batch_order import BatchOrder

    order = BatchOrder(1, num_examples=NUM_EXAMPLES, device="cpu")
    assert before + after == order.indices(0, len(before) + len(after)).tolist()
    assert len({len(batch) for batch in rest[:4]}) == 1

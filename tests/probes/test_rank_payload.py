"""What step metrics sum over ranks, packed by name on every rank and put together."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from noisekit.core.distributed import Ranks
from noisekit.core.errors import UsageError
from noisekit.core.results import Unavailable
from noisekit.integrations import attach
from noisekit.noise.step_quantity import HessianForms
from noisekit.probes import MetricStep, RankSum, StepMetric
from noisekit.probes.capture.replicas import Replicas
from noisekit.probes.context import ProbeContext
from noisekit.probes.estimators.estimator_set import EstimatedNoise
from noisekit.probes.ranks.layout import VectorLayout
from noisekit.probes.ranks.sums import RankPart, RankSums
from noisekit.probes.step_metrics.hessian_forms import HessianNoise
from noisekit.probes.step_metrics.metric import State
from noisekit.probes.step_result import StepResult
from tests.probes.quantity_problems import problem

Q, K = 4, 3


class Sums(StepMetric):
    """A loss, squares, an average, and what is alike on every rank."""

    name = "sums"

    @property
    def rank_sums(self) -> Mapping[str, RankSum]:
        return {
            "loss": RankSum(1, power=1),
            "places": RankSum(Q, 2),
            "forms": RankSum(K),
        }


@dataclass(frozen=True)
class Rank:
    """One rank's numbers, and what its examples count."""

    loss: float
    places: Tensor
    forms: Tensor
    count: float
    known: bool = True

    def state(self) -> State | Unavailable:
        if not self.known:
            return Unavailable("its reason")
        loss = torch.tensor([self.loss])
        return {"loss": loss, "places": self.places, "forms": self.forms, "rate": 0.1}


def ranks(*, known: tuple[bool, ...] = (True, True)) -> list[Rank]:
    generator = torch.Generator().manual_seed(0)
    counts = zip((0.5, 2.0), (6.0, 2.0), known, strict=True)
    return [
        Rank(
            loss,
            torch.randn(Q, generator=generator, dtype=torch.float64),
            torch.randn(K, generator=generator, dtype=torch.float64),
            count,
            own,
        )
        for loss, count, own in counts
    ]


def together(parts: list[Rank], metric: StepMetric) -> State | Unavailable:
    """The first rank's state over all ranks, whose loss is a sum."""
    layout = RankSums(Q, ("auto",), "sum", len(parts), (metric,))
    results = [
        StepResult(
            step=1,
            examples_seen=0,
            batch_size=int(part.count),
            gradient=torch.ones(Q),
            sizes=(1,) * Q,
            methods={},
            noise=EstimatedNoise({}, ("auto",), {"auto": Unavailable("not read")}),
            states={metric: part.state()},
        )
        for part in parts
    ]
    packed = [
        layout.packed(RankPart(result, 1, part.count))
        for result, part in zip(results, parts, strict=True)
    ]
    assert all(len(v) == len(layout.absent(torch.device("cpu"))) for v in packed)
    sums = torch.stack(packed).sum(0)
    whole = layout.whole(results[0], sums, examples_seen=8, mean_over_active=False)
    return whole.states[metric]


def test_states_add_up_by_their_weights() -> None:
    """Losses by the weight, second moments by its square, curvatures alike.

    Catches: one power for all, entries shifted against each other.
    """
    parts, metric = ranks(), Sums()
    found = together(parts, metric)
    assert not isinstance(found, Unavailable)
    assert float(found["loss"]) == pytest.approx((6 * 0.5 + 2 * 2.0) / 8)
    wanted = (36 * parts[0].places + 4 * parts[1].places) / 64
    torch.testing.assert_close(found["places"], wanted)
    mean = (parts[0].forms + parts[1].forms) / 2
    torch.testing.assert_close(found["forms"], mean)
    assert found["rate"] == 0.1


def test_what_a_rank_does_not_know_nobody_knows() -> None:
    """With this rank's own reason, or that it is another's.

    Catches: a mean over the ranks that know, under the name of all.
    """
    reason = "only 1 of 2 ranks could read their examples"
    found = together(ranks(known=(True, False)), Sums())
    assert found == Unavailable(reason)
    found = together(ranks(known=(False, True)), Sums())
    assert found == Unavailable("its reason")


def test_named_parts_keep_their_places() -> None:
    """Catches: a vector whose length or order depends on what a rank could read."""
    layout = VectorLayout({"first": 1, "second": 2, "third": 3})
    packed = layout.packed({"third": torch.ones(3), "first": 2.0}, torch.device("cpu"))
    assert packed.tolist() == [2, 0, 0, 1, 1, 1]
    assert packed.dtype == torch.float64
    parts = layout.unpacked(packed)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "first": [2],
        "second": [0, 0],
        "third": [1, 1, 1],
    }


def test_chunks_of_different_sizes_are_not_averaged() -> None:
    """Catches: curvatures of different chunk sizes under the name of one."""
    metric = HessianNoise(hessian_every=1, num_chunks=K)
    state = {"forms": torch.eye(K).flatten(), "chunk_size": 2.5}
    for squared, size in ((6.25, 2), (6.5, None)):
        step = MetricStep(None, {**state, "chunk_size_squared": squared}, 1.0)  # type: ignore[arg-type]
        found = metric.value(step)
        if size is None:
            message = "the ranks' chunks are of different sizes"
            assert found == Unavailable(message)
        else:
            assert isinstance(found, HessianForms)
            assert found.values.shape == (K, K)


def test_ghost_batches_over_ranks_have_no_common_curvature() -> None:
    model, _, _ = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer)
    recorder = probe._recorder
    recorder.replicas = Replicas()
    recorder.replicas.ranks = Ranks(size=2)
    context = ProbeContext(
        recorder=recorder,
        optimizer=optimizer,
        loss_fn=functional.cross_entropy,
        ghost_batch=2,
    )
    message = (
        "quantities='hessian_noise_scale' of ghost batches needs one process, got 2 "
        "ranks; leave estimator='ghost' out, or the quantity."
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        HessianNoise(hessian_every=1, num_chunks=K).set_up(context)


@pytest.mark.parametrize(
    ("estimator", "name", "reason"),
    [
        (
            "norm_layers",
            "norm_test",
            "estimator='norm_layers' is not of the step's own gradient",
        ),
        ("chunks", "cabs_conv_compat", "it needs estimator='per_example'"),
        ("random_signs", "cabs", None),
    ],
)
def test_other_estimators_give_what_they_can(
    estimator: str, name: str, reason: str | None
) -> None:
    """Catches: a proxy's noise in a test of the batch size."""
    model, inputs, targets = problem("conv")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(
        model,
        optimizer,
        loss_fn=functional.cross_entropy,
        estimator=estimator,  # type: ignore[arg-type]
        quantities=(name,),  # type: ignore[arg-type]
    )
    probe.loss_fn(model(inputs), targets).backward()
    optimizer.step()
    assert probe.readings[-1].coverage.missing.get(name) == reason


def test_a_gradient_set_by_hand_has_no_direction_to_compare() -> None:
    """Catches: the direction of an earlier step's gradient."""
    model, _, _ = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = attach(model, optimizer, quantities="gradient_cosine")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert dict(probe.readings[-1].coverage.missing) == {
        "gradient_cosine": "no backward pass has left this gradient"
    }

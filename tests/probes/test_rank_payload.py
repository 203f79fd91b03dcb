"""What quantities take of a step, packed on every rank and added up."""

import re

import pytest
import torch
from torch.nn import functional

from noisekit.core.distributed import Ranks
from noisekit.core.errors import UsageError
from noisekit.noise.step_quantity import HessianForms
from noisekit.probes import attach
from noisekit.probes.options import ProbeOptions
from noisekit.probes.ranks.rank_payload import StepParts
from noisekit.probes.step_metrics.options import refuse_quantities
from tests.probes.quantity_problems import problem

Q, K = 4, 3


def part(loss: float, *, chunk_size: int = 2, known: bool = True) -> StepParts:
    generator = torch.Generator().manual_seed(int(10 * loss))
    forms = torch.randn(K, K, generator=generator, dtype=torch.float64)
    places = torch.randn(Q, generator=generator, dtype=torch.float64)
    return StepParts(
        torch.tensor(loss) if known else "its reason",
        places if known else "its reason",
        (0, 1),
        0.1,
        HessianForms(forms, chunk_size) if known else "its reason",
        K,
    )


def together(parts: list[StepParts], weights: list[float]) -> StepParts:
    like = torch.zeros(Q)
    packed = [p.packed(w, like) for p, w in zip(parts, weights, strict=True)]
    assert all(len(vector) == StepParts.size(Q, K) for vector in packed)
    return parts[0].of_all(torch.stack(packed).sum(0), sum(weights), len(parts))


def test_parts_add_up_by_their_weights() -> None:
    """Losses by the weight, second moments by its square, curvatures alike.

    Catches: one power for all, entries shifted against each other.
    """
    parts, weights = [part(0.5), part(2.0)], [6.0, 2.0]
    found = together(parts, weights)
    assert isinstance(found.loss, torch.Tensor)
    assert float(found.loss) == pytest.approx((6 * 0.5 + 2 * 2.0) / 8)
    places = [p.positions for p in parts if isinstance(p.positions, torch.Tensor)]
    wanted = (36 * places[0] + 4 * places[1]) / 64
    torch.testing.assert_close(found.positions, wanted)
    forms = [p.hessian.values for p in parts if isinstance(p.hessian, HessianForms)]
    assert isinstance(found.hessian, HessianForms)
    torch.testing.assert_close(found.hessian.values, (forms[0] + forms[1]) / 2)


def test_what_a_rank_does_not_know_nobody_knows() -> None:
    """With this rank's own reason, or that it is another's.

    Catches: a mean over the ranks that know, under the name of all.
    """
    found = together([part(0.5), part(2.0, known=False)], [1.0, 1.0])
    reason = "only 1 of 2 ranks could read their examples"
    assert (found.loss, found.positions, found.hessian) == (reason,) * 3
    found = together([part(0.5, known=False), part(2.0)], [1.0, 1.0])
    assert (found.loss, found.positions, found.hessian) == ("its reason",) * 3


def test_chunks_of_different_sizes_are_not_averaged() -> None:
    found = together([part(0.5), part(2.0, chunk_size=3)], [1.0, 1.0])
    assert found.hessian == "the ranks' chunks are of different sizes"


def test_ghost_batches_over_ranks_have_no_common_curvature() -> None:
    model, _, _ = problem("mlp")
    options = ProbeOptions(
        loss_fn=functional.cross_entropy,
        estimator="ghost",
        ghost_batch=2,
        quantities=("hessian_noise_scale",),
    )
    message = (
        "quantities='hessian_noise_scale' of ghost batches needs one process, got 2 "
        "ranks; leave estimator='ghost' out, or the quantity."
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        refuse_quantities(options, optimizer, Ranks(size=2))


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

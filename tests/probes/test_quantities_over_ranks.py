"""Quantities of a model that several processes train, against one process."""

from typing import Any

import pytest
import torch

from noisekit.integrations import attach
from noisekit.probes.step_metrics.metric_set import METRICS
from tests.probes import rank_quantities, rank_work
from tests.probes.quantity_problems import problem
from tests.processes import run_in_processes

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def answers(request: pytest.FixtureRequest) -> Answers:
    return run_in_processes(rank_quantities.everything, request.param)


def alone(reduction: str) -> dict[str, Any]:
    """The same two steps in one process."""
    model, inputs, targets = problem("conv")
    inputs, targets = inputs.repeat(4, 1, 1, 1), targets.repeat(4)
    inputs = inputs + torch.linspace(0, 1, len(inputs))[:, None, None, None].double()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1 if reduction == "mean" else 0.1 / len(inputs)
    )
    probe = attach(
        model,
        optimizer,
        loss_fn=rank_work.loss_of if reduction == "mean" else rank_work.summed_loss,
        loss_reduction=reduction,  # type: ignore[arg-type]
        quantities=rank_quantities.OVER_RANKS,
        num_chunks=3,
        hessian_every=1,
    )
    for _ in range(2):
        optimizer.zero_grad()
        probe.loss_fn(model(inputs), targets).backward()
        optimizer.step()
    return rank_quantities.row_of(probe.readings[-1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ranks_together_read_what_one_process_does(
    answers: Answers, reduction: str
) -> None:
    """Even shares with mean losses, very uneven ones with sums.

    Catches: one rank's loss or moments for all, squares of a rank's weight lost, a
    learning rate of the sum's units.
    """
    wanted = alone(reduction)["values"]
    for answer in answers:
        found = answer[reduction]
        for name in rank_quantities.OVER_RANKS:
            if name == "hessian_noise_scale":
                continue
            assert found["values"][name] == pytest.approx(wanted[name], rel=1e-5), name


def test_curvatures_are_averaged_over_ranks(answers: Answers) -> None:
    """The same on all ranks; unequal chunks are not put together.

    Catches: one rank's own forms under the name of all.
    """
    first = answers[0]["mean"]["values"]["hessian_noise_scale"]
    assert len(first) == 3
    for answer in answers:
        assert answer["mean"]["values"]["hessian_noise_scale"] == first
        uneven = answer["sum"]["missing"]["hessian_noise_scale"]
        assert uneven in {
            f"only 1 of {len(answers)} ranks could read their examples",
            "1 examples do not make two halves of 3 chunks of 1",
        }


def test_what_no_sum_gives_is_refused(answers: Answers) -> None:
    """Catches: the inner products with a rank's own gradient, one rank's histogram."""
    reasons = {
        "inner_product_test": "the applied gradient is known only after its reduction, "
        "when the ranks' examples are gone",
        "orthogonality_test": "the applied gradient is known only after its reduction, "
        "when the ranks' examples are gone",
        "gsnr": "each parameter's second moment would have to be summed over the "
        "ranks, a second exchange of the gradient's size",
        "evidence_stopping": "each parameter's second moment would have to be summed "
        "over the ranks, a second exchange of the gradient's size",
        "grad_histogram": "it would count one rank's own examples only",
    }
    for answer in answers:
        for name in METRICS:
            message = ""
            if name in reasons:
                message = (
                    f"quantities={name!r} needs one process, got {len(answers)} ranks: "
                    f"{reasons[name]}; leave it out, or measure at frozen weights."
                )
            assert answer["refused"][name] == message


def test_frozen_weights_are_measured_in_one_process(answers: Answers) -> None:
    """Catches: ranks that wait for each other with vectors of their own."""
    message = (
        "hessian_weighted_noise needs all data in one process, got "
        f"{len(answers)} ranks; call it on one rank with the model unwrapped."
    )
    assert [answer["frozen"] for answer in answers] == [message] * len(answers)

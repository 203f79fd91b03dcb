"""Data over two processes: the same numbers as in one, one all-reduce per product."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from noisekit.core.errors import UsageError
from noisekit.core.risk import EmpiricalRisk
from noisekit.curvature import (
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    SymmetricOperator,
    diagonal,
    frobenius_norm,
    pyhessian_top_eigenvalue,
    spectral_density,
    top_eigenpairs,
    trace,
    weight_scaled,
)
from tests.cases import CASES, RAGGED, batch_norm_network, mlp, seeded
from tests.processes import run_in_processes
from tests.randomness import seeded as seeded_generator

LOSS = nn.CrossEntropyLoss()
_IGNORED = next(case for case in CASES if case.name == "ignored_tokens")
_KINDS: dict[str, Any] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": FisherOperator,
    "covariance": GradientCovarianceOperator,
}


def _vector(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def _measured(shard: slice, group: Any) -> dict[str, Any]:
    """Everything about the two problems, on one shard or on all of the data."""
    found: dict[str, Any] = {}
    case = _IGNORED
    for name, kind in _KINDS.items():
        operator = kind(
            EmpiricalRisk(
                case.build(), case.loss_fn, case.batches[shard], process_group=group
            )
        )
        found[name] = operator @ _vector(operator.shape[0])
    risk = EmpiricalRisk(
        case.build(), case.loss_fn, case.batches[shard], process_group=group
    )
    found["value_and_grad"] = risk.value_and_grad()
    found["counts"] = (risk.total, risk.num_examples)
    plain = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED[shard], process_group=group)
    found["evaluated"] = (plain.evaluate().loss, plain.evaluate().error)
    found["hash"] = plain.data_hash
    norms = HessianOperator(
        EmpiricalRisk(
            seeded(batch_norm_network)(),
            LOSS,
            RAGGED[shard],
            bn="recalibrated",
            process_group=group,
        )
    )
    found["recalibrated"] = norms @ _vector(norms.shape[0])
    batches = GradientCovarianceOperator(plain, per="batch")
    found["batch_covariance"] = batches @ _vector(43)
    found.update(_solved(HessianOperator(plain), seeded_generator(0)))
    return found


def _solved(
    H: SymmetricOperator, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """What is found by random vectors."""
    pairs = top_eigenpairs(H, 2, tol=1e-8, generator=generator)
    density = spectral_density(H, num_probes=2, num_steps=8, generator=generator)
    traces = [
        trace(H, num_matvecs=12, method=method, generator=generator)
        for method in ("hutchinson", "hutch++", "xtrace")
    ]
    return {
        "eigenvalues": pairs.values,
        "residuals": pairs.residuals,
        "nodes": torch.from_numpy(density.nodes),
        "weights": torch.from_numpy(density.weights),
        "traces": torch.tensor([t.value for t in traces]),
        "diagonal": diagonal(H, num_matvecs=6, generator=generator).values,
        "norm": torch.tensor(frobenius_norm(H, generator=generator).value),
    }


def _on_a_rank(rank: int, world_size: int) -> dict[str, Any]:
    shard = slice(0, 2) if rank == 0 else slice(2, 3)
    found = _measured(shard, dist.group.WORLD)
    wrapped = DistributedDataParallel(seeded(mlp)())
    H = HessianOperator(wrapped, LOSS, RAGGED[shard])
    H @ _vector(43)
    calls: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        found["wrapped"] = H @ torch.eye(43, dtype=torch.float64)[:, :3]
    finally:
        dist.all_reduce = reduce
    found["calls"] = calls
    generator = torch.Generator().manual_seed(0)
    found["top"] = top_eigenpairs(H, 1, generator=generator).values
    found["own_seeds"] = _solved(H, seeded_generator(rank))
    found["combined"] = _solved(2.0 * H, seeded_generator(rank))
    found["entropy"] = _solved(weight_scaled(H), None)
    try:
        pyhessian_top_eigenvalue(H.risk)
    except UsageError as error:
        found["refusal"] = str(error)
    found["grads"] = [p.grad is None for p in wrapped.parameters()]
    found["parts"] = [weight for weight, _ in H.batch_operators()]
    return found


def test_two_processes_are_one() -> None:
    """Ragged shards with different numbers of tokens and of batches.

    Catches: shards counted alike, batch normalisers of one rank only, statistics of
    BatchNorm by rank, an all-reduce per column or per batch, DDP's own hooks; random
    vectors that differ by rank, whose products are of no matrix at all.
    """
    ranks = run_in_processes(_on_a_rank, 2)
    whole = _measured(slice(None), None)
    H = HessianOperator(seeded(mlp)(), LOSS, RAGGED)
    for found in ranks:
        assert found["hash"] == whole["hash"]
        for name in whole.keys() - {"hash"}:
            assert_close(found[name], whole[name], rtol=1e-10, atol=1e-13)
        assert_close(found["wrapped"], H.to_dense()[:, :3], rtol=1e-10, atol=1e-13)
        assert found["calls"] == [3 * 43]
        assert found["grads"] == [True] * 4
        assert "a share of them in each of 2" in found["refusal"]
    assert torch.equal(ranks[0]["top"], ranks[1]["top"])
    assert_close(ranks[0]["top"][0], torch.linalg.eigvalsh(H.to_dense())[-1])
    assert ranks[0]["parts"] + ranks[1]["parts"] == [0.4, 0.4, 0.2]
    for options, exact in (
        ("own_seeds", _solved(H, seeded_generator(0))),
        ("combined", _solved(2.0 * H, seeded_generator(0))),
    ):
        for found in ranks:
            assert_close(found[options], exact, rtol=1e-8, atol=1e-10)
    assert_close(ranks[0]["entropy"], ranks[1]["entropy"], rtol=0.0, atol=0.0)
    largest = torch.linalg.eigvalsh(weight_scaled(H).to_dense()).flip(0)[:2]
    assert_close(ranks[0]["entropy"]["eigenvalues"], largest)

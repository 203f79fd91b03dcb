"""The top Hessian eigenvalues by each package, counted in passes over the data."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from hessian_eigenthings import HessianOperator as EigenthingsOperator
from hessian_eigenthings import lanczos, supervised_loss
from problems import LOSS, Batches
from pyhessian import hessian
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

from noisekit.curvature import HessianOperator, top_eigenpairs

EIGENTHINGS_STEPS = {1: 20, 5: 30}


@dataclass(frozen=True)
class Answer:
    """Eigenvalues, best first, and the passes over the data that they took."""

    values: list[float]
    passes: float


def exact_values(model: nn.Module, batches: Batches, k: int) -> list[float]:
    """Return the top eigenvalues in double precision, by ``eigsh`` to 1e-10."""
    double = [(x.double(), y) for x, y in batches]
    copy = nn.Sequential(*model)
    before = {name: p.data for name, p in copy.named_parameters()}
    copy.double()
    parameters = list(copy.parameters())
    sizes = [p.numel() for p in parameters]
    total = sum(len(y) for _, y in double)
    graphs = [
        torch.autograd.grad(
            len(y) / total * LOSS(copy(x), y), parameters, create_graph=True
        )
        for x, y in double
    ]

    def product(vector: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(vector.reshape(-1)).split(sizes)
        parts = [g.view_as(p) for g, p in zip(given, parameters, strict=True)]
        out = torch.zeros(sum(sizes), dtype=torch.float64)
        for graph in graphs:
            terms = torch.autograd.grad(graph, parameters, parts, retain_graph=True)
            out += torch.cat([t.reshape(-1) for t in terms])
        return out.numpy()

    operator = LinearOperator((sum(sizes),) * 2, matvec=product, dtype=np.float64)
    values = eigsh(operator, k=k, which="LA", tol=1e-10, return_eigenvectors=False)
    for name, parameter in copy.named_parameters():
        parameter.data = before[name]
    return sorted(values.tolist(), reverse=True)


def ours(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run noisekit with its defaults, set-up included."""
    generator = torch.Generator().manual_seed(seed)
    with HessianOperator(model, LOSS, batches) as H:
        pairs = top_eigenpairs(H, k, generator=generator)
    # The first look takes an eighth of the data.
    passes = pairs.num_matvecs + pairs.num_screening_matvecs / 8
    return Answer(pairs.values.tolist(), passes)


class CountingLoader:
    """A list of batches that counts how often it was read."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.passes += 1
        return iter(self.batches)


def by_pyhessian(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run PyHessian with its defaults."""
    torch.manual_seed(seed)
    model.zero_grad()
    loader = CountingLoader(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = hessian(model, LOSS, dataloader=loader, cuda=False)
        values, _ = peer.eigenvalues(top_n=k)
    model.zero_grad()
    return Answer(values, loader.passes)


def by_curvlinops(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run curvlinops' operator in SciPy's ``eigsh`` at a tolerance of 1e-3."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(
        model, LOSS, parameters, batches, check_deterministic=False
    ).to_scipy()
    count = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return operator @ vector.astype(np.float32)

    counted = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
    start = np.random.default_rng(seed).standard_normal(operator.shape[0])
    values = eigsh(
        counted, k=k, which="LA", tol=1e-3, v0=start, return_eigenvectors=False
    )
    return Answer(sorted(values.tolist(), reverse=True), count)


def by_eigenthings(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run hessian-eigenthings' Lanczos for as many steps as it needs here.

    Its default of ``2 k`` leaves an error of 20 to 80 %.
    """
    loader = CountingLoader(batches)
    operator = EigenthingsOperator(model, loader, supervised_loss(LOSS))
    loader.passes = 0
    steps = EIGENTHINGS_STEPS[k]
    found = lanczos(operator, k=k, max_iter=steps, which="LA", seed=seed)
    values = sorted(found.eigenvalues.tolist(), reverse=True)
    return Answer(values, loader.passes or steps)


def gradient(model: nn.Module, batches: Batches, k: int, seed: int) -> Answer:
    """Run one gradient evaluation over the data, the unit of the table."""
    del k, seed
    parameters = list(model.parameters())
    for inputs, targets in batches:
        torch.autograd.grad(LOSS(model(inputs), targets), parameters)
    return Answer([], 1)

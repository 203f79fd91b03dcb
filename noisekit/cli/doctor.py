"""Checks of this machine and installation, device and arithmetic included."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

import noisekit
from noisekit.cli.terminal import cell
from noisekit.core.errors import DataNotFoundError
from noisekit.curvature import HessianOperator, top_eigenpairs
from noisekit.probes import self_check
from noisekit.train.data.sources import SOURCES, locate

_MIN_FREE_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: What was looked at.
        good: Whether all is well; ``None`` where it is only worth knowing.
        detail: What was found, and the way out where it is bad.
    """

    what: str
    good: bool | None
    detail: str


def examine() -> tuple[Table, bool]:
    """Return a table of findings, and whether none of them is bad."""
    findings = [finding for check in _CHECKS for finding in check()]
    table = Table(title="noisekit doctor", title_justify="left")
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    marks = {True: "[green]ok[/]", False: "[bold red]bad[/]", None: "[dim]info[/]"}
    for finding in findings:
        table.add_row(marks[finding.good], cell(finding.what), cell(finding.detail))
    return table, all(finding.good is not False for finding in findings)


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("Python", sys.version_info >= (3, 11), f"{python} (needs 3.11)")
    yield Finding("noisekit", True, noisekit.__version__)
    for package in ("torch", "numpy", "scipy", "pandas", "pyarrow", "pyhessian"):
        yield Finding(package, True, metadata.version(package))


def _machine() -> Iterator[Finding]:
    threads = f"{os.cpu_count()} CPUs, PyTorch uses {torch.get_num_threads()} threads"
    yield Finding("CPU", None, threads)
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(
        "disk",
        free > _MIN_FREE_BYTES,
        f"{free / 2**30:.1f} GiB free in this folder (1 GiB is enough for the demo)",
    )
    yield Finding(
        "folder",
        os.access(Path.cwd(), os.W_OK),
        f"{Path.cwd()} is writable"
        if os.access(Path.cwd(), os.W_OK)
        else f"{Path.cwd()} is not writable: give --out a folder that is",
    )


def _devices() -> Iterator[Finding]:
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    if not names:
        yield Finding("GPU", None, "none found; everything runs on the CPU")
    for name in names:
        yield Finding(name, *_add_on(name))


def _add_on(device: str) -> tuple[bool, str]:
    try:
        total = torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        return False, f"cannot compute: {error}"
    return total == 8.0, "computes"


def _arithmetic() -> Iterator[Finding]:
    model, batch = _small_problem()
    loss_fn = nn.CrossEntropyLoss()
    check = self_check(model, loss_fn, batch)
    yield Finding("probe against brute force", check.passed, str(check))
    with HessianOperator(model, loss_fn, [batch]) as H:
        found = float(top_eigenpairs(H, generator=torch.Generator()).values[0])
        truth = float(torch.linalg.eigvalsh(H.to_dense().double())[-1])
    error = abs(found - truth) / abs(truth)
    yield Finding(
        "Lanczos against a dense Hessian", error < 1e-3, f"relative error {error:.1e}"
    )


def _small_problem() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        inputs = torch.randn(20, 6, dtype=torch.float64)
        targets = torch.randint(3, (20,))
    return model, (inputs, targets)


def _data() -> Iterator[Finding]:
    yield Finding("data: digits", True, "comes with scikit-learn")
    for name, source in SOURCES.items():
        try:
            folder, _ = locate(source, None, allow_download=False)
        except DataNotFoundError as error:
            first_line = str(error).partition(" Ways")[0]
            yield Finding(f"data: {name}", None, first_line)
        else:
            yield Finding(f"data: {name}", True, str(folder))


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions,
    _machine,
    _devices,
    _arithmetic,
    _data,
)

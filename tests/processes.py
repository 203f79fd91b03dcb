"""Several processes that talk over loopback, for tests of what spans them."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "noisekit.probes",
)
SECONDS = 120.0
"""How long the slowest process may take, start included."""


def run_in_processes(
    work: Callable[[int, int], Any], world_size: int
) -> list[Any]:  # whatever ``work`` returns, rank by rank
    """Call ``work(rank, world_size)`` in a gloo group and return what each gave back.

    ``work`` is a function of a module and returns what ``torch.save`` can write.
    """
    # A server that has imported everything once, and never ran a thread, is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(work, rank, world_size, folder))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        stuck = [p for p in processes if p.is_alive()]
        for process in stuck:
            process.kill()
            process.join()
        faults = [path.read_text() for path in Path(folder).glob("*.txt")]
        assert not faults, "\n".join(faults)
        assert not stuck, f"{len(stuck)} of {world_size} processes hang"
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _process(
    work: Callable[[int, int], Any], rank: int, world_size: int, folder: str
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        torch.save(work(rank, world_size), Path(folder) / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        raise

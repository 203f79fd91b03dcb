"""The largest batch size that fits into memory, by doubling and bisection."""

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt

from noisekit.core.arguments import checked
from noisekit.core.errors import BatchSizeError
from noisekit.core.settings import PositiveInt
from noisekit.policies.training_state import preserve_training_state

Share = Annotated[float, Ge(0), Lt(1)]

OUT_OF_MEMORY = (
    " out of memory",  # CUDA, HIP, XPU, MPS backend
    "cudnn_status_not_supported",  # cuDNN where no algorithm's workspace fits
    "cublas_status_alloc_failed",
    "can't allocate memory",  # the CPU allocator, on Linux
    "not enough memory",  # on Windows
)
"""Texts by which errors of no class of their own say that memory has run out."""


@dataclass(frozen=True, slots=True)
class BatchSizeTrial:
    """One batch size that was tried.

    Attributes:
        batch_size: Which.
        fits: Whether all steps went through.
        seconds: Wall time of one step, the last one; of the attempt where it failed.
        peak_bytes: Largest memory allocated on the current CUDA device; ``None`` on
            others.
    """

    batch_size: int
    fits: bool
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class BatchSizeSearch:
    """The outcome of a search for the largest batch that fits.

    Attributes:
        batch_size: What to use: ``largest`` less the headroom, or all of it where
            ``smallest_failed`` is ``None``.
        largest: The largest size that was seen to fit.
        smallest_failed: The smallest that was seen not to; ``None`` where the search
            ended at ``max_size``.
        headroom: Share of ``largest`` that is left free.
        trials: What was tried, in order.
    """

    batch_size: int
    largest: int
    smallest_failed: int | None
    headroom: float
    trials: tuple[BatchSizeTrial, ...]

    def __int__(self) -> int:
        """Return the batch size to use."""
        return self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Write the batch size, what limits it, and the sizes tried."""
        failed = self.smallest_failed
        limit = "no larger was tried"
        if failed is not None:
            limit = f"{failed} did not; headroom {100 * self.headroom:g} %"
        lines = [
            f"batch size {self.batch_size}: {self.largest} fits, {limit}",
            f"{'batch':>10} {'fits':>5} {'s/step':>9} {'peak MiB':>9}",
        ]
        for trial in self.trials:
            peak = trial.peak_bytes
            memory = "-" if peak is None else f"{peak / 2**20:.0f}"
            fits = "yes" if trial.fits else "no"
            lines.append(
                f"{trial.batch_size:>10} {fits:>5} {trial.seconds:>9.3g} {memory:>9}"
            )
        return "\n".join(lines)


@checked
def find_batch_size(
    step: Callable[[int], object],
    *,
    restore: Iterable[object],
    start: PositiveInt = 2,
    max_size: PositiveInt = 65_536,
    headroom: Share = 0.1,
    resolution: Share = 0.03,
    num_steps: PositiveInt = 2,
) -> BatchSizeSearch:
    """Find the largest batch size with which a training step fits into memory.

    Sizes double until one does not fit, then the gap is halved. What the steps change
    is restored afterwards, bit for bit, also when one of them raises: weights, buffers
    such as BatchNorm's, gradients, modes, optimizer state and random states. Only
    running out of memory counts as not fitting; any other error is raised.

    Run it in one process: where one of several runs out of memory, the others would
    wait for it. On a CPU the system may kill the process before its allocator fails;
    give ``max_size`` there.

    Args:
        step: Does one whole training step with a batch of so many examples: forward
            and backward pass and ``optimizer.step()``, as the optimizer's buffers need
            memory too.
        restore: What the steps change: model, optimizer, scheduler, gradient scaler.
        start: The first size; 2, since BatchNorm cannot train with 1.
        max_size: The largest size to try, such as the examples that there are.
        headroom: Share of the largest size to leave free, for inputs that differ in
            length and for fragmentation.
        resolution: The search ends when the gap is this share of what fits.
        num_steps: Steps per size; the second one runs beside the buffers that the first
            one made.

    Returns:
        The size to use, and all that was tried.

    Raises:
        BatchSizeError: If not even a single example fits.
        UsageError: If an argument is out of bounds.

    Example:
        >>> import noisekit as nk
        >>> def step(batch_size):
        ...     if batch_size > 300:
        ...         raise torch.OutOfMemoryError("too large")
        >>> found = nk.find_batch_size(step, restore=[], resolution=0.0)
        >>> found.batch_size, found.largest, found.smallest_failed
        (270, 300, 301)
    """
    search = _Search(step, num_steps)
    with preserve_training_state(restore):
        fits, fails = search.bracket(start, max_size)
        while fails is not None and fails - fits > max(1.0, resolution * fits):
            middle = (fits + fails) // 2
            if search.fits(middle):
                fits = middle
            else:
                fails = middle
    # Where max_size was reached memory does not limit: there is nothing to leave free.
    used = fits if fails is None else max(1, math.floor(fits * (1 - headroom)))
    return BatchSizeSearch(used, fits, fails, headroom, tuple(search.trials))


class _Search:
    """Sizes tried so far."""

    def __init__(self, step: Callable[[int], object], num_steps: int) -> None:
        self._step, self._num_steps = step, num_steps
        self.trials: list[BatchSizeTrial] = []

    def bracket(self, start: int, max_size: int) -> tuple[int, int | None]:
        """Return a size that fits, and a larger one that does not, if there is one."""
        size, fails = min(start, max_size), None
        while not self.fits(size):
            fails, size = size, size // 2
            if size < 1:
                raise BatchSizeError(
                    "find_batch_size needs a step that fits with one example, got one "
                    "that runs out of memory; use a smaller model, checkpointing, or "
                    "lower precision."
                )
        fits = size
        while fails is None and fits < max_size:
            size = min(2 * fits, max_size)
            if self.fits(size):
                fits = size
            else:
                fails = size
        return fits, fails

    def fits(self, size: int) -> bool:
        """Whether the steps go through with so many examples."""
        on_cuda = _uses_cuda()
        if on_cuda:
            torch.cuda.empty_cache()  # blocks of other sizes are of no use
            torch.cuda.reset_peak_memory_stats()
        fits, seconds = True, 0.0
        for _ in range(self._num_steps):
            begin = time.perf_counter()
            try:
                self._step(size)
                if on_cuda:
                    torch.cuda.synchronize()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # The frames hold what was allocated.
                traceback.clear_frames(error.__traceback__)
                fits = False
            seconds = time.perf_counter() - begin
            if not fits:
                break
        peak = torch.cuda.max_memory_allocated() if on_cuda else None
        self.trials.append(BatchSizeTrial(size, fits, seconds, peak))
        if not fits:
            gc.collect()  # what refers to itself, such as modules and their hooks
        return fits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, by its class or its text."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY):
        return True
    cause = error.__cause__  # raised anew by somebody's wrapper
    return cause is not None and is_out_of_memory(cause)


def _uses_cuda() -> bool:
    """Whether this process has used CUDA; to ask more would start it."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started

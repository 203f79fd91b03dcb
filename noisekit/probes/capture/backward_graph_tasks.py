"""The runs of the autograd engine that a recorder listens to."""

from dataclasses import dataclass, field

from noisekit.core.layers.per_example import Site
from noisekit.probes.capture.gradient_sum_check import ClosureCheck
from noisekit.probes.capture.step_record import CapturedCall, ForwardPass


@dataclass(slots=True)
class _Task:
    """One run of the autograd engine."""

    opened: bool = False
    passes: list[ForwardPass] = field(default_factory=list)
    calls: dict[Site, list[CapturedCall]] = field(default_factory=dict)
    deferred: list[int] = field(default_factory=list)
    closure: ClosureCheck = field(default_factory=ClosureCheck)


class BackwardTasks:
    """The runs of the autograd engine since the last forward pass, also nested ones.

    ``torch.autograd.grad`` is a run too: it fires output hooks, but never accumulates,
    so that it is never opened and what it brought is dropped.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, _Task] = {}
        self._current = _Task()
        self.task = -1

    def enter(self, task: int) -> bool:
        """Switch to ``task``; return whether it is new and not inside another."""
        if task == self.task:
            return False
        self.task = task
        new = task not in self._tasks
        nested = any(other.opened for other in self._tasks.values())
        self._current = self._tasks.setdefault(task, _Task())
        return new and not nested

    def open(self) -> bool:
        """Note that gradients are accumulated; return whether that is news."""
        news, self._current.opened = not self._current.opened, True
        return news

    def close(self) -> ClosureCheck:
        """End the current run and drop what its calls hold; return its check."""
        for calls in self._current.calls.values():
            for captured in calls:
                captured.release()
        closure = self._current.closure
        self._tasks.pop(self.task, None)
        self._current, self.task = _Task(), -1
        return closure

    def forget(self) -> None:
        """Drop every run; an exception may have broken one off."""
        self._tasks, self._current, self.task = {}, _Task(), -1

    def visit(self, forward_pass: ForwardPass, *, twice: bool) -> None:
        """Note that the run passes through ``forward_pass``.

        Args:
            forward_pass: The pass.
            twice: Whether what the run gives can be differentiated in its turn.
        """
        if twice:
            forward_pass.twice.add(self.task)
        if forward_pass not in self._current.passes:
            self._current.passes.append(forward_pass)

    def arrived(self, captured: CapturedCall) -> None:
        """Note that a gradient of the call's output is there."""
        if captured.task != self.task:
            captured.task = self.task
            captured.call.grads = [None] * len(captured.call.grads)
            self._current.calls.setdefault(captured.site, []).append(captured)

    def calls_of(self, site: Site) -> list[CapturedCall]:
        """The calls of ``site`` that the run has reached."""
        return self._current.calls.get(site, [])

    @property
    def passes(self) -> list[ForwardPass]:
        """The forward passes that the run has reached."""
        return self._current.passes

    @property
    def deferred(self) -> list[int]:
        """Parameters to be read when the run ends."""
        return self._current.deferred

    @property
    def closure(self) -> ClosureCheck:
        """The run's closure check."""
        return self._current.closure

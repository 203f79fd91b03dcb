"""What is due when: pairs of a span of training and an action."""

from collections.abc import Callable
from dataclasses import dataclass, field

from noisekit.train.recipes.clock import Horizon, Position, Span

Action = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    """An action, and the span at whose end it is due.

    Attributes:
        span: A length of training from its start.
        repeats: Whether the action is due at each multiple of the span.
        action: What is done.
    """

    span: Span
    repeats: bool
    action: Action

    def due(self, before: Position, now: Position) -> bool:
        """Whether the action became due between two positions."""
        if self.repeats:
            return self.span.due(before, now)
        return self.span.reached(before, now)


@dataclass(frozen=True, slots=True)
class Agenda:
    """Actions at places of training that are known in advance.

    Whether an action is due follows from two positions, so that a resumed run needs
    no state of its agenda.
    """

    _entries: list[_Entry] = field(default_factory=list)

    def every(self, span: Span, action: Action) -> None:
        """Add an action that is due whenever ``span`` has passed once more."""
        self._entries.append(_Entry(span, True, action))

    def once(self, span: Span, action: Action) -> None:
        """Add an action that is due at the end of ``span``."""
        self._entries.append(_Entry(span, False, action))

    def quiet_from(self, position: Position, *intervals: Span) -> Horizon:
        """Return for how long nothing is due from a position on.

        Args:
            position: Where training is.
            intervals: Of what else is due again and again.
        """
        repeated = [entry.span for entry in self._entries if entry.repeats]
        return Horizon.at(
            position,
            once=[entry.span for entry in self._entries if not entry.repeats],
            repeated=[*repeated, *intervals],
        )

    def due(self, before: Position, now: Position) -> list[Action]:
        """Return what became due between two positions, in the order of adding."""
        return [entry.action for entry in self._entries if entry.due(before, now)]

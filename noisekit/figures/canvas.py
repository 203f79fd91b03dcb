"""Axes to draw on: those of a figure of our own, or the user's."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy import asarray, object_
from numpy.typing import NDArray

from noisekit.core.errors import UsageError
from noisekit.figures.plot import Plot
from noisekit.figures.theme import ArmStyle, themed

UserAxes = Axes | Sequence[Axes] | NDArray[object_]
"""One axes, or as many as the figure has panels, as ``plt.subplots`` gives them."""

Handle = Line2D | Patch
P = ParamSpec("P")


def figure_function(function: Callable[P, Plot]) -> Callable[P, Plot]:
    """Draw a figure of our own with noisekit's settings, the user's with the user's."""

    @wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Plot:
        with themed() if kwargs.get("ax") is None else nullcontext():
            return function(*args, **kwargs)

    return drawn


@dataclass(frozen=True, slots=True)
class Canvas:
    """Panels to draw on, row by row.

    Attributes:
        figure: The figure that they belong to.
        rows: The panels.
        is_users: Whether the user gave them, so that the figure's layout, size and
            legends outside the panels are the user's.
    """

    figure: Figure
    rows: list[list[Axes]]
    is_users: bool

    @property
    def axes(self) -> list[Axes]:
        """All panels, in reading order."""
        return [ax for row in self.rows for ax in row]

    def name_panels(self) -> None:
        """Put (a), (b), ... before the titles where there are several panels."""
        if len(self.axes) > 1 and not self.is_users:
            for place, ax in enumerate(self.axes):
                title = ax.get_title(loc="left")
                name = f"({chr(ord('a') + place)}) {title}".rstrip()
                ax.set_title(name, loc="left")

    def legend(self, handles: Sequence[Handle]) -> None:
        """Put one legend above all panels, or into the first of the user's.

        Handles without a label are left out: a single loop needs no name.
        """
        named = [handle for handle in handles if handle.get_label()]
        if not named:
            return
        if self.is_users:
            self.axes[0].legend(handles=named)
            return
        longest = max(len(str(handle.get_label())) for handle in named)
        entry = 0.05 * longest + 0.45  # inches at 7 pt, handle and gap included
        columns = max(1, int(self.figure.get_figwidth() / entry))
        rows = math.ceil(len(named) / columns)
        self.figure.legend(
            handles=named,
            loc="outside upper left",
            ncols=math.ceil(len(named) / rows),
        )


def canvas(
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float],
    ax: UserAxes | None = None,
    share_x: bool | str = False,
    share_y: bool | str = False,
    heights: Sequence[float] | None = None,
) -> Canvas:
    """Return a new figure's grid of panels, or the user's axes in their place.

    Args:
        rows: Rows of panels.
        columns: Panels of a row.
        size: Width and height of a new figure [inch].
        ax: The user's axes, one per panel in reading order.
        share_x: As ``Figure.subplots`` has it; of a new figure.
        share_y: Likewise.
        heights: Relative heights of a new figure's rows.

    Raises:
        UsageError: If the user gave another number of axes.
    """
    if ax is not None:
        given: list[Axes] = asarray(ax, dtype=object).ravel().tolist()
        if len(given) != rows * columns:
            raise UsageError(
                f"ax needs {rows * columns} axes, one per panel, got {len(given)}; "
                f"make them with plt.subplots({rows}, {columns})."
            )
        grid = [given[row * columns : (row + 1) * columns] for row in range(rows)]
        figure = given[0].get_figure(root=True)
        assert isinstance(figure, Figure)
        return Canvas(figure, grid, is_users=True)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=size, layout=layout)
    panels = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=share_x,  # type: ignore[arg-type]
        sharey=share_y,  # type: ignore[arg-type]
        height_ratios=heights,
    )
    return Canvas(figure, [list(row) for row in panels], is_users=False)


def arm_handle(style: ArmStyle, *, line: bool = True) -> Line2D:
    """Return the legend entry of an arm."""
    return Line2D(
        [],
        [],
        color=style.color,
        marker=style.marker,
        linestyle=style.linestyle if line else "none",
        markersize=4,
        label=style.label,
    )


def draw_levels(
    ax: Axes, levels: Mapping[str, float], styles: Mapping[str, ArmStyle]
) -> None:
    """Draw a horizontal dotted line per arm; arms at one level take turns in dots."""
    for level in dict.fromkeys(levels.values()):
        sharing = [arm for arm, other in levels.items() if other == level]
        period = 3.0 * len(sharing)
        for turn, arm in enumerate(sharing):
            dots = (3.0 * turn, (1.2, period - 1.2))
            color = styles[arm].color
            ax.axhline(level, color=color, lw=0.9, ls=dots, zorder=1)

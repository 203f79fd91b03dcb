"""Tables that the command line prints."""

from pathlib import Path

from rich.table import Table

from noisekit.cli.terminal import cell
from noisekit.core.errors import RunDirectoryError
from noisekit.train.recipes.catalogue import ExperimentEntry, analyses, experiments
from noisekit.train.sweeps.cost import Cost
from noisekit.train.sweeps.run_status import recorded_recipe, status


def catalogue_tables() -> tuple[Table, ...]:
    """Return a table of profiles per bundled experiment, then one of the analyses."""
    return (*map(_profiles, experiments()), _analyses())


def cost_table(cost: Cost, title: str) -> Table:
    """Return what a sweep would cost, one row a kind of cost."""
    table = Table(title=cell(title), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for what, amount in cost.rows():
        table.add_row(cell(what), cell(amount))
    return table


def status_table(directory: Path) -> Table:
    """Return how far each run of a set is."""
    table = Table(title=cell(directory), title_justify="left")
    for column in ("run", "status", "updates", "snapshots measured", "detail"):
        table.add_column(column, overflow="fold")
    for row in status(directory):
        table.add_row(*map(cell, row.cells()))
    return table


def set_fault(directory: Path) -> str | None:
    """Return why the recipe of a set of runs is not known, if so."""
    if (directory / "manifest.json").exists():
        return None
    try:
        recorded_recipe(directory)
    except RunDirectoryError as error:
        return str(error)
    return None


def _profiles(entry: ExperimentEntry) -> Table:
    title = cell(f"Experiment {entry.name}\n{entry.question}")
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("profile", "what it is", "cost"):
        table.add_column(column, overflow="fold")
    for profile in entry.profiles:
        table.add_row(*map(cell, (profile.name, profile.title, profile.cost)))
    return table


def _analyses() -> Table:
    table = Table(title="Analyses", title_justify="left", show_lines=True)
    for column in ("name", "question"):
        table.add_column(column, overflow="fold")
    for entry in analyses():
        table.add_row(cell(entry.name), cell(entry.question))
    return table

"""Tables that the command line prints."""

from pathlib import Path

from rich.table import Table

from noisekit.train.recipes.catalogue import ExperimentEntry, analyses, experiments
from noisekit.train.sweeps.cost import Cost
from noisekit.train.sweeps.run_status import status


def catalogue_tables() -> tuple[Table, ...]:
    """Return a table of profiles per bundled experiment, then one of the analyses."""
    return (*map(_profiles, experiments()), _analyses())


def cost_table(cost: Cost, title: str) -> Table:
    """Return what a sweep would cost, one row a kind of cost."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for what, amount in cost.rows():
        table.add_row(what, amount)
    return table


def status_table(directory: Path) -> Table:
    """Return how far each run of a set is."""
    table = Table(title=str(directory), title_justify="left")
    for column in ("run", "status", "updates", "snapshots measured", "detail"):
        table.add_column(column, overflow="fold")
    for row in status(directory):
        table.add_row(*row.cells())
    return table


def _profiles(entry: ExperimentEntry) -> Table:
    title = f"Experiment {entry.name}\n{entry.question}"
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("profile", "what it is", "cost"):
        table.add_column(column, overflow="fold")
    for profile in entry.profiles:
        table.add_row(profile.name, profile.title, profile.cost)
    return table


def _analyses() -> Table:
    table = Table(title="Analyses", title_justify="left", show_lines=True)
    for column in ("name", "question"):
        table.add_column(column, overflow="fold")
    for entry in analyses():
        table.add_row(entry.name, entry.question)
    return table

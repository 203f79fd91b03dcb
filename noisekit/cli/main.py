"""The commands of ``noisekit`` and their exit codes.

0 done, 1 the work failed (which run, why, how to resume), 2 the request was wrong
(what, where, what to write instead). Nothing heavy is imported before a command
needs it, so that ``--help`` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from noisekit.core.errors import NoisekitError, RunFailedError, UsageError

WORK_FAILED = 1
WRONG_REQUEST = 2

app = typer.Typer(
    name="noisekit",
    help="Measure gradient noise and sharpness; re-run the batch-size experiments.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: noisekit demo",
)

OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the runs; made if it is not there."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Runs at the same time; the recipe says how many."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where to train: cpu, cuda, cuda:1, mps."),
]
RunsArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `noisekit run` made.")
]


@app.command()
def demo(out: OutOption = None, workers: WorkersOption = None) -> None:
    """Answer the main question on real data in a few minutes, then open the report."""
    _run_and_report("small_vs_large_batch", "demo", out, workers=workers)


@app.command("list")
def list_() -> None:
    """Show the experiments and analyses, each with its question and its cost."""
    from noisekit.cli.listing import catalogue_tables

    for table in catalogue_tables():
        Console().print(table)


@app.command()
def new(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder for the new recipe.")
    ],
) -> None:
    """Write a commented recipe to start from."""
    from noisekit.train.recipes.catalogue import write_starter_recipe

    path = write_starter_recipe(directory)
    typer.echo(f"Wrote {path}. Try it with: noisekit run {path} --profile smoke")


@app.command()
def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="NAME|RECIPE", help="A bundled experiment, or a recipe.toml."
        ),
    ],
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", help="smoke, demo, standard, paper, or the recipe's own."
        ),
    ] = None,
    out: OutOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="How many seeds, instead of the recipe's."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one key of the recipe; repeat."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")
    ] = False,
    allow_download: Annotated[
        bool,
        typer.Option(
            "--allow-download", help="Ask the network for data that are not here."
        ),
    ] = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="Where the runs execute."),
    ] = "local",
) -> None:
    """Run an experiment over its arms and seeds, then analyse and report it."""
    if engine == "ray":
        raise UsageError(
            "--engine needs 'local', got 'ray': a cluster engine is not part of this "
            "version. Leave --engine out to use this machine's processes."
        )
    if dry_run:
        _print_cost(recipe, profile, settings, device, seeds, workers)
        return
    _run_and_report(
        recipe,
        profile,
        out,
        settings=settings,
        workers=workers,
        device=device,
        seeds=seeds,
        allow_download=allow_download,
    )


@app.command()
def resume(directory: RunsArgument, workers: WorkersOption = None) -> None:
    """Finish the runs of DIR that were stopped or failed, then report."""
    from noisekit.cli.progress import SweepProgress
    from noisekit.train.sweeps import sweep
    from noisekit.train.sweeps.run_status import status as run_progress

    num_left = sum(not row.complete for row in run_progress(directory))
    with SweepProgress(num_left) as progress:
        sweep.resume(directory, workers=workers, progress=progress)
    _report(directory, None)


@app.command()
def status(directory: RunsArgument) -> None:
    """Show how far each run of DIR is."""
    from noisekit.cli.listing import status_table

    Console().print(status_table(directory))


@app.command()
def analyse(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An analysis of `noisekit list`.")
    ],
    directory: RunsArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for figures and tables; default inside DIR."
        ),
    ] = None,
) -> None:
    """Run one analysis on the runs of DIR: figures, tables and verdicts."""
    from noisekit.cli.pipeline import run_analysis

    result, folder = run_analysis(name, directory, out)
    typer.echo(result.answer)
    for sentence in result.sentences:
        typer.echo(f"  {sentence}")
    typer.echo(f"Figures and tables: {folder}")


@app.command()
def report(
    directory: RunsArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help="Default: DIR/report.html."),
    ] = None,
) -> None:
    """Run the recipe's analyses on DIR and write one self-contained HTML report."""
    _report(directory, out)


@app.command()
def doctor() -> None:
    """Check this machine and installation, the device included."""
    from noisekit.cli.doctor import examine

    table, healthy = examine()
    Console().print(table)
    if not healthy:
        raise typer.Exit(WORK_FAILED)


def main() -> None:
    """Run the command line; turn noisekit's errors into exit codes."""
    try:
        app()
    except RunFailedError as error:
        _complain(error)
        sys.exit(WORK_FAILED)
    except UsageError as error:
        _complain(error)
        sys.exit(WRONG_REQUEST)
    except NoisekitError as error:
        _complain(error)
        # A file that is not there is a request to correct; anything else is work
        # that was begun and failed.
        missing = isinstance(error, FileNotFoundError)
        sys.exit(WRONG_REQUEST if missing else WORK_FAILED)
    except KeyboardInterrupt as stop:
        typer.echo(f"\n{stop or 'Stopped. What was computed is kept.'}", err=True)
        sys.exit(WORK_FAILED)


def _complain(error: NoisekitError) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {error}")


def _run_and_report(
    recipe: str,
    profile: str | None,
    out: Path | None,
    *,
    settings: list[str] | None = None,
    workers: int | None = None,
    device: str | None = None,
    seeds: int | None = None,
    allow_download: bool = False,
) -> None:
    from noisekit.cli.progress import SweepProgress
    from noisekit.cli.request import load
    from noisekit.train.sweeps import sweep

    loaded = load(recipe, profile, settings, seeds=seeds, device=device)
    directory = out or Path("noisekit-runs") / f"{loaded.name}-{loaded.profile}"
    typer.echo(f"{loaded.question}\nRuns go to {directory}")
    with SweepProgress(len(loaded.run_specs())) as progress:
        sweep.run(
            loaded,
            directory,
            workers=workers,
            progress=progress,
            allow_download=allow_download,
        )
    _report(directory, None)


def _print_cost(
    recipe: str,
    profile: str | None,
    settings: list[str] | None,
    device: str | None,
    seeds: int | None,
    workers: int | None,
) -> None:
    from noisekit.cli.listing import cost_table
    from noisekit.cli.request import load
    from noisekit.train.sweeps.cost import estimate_cost

    loaded = load(recipe, profile, settings, seeds=seeds, device=device)
    cost = estimate_cost(loaded, workers=workers)
    Console().print(cost_table(cost, f"{loaded.name}, profile {loaded.profile}"))


def _report(directory: Path, out: Path | None) -> None:
    from noisekit.cli.pipeline import write_report

    with Console(stderr=True).status("Analysing and drawing ..."):
        answer, path = write_report(directory, out)
    if answer:
        typer.echo(f"\n{answer}")
    typer.echo(f"\nReport: {path.resolve()}")


if __name__ == "__main__":
    main()

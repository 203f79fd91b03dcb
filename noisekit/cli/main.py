"""The commands of ``noisekit`` and their exit codes.

0 done, 1 the work failed (which run, why, how to resume), 2 the request was wrong
(what, where, what to write instead), 130 stopped by Ctrl-C, 143 by SIGTERM (what is
kept, how to go on). Nothing heavy is imported before a command needs it, so that
``--help`` answers at once.
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from noisekit.cli.terminal import (
    Stopped,
    complain,
    kept_runs,
    say,
    stop_signals,
    warn,
)
from noisekit.core.errors import NoisekitError, RunFailedError, UsageError
from noisekit.core.text import printable

if TYPE_CHECKING:
    from noisekit.train.recipes.recipe import Recipe

WORK_FAILED = 1
WRONG_REQUEST = 2

app = typer.Typer(
    name="noisekit",
    help="Measure gradient noise and sharpness; re-run the batch-size experiments.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: noisekit demo. Exit codes: 0 done, 1 the work failed, 2 the "
    "request was wrong, 130 stopped by Ctrl-C, 143 by SIGTERM.",
)


def _existing(path: Path) -> Path:
    """Refuse a directory that is not there."""
    with suppress(OSError):  # a name that the file system does not take
        if path.is_dir():
            return path
    raise UsageError(
        "DIR needs to be a folder that `noisekit run` or nk.attach wrote, got "
        f"{path}, which is no folder; check the path."
    )


def _existing_or_none(path: Path | None) -> Path | None:
    """Refuse a directory that was named and is not there."""
    return None if path is None else _existing(path)


def _print_version(wanted: bool) -> None:
    if wanted:
        import noisekit

        say(f"noisekit {noisekit.__version__}")
        raise typer.Exit


OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the runs; made if it is not there."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        help="Runs at the same time, each in a process; 0 for none but this one.",
    ),
]
AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Import and run code of its own that the recipe names.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where to train: cpu, cuda, cuda:1, mps."),
]
RunsArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A folder that `noisekit run` made, or nk.attach with save_to.",
        callback=_existing,
    ),
]


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Measure gradient noise and sharpness; re-run the batch-size experiments."""


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
    say(f"Wrote {path}. Try it with: noisekit run {path} --profile smoke")


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
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline",
            help="With --dry-run: list and draw every change of batch size, rate and "
            "momentum, and say what the seeds can resolve.",
        ),
    ] = False,
    spread_from: Annotated[
        Path | None,
        typer.Option(
            "--spread-from",
            metavar="DIR",
            help="With --timeline: runs whose spread over seeds the power rests on.",
            callback=_existing_or_none,
        ),
    ] = None,
    allow_download: Annotated[
        bool,
        typer.Option(
            "--allow-download", help="Ask the network for data that are not here."
        ),
    ] = False,
    allow_code: AllowCodeOption = False,
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
    from noisekit.cli.request import own_code

    with own_code(allowed=allow_code):
        if dry_run:
            loaded = _print_cost(recipe, profile, settings, device, seeds, workers)
            if timeline:
                _print_timeline(loaded, out, spread_from)
            return
        if timeline or spread_from:
            raise UsageError(
                "--timeline and --spread-from need --dry-run beside them, since they "
                "show what is planned and run nothing; add it."
            )
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
def resume(
    directory: RunsArgument,
    workers: WorkersOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Finish the runs of DIR that were stopped or failed, then report."""
    from noisekit.cli.progress import SweepProgress
    from noisekit.cli.request import own_code
    from noisekit.train.sweeps import sweep
    from noisekit.train.sweeps.run_status import status as run_progress

    num_left = sum(not row.complete for row in run_progress(directory))
    with own_code(allowed=allow_code):
        with kept_runs(directory), SweepProgress(num_left) as progress:
            sweep.resume(directory, workers=workers, progress=progress)
        _report(directory, None)


@app.command()
def status(directory: RunsArgument) -> None:
    """Show how far each run of DIR is; reads without writing."""
    from noisekit.cli.listing import set_fault, status_table

    Console().print(status_table(directory))
    if fault := set_fault(directory):
        warn(fault)


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

    result, folder, faults = run_analysis(name, directory, out)
    for fault in faults:
        warn(fault)
    say(result.answer)
    for sentence in result.sentences:
        say(f"  {sentence}")
    say(f"Figures and tables: {folder}")


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
def trial(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders that `noisekit run` made."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")
    ] = Path("trial.html"),
    allow_code: AllowCodeOption = False,
) -> None:
    """Put the claims of several sets of runs on one page, by account."""
    from noisekit.cli.pipeline import write_trial
    from noisekit.cli.request import own_code

    with own_code(allowed=allow_code):
        page = write_trial([_existing(path) for path in directories], out)
    say(f"Trial: {page.resolve()}")


@app.command()
def doctor() -> None:
    """Check this machine and installation, the device included."""
    from noisekit.cli.doctor import examine

    table, healthy = examine()
    Console().print(table)
    if not healthy:
        raise typer.Exit(WORK_FAILED)


def main() -> None:
    """Run the command line; turn noisekit's errors and signals into exit codes."""
    try:
        with stop_signals():
            app()
    except Stopped as stop:
        typer.echo(f"\n{printable(stop.describe())}", err=True)
        sys.exit(stop.exit_code)
    except RunFailedError as error:
        complain(error)
        sys.exit(WORK_FAILED)
    except UsageError as error:
        complain(error)
        sys.exit(WRONG_REQUEST)
    except NoisekitError as error:
        complain(error)
        # A file that is not there is a request to correct; anything else is work
        # that was begun and failed.
        missing = isinstance(error, FileNotFoundError)
        sys.exit(WRONG_REQUEST if missing else WORK_FAILED)


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
    directory = out or _default_folder(loaded)
    if (planned := loaded.seeds.planned) is not None:
        say(
            f"{loaded.seeds.count} seeds, where the recipe plans {planned}: the record "
            "and the report say so."
        )
    say(f"{loaded.question}\nRuns go to {directory}")
    with kept_runs(directory), SweepProgress(len(loaded.run_specs())) as progress:
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
) -> "Recipe":
    from noisekit.cli.listing import cost_table
    from noisekit.cli.request import load
    from noisekit.train.sweeps.cost import estimate_cost

    loaded = load(recipe, profile, settings, seeds=seeds, device=device)
    cost = estimate_cost(loaded, workers=workers)
    Console().print(cost_table(cost, f"{loaded.name}, profile {loaded.profile}"))
    return loaded


def _print_timeline(recipe: "Recipe", out: Path | None, spread: Path | None) -> None:
    from noisekit.cli.dry_run import power_table, timeline_figure, timeline_tables

    for table in timeline_tables(recipe):
        Console().print(table)
    if recipe.stated_claims():
        Console().print(power_table(recipe, spread))
        if spread is None:
            say("State a spread over seeds with --spread-from DIR, a set of runs.")
    folder = (out or _default_folder(recipe)) / "analyses" / "timeline"
    for path in timeline_figure(recipe, folder):
        say(f"Figure: {path}")


def _default_folder(recipe: "Recipe") -> Path:
    return Path("noisekit-runs") / f"{recipe.name}-{recipe.profile}"


def _report(directory: Path, out: Path | None) -> None:
    from noisekit.cli.pipeline import write_report

    with Console(stderr=True).status("Analysing and drawing ..."):
        answer, path, faults = write_report(directory, out)
    for fault in faults:
        warn(fault)
    if answer:
        say(f"\n{answer}")
    say(f"\nReport: {path.resolve()}")


if __name__ == "__main__":
    main()

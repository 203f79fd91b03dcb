"""The command line as a person meets it: words, files and exit codes."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import noisekit as nk
from noisekit.cli.main import main
from noisekit.records import RunSink, read_set, write_set
from noisekit.records.writer import Cell

Call = Callable[..., tuple[int, str, str]]
COMMANDS = (
    "analyse",
    "demo",
    "doctor",
    "list",
    "new",
    "report",
    "resume",
    "run",
    "status",
)


@dataclass(frozen=True)
class Reading:
    """What a sink needs of a reading."""

    cells: Mapping[str, Cell]

    def row(self) -> Mapping[str, Cell]:
        return self.cells


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs ``noisekit ARGS``: exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["noisekit", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("NO_COLOR", "1")
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), " ".join(captured.err.split())

    return run


def test_help_names_every_command(call: Call) -> None:
    """Catches: a command of the contract that is missing."""
    code, out, _ = call("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out


@pytest.mark.parametrize("command", ["run", "resume", "analyse", "report", "new"])
def test_each_command_explains_itself(call: Call, command: str) -> None:
    """Catches: a command without a help text."""
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Usage" in out


def test_list_shows_question_and_cost(call: Call) -> None:
    """Catches: an experiment without a cost, an analysis without a question."""
    code, out, _ = call("list")
    assert code == 0
    for word in ("small_vs_large_batch", "demo", "standard", "paper", "gradient_noise"):
        assert word in out
    assert "2 to 4 minutes" in out


def test_unknown_experiment_is_a_wrong_request(call: Call) -> None:
    """Catches: a traceback, or exit code 1, for a typing error."""
    code, _, err = call("run", "small_vs_large_bach")
    assert code == 2
    assert "small_vs_large_batch" in err


def test_unknown_profile_lists_the_profiles(call: Call) -> None:
    """Catches: a silent fall-back to the default profile."""
    code, _, err = call("run", "small_vs_large_batch", "--profile", "smok")
    assert code == 2
    assert "smoke" in err


def test_every_fault_of_a_recipe_is_reported_at_once(
    call: Call, tmp_path: Path
) -> None:
    """Catches: a loader that stops at the first fault."""
    call("new", tmp_path / "mine")
    recipe = tmp_path / "mine" / "recipe.toml"
    text = recipe.read_text().replace("batch_size", "batch_sise", 1)
    recipe.write_text(text.replace("train = ", "train = -", 1))
    code, _, err = call("run", recipe)
    assert code == 2
    assert "batch_sise" in err
    assert "data.train" in err
    assert "recipe.toml" in err


def test_set_needs_an_equals_sign(call: Call) -> None:
    """Catches: ``--set batch`` taken as a key with no value."""
    code, _, err = call("run", "small_vs_large_batch", "--set", "seeds.count")
    assert code == 2
    assert "KEY=VALUE" in err


def test_cluster_engine_is_refused_with_the_way_out(call: Call) -> None:
    """Catches: ``--engine ray`` that runs locally without a word."""
    code, _, err = call("run", "small_vs_large_batch", "--engine", "ray")
    assert code == 2
    assert "local" in err


def test_batch_larger_than_the_data_is_a_wrong_request(call: Call) -> None:
    """Catches: a crash in the first run instead of a refusal before it."""
    code, _, err = call(
        "run",
        "small_vs_large_batch",
        "--profile",
        "smoke",
        "--set",
        "data.train=64",
    )
    assert code == 2
    assert "training.batch_size" in err
    assert "64" in err


def test_dry_run_names_the_cost_and_makes_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a dry run that leaves a folder behind."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(
        "run", "small_vs_large_batch", "--profile", "smoke", "--dry-run"
    )
    assert code == 0
    assert "runs" in out
    assert not list(tmp_path.iterdir())


def test_status_of_a_finished_sweep(call: Call, smoke_runs: Path) -> None:
    """Catches: a status that counts finished runs as open."""
    code, out, _ = call("status", smoke_runs)
    assert code == 0
    assert out.count("done") >= 8
    assert "small_low-seed0" in out


def test_report_of_a_smoke_run_gives_no_verdict(
    call: Call, smoke_runs: Path, tmp_path: Path
) -> None:
    """Catches: a verdict drawn from a run that may not carry one."""
    code, out, _ = call("report", smoke_runs, "--out", tmp_path / "report.html")
    assert code == 0
    assert "No verdict" in out
    page = (tmp_path / "report.html").read_text()
    assert "No verdict" in page
    assert "larger by more than" not in page


def test_trial_of_a_set_lists_its_claims(
    call: Call, smoke_runs: Path, tmp_path: Path
) -> None:
    """Catches: a page without the claims; a folder that is none, taken."""
    page = tmp_path / "trial.html"
    code, out, _ = call("trial", smoke_runs, "--out", page)
    assert code == 0
    assert str(page) in out
    text = page.read_text()
    for claim in nk.open_runs(smoke_runs).recipe["contrasts"]:
        assert claim["name"] in text
    code, _, err = call("trial", tmp_path / "nothing", "--out", page)
    assert code == 2
    assert "nothing" in err


def test_report_survives_an_analysis_that_cannot_be_made(
    call: Call, smoke_runs: Path, tmp_path: Path
) -> None:
    """One analysis refuses; the report has its reason, and the others' answers.

    Catches: a report that is lost because one figure has no data.
    """
    copy = tmp_path / "runs"
    shutil.copytree(smoke_runs, copy)
    content = read_set(copy)
    content["recipe"]["analyses"] = ["rate_choice", "outcomes_by_arm"]
    write_set(copy, content)
    for table in copy.glob("runs/*/evaluations.parquet"):
        table.unlink()
    code, out, _ = call("report", copy)
    assert code == 0
    assert "chooses no rate" in out
    page = (copy / "report.html").read_text()
    assert "This analysis could not be made: figure" in page
    assert "chooses no rate" in page


def test_analyse_writes_figures_and_tables(
    call: Call, smoke_runs: Path, tmp_path: Path
) -> None:
    """Catches: an analysis that draws without saving the numbers behind it."""
    code, out, _ = call(
        "analyse", "sharpness_vs_batch_size", smoke_runs, "--out", tmp_path / "drawn"
    )
    assert code == 0
    assert "Figures and tables" in out
    for ending in ("pdf", "svg", "png", "csv", "parquet"):
        assert (tmp_path / "drawn" / f"sharpness_against_loss.{ending}").exists()


def test_report_of_a_loop_that_a_probe_recorded(call: Call, tmp_path: Path) -> None:
    """The noise is drawn and nothing is claimed.

    Catches: a report that needs a recipe; a verdict on somebody's own loop.
    """
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nk.attach(model, optimizer, save_to=tmp_path / "mine"):
        for _ in range(30):
            targets = torch.randint(3, (8,))
            optimizer.zero_grad()
            outputs = model(torch.randn(8, 4))
            torch.nn.functional.cross_entropy(outputs, targets).backward()
            optimizer.step()
    code, out, _ = call("report", tmp_path / "mine")
    assert code == 0
    assert "30 readings" in out
    assert "claims nothing" in out
    assert (tmp_path / "mine/analyses/gradient_noise/noise_over_training.svg").exists()


def test_unknown_analysis_lists_the_known(call: Call, smoke_runs: Path) -> None:
    """Catches: a traceback for a typing error."""
    code, _, err = call("analyse", "gradient_nois", smoke_runs)
    assert code == 2
    assert "gradient_noise" in err


@pytest.mark.parametrize("command", ["status", "report", "resume", "analyse"])
def test_a_missing_folder_is_a_wrong_request(
    call: Call, tmp_path: Path, command: str
) -> None:
    """Catches: exit code 1, as where work had begun; a name too long as a traceback."""
    name = ["gradient_noise"] if command == "analyse" else []
    for folder in (tmp_path / "nowhere", tmp_path / ("x" * 300)):
        code, _, err = call(command, *name, folder)
        assert code == 2
        assert "DIR needs to be a folder that `noisekit run` or nk.attach wrote" in err


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_place_that_cannot_be_made_is_a_wrong_request(
    call: Call, tmp_path: Path, smoke_runs: Path, name: str
) -> None:
    """Catches: tracebacks for over-long names and for folders below files."""
    (tmp_path / "file").write_text("")
    for command in (
        ("run", "small_vs_large_batch", "--profile", "smoke"),
        ("analyse", "gradient_noise", smoke_runs),
    ):
        code, _, err = call(*command, "--out", tmp_path / name)
        assert code == 2
        assert "needs a folder that it can make and write to" in err


def test_version(call: Call) -> None:
    """Catches: an option that needs a command beside it."""
    assert call("--version") == (0, f"noisekit {nk.__version__}", "")


def test_markup_and_control_characters_are_printed_as_text(
    call: Call, tmp_path: Path
) -> None:
    """Catches: names that vanish or end the command since rich takes them for markup.

    Also escape codes that reach the terminal.
    """
    folder = tmp_path / "[bold]\x1b[31m[oops]"
    (folder / "runs" / "x").mkdir(parents=True)
    code, out, err = call("status", folder)
    assert code == 0
    assert "[bold]\\x1b[31m[oops]" in out
    assert "[bold]\\x1b[31m[oops]" in err
    assert "damaged" in out
    code, _, err = call("run", "[/x]")
    assert code == 2
    assert "recipe [/x] does not exist" in err


def test_status_of_a_loop_that_a_probe_recorded(call: Call, tmp_path: Path) -> None:
    """Catches: asking such a run for its recipe; writing to a folder that is read."""
    with RunSink(tmp_path / "mine") as sink:
        for step in range(1, 8):
            sink(Reading({"step": step}))
    (tmp_path / "mine" / "lock").unlink()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call("status", tmp_path / "mine")
    assert (code, err) == (0, "")
    assert "mine" in out
    assert "done" in out
    assert "7" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_report_of_a_folder_without_runs(call: Call, tmp_path: Path) -> None:
    """Catches: an empty report."""
    code, _, err = call("report", tmp_path)
    assert code == 1
    assert "set.json" in err


def test_resume_of_a_finished_sweep_runs_nothing(call: Call, smoke_runs: Path) -> None:
    """Catches: a resume that trains finished runs again."""
    before = {
        path: path.stat().st_mtime_ns for path in smoke_runs.glob("runs/*/*.parquet")
    }
    assert before
    code, _, _ = call("resume", smoke_runs)
    assert code == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_runs_of_another_recipe_are_not_mixed(call: Call, smoke_runs: Path) -> None:
    """Catches: two experiments in one folder."""
    code, _, err = call(
        "run",
        "small_vs_large_batch",
        "--profile",
        "smoke",
        "--set",
        "seeds.first=7",
        "--out",
        smoke_runs,
    )
    assert code == 2
    assert "seeds.first" in err


def test_newer_run_directory_is_refused(
    call: Call, smoke_runs: Path, tmp_path: Path
) -> None:
    """Catches: a newer format read as if it were ours."""
    copy = tmp_path / "newer"
    shutil.copytree(smoke_runs, copy)
    content = json.loads((copy / "set.json").read_text())
    del content["digest"]
    (copy / "set.json").write_text(json.dumps(content | {"format": 99}))
    code, _, err = call("report", copy)
    assert code == 1
    assert "99" in err


def test_doctor_finds_this_installation_well(call: Call) -> None:
    """Catches: a doctor that never computes anything."""
    code, out, _ = call("doctor")
    assert code == 0, out
    assert "probe against brute force" in out
    assert "digits" in out

"""What the project's files may not say."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked_files() -> list[Path]:
    """Return the text files under version control, or on disk in a source archive."""
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return list((ROOT / "noisekit").rglob("*.py"))
    names = [ROOT / line for line in done.stdout.splitlines()]
    return [p for p in names if p.suffix in {".py", ".md", ".toml", ".j2", ".rst"}]


@pytest.mark.parametrize(
    "pattern", [r"\bpickle\.load", r"weights_only=False", r"\beval\("]
)
def test_nothing_executes_a_file_from_elsewhere(pattern: str) -> None:
    """Files from elsewhere are read as data.

    Catches: ``torch.load`` without ``weights_only``, ``pickle`` for checkpoints.
    """
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        if path.is_relative_to(ROOT / "noisekit") and path.suffix == ".py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(rf"(?<!\.){pattern}", line)
    ]
    assert not found


def test_directives_have_two_colons() -> None:
    """A directive with one colon is dropped without a word by the docs builder."""
    one_colon = re.compile(r"^\s*\.\. [a-z]+:(?!:)\s")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        if path.suffix == ".py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if one_colon.match(line)
    ]
    assert not found

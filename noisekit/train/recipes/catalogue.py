"""What comes with noisekit: experiments and analyses, in the wheel or the checkout."""

import ast
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from noisekit.core.errors import RecipeError, UsageError
from noisekit.train.recipes.recipe_errors import not_one_of, sentence

_PACKAGE = Path(__file__).resolve().parents[2]
_STARTER = Path(__file__).with_name("starter.toml")


@dataclass(frozen=True, slots=True)
class ProfileEntry:
    """One profile of an experiment: its name, what it is and what it costs."""

    name: str
    title: str
    cost: str


@dataclass(frozen=True, slots=True)
class ExperimentEntry:
    """One bundled experiment.

    Attributes:
        name: What ``noisekit run`` takes.
        question: What it asks.
        path: Its recipe file.
        profiles: Its profiles, in the order of the file.
    """

    name: str
    question: str
    path: Path
    profiles: tuple[ProfileEntry, ...]


@dataclass(frozen=True, slots=True)
class AnalysisEntry:
    """One bundled analysis: what ``noisekit analyse`` takes, its question, its file."""

    name: str
    question: str
    path: Path


def bundled(folder: str) -> Path:
    """Return where ``experiments`` or ``analyses`` are on this machine.

    Raises:
        RecipeError: If the installation has neither the bundled folder nor a
            checkout around it.
    """
    places = (_PACKAGE / "_bundled" / folder, _PACKAGE.parent / folder)
    for place in places:
        if place.is_dir():
            return place
    raise RecipeError(
        f"noisekit needs its bundled {folder}, found neither {places[0]} nor "
        f"{places[1]}; install noisekit again."
    )


def experiments() -> tuple[ExperimentEntry, ...]:
    """Return the bundled experiments, by name."""
    folder = bundled("experiments")
    return tuple(_experiment(path) for path in sorted(folder.glob("*/recipe.toml")))


def analyses() -> tuple[AnalysisEntry, ...]:
    """Return the bundled analyses, by name; the question is the script's first line."""
    return tuple(
        AnalysisEntry(path.stem, _first_line(path), path)
        for path in sorted(bundled("analyses").glob("[!_]*.py"))
    )


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the recipe file that is meant by a bundled name, a file or a folder.

    Raises:
        RecipeError: If there is none; the message lists the bundled names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    known = {entry.parent.name: entry for entry in _bundled_recipes()}
    name = str(name_or_path)
    if name in known:
        return known[name]
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise RecipeError(
            f"recipe {path} does not exist. Bundled experiments are named without a "
            f"path: {', '.join(known)}; `noisekit new DIR` writes a recipe to start "
            "from."
        )
    raise RecipeError(
        sentence(f"`run` {not_one_of('a bundled experiment', name, known)}")
        + " A recipe of your own is given as its file, such as ./recipe.toml."
    )


def find_analysis(name: str) -> Path:
    """Return the script of a bundled analysis.

    Raises:
        UsageError: If there is none of that name.
    """
    known = {entry.name: entry.path for entry in analyses()}
    if name not in known:
        raise UsageError(
            sentence(f"`analyse` {not_one_of('an analysis', name, known)}")
        )
    return known[name]


def write_starter_recipe(folder: Path) -> Path:
    """Write a commented recipe into ``folder`` and return its path.

    Raises:
        UsageError: If the folder already has a recipe.
    """
    path = folder / "recipe.toml"
    if path.exists():
        raise UsageError(
            f"`new` needs a folder without a recipe, got {folder}, which has "
            f"{path.name}; choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_STARTER, path)
    return path


def _bundled_recipes() -> Iterator[Path]:
    yield from sorted(bundled("experiments").glob("*/recipe.toml"))


def _experiment(path: Path) -> ExperimentEntry:
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    profiles = tuple(
        ProfileEntry(name, str(table.get("title", "")), str(table.get("cost", "")))
        for name, table in document.get("profiles", {}).items()
    )
    return ExperimentEntry(path.parent.name, document["question"], path, profiles)


def _first_line(script: Path) -> str:
    """Return the first line of a script's docstring, without running the script."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    return text.partition("\n")[0]

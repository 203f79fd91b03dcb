"""What the command line asks for, as a recipe."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from noisekit.core.errors import UsageError
from noisekit.core.references import allow_code
from noisekit.train.recipes.loading import load_recipe
from noisekit.train.recipes.recipe import Recipe


@contextmanager
def own_code(*, allowed: bool) -> Iterator[None]:
    """Let a recipe import ``module:function`` from the working folder, if allowed."""
    folder = str(Path.cwd())
    if allowed and folder not in sys.path:
        sys.path.insert(0, folder)
    with allow_code(allowed):
        yield


def load(
    recipe: str,
    profile: str | None,
    settings: Sequence[str] | None,
    *,
    seeds: int | None = None,
    device: str | None = None,
) -> Recipe:
    """Load a recipe with a profile and ``KEY=VALUE`` settings from the command line.

    Args:
        recipe: Bundled name or file.
        profile: Profile; the recipe's own default if left out.
        settings: What ``--set`` was given.
        seeds: Number of seeds, instead of the recipe's.
        device: Device of all runs, instead of the recipe's.

    Raises:
        UsageError: If a setting has no ``=``.
    """
    overrides = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(
                f"--set needs KEY=VALUE, got {setting!r}; for example "
                "--set training.batch_size=32."
            )
        overrides[key.strip()] = value
    loaded = load_recipe(recipe, profile=profile, overrides=overrides)
    return loaded.adjusted(device=device, seeds=seeds)

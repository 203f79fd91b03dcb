"""What may import what, and what importing costs."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ANALYSES = sorted((ROOT / "analyses").glob("*.py"))


def loaded_modules(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter loads for a statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_import_noisekit_loads_nothing_heavy() -> None:
    """The root package is lazy.

    Catches: an eager ``from noisekit.x import y`` in the root.
    """
    heavy = {"torch", "numpy", "scipy", "pandas", "matplotlib", "sklearn", "pyarrow"}
    assert not loaded_modules("import noisekit") & heavy


@pytest.mark.parametrize("package", ["stats", "records", "figures", "report"])
def test_package_never_loads_torch(package: str) -> None:
    """Tables, statistics, figures and the report work without PyTorch.

    Catches: an import of torch through ``noisekit.core``.
    """
    assert "torch" not in loaded_modules(f"import noisekit.{package}")


def test_probes_never_load_the_store() -> None:
    """A probe calls a sink and does not know who writes.

    Catches: a probe that imports the writer.
    """
    code = (
        "import noisekit.probes, sys\n"
        "print([m for m in sys.modules if m.startswith('noisekit.records')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_loads_neither_torch_nor_figures() -> None:
    """``noisekit --help`` answers at once.

    Catches: a command module that imports what only one command needs.
    """
    statement = (
        "import sys\nsys.argv = ['noisekit', '--help']\n"
        "from noisekit.cli.main import main\n"
        "from contextlib import redirect_stdout, suppress\n"
        "import io\n"
        "with suppress(SystemExit), redirect_stdout(io.StringIO()):\n"
        "    main()"
    )
    heavy = {"torch", "matplotlib", "seaborn", "sklearn", "torchvision", "pandas"}
    assert not loaded_modules(statement) & heavy


def test_every_public_name_imports() -> None:
    """``dir(noisekit)`` lists only what can be had.

    Catches: a name in the table whose home moved.
    """
    import noisekit as nk

    for name in dir(nk):
        assert getattr(nk, name) is not None, name
    assert not hasattr(nk, "no_such_name")


def test_every_public_name_is_declared_once_and_public_at_its_home() -> None:
    """What a type checker reads is what is imported, from a package's public names.

    Catches: a name that is declared twice, or under another name than its own; a home
    that does not list it, so that it could vanish there unnoticed.
    """
    import noisekit as nk

    tree = ast.parse((ROOT / "noisekit" / "__init__.pyi").read_text())
    declared = [
        (alias.name, alias.asname, str(node.module))
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    names = [name for name, _, _ in declared]
    assert len(names) == len(set(names)) > 60
    assert all(name == public for name, public, _ in declared)
    assert {name: home for name, _, home in declared} == nk._HOME
    for name, _, home in declared:
        public = getattr(importlib.import_module(home), "__all__", None)
        assert public is None or name in public, (name, home)
        assert getattr(nk, name) is getattr(importlib.import_module(home), name)


def test_experiments_hold_no_python() -> None:
    """An experiment is a recipe and a page, never code."""
    assert not list((ROOT / "experiments").rglob("*.py"))
    assert list((ROOT / "experiments").glob("*/recipe.toml"))


@pytest.mark.parametrize("script", ANALYSES, ids=lambda path: path.stem)
def test_analysis_uses_public_names_only(script: Path) -> None:
    """An analysis imports the root or a package's public names.

    Catches: an analysis that reaches into ``noisekit.stats.contrasts``.
    """
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module and node.module.startswith("noisekit"):
                assert not [a.name for a in node.names if a.name.startswith("_")]
        else:
            continue
        for module in modules:
            assert module.count(".") <= 1 or not module.startswith("noisekit"), module


def test_analyses_exist() -> None:
    """The table above is not empty."""
    assert {path.stem for path in ANALYSES} >= {
        "sharpness_vs_batch_size",
        "gradient_noise",
    }


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports when it is itself imported, not for types only."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_imports_itself_in_a_circle() -> None:
    """Modules can be sorted so that each imports only from those before it.

    Catches: two modules that call each other, split from one noun.
    """
    paths = [p for p in (ROOT / "noisekit").rglob("*.py") if p.name != "__init__.py"]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}
    graph = {name: imports_of(path) & names.keys() for name, path in names.items()}
    TopologicalSorter(graph).prepare()

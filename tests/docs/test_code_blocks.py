"""Every Python block of the README and of the guides runs as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/getting_started.md",
        "docs/probes.md",
        "docs/sharpness.md",
        "docs/policies.md",
        "docs/extending.md",
    ],
)
def test_python_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page run one after the other, as a reader would paste them.

    Catches: a name, a keyword or a column that the page still has and the code not.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # modules that a page writes
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks, page
    # A script file under a main guard, since workers are spawned processes.
    namespace: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)

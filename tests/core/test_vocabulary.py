"""The vocabulary: each quantity once, complete and drawable."""

import re

import pytest
from matplotlib.mathtext import MathTextParser

from noisekit.core.errors import UsageError
from noisekit.core.vocabulary import QUANTITIES, Quantity, quantity


@pytest.mark.parametrize("entry", QUANTITIES.values(), ids=lambda q: q.name)
def test_every_quantity_is_complete(entry: Quantity) -> None:
    """Catches: a column without meaning, an axis without words."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", entry.name)
    assert entry.label[0].isupper()
    assert entry.definition.endswith(".")
    assert len(entry.definition) > 15


@pytest.mark.parametrize("entry", QUANTITIES.values(), ids=lambda q: q.name)
def test_every_symbol_can_be_drawn(entry: Quantity) -> None:
    """Catches: LaTeX that Matplotlib does not know, which fails in the last step."""
    MathTextParser("path").parse(entry.axis_label)


def test_names_map_to_themselves() -> None:
    assert all(name == entry.name for name, entry in QUANTITIES.items())


def test_sources_name_a_year() -> None:
    """Catches: a source that nobody can look up."""
    cited = [entry.source for entry in QUANTITIES.values() if entry.source]
    assert cited
    assert all(re.search(r"\b(19|20)\d\d\b", source) for source in cited)


def test_vocabulary_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        QUANTITIES["mine"] = quantity("step")  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lambda_max", r"Largest Hessian eigenvalue $\lambda_{\max}$ [loss/param²]"),
        ("learning_rate", r"Learning rate $\eta$"),
        ("epoch", "Epoch"),
        ("train_loss", "Training loss"),
        ("weight_norm", r"Weight norm $\|w\|$ [param]"),
    ],
)
def test_axis_label_has_symbol_and_unit(name: str, label: str) -> None:
    assert quantity(name).axis_label == label


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"'sharpness'; there are: .*lambda_max"):
        quantity("sharpness")

"""Tables and names in a reader's words."""

from pandas import DataFrame

from noisekit.core.vocabulary import quantity
from noisekit.report.formatting import table_cells

SHARPNESS = quantity("lambda_max")
ARMS = {"small": "batch 16", "large": "batch 128"}


def test_cells_are_named_rounded_and_aligned() -> None:
    """Catches: internal names, sixteen digits, and numbers set to the left."""
    frame = DataFrame(
        {
            "arm": ["small", "large"],
            "snapshot": ["loss_0.05", "equal_epochs"],
            "quantity": ["lambda_max", "mine"],
            "lambda_max": [1 / 3, float("nan")],
            "num_pairs": [12345, 2],
            "spread": ["0.10 ± 0.02", "-0.2e-05 ± 1"],
            "converged": [True, False],
        }
    )
    head, rows = table_cells(frame, ARMS)
    assert [cell.text for cell in head][2:5] == [
        "Quantity",
        f"{SHARPNESS.label} [{SHARPNESS.unit}]",
        "Num pairs",
    ]
    assert [cell.text for cell in rows[0]] == [
        "batch 16",
        "training loss 0.05",
        SHARPNESS.label,
        "0.3333",
        "12,345",
        "0.10 ± 0.02",
        "yes",
    ]
    assert [cell.text for cell in rows[1]] == [
        "batch 128",
        "equal epochs",
        "mine",
        "–",
        "2",
        "−0.2\u202f×\u202f10⁻⁵ ± 1",
        "no",
    ]
    aligned = [False, False, False, True, True, True, False]
    for row in (head, *rows):
        assert [cell.numeric for cell in row] == aligned


def test_a_table_without_rows_keeps_its_head() -> None:
    """Catches: a fault where nothing was measured."""
    head, rows = table_cells(DataFrame({"arm": [], "value": []}), ARMS)
    assert [cell.text for cell in head] == ["Arm", "Value"]
    assert rows == []

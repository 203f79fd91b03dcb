"""Tables and the vocabulary that types them."""

import pyarrow as pa
import pytest

from noisekit.core.errors import UsageError
from noisekit.core.vocabulary import QUANTITIES
from noisekit.records import TABLES, table


def test_every_column_is_explained() -> None:
    """Each is a quantity of the vocabulary or brings its own definition.

    Catches: a column whose name is all that is known about it.
    """
    for item in TABLES.values():
        for column in item.columns:
            assert column.name in QUANTITIES or column.definition, column.name


def test_units_and_definitions_are_in_the_file() -> None:
    """Catches: a Parquet file that cannot be understood without this package."""
    field = table("evaluations").schema.field("train_loss")
    assert field.metadata[b"unit"] == b"loss"
    assert b"whole training set" in field.metadata[b"definition"]


def test_only_clock_columns_may_differ_between_equal_runs() -> None:
    """Catches: wall time in a table that bits are promised for."""
    assert {
        (item.name, name) for item in TABLES.values() for name in item.timing_columns
    } == {("measurements", "seconds")}


def test_measured_numbers_are_doubles() -> None:
    """Catches: values rounded on their way to disk."""
    for item in TABLES.values():
        for field in item.schema:
            assert field.type not in {pa.float32(), pa.int32()}


def test_an_unknown_table_lists_those_there_are() -> None:
    """Catches: a KeyError."""
    with pytest.raises(UsageError, match=r"tables steps, evaluations, .*got 'stesp'"):
        table("stesp")

"""Runs on disk: written so that a crash loses nothing, read as tidy tables."""

from noisekit.records.files import exclusive_lock, read_json, write_json_atomic
from noisekit.records.manifest import Manifest, RunStatus
from noisekit.records.reader import (
    RUN_COLUMNS,
    Runs,
    factor_cell,
    open_runs,
    read_set,
    write_set,
)
from noisekit.records.rundir import RunDirectory
from noisekit.records.schema import FORMAT, TABLES, Column, Table, table
from noisekit.records.sink import RunSink
from noisekit.records.stored_table import StoredTable
from noisekit.records.tensors import load_tensors, save_tensors
from noisekit.records.text_sink import TEXT_SINKS, CsvSink, JsonLinesSink
from noisekit.records.writer import TableWriter

__all__ = [
    "FORMAT",
    "RUN_COLUMNS",
    "TABLES",
    "TEXT_SINKS",
    "Column",
    "CsvSink",
    "JsonLinesSink",
    "Manifest",
    "RunDirectory",
    "RunSink",
    "RunStatus",
    "Runs",
    "StoredTable",
    "Table",
    "TableWriter",
    "exclusive_lock",
    "factor_cell",
    "load_tensors",
    "open_runs",
    "read_json",
    "read_set",
    "save_tensors",
    "table",
    "write_json_atomic",
    "write_set",
]

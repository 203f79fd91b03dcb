"""The tables of a run, typed from the vocabulary and versioned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import pyarrow as pa

from noisekit.core.errors import UsageError
from noisekit.core.vocabulary import ESTIMATORS, QUANTITIES, STEP_COLUMNS

FORMAT = 2
"""Version of the run directory; raised when an older reader would go wrong.

1: segments are plain Arrow streams, and nothing states a digest. 2: segments have
checksums, manifests and sets a digest of their own, sealed files one in the manifest.
"""

FORMAT_KEY = b"noisekit.format"
FIRST_ROW_KEY = b"noisekit.first_row"
LAST_SEGMENT_KEY = b"noisekit.last_segment"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        name: A name of the vocabulary, or one that ``definition`` explains.
        type: How it is stored.
        definition: What it means, where it is not in the vocabulary.
        timing: Whether it is a time, which differs between equal runs.
    """

    name: str
    type: pa.DataType
    definition: str = ""
    timing: bool = False

    def field(self) -> pa.Field:
        """Return the Arrow field, with unit and meaning as its metadata."""
        known = QUANTITIES.get(self.name)
        unit = known.unit if known else ""
        meaning = self.definition or (known.definition if known else "")
        return pa.field(
            self.name, self.type, metadata={"unit": unit, "definition": meaning}
        )


@dataclass(frozen=True)
class Table:
    """One table: its name and its columns, in order; every cell may be empty."""

    name: str
    columns: tuple[Column, ...]

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema."""
        return pa.schema([column.field() for column in self.columns])

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        """Each column's type."""
        return {column.name: column.type for column in self.columns}

    @property
    def timing_columns(self) -> tuple[str, ...]:
        """Columns that differ between two runs of the same bits."""
        return tuple(column.name for column in self.columns if column.timing)


def _integers(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, pa.int64()) for name in names)


def _floats(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, pa.float64()) for name in names)


_SPLITS = tuple(
    f"{split}_{kind}"
    for split in ("train", "validation", "test")
    for kind in ("loss", "error")
)
_POSITION = (*_integers("step", "examples_seen"), *_floats("epoch"))
_WEIGHTS = _floats("weight_norm", "distance_from_start", "distance_from_fork")
_SNAPSHOT = Column("snapshot", pa.string(), "Name of the snapshot.")

_MOMENTS = (
    Column("unit_size", pa.float64(), "Examples in one unit, on average."),
    Column("num_units", pa.int64(), "Units behind the step's gradient."),
    Column("num_read", pa.int64(), "Units whose squared norms were read."),
    Column("weight_sq_sum", pa.float64(), "Sum of the units' squared weights."),
    Column("mean_sq_norm", pa.float64(), "Mean squared norm of a unit's gradient."),
    Column("mean_fourth", pa.float64(), "Mean fourth power of a unit's gradient norm."),
    Column("sq_norm_of_mean", pa.float64(), "Squared norm of the mean over the units."),
)
"""Sufficient statistics: every estimate can be made of them again."""

_STEPS = (
    *_POSITION,
    *_integers("batch_size"),
    *_floats("learning_rate", "batch_loss"),
    Column(
        "unit",
        pa.string(),
        "One unit of the noise: example, sequence, chunk; token where the noise scale "
        "is counted in tokens, the sampling unit being the sequence.",
    ),
    Column("tokens", pa.float64(), "Tokens that count behind the step's gradient."),
    Column("tokens_per_sequence", pa.float64(), "The same per effective sequence."),
    *_MOMENTS,
    *_floats("grad_sq_norm"),
    *_floats("variance_trace", "debiased_grad_sq_norm", "simple_noise_scale"),
    Column("estimator", pa.string(), "How the units' gradients were read."),
    Column("coverage", pa.float64(), "Share of the parameters that the reading saw."),
    Column("status", pa.string(), "Whether the reading can be relied on."),
    Column("clip_factor", pa.float64(), "What clipping multiplied the gradient by."),
    *_floats(*STEP_COLUMNS),
    *(
        replace(
            column,
            name=f"{estimator}_{column.name}",
            definition=f"{column.definition} By the estimator {estimator!r}.",
        )
        for estimator in ESTIMATORS
        for column in _MOMENTS
    ),
)
_REGIME = (
    Column("phase", pa.int64(), "Phases begun, where the recipe has any."),
    Column("batch_size", pa.int64(), "Examples of the last update, where that varies."),
)
_MEASUREMENTS = (
    Column("snapshot", pa.string(), "Name of the snapshot; none in a series."),
    Column(
        "step", pa.int64(), "Update of the weights of a series, which are not kept."
    ),
    Column("measure", pa.string(), "What gave the row; it may give several."),
    Column("quantity", pa.string(), "Name in the vocabulary."),
    Column("variant", pa.string(), "Setting that distinguishes two rows of it."),
    Column("value", pa.float64(), "Point estimate, in the quantity's unit."),
    Column("stderr", pa.float64(), "Standard error, where the error is statistical."),
    Column("bound", pa.float64(), "A solver's residual bound."),
    Column("low", pa.float64(), "Lower end of the 95 % confidence set."),
    Column("high", pa.float64(), "Upper end of the 95 % confidence set."),
    Column("error_source", pa.string(), "What the error would average over."),
    Column("num_samples", pa.int64(), "What ``stderr`` averages over, counted."),
    Column("status", pa.string(), "Whether the value can be relied on."),
    Column("num_matvecs", pa.int64(), "Hessian-vector products spent."),
    Column("num_grads", pa.int64(), "Gradient evaluations spent."),
    Column("detail", pa.string(), "Settings and by-products, as JSON."),
    Column("seconds", pa.float64(), "Wall time spent [s].", timing=True),
)

_ALL = (
    Table("steps", _STEPS),
    Table("evaluations", (*_POSITION, *_floats(*_SPLITS), *_WEIGHTS, *_REGIME)),
    Table(
        "snapshots",
        (
            _SNAPSHOT,
            Column("kind", pa.string(), "start, loss, epochs, updates, stalled, final"),
            *_POSITION,
            *_floats("learning_rate", *_SPLITS),
            *_WEIGHTS,
            *_REGIME,
        ),
    ),
    Table("measurements", _MEASUREMENTS),
    Table(
        "examples",
        (
            _SNAPSHOT,
            Column("split", pa.string(), "Part of the data."),
            Column("example", pa.int64(), "Position in that part."),
            Column("correct", pa.bool_(), "Whether it is classified correctly."),
            *_floats("example_grad_sq_norm"),
        ),
    ),
    Table(
        "layers",
        (
            *_integers("step"),
            Column("layer", pa.string(), "Name of the layer in the model."),
            *_floats("grad_sq_norm", "variance_trace"),
        ),
    ),
)

TABLES: Mapping[str, Table] = MappingProxyType({table.name: table for table in _ALL})


def table(name: str) -> Table:
    """Return the table called ``name``.

    Raises:
        UsageError: If a run has no such table.
    """
    try:
        return TABLES[name]
    except KeyError:
        known = ", ".join(TABLES)
        raise UsageError(
            f"a run needs one of the tables {known}, got {name!r}."
        ) from None

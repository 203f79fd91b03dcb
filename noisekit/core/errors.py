"""Errors that noisekit raises.

Each is a ``NoisekitError`` and the builtin that a caller would expect, and its
message reads *needs X, got Y, where; do Z*.
"""

from noisekit.core.text import printable


class NoisekitError(Exception):
    """Base of every error that noisekit raises on purpose."""

    def __str__(self) -> str:
        """Return the message, with what a terminal would act on shown as an escape."""
        return printable(super().__str__())


class UsageError(NoisekitError, ValueError):
    """An argument is outside what the called function accepts."""


class RecipeError(UsageError):
    """A recipe has faults; the message lists all of them with file and key."""


class EmptyDataError(UsageError):
    """A loader gave no batch, or a data set has no example."""


class BatchSizeError(UsageError):
    """A batch has too few, too many or ambiguous examples."""


class NoParametersError(UsageError):
    """No trainable parameter was found or selected."""


class LossShapeError(UsageError):
    """A loss function did not return one finite-dtype scalar."""


class NormaliserError(UsageError):
    """What a loss divides by is not what was assumed; give ``normaliser=``."""


class DeviceMismatchError(NoisekitError, RuntimeError):
    """Model and data are on different devices."""


class DataChangedError(NoisekitError, RuntimeError):
    """A loader gave different data on a second pass."""


class CoupledExamplesError(NoisekitError, RuntimeError):
    """Per-example gradients do not exist, since a layer couples the examples."""


class ClosureError(NoisekitError, RuntimeError):
    """Per-example contributions do not add up to the gradient."""


class LayerReadError(NoisekitError, RuntimeError):
    """A layer's call does not determine its per-example gradients."""


class ModelCopyError(NoisekitError, RuntimeError):
    """A model holds something that cannot be copied."""


class ProbeWarning(UserWarning):
    """A probe could not read a step; training has gone on."""


class ProbeAdvice(ProbeWarning):
    """A step has no noise or a part of it, or another probe reads the same steps."""


class PolicyWarning(UserWarning):
    """A batch-size policy lacks what it needs; the batch size stays as it is."""


class DataNotFoundError(NoisekitError, FileNotFoundError):
    """A data set is not on this machine; the message lists the ways to get it."""


class DataFileError(NoisekitError, ValueError):
    """A data file is damaged, or is not the file that it should be."""


class RunDirectoryError(NoisekitError, RuntimeError):
    """A run directory is missing, damaged, locked or of a newer version."""


class RunLockedError(RunDirectoryError):
    """Another process is writing to this run."""


class NewerFormatError(RunDirectoryError):
    """A file was written by a newer noisekit than this one."""


class CheckpointError(RunDirectoryError):
    """A checkpoint is corrupt or does not belong to this run."""


class StorageError(NoisekitError, OSError):
    """A file could not be written; what was durable before is still there."""


class RunFailedError(NoisekitError, RuntimeError):
    """One or more runs of a sweep failed; the others are complete."""


class NoVerdictError(NoisekitError, RuntimeError):
    """A verdict was asked of runs that cannot carry one."""


class MissingPackageError(NoisekitError, ImportError):
    """An optional package is not installed; the message names the extra."""

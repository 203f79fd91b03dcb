"""The sharpness card: many measures of one model on the same data."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from noisekit.core.arguments import checked
from noisekit.core.citations import bibtex
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Reduction
from noisekit.core.results import Estimate, Status
from noisekit.core.vocabulary import INVARIANCES, Invariance
from noisekit.sharpness.measurement import Detail, Measure

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRow:
    """One quantity on a card.

    Attributes:
        measure: Name of the measure that gave it.
        measured_by: The measure itself, with its settings.
        quantity: Its name in the vocabulary.
        variant: The settings that distinguish several of one quantity.
        unit: Unit of measurement; empty for a pure number.
        invariance: Which function-preserving rescalings leave it unchanged.
        estimate: Value, error, cost and status.
        data_stderr: Error over the batches, where it is not the estimate's own.
        over_data: The estimate with that error included, as a value for other data.
        first_order_share: Part of an increase that the gradient alone accounts for.
        reason: Why there is no value, or what a reader must know of it.
        seconds: Wall time of its measure [s].
        detail: Settings and by-products.
    """

    measure: str
    measured_by: Measure
    quantity: str
    variant: str
    unit: str
    invariance: Invariance
    estimate: Estimate
    data_stderr: float | None
    over_data: Estimate
    first_order_share: float | None
    reason: str
    seconds: float
    detail: Detail

    @property
    def label(self) -> str:
        """Quantity and variant."""
        return f"{self.quantity}[{self.variant}]" if self.variant else self.quantity

    def cells(self) -> dict[str, float | int | str | None]:
        """Return the row as plain cells, for a table.

        ``low`` and ``high`` are the interval of 95 % over probes and data.
        """
        estimate, whole = self.estimate, self.over_data
        interval = whole.interval() if whole.has_error else None
        return {
            "measure": self.measure,
            "quantity": self.quantity,
            "variant": self.variant,
            "value": estimate.value,
            "unit": self.unit,
            "stderr": estimate.stderr,
            "data_stderr": self.data_stderr,
            "bound": estimate.bound,
            "low": interval.low if interval else None,
            "high": interval.high if interval else None,
            "error_source": estimate.error_source,
            "num_samples": estimate.num_samples,
            "status": estimate.status.value,
            "side": estimate.side,
            "invariance": self.invariance,
            "first_order_share": self.first_order_share,
            "num_matvecs": estimate.num_matvecs,
            "num_grads": estimate.num_grads,
            "seconds": self.seconds,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Where and how everything on a card was measured.

    Attributes:
        loss: Mean loss over the examples, at the weights.
        error: Share of misclassified examples, where there are classes.
        grad_norm: Norm of the gradient of that loss [loss/param].
        weight_norm: Norm of the chosen parameters.
        num_params: How many they are.
        num_examples: Examples in the data.
        num_batches: Batches in the data.
        data_hash: Hash of the examples.
        bn: What BatchNorm normalised with; ``None`` of a model without BatchNorm.
        reduction: What ``loss_fn`` returns of a batch: ``"mean"``, or a ``"sum"``,
            which was divided by what it sums over.
        dtype: Precision of the parameters; below float32 all is computed in float32.
        device: Where they are.
        model: Name of the model's class.
        loss_fn: Name of the loss.
        seed: Seed of all random streams.
        torch_version: Version of PyTorch.
    """

    loss: float
    error: float | None
    grad_norm: float
    weight_norm: float
    num_params: int
    num_examples: int
    num_batches: int
    data_hash: str
    bn: BatchNormPolicy | None
    reduction: Reduction
    dtype: str
    device: str
    model: str
    loss_fn: str
    seed: int
    torch_version: str

    @property
    def function(self) -> str:
        """The function that everything on the card is a measure of, as text."""
        if self.reduction == "mean":
            return "mean loss"
        return "mean loss (the sum that loss_fn returns over the number of examples)"

    @property
    def batch_norm(self) -> str:
        """The BatchNorm policy as text; empty where there is none."""
        return "" if self.bn is None else f"BatchNorm {self.bn}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharpnessCard:
    """Many measures of one model on the same data.

    ``card["lambda_max"]`` is an estimate, ``print(card)`` a table with the conditions.

    Attributes:
        rows: The quantities; one without a value has the reason.
        conditions: Where and how they were measured.
    """

    rows: tuple[CardRow, ...] = field(repr=False)
    conditions: Conditions

    def __getitem__(self, name: str) -> Estimate:
        """Return the estimate of a quantity, or of ``quantity[variant]``.

        Raises:
            UsageError: If there is no such quantity, or more than one variant.
        """
        return self.row(name).estimate

    @checked
    def row(self, name: str) -> CardRow:
        """Return the row of a quantity, or of ``quantity[variant]``.

        Raises:
            UsageError: If there is no such quantity, or more than one variant.
        """
        matching = [row for row in self.rows if row.label == name]
        matching = matching or [row for row in self.rows if row.quantity == name]
        if len(matching) == 1:
            return matching[0]
        labels = ", ".join(row.label for row in (matching or self.rows))
        raise UsageError(
            f"the card needs the name of one quantity, got {name!r}; there are: "
            f"{labels}."
        )

    @property
    def seconds(self) -> float:
        """Wall time of everything [s]."""
        taken = {row.measured_by: row.seconds for row in self.rows}
        return sum(taken.values())

    @property
    def num_matvecs(self) -> int:
        """Hessian products spent; what measures share is counted once."""
        return sum(row.estimate.num_matvecs for row in self.rows)

    @property
    def num_grads(self) -> int:
        """Gradient evaluations spent."""
        return sum(row.estimate.num_grads for row in self.rows)

    def frame(self) -> "pd.DataFrame":
        """Return one row per quantity, with its error, status, invariance and cost."""
        import pandas as pd

        return pd.DataFrame([row.cells() for row in self.rows])

    def to_json(self) -> str:
        """Return everything as JSON; what is not a finite number is ``null``."""
        content = {
            "conditions": asdict(self.conditions),
            "measures": [
                {"measure": measure.name, "settings": measure.settings}
                for measure in self._measures(self.rows)
            ],
            "rows": [row.cells() | {"detail": row.detail} for row in self.rows],
            "num_matvecs": self.num_matvecs,
            "num_grads": self.num_grads,
            "seconds": self.seconds,
            "methods": self.methods(),
            "bibtex": self.bibtex(),
        }
        return json.dumps(_plain(content), indent=2, ensure_ascii=False)

    def methods(self) -> str:
        """Return a paragraph for a paper's methods section."""
        at = self.conditions
        policy = f", with BatchNorm policy '{at.bn}'" if at.bn else ""
        return (
            f"Sharpness was measured with noisekit on {at.num_examples} examples in "
            f"{at.num_batches} batches (data hash {at.data_hash[:12]}), for "
            f"{at.num_params} parameters in {at.dtype}, in evaluation mode without "
            f"dropout{policy}; everything is of the {at.function}, which was "
            f"{at.loss:.4g}, with gradient norm {at.grad_norm:.3g}. Computed were: "
            f"{_clauses(self._available())}. All random numbers came from seed "
            f"{at.seed}."
        )

    def bibtex(self) -> str:
        """Return the BibTeX entries of the measures that could be had."""
        return bibtex(key for measure in self._available() for key in measure.sources)

    def _available(self) -> list[Measure]:
        """The measures that gave something, in order."""
        return self._measures(
            row for row in self.rows if row.estimate.status is not Status.UNAVAILABLE
        )

    @staticmethod
    def _measures(rows: Iterable[CardRow]) -> list[Measure]:
        return list(dict.fromkeys(row.measured_by for row in rows))

    def __str__(self) -> str:
        """Write a table, with the conditions above and the invariances below."""
        at = self.conditions
        error = "" if at.error is None else f"error {100 * at.error:.3g} %"
        facts = (
            f"{at.function} {at.loss:.4g}",
            error,
            f"|g| {at.grad_norm:.3g}",
            f"|w| {at.weight_norm:.4g}",
            at.batch_norm,
            f"seed {at.seed}",
        )
        head = [
            f"Sharpness of {at.model} ({at.num_params} parameters, {at.dtype}) on "
            f"{at.num_examples} examples ({at.data_hash[:12]})",
            ", ".join(fact for fact in facts if fact),
        ]
        lines = [_line(row) for row in self.rows]
        width = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            "  ".join(
                cell.ljust(wide) for cell, wide in zip(line, width, strict=True)
            ).rstrip()
            for line in lines
        ]
        used = dict.fromkeys(row.invariance for row in self.rows)
        legend = [f"{name}: {INVARIANCES[name]}" for name in used]
        cost = (
            f"{self.num_matvecs} Hessian products, {self.num_grads} gradients, "
            f"{self.seconds:.3g} s"
        )
        return "\n".join([*head, "", *table, "", *legend, cost])


def _clauses(measures: list[Measure]) -> str:
    """Text of a methods section: how each measure is computed, with its settings."""
    settings: dict[tuple[str, str], list[str]] = {}
    for measure in measures:
        stated = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in measure.settings.items()
            if value is not None and value is not False
        )
        settings.setdefault((measure.description, measure.name), []).append(stated)
    return "; ".join(
        f"{description} ({': '.join([name, ' and '.join(filter(None, stated))])})"
        if any(stated)
        else f"{description} ({name})"
        for (description, name), stated in settings.items()
    )


def _line(row: CardRow) -> tuple[str, str, str, str]:
    """A row's name, value with error, invariance, and remarks."""
    remarks = [row.reason.partition("\n")[0]] if row.reason else []
    if row.data_stderr is not None:
        remarks.append(f"± {row.data_stderr:.2g} over data")
    if row.first_order_share is not None and math.isfinite(row.first_order_share):
        remarks.append(f"first-order share {row.first_order_share:.2f}")
    value = f"{row.estimate} {row.unit}".rstrip()
    return row.label, value, row.invariance, "; ".join(remarks)


# Values of a card as types of JSON.
def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

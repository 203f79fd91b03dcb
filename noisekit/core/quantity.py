"""One measured quantity: how it is named, drawn and defined."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quantity:
    """One measured quantity.

    Attributes:
        name: The column name, a standard term of the field.
        symbol: Matplotlib mathtext, without the dollar signs.
        unit: What one of it is; empty where it is a pure number.
        label: Words for an axis.
        definition: One sentence that a reader can check against the source.
        source: Paper and section, where there is one.
    """

    name: str
    symbol: str
    unit: str
    label: str
    definition: str
    source: str = ""

    @property
    def axis_label(self) -> str:
        """Label, symbol and unit, as written beside an axis."""
        symbol = f" ${self.symbol}$" if self.symbol else ""
        unit = f" [{self.unit}]" if self.unit else ""
        return f"{self.label}{symbol}{unit}"

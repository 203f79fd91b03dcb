"""What a measure is, what measures of one model share, and the loop that takes them.

The loop serves the card and training runs alike. Each measure has random streams of its
own, by name, so that taking more measures changes no other's numbers.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from noisekit.core.errors import NoisekitError
from noisekit.core.results import Estimate, Status
from noisekit.core.risk import EmpiricalRisk
from noisekit.core.settings import check_settings
from noisekit.core.vocabulary import QUANTITIES, Invariance, Quantity
from noisekit.curvature import EigenPairs, HessianOperator, top_eigenpairs
from noisekit.curvature.random_vectors import entropy_generator
from noisekit.sharpness.data_error import (
    WithDataError,
    curvature_parts,
    data_stderr_at,
    over_data,
)
from noisekit.sharpness.sgd_rule import SGDRule

Detail = dict[str, bool | int | float | str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureResult:
    """An estimate with what is needed to read it; base of what functions return.

    Attributes:
        estimate: Value, error, cost and status.
        data_stderr: Error over the batches, to first order, draws and displacements
            taken as they were; ``None`` where there is one batch.
    """

    estimate: Estimate
    data_stderr: float | None = None

    @property
    def value(self) -> float:
        """The bare value."""
        return self.estimate.value

    def __float__(self) -> float:
        """Return the bare value."""
        return self.estimate.value

    def text(self, unit: str, *remarks: str | None) -> str:
        """Write the value with both errors, and further remarks."""
        data = self.data_stderr
        parts = (
            f"{self.estimate} {unit}".rstrip(),
            None if data is None else f"± {data:.2g} over data",
            *remarks,
        )
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One quantity as measured.

    Attributes:
        quantity: Its name in the vocabulary.
        estimate: Value, error, cost and status.
        variant: The settings that distinguish several of one quantity.
        detail: Settings and by-products; ``note`` is what a reader must know, and
            ``error`` why there is no value.
        data_stderr: Error over the batches, where it is not the estimate's own.
        per_example: ``(n,)``, the value of each example, where there is one.
    """

    quantity: str
    estimate: Estimate
    variant: str = ""
    detail: Detail = field(default_factory=dict)
    data_stderr: float | None = None
    per_example: Tensor | None = field(default=None, repr=False, compare=False)


class MeasurementContext:
    """A model on fixed data, and what measures of it share.

    The Hessian's graph, the gradient and the eigenvectors are computed once, when the
    first measure needs them.

    Attributes:
        risk: The empirical risk over the examples to measure on.
        stream: Gives the random stream of a name, whatever was measured before.
        update_rule: What the model is trained with, for stability thresholds.
        data_error: Whether measures get their error over batches also where that
            takes more products or gradients.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        *,
        stream: Callable[..., torch.Generator],
        update_rule: SGDRule | torch.optim.Optimizer | None = None,
        data_error: bool = True,
        hessian: HessianOperator | None = None,
        lambda_max: Estimate | None = None,
    ) -> None:
        """Set up without computing anything.

        Args:
            risk: The empirical risk.
            stream: Maps names to a generator.
            update_rule: An ``SGDRule``, or the optimizer.
            data_error: Whether to spend products on errors over the batches.
            hessian: Of the risk, where there is one already; the caller closes it.
            lambda_max: The largest eigenvalue, where it was measured before.
        """
        self.risk = risk
        self.stream = stream
        self.update_rule = update_rule
        self.data_error = data_error
        self.known_lambda_max = lambda_max
        self._hessian = hessian
        self._owned: HessianOperator | None = None
        self._pairs: dict[tuple[object, ...], EigenPairs] = {}
        self._errors: dict[tuple[object, ...], float | None] = {}
        self._start: tuple[float, Tensor] | None = None

    def __enter__(self) -> Self:
        """Return the context."""
        return self

    def __exit__(self, *error: object) -> None:
        """Free the kept graph."""
        if self._owned is not None:
            self._owned.close()

    @property
    def hessian(self) -> HessianOperator:
        """The Hessian of the risk; its graph is kept between measures."""
        if self._hessian is None:
            self._hessian = self._owned = HessianOperator(self.risk)
        return self._hessian

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Return loss and gradient at the weights, computed once."""
        if self._start is None:
            self._start = self.risk.in_precision(torch.float32).value_and_grad()
        return self._start

    def eigenvalue(
        self, which: Literal["LA", "SA"], *, tol: float, max_matvecs: int | None
    ) -> WithDataError:
        """Return the largest or smallest eigenvalue and its error over batches.

        It costs nothing where it was measured already with the same settings.
        """
        key = (which, tol, max_matvecs)
        shared = key in self._pairs
        if not shared:
            pairs = top_eigenpairs(
                self.hessian,
                1,
                which=which,
                tol=tol,
                max_matvecs=max_matvecs,
                generator=self.stream("lanczos", which),
            )
            self._errors[key] = self._error_of(pairs)
            self._pairs[key] = pairs
        result, error = self._pairs[key].estimate(), self._errors[key]
        cost = 0 if shared else result.num_matvecs + (error is not None)
        return replace(result, num_matvecs=cost), error

    def _error_of(self, pairs: EigenPairs) -> float | None:
        """The error over batches of an eigenvalue, to first order."""
        if not self.data_error or not bool(pairs.values.isfinite().all()):
            return None
        vector = pairs.vectors[:, 0]
        return data_stderr_at(self.risk, lambda risk: curvature_parts(risk, vector))


class Measure(ABC):
    """One measure of sharpness with its settings.

    A measure is a frozen dataclass whose fields are its settings, with usual values as
    defaults. Types and bounds of :mod:`noisekit.core.settings` are checked when it is
    made. A measure of your own states ``name`` and defines ``cost`` and ``measure``;
    plain class attributes will do in the place of properties.
    """

    # For recipes, where pydantic reads settings from TOML.
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
    }

    in_variant: ClassVar[tuple[str, ...]] = ()
    """Settings that its variant states."""

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self)  # type: ignore[arg-type]  # subclasses are dataclasses

    @property
    @abstractmethod
    def name(self) -> str:
        """The quantity that it gives, by its name in the vocabulary."""

    @property
    def description(self) -> str:
        """How it is computed, as a clause for a paper's methods section."""
        return ""

    @property
    def needs(self) -> str:
        """What it cannot be had without, beside a differentiable loss."""
        return ""

    @property
    def sources(self) -> tuple[str, ...]:
        """Keys of its papers among the citations."""
        return ()

    @property
    def variant(self) -> str:
        """The settings that distinguish it, such as ``rho=0.05,steps=1``."""
        stated = ((name, getattr(self, name)) for name in self.in_variant)
        return ",".join(f"{k}={_brief(v)}" for k, v in stated if v is not None)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name; ``type(measure)(**settings)`` makes an equal one."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @property
    def quantity(self) -> Quantity:
        """Its entry in the vocabulary.

        Of a measure of your own that does not override this, the most cautious one:
        neither invariant nor comparable at unmatched training loss.
        """
        words = self.name.replace("_", " ")
        return QUANTITIES.get(self.name) or Quantity(
            self.name,
            "",
            "",
            words[:1].upper() + words[1:],
            self.description,
            invariance="raw",
            fades_with_loss=True,
        )

    @property
    def invariance(self) -> Invariance:
        """Which function-preserving rescalings leave it unchanged."""
        return self.quantity.invariance or "raw"

    @abstractmethod
    def cost(self) -> int:
        """Return a bound on its cost, in gradient evaluations over all the data.

        A Hessian product counts as two, a loss as a third.
        """

    def typical_cost(self) -> int:
        """Return what it usually costs, where that is far below the bound."""
        return self.cost()

    @abstractmethod
    def measure(self, context: MeasurementContext) -> Iterator[Measurement]:
        """Take it: yield its quantities, the one that it is named after first."""

    def measured(
        self,
        estimate: Estimate,
        *,
        detail: Detail | None = None,
        data_stderr: float | None = None,
    ) -> Measurement:
        """Return an estimate as a measurement of the quantity it is named after."""
        return Measurement(self.name, estimate, self.variant, detail or {}, data_stderr)

    def estimate(
        self,
        risk: EmpiricalRisk,
        *,
        generator: torch.Generator | None = None,
        data_error: bool = False,
    ) -> Estimate:
        """Return its first quantity, of a risk.

        Args:
            risk: The empirical risk.
            generator: Source of all its random numbers; by default a fresh one.
            data_error: Include the sampling error of the data.
        """
        drawn = entropy_generator(generator)
        with MeasurementContext(
            risk, stream=lambda *_: drawn, data_error=data_error
        ) as context:
            first = next(self.measure(context))
        return over_data(
            first.estimate, first.data_stderr if data_error else None, risk
        )


@dataclass(frozen=True, slots=True)
class Taken:
    """What one measure gave, and what it took.

    Attributes:
        measure: The measure.
        measurements: Its quantities; where it failed, what came before and a last one
            that is unavailable, with the reason.
        seconds: Wall time [s].
    """

    measure: Measure
    measurements: tuple[Measurement, ...]
    seconds: float


def take(measures: Iterable[Measure], context: MeasurementContext) -> Iterator[Taken]:
    """Take each measure, one after the other.

    One that cannot be had costs only its own row. Two that would give the same variant
    of one quantity have the settings in which they differ added to it.

    Yields:
        What each measure gave.
    """
    chosen = tuple(measures)
    for measure, suffix in zip(chosen, _suffixes(chosen), strict=True):
        began = time.perf_counter()
        taken: list[Measurement] = []
        try:
            taken.extend(measure.measure(context))
        except Exception as error:  # whatever it is, the others are still to come
            taken.append(_refusal(measure, error))
        if suffix:
            taken = [_with_suffix(item, suffix) for item in taken]
        yield Taken(measure, tuple(taken), time.perf_counter() - began)


def _refusal(measure: Measure, error: Exception) -> Measurement:
    text = str(error)
    if not isinstance(error, NoisekitError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    nothing = Estimate(math.nan, status=Status.UNAVAILABLE)
    return measure.measured(nothing, detail={"error": text})


def _with_suffix(item: Measurement, suffix: str) -> Measurement:
    variant = f"{item.variant},{suffix}" if item.variant else suffix
    return replace(item, variant=variant)


def _suffixes(measures: tuple[Measure, ...]) -> list[str]:
    """Of each measure, the settings in which it differs from its namesakes."""
    labels = [(measure.name, measure.variant) for measure in measures]
    return [
        _difference(
            measure,
            [m for m, its in zip(measures, labels, strict=True) if its == label],
        )
        for measure, label in zip(measures, labels, strict=True)
    ]


def _difference(measure: Measure, alike: list[Measure]) -> str:
    """The settings in which it differs from one of the others, and from the default."""
    own = measure.settings
    unusual = (
        name
        for name, value in own.items()
        if value != getattr(type(measure), name, None)
        and any(other.settings.get(name) != value for other in alike)
    )
    return ",".join(f"{name}={_brief(own[name])}" for name in unusual)


def _brief(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

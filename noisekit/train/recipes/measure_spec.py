"""The section of a recipe that says what is measured at the snapshots."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails

from noisekit.sharpness import Measure
from noisekit.train.measures import MEASURES, own_measure
from noisekit.train.recipes.recipe_errors import not_one_of, suggestion
from noisekit.train.references import is_reference
from noisekit.train.section import PositiveInt, Section, Split

ALWAYS_RECORDED = (
    *(f"{split}_{kind}" for split in get_args(Split) for kind in ("loss", "error")),
    "weight_norm",
    "distance_from_start",
)
"""What every snapshot has without being asked."""


def _known_measure(name: str) -> str:
    if name not in MEASURES and not is_reference(name):
        raise ValueError(not_one_of("a measure", name, (*MEASURES, "module:Class")))
    return name


MeasureName = Annotated[str, AfterValidator(_known_measure)]
"""A measure by its name, or ``module:Class`` of the user's own code."""

Settings = dict[str, JsonValue]
Table = dict[str, Any]  # as TOML and JSON have it


class MeasureSpec(Section):
    """What is measured at the snapshots, and how hard.

    Attributes:
        num_examples: Training examples that the risk is taken over: the first of a
            seeded permutation that all runs share. All of them if left out.
        everywhere: Measures taken at every snapshot.
        at: Further measures by snapshot.
        settings: By measure, settings other than the usual ones. A table changes them
            in all that the name stands for, such as both boxes of epsilon-sharpness;
            a list of tables takes the measure once for each.
        bn: What BatchNorm normalises by while measuring.
        examples: Splits of which each example's outcome is recorded.
    """

    num_examples: PositiveInt | None = None
    everywhere: tuple[MeasureName, ...] = ()
    at: dict[str, tuple[MeasureName, ...]] = Field(default_factory=dict)
    settings: dict[MeasureName, Settings | tuple[Settings, ...]] = Field(
        default_factory=dict
    )
    bn: Literal["running", "recalibrated", "batch"] = "running"
    examples: tuple[Split, ...] = ("test",)

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        """Check what can be checked without importing the user's code."""
        own = [name for name in self.settings if is_reference(name)]
        raise_all(_settings_errors(self.settings, leave_out=own))
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all that is measured anywhere."""
        return (*self.everywhere, *(name for at in self.at.values() for name in at))

    def measures_at(self, snapshot: str) -> tuple[str, ...]:
        """Return the names of what is measured at ``snapshot``, in a fixed order."""
        return tuple(dict.fromkeys((*self.everywhere, *self.at.get(snapshot, ()))))

    def measures(self, name: str) -> tuple[Measure, ...]:
        """Return the measures that a name stands for, with their settings.

        Raises:
            UsageError: If it is the user's own code and may not be imported here.
            ValidationError: If settings do not fit it.
        """
        return measures_of(name, self.settings.get(name, {}))


def measures_of(
    name: str, settings: Settings | tuple[Settings, ...]
) -> tuple[Measure, ...]:
    """Return a name's measures with settings laid over the usual ones, each once.

    Raises:
        UsageError: If the name is the user's own code and may not be imported here.
        ValidationError: If a setting is unknown, of the wrong type, or out of bounds.
    """
    usual = MEASURES[name] if name in MEASURES else (own_measure(name)(),)
    if isinstance(settings, dict):
        made = [_with_settings(measure, settings, ()) for measure in usual]
    else:
        made = [
            _with_settings(usual[0], table, (i,)) for i, table in enumerate(settings)
        ]
    for measure in made:
        if name in MEASURES and measure.name != name:
            raise _error(
                (),
                f"needs settings of {name}, got those of {measure.name}; put them "
                f"under measure.settings.{measure.name}",
                settings,
            )
    return tuple(dict.fromkeys(made))


def raise_all(errors: list[InitErrorDetails]) -> None:
    """Raise one error with all of these, if there are any.

    Raises:
        ValidationError: With all of them.
    """
    if errors:
        raise ValidationError.from_exception_data("settings", errors)


def _settings_errors(
    settings: Mapping[str, Settings | tuple[Settings, ...]], leave_out: list[str]
) -> list[InitErrorDetails]:
    errors: list[InitErrorDetails] = []
    for name, table in settings.items():
        if name not in leave_out:
            try:
                measures_of(name, table)
            except ValidationError as error:
                errors += _moved(error, ("settings", name))
    return errors


def _with_settings(
    measure: Measure, settings: Settings, place: tuple[int, ...]
) -> Measure:
    kind = type(measure)
    unknown = list(_unknown(kind, settings))
    if unknown:
        errors = [_detail((*place, key), text, settings[key]) for key, text in unknown]
        raise ValidationError.from_exception_data("settings", errors)
    try:
        # By way of JSON, where types stay strict.
        text = json.dumps(measure.settings | settings)
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            "settings", _moved(error, place)
        ) from error


def _unknown(kind: type[Measure], settings: Settings) -> Iterator[tuple[str, str]]:
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            allowed = ", ".join(sorted(known)) or "none"
            yield key, f"unknown key{suggestion(key, known)}. Allowed here: {allowed}"


def _moved(
    error: ValidationError, place: tuple[str | int, ...]
) -> list[InitErrorDetails]:
    """The errors with their location below ``place``."""
    return [
        InitErrorDetails(
            type=details["type"],
            loc=(*place, *details["loc"]),
            input=details["input"],
            ctx=details.get("ctx", {}),
        )
        for details in error.errors(include_url=False)
    ]


def _detail(place: tuple[str | int, ...], text: str, value: object) -> InitErrorDetails:
    return InitErrorDetails(
        type="value_error", loc=place, input=value, ctx={"error": ValueError(text)}
    )


def _error(place: tuple[str | int, ...], text: str, value: object) -> ValidationError:
    return ValidationError.from_exception_data(
        "settings", [_detail(place, text, value)]
    )


def translated_measure(table: Table) -> Table:
    """Return the section of a recipe of format 1 in today's terms.

    There the settings of all measures lay side by side, such as ``trace_matvecs``.
    """
    kept = ("num_examples", "everywhere", "at", "bn", "examples")
    settings: Table = {}
    for name, keys in _FORMAT_1.items():
        given = {key: table[old] for key, old in keys.items() if old in table}
        if given:
            settings[name] = given
    steps = [{"steps": 1}, {"steps": table.get("ascent_steps", 10)}]
    for name in _IN_A_BALL:
        if "rho" in table or "ascent_steps" in table:
            ball = settings.get(name, {})
            settings[name] = [ball | step for step in steps]
    if "epsilon" in table:
        box = settings.pop("epsilon_sharpness", {})
        dims = dict.fromkeys((None, table.get("subspace_dim")))
        settings["epsilon_sharpness"] = [
            box | {"epsilon": epsilon, "subspace_dim": dim}
            for dim in dims
            for epsilon in table["epsilon"]
        ]
    return {key: table[key] for key in kept if key in table} | {"settings": settings}


_LANCZOS = {"tol": "tol", "max_matvecs": "max_matvecs"}
_PROBES = {"num_matvecs": "trace_matvecs"}
_IN_A_BALL = (
    "worst_case_sharpness",
    "adaptive_worst_case_sharpness",
    "logit_normalised_worst_case_sharpness",
)
_FORMAT_1: Mapping[str, Mapping[str, str]] = {
    "lambda_max": _LANCZOS,
    "lambda_min": _LANCZOS,
    "gauge_fixed_lambda_max": _LANCZOS,
    "edge_of_stability_ratio": _LANCZOS,
    "lambda_max_pyhessian": {"max_matvecs": "max_matvecs"},
    "hessian_trace": _PROBES,
    "weighted_hessian_trace": _PROBES,
    "hessian_frobenius_norm": _PROBES,
    "relative_flatness": _PROBES,
    "effective_dimension": {"shift": "shift"},
    "epsilon_sharpness": {"max_iter": "max_iter"},
    "worst_case_sharpness": {"rho": "rho"},
    "adaptive_worst_case_sharpness": {"rho": "adaptive_rho"},
    "logit_normalised_worst_case_sharpness": {"rho": "adaptive_rho"},
    "m_sharpness": {"rho": "rho", "batch_size": "group_size"},
    "average_sharpness": {"sigma": "sigma", "num_draws": "num_draws"},
    "adaptive_average_sharpness": {"sigma": "adaptive_sigma", "num_draws": "num_draws"},
    "logit_normalised_average_sharpness": {
        "sigma": "adaptive_sigma",
        "num_draws": "num_draws",
    },
    "pac_bayes_flatness": {"num_draws": "num_draws"},
    "pac_bayes_sharpness": {"steps": "ascent_steps"},
    "batch_sharpness": {"batch_size": "batch_size"},
}
"""By measure, the settings and their names in format 1."""

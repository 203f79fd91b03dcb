"""The section of a recipe that says what is measured at the snapshots."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import InitErrorDetails

from noisekit.core.errors import RecipeError
from noisekit.core.references import is_reference
from noisekit.sharpness import Measure
from noisekit.train.measures import MEASURES, own_measure
from noisekit.train.recipes.recipe_errors import (
    not_one_of,
    schema_faults,
    unknown_keys,
)
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


def _fitting(
    settings: dict[str, Settings | tuple[Settings, ...]],
) -> dict[str, Settings | tuple[Settings, ...]]:
    """Check all that can be checked without importing the user's code."""
    errors: list[InitErrorDetails] = []
    for name, tables in settings.items():
        try:
            _known_measure(name)
            if not is_reference(name):
                measures_of(name, tables)
        except ValidationError as error:
            errors += _moved(error, (name,))
        except ValueError as error:
            errors.append(_detail((name,), str(error), name))
    if errors:
        raise ValidationError.from_exception_data("settings", errors)
    return settings


AllSettings = Annotated[
    dict[str, Settings | tuple[Settings, ...]], AfterValidator(_fitting)
]
"""By measure, a table of settings or several."""

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
    settings: AllSettings = Field(default_factory=dict)
    bn: Literal["running", "recalibrated", "batch"] = "running"
    examples: tuple[Split, ...] = ("test",)

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
            RecipeError: If settings do not fit it.
        """
        try:
            return measures_of(name, self.settings.get(name, {}))
        except ValidationError as error:
            faults = schema_faults(error, type(self), prefix=f"measure.settings.{name}")
            raise RecipeError("\n".join(f"  {fault}" for fault in faults)) from error


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


def _with_settings(
    measure: Measure, settings: Settings, place: tuple[int, ...]
) -> Measure:
    kind = type(measure)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = unknown_keys(settings, known)
    if unknown:
        errors = [_detail((*place, f.key), f.text, settings[f.key]) for f in unknown]
        raise ValidationError.from_exception_data("settings", errors)
    try:
        # By way of JSON, where types stay strict.
        text = json.dumps(measure.settings | settings)
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            "settings", _moved(error, place)
        ) from error


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

"""Odd arguments for every public function and method, generated from the signatures.

Each parameter in turn gets each odd value while the others are good. A call may work,
or it raises a ``NoisekitError`` whose message names the argument, what it got and a way
out. A new public function is covered without an edit, as long as ``good_values`` has
what it needs.
"""

import inspect
import math
import tempfile
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_origin

import torch
from torch import nn
from torch.utils.data import TensorDataset

import noisekit as nk
from noisekit.core.errors import NoisekitError, RunDirectoryError
from noisekit.records.manifest import Manifest
from noisekit.records.rundir import RunDirectory

RESULTS = frozenset(
    {
        "Decision",
        "EigenPairs",
        "Estimate",
        "Interval",
        "Measure",
        "Measurement",
        "Observation",
        "Policy",
        "Probe",
        "Reading",
        "Recipe",
        "Runs",
        "SharpnessCard",
        "SpectralDensity",
        "Status",
    }
)
"""Classes that the library makes, or that users derive from."""

TINY = Path(__file__).parent / "train" / "tiny.toml"
OTHER_WORDS = {
    "loss_fn": ("loss", "model"),
    "batches": ("batch", "data", "loss", "model"),
    "batch": ("batches", "data", "loss"),
    "loader": ("batch", "data", "examples"),
    "model": ("parameter", "modules", "weights"),
    "where": ("directory",),
    "set_dir": ("directory", "runs"),
    "out_dir": ("directory", "set.json"),
    "name_or_path": ("recipe", "file"),
    "H": ("operator",),
    "A": ("operator",),
    "name": ("quantity", "row"),
    "run_id": ("runs",),
    "snapshot": ("snapshots", "run"),
    "state": ("probe",),
    "min": ("batch_size",),
    "data": ("examples",),
    "directions": ("dims",),
    "optimizer": ("optimizer",),
    "every": ("at",),
    "cyclic": ("at",),
    "inputs": ("batch", "model", "loss"),
    "targets": ("batch", "loss"),
}
"""What else a message may call an argument."""


class Odd:
    """An object that is nothing in particular."""

    def __repr__(self) -> str:
        return "Odd()"


@dataclass(frozen=True)
class Call:
    """One call of a public name.

    Attributes:
        name: The public name, or a class and its method.
        parameter: The parameter that is odd.
        label: How it is odd.
        make: Makes what is called and its arguments, anew for each call.
    """

    name: str
    parameter: str
    label: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]

    def __str__(self) -> str:
        return f"{self.name}({self.parameter}={self.label})"


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def data(value: float = 0.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 3, generator=generator) + value
    return [(inputs, torch.tensor([0, 1, 0, 1, 1, 0]))]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(network().parameters(), lr=0.1)


def dataset() -> TensorDataset:
    return TensorDataset(*data()[0])


def used_up() -> Iterator[Any]:
    """A generator that has nothing left."""
    spent = iter(data())
    next(spent)
    return spent


ODD_VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "odd",
    "[/x]": lambda: "[/x]\x1b[31m",
    "object": Odd,
    "True": lambda: True,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "-1": lambda: -1,
    "-0.5": lambda: -0.5,
    "0": lambda: 0,
    "1e30": lambda: 1e30,
    "10**20": lambda: 10**20,
    "[]": list,
    "dict": dict,
    "dataset": dataset,
    "optimizer": optimizer,
    "NaN batches": lambda: data(math.nan),
    "empty batch": lambda: [(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))],
    "batches of doubles": lambda: [(x.double(), y) for x, y in data()],
    "batches elsewhere": lambda: [(x.to("meta"), y.to("meta")) for x, y in data()],
    "iterator used up": used_up,
    "tensor": lambda: torch.zeros(2),
    "integer tensor": lambda: torch.zeros(26, dtype=torch.long),
    "tensor elsewhere": lambda: torch.zeros(26, device="meta"),
    "NaN tensor": lambda: torch.full((26,), math.nan),
    "class": lambda: nn.Linear,
    "model": network,
    "loss": nn.CrossEntropyLoss,
}


def good_values(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Return a good value for each parameter that has no default, by its name."""
    loss = nn.CrossEntropyLoss()
    state = {k: v + 0.1 for k, v in model.state_dict().items()}
    rule = nk.SGDRule(lr=0.1)

    def hessian() -> Any:
        return nk.HessianOperator(model, loss, data())

    return {
        "model": lambda: model,
        "loss_fn": lambda: loss,
        "batches": data,
        "batch": lambda: data()[0],
        "optimizer": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "H": hessian,
        "A": hessian,
        "operator": hessian,
        "curvature": lambda: nk.Estimate(1.0),
        "rule": lambda: rule,
        "start": model.state_dict,
        "end": lambda: state,
        "measure": lambda: nk.lambda_max,
        "epsilon": lambda: 1e-3,
        "lr": lambda: 0.1,
        "name": lambda: "lambda_max",
        "loader": data,
        "where": lambda: "/nowhere",
        "name_or_path": lambda: TINY,
        "recipe": lambda: nk.load_recipe(TINY),
        "out_dir": lambda: Path(tempfile.mkdtemp()) / "runs",
        "set_dir": finished_set,
        "target": lambda: 100.0,
        "data": lambda: 64,
        "policy": lambda: nk.Constant(8),
        "microbatch": lambda: 4,
        "reference_batch": lambda: 8,
        "decision": lambda: nk.Decision(8),
        "AdaBatch.every": lambda: nk.At(epochs=1),
        "GrowInsteadOfDecay.every": lambda: nk.At(epochs=1),
        "Growth.every": lambda: nk.At(epochs=1),
        "Table.every": lambda: nk.At(epochs=1),
        "gauge_fixed_lambda_max.model": normalised,
        "adam_preconditioned.optimizer": lambda: stepped_adam(model),
        "adam_preconditioned.operator": hessian,
        "batch_size": lambda: 8,
        "factor": lambda: 2,
        "max": lambda: 64,
        "at": lambda: [nk.At(epochs=1)],
        "vector": lambda: torch.cat([p.detach().flatten() for p in model.parameters()]),
        "runs": lambda: nk.Runs((run_directory(),)),
        "run_id": lambda: "one",
        "snapshot": lambda: "end",
        "sizes": lambda: (8, 16),
        "inputs": lambda: data()[0][0],
        "targets": lambda: data()[0][1],
        "sink": lambda: print,
        "close": lambda: print,
        "state": dict,
        "dtype": lambda: torch.float64,
        "shift": lambda: 0.1,
        "estimator": lambda: "per_example",
    }


def normalised() -> nn.Module:
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
    return nn.Sequential(*layers)


def stepped_adam(model: nn.Module) -> torch.optim.Optimizer:
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)
    inputs, targets = data()[0]
    nn.functional.cross_entropy(model(inputs), targets).backward()
    adam.step()
    return adam


@cache
def finished_set() -> Path:
    where = Path(tempfile.mkdtemp()) / "finished"
    nk.run(nk.load_recipe(TINY), where, workers=0)
    return where


def run_directory() -> RunDirectory:
    path = Path(tempfile.mkdtemp()) / "one"
    return RunDirectory.create(path, Manifest(run_id="one", arm="one", seed=0))


def receivers() -> dict[str, Callable[[], Any]]:
    """Return an instance of each class whose methods users call."""
    loss = nn.CrossEntropyLoss()

    def risk() -> Any:
        return nk.EmpiricalRisk(network(), loss, data())

    def probe() -> Any:
        model = network()
        rule = torch.optim.SGD(model.parameters(), lr=0.1)
        attached = nk.attach(model, rule, loss_fn=loss)
        loss(model(data()[0][0]), data()[0][1]).backward()
        rule.step()
        return attached

    return {
        "EigenPairs": lambda: nk.top_eigenpairs(torch.eye(4)),
        "EmpiricalRisk": risk,
        "Estimate": lambda: nk.Estimate(1.0, stderr=0.1, dof=8),
        "HessianOperator": lambda: nk.HessianOperator(risk()),
        "GradientCovarianceOperator": lambda: nk.GradientCovarianceOperator(risk()),
        "Probe": probe,
        "Reading": lambda: probe().readings[0],
        "Runs": lambda: nk.Runs((run_directory(),)),
        "SharpnessCard": lambda: nk.measure(risk(), measures=["grad_norm"]),
        "SpectralDensity": lambda: nk.spectral_density(torch.diag(torch.arange(9.0))),
    }


INTERNAL = frozenset(
    {
        "at_given_statistics",
        "batch_forms",
        "check_followed",
        "converted",
        "gradients",
        "loss_at",
        "measure",
        "loss_of",
        "noting",
        "on",
        "outputs_of",
        "products_in_double",
        "share_of",
        "weighted_batches",
        "with_loss",
    }
)
"""Methods for the library's own operators, and what hands its arguments to a model."""


def functions() -> Iterator[tuple[str, Callable[[], Callable[..., Any]], Any]]:
    """Yield each public function, class and method, how to get it, its signature."""
    for name in nk.__all__:
        public = getattr(nk, name)
        if name not in RESULTS and callable(public) and not _is_error(public):
            yield name, (lambda public=public: public), inspect.signature(public)
    for kind, make in receivers().items():
        for name, method in inspect.getmembers(getattr(nk, kind), callable):
            if name.startswith("_") or name in INTERNAL:
                continue
            signature = inspect.signature(method)
            own = [p for key, p in signature.parameters.items() if key != "self"]
            bound = signature.replace(parameters=own)
            label = f"{kind}.{name}"
            yield label, (lambda m=make, n=name: getattr(m(), n)), bound


def calls() -> Iterator[Call]:
    """Yield every call, odd in one parameter, then the swapped ones."""
    for name, get, signature in functions():
        parameters = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
        ]
        for odd in parameters:
            for label, make in ODD_VALUES.items():
                yield Call(
                    name, odd.name, label, _arguments(name, get, parameters, odd, make)
                )
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if positional[:2] == ["model", "loss_fn"]:
            swapped = _arguments(
                name, get, parameters, parameters[0], nn.CrossEntropyLoss
            )
            yield Call(name, "model", "loss_fn, swapped", _with(swapped, network))


def _is_error(public: object) -> bool:
    return isinstance(public, type) and issubclass(public, BaseException | Warning)


def _needs(name: str, parameter: inspect.Parameter, good: dict[str, Any]) -> bool:
    required = parameter.default is parameter.empty
    trio = parameter.name in {"model", "loss_fn", "batches", "batch"}
    return required or trio or f"{name}.{parameter.name}" in good


def _arguments(
    name: str,
    get: Callable[[], Callable[..., Any]],
    parameters: list[inspect.Parameter],
    odd: inspect.Parameter,
    make: Callable[[], Any],
) -> Callable[[], Any]:
    def arguments() -> Any:
        good = good_values(network())
        chosen = {
            p.name: good.get(f"{name}.{p.name}", good.get(p.name, _by_annotation(p)))()
            for p in parameters
            if _needs(name, p, good) and p.name != odd.name
        }
        return get(), (), {**chosen, odd.name: make()}

    return arguments


def _by_annotation(parameter: inspect.Parameter) -> Callable[[], Any]:
    """A value for a parameter that no name here knows, such as a new function's."""
    kind = get_origin(parameter.annotation) or parameter.annotation
    if kind is abc.Callable:
        return lambda: lambda *args: None
    plain = {int: lambda: 8, float: lambda: 0.1, str: lambda: "text", bool: bool}
    return plain.get(kind, list)


def _with(make: Callable[[], Any], loss_fn: Callable[[], Any]) -> Callable[[], Any]:
    def arguments() -> Any:
        function, positional, keywords = make()
        return function, positional, {**keywords, "loss_fn": loss_fn()}

    return arguments


def fault_of(call: Call) -> str | None:
    """Make a call and return what is wrong with how it was refused, if so."""
    function, arguments, keywords = call.make()
    try:
        function(*arguments, **keywords)
    except NoisekitError as error:
        return _fault_of_message(call, error)
    except Exception as error:  # raw: what the battery looks for
        return f"{call}: {type(error).__name__}: {str(error)[:150]}"
    return None


def _fault_of_message(call: Call, error: NoisekitError) -> str | None:
    """What a message lacks: the argument by a name, what it got, a way out."""
    text = str(error)
    words = (call.parameter, *OTHER_WORDS.get(call.parameter, ()))
    if not any(word.lower() in text.lower() for word in words):
        return f"{call} is not named: {type(error).__name__}: {text[:200]}"
    said = " got " in text or "does not exist" in text
    if not said and not isinstance(error, RunDirectoryError):
        return f"{call}: what it got is not said: {text[:200]}"
    if "\x1b" in text:
        return f"{call}: an escape code reaches the terminal"
    return None


def one_for_each_parameter() -> list[Call]:
    """Return one call for each parameter, each odd in another way by turns."""
    found: dict[tuple[str, str], list[Call]] = {}
    for call in calls():
        found.setdefault((call.name, call.parameter), []).append(call)
    # A step that shares no factor with the number of values meets all of them.
    return [group[i * 11 % len(group)] for i, group in enumerate(found.values())]

"""Odd arguments for every public function, generated from the signatures.

Each parameter in turn gets each odd value while the others are good. A call may work,
or it raises a ``NoisekitError`` whose message says what is needed and what to do.
"""

import inspect
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import noisekit as nk
from noisekit.core.errors import NoisekitError

RESULTS = frozenset(
    {
        "EigenPairs",
        "Estimate",
        "Interval",
        "Measure",
        "Measurement",
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


class Odd:
    """An object that is nothing in particular."""

    def __repr__(self) -> str:
        return "Odd()"


@dataclass(frozen=True)
class Call:
    """One call of a public name.

    Attributes:
        name: The public name.
        parameter: The parameter that is odd.
        label: How it is odd.
        make: Makes the arguments, anew for each call.
    """

    name: str
    parameter: str
    label: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]

    def __str__(self) -> str:
        return f"{self.name}({self.parameter}={self.label})"


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def data(value: float = 0.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 3, generator=generator) + value
    return [(inputs, torch.tensor([0, 1, 0, 1, 1, 0]))]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(network().parameters(), lr=0.1)


def dataset() -> TensorDataset:
    return TensorDataset(*data()[0])


ODD_VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "odd",
    "[/x]": lambda: "[/x]\x1b[31m",
    "object": Odd,
    "nan": lambda: math.nan,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1e30": lambda: 1e30,
    "10**20": lambda: 10**20,
    "[]": list,
    "dict": dict,
    "dataset": dataset,
    "optimizer": optimizer,
    "NaN batches": lambda: data(math.nan),
    "empty batch": lambda: [(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))],
    "tensor": lambda: torch.zeros(2),
    "class": lambda: nn.Linear,
    "model": network,
    "loss": nn.CrossEntropyLoss,
}


def good_values(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Return a good value for each parameter that has no default, by its name."""
    loss = nn.CrossEntropyLoss()
    state = {k: v + 0.1 for k, v in model.state_dict().items()}
    return {
        "model": lambda: model,
        "loss_fn": lambda: loss,
        "batches": data,
        "batch": lambda: data()[0],
        "optimizer": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "H": lambda: nk.HessianOperator(model, loss, data()),
        "A": lambda: nk.HessianOperator(model, loss, data()),
        "operator": lambda: nk.HessianOperator(model, loss, data()),
        "model_or_risk": lambda: model,
        "start": lambda: model.state_dict(),
        "end": lambda: state,
        "measure": lambda: "grad_norm",
        "measures": lambda: ["grad_norm"],
        "every": lambda: 1,
        "rho": lambda: 0.05,
        "sigma": lambda: 0.05,
        "epsilon": lambda: 1e-3,
        "lr": lambda: 0.1,
        "learning_rate": lambda: 0.1,
        "name": lambda: "lambda_max",
        "loader": data,
        "num_examples": lambda: 6,
        "where": lambda: "/nowhere",
        "name_or_path": lambda: "small_vs_large_batch",
        "recipe": lambda: nk.load_recipe("small_vs_large_batch", profile="smoke"),
        "out_dir": lambda: tempfile.gettempdir(),
        "set_dir": lambda: "/nowhere",
        "likelihood": lambda: "categorical",
        "target": lambda: 100.0,
        "vector": lambda: [torch.ones_like(p) for p in model.parameters()],
    }


def calls() -> Iterator[Call]:
    """Yield every call, odd in one parameter, then the swapped ones."""
    for name in nk.__all__:
        public = getattr(nk, name)
        if name in RESULTS or not callable(public) or _is_error(public):
            continue
        parameters = [
            parameter
            for parameter in inspect.signature(public).parameters.values()
            if parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
        ]
        for odd in parameters:
            for label, make in ODD_VALUES.items():
                yield Call(name, odd.name, label, _arguments(parameters, odd, make))
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if positional[:2] == ["model", "loss_fn"]:
            yield Call(name, "model", "loss_fn, swapped", _swapped)


def _is_error(public: object) -> bool:
    return isinstance(public, type) and issubclass(public, BaseException | Warning)


def _needs(name: str, parameter: inspect.Parameter) -> bool:
    required = parameter.default is parameter.empty
    return required or parameter.name in {"model", "loss_fn", "batches"}


def _arguments(
    parameters: list[inspect.Parameter],
    odd: inspect.Parameter,
    make: Callable[[], Any],
) -> Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]:
    def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
        good = good_values(network())
        chosen = {
            parameter.name: good[parameter.name]()
            for parameter in parameters
            if _needs(odd.name, parameter)
            and parameter.name in good
            and parameter is not odd
        }
        return (), {**chosen, odd.name: make()}

    return arguments


def _swapped() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (nn.CrossEntropyLoss(), network(), data()), {}


def fault_of(call: Call) -> str | None:
    """Make a call and return what is wrong with how it was refused, if so."""
    arguments, keywords = call.make()
    try:
        getattr(nk, call.name)(*arguments, **keywords)
    except NoisekitError as error:
        text = str(error)
        return None if text.strip() else f"{call}: an empty {type(error).__name__}"
    except Exception as error:  # raw: what the battery looks for
        return f"{call}: {type(error).__name__}: {str(error)[:150]}"
    return None


def chosen(number: int, *, seed: int = 0) -> list[Call]:
    """Return some of the calls, drawn at random."""
    everything = list(calls())
    return random.Random(seed).sample(everything, min(number, len(everything)))

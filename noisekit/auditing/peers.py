"""The same question put to other packages, as their users put it."""

import copy
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

from noisekit.auditing.problem import AuditQuantity, Question
from noisekit.core.batches import Batch
from noisekit.core.data import HeldBatches
from noisekit.core.params import select_parameters
from noisekit.core.randomness import preserve_rng_state

NUM_SAMPLES = 100
"""Random vectors that a trace is asked to use: what PyHessian does by default."""
_THOROUGH = 4


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """What a package returned.

    Attributes:
        value: The number.
        stderr: Its standard error, where the package gives one.
        num_samples: Random vectors behind a trace, where that is known.
        num_passes: Times the data were gone through.
        seconds: Wall time [s].
        note: The package's own message about it.
    """

    value: float
    stderr: float | None
    num_samples: int | None
    num_passes: int
    seconds: float
    note: str = ""


# What a package returns before it is timed: value, stderr, samples, note.
_Found = tuple[float, float | None, int | None, str]


class Peer(ABC):
    """Another package, run on a copy of the model in evaluation mode.

    Attributes:
        name: The package's name.
        module: What to import.
        install: How to get it.
        quantities: What it can be asked.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    quantities: ClassVar[tuple[AuditQuantity, ...]] = (
        "lambda_max",
        "lambda_min",
        "trace",
    )

    def is_installed(self) -> bool:
        """Whether the package can be imported."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(self.module)
        except ImportError:
            return False
        return True

    def answer(
        self, question: Question, *, seed: int, thorough: bool = False
    ) -> PeerAnswer:
        """Return the package's answer; nothing of the user's model is touched.

        It gets a copy in evaluation mode without gradients, and a loader that counts;
        global random state and warnings stay inside.

        Args:
            question: What is asked.
            seed: Of the global generator, from which most packages draw.
            thorough: Whether to run far beyond the package's default effort.
        """
        model = copy.deepcopy(question.model).eval()
        model.zero_grad()
        loader = _CountingLoader(question.batches)
        with preserve_rng_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            start = time.perf_counter()
            result = self._ask(question, model, loader, thorough)
            seconds = time.perf_counter() - start
        value, stderr, num_samples, note = result
        return PeerAnswer(value, stderr, num_samples, loader.num_passes, seconds, note)

    @abstractmethod
    def _ask(
        self,
        question: Question,
        model: nn.Module,
        loader: "_CountingLoader",
        thorough: bool,
    ) -> _Found:
        """Return value, standard error, samples and note."""


class PyHessian(Peer):
    """Power iteration and Hutchinson's trace, as in its README."""

    name = "PyHessian"
    module = "pyhessian"
    install = "pip install pyhessian==0.1"
    quantities = ("lambda_max", "trace")

    def _ask(
        self,
        question: Question,
        model: nn.Module,
        loader: "_CountingLoader",
        thorough: bool,
    ) -> _Found:
        peer = self._hessian(question, model, dataloader=loader)
        if question.quantity == "lambda_max":
            options = {"maxIter": 2000, "tol": 1e-9} if thorough else {}
            return float(peer.eigenvalues(**options)[0][0]), None, None, ""
        # Its rule divides by the signed trace, so no finite tolerance switches it off.
        options = (
            {"maxIter": _THOROUGH * NUM_SAMPLES, "tol": -math.inf} if thorough else {}
        )
        samples = peer.trace(**options)
        note = f"{len(samples)} samples"
        return sum(samples) / len(samples), None, len(samples), note

    def eigenvalue_constructed_twice(self, question: Question, *, seed: int) -> float:
        """Return its eigenvalue of the first batch when it is constructed twice.

        Its constructor adds a gradient with a graph to the one that is there.
        """
        model = copy.deepcopy(question.model).eval()
        model.zero_grad()
        with preserve_rng_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            self._hessian(question, model, data=question.batches[0])
            peer = self._hessian(question, model, data=question.batches[0])
            return float(peer.eigenvalues(maxIter=2000, tol=1e-9)[0][0])

    # The package has no types.
    @staticmethod
    def _hessian(question: Question, model: nn.Module, **data: Any) -> Any:
        on_cuda = next(model.parameters()).device.type == "cuda"
        peer: Any = import_module("pyhessian")
        return peer.hessian(model, question.loss_fn, cuda=on_cuda, **data)


class Curvlinops(Peer):
    """SciPy's eigsh on its Hessian, and Hutchinson's trace."""

    name = "curvlinops"
    module = "curvlinops"
    install = "pip install 'noisekit[compare]'"

    def _ask(
        self,
        question: Question,
        model: nn.Module,
        loader: "_CountingLoader",
        thorough: bool,
    ) -> _Found:
        package: Any = import_module("curvlinops")  # it has no types
        parameters = list(select_parameters(model, question.params).values())
        peer = package.HessianLinearOperator(
            model, question.loss_fn, parameters, loader
        )
        if question.quantity == "trace":
            wanted = NUM_SAMPLES * (_THOROUGH if thorough else 1)
            num_samples = min(wanted, peer.shape[0] - 1)
            value = float(package.hutchinson_trace(peer, num_matvecs=num_samples))
            return value, None, num_samples, f"{num_samples} samples"
        which: Literal["LA", "SA"]
        which = "LA" if question.quantity == "lambda_max" else "SA"
        operator: LinearOperator = peer.to_scipy()
        values = eigsh(operator, k=1, which=which, return_eigenvectors=False)
        return float(values[0]), None, None, ""


class HessianEigenthings(Peer):
    """Its Lanczos and its trace, with their defaults."""

    name = "hessian-eigenthings"
    module = "hessian_eigenthings"
    install = "pip install 'noisekit[compare]'"

    def _ask(
        self,
        question: Question,
        model: nn.Module,
        loader: "_CountingLoader",
        thorough: bool,
    ) -> _Found:
        peer: Any = import_module("hessian_eigenthings")  # it has no types
        chosen = set(select_parameters(model, question.params))
        operator = peer.HessianOperator(
            model,
            loader,
            peer.supervised_loss(question.loss_fn),
            param_filter=lambda name, parameter: name in chosen,
        )
        if question.quantity == "trace":
            return _trace_of(peer.trace, operator, thorough)
        options: dict[str, Any] = {}
        if thorough:
            options["max_iter"] = min(operator.size, 50)
        if question.quantity == "lambda_min":
            options["which"] = "SA"
        pairs = peer.lanczos(operator, k=1, **options)
        note = "" if bool(pairs.converged[0]) else "converged=False"
        return float(pairs.eigenvalues[0]), None, None, note


# A function of the package and its operator.
def _trace_of(peer_trace: Any, operator: Any, thorough: bool) -> _Found:
    if thorough:
        many = _THOROUGH * NUM_SAMPLES
        result = peer_trace(operator, num_matvecs=many, method="hutchinson")
        return result.estimate, result.stderr, many, ""
    result = peer_trace(operator, num_matvecs=NUM_SAMPLES - 1)
    return result.estimate, result.stderr, None, f"{NUM_SAMPLES - 1} products"


PEERS: tuple[Peer, ...] = (PyHessian(), Curvlinops(), HessianEigenthings())


class _CountingLoader:
    """The batches, in the place of a DataLoader."""

    def __init__(self, batches: HeldBatches) -> None:
        self._batches = batches
        self.num_passes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        self.num_passes += 1
        return iter(self._batches)

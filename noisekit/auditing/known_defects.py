"""Why another package's number may differ, each reason tried on the problem itself."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations

import torch

from noisekit.auditing.peers import PeerAnswer, PyHessian
from noisekit.auditing.problem import Answers, Question
from noisekit.core.batches import tensors_in
from noisekit.core.params import select_parameters
from noisekit.core.risk import EmpiricalRisk


@dataclass(frozen=True, slots=True)
class Convention:
    """Something that a package does otherwise, and what the question then becomes.

    Attributes:
        sentence: What it does.
        changed: The question that its number answers.
    """

    sentence: str
    changed: Callable[[Question], Question]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A known defect whose number was recomputed and is the package's.

    Attributes:
        sentence: What the package does.
        recomputed: The number with the defect; for a rule that stops too early, the
            package's own without that rule.
    """

    sentence: str
    recomputed: float


_BY_EXAMPLES = Convention(
    "weights each batch by its examples, not by what its loss is divided by (ignored "
    "targets, class weights, sums)",
    lambda question: replace(question, weighting="examples"),
)
_BATCHES_ALIKE = Convention(
    "averages the batches with equal weights, whatever their sizes",
    lambda question: replace(question, weighting="equal"),
)
_UNDIVIDED = Convention(
    "adds sum losses up without dividing by the number of examples",
    lambda question: replace(question, weighting="undivided"),
)
_SUMMED = Convention(
    "adds up the batches' Hessians without dividing, so that the number doubles when "
    "batches are halved",
    lambda question: replace(question, weighting="undivided"),
)
_MATRICES_ONLY = Convention(
    "leaves biases and all other parameters of one axis out",
    lambda question: replace(question, params=_names_of_matrices(question)),
)
_BY_MAGNITUDE = Convention(
    "returns the eigenvalue of largest magnitude, here the smallest one",
    lambda question: replace(question, by_magnitude=True),
)
_ALL_PARAMETERS = Convention(
    "measures all parameters, whichever were chosen",
    lambda question: replace(question, params=None),
)
_RUNNING_STATISTICS = Convention(
    "evaluates BatchNorm with running statistics, whatever was asked for",
    lambda question: replace(question, bn="running"),
)

CONVENTIONS: Mapping[str, tuple[Convention, ...]] = {
    "PyHessian": (_BY_EXAMPLES, _BY_MAGNITUDE, _ALL_PARAMETERS, _RUNNING_STATISTICS),
    "curvlinops": (_BY_EXAMPLES, _UNDIVIDED, _RUNNING_STATISTICS),
    "hessian-eigenthings": (_BATCHES_ALIKE, _BY_MAGNITUDE, _RUNNING_STATISTICS),
    "landscaper": (_BY_EXAMPLES, _BY_MAGNITUDE, _ALL_PARAMETERS, _RUNNING_STATISTICS),
    "loss-landscape": (_SUMMED, _MATRICES_ONLY, _RUNNING_STATISTICS),
}
"""What packages do otherwise; also of those that only report numbers here."""

_STOPS: Mapping[str, str] = {
    "PyHessian": "stops when two values in a row are alike, which says nothing about "
    "the error",
    "hessian-eigenthings": "makes two Lanczos steps by default and returns what it has",
}
_DOUBLES = "doubles the Hessian when it is constructed twice without zero_grad()"
_TWICE = 2.0
_MOST_AT_ONCE = 3


class DefectFinder:
    """Recomputes a question with each known defect."""

    def __init__(self, question: Question, answers: Answers) -> None:
        self._question = question
        self._answers = answers

    def explanations(
        self,
        peer: str,
        value: float,
        truth: float,
        *,
        agree: Callable[[float, float], bool],
        thorough: Callable[[], PeerAnswer] | None,
    ) -> tuple[Explanation, ...]:
        """Return the defects that together give a package's number; none if unknown.

        Args:
            peer: The package.
            value: Its number, which is not the truth.
            truth: The reference.
            agree: Whether two numbers are the same within the errors.
            thorough: Asks the package again with more effort; ``None`` where the
                number was only reported.
        """
        direct = self._conventions_for(peer, value, truth, agree)
        if direct:
            return direct
        if thorough is None:
            return self._doubled(peer, value, truth, agree)
        again = thorough()
        if agree(again.value, value):
            return ()
        stopped = Explanation(self._stop_of(peer), again.value)
        if agree(again.value, truth):
            return (stopped,)
        others = self._conventions_for(peer, again.value, truth, agree)
        return (stopped, *others) if others else ()

    def _conventions_for(
        self,
        peer: str,
        value: float,
        truth: float,
        agree: Callable[[float, float], bool],
    ) -> tuple[Explanation, ...]:
        """The fewest conventions under which the question has this answer."""
        for group in _groups(CONVENTIONS[peer]):
            changed = self._question
            for convention in group:
                changed = convention.changed(changed)
            recomputed = self._answer(changed)
            if agree(recomputed, value) and not agree(recomputed, truth):
                return tuple(Explanation(c.sentence, recomputed) for c in group)
        return ()

    def _doubled(
        self,
        peer: str,
        value: float,
        truth: float,
        agree: Callable[[float, float], bool],
    ) -> tuple[Explanation, ...]:
        asked = self._question
        fits = peer == "PyHessian" and asked.quantity == "lambda_max"
        if not fits or len(asked.batches) > 1 or not agree(_TWICE * truth, value):
            return ()
        recomputed = PyHessian().eigenvalue_constructed_twice(asked, seed=0)
        if not agree(recomputed, value):
            return ()
        return (Explanation(_DOUBLES, recomputed),)

    def _stop_of(self, peer: str) -> str:
        if self._question.quantity == "trace":
            return "stops when the running mean changes little, after too few samples"
        return _STOPS.get(peer, "stops before it has converged")

    def _answer(self, question: Question) -> float:
        try:
            return self._answers.answer(question)
        except (RuntimeError, ValueError):
            # This convention makes no sense here, so it explains nothing.
            return math.nan


def _names_of_matrices(question: Question) -> tuple[str, ...]:
    chosen = select_parameters(question.model, question.params)
    return tuple(name for name, parameter in chosen.items() if parameter.ndim > 1)


def failure_reasons(peer: str, question: Question, message: str) -> tuple[str, ...]:
    """Return what is known to make a package fail and holds for this problem."""
    result = []
    if peer == "curvlinops" and not hasattr(question.loss_fn, "reduction"):
        result.append("needs a loss with the attribute 'reduction'")
    if any(len(tensors_in(inputs)) > 1 for inputs, _ in question.batches):
        result.append("takes one tensor of inputs")
    if _has_unused_parameters(question.risk()):
        result.append("needs a gradient for every parameter")
    if "scaled_dot_product" in message:
        result.append("needs attention under sdpa_kernel(SDPBackend.MATH)")
    return tuple(result)


def _has_unused_parameters(risk: EmpiricalRisk) -> bool:
    with risk.evaluating():
        _, batch = next(risk.weighted_batches())
        gradients = torch.autograd.grad(
            risk.loss_of(batch), risk.parameters, allow_unused=True
        )
    return any(gradient is None for gradient in gradients)


def _groups(
    conventions: tuple[Convention, ...],
) -> Iterator[tuple[Convention, ...]]:
    """Return single conventions first, then several at once."""
    sizes = range(1, min(len(conventions), _MOST_AT_ONCE) + 1)
    return chain.from_iterable(combinations(conventions, size) for size in sizes)

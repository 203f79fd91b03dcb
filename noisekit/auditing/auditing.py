"""The same quantity by several packages, and why they differ."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import nn

from noisekit.auditing.known_defects import (
    CONVENTIONS,
    DefectFinder,
    failure_reasons,
)
from noisekit.auditing.peers import NUM_SAMPLES, PEERS, Peer, PeerAnswer
from noisekit.auditing.problem import (
    Answers,
    AuditQuantity,
    Question,
    by_noisekit,
    error_of_signs,
    question_of,
)
from noisekit.auditing.report import AuditReport, AuditRow, AuditVerdict
from noisekit.core.arguments import checked
from noisekit.core.batches import Batch
from noisekit.core.errors import UsageError
from noisekit.core.evaluation_mode import BatchNormPolicy
from noisekit.core.normalisation import Normaliser
from noisekit.core.params import ParameterPatterns
from noisekit.core.results import Estimate
from noisekit.core.risk import EmpiricalRisk, LossFn, as_risk
from noisekit.core.settings import Count, Fraction, check_settings
from noisekit.curvature.random_vectors import entropy_generator

_DENSE = "dense Hessian"
_OURS = "noisekit"
_FLOOR = 0.1
"""Of an eigenvalue near zero, the share of ``rtol`` that the largest one allows."""
_QUANTILE = 3.0
"""Standard errors within which two estimates of a trace agree."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How answers are compared with the reference.

    Attributes:
        rtol: Relative difference that counts as agreement. Of a trace, three standard
            errors of 100 random vectors count as well.
        max_params: Most parameters for a dense Hessian.
    """

    rtol: Fraction = 0.01
    max_params: Count = 2000

    def __post_init__(self) -> None:
        """Refuse a tolerance that is none.

        Raises:
            UsageError: If ``rtol`` is out of range.
        """
        check_settings(self)


_DEFAULT_COMPARISON = Comparison()


@checked
def audit(
    model: nn.Module | EmpiricalRisk,
    loss_fn: LossFn | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    quantities: Iterable[AuditQuantity] = ("lambda_max", "trace"),
    reported: Mapping[str, Mapping[AuditQuantity, float]] | None = None,
    comparison: Comparison = _DEFAULT_COMPARISON,
    generator: torch.Generator | None = None,
    bn: BatchNormPolicy | None = None,
    normaliser: Normaliser | None = None,
    params: ParameterPatterns = None,
) -> AuditReport:
    """Return a quantity by noisekit, brute force and other packages, side by side.

    Each installed package is asked as its documentation does it, with its defaults, on
    a copy of the model in evaluation mode. Where its number is not the reference's,
    its known defects are tried on this very problem: a difference is *explained* only
    when the number with the defect is the package's. The reference is the dense
    Hessian by differences of gradients in double precision, two for each parameter,
    or noisekit's own answer for larger models.

    Args:
        model: The model, not changed, or an :class:`EmpiricalRisk` in place of it, of
            ``loss_fn`` and of ``batches``.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar.
        batches: Pairs ``(inputs, targets)``; read once and held in memory.
        quantities: Of ``"lambda_max"``, ``"lambda_min"`` and ``"trace"``.
        reported: Numbers that a package gave elsewhere, to be explained as well:
            ``{"PyHessian": {"lambda_max": 1.14}}``; also by ``loss-landscape`` and
            ``landscaper``, which are not run.
        comparison: What counts as agreement, and up to which size a dense Hessian is
            the reference.
        generator: Of all random numbers; by default a fresh one.
        bn: What BatchNorm normalises with; the packages know ``"running"`` only.
        normaliser: What ``loss_fn`` divides by, where it is not the example count.
        params: Names or patterns of the parameters; all by default.

    Returns:
        A row for each package and quantity, with deviation, cost and reason.
        Packages that are not installed, and what they raised, are rows too.

    Raises:
        UsageError: If a quantity or a package is unknown.
    """
    wanted = _checked(tuple(quantities), reported or {})
    answers = Answers(comparison.max_params, entropy_generator(generator))
    risk = as_risk(model, loss_fn, batches, bn=bn, normaliser=normaliser, params=params)
    question = question_of(risk)
    rows: list[AuditRow] = []
    start = time.perf_counter()
    answers.dense(question)
    seconds = time.perf_counter() - start
    for quantity in wanted:
        asking = _Asking(
            replace(question, quantity=quantity),
            answers,
            dense_seconds=seconds,
            rtol=comparison.rtol,
        )
        rows += asking.own_rows()
        rows += [asking.row_of(peer) for peer in PEERS]
        rows += [
            asking.row_of_reported(name, numbers[quantity])
            for name, numbers in (reported or {}).items()
            if quantity in numbers
        ]
    return AuditReport(
        rows=tuple(rows),
        num_params=risk.layout.num_params,
        num_examples=risk.num_examples,
        num_batches=risk.num_batches,
    )


class _Asking:
    """One question, its reference, and how answers are compared with it."""

    def __init__(
        self,
        question: Question,
        answers: Answers,
        *,
        dense_seconds: float,
        rtol: float,
    ) -> None:
        self._generator = generator = answers.generator
        self._question = question
        self._dense = dense = answers.dense(question)
        self._dense_seconds = dense_seconds
        self._rtol = rtol
        self._max_params = answers.max_params
        start = time.perf_counter()
        self._refusal = ""
        try:
            self._own = by_noisekit(question, generator)
        except UsageError as error:
            if dense is None:
                raise
            self._own, self._refusal = Estimate(math.nan), str(error)
        self._own_seconds = time.perf_counter() - start
        self._truth = self._own.value if dense is None else dense.answer(question)
        self._noise = self._noise_of_samples()
        self._finder = DefectFinder(question, answers)
        self._seed = int(torch.randint(2**31, (), generator=generator))

    def own_rows(self) -> list[AuditRow]:
        """The reference and noisekit's answer."""
        ours = self._row(
            _OURS, self._own.value, self._own_seconds, self._own.num_matvecs
        )
        if self._dense is None:
            note = f"more than max_params={self._max_params} parameters"
            skipped = self._without_value(_DENSE, AuditVerdict.SKIPPED, note)
            return [skipped, replace(ours, verdict=AuditVerdict.REFERENCE)]
        reference = self._row(_DENSE, self._truth, self._dense_seconds, 1)
        if self._refusal:
            ours = self._without_value(_OURS, AuditVerdict.FAILED, self._refusal)
        verdict, note = AuditVerdict.REFERENCE, self._dense.method
        return [replace(reference, verdict=verdict, note=note), ours]

    def row_of(self, peer: Peer) -> AuditRow:
        """A package's answer, or why there is none."""
        if self._question.quantity not in peer.quantities:
            note = f"has no {self._question.quantity}"
            return self._without_value(peer.name, AuditVerdict.SKIPPED, note)
        if not peer.is_installed():
            return self._without_value(peer.name, AuditVerdict.ABSENT, peer.install)
        try:
            result = peer.answer(self._question, seed=self._seed)
        # Whatever a package raises belongs into its row.
        except Exception as error:
            text = (str(error).strip() or "no message").splitlines()[0]
            reasons = failure_reasons(peer.name, self._question, text)
            note = "; ".join([*reasons, f"{type(error).__name__}: {text}"])
            return self._without_value(peer.name, AuditVerdict.FAILED, note)
        row = self._row(peer.name, result.value, result.seconds, result.num_passes)
        row = replace(row, note=result.note)
        return self._explained(
            peer.name,
            row,
            lambda: peer.answer(self._question, seed=self._seed, thorough=True),
        )

    def row_of_reported(self, name: str, value: float) -> AuditRow:
        """A number that was given for a package."""
        row = self._row(f"{name}, as reported", value, 0.0, 0)
        return self._explained(name, row, None)

    def _explained(
        self, name: str, row: AuditRow, thorough: Callable[[], PeerAnswer] | None
    ) -> AuditRow:
        if row.verdict is AuditVerdict.AGREES:
            return row
        result = self._finder.explanations(
            name, row.value, self._truth, agree=self._agree, thorough=thorough
        )
        verdict = AuditVerdict.EXPLAINED if result else AuditVerdict.UNEXPLAINED
        return replace(row, verdict=verdict, explanations=result)

    def _row(
        self, source: str, value: float, seconds: float, num_passes: int
    ) -> AuditRow:
        agrees = self._agree(value, self._truth)
        scale = abs(self._truth)
        return AuditRow(
            quantity=self._question.quantity,
            source=source,
            verdict=AuditVerdict.AGREES if agrees else AuditVerdict.UNEXPLAINED,
            value=value,
            deviation=(value - self._truth) / scale if scale else math.nan,
            allowed=self._allowed(self._truth) / scale if scale else math.nan,
            explanations=(),
            num_passes=num_passes,
            seconds=seconds,
            note="",
        )

    def _without_value(self, source: str, verdict: AuditVerdict, note: str) -> AuditRow:
        row = self._row(source, math.nan, 0.0, 0)
        return replace(row, verdict=verdict, note=note)

    def _agree(self, first: float, second: float) -> bool:
        return abs(first - second) <= self._allowed(second)

    def _allowed(self, value: float) -> float:
        # A defect that multiplies the Hessian multiplies its noise.
        times = max(1.0, abs(value / self._truth)) if self._truth else 1.0
        floor = _FLOOR * self._rtol * self._norm()
        return max(self._rtol * abs(value), _QUANTILE * self._noise * times, floor)

    def _norm(self) -> float:
        """The largest eigenvalue in size, to which solvers' tolerances are relative."""
        if self._dense is None:
            return 0.0
        return float(self._dense.eigenvalues.abs().max())

    def _noise_of_samples(self) -> float:
        """Standard error of a trace from as many random signs as packages are given."""
        if self._question.quantity != "trace":
            return 0.0
        if self._dense is not None:
            num_samples = min(NUM_SAMPLES, max(len(self._dense.eigenvalues) - 1, 1))
            return math.sqrt(self._dense.sign_variance / num_samples)
        # Both the reference and the other answer scatter.
        signs = error_of_signs(self._question, NUM_SAMPLES, self._generator)
        return math.hypot(signs, self._own.stderr or 0.0)


def _checked(
    quantities: tuple[AuditQuantity, ...],
    reported: Mapping[str, Mapping[AuditQuantity, float]],
) -> tuple[AuditQuantity, ...]:
    if not quantities:
        listed = ", ".join(get_args(AuditQuantity))
        raise UsageError(f"quantities needs one of {listed} or more, got none.")
    strangers = [name for name in reported if name not in CONVENTIONS]
    if strangers:
        raise UsageError(
            f"reported needs names of {', '.join(CONVENTIONS)}, got "
            f"{', '.join(map(repr, strangers))}."
        )
    return quantities

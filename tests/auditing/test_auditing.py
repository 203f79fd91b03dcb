"""Other packages' numbers beside ours, and which known defect explains a difference."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noisekit.auditing import auditing
from noisekit.auditing.auditing import Comparison, audit
from noisekit.auditing.peers import PyHessian
from noisekit.auditing.report import AuditReport, AuditRow, AuditVerdict
from noisekit.core.errors import UsageError
from tests.cases import CASES, RAGGED, Case, classes, mlp, seeded
from tests.randomness import seeded as generator
from tests.reference import curvature as reference

LOSS = nn.CrossEntropyLoss()
TELLING = (
    "mlp_sum",
    "batch_norm",
    "class_weights",
    "ignored_tokens",
    "partly_used",
)
UNEVEN = classes((20, 20, 20, 4), 4)


@pytest.fixture
def pyhessian_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask one package, where the others have nothing to do with the matter."""
    monkeypatch.setattr(auditing, "PEERS", (PyHessian(),))


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def audited(name: str, **arguments: object) -> AuditReport:
    chosen = case(name)
    given = {"normaliser": chosen.normaliser, "generator": generator()} | arguments
    compared = {n: given.pop(n) for n in ("rtol", "max_params") if n in given}
    given["comparison"] = Comparison(**compared)
    return audit(chosen.build(), chosen.loss_fn, chosen.batches, **given)


def row(report: AuditReport, source: str, quantity: str = "lambda_max") -> AuditRow:
    [found] = [r for r in report.rows if r.source == source and r.quantity == quantity]
    return found


def dense(chosen: Case, counts: tuple[float, ...] | None = None, **kind: str):
    """The Hessian with these counts for the batches."""
    options = {"counts": counts or chosen.counts, "reduction": chosen.reduction} | kind
    _, hessian = reference.gradient_and_hessian(
        chosen.build(), chosen.loss_fn, chosen.batches, **options
    )
    return hessian


def largest(hessian: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(hessian)[-1])


class Quadratic(nn.Module):
    """``w' A w / 2``, so that the Hessian is ``A``."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        matrix = reference.symmetric_with_spectrum(eigenvalues)
        self.matrix = torch.from_numpy(matrix)
        self.w = nn.Parameter(torch.ones(len(eigenvalues), dtype=torch.float64))

    def double(self) -> "Quadratic":
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.w @ self.matrix @ self.w / 2).expand(len(inputs))


class Mean(nn.Module):
    """The mean of the outputs, with the attribute that some packages read."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()


def quadratic(eigenvalues: list[float], **arguments: object) -> AuditReport:
    options = {"generator": generator(), "quantities": ("lambda_max",)} | arguments
    return audit(Quadratic(eigenvalues), Mean(), RAGGED, **options)


@pytest.mark.parametrize("name", TELLING)
def test_ours_agrees_with_the_dense_hessian_and_nothing_is_unexplained(
    name: str,
) -> None:
    """On the cases of the table that differ: values, failures and reasons.

    The reference is compared with one that imports nothing of noisekit. Catches: a
    defect that is in no list; noisekit's own weights in the reference.
    """
    report = audited(name)
    hessian = dense(case(name))
    values = np.linalg.eigvalsh(hessian)
    wants = {"lambda_max": values[-1], "trace": values.sum()}
    for quantity, want in wants.items():
        exact = row(report, "dense Hessian", quantity)
        assert exact.verdict is AuditVerdict.REFERENCE
        assert exact.value == pytest.approx(want, rel=1e-9, abs=1e-12)
        assert row(report, "noisekit", quantity).verdict is AuditVerdict.AGREES
    assert report.unexplained == ()
    assert (report.num_batches, report.num_params) == (
        len(case(name).batches),
        len(hessian),
    )
    failed = [r for r in report.rows if r.verdict is AuditVerdict.FAILED]
    assert all("needs" in r.reason or "takes" in r.reason for r in failed)


def test_unweighted_batches_explain_hessian_eigenthings() -> None:
    """Its number is that of batches averaged alike, and of two Lanczos steps.

    Catches: an explanation by what usually is the reason, without the number.
    """
    report = audit(
        seeded(mlp)(), LOSS, UNEVEN, generator=generator(), comparison=Comparison(1e-3)
    )
    found = row(report, "hessian-eigenthings")
    assert found.verdict is AuditVerdict.EXPLAINED
    said = [e.sentence for e in found.explanations]
    assert said[0].startswith("makes two Lanczos steps by default")
    assert said[1].startswith("averages the batches with equal weights")
    problem = Case("uneven", seeded(mlp), LOSS, UNEVEN, (1.0,) * 4)
    assert found.explanations[1].recomputed == pytest.approx(
        largest(dense(problem)), rel=1e-9
    )
    assert "converged=False" in found.reason


def test_class_weights_explain_pyhessian_and_curvlinops() -> None:
    """Both weight batches by examples where the loss divides by class weights.

    Catches: one sentence for all packages.
    """
    report = audited("class_weights", quantities=("lambda_max",))
    want = largest(dense(case("class_weights"), (4.0, 4.0, 2.0)))
    for source in ("PyHessian", "curvlinops"):
        found = row(report, source)
        assert found.verdict is AuditVerdict.EXPLAINED
        [reason] = found.explanations
        assert reason.sentence.startswith("weights each batch by its examples")
        assert reason.recomputed == pytest.approx(want, rel=1e-9)
        assert found.deviation == pytest.approx(
            want / largest(dense(case("class_weights"))) - 1, abs=1e-3
        )


def test_sums_explain_three_packages_each_in_its_way() -> None:
    """A sum loss is weighted again, not divided, or averaged over batches.

    Catches: a scale of the batch size that nobody explains.
    """
    report = audited("mlp_sum", quantities=("lambda_max",))
    chosen = case("mlp_sum")
    undivided = largest(dense(chosen)) * 10
    again = largest(dense(chosen, (4.0, 4.0, 2.0), reduction="mean"))
    [pyhessian] = row(report, "PyHessian").explanations
    assert pyhessian.recomputed == pytest.approx(again, rel=1e-9)
    [curvlinops] = row(report, "curvlinops").explanations
    assert curvlinops.sentence.startswith("adds sum losses up without dividing")
    assert curvlinops.recomputed == pytest.approx(undivided, rel=1e-9)


def test_largest_magnitude_explains_a_negative_answer() -> None:
    """Where the smallest eigenvalue is the largest in size it is what PyHessian gives.

    Catches: a comparison of absolute values, which would call it right.
    """
    report = quadratic([1.0, 0.5, 0.0, 0.2, -2.0])
    found = row(report, "PyHessian")
    assert found.value == pytest.approx(-2.0, rel=1e-2)
    [reason] = found.explanations
    assert "of largest magnitude" in reason.sentence
    assert reason.recomputed == pytest.approx(-2.0)
    assert row(report, "curvlinops").verdict is AuditVerdict.AGREES


@pytest.mark.usefixtures("pyhessian_only")
def test_a_stopping_rule_is_blamed_only_when_more_effort_gives_the_truth() -> None:
    """A trace stopped after two samples is explained; the same number alone is not.

    Catches: blaming the rule for any difference.
    """
    spectrum = [0.5, *np.linspace(-3.0, 0.0, 12)]
    verdicts = []
    for seed in range(4):
        report = quadratic(
            spectrum,
            quantities=("trace",),
            reported={"PyHessian": {"trace": -40.0}},
            generator=generator(seed),
        )
        found = row(report, "PyHessian", "trace")
        assert found.note == "2 samples"
        verdicts.append(found.verdict)
        for reason in found.explanations:
            assert reason.sentence.startswith("stops when the running mean")
            assert reason.recomputed == pytest.approx(sum(spectrum), rel=0.1)
        alone = row(report, "PyHessian, as reported", "trace")
        assert alone.verdict is AuditVerdict.UNEXPLAINED
        assert report.unexplained == (alone,)
    assert AuditVerdict.EXPLAINED in verdicts


@pytest.mark.usefixtures("pyhessian_only")
def test_a_power_iteration_that_stopped_between_two_ends_is_explained() -> None:
    """Both ends nearly as far from zero: it stops where two values are alike.

    Catches: a value inside the spectrum taken for an eigenvalue.
    """
    spectrum = [1.0, *np.linspace(-0.5, 0.5, 30), -0.9]
    verdicts = []
    for seed in range(3):
        report = quadratic(spectrum, generator=generator(seed))
        found = row(report, "PyHessian")
        verdicts.append(found.verdict)
        if found.verdict is AuditVerdict.EXPLAINED:
            assert found.explanations[0].sentence.startswith("stops when two values")
            assert found.explanations[0].recomputed == pytest.approx(1.0, rel=1e-2)
    assert AuditVerdict.EXPLAINED in verdicts
    assert AuditVerdict.UNEXPLAINED not in verdicts


@pytest.mark.usefixtures("pyhessian_only")
def test_a_reported_number_is_explained_by_the_doubled_hessian() -> None:
    """Constructed twice without zero_grad, PyHessian gives twice the eigenvalue.

    It is run again in that way. Catches: any number that is about double.
    """
    batches = classes((20,), 4)
    problem = Case("single", seeded(mlp), LOSS, batches, (20.0,))
    truth = largest(dense(problem))
    reported = {
        "PyHessian": {"lambda_max": 2 * truth},
        "curvlinops": {"lambda_max": 2 * truth},
    }
    report = audit(
        seeded(mlp)(),
        LOSS,
        batches,
        quantities=("lambda_max",),
        reported=reported,
        generator=generator(),
    )
    found = row(report, "PyHessian, as reported")
    [reason] = found.explanations
    assert reason.sentence.startswith(
        "doubles the Hessian when it is constructed twice"
    )
    assert reason.recomputed == pytest.approx(2 * truth, rel=1e-4)
    other = row(report, "curvlinops, as reported")
    assert other.verdict is AuditVerdict.UNEXPLAINED


@pytest.mark.usefixtures("pyhessian_only")
def test_sums_of_batch_means_explain_the_loss_landscape_code() -> None:
    """Its number grows with the number of batches, and leaves biases out.

    Catches: a scale that is taken for the model's; one of both reasons called enough.
    """
    model = seeded(mlp)()
    keep = [p.ndim > 1 for p in model.parameters() for _ in range(p.numel())]
    reported, problem = {}, Case("uneven", seeded(mlp), LOSS, UNEVEN, (1.0,) * 4)
    block = 4 * dense(problem)[np.ix_(keep, keep)]
    reported["loss-landscape"] = {"lambda_max": largest(block)}
    report = audit(
        model,
        LOSS,
        UNEVEN,
        quantities=("lambda_max",),
        reported=reported,
        comparison=Comparison(rtol=1e-6),
        generator=generator(),
    )
    first, second = row(report, "loss-landscape, as reported").explanations
    assert first.sentence.startswith("adds up the batches' Hessians without dividing")
    assert second.sentence.startswith("leaves biases")
    assert first.recomputed == second.recomputed == pytest.approx(largest(block))


def test_a_choice_of_parameters_that_a_package_has_not() -> None:
    """PyHessian measures all parameters, and that is why it differs.

    Catches: the subset's number expected of a package that knows none.
    """
    report = audited("mlp", quantities=("lambda_max",), params="0.*")
    [reason] = row(report, "PyHessian").explanations
    assert reason.sentence.startswith("measures all parameters")
    assert reason.recomputed == pytest.approx(largest(dense(case("mlp"))), rel=1e-9)
    assert row(report, "curvlinops").verdict is AuditVerdict.AGREES


def test_batch_norm_policies_that_packages_have_not() -> None:
    """With the batches' own statistics all others answer another question.

    Catches: *unexplained* for what was never asked of them.
    """
    report = audited("batch_norm", quantities=("lambda_max",), bn="batch")
    for source in ("PyHessian", "curvlinops"):
        [reason] = row(report, source).explanations
        assert reason.sentence.startswith("evaluates BatchNorm with running")
        assert reason.recomputed == pytest.approx(largest(dense(case("batch_norm"))))


def test_failures_are_rows_with_the_message() -> None:
    """An exception says what it was, and what is known to cause it here.

    Catches: an audit that ends where a package does.
    """
    report = audited("own_loss_sum", quantities=("lambda_max",))
    found = row(report, "curvlinops")
    assert found.verdict is AuditVerdict.FAILED
    assert math.isnan(found.value)
    assert found.reason.startswith("needs a loss with the attribute 'reduction'; Attr")
    unused = row(audited("partly_used", quantities=("lambda_max",)), "PyHessian")
    assert unused.reason.startswith("needs a gradient for every parameter; ")
    pair = row(audited("tuple_inputs", quantities=("lambda_max",)), "PyHessian")
    assert pair.reason.startswith("takes one tensor of inputs; AttributeError")
    fused = row(audited("attention", quantities=("lambda_max",)), "PyHessian")
    assert fused.reason.startswith("needs attention under sdpa_kernel(SDPBackend.MATH)")


def test_absent_packages_are_listed_with_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: a missing package that is left out, or raises."""
    for module in ("pyhessian", "curvlinops", "hessian_eigenthings"):
        monkeypatch.setitem(sys.modules, module, None)
    report = audited("mlp", quantities=("lambda_max",))
    notes = {r.source: r.note for r in report.rows if r.verdict is AuditVerdict.ABSENT}
    assert notes == {
        "PyHessian": "pip install pyhessian==0.1",
        "curvlinops": "pip install 'noisekit[compare]'",
        "hessian-eigenthings": "pip install 'noisekit[compare]'",
    }


@pytest.mark.usefixtures("pyhessian_only")
def test_what_a_package_cannot_answer_is_skipped() -> None:
    """PyHessian has no smallest eigenvalue; large models no dense Hessian.

    Catches: the largest magnitude given for the smallest eigenvalue; a dense matrix
    whatever the size.
    """
    report = audited("mlp", quantities=("lambda_min",), max_params=10)
    found = row(report, "PyHessian", "lambda_min")
    assert (found.verdict, found.note) == (AuditVerdict.SKIPPED, "has no lambda_min")
    skipped = row(report, "dense Hessian", "lambda_min")
    assert skipped.note == "more than max_params=10 parameters"
    ours = row(report, "noisekit", "lambda_min")
    assert ours.verdict is AuditVerdict.REFERENCE
    want = float(np.linalg.eigvalsh(dense(case("mlp")))[0])
    assert ours.value == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", ["mlp", "partly_used"])
@pytest.mark.usefixtures("pyhessian_only")
def test_the_smallest_eigenvalue_also_where_it_is_zero(name: str) -> None:
    """An accuracy relative to nothing is that of the largest eigenvalue.

    Catches: rounding near zero called a difference of a million percent.
    """
    report = audited(name, quantities=("lambda_min",))
    want = float(np.linalg.eigvalsh(dense(case(name)))[0])
    exact = row(report, "dense Hessian", "lambda_min")
    assert exact.value == pytest.approx(want, abs=1e-9)
    assert row(report, "noisekit", "lambda_min").verdict is AuditVerdict.AGREES
    assert report.unexplained == ()


@pytest.mark.parametrize("size", [2000, 10])
def test_large_models_are_audited_against_ours(size: int) -> None:
    """With and without the dense Hessian the same defects are found.

    Catches: explanations that need the dense matrix.
    """
    report = audited("mlp_sum", max_params=size)
    assert report.unexplained == ()
    found = row(report, "curvlinops")
    assert found.verdict is AuditVerdict.EXPLAINED
    assert found.explanations[0].sentence.startswith("adds sum losses up")


def test_float32_is_judged_in_double_precision() -> None:
    """The reference is float64 whatever the model is.

    Catches: a reference that rounds like the answers it judges.
    """
    model = seeded(mlp)().float()
    batches = [(x.float(), y) for x, y in RAGGED]
    report = audit(model, LOSS, batches, generator=generator())
    exact = row(report, "dense Hessian")
    assert exact.note == "differences in float64"
    assert next(model.parameters()).dtype is torch.float32
    want = largest(dense(case("mlp")))
    assert exact.value == pytest.approx(want, rel=1e-6)
    assert report.unexplained == ()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("build", [case("mlp").build, case("batch_norm").build])
def test_nothing_of_the_model_is_touched(build: Callable[[], nn.Module]) -> None:
    """Modes, gradients, statistics, hooks and random state are as before.

    Catches: PyHessian's ``eval()`` and gradients with graphs; hooks that fire.
    """
    model = build().train()
    LOSS(model(RAGGED[0][0]), RAGGED[0][1]).backward()
    before, grads = state_of(model), [p.grad for p in model.parameters()]
    bits = [g.clone() for g in grads]
    fired: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    audit(model, LOSS, RAGGED, quantities=("lambda_max",))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    for parameter, grad, bit in zip(model.parameters(), grads, bits, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, bit)
    assert not fired
    assert torch.equal(torch.get_rng_state(), random_state)


def test_reports_read_well() -> None:
    """The table has all rows; the text has the reasons below their rows.

    Catches: NaN printed where there is no number.
    """
    report = audited("own_loss_sum")
    table = report.frame()
    assert len(table) == len(report.rows) == 10
    assert set(table.columns) >= {"quantity", "source", "value", "deviation", "reason"}
    text = str(report)
    assert text.startswith("43 parameters, 10 examples in 3 batches")
    assert "nan" not in text
    lines = text.splitlines()
    failing = next(i for i, line in enumerate(lines) if line.endswith("failed"))
    assert lines[failing + 1].strip().startswith("needs a loss with")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"quantities": ("rank",)},
            "one of 'lambda_max', 'lambda_min', 'trace', got \\('rank',\\)",
        ),
        (
            {"quantities": ()},
            "lambda_min, trace or more, got none",
        ),
        (
            {"reported": {"Hessian++": {"trace": 1.0}}},
            "reported needs names of PyHessian, curvlinops, .* got 'Hessian\\+\\+'",
        ),
        ({"rtol": 0.0}, r"rtol needs to be between 0 and 1, got 0\.0"),
    ],
)
def test_audits_that_are_refused(arguments: dict[str, object], message: str) -> None:
    """Catches: a misspelt package whose number is silently left out."""
    with pytest.raises(UsageError, match=message):
        audited("mlp", **arguments)


class SavedGradient(torch.autograd.Function):
    """A mean square whose forward pass makes the gradient."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor) -> Tensor:
        ctx.save_for_backward(2 * outputs / outputs.numel())
        return outputs.square().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


def test_the_reference_does_not_share_autograds_faults() -> None:
    """A loss whose second derivative autograd cannot see, beside the plain one.

    Catches: a dense Hessian by the very second derivatives that are to be judged.
    """
    model = seeded(mlp)()
    data = [(x, x) for x, _ in RAGGED]
    wanted = {"quantities": ("lambda_max",), "generator": generator()}
    fused = audit(model, lambda o, t: SavedGradient.apply(o), data, **wanted)
    plain = audit(model, lambda o, t: o.square().mean(), data, **wanted)
    want = row(plain, "noisekit").value
    assert row(fused, "dense Hessian").value == pytest.approx(want, rel=1e-5)
    assert row(fused, "noisekit").verdict is AuditVerdict.FAILED
    assert "custom function SavedGradient hides a part" in row(fused, "noisekit").note

"""The empirical risk, its gradient and its policies against plain references."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from noisekit.core.evaluation_mode import call_model, unwrap_compiled
from noisekit.core.risk import EmpiricalRisk
from tests.cases import CASES, COUNTS, RAGGED, Case, batch_norm_network, mlp, seeded
from tests.reference import curvature as reference

CASES_BY_NAME = {case.name: case for case in CASES}
LOSS = nn.CrossEntropyLoss()


def risk_of(case: Case) -> EmpiricalRisk:
    return EmpiricalRisk(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient_match_one_big_expression(case: Case) -> None:
    """Every kind of model, loss and batch in the table.

    Catches: equal weights for batches of unequal size; examples counted where the
    loss divides by class weights or by tokens; gradients that skip unused layers.
    """
    risk = risk_of(case)
    model = case.build()
    want, _ = reference.gradient_and_hessian(
        model,
        case.loss_fn,
        case.batches,
        counts=case.counts,
        reduction=case.reduction,
    )
    loss = reference.total_loss(
        model.eval(),
        case.loss_fn,
        case.batches,
        counts=case.counts,
        reduction=case.reduction,
    )
    value, gradient = risk.value_and_grad()
    assert risk.reduction == case.reduction
    assert risk.normalisers == pytest.approx(case.counts)
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert risk.value() == pytest.approx(loss.item(), rel=1e-12)
    assert_close(gradient, torch.from_numpy(want), rtol=1e-10, atol=1e-14)


def test_batching_does_not_change_the_risk() -> None:
    """Ragged batches give what all examples in one batch give.

    Catches: an average of averages.
    """
    whole = [(torch.cat([x for x, _ in RAGGED]), torch.cat([y for _, y in RAGGED]))]
    model = seeded(mlp)()
    in_parts = EmpiricalRisk(model, LOSS, RAGGED).value_and_grad()
    at_once = EmpiricalRisk(model, LOSS, whole).value_and_grad()
    assert in_parts[0] == pytest.approx(at_once[0], rel=1e-12)
    assert_close(in_parts[1], at_once[1], rtol=1e-10, atol=1e-14)


def test_mean_and_sum_losses_give_the_same_risk() -> None:
    """Catches: a risk whose meaning depends on the loss's reduction."""
    mean = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    summed = EmpiricalRisk(seeded(mlp)(), nn.CrossEntropyLoss(reduction="sum"), RAGGED)
    assert mean.value() == pytest.approx(summed.value(), rel=1e-12)


def test_a_batch_of_ignored_targets_only_is_left_out() -> None:
    """Its mean is 0 / 0; it must not turn everything into NaN.

    Catches: multiplying that NaN by its weight of zero.
    """
    ignored = (RAGGED[0][0], torch.full((4,), -100))
    with_it = EmpiricalRisk(seeded(mlp)(), LOSS, [*RAGGED, ignored])
    without = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    assert with_it.value() == pytest.approx(without.value(), rel=1e-12)
    assert with_it.normalisers[-1] == 0.0


def test_value_at_another_point_leaves_the_parameters_bit_for_bit() -> None:
    """Catches: adding a step and subtracting it again."""
    model = seeded(mlp)()
    risk = EmpiricalRisk(model, LOSS, RAGGED)
    before = risk.vector()
    memory = [p.data_ptr() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    moved = risk.value(before + 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert moved == pytest.approx(risk.value(), rel=1e-12)
    with torch.no_grad():
        risk.layout.split(before)
        for parameter, own in zip(
            model.parameters(), risk.layout.split(before), strict=True
        ):
            parameter.copy_(own)
    versions = [p._version for p in model.parameters()]
    risk.value_and_grad(before + 1.0)
    assert torch.equal(risk.vector(), before)
    assert [p.data_ptr() for p in model.parameters()] == memory
    assert [p._version for p in model.parameters()] == versions


def test_gradient_of_a_subset_is_its_part_of_the_whole() -> None:
    model = seeded(mlp)()
    _, whole = EmpiricalRisk(model, LOSS, RAGGED).value_and_grad()
    _, part = EmpiricalRisk(model, LOSS, RAGGED, params="3.*").value_and_grad()
    assert_close(part, whole[-18:], rtol=1e-12, atol=0.0)


def test_error_is_the_share_misclassified_over_all_examples() -> None:
    """Catches: an average of batch error rates over ragged batches."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    inputs = torch.eye(2, dtype=torch.float64)[[0, 0, 0, 1]]
    batches = [
        (inputs[:3], torch.tensor([0, 0, 0])),
        (inputs[3:], torch.tensor([0])),
    ]
    assert EmpiricalRisk(model, LOSS, batches).evaluate().error == 0.25


def test_error_is_none_where_outputs_are_not_classes() -> None:
    case = CASES_BY_NAME["regression"]
    assert risk_of(case).evaluate().error is None


def test_losses_are_summed_in_double_precision() -> None:
    """Many float32 batches: the sum must not lose what each of them has.

    Catches: a float32 accumulator, which drifts by 1e-5 here.
    """
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    value = 0.1
    batches = [(torch.full((1, 1), value), torch.zeros(1, 1))] * 20_000
    risk = EmpiricalRisk(model, lambda o, t: (o - t).abs().mean(), batches)
    exact = float(torch.tensor(value, dtype=torch.float32).double())
    assert risk.value() == pytest.approx(exact, rel=1e-12)


def test_batch_norm_policies_are_what_they_say() -> None:
    """The layer's own modes give two of them, pooled statistics the third.

    Catches: recalibration that averages ragged batches equally.
    """
    model = seeded(batch_norm_network)()
    running = EmpiricalRisk(model, LOSS, RAGGED, bn="running").value()
    per_batch = EmpiricalRisk(model, LOSS, RAGGED, bn="batch").value()
    recalibrated = EmpiricalRisk(model, LOSS, RAGGED, bn="recalibrated").value()

    def by_hand(net: nn.Module) -> float:
        total = reference.total_loss(net, LOSS, RAGGED, counts=COUNTS, reduction="mean")
        return total.item()

    assert running == pytest.approx(by_hand(seeded(batch_norm_network)().eval()))
    assert per_batch == pytest.approx(by_hand(seeded(batch_norm_network)().train()))
    own = seeded(batch_norm_network)().eval()
    hidden = [own[0](x).detach() for x, _ in RAGGED]
    own[1].running_mean = sum(len(h) * h.mean(0) for h in hidden) / 10
    own[1].running_var = sum(len(h) * h.var(0) for h in hidden) / 10
    assert recalibrated == pytest.approx(by_hand(own), rel=1e-12)


def test_recalibration_follows_the_point_that_is_evaluated() -> None:
    """Catches: statistics of the old weights used at new ones."""
    model = seeded(batch_norm_network)()
    risk = EmpiricalRisk(model, LOSS, RAGGED, bn="recalibrated")
    vector = risk.vector()
    doubled = vector.clone()
    doubled[:25] *= 2.0  # rows and biases before BatchNorm: their scale is no matter
    assert risk.value(doubled) == pytest.approx(risk.value(vector), rel=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_the_data_have_the_risk_of_their_own(case: Case) -> None:
    """``on`` a part is what a new risk over it would be, and the whole stays.

    Catches: the total of the whole, which makes every part too small.
    """
    risk = EmpiricalRisk(
        case.build(), case.loss_fn, case.batches, normaliser=case.normaliser
    )
    whole = risk.value()
    parts = [risk.on([batch]) for batch in case.batches]
    mean = sum(
        count * part.value() for count, part in zip(case.counts, parts, strict=True)
    )
    assert mean / sum(case.counts) == pytest.approx(whole, rel=1e-12)
    assert sum(part.num_examples for part in parts) == risk.num_examples
    assert risk.value() == whole


def test_parts_are_measured_with_the_statistics_of_the_whole() -> None:
    """Within ``evaluating()`` a part does not recalibrate BatchNorm to itself.

    Catches: statistics that change from part to part.
    """
    risk = EmpiricalRisk(seeded(batch_norm_network)(), LOSS, RAGGED, bn="recalibrated")
    part = risk.on(RAGGED[:1])
    with risk.evaluating():
        together = part.value()
    assert together != pytest.approx(part.value(), rel=1e-6)


def test_another_loss_divides_by_the_same() -> None:
    """Catches: the first loss evaluated again."""
    risk = EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED)
    twice = risk.with_loss(lambda outputs, targets: 2 * LOSS(outputs, targets))
    assert twice.value() == pytest.approx(2 * risk.value(), rel=1e-12)


def test_compiled_model_is_evaluated_as_written() -> None:
    """Catches: parameter names with a prefix, and graphs without second derivative."""
    model = seeded(mlp)()
    compiled = torch.compile(model)
    assert unwrap_compiled(compiled) is model
    risk = EmpiricalRisk(compiled, LOSS, RAGGED)
    assert risk.layout.names[0] == "0.weight"
    assert risk.value() == EmpiricalRisk(model, LOSS, RAGGED).value()


def test_inputs_are_unpacked_by_their_kind() -> None:
    class Recorder(nn.Module):
        def forward(self, *args: object, **kwargs: object) -> object:
            return args, kwargs

    assert call_model(Recorder(), 1) == ((1,), {})
    assert call_model(Recorder(), (1, 2)) == ((1, 2), {})
    assert call_model(Recorder(), {"a": 1}) == ((), {"a": 1})

"""What results print: one or two lines, never their tensors."""

import math

import pytest
import torch
from torch import nn

from noisekit.core.results import Estimate, Status
from noisekit.curvature import spectral_density
from noisekit.sharpness import (
    CurveTraining,
    average_sharpness,
    batch_sharpness,
    check_invariance,
    connecting_curve,
    epsilon_sharpness,
    fisher_rao_norm,
    interpolate,
    loss_slice,
    measure,
    pac_bayes_flatness,
    rescaled_twin,
    worst_case_sharpness,
)
from noisekit.sharpness.landscape.points import loss_range
from tests.randomness import seeded
from tests.sharpness.networks import LOSS, ragged, rectified

DATA = ragged(24, 16)


def shifted(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value + 0.1 for name, value in model.state_dict().items()}


def ends(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {"start": dict(model.state_dict()), "end": shifted(model)}


def every_result() -> list[object]:
    """One result of each kind that holds arrays or rows."""
    model = rectified()
    given = (model, LOSS, DATA)
    return [
        batch_sharpness(*given),
        worst_case_sharpness(*given, generator=seeded()),
        epsilon_sharpness(*given, generator=seeded()),
        average_sharpness(*given, generator=seeded()),
        pac_bayes_flatness(*given, criterion="loss", generator=seeded()),
        loss_slice(*given, num_points=5),
        loss_slice(*given, num_points=5).directions,
        interpolate(*given, **ends(model)),
        connecting_curve(*given, **ends(model), training=CurveTraining(num_steps=2)),
        rescaled_twin(*given, generator=seeded()),
    ]


def test_no_result_floods_a_notebook() -> None:
    """Catches: a cell that ends in a result showing every number of its tensors."""
    for result in every_result():
        name = type(result).__name__
        assert str(result) != repr(result), name
        assert len(str(result).splitlines()) <= 3, name
        assert len(repr(result)) < 700, name
        for text in (str(result), repr(result)):
            assert "tensor(" not in text, name
            assert "array(" not in text, name


def test_tables_stay_out_of_representations() -> None:
    """Catches: a card of forty rows as one endless line."""
    model = rectified()
    card = measure(model, LOSS, DATA, measures=["lambda_max", "hessian_trace"])
    report = check_invariance(fisher_rao_norm, model, LOSS, DATA)
    density = spectral_density(torch.diag(torch.arange(30.0)), generator=seeded())
    for result in (card, report, density):
        assert "Estimate" not in repr(result).split("value=")[0]
        assert "CardRow" not in repr(result)
        assert "RescalingEffect" not in repr(result)
        assert "Atom" not in repr(result)


def test_batch_sharpness_says_how_many_batches() -> None:
    """Catches: a text that hides the batches of another size."""
    found = batch_sharpness(rectified(), LOSS, DATA)
    text = str(found)
    assert str(found.estimate) in text
    assert f"{found.ratios.numel()} batches of {found.batch_size}" in text
    assert f"{found.num_left_out} left out" in text


def test_regions_are_named_with_their_units() -> None:
    """Catches: a radius in units of the weights printed as if in raw ones."""
    given = (rectified(), LOSS, DATA)
    plain = worst_case_sharpness(*given, rho=0.05, generator=seeded())
    adaptive = worst_case_sharpness(*given, rho=0.5, adaptive=True, generator=seeded())
    groups = worst_case_sharpness(*given, batch_size=3, generator=seeded())
    assert "l2 ball of 0.05; " in str(plain)
    assert plain.detail in str(plain)
    assert "ball of 0.5 in units of |w|" in str(adaptive)
    assert str(groups).endswith("groups of 3")
    noise = average_sharpness(*given, sigma=0.1, adaptive=True, generator=seeded())
    assert "noise of 0.1 in units of |w|" in str(noise)
    box = epsilon_sharpness(*given, subspace_dim=4, generator=seeded())
    assert "box of 0.001; 4 dimensions" in str(box)


def test_a_size_that_was_not_found_is_not_printed() -> None:
    """Catches: "size nan keeps the error within 0.1"."""
    given = (rectified(), LOSS, DATA)
    found = pac_bayes_flatness(*given, target=50.0, criterion="error")
    assert found.estimate.status is not Status.OK
    assert "keeps" not in str(found)
    assert found.detail in str(found)


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ((1.0, 0.25), "losses 0.25 to 1"),
        ((1.0, math.inf, math.nan), "losses 1 to 1, 2 not finite"),
        ((math.nan,), "losses none, 1 not finite"),
    ],
)
def test_losses_that_are_not_finite_are_counted(
    losses: tuple[float, ...], text: str
) -> None:
    """Catches: a range of "nan to nan" for one lost corner."""
    assert loss_range(losses) == text


def test_a_twin_names_both_layers() -> None:
    """Catches: a text from which nobody can tell what was rescaled."""
    twin = rescaled_twin(rectified(), LOSS, DATA, generator=seeded())
    assert isinstance(twin.lambda_max, Estimate)
    assert f"{twin.lambda_max} -> {twin.twin_lambda_max} loss/param²" in str(twin)
    assert f"{twin.divided} divided by 4, {twin.multiplied} multiplied" in str(twin)

"""Spectral densities: mass one, outliers as atoms, nothing lost at a breakdown."""

import numpy as np
import pytest
import torch

from noisekit.core.errors import UsageError
from noisekit.curvature import spectral_density, spectral_quadrature
from tests.randomness import seeded
from tests.reference.spectra import SPECTRA, matrix_of


class Undefined:
    """A matrix of weights that blew up."""

    shape = (4, 4)
    dtype = torch.float32

    def __matmul__(self, vector: torch.Tensor) -> torch.Tensor:
        return vector * torch.nan


def network_like() -> torch.Tensor:
    """Four outliers above a bulk that is partly negative."""
    bulk = 2 * torch.rand(1000, generator=seeded()).double() ** 6 - 0.05
    return torch.cat([torch.tensor([20.0, 15.0, 10.0, 9.9]).double(), bulk])


@pytest.mark.parametrize("kind", SPECTRA)
def test_mass_is_one_and_moments_are_right(kind: str) -> None:
    """Smooth part and atoms together; the first two moments against the matrix.

    Catches: weights that are squared twice or not normalised, ghosts, a grid that ends
    inside the spectrum.
    """
    matrix, exact = matrix_of(kind, size=80, seed=1)
    found = spectral_density(matrix, num_probes=12, num_steps=40, generator=seeded())
    np.testing.assert_allclose(found.weights.sum(1), 1.0, atol=1e-8)
    mass = np.trapezoid(found.density, found.grid)
    atoms = sum(atom.weight.value for atom in found.atoms)
    assert mass + atoms == pytest.approx(1.0, abs=2e-3)
    for power in (1, 2):
        moment = found.quadrature.means(found.nodes**power)
        want = float((exact**power).mean())
        assert abs(moment.value - want) < 4.5 * moment.stderr + 1e-9


def test_outliers_are_atoms_and_do_not_blur_the_bulk() -> None:
    """The bandwidth in the bulk is far below the range over the number of nodes.

    Catches: one bandwidth for all, of the range over m, which one outlier widens;
    outliers smoothed, merged, or taken from the bulk's edge.
    """
    values = network_like()
    found = spectral_density(torch.diag(values), generator=seeded(1))
    want = [20.0, 15.0, 10.0, 9.9]
    assert [atom.value for atom in found.atoms] == pytest.approx(want, abs=1e-3)
    for atom in found.atoms:
        share = atom.weight.interval(0.999)
        assert share.low <= 1 / len(values) <= share.high
        assert atom.residual < 0.05
    widths = found.bandwidths[found.bandwidths > 0]
    assert np.median(widths) < 0.2 * 20 / found.nodes.shape[1]
    assert float(found.grid.max()) < 3.0
    assert (found.low <= found.density).all()
    assert (found.density <= found.high).all()


def test_a_bulk_alone_has_no_atoms() -> None:
    """Catches: the converged ends of any spectrum taken for outliers."""
    for seed in range(4):
        even = spectral_density(
            torch.linspace(-1, 1, 300).diag(), generator=seeded(seed)
        )
        small = spectral_density(
            torch.linspace(-1, 1, 30).diag(), generator=seeded(seed)
        )
        assert even.atoms == ()
        assert small.atoms == ()


def test_the_negative_part_is_kept() -> None:
    """Catches: magnitudes in place of eigenvalues; a grid from zero."""
    values = network_like()
    truth = float((values < 0).double().mean())
    found = spectral_density(
        torch.diag(values), num_probes=16, num_steps=40, generator=seeded()
    )
    share = found.negative_share
    assert abs(share.value - truth) < 4 * share.stderr + 0.02
    assert float(found.grid.min()) < -0.04
    logs = found.log_density(-1)
    assert logs.mass.value == pytest.approx(share.value)
    mass = np.trapezoid(logs.density, np.log10(logs.grid))
    assert mass == pytest.approx(share.value, abs=1e-3)


def test_log_axes_show_orders_of_magnitude() -> None:
    """Equal numbers in each of five decades give an even density per decade.

    Catches: a density per unit of eigenvalue on a log axis; a fixed bandwidth.
    """
    values = torch.logspace(-4, 1, 1000).double()
    found = spectral_density(
        torch.diag(values), num_probes=8, num_steps=80, generator=seeded()
    )
    logs = found.log_density()
    inside = (logs.grid > 1e-3) & (logs.grid < 3)
    assert logs.density[inside].mean() == pytest.approx(0.2, rel=0.15)
    assert logs.mass.value + found.zero_share.value == pytest.approx(1.0)
    assert found.log_density(-1).mass.value == 0.0


@pytest.mark.parametrize("num_steps", [10, 30, 60])
def test_a_sign_is_given_only_where_the_quadrature_knows_it(num_steps: int) -> None:
    """More than half of the eigenvalues are zero, of which no node is a copy.

    Catches: the sign of the node that stands for them, which is chance: it gave 22 %
    below zero in place of 7 %, under an error of the same size.
    """
    positive = 3 * torch.rand(300, generator=seeded()).double() ** 2
    negative = -torch.rand(70, generator=seeded(1)).double()
    values = torch.cat([positive, negative, torch.zeros(630).double()])
    found = spectral_density(
        torch.diag(values), num_probes=8, num_steps=num_steps, generator=seeded()
    )
    below, unknown = found.negative_share, found.zero_share
    assert below.value - 4 * below.stderr <= 0.07
    assert below.value + unknown.value >= 0.07
    assert unknown.value > 0.5
    shares = [found.log_density(sign).mass.value for sign in (-1, 1)]
    assert sum(shares) + unknown.value == pytest.approx(1.0)


def test_eigenvalues_of_their_own_have_a_sign() -> None:
    """Catches: the nodes beside zero left out although they have converged."""
    found = spectral_density(
        torch.diag(torch.tensor([-1.0, -1e-3, 2e-3, 1.0]).double()), generator=seeded()
    )
    assert found.zero_share.value == 0.0
    single = spectral_density(torch.diag(torch.linspace(1.0, 2.0, 500).double()))
    assert single.zero_share.value == 0.0


def test_printed_it_is_a_few_lines() -> None:
    """Catches: every node and weight on the screen."""
    found = spectral_density(torch.diag(network_like()), generator=seeded())
    lines = str(found).splitlines()
    assert lines[0].startswith("density of 1004 eigenvalues from -0.04978")
    assert lines[0].endswith("to 20, 160 products:")
    assert lines[1] == "  outliers: 20, 15, 10, 9.9"
    assert lines[2] == f"  share below zero: {found.negative_share}"
    assert lines[3] == f"  share about zero: {found.zero_share}"
    assert "to 20: 4 probes of 40 nodes, 160 products" in str(found.quadrature)
    assert str(found.log_density().mass) in str(found.log_density())
    none = spectral_density(torch.eye(3), generator=seeded())
    assert "outliers: none" in str(none)
    for result in (found, found.quadrature, found.log_density()):
        assert "array" not in repr(result)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        (torch.ones(50), 1),
        (torch.zeros(50), 1),
        (torch.tensor([5.0, *[0.0] * 60]), 2),
        (torch.tensor([3.0]), 1),
        (torch.tensor([3.0, -1.0]), 2),
    ],
    ids=["identity", "zero", "rank_one", "one", "two"],
)
def test_breakdown_ends_a_run_cleanly(values: torch.Tensor, steps: int) -> None:
    """As many products as there are different eigenvalues, and finite numbers.

    Catches: division by a zero norm, going on with rounding as a direction, a
    bandwidth of zero.
    """
    for dtype in (torch.float32, torch.float64):
        found = spectral_density(torch.diag(values.to(dtype)), generator=seeded())
        assert found.num_matvecs == 4 * steps
        assert np.isfinite(found.density).all()
        mass = np.trapezoid(found.density, found.grid)
        atoms = sum(atom.weight.value for atom in found.atoms)
        assert mass + atoms == pytest.approx(1.0, abs=1e-3)
        assert set(found.nodes.round(5).ravel()) <= set(values.tolist())


def test_bands_cover_the_density_of_many_probes() -> None:
    """Against 100 probes: where there is density, most of the band holds it.

    Catches: a standard deviation in place of a standard error; bands over nodes.
    """
    values = torch.linspace(-1, 1, 400).double() ** 3
    many = spectral_density(
        torch.diag(values),
        num_probes=100,
        num_steps=20,
        bandwidth=0.1,
        generator=seeded(),
    )
    inside = []
    for seed in range(12):
        few = spectral_density(
            torch.diag(values),
            num_probes=6,
            num_steps=20,
            bandwidth=0.1,
            generator=seeded(1 + seed),
        )
        want = np.interp(few.grid, many.grid, many.density)
        shown = want > 0.05 * want.max()
        inside.append(((few.low <= want) & (want <= few.high))[shown].mean())
    assert 0.85 < float(np.mean(inside)) < 0.995


def test_the_table_holds_both_axes_and_the_atoms() -> None:
    found = spectral_density(torch.diag(network_like()), generator=seeded())
    table = found.frame()
    assert set(table["axis"]) == {"linear", "log"}
    assert (table["kind"] == "atom").sum() == len(found.atoms) == 4
    signs = np.sign(table.loc[table["axis"] == "log", "eigenvalue"])
    assert set(signs) == {-1.0, 0.0, 1.0}
    [zero] = table.loc[table["kind"] == "zero", "value"]
    assert zero == found.zero_share.value


def test_quadrature_repeats_with_its_generator() -> None:
    """Catches: the global random state; a fixed seed behind ``None``."""
    matrix = torch.diag(network_like())
    one, two = (spectral_quadrature(matrix, generator=seeded(3)) for _ in range(2))
    free = spectral_quadrature(matrix)
    assert np.array_equal(one.nodes, two.nodes)
    assert not np.array_equal(one.nodes, free.nodes)


def test_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match=r"num_probes .* at least 2 .* got 1;"):
        spectral_density(torch.eye(3), num_probes=1)
    with pytest.raises(UsageError, match=r"bandwidth .* positive and finite, got 0"):
        spectral_density(torch.eye(3), bandwidth=0.0)
    nothing = Undefined()
    with pytest.raises(UsageError, match="finite products, got NaN or infinity"):
        spectral_density(nothing)
    with pytest.raises(UsageError, match="sign needs to be 1 or -1, got 0"):
        spectral_density(torch.eye(3)).log_density(0)

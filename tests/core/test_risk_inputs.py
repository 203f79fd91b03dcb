"""What models and loaders there are: mappings, graphs, lists, losses of their own."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import noisekit as nk
from noisekit.core.errors import LossShapeError, NormaliserError, UsageError
from noisekit.core.risk import EmpiricalRisk
from tests.cases import RAGGED, mlp, seeded

LOSS = nn.CrossEntropyLoss()


def plain_value() -> float:
    return EmpiricalRisk(seeded(mlp)(), LOSS, RAGGED).value()


class TakesMapping(nn.Module):
    """Is called with one mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        """Read it."""
        return self.inner(data["x"])


class TakesList(TakesMapping):
    """Is called with one list of single examples."""

    def forward(self, rows: list[Tensor]) -> Tensor:  # type: ignore[override]
        """Stack them."""
        return self.inner(torch.stack(rows))


def test_a_model_that_takes_one_mapping() -> None:
    """Catches: every mapping unpacked into keywords."""
    batches = [({"x": x}, y) for x, y in RAGGED]
    risk = EmpiricalRisk(seeded(TakesMapping)(), LOSS, batches)
    assert risk.value() == pytest.approx(plain_value(), rel=1e-12)


def test_a_model_that_takes_a_list_of_examples() -> None:
    """Catches: a list always unpacked, and the examples counted along its items."""
    batches = [(list(x), y) for x, y in RAGGED]
    risk = EmpiricalRisk(seeded(TakesList)(), LOSS, batches)
    assert risk.num_examples == 10
    assert risk.value() == pytest.approx(plain_value(), rel=1e-12)


class ReturnsLoss(nn.Module):
    """A language model in the manner of Hugging Face: labels in, loss out."""

    def __init__(self, shift: bool) -> None:
        super().__init__()
        self.shift = shift
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        """Return logits and, with labels, the mean loss over those that count."""
        logits = self.head(torch.tanh(self.table(ids)))
        if labels is None:
            return SimpleNamespace(logits=logits, loss=None)
        if self.shift:
            scores, wanted = logits[:, :-1], labels[:, 1:]
        else:
            scores, wanted = logits, labels
        loss = functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize("shift", [True, False])
def test_a_model_that_returns_its_loss(shift: bool) -> None:
    """Padding differs from batch to batch; the loss is that of all data at once.

    Catches: batches weighted by examples where the loss divides by tokens; the first
    label of a sequence counted where it is never predicted.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, (10, 6), generator=generator)
    labels = ids.clone()
    for row in range(10):
        labels[row, 6 - row // 2 :] = -100
    batches = [
        {"ids": ids[a:b], "labels": labels[a:b]} for a, b in ((0, 4), (4, 8), (8, 10))
    ]
    model = seeded(lambda: ReturnsLoss(shift))()
    want = float(model(ids, labels).loss.detach())
    risk = EmpiricalRisk(model, "model", batches)
    assert risk.value() == pytest.approx(want, rel=1e-12)
    assert nk.lambda_max(model, "model", batches).value > 0.0


def test_a_model_that_returns_logits_and_loss() -> None:
    """Catches: only ``.loss`` looked for, or the targets kept from the model."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.inner(inputs)
            return logits, functional.cross_entropy(logits, targets)

    risk = EmpiricalRisk(seeded(Pair)(), "model", RAGGED)
    assert risk.value() == pytest.approx(plain_value(), rel=1e-12)


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(LossShapeError, match="does the model get its labels"):
        EmpiricalRisk(seeded(mlp)(), "model", [x for x, _ in RAGGED])


class Graph:
    """A batch object with attributes, in the manner of PyTorch Geometric."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.edges = x, edges


class GraphNetwork(nn.Module):
    """Adds each node's neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, graph: Graph) -> Tensor:
        """Return scores per node."""
        near = graph.x.index_add(0, graph.edges[1], graph.x[graph.edges[0]])
        return self.inner(near)


def test_a_graph_is_measured_as_a_whole() -> None:
    """Catches: a refusal whose advice does not work on a batch object."""
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 0]])
    batches = [(Graph(x, edges % len(x)), y) for x, y in RAGGED]
    model = seeded(GraphNetwork)()
    own = lambda o, t: functional.cross_entropy(o, t)  # noqa: E731
    with pytest.raises(NormaliserError, match="normaliser="):
        nk.lambda_max(model, own, batches)
    risk = nk.EmpiricalRisk(model, own, batches, normaliser=len, check=False)
    model.eval()
    with torch.no_grad():
        want = sum(float(own(model(g), y)) * len(y) for g, y in batches) / 10
    assert risk.value() == pytest.approx(want, rel=1e-12)
    assert nk.lambda_max(risk).value > 0.0


def test_batches_without_examples_are_left_out() -> None:
    """Catches: a division by zero at the last batch of a filtered data set."""
    empty = (torch.zeros(0, 4).double(), torch.zeros(0).long())
    for own in (LOSS, lambda o, t: functional.cross_entropy(o, t)):
        risk = EmpiricalRisk(seeded(mlp)(), own, [empty, *RAGGED, empty])
        assert risk.num_batches == 3
        assert risk.value() == pytest.approx(plain_value(), rel=1e-12)


def test_a_data_set_with_a_generator_of_its_own_goes_on_as_if_not_read() -> None:
    """Catches: NumPy's generators of a data set advanced by a measurement."""

    class Noisy(Dataset[Any]):
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(self.rng.standard_normal(4)), index % 3

    data = Noisy()
    before = data.rng.bit_generator.state
    EmpiricalRisk(seeded(mlp)(), LOSS, DataLoader(data, batch_size=4))
    assert data.rng.bit_generator.state == before


class Pinn(nn.Module):
    """The second derivative of a network in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Differentiate twice."""
        inputs = inputs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(
            self.inner(inputs).sum(), inputs, create_graph=True
        )
        return torch.autograd.grad(slope.sum(), inputs, create_graph=True)[0]


def test_a_model_that_differentiates_by_itself() -> None:
    """Catches: losses evaluated without gradients, which such a model cannot be."""
    inputs = torch.linspace(0, 1, 8).double().unsqueeze(1)
    batches = [(inputs[:5], inputs[:5].sin()), (inputs[5:], inputs[5:].sin())]
    model = seeded(Pinn)()
    risk = EmpiricalRisk(model, nn.MSELoss(), batches)
    want = float(nn.functional.mse_loss(model(inputs), inputs.sin()).detach())
    assert risk.value() == pytest.approx(want, rel=1e-12)
    assert nk.lambda_max(risk).value > 0.0


def test_an_embedding_with_sparse_gradients() -> None:
    """Catches: gradients in a layout that cannot be put into a vector."""
    ids = torch.tensor([0, 1, 2, 3, 1, 0])
    values = []
    for sparse in (True, False):
        model = nn.Sequential(nn.Embedding(4, 3, sparse=sparse), nn.Linear(3, 2))
        model.load_state_dict(
            {
                n: torch.linspace(-1, 1, t.numel()).view_as(t)
                for n, t in model.state_dict().items()
            }
        )
        risk = EmpiricalRisk(model.double(), LOSS, [(ids, ids % 2)])
        values.append(risk.value_and_grad()[1])
        assert model[0].sparse is sparse
    assert torch.equal(*values)


class Casting(nn.Module):
    """Casts its input, whatever the type of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Cast there and back."""
        return self.inner(inputs.bfloat16()).float()


class Autocasting(Casting):
    """Computes in half precision inside."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Switch autocast on."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(inputs).float()


SINGLE = [(x.float(), y) for x, y in RAGGED]
WRONG: dict[str, tuple[Any, str]] = {
    "data set": (
        lambda: (mlp(), LOSS, TensorDataset(*SINGLE[0])),
        r"the data set TensorDataset, which yields single examples; pass "
        r"torch.utils.data.DataLoader\(dataset, batch_size=...\)",
    ),
    "mapping batches": (
        lambda: (mlp(), LOSS, [{"x": SINGLE[0][0]}]),
        r"got dict; where the model takes the mapping and returns its loss, pass "
        r"'model' for loss_fn",
    ),
    "object batches": (
        lambda: (mlp(), LOSS, [Graph(*SINGLE[0])]),
        r"got Graph; pass pairs such as \[\(item, item.y\) for item in loader\]",
    ),
    "optimizer": (
        lambda: (torch.optim.SGD(mlp().parameters(), 0.1), LOSS, SINGLE),
        "got the optimizer SGD; pass the model that it updates",
    ),
    "function": (lambda: (len, LOSS, SINGLE), "torch.nn.Module, got builtin_function"),
    "loss and batches swapped": (
        lambda: (mlp(), SINGLE, LOSS),
        "got list for the loss and CrossEntropyLoss for the batches; are the two swap",
    ),
    "model and loss swapped": (
        lambda: (LOSS, mlp(), SINGLE),
        "got CrossEntropyLoss without parameters for the model and Sequential for",
    ),
    "name of a loss": (
        lambda: (mlp(), "mse", SINGLE),
        "'model' for a.*got 'mse'",
    ),
    "path": (lambda: (mlp(), LOSS, "data"), "pairs .inputs, targets., got 'data'"),
    "number": (lambda: (mlp(), LOSS, 3), "got 3; a single batch is written"),
    "double data": (
        lambda: (mlp(), LOSS, RAGGED),
        r"parameters of torch.float32, data of torch.float64\); convert the data, as "
        r"by x.to\(torch.float32\)",
    ),
    "autocast inside": (
        lambda: (Autocasting(), LOSS, SINGLE),
        "casts to torch.bfloat16 in its forward pass .*autocast around the training",
    ),
    "cast inside": (
        lambda: (Casting().bfloat16(), LOSS, SINGLE),
        "casts in its forward pass: .*; cast to the type of its parameters there",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_each_mistake_is_named(mistake: str) -> None:
    """Catches: PyTorch's own error, or a refusal that speaks of divisors."""
    arguments, match = WRONG[mistake]
    with pytest.raises(UsageError, match=match):
        nk.lambda_max(*arguments())


def test_autocast_around_a_measurement_is_off_inside() -> None:
    """Catches: derivatives in half precision, from the context of the caller."""
    risk = EmpiricalRisk(seeded(mlp)().float(), LOSS, SINGLE)
    want = risk.value_and_grad()[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(risk.value_and_grad()[1], want)

"""Loss and error over whole data sets."""

import torch
from torch import nn

from noisekit.train.data.section import TensorPair
from noisekit.train.losses import find_loss
from noisekit.train.runs.evaluate import errors_of_examples, evaluate
from tests.reference.training import mean_loss_and_error

LOSS = find_loss("cross_entropy")


def model_and_data() -> tuple[nn.Module, TensorPair]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(37, 5, generator=generator)
    targets = torch.randint(0, 3, (37,), generator=generator)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model(inputs)  # running statistics that differ from the data's own
    return model.train(), TensorPair(inputs, targets)


def test_ragged_chunks_weigh_by_examples() -> None:
    """Any chunk size gives the mean over examples, one after the other.

    Catches: averages of chunk averages; BatchNorm in training mode.
    """
    model, data = model_and_data()
    wanted = mean_loss_and_error(model, data.inputs, data.targets)
    for batch_size in (37, 10, 1):
        found = evaluate(
            model,
            {"train": data},
            LOSS,
            starts={"distance_from_start": torch.zeros(47)},
            batch_size=batch_size,
        )
        assert abs(found.train_loss - wanted[0]) < 1e-6
        assert found.scores["train_error"] == wanted[1]


def test_the_model_is_given_back() -> None:
    """Mode, buffers and gradients are as before.

    Catches: running statistics that an evaluation moves; a model left in eval mode.
    """
    model, data = model_and_data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(
        model,
        {"train": data},
        LOSS,
        starts={"distance_from_start": torch.zeros(47)},
        batch_size=10,
    )
    errors_of_examples(model, data, LOSS, batch_size=10)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_norm_and_distance_are_over_all_parameters() -> None:
    """Catches: a norm of norms; buffers counted as weights."""
    model, data = model_and_data()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    found = evaluate(
        model,
        {"train": data},
        LOSS,
        starts={"distance_from_start": weights - 2.0},
        batch_size=37,
    )
    norm = weights.double().square().sum().sqrt().item()
    distance = (4.0 * len(weights)) ** 0.5
    assert abs(found.scores["weight_norm"] - norm) < 1e-6
    assert abs(found.scores["distance_from_start"] - distance) < 1e-5


def test_each_example_is_judged() -> None:
    """Catches: outcomes in another order than the examples."""
    model, data = model_and_data()
    found = errors_of_examples(model, data, LOSS, batch_size=10)
    model.eval()
    one_by_one = [
        float(int(model(data.inputs[i : i + 1]).argmax()) != int(data.targets[i]))
        for i in range(37)
    ]
    assert found == one_by_one

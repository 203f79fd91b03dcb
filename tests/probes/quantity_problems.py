"""Models, a loop and its reading, for the tests of quantities beside the noise."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.vocabulary import QuantityName
from noisekit.integrations import attach
from noisekit.noise.step_quantity import StepQuantity
from noisekit.probes import Probe, Reading
from noisekit.probes.step_metrics.metric_set import METRICS

N, CLASSES, RATE = 12, 3, 0.1
ALL: tuple[QuantityName, ...] = tuple(METRICS)  # type: ignore[assignment]


class TiedNet(nn.Module):
    """One weight in two layers, whose cross terms count."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        logits: Tensor = self.head(hidden)
        return logits


class Pooled(nn.Module):
    """An embedding, a layer over positions and a fallback, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embed(x))
        logits: Tensor = self.mix(self.norm(hidden)).mean(1)
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, CLASSES))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def _floats(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, *shape, generator=generator, dtype=torch.float64)


def _tokens() -> Tensor:
    return torch.randint(7, (N, 4), generator=torch.Generator().manual_seed(5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (_mlp, lambda: _floats(5)),
    "conv": (_conv, lambda: _floats(2, 4, 4)),
    "tied": (TiedNet, lambda: _floats(5)),
    "pooled": (Pooled, _tokens),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, inputs and targets in float64."""
    build, inputs = MODELS[name]
    torch.manual_seed(2)
    targets = torch.arange(N) % CLASSES
    return build().double(), inputs(), targets


def rows_of(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.reshape(N, -1) for grad in grads.values()], 1)


def one_step(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    quantities: Sequence[QuantityName] = ALL,
    **options: object,
) -> tuple[Reading, Probe]:
    """Reading of one step of plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    seen = bool({"cabs", "cabs_conv_compat", "hessian_noise_scale"} & set(quantities))
    loss_fn = functional.cross_entropy
    probe = attach(
        model,
        optimizer,
        loss_fn=loss_fn if seen else None,
        quantities=quantities,
        **options,  # type: ignore[arg-type]
    )
    (probe.loss_fn if seen else loss_fn)(model(data[0]), data[1]).backward()
    optimizer.step()
    return probe.readings[-1], probe


def value(reading: Reading, name: str) -> float:
    found = reading.quantities[name]
    assert isinstance(found, StepQuantity)
    return found.value

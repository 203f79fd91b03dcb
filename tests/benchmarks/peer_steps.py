"""Training steps that read gradient noise with other packages."""

import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Step = Callable[[], object]


class UnavailableError(Exception):
    """A package cannot read this network here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """What a training step needs."""

    model: nn.Module
    loss_fn: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor

    def step(self) -> None:
        """Take a plain step."""
        self.optimizer.zero_grad()
        self.loss_fn(self.model(self.inputs), self.targets).backward()
        self.optimizer.step()


def backpack_norms(parts: Prepared) -> Step:
    """BackPACK's squared norms per example; layers without its rules are left out."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    warnings.filterwarnings("ignore", category=UserWarning)
    model, loss_fn = extend(parts.model), extend(parts.loss_fn)

    def step() -> None:
        parts.optimizer.zero_grad()
        with backpack(BatchL2Grad()):
            loss_fn(model(parts.inputs), parts.targets).backward()
        parts.optimizer.step()

    return _tried(step)


def opacus_norms(parts: Prepared) -> Step:
    """Opacus's ghost norms; one backward pass, without its clipping."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        wrapped = GradSampleModuleFastGradientClipping(
            parts.model, use_ghost_clipping=True
        )
    except NotImplementedError as error:
        raise UnavailableError(_first_line(error)) from error

    def step() -> None:
        parts.optimizer.zero_grad()
        parts.loss_fn(wrapped(parts.inputs), parts.targets).backward()
        wrapped.get_norm_sample()
        parts.optimizer.step()

    return _tried(step)


def vmapped_gradients(parts: Prepared) -> Step:
    """``torch.func``: every example's whole gradient at once, then norms and mean."""
    model, buffers = parts.model, dict(parts.model.named_buffers())

    def loss_of(
        weights: dict[str, Tensor], one_input: Tensor, one_target: Tensor
    ) -> Tensor:
        both = {**weights, **buffers}
        output = torch.func.functional_call(model, both, one_input.unsqueeze(0))
        loss: Tensor = parts.loss_fn(output, one_target.unsqueeze(0))
        return loss

    gradients = torch.func.vmap(
        torch.func.grad(loss_of), in_dims=(None, 0, 0), randomness="different"
    )

    def step() -> None:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        found = gradients(weights, parts.inputs, parts.targets)
        sum(grad.flatten(1).square().sum(1) for grad in found.values())
        for name, parameter in model.named_parameters():
            parameter.grad = found[name].mean(0)
        parts.optimizer.step()

    return _tried(step)


def cockpit_economy(parts: Prepared) -> Step:
    """Cockpit's cheapest set of quantities, at every step."""
    sys.modules.setdefault("pkg_resources", _pkg_resources())
    try:
        from backpack import extend
        from cockpit import Cockpit
        from cockpit.utils.configuration import configuration
    except ImportError as error:
        raise UnavailableError(f"it does not import here ({error})") from error
    warnings.filterwarnings("ignore")
    model, loss_fn = extend(parts.model), extend(parts.loss_fn)
    single = extend(nn.CrossEntropyLoss(reduction="none"))
    cockpit = Cockpit(model.parameters(), quantities=configuration("economy"))
    number = 0

    def step() -> None:
        nonlocal number
        parts.optimizer.zero_grad()
        outputs = model(parts.inputs)
        loss = loss_fn(outputs, parts.targets)
        info = {
            "batch_size": len(parts.inputs),
            "individual_losses": single(outputs, parts.targets),
            "loss": loss,
            "optimizer": parts.optimizer,
        }
        with cockpit(number, info=info):
            loss.backward(create_graph=cockpit.create_graph(number))
        parts.optimizer.step()
        number += 1

    return _tried(step)


def _pkg_resources() -> types.ModuleType:
    """What Cockpit asks of a module that setuptools no longer has: its version."""
    module = types.ModuleType("pkg_resources")
    distribution = types.SimpleNamespace(version="1.0.2")
    module.get_distribution = lambda name: distribution  # type: ignore[attr-defined]
    module.DistributionNotFound = ImportError  # type: ignore[attr-defined]
    return module


def _tried(step: Step) -> Step:
    """Return ``step`` once it has run.

    Raises:
        UnavailableError: If the package fails on this network.
    """
    try:
        step()
    except Exception as error:
        raise UnavailableError(f"fails ({_first_line(error)})") from error
    return step


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"


PEERS: dict[str, Callable[[Prepared], Step]] = {
    "BackPACK BatchL2Grad": backpack_norms,
    "Opacus ghost norms": opacus_norms,
    "torch.func vmap(grad)": vmapped_gradients,
    "Cockpit economy": cockpit_economy,
}

"""Squared norms of per-example gradients from a layer's input and output gradient.

A rule knows one kind of layer. From the captured call it gives the squared norms
without forming per-example gradients where that is cheaper, and the per-example
gradients themselves for a slice of examples, which is what shared weights and the
closure check need. Both are exact.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisekit.core.batch_axis import examples_first

CHUNK_ELEMENTS = 2**21
"""Elements of per-example gradients held at a time: 8 MB in float32."""


@dataclass(slots=True)
class LayerCall:
    """One call of a module inside a training step, captured by hooks.

    Attributes:
        module: What was called.
        args: Positional inputs, detached.
        kwargs: Keyword inputs, detached.
        axes: Axis of the examples per tensor among the inputs, in order.
        num_examples: Rows of the batch.
        grads: Gradient of the loss per tensor among the outputs, as they arrive.
        rng_state: Random state before the call, where the call drew from it.
        output_axes: Axis of the examples per tensor among the outputs.
    """

    module: nn.Module
    args: tuple[Any, ...]  # whatever the module takes
    kwargs: dict[str, Any]
    axes: tuple[int | None, ...]
    num_examples: int
    grads: list[Tensor | None] = field(default_factory=list)
    rng_state: Tensor | None = None
    output_axes: tuple[int | None, ...] = ()

    @property
    def input(self) -> Tensor:
        """The only tensor input of a layer, examples first."""
        tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        axis = self.axes[0]
        assert isinstance(tensor, Tensor)
        assert axis is not None
        return examples_first(tensor, axis)

    @property
    def output_grad(self) -> Tensor:
        """The gradient of a layer's only output, examples first."""
        grad, axis = self.grads[0], self.axes[0]
        assert grad is not None
        assert axis is not None
        return examples_first(grad, axis)


def widen(tensor: Tensor) -> Tensor:
    """Return half-precision tensors in float32; their squares overflow."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor


def row_sq_norms(tensor: Tensor) -> Tensor:
    """Return the squared norm of every row of ``tensor`` (rows on axis 0)."""
    norms: Tensor = torch.linalg.vector_norm(widen(tensor).flatten(1), dim=1)
    return norms.square_()


def row_slices(num_examples: int, elements: int) -> Iterator[slice]:
    """Yield slices of the examples so that ``elements`` each fit into the memory."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements))
    for start in range(0, num_examples, step):
        yield slice(start, min(start + step, num_examples))


def over_rows(
    function: Callable[[slice], Tensor], num_examples: int, elements: int
) -> Tensor:
    """Concatenate ``function`` over slices of examples."""
    parts = [function(rows) for rows in row_slices(num_examples, elements)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class LayerRule(ABC):
    """How to read one kind of layer."""

    name: ClassVar[str]

    @abstractmethod
    def applies(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind and computes what it should."""

    @abstractmethod
    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Axes that may run over the examples, of the tensor input at ``position``."""

    @abstractmethod
    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Per-example gradients of the parameters ``names`` for ``rows``."""

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """Squared norm per example of the parameters ``names``; the general form."""
        return {
            name: over_rows(
                lambda rows, name=name: row_sq_norms(  # type: ignore[misc]
                    self.example_grads(call, (name,), rows)[name]
                ),
                call.num_examples,
                call.module.get_parameter(name).numel(),
            )
            for name in names
        }

    def inner_products(self, call: LayerCall, tangents: dict[str, Tensor]) -> Tensor:
        """Inner product per example of its gradient with ``tangents``.

        The layers that have rules are linear in their parameters, so that it is the
        output gradient times the layer's output with the tangents as parameters.
        """
        weights = {
            name: tangents.get(name, torch.zeros_like(parameter))
            for name, parameter in call.module.named_parameters(recurse=False)
        }
        output = torch.func.functional_call(
            call.module, weights, call.args, call.kwargs
        )
        axis = call.axes[0]
        assert axis is not None
        products = widen(examples_first(output, axis)) * widen(call.output_grad)
        return products.flatten(1).sum(1)


class LinearRule(LayerRule):
    """``nn.Linear`` with any leading dimensions."""

    name = "linear"

    def applies(self, module: nn.Module) -> bool:
        """Whether ``module`` computes ``nn.Linear``'s own function."""
        return is_plain(module, nn.Linear)

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """All but the features."""
        return range(len(shape) - 1)

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """Two row norms, a product of Gram matrices, or the gradients themselves."""
        inputs, grads = _positions(call)
        if inputs.shape[1] == 1:
            bias = row_sq_norms(grads)
            both = {"weight": row_sq_norms(inputs) * bias, "bias": bias}
            return {name: both[name] for name in names}
        found = {}
        if "weight" in names:
            found["weight"] = self._weight_sq_norms(inputs, grads)
        if "bias" in names:
            found["bias"] = row_sq_norms(grads.sum(1))
        return found

    def _weight_sq_norms(self, inputs: Tensor, grads: Tensor) -> Tensor:
        num_examples, positions, fan_in = inputs.shape
        fan_out = grads.shape[2]
        if positions * (fan_in + fan_out) < fan_in * fan_out:
            return over_rows(
                lambda rows: _gram_product(inputs[rows], grads[rows]),
                num_examples,
                2 * positions**2,
            )
        return over_rows(
            lambda rows: row_sq_norms(grads[rows].mT @ inputs[rows]),
            num_examples,
            fan_in * fan_out,
        )

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Outer products summed over positions."""
        inputs, grads = (tensor[rows] for tensor in _positions(call))
        found = {}
        if "weight" in names:
            found["weight"] = grads.mT @ inputs
        if "bias" in names:
            found["bias"] = grads.sum(1)
        return found


class EmbeddingRule(LayerRule):
    """``nn.Embedding``: rows of the table are summed over equal indices."""

    name = "embedding"

    def applies(self, module: nn.Module) -> bool:
        """Whether it is dense and counts every occurrence alike."""
        return (
            is_plain(module, nn.Embedding)
            and not module.sparse
            and not module.scale_grad_by_freq
        )

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Any axis of the indices."""
        return range(len(shape))

    def sq_norms(self, call: LayerCall, names: Collection[str]) -> dict[str, Tensor]:
        """Inner products of output gradients over the pairs of equal indices."""
        indices, grads = self._occurrences(call)
        num_examples, positions = indices.shape

        def sq_norms(rows: slice) -> Tensor:
            equal = indices[rows, :, None] == indices[rows, None, :]
            gram = grads[rows] @ grads[rows].mT
            return gram.mul_(equal).sum((1, 2))

        return {"weight": over_rows(sq_norms, num_examples, 2 * positions**2)}

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """The whole table per example."""
        indices, grads = (tensor[rows] for tensor in self._occurrences(call))
        num_rows, width = call.module.get_parameter("weight").shape
        table = grads.new_zeros(len(indices), num_rows, width)
        index = indices[:, :, None].expand(-1, -1, width)
        return {"weight": table.scatter_add_(1, index, grads)}

    def inner_products(self, call: LayerCall, tangents: dict[str, Tensor]) -> Tensor:
        """Rows of the tangent looked up, times the output gradient."""
        indices, grads = self._occurrences(call)
        return (functional.embedding(indices, tangents["weight"]) * grads).sum((1, 2))

    @staticmethod
    def _occurrences(call: LayerCall) -> tuple[Tensor, Tensor]:
        """Indices ``(N, T)`` and output gradients ``(N, T, d)``, padding at zero."""
        module = call.module
        assert isinstance(module, nn.Embedding)
        indices = call.input.reshape(call.num_examples, -1)  # (N, T)
        grads = widen(call.output_grad).reshape(*indices.shape, -1)
        if module.padding_idx is not None:
            grads = grads * (indices != module.padding_idx)[:, :, None]
        return indices, grads


class NormRule(LayerRule):
    """Layer, group, RMS and, at frozen statistics, batch normalisation.

    Their parameters are small, so that per-example gradients are formed.
    """

    name = "normalisation"
    _KINDS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    _BATCH_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def applies(self, module: nn.Module) -> bool:
        """Whether it is one of the kinds; a coupled BatchNorm is found elsewhere."""
        kinds = (*self._KINDS, *self._BATCH_KINDS)
        return any(is_plain(module, kind) for kind in kinds)

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Axis 0, or any before the normalised ones."""
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return range(len(shape) - len(module.normalized_shape))
        return range(1)

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Sums over positions of the output gradient, times the normalised input."""
        grads = widen(call.output_grad[rows])
        found = {}
        if "weight" in names:
            normalised = _normalised(call.module, widen(call.input[rows]))
            found["weight"] = _sum_positions(call.module, grads * normalised)
        if "bias" in names:
            found["bias"] = _sum_positions(call.module, grads)
        return found


def _normalised(module: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(
            inputs, list(module.normalized_shape), eps=module.eps
        )
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    return functional.batch_norm(
        inputs, module.running_mean, module.running_var, eps=module.eps
    )


def _sum_positions(module: nn.Module, products: Tensor) -> Tensor:
    """Sum over every axis but the examples and those of the parameter."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        last = products.dim() - len(module.normalized_shape)
        return products.sum(tuple(range(1, last))) if last > 1 else products
    last = products.dim()
    return products.sum(tuple(range(2, last))) if last > 2 else products


def _positions(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Input and output gradient with all positions on one axis: ``(N, T, d)``."""
    inputs, grads = widen(call.input), widen(call.output_grad)
    if grads.dtype != inputs.dtype:  # autocast: the layer rounded its own input
        inputs = inputs.to(grads.dtype)
    if inputs.dim() == 2:
        return inputs.unsqueeze(1), grads.unsqueeze(1)
    return inputs.flatten(1, -2), grads.flatten(1, -2)


def _gram_product(inputs: Tensor, grads: Tensor) -> Tensor:
    gram = inputs @ inputs.mT
    return gram.mul_(grads @ grads.mT).sum((1, 2))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` runs ``kind``'s own forward on its own parameters.

    Parametrised, weight-normed and monkeypatched layers do not.
    """
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in vars(module)
        and set(module._parameters) <= {"weight", "bias"}
        and "weight" in module._parameters
    )

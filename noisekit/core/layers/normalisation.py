"""Rules for normalisation layers, whose per-example gradients are small.

What costs is going over the activations: the mean and the reciprocal deviation are
taken from the layer's own backward pass where it keeps them, so that the input is not
normalised a second time.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from noisekit.core.layers.batch_axis import examples_first
from noisekit.core.layers.rule import LayerCall, LayerRule, is_plain, widen

_BATCH_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_KINDS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class FeatureNormRule(LayerRule):
    """``nn.LayerNorm`` and ``nn.RMSNorm``, which normalise their last axes."""

    name = "normalisation"

    def applies(self, module: nn.Module) -> bool:
        """Whether ``module`` computes either kind's own function."""
        return is_plain(module, nn.LayerNorm) or is_plain(module, nn.RMSNorm)

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Any axis before the normalised ones."""
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        return range(len(shape) - len(module.normalized_shape))

    def statistics(self, output: Tensor) -> tuple[Tensor, ...]:
        """Mean and reciprocal deviation, from the layer's own graph."""
        return saved_statistics(output, "NativeLayerNormBackward0")

    def working_size(self, call: LayerCall, names: Collection[str]) -> int:
        """One example's activations."""
        return call.input[0].numel()

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """Sums over positions of the output gradient, times the normalised input."""
        shape = call.module.get_parameter("weight").shape
        size = (rows.stop - rows.start, -1, shape.numel())
        grads = widen(call.output_grad[rows]).reshape(size)  # (n, T, d)
        found = {}
        if "weight" in names:
            inputs = widen(call.input[rows]).reshape(size)
            found["weight"] = self._weight_grads(call, inputs, grads, rows)
        if "bias" in names:
            found["bias"] = grads.sum(1)
        return {name: grad.reshape(-1, *shape) for name, grad in found.items()}

    def _weight_grads(
        self, call: LayerCall, inputs: Tensor, grads: Tensor, rows: slice
    ) -> Tensor:
        """``sum_t b_t (x_t - m_t) r_t``: two products with the statistics."""
        means, factors = _feature_statistics(call, inputs, rows)  # (n, 1, T)
        if inputs.shape[1] == 1:  # products with one row are slower than none
            centred = inputs if means is None else inputs - means
            return (centred * factors).mul_(grads)[:, 0]
        found = (factors @ (grads * inputs))[:, 0]
        if means is not None:
            found -= ((factors * means) @ grads)[:, 0]
        return found


def _feature_statistics(
    call: LayerCall, inputs: Tensor, rows: slice
) -> tuple[Tensor | None, Tensor]:
    """Mean, where the layer has one, and reciprocal deviation of every position."""
    module, width = call.module, inputs.shape[2]
    if isinstance(module, nn.RMSNorm):
        eps = torch.finfo(call.input.dtype).eps if module.eps is None else module.eps
        norms: Tensor = torch.linalg.vector_norm(inputs, dim=2, keepdim=True)
        return None, norms.square_().div_(width).add_(eps).rsqrt_().mT
    assert isinstance(module, nn.LayerNorm)
    if call.statistics:
        axis = call.axes[0]
        assert axis is not None
        found = tuple(examples_first(s, axis)[rows] for s in call.statistics)
    else:
        found = torch.native_layer_norm(inputs, (width,), None, None, module.eps)[1:]
    means, factors = (s.reshape(len(inputs), 1, -1) for s in found)
    return means.to(inputs.dtype), factors.to(inputs.dtype)


class ChannelNormRule(LayerRule):
    """Group and instance normalisation, and BatchNorm at frozen statistics.

    None of them couples the examples: an instance normalisation that tracks running
    statistics writes them while it trains and reads them in evaluation only.
    """

    name = "normalisation"

    def applies(self, module: nn.Module) -> bool:
        """Whether it is one of the kinds; a coupled BatchNorm is found elsewhere."""
        kinds = (nn.GroupNorm, *_INSTANCE_KINDS, *_BATCH_KINDS)
        return any(is_plain(module, kind) for kind in kinds)

    def example_axes(
        self, module: nn.Module, shape: torch.Size, position: int = 0
    ) -> range:
        """Axis 0; what instance normalisation takes without a batch axis has none."""
        if isinstance(module, _InstanceNorm):
            unbatched: int = module._get_no_batch_dim()  # type: ignore[no-untyped-call]
            return range(int(len(shape) > unbatched))
        return range(1)

    def statistics(self, output: Tensor) -> tuple[Tensor, ...]:
        """Mean and reciprocal deviation of every group, from the layer's own graph."""
        return saved_statistics(output, "NativeGroupNormBackward0")

    def working_size(self, call: LayerCall, names: Collection[str]) -> int:
        """One example's activations."""
        return call.input[0].numel()

    def example_grads(
        self, call: LayerCall, names: Collection[str], rows: slice
    ) -> dict[str, Tensor]:
        """One fused reduction, the channels of all examples as groups of their own."""
        inputs, grads = widen(call.input[rows]), widen(call.output_grad[rows])
        count, channels = inputs.shape[:2]
        grads = grads.reshape(count, channels, -1)  # (n, C, T)
        if "weight" not in names:
            return {"bias": grads.sum(2)}
        inputs = inputs.reshape(grads.shape)
        means, factors = _channel_statistics(call, inputs, rows)  # (n, G)
        _, weight, bias = torch.ops.aten.native_group_norm_backward(
            grads.reshape(1, count * channels, -1).contiguous(),
            inputs.reshape(1, count * channels, -1).contiguous(),
            means.reshape(1, -1).to(grads.dtype),
            factors.reshape(1, -1).to(grads.dtype),
            None,
            1,
            count * channels,
            grads.shape[2],
            means.numel(),
            [False, True, "bias" in names],
        )
        found = {"weight": weight.view(count, channels)}
        if "bias" in names:
            found["bias"] = bias.view(count, channels)
        return found


def _channel_statistics(
    call: LayerCall, inputs: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation ``(n, G)`` of every example's groups."""
    module, (count, channels, positions) = call.module, inputs.shape
    if isinstance(module, nn.GroupNorm):
        if call.statistics:
            means, factors = (widen(s[rows]) for s in call.statistics)
            return means, factors
        groups, eps = module.num_groups, module.eps
    else:
        assert isinstance(module, _InstanceNorm | _BatchNorm)
        groups, eps = channels, module.eps
        if module.running_mean is not None and not module.training:
            assert module.running_var is not None
            factors = (widen(module.running_var) + eps).rsqrt()
            shape = (count, channels)
            return widen(module.running_mean).expand(shape), factors.expand(shape)
    _, means, factors = torch.native_group_norm(
        inputs.contiguous(), None, None, count, channels, positions, groups, eps
    )
    return means, factors


def saved_statistics(output: Tensor, kind: str) -> tuple[Tensor, ...]:
    """Return the statistics that the operation ``kind`` keeps for its backward pass.

    Nothing where saved tensors go through hooks: unpacking them may run a forward
    pass again.
    """
    node = output.grad_fn
    if type(node).__name__ != kind or _saved_tensors_are_hooked():
        return ()
    return node._saved_result1, node._saved_result2  # type: ignore[union-attr]


def _saved_tensors_are_hooked() -> bool:
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None

"""The quadratic penalty that weight decay adds to a risk, by parameter."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from noisekit.core.errors import UsageError
from noisekit.core.params import ParameterLayout, flatten
from noisekit.core.risk import EmpiricalRisk
from noisekit.core.settings import NonNegative

WeightDecay = NonNegative | Optimizer


def decay_by_parameter(decay: WeightDecay, risk: EmpiricalRisk) -> dict[str, float]:
    r"""Return the factor ``λ`` of the penalty ``λ/2 |w|²`` of each parameter.

    Args:
        decay: One factor for all, or an optimizer whose parameter groups state it.
        risk: Whose chosen parameters.

    Raises:
        UsageError: If a factor is negative, the optimizer misses a parameter, or its
            decay is decoupled from the gradient, so that it is no penalty.
    """
    if not isinstance(decay, Optimizer):
        return dict.fromkeys(risk.layout.names, float(decay))
    result: dict[int, float] = {}
    for group in decay.param_groups:
        factor = float(group.get("weight_decay", 0.0))
        if factor and _is_decoupled(decay, group):
            raise UsageError(
                "weight_decay needs an optimizer that adds its decay to the gradient, "
                f"got {type(decay).__name__}, whose decay of {factor:g} is decoupled "
                "and is no term of the risk; leave it out, or pass a number."
            )
        result.update({id(p): factor for p in group["params"]})
    named = dict(zip(risk.layout.names, risk.parameters, strict=True))
    missing = [name for name, p in named.items() if id(p) not in result]
    if missing:
        raise UsageError(
            "weight_decay needs the optimizer of all chosen parameters, got one "
            f"without {missing[0]!r} ({len(missing)} missing); choose others with "
            "params=, or pass a number."
        )
    return {name: result[id(p)] for name, p in named.items()}


def decay_vector(
    factors: dict[str, float], layout: ParameterLayout, dtype: torch.dtype
) -> Tensor | None:
    """Return the factors as one flat vector; ``None`` where all are zero."""
    if not any(factors.values()):
        return None
    return flatten(
        torch.full((size,), factors[name], dtype=dtype, device=layout.device)
        for name, size in zip(layout.names, layout.sizes, strict=True)
    )


# The group is a dictionary of whatever options the optimizer has.
def _is_decoupled(optimizer: Optimizer, group: dict[str, object]) -> bool:
    decoupled = group.get("decoupled_weight_decay", False)
    return bool(decoupled) or isinstance(optimizer, torch.optim.AdamW)

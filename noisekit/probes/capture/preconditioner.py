"""What an adaptive optimizer multiplies the gradient by, at the start of a step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError

_KINDS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop)


class Preconditioner:
    r"""``P = 1 / (sqrt(v / (1 - β₂ᵗ)) + ε)`` of Adam's kind, one entry per parameter.

    Taken from the state that the step *starts* from: it does not depend on the
    step's own batch, so that ``tr(P Σ P)`` and ``|P G|²`` stay unbiased.

    Source:
        Qiao et al. 2021 (Pollux), arXiv:2008.12260, section 3.1.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Look at ``optimizer``'s state, which is read anew at each step.

        Raises:
            UsageError: If the optimizer has no diagonal preconditioner.
        """
        if not isinstance(optimizer, _KINDS):
            known = ", ".join(kind.__name__ for kind in _KINDS)
            raise UsageError(
                f"estimator='preconditioned' needs one of {known}, got "
                f"{type(optimizer).__name__}; leave it out."
            )
        self._optimizer = optimizer
        self._parameters = parameters
        self._groups = {
            id(p): group for group in optimizer.param_groups for p in group["params"]
        }
        self._scales: dict[int, Tensor] = {}

    def start_step(self) -> None:
        """Forget what belonged to the step before."""
        self._scales = {}

    @torch.no_grad()
    def scale_of(self, index: int) -> Tensor | None:
        """Return the diagonal of ``P`` for a parameter; ``None`` before its first step.

        Kept for the rest of the step.
        """
        if index not in self._scales:
            parameter = self._parameters[index]
            state = self._optimizer.state.get(parameter, {})
            group = self._groups.get(id(parameter))
            if group is None or not _second_moment(state):
                return None
            self._scales[index] = _scale(state, group)
        return self._scales[index]


def _second_moment(state: dict[str, Any]) -> str:  # an optimizer's own state
    names = ("max_exp_avg_sq", "exp_avg_sq", "square_avg")
    return next((name for name in names if name in state), "")


def _scale(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    moment: Tensor = state[_second_moment(state)]
    centre = state.get("grad_avg")
    if centre is not None:  # centred RMSprop
        moment = moment - centre.square()
    root = moment.float().sqrt() if moment.dtype.itemsize < 4 else moment.sqrt()
    if "betas" in group:
        step = state["step"]
        # Without a host sync: ``step`` may be a tensor on the parameters' device.
        correction = 1 - group["betas"][1] ** torch.as_tensor(step, dtype=root.dtype)
        root = root / correction.sqrt().to(root.device)
    return (root + float(group["eps"])).reciprocal()

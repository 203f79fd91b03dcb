"""What quantities take of a step beside its noise, on one rank or of all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noisekit.noise.step_quantity import HessianForms
from noisekit.probes.capture.step_weights import Number


@dataclass(frozen=True, slots=True)
class StepParts:
    """Parts that add up over ranks; a text says why one is not known.

    Attributes:
        loss: Mean loss of the examples [loss].
        positions: By parameter ``(Q,)``: of convolutions ``sum_i sum_p x_ip² z_ip²``,
            the second moment with positions apart [loss²/param²].
        convolutions: Which parameters those are.
        rates: Learning rates, by parameter or of all.
        hessian: Curvature along chunks' gradients.
        num_chunks: How many chunks these have on every rank.
    """

    loss: Tensor | str
    positions: Tensor | str
    convolutions: Sequence[int]
    rates: Tensor | float
    hessian: HessianForms | str
    num_chunks: int

    @staticmethod
    def size(num_params: int, num_chunks: int) -> int:
        """Entries of the vector that is summed over ranks."""
        return 2 + 1 + num_params + 3 + num_chunks**2

    def packed(self, weight: Number, like: Tensor) -> Tensor:
        """Return this rank's vector.

        Args:
            weight: What the rank's mean counts in the mean over all.
            like: One entry per parameter, on the right device.
        """
        forms, size = self.hessian, 0.0
        if isinstance(forms, HessianForms):
            size = float(forms.chunk_size)
        known = (
            not isinstance(self.loss, str),
            not isinstance(self.positions, str),
            not isinstance(forms, str),
        )
        nothing = like.new_zeros(like.shape, dtype=torch.float64)
        loss = nothing[:1] if isinstance(self.loss, str) else self.loss * weight
        places = nothing
        if not isinstance(self.positions, str):
            places = self.positions.double() * weight**2
        curves = nothing.new_zeros(self.num_chunks**2)
        if isinstance(forms, HessianForms):
            curves = forms.values.double().reshape(-1)

        def number(value: float) -> Tensor:
            return nothing.new_full((1,), value)

        return torch.cat(
            [
                number(float(known[0])),
                loss.double().reshape(1),
                number(float(known[1])),
                places,
                number(float(known[2])),
                number(size),
                number(size**2),
                curves,
            ]
        )

    def of_all(self, sums: Tensor, total: float, num_active: float) -> "StepParts":
        """Return the parts of all ranks' examples together.

        Args:
            sums: The sum of all ranks' vectors, on the host.
            total: What all ranks' means count together.
            num_active: Ranks that took part.
        """
        num_params = len(sums) - self.size(0, self.num_chunks)
        has_loss, loss, has_places = sums[0], sums[1], sums[2]
        places = sums[3 : 3 + num_params]
        has_forms, size, size_sq = sums[3 + num_params : 6 + num_params].tolist()
        forms: HessianForms | str = self.hessian
        if has_forms < num_active:
            forms = _fault(self.hessian, has_forms, num_active)
        elif size_sq * num_active != size**2:
            forms = "the ranks' chunks are of different sizes"
        elif isinstance(forms, HessianForms):
            values = sums[6 + num_params :].reshape(forms.values.shape) / num_active
            forms = HessianForms(values, forms.chunk_size)
        return replace(
            self,
            loss=loss / total
            if float(has_loss) == num_active
            else _fault(self.loss, float(has_loss), num_active),
            positions=places / total**2
            if float(has_places) == num_active
            else _fault(self.positions, float(has_places), num_active),
            rates=self.rates.cpu() if isinstance(self.rates, Tensor) else self.rates,
            hessian=forms,
        )


def _fault(own: object, num_known: float, num_active: float) -> str:
    """This rank's own reason, or that others have one."""
    if isinstance(own, str):
        return own
    return f"only {num_known:g} of {num_active:g} ranks could read their examples"

"""Which parameters a measurement is about, and how they lie in one flat vector."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from noisekit.core.arguments import shown
from noisekit.core.errors import (
    DeviceMismatchError,
    NoParametersError,
    UsageError,
)

ParameterPatterns = str | Iterable[str] | None


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """How named parameters lie one after another in a flat vector.

    Attributes:
        names: One name per parameter, the first where several share it.
        shapes: Their shapes, in the same order.
        sizes: Their numbers of real coordinates, two for a complex element.
        dtype: The real type of the flat vector; the widest of the parameters'.
        device: Where all of them are.
        is_complex: Which of them are complex: real and imaginary parts alternate.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_complex: tuple[bool, ...]

    @property
    def num_params(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    @property
    def fingerprint(self) -> str:
        """Hash of names and shapes; vectors of equal fingerprints are comparable."""
        text = "\n".join(
            f"{name} {tuple(shape)}"
            for name, shape in zip(self.names, self.shapes, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return one view of ``vector`` per parameter, in its shape.

        Complex parameters have tensors of their own.

        Raises:
            UsageError: If ``vector`` is not of shape ``(num_params,)``.
        """
        if vector.shape != (self.num_params,):
            raise UsageError(
                f"a flat vector of these parameters needs shape ({self.num_params},), "
                f"got {tuple(vector.shape)}; build it with flatten()."
            )
        if vector.device != self.device:
            raise DeviceMismatchError(
                f"a flat vector of these parameters needs to be on {self.device}, got "
                f"one on {vector.device}; move it with .to()."
            )
        parts = torch.split(vector, list(self.sizes))
        return tuple(
            # Not a view: that needs the pair to start at an even place in memory.
            torch.complex(*p.view(*s, 2).unbind(-1)) if c else p.view(s)
            for p, s, c in zip(parts, self.shapes, self.is_complex, strict=True)
        )


def select_parameters(
    model: nn.Module, params: ParameterPatterns = None
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that ``params`` names, each shared one once.

    Args:
        model: Where to look.
        params: Names or ``fnmatch`` patterns such as ``"layers.*.weight"``; all by
            default. A shared parameter may be named by any of its names.

    Raises:
        NoParametersError: If there is no trainable parameter, or a pattern matches
            none.
    """
    aliases = _trainable_aliases(model)
    if not aliases:
        total = sum(1 for _ in model.parameters())
        raise NoParametersError(
            f"needs at least one trainable parameter, got {total} parameters without "
            f"requires_grad in {type(model).__name__}; set requires_grad_(True) on "
            "those to be measured."
        )
    if params is None:
        return {names[0]: parameter for names, parameter in aliases}
    patterns = _as_patterns(params)
    for pattern in patterns:
        if not any(_matches(names, pattern) for names, _ in aliases):
            raise NoParametersError(_nothing_matches(pattern, aliases))
    chosen = {
        names[0]: parameter
        for names, parameter in aliases
        if any(_matches(names, pattern) for pattern in patterns)
    }
    if not chosen:
        raise NoParametersError("params needs at least one name or pattern, got none.")
    return chosen


def layout_of(
    named: Mapping[str, Tensor], precision: torch.dtype | None = None
) -> ParameterLayout:
    """Return how the tensors of ``named`` lie in a flat vector.

    Args:
        named: Tensors by their names.
        precision: Least type of the flat vector; that of the tensors by default.

    Raises:
        DeviceMismatchError: If they are on more than one device.
    """
    tensors = tuple(named.values())
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise DeviceMismatchError(
            "parameters measured together need one device, got "
            f"{', '.join(devices)}; move the model or select one part with params=."
        )
    dtype = precision or tensors[0].dtype.to_real()
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype.to_real())
    return ParameterLayout(
        names=tuple(named),
        shapes=tuple(t.shape for t in tensors),
        sizes=tuple(t.numel() * (1 + t.is_complex()) for t in tensors),
        dtype=dtype,
        device=tensors[0].device,
        is_complex=tuple(t.is_complex() for t in tensors),
    )


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return all elements as one real vector, in order; a copy.

    Of complex elements the real and the imaginary part.
    """
    return torch.cat(
        [
            (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1)
            for t in tensors
        ]
    )


def _as_patterns(params: object) -> tuple[str, ...]:
    """One name or several as a tuple; refuse others."""
    texts = (params,) if isinstance(params, str) else params
    if isinstance(texts, Iterable) and not isinstance(texts, Tensor | nn.Module):
        names = tuple(texts)
        if all(isinstance(text, str) for text in names):
            return names
    raise UsageError(
        f"params needs names or patterns such as 'layers.*.weight', got "
        f"{shown(params)}; list(dict(model.named_parameters())) has the names."
    )


def _trainable_aliases(
    model: nn.Module,
) -> list[tuple[list[str], nn.Parameter]]:
    """Every trainable parameter once, with all of its names in order."""
    result: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            result.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(result.values())


def _matches(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _nothing_matches(
    pattern: str, aliases: list[tuple[list[str], nn.Parameter]]
) -> str:
    names = [name for group, _ in aliases for name in group]
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return (
        f"params needs patterns that match trainable parameters, got {pattern!r}, "
        f"which matches none; there are: {shown}."
    )

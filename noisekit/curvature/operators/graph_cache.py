"""Autograd-graph cache: memory estimate, and invalidation when the model changes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from noisekit.core.errors import UsageError
from noisekit.core.graph_check import graph_nodes

_UNKNOWN = 2**62
"""Stands for a memory that cannot be counted [bytes]."""


def graph_bytes(build: Callable[[], object], model: nn.Module) -> int:
    """Return the memory that the graphs made by ``build`` hold besides weights [bytes].

    What ``build`` returns is dropped. Where it calls ``torch.func``, which forbids the
    hooks that count, the answer is more than any budget, so that no graph is kept.
    """
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    result: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            result[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made = build()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return _UNKNOWN
    del made
    return sum(result.values())


def model_state(model: nn.Module, vector: Tensor) -> tuple[object, ...]:
    """Return a fingerprint of parameters and buffers, sensitive to writes by ``.data``.

    Args:
        model: Whose state.
        vector: Its chosen parameters as one flat vector.
    """
    # Version counters show in-place writes, two linear functionals writes by .data.
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    ramp = torch.linspace(0.5, 1.5, len(vector), device=vector.device)
    sums = torch.stack([vector.sum(), vector @ ramp.to(vector.dtype)])
    return (*versions, *sums.tolist())


@contextmanager
def explain_missing_derivatives() -> Iterator[None]:
    """Raise PyTorch's missing second derivatives as an error with the way out.

    Raises:
        UsageError: In its place.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if "derivative" in text and "not" in text and not isinstance(error, UsageError):
            raise UsageError(
                "the product needs second derivatives of every operation in the "
                f"model, got one without: {text.splitlines()[0]}; replace that layer "
                "(EmbeddingBag by Embedding and a sum, for one), leave its parameters "
                "out with params=, or take form='finite_difference'."
            ) from error
        raise


def check_twice_differentiable(outputs: Iterable[Tensor]) -> None:
    """Raise where autograd would silently omit a term of a second derivative.

    A kernel without a second derivative gets a backward node that raises, but autograd
    runs a node only if it leads to the parameters, and this one does not.

    Raises:
        RuntimeError: As PyTorch does where it notices by itself.
    """
    if any(node.name() == "torch::autograd::Error" for node in graph_nodes(outputs)):
        raise RuntimeError(
            "a kernel of the model has a derivative that is not differentiable"
        )

"""How much memory a computation holds at most, counted in live tensors."""

import weakref
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class _LiveStorages(TorchDispatchMode):
    """Follows every large storage from the operation that makes it to its end."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.most = 0
        self._at_least = at_least
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operation and note what it made."""
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, given)
        return result

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        count = storage.nbytes() // tensor.element_size()
        if storage._cdata in given | self._known or count < self._at_least:
            return
        self._known.add(storage._cdata)
        self._now += count
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, storage._cdata, count)

    def _forget(self, key: int, count: int) -> None:
        self._known.discard(key)
        self._now -= count


def largest_memory(run: Callable[[], T], *, at_least: int) -> tuple[T, int]:
    """Return the result of ``run`` and the most elements its large tensors held.

    Only tensors of ``at_least`` elements count: vectors of all parameters and blocks
    of them, not the pieces that a product is made of.
    """
    with _LiveStorages(at_least) as storages:
        result = run()
    return result, storages.most

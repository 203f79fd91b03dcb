"""Text for language models: the topics of Python's own help, character by character."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from noisekit.train.data.section import DataSection, Pools, TensorPair
from noisekit.train.section import PositiveInt

_FIRST, _LAST = ord(" "), ord("~")
_NUM_TOKENS = _LAST - _FIRST + 2


class Text(DataSection):
    """The help topics of Python's standard library, about 465,000 characters.

    An example is a stretch of ``context`` characters; its targets are the characters
    that follow each of them. Examples do not overlap, so that no example's inputs are
    in another split; the last target of one is the first input of the next in the
    text. Tokens are the line feed and the printable characters of ASCII, 96 in all;
    others become a question mark. The text differs between versions of Python.

    Attributes:
        context: Characters of an example.
    """

    name: Literal["text"] = "text"
    context: PositiveInt = 64

    tokens: ClassVar[bool] = True

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """A sequence of tokens."""
        return (self.context,)

    @property
    def known_classes(self) -> int:
        """The number of different tokens."""
        return _NUM_TOKENS

    def read(self, *, allow_download: bool) -> Pools:
        """Return all whole stretches, in the order of the topics' names."""
        from pydoc_data.topics import topics

        tokens = encode("\n".join(topics[name] for name in sorted(topics)))
        count = (len(tokens) - 1) // self.context
        whole = count * self.context
        inputs = tokens[:whole].reshape(count, self.context)
        targets = tokens[1 : whole + 1].reshape(count, self.context)
        pool = TensorPair(inputs, targets)
        return Pools(pool, None, _NUM_TOKENS, "pydoc_data.topics of this Python")


def encode(text: str) -> Tensor:
    """Return the token of each character: 0 for a line feed, then ASCII's order.

    Example:
        >>> encode(" A~é").tolist()
        [1, 34, 95, 32]
    """
    codes = torch.tensor([ord(character) for character in text], dtype=torch.int64)
    printable = (codes >= _FIRST) & (codes <= _LAST)
    tokens = torch.where(printable, codes - _FIRST + 1, ord("?") - _FIRST + 1)
    return torch.where(codes == ord("\n"), 0, tokens)

"""How many tokens a layer was fed."""

import torch
from torch import Tensor


class TokenClock:
    """The columns that a layer was fed, padding included.

    tensor: the same number as a tensor [] int64, in layers whose steps are compiled: such a step advances it without
    reading it, so the number is not known on the host until it is asked for. None in other layers.
    """

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self._seen: int | None = 0

    @property
    def seen(self) -> int:
        """Columns fed so far; in a compiled step the tensor, as in transformers' static layers."""
        if self.tensor is not None:
            if torch.compiler.is_compiling():
                return self.tensor  # type: ignore[return-value]
            if self._seen is None:
                # reading a tensor means waiting for the GPU
                self._seen = int(self.tensor)
        assert self._seen is not None
        return self._seen

    def advance(self, tokens: int) -> None:
        """Counts so many more columns, or fewer if negative."""
        if self.tensor is not None:
            self.tensor.add_(tokens)
            if torch.compiler.is_compiling():
                self._seen = None
                return
        if self._seen is not None:
            self._seen += tokens

    def begin_at(self, seen: int) -> None:
        """Sets how many columns were fed."""
        if self.tensor is not None:
            self.tensor.fill_(seen)
        self._seen = seen

    def count_on(self, tensor: Tensor, seen: int | None = None) -> None:
        """Continues from a tensor's number, in this tensor; seen: the number, if it is known."""
        self.tensor, self._seen = tensor, seen

"""How attention makes logits of queries and keys."""

from typing import NamedTuple

from torch import Tensor


class LogitSpec(NamedTuple):
    """How a query and a key make a logit, and how far back a query sees. Every op that computes logits takes one.

        logit = scale * q.k        or, with a softcap c,        c * tanh(scale * q.k / c)

    scale: factor of q.k, greater than 0, in most models head_dim ** -0.5.
    window: number of tokens that a query sees, itself included: positions greater than its own less `window`. None: all
        positions up to its own.
    softcap: bound of the logits, which lie between -softcap and softcap. None: no bound.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether logits are only scaled, and all earlier tokens are seen: what fused attention can do."""
        return self.window is None and self.softcap is None

    def within(self, tokens: int) -> "LogitSpec":
        """The same for a chunk of so many tokens: without a window that would leave none of them out."""
        if self.window is None or self.window < tokens:
            return self
        return LogitSpec(self.scale, None, self.softcap)

    def doubled(self) -> "LogitSpec":
        """The same for logits twice as large, whose exponentials are the squares."""
        return LogitSpec(2 * self.scale, self.window, None if self.softcap is None else 2 * self.softcap)

    def cap_(self, logits: Tensor) -> Tensor:
        """Bounds scaled products by the softcap, in place."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    @property
    def arguments(self) -> tuple[int, float, float]:
        """What a kernel takes: window, scale and softcap, 0 where there is none."""
        return self.window or 0, self.scale, self.softcap or 0.0

    @property
    def constants(self) -> dict[str, bool]:
        """What a kernel is compiled for: whether there is a window, and a softcap."""
        return {"WINDOWED": self.window is not None, "SOFTCAPPED": self.softcap is not None}

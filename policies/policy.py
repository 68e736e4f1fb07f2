"""What an evicting cache asks of a policy: a score for every token it might keep.

After each forward the cache holds its slots and the tokens just fed: the candidates. The policy scores them,
per sequence and per KV head; the cache always keeps the `recent` newest tokens and the first `sinks`, and of the
rest those that score highest, up to its budget. One policy object can serve many caches: what grows with a
sequence (scores, `Candidates.state`) belongs to the cache.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from kvcompress.policies.settings import settle, unknown_setting


class Rotary(Protocol):
    """A layer's rotary position embedding, as a policy may ask for it.

    Positions are integers that broadcast to x, [..., head_dim], without its head_dim.
    """

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Vectors without a position, turned to these positions."""

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Takes back `rotate`."""

    def rotate_average(self, x: Tensor, first: Tensor, count: int) -> Tensor:
        """The mean of `rotate(x, p)` over p = first, ..., first + count - 1."""


@dataclass
class Candidates:
    """The tokens to choose from: a cache's slots, then the tokens of the forward that just ended.

    positions: [batch, kv_heads, candidates] int32, place in the token's own sequence; -1 is an empty slot or padding.
    scores: [batch, kv_heads, candidates] float32, what the policy returned last time; 0 for a token just fed.
    attention: [batch, kv_heads, candidates] float32, attention received in this forward from the queries that the
        policy observes, summed over them and over the query heads of the group; None where it observes none.
    query: [batch, heads, queries, head_dim], this forward's queries; in models that do not run them all, as SwiftKV's,
        the last of them, as many as the policy needs.
    query_positions: [batch, queries] int32, the positions to which the queries are rotated (their places in the
        sequence, or among the tokens kept in a rerotated cache); for padding, at most one more than the
        newest real token's.
    visible: [batch, tokens fed] bool, False where the token is padding; None where none is.
    lengths: [batch] int32, real tokens of each sequence so far.
    parts: gives keys and values of the slots, then of the tokens just fed; read `keys` and `values` instead. Slots may
        have to be decoded for it.
    scale: factor of q.k in the layer's attention.
    state: tensors, batch first, that the policy wants to find again next time; they count as memory of the cache.
    rotary: the layer's rotary embedding, for a policy that says it `uses_rotary`; None where the layer has none.
    fed: tokens fed by the forward; None for as many as there are queries.
    mean_over_ranks: the mean of a tensor over the processes that share the layer's heads equally, for a policy that
        compares heads; None where this process has them all.
    is_ragged: heads hold different numbers of tokens, so that a place among the candidates of one is another token's
        among those of the next.
    """

    positions: Tensor
    scores: Tensor
    attention: Tensor | None
    query: Tensor
    query_positions: Tensor
    visible: Tensor | None
    lengths: Tensor
    parts: Callable[[], list[tuple[Tensor, Tensor]]]
    scale: float = 1.0
    state: dict[str, Tensor] = field(default_factory=dict)
    rotary: Rotary | None = None
    fed: int | None = None
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None
    is_ragged: bool = False

    @property
    def tokens_fed(self) -> int:
        """Tokens fed by the forward that just ended; 1 while decoding."""
        return self.query.shape[2] if self.fed is None else self.fed

    @property
    def queries(self) -> int:
        """Deprecated: `tokens_fed`."""
        warnings.warn("Candidates.queries is called tokens_fed now, and goes in 0.3", FutureWarning, stacklevel=2)
        return self.tokens_fed

    @property
    def keys(self) -> Tensor:
        """[batch, kv_heads, candidates, head_dim]."""
        return _joined([key for key, _ in self.parts()])

    @property
    def values(self) -> Tensor:
        """[batch, kv_heads, candidates, head_dim]."""
        return _joined([value for _, value in self.parts()])


@dataclass(frozen=True, kw_only=True)
class SecondReading:
    """How a text is read again.

    chunk: tokens of each sequence read at a time. prompt: token ids read before each chunk.
    keeps_answers: what is decoded afterwards stays, on top of the budget, until several tokens are fed again, and
        competes then. False: it competes at once.
    records: what `Candidates.attention` is of the second reading's attention: "maxima", over its queries; "squares",
        their sum, of the attention to the text alone.
    fits: tokens of each chunk whose queries what is kept is fitted to; 0: it stays as it was.
    """

    chunk: int
    prompt: tuple[int, ...] = ()
    keeps_answers: bool = False
    records: Literal["maxima", "squares"] = "maxima"
    fits: int = 0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Settings every policy has. Subclasses add their own and define `score`.

    recent: newest tokens always kept, at least 1: a count, or a fraction of the budget.
    sinks: first tokens always kept.
    """

    recent: int | float = 1
    sinks: int = 0

    # scores of a token never change, so only new tokens are scored
    static: ClassVar[bool] = False
    # keeps its sinks and the newest tokens, and none of the others
    chooses: ClassVar[bool] = True
    # whose scores it can rank against one another: those of a head alone, of the heads of a layer, or of all layers
    compares: ClassVar[Literal["no", "heads", "layers"]] = "no"
    # how layers and heads share a budget unless the cache is told otherwise
    allocates: ClassVar[Literal["uniform", "pyramid", "heads", "global"]] = "uniform"
    # wants `Candidates.rotary`; a model whose rotary embedding cannot be taken back is then refused
    uses_rotary: ClassVar[bool] = False

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Raises TypeError for a setting that it does not have, with the name that is most like it."""
        known = inspect.signature(cls.__init__).parameters.values()
        if not any(each.kind is each.VAR_KEYWORD for each in known):
            names = [each.name for each in known][1:]
            for name in settings:
                if name not in names:
                    raise unknown_setting(cls, name, names)
        return super().__new__(cls)

    def __init_subclass__(cls) -> None:
        if "memory" in vars(cls):
            warnings.warn(
                f"Policy.memory is called decay now: rename it in {cls.__name__}", FutureWarning, stacklevel=2
            )

    def __post_init__(self) -> None:
        settle(self)
        if isinstance(self.recent, float):
            if not 0.0 < self.recent <= 1.0:
                raise ValueError(f"recent must be a count of tokens or a fraction in (0, 1], got {self.recent}")
        elif self.recent < 1:
            raise ValueError(f"recent must be at least 1 token, the one just fed, got {self.recent}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be 0 tokens or more, got {self.sinks}")

    @property
    def observes(self) -> int | None:
        """How many of a forward's last queries the policy wants to see the attention of; None for all."""
        return 0

    @property
    def queries_needed(self) -> int | None:
        """How many of a forward's last queries must be run for the policy, where a model could leave them out; None
        for all. At least as many as it observes; a policy that reads `Candidates.query` overrides it."""
        return self.observes

    @property
    def rereads(self) -> SecondReading | None:
        """How a forward's tokens are fed to the model once more, for the policy to see what attends to them; None:
        nothing is read twice. `Candidates.attention` is then the most that any one query and head of the second
        reading gave; where a sequence was fed a single token, which is not read again, the sum over heads of what it
        gave."""
        return None

    @property
    def decay(self) -> float | None:
        """Where decoding scores by `decay * score + attention`, that factor: one kernel then does a whole step.
        None: scores come from `score` alone. The two must agree."""
        return None

    def state_bytes(self, heads: int, head_dim: int) -> int:
        """Bytes of `Candidates.state` per sequence and layer, for planning before anything runs."""
        return 0

    def score(self, candidates: Candidates) -> Tensor:
        """How much each candidate is worth keeping.

        Returns:
            [batch, kv_heads, candidates] float32. What it returns for empty slots and padding is not read.
        """
        raise NotImplementedError

    def least_budget(self) -> int:
        """The smallest budget in tokens that has room for the protected tokens and leaves the policy a choice."""
        return self.sinks + (1 if isinstance(self.recent, float) else self.recent) + self.chooses


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

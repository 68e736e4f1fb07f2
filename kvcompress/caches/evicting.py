"""Caches of fixed capacity that keep, per sequence and KV head, the tokens a policy scores highest.

Every forward ends with an eviction, in prefill and at every decode step: the tokens just fed join the slots, the
policy scores them all, and what is over the budget goes. Kept tokens stay at their true positions, or, with `rolled`,
move up (kvcompress/storage/rerotated.py). Attention of a forward is exact over what was kept before and all that it was
fed, causally.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf, policies
from kvcompress.cache import CompressedCache
from kvcompress.caches.budget import count_or_fraction
from kvcompress.caches.evicting_layer import EvictingLayer, RerotatedLayer
from kvcompress.caches.reconstruction import RereadLayer, read_again
from kvcompress.hf.tensor_parallel import TPGroup
from kvcompress.layer import CompressedLayer, as_stored, ordinary_tensors
from kvcompress.policies.allocation import Allocation, layer_budgets
from kvcompress.policies.gear import GEAR
from kvcompress.policies.h2o import H2O
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.policy import Policy
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.streaming_llm import StreamingLLM
from kvcompress.storage.rope import Rope


class EvictingCache(CompressedCache):
    """Keeps a budget of tokens, chosen by a policy: `EvictingCache(model, policy=SnapKV(window=32), budget=512)`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        policy: Policy,
        budget: int | float,
        allocation: Allocation = "uniform",
        rolled: bool = False,
        packed: GEAR | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            policy: what to keep.
            budget: tokens kept per sequence and KV head, on average over the layers: a count, or a fraction of the
                real tokens seen so far, which grows with them. Room is taken as it is needed, up to the budget.
            allocation: how layers share the budget, "uniform" or "pyramid".
            rolled: close up the positions of the tokens kept, to go on past the length the model was trained for.
            packed: keep them in few bits, each token by itself: `GEAR(bits=4)` of kvcompress.policies.gear, whose rank
                must be 0; None for as they come.

        Raises:
            ValueError: the budget leaves no room for the tokens the policy always keeps, settings do not go together,
                or the model is unsupported; with `rolled`, also a model without rotary embeddings, or whose
                frequencies change with the length.
        """
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a kvcompress.policies Policy such as H2O(), got {policy!r}")
        self.policy = policy
        self.budget = _checked(budget, policy)
        self.allocation: Allocation = allocation
        self.rolled = rolled
        self.packed = packed
        if packed is not None:
            packed.per_token_scheme(hf.head_counts(hf.text_config(model))[2])
            if rolled:
                raise ValueError("rolled keeps keys without rotation, and cannot be combined with packed")
        super().__init__(model)
        if policy.rereads is not None and rolled:
            raise ValueError(f"rolled cannot be combined with {type(policy).__name__}, which reads tokens twice")
        if rolled and not any(isinstance(layer, RerotatedLayer) or layer.is_sliding for layer in self.layers):
            raise ValueError(
                f"rolled closes up rotary positions, and {type(model).__name__} has none; leave it off, "
                "and stay within the positions the model knows"
            )

    def _layer(self, index: int, window: int | None, layers: int) -> CompressedLayer:
        budget = layer_budgets(self.allocation, self.budget, layers, self.policy.least_budget())[index]
        rope = None
        model = self._model()
        assert model is not None
        if self.policy.uses_rotary or (self.rolled and window is None):
            rope = Rope.of(model, index)
        kind = EvictingLayer
        # a sliding layer's distances never exceed its window, and a layer without positions has none to close up
        if self.rolled and window is None and rope is not None:
            kind = RerotatedLayer
        elif self.policy.rereads is not None:
            kind = RereadLayer
        return kind(
            self.padding,
            self.policy,
            budget,
            window,
            is_first=index == 0,
            rope=rope,
            packed=self.packed,
            ranks=TPGroup.of(model),
        )

    @as_stored()
    def reserve(self) -> None:
        """Takes room for the whole budget, if it is a count: for steps that are compiled, whose tensors cannot grow.

        Where `generate` compiles decoding by itself, on a GPU, this is done in the prompt's forward.
        """
        for layer in self.layers:
            if isinstance(layer, EvictingLayer):
                layer.reserve()

    def forward_begins(self, decoder: Any, input_ids: Tensor | None) -> None:
        """Raises ValueError where the policy is to read tokens again that are not given as such."""
        super().forward_begins(decoder, input_ids)
        if self.policy.rereads is not None and input_ids is None:
            raise ValueError(
                f"{type(self.policy).__name__} reads the tokens again: pass input_ids, and not inputs_embeds"
            )

    @ordinary_tensors()
    def forward_ended(self, decoder: Any, input_ids: Tensor | None) -> None:
        """Reads the tokens of a forward again, where the policy asks for it."""
        super().forward_ended(decoder, input_ids)
        how = self.policy.rereads
        waiting = [layer for layer in self.layers if isinstance(layer, RereadLayer) and layer.waiting is not None]
        if waiting and how is not None and input_ids is not None:
            read_again(decoder, waiting, input_ids, self.padding, int(self.get_seq_length()), how)

    def _settings(self) -> dict[str, Any]:
        policy = {"name": type(self.policy).__name__, **dataclasses.asdict(self.policy)}
        return {
            "policy": policy,
            "budget": self.budget,
            "allocation": self.allocation,
            "rolled": self.rolled,
            "packed": None if self.packed is None else dataclasses.asdict(self.packed),
        }

    @classmethod
    def _rebuild(cls, model: PreTrainedModel, settings: dict[str, Any]) -> Self:
        policy = dict(settings["policy"])
        for module in pkgutil.iter_modules(policies.__path__):
            importlib.import_module(f"{policies.__name__}.{module.name}")
        kinds = {kind.__name__: kind for kind in _subclasses(Policy)}
        name = policy.pop("name")
        if name not in kinds:
            raise ValueError(f"the file's policy {name!r} is not imported; known: {', '.join(sorted(kinds))}")
        packed = None if settings["packed"] is None else GEAR(**settings["packed"])
        cache = cls.__new__(cls)
        # the short names take a policy's settings one by one; the file has the policy itself
        EvictingCache.__init__(cache, model, **{**settings, "policy": kinds[name](**policy), "packed": packed})
        return cache


class H2OCache(EvictingCache):
    """Heavy hitters and recent tokens (arXiv:2306.14048): `H2OCache(model, budget=512)`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | float,
        recent: int | float = 0.5,
        sinks: int = 0,
        rolled: bool = False,
        packed: GEAR | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            budget: tokens kept per sequence and KV head: a count, or a fraction of those seen so far.
            recent: newest tokens always kept: a count, or a fraction of the budget.
            sinks: first tokens always kept.
            rolled, packed: as in EvictingCache.
        """
        super().__init__(model, policy=H2O(recent=recent, sinks=sinks), budget=budget, rolled=rolled, packed=packed)


class SnapKVCache(EvictingCache):
    """What the last queries attend to (arXiv:2404.14469): `SnapKVCache(model, budget=512)`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | float,
        window: int = 32,
        kernel: int = 5,
        packed: GEAR | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            budget: tokens kept per sequence and KV head: a count, or a fraction of those seen so far.
            window: queries observed, and newest tokens always kept.
            kernel: neighbouring tokens pooled together, an odd number.
            packed: as in EvictingCache.
        """
        policy = SnapKV(window=window, recent=window, kernel=kernel)
        super().__init__(model, policy=policy, budget=budget, packed=packed)


class KVzipCache(EvictingCache):
    """What is needed to say the context again (arXiv:2505.23416): `KVzipCache(model, budget=512)`.

    Every forward of several tokens is followed by a second one over the same tokens, and the choice serves questions
    that nobody has asked yet. Until then what the forward was fed is held in full.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | float,
        sinks: int = 4,
        recent: int | float = 1,
        chunk: int = 2048,
        prompt: Sequence[int] = (),
        packed: GEAR | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with; it must be given input_ids.
            budget: tokens kept per sequence and KV head: a count, or a fraction of those seen so far.
            sinks: first tokens always kept.
            recent: newest tokens always kept: a count, or a fraction of the budget. What is decoded is scored by few
                queries, what was read by many: for answers longer than a few sentences, tens of them.
            chunk: tokens read again at a time.
            prompt: token ids read before each chunk; the paper's "Repeat the previous context exactly."
            packed: as in EvictingCache.
        """
        policy = KVzip(sinks=sinks, recent=recent, chunk=chunk, prompt=tuple(prompt))
        super().__init__(model, policy=policy, budget=budget, packed=packed)


class StreamingLLMCache(EvictingCache):
    """Sinks and a recent window (arXiv:2309.17453): `StreamingLLMCache(model, budget=512)`.

    The paper counts positions within the cache, which `rolled=True` does; without it tokens keep their true
    positions, which serves up to the length the model was trained for.
    """

    def __init__(self, model: PreTrainedModel, *, budget: int | float, sinks: int = 4, rolled: bool = False) -> None:
        """
        Args:
            model: the model the cache will be used with.
            budget: tokens kept: a count, or a fraction of those seen so far.
            sinks: first tokens kept; the rest of the budget is the window.
            rolled: as in EvictingCache.
        """
        super().__init__(model, policy=StreamingLLM(sinks=sinks), budget=budget, rolled=rolled)


def _checked(budget: int | float, policy: Policy) -> int | float:
    budget = count_or_fraction(budget, "budget", "a count of tokens", "the tokens seen")
    if isinstance(budget, int) and budget < policy.least_budget():
        raise ValueError(
            f"budget must be at least sinks + recent{' + 1 to choose' if policy.chooses else ''} = "
            f"{policy.least_budget()} tokens for {policy}, got {budget}"
        )
    return budget


def _subclasses(kind: type[Policy]) -> set[type[Policy]]:
    return {kind}.union(*(_subclasses(child) for child in kind.__subclasses__()))

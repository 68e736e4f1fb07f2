"""AttentionMatchingCache: few tokens that attend and answer as all did (arXiv:2602.16284)."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.answers import AnsweringLayer
from kvcompress.caches.budget import Budget
from kvcompress.caches.compaction import check_ended, compact, copy_tokens, granted, hold_no_more, texts
from kvcompress.caches.dense import DenseCache
from kvcompress.caches.evicting import EvictingCache, Pinned, Shared
from kvcompress.layer import as_stored, ordinary_tensors
from kvcompress.policies.attention_matching import AttentionMatching
from kvcompress.policies.gear import GEAR


class AttentionMatchingCache(EvictingCache):
    """Keeps few tokens, fitted to attend and answer as the whole text did (arXiv:2602.16284).

        cache = AttentionMatchingCache(model, budget=0.1)
        output = model.generate(**inputs, cache=cache)

    As KVzipCache, it reads every forward of several tokens twice, lets all heads of all layers compete, and keeps what
    is decoded until several tokens are fed again. Then it fits a log-weight and a value to each token it keeps, except
    on sliding layers.

    `compact` makes what it holds less once more, and `from_cache` begins with what another cache holds.
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
        queries: int = 512,
        allocation: Shared | None = None,
        packed: GEAR | None = None,
        pin: Pinned | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with; it must be given input_ids.
            budget: tokens kept per sequence and KV head, on average, of what is fed several tokens at a time: a count,
                or a fraction of the tokens seen so far.
            sinks: first tokens always kept.
            recent: newest tokens always kept: a count, or a fraction of the budget.
            chunk: how many tokens are read again at a time, and fitted together.
            prompt: token ids read before each chunk.
            queries: tokens of a chunk whose queries the fit looks at; until it ends they are held, in all layers.
            allocation, packed, pin: as in EvictingCache; allocation None for "global".
        """
        policy = AttentionMatching(sinks=sinks, recent=recent, chunk=chunk, prompt=tuple(prompt), queries=queries)
        super().__init__(model, policy=policy, budget=budget, allocation=allocation, packed=packed, pin=pin)

    @classmethod
    @ordinary_tensors()
    def from_cache(
        cls,
        other: CompressedCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        budget: int | float,
        **settings: Any,
    ) -> Self:
        """A cache with what another one holds, compacted to a budget; the other is left as it is.

            cache = AttentionMatchingCache.from_cache(dense, input_ids, budget=0.1)

        With the text that a DenseCache was fed, it is the cache that is had by feeding the text to it, unless it is
        packed: then tokens are packed before it is chosen which of them stay.

        Args:
            other: a DenseCache, or an evicting cache that is not rerotated.
            input_ids, attention_mask: as in `compact`.
            budget, settings: of the cache, as it takes them when it is built.

        Raises:
            TypeError: the other cache is of another kind.
            ValueError: it is empty, its model has been deleted, a setting is wrong (`pin` takes spans alone), or as in
                `compact`.
        """
        if not isinstance(other, DenseCache | EvictingCache):
            raise TypeError(
                "from_cache takes what a DenseCache holds, or an evicting cache that is not rerotated, got "
                f"{type(other).__name__}"
            )
        if isinstance(settings.get("pin"), Tensor):
            raise ValueError("pin must be spans where tokens come from another cache, got a mask of what is fed")
        check_ended(other)
        model = other._model()
        if model is None:
            raise ValueError("the cache's model has been deleted; from_cache needs it")
        other.check_model(hf.decoder_of(model))
        rows = texts(input_ids, attention_mask, other.batch_size)
        cache = cls(model, budget=budget, **settings)
        with as_stored():
            copy_tokens(cache._answering(), other)
        cache.padding.restore({name: tensor.clone() for name, tensor in other.padding.tensors().items()})
        cache._filled_by = other._filled_by
        cache._compact(model, rows, None, torch.zeros(len(rows), dtype=torch.bool))
        return cache

    @ordinary_tensors()
    def compact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | int | float | None = None,
        *,
        budget: int | float | None = None,
    ) -> None:
        """Compacts all that the cache holds, with its log-weights and the answers since the last text.

            cache.compact(input_ids)                  what it holds, to the cache's budget again
            cache.compact(input_ids, budget=0.5)      to half of it

        A text is read after what is held, and not stored: what its queries attend to stays, fitted to answer them as
        all did (arXiv:2602.16284). Tokens keep their positions, and the cache has seen no more than before. At the next
        text its own budget counts again.

        Args:
            input_ids: [batch, tokens], what each row reads, at least 2 tokens: the whole conversation so far, as what
                the text does not look up is lost. It takes as long as a prompt of so many tokens.
            attention_mask: [batch, tokens], 0 for padding in input_ids; None: no padding. A number is no mask but the
                budget: `compact(input_ids, 0.5)`.
            budget: tokens kept per sequence and KV head, on average: a count, or a fraction of those held; None for the
                cache's own, which is a fraction of those seen if it is none. What is held already if that is less.

        Raises:
            TypeError: the budget is no number or given twice, input_ids are no tensor of integers, or attention_mask is
                no tensor.
            ValueError: the cache is empty, another model filled it, its model has been deleted, input_ids or
                attention_mask has another shape, or the budget leaves nothing to choose. The cache is unchanged.
            RuntimeError: an earlier forward was interrupted, or the model no longer attends through this library; or
                memory ran out while heads chose, after which the cache must be reset.
        """
        if isinstance(attention_mask, int | float):
            if budget is not None:
                raise TypeError(f"the budget must be given once, got {attention_mask!r} and budget={budget!r}")
            attention_mask, budget = None, attention_mask
        if self.states:
            raise ValueError(
                "compact reads a text after what is held, and layers that keep states no longer have what came before"
            )
        check_ended(self)
        model = self._model()
        if model is None:
            raise ValueError("the cache's model has been deleted; compact reads a text with it")
        self.check_model(hf.decoder_of(model))
        self._check_attention(0)
        rows, asked = texts(input_ids, attention_mask, self.batch_size), None
        if budget is not None:
            asked = Budget(budget, self._budget.least, self._budget.explained, "the tokens held")
        rests = hold_no_more(self._answering(), asked or self._budget)
        if not bool(rests.all()):
            self._compact(model, rows, asked, rests)

    def _compact(self, model: PreTrainedModel, rows: list[list[int]], asked: Budget | None, rests: Tensor) -> None:
        how, layers, all_compete = self.policy.rereads, self._answering(), self.allocation == "global"
        assert how is not None
        tokens = None if asked is None else granted(layers, asked, self.layers_share)
        decoder, last = hf.decoder_of(model), self.padding.last_position
        compact(decoder, layers, rows, last, how, all_compete, tokens, rests)

    def _answering(self) -> list[AnsweringLayer]:
        return [layer for layer in self.layers if isinstance(layer, AnsweringLayer)]

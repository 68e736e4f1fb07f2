"""Questions about a text: a cache reads the text once, compresses it, and each question continues from there.

    ask(model, tokenizer, report, ["Who wrote it?", "When?"], "kvzip", budget=0.3).answers

The text and a question are one user message of the chat template, the text first, and are tokenized apart, so that the
text has the same tokens for every question. Questions are answered independently, each by a fork of the cache, or in
turns of one conversation.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from kvcompress import hf, registry
from kvcompress.cache import CompressedCache
from kvcompress.memory import MemoryReport
from kvcompress.prefix.cache import HydragenCache
from kvcompress.template import around_message, between_messages, has_template

_BETWEEN_CONTEXT_AND_QUESTION = "\n\n"


@dataclass(frozen=True)
class Answers:
    """What `ask` returns.

    answers: one for each question, in their order, without special tokens. memory: of the cache when it had read the
    context, before the first question. cache: holds the context, and in turns the whole conversation.
    """

    answers: list[str]
    memory: MemoryReport
    cache: CompressedCache


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str,
    questions: str | Sequence[str],
    cache: CompressedCache | str,
    *,
    budget: int | float | None = None,
    turns: bool = False,
    max_new_tokens: int = 256,
    prefill_chunk_size: int | None = None,
    max_context_length: int | None = None,
    answer_prefix: str = "",
    template_options: Mapping[str, Any] | None = None,
    streamer: Any = None,
    **generation: Any,
) -> Answers:
    """Reads a context once through a cache, and answers questions about it, greedily unless told otherwise.

    Where neither the context ends nor a question begins with white space, an empty line is put between them. A fork
    takes as many bytes again as the cache holds, but for a HydragenCache, whose forks share the context.

    Args:
        context: the text.
        questions: one or several.
        cache: an empty one, built for this model; or a method as the command line takes it, such as "h2o:sinks=4".
        budget: with a method, tokens kept per sequence and KV head, or a fraction of those seen.
        turns: ask one after another in one conversation; otherwise no answer depends on another question.
        max_new_tokens: of each answer.
        prefill_chunk_size: read at most so many tokens in one forward: needs less memory for activations, and each
            chunk sees what the cache keeps of those before it.
        max_context_length: tokens, of the context and what the template puts before it; what is longer is cut at the
            end, with a warning. None: no limit.
        answer_prefix: what each answer begins with; it is not part of the answers returned.
        template_options: for the chat template, such as {"enable_thinking": False}.
        streamer: as `generate` takes it; gets each answer.
        generation: further arguments of `generate`, such as do_sample=True.

    Raises:
        ValueError: the context, a question or the list of questions is empty, the cache holds tokens, a number is less
            than 1, the chat template cannot be split, or method or budget are invalid. The cache is unchanged.
        TypeError: the cache is of another kind.
    """
    asked = [questions] if isinstance(questions, str) else list(questions)
    _check(context, asked, cache, budget, max_new_tokens, max_context_length)
    if isinstance(cache, str):
        method, _ = registry.parse(cache)
        registry.refuse_budget(method, f"the cache {cache}", budget)
        cache = registry.build(cache, model, budget)
    conversation = Conversation(
        model, tokenizer, cache, prefill_chunk_size=prefill_chunk_size, template_options=template_options
    )
    conversation.read(context, max_context_length=max_context_length)
    memory = cache.memory()
    answers = []
    for question in asked:
        each = conversation if turns else conversation.fork()
        answers.append(
            each.ask(
                question,
                max_new_tokens=max_new_tokens,
                answer_prefix=answer_prefix,
                streamer=streamer,
                **generation,
            )
        )
    return Answers(answers, memory, cache)


def _check(
    context: str,
    questions: Sequence[str],
    cache: CompressedCache | str,
    budget: int | float | None,
    max_new_tokens: int,
    max_context_length: int | None,
) -> None:
    if not context.strip():
        raise ValueError(f"context must be a text to ask about, got {context!r}")
    if not questions:
        raise ValueError("questions must hold at least one question, got none")
    for number, question in enumerate(questions, 1):
        if not question.strip():
            raise ValueError(f"a question must not be empty, but number {number} of {len(questions)} is {question!r}")
    for name, value in (("max_new_tokens", max_new_tokens), ("max_context_length", max_context_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if budget is not None and not isinstance(cache, str):
        raise ValueError(
            f"budget is for a method's name, such as 'h2o'; this {type(cache).__name__} has been built: got {budget}"
        )


class Conversation:
    """What one cache has read and been asked: a context, if there is one, then questions and answers.

    conversation = Conversation(model, tokenizer, KVzipCache(model, budget=0.3))
    conversation.read(report)
    conversation.fork().ask("Who wrote it?")    # leaves the conversation as it is
    conversation.ask("Who wrote it?")           # the next question may refer to it
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        cache: CompressedCache,
        *,
        raw: bool = False,
        prefill_chunk_size: int | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            cache: an empty one, built for this model.
            raw: plain text, although the tokenizer has a chat template: an answer goes on from its question.
            prefill_chunk_size, template_options: as in `ask`.

        Raises:
            ValueError: the cache holds tokens, the chunk size is less than 1, or the chat template cannot be split.
            TypeError: the cache is of another kind.
        """
        if not isinstance(cache, CompressedCache):
            raise TypeError(
                "cache must be one of kvcompress's, such as H2OCache(model, budget=512), or a method's name, such as "
                f"'h2o'; got {type(cache).__name__}"
            )
        if seen := int(cache.get_seq_length()):
            raise ValueError(
                f"the cache must be empty to read a text, but has seen {seen} tokens: build another one, or reset() it"
            )
        if prefill_chunk_size is not None and prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be at least 1, got {prefill_chunk_size}")
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.prefill_chunk_size = prefill_chunk_size
        self._is_plain = raw or not has_template(tokenizer)
        options = dict(template_options or {})
        head, self._tail = ("", "") if raw else around_message(tokenizer, **options)
        # what begins a plain text is the tokenizer's own affair
        self._head = "" if self._is_plain else head
        # what a template of a single turn cannot say, and need not unless a second question comes
        self._between_messages = (lambda: "\n") if raw else functools.partial(between_messages, tokenizer, **options)
        # tokens of the conversation; the cache may have to read the last ones yet
        self._ids: list[int] = []
        # the context's end, until a question follows
        self._context: str | None = None
        self._was_asked = False
        # a question was interrupted, part of which the cache has read
        self._is_broken = False

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._ids)

    @torch.no_grad()
    def read(self, context: str, *, max_context_length: int | None = None) -> None:
        """Feeds a context to the cache, which compresses it.

        Args:
            max_context_length: as in `ask`.

        Raises:
            ValueError: something was read before, or nothing of the context would be left; the cache is unchanged.
        """
        if self._ids:
            raise ValueError(f"a context must come first, but {len(self._ids)} tokens were read before it")
        ids, head = self._encode(self._head + context), len(self._encode(self._head))
        if max_context_length is not None and max_context_length <= head:
            raise ValueError(
                f"max_context_length must be more than the {head} tokens that the template puts before the context, "
                f"got {max_context_length}"
            )
        if max_context_length is not None and len(ids) > max_context_length:
            warnings.warn(
                f"the context is cut after {max_context_length} of its {len(ids)} tokens (max_context_length)",
                stacklevel=2,
            )
            ids = ids[:max_context_length]
        tokens = torch.tensor([ids], device=hf.input_device(self.model))
        self._feed(tokens.split(self.prefill_chunk_size or len(ids), dim=1))
        self._ids, self._context = ids, context

    @torch.no_grad()
    def _feed(self, chunks: Sequence[torch.Tensor]) -> None:
        """Feeds tokens to the cache, [1, any] in each forward."""
        hf.forget_positions(self.model)
        decoder = hf.decoder_of(self.model)
        for chunk in chunks:
            named = hf.cache_argument(decoder, self.cache) | hf.unread(decoder, chunk)
            decoder(input_ids=chunk, use_cache=True, **named)

    def fork(self) -> Self:
        """A conversation that goes on from here, through a copy of the cache; this one stays as it is."""
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        shares = isinstance(self.cache, HydragenCache) and bool(self._ids)
        other.cache = self.cache.fork() if shares else self.cache.clone()  # type: ignore[attr-defined]
        other._ids = list(self._ids)
        return other

    def ask(
        self, question: str, *, max_new_tokens: int = 256, answer_prefix: str = "", streamer: Any = None, **more: Any
    ) -> str:
        """The answer to the next question, without special tokens.

        Args:
            question: for a conversation without context, the user's first message or the next one.
            max_new_tokens, answer_prefix, streamer: as in `ask`.
            more: further arguments of `generate`, for one answer.

        Raises:
            RuntimeError: an earlier question was interrupted when the cache had read part of it.
            ValueError: an argument of `generate` asks for several answers, or for something other than token ids.
        """
        self._check_asked(more)
        seen = int(self.cache.get_seq_length())
        try:
            return self._answer(question, max_new_tokens, answer_prefix, streamer, more)
        except BaseException:
            self._is_broken = int(self.cache.get_seq_length()) != seen or self.cache.is_interrupted
            raise

    def _check_asked(self, more: Mapping[str, Any]) -> None:
        if self._is_broken:
            raise RuntimeError(
                "an earlier question of this conversation was interrupted, and its cache has read part of it: begin "
                "another one. A fork() before a question is not touched by it"
            )
        for name, only in (("num_beams", 1), ("num_return_sequences", 1), ("use_cache", True)):
            if more.get(name, only) not in (only, None):
                raise ValueError(f"ask gives one answer, through the cache: leave {name} out, got {more[name]!r}")
        if more.get("return_dict_in_generate"):
            raise ValueError("ask returns the answer alone: leave return_dict_in_generate out")

    def _answer(
        self, question: str, max_new_tokens: int, answer_prefix: str, streamer: Any, more: dict[str, Any]
    ) -> str:
        fresh = self._encode(self._before(question) + question + self._tail + answer_prefix)
        given = torch.tensor([[*self._ids, *fresh]], device=hf.input_device(self.model))
        ends = {*hf.end_tokens(self.model)} or {self.tokenizer.eos_token_id} - {None}
        arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, "streamer": streamer}
        if ends:
            # one row needs no padding, but generate says so at each call if it knows no token for it
            arguments |= {"eos_token_id": sorted(ends), "pad_token_id": min(ends)}
        if self.prefill_chunk_size is not None:
            # by itself, generate feeds the last chunk; in older releases it would begin with what was read
            self._feed(given[:, int(self.cache.get_seq_length()) :].split(self.prefill_chunk_size, dim=1)[:-1])
        hf.forget_positions(self.model)
        arguments |= hf.cache_argument(self.model, self.cache) | more
        generate: Any = self.model.generate
        (row,) = generate(given, attention_mask=torch.ones_like(given), **arguments).tolist()
        self._was_asked, self._ids = True, row
        # the next message begins with what ends an answer
        if row[-1] in ends and len(row) > int(self.cache.get_seq_length()):
            self._ids = row[:-1]
        answer: str = self.tokenizer.decode(row[given.shape[1] :], skip_special_tokens=True)
        return answer

    def _before(self, question: str) -> str:
        """What comes between what was read and the next question."""
        if self._was_asked:
            return self._between_messages()
        if self._context is None:
            return self._head
        is_apart = self._context[-1:].isspace() or question[:1].isspace()
        return "" if is_apart else _BETWEEN_CONTEXT_AND_QUESTION

    def _encode(self, text: str) -> list[int]:
        """The tokens of a piece of the conversation; a plain text begins with what the tokenizer puts there."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        if not self._is_plain or self._ids:
            return ids
        whole: list[int] = self.tokenizer(text).input_ids
        # some tokenizers put something behind it too
        start = next((at for at in range(len(whole)) if whole[at : at + len(ids)] == ids), 0)
        return whole[: start + len(ids)]

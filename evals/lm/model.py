"""lm-eval's tasks through a compressed cache: the model `kvcompress` for lm-eval's harness.

    kvcompress eval --tasks arc_easy --num_fewshot 5 --cache h2o --budget 0.2
    lm_eval --model kvcompress --model_args cache=h2o,budget=0.2 --tasks arc_easy --num_fewshot 5
    lm_eval.simple_evaluate(model=CompressedLM(cache="h2o", budget=0.2), tasks=["arc_easy"])

The second line is for releases of lm-eval that look for models in the entry point group `lm_eval.models` (after
0.4.13); with older ones, this module must be imported first.

A prompt scored in one forward attends to all of its keys, whatever the cache keeps, and measures nothing. Here the
context is read up to the part held back, the cache compresses, and the rest of the context and the continuation are
read with what is left, `chunk` tokens per forward. All that goes on from the same tokens, continuations or questions
after the same examples, starts from copies of one cache, so that they are read once. Rolling likelihoods read the whole
text in chunks, each with what is left of those before. With `cache=none` all scores are those of lm-eval's own `hf`
model.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from kvcompress import load_model
from kvcompress.evals.sweep.baselines import build, parse
from kvcompress.evals.sweep.protocol import Measured, NotCompressedError, Reader
from kvcompress.hf import cache_argument
from kvcompress.registry import refuse_budget, spelled

Request = tuple[Any, list[int], list[int]]
Answer = TypeVar("Answer")
Score = tuple[float, bool]

# what `batch_size=auto` means where no memory can be probed, as on a CPU, and where it begins on a GPU
_AUTO_WITHOUT_GPU, _AUTO_AT_MOST = 4, 64


@register_model("kvcompress")
class CompressedLM(HFLM):
    """A causal language model, all of whose scores are computed with a kvcompress cache."""

    def __init__(
        self,
        pretrained: Any = None,
        cache: str | None = "none",
        budget: int | float | None = None,
        hold_back: int | str = 1,
        chunk: int = 64,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            pretrained: hub id, local folder or loaded model; None for SmolLM2-135M-Instruct.
            cache: a method of the registry, such as "h2o:sinks=4".
            budget: tokens it keeps, or a fraction of the context that it compresses (of the text, for a rolling
                likelihood); 1.0 keeps everything.
            hold_back: what to read of a context after compression: the last tokens, at least 1, or everything from the
                last occurrence of a text such as "Question:". The method does not see the latter (question-agnostic);
                with 1 token held back, it sees the question (question-aware).
            chunk: tokens read per forward after the cache has compressed.
            device: where to load the model; None: on a GPU, if there is one.
            batch_size: sequences at a time. "auto": on a GPU as many as fit, at most `max_batch_size`, halved for good
                whenever memory does not suffice for a batch; on a CPU 4.
            max_batch_size: where "auto" begins on a GPU; None for 64.
            settings: of lm-eval's `hf` model: dtype, max_length, ...

        Raises:
            ValueError: an unknown method, a budget that it needs, cannot keep or does not take, nothing held back, or
                no batch size.
            OSError: the model cannot be loaded.
            ModelUnavailableError: the default model, or a .gguf file, cannot be loaded.
        """
        # what stands for nothing on the harness's command line
        cache = cache or "none"
        method, own = parse(cache)
        if "budget" in own:
            budget, cache = own.pop("budget"), spelled(method, own)
        if method.takes_budget and budget is None:
            raise ValueError(f"the cache {cache} needs a budget: tokens to keep, or a fraction of the context")
        refuse_budget(method, f"the cache {cache}", budget)
        if isinstance(hold_back, int) and hold_back < 1:
            raise ValueError(
                "hold_back must be at least 1 token, or the first scored token would come from uncompressed logits; "
                f"got {hold_back}"
            )
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        limit = _AUTO_AT_MOST if max_batch_size is None else _sequences("max_batch_size", max_batch_size)
        self._is_auto = _is_auto(batch_size)
        self._size = limit if self._is_auto else _sequences("batch_size", batch_size)
        # lm-eval would take CUDA for granted, and leaves each process of a launcher its own GPU by this name
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if pretrained is None or str(pretrained).endswith(".gguf"):
            pretrained, settings["tokenizer"] = load_model(pretrained, device=device)
        super().__init__(pretrained=pretrained, backend="causal", device=device, batch_size=self._size, **settings)
        if self._is_auto and self.device.type == "cpu":
            self._size = min(_AUTO_WITHOUT_GPU, limit)
        self.cache, self.budget, self.chunk = cache, budget, chunk
        # a shell passes \n as two characters
        self.hold_back = hold_back.replace("\\n", "\n") if isinstance(hold_back, str) else hold_back
        # contexts without and with the text to hold back
        self._with_hold_back = {False: 0, True: 0}
        self.measured: list[Measured] = []
        # the same by task, and the one whose requests are being answered
        self.measured_by_task: dict[str, list[Measured]] = {}
        self._task: str | None = None
        self._new_cache(2**20)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes next to the scores: the cache, and what it held on average after it compressed."""
        found = super().get_model_info()
        found["kvcompress"] = {
            "cache": self.cache,
            "budget": self.budget,
            "hold_back": self.hold_back,
            "chunk": self.chunk,
            "batch_size": self._size,
            **self.held(),
            "by_task": {name: self.held(name) for name in self.measured_by_task},
        }
        return found

    def held(self, task: str | None = None) -> dict[str, float]:
        """Bytes held per sequence, bytes of the full cache, and tokens: means over all contexts read, or a task's.

        Several processes do not tell tasks apart.
        """
        measured = self.measured if task is None else self.measured_by_task.get(task, [])
        if not measured:
            return {}
        mean = Measured.mean(measured)
        names = ("bytes_held", "full_bytes", "tokens_seen", "tokens_kept", "ratio")
        return {"contexts": mean.sequences, **{name: getattr(mean, name) for name in names}}

    @property
    def name(self) -> str:
        """The model's, as it was given, or its own if it was loaded."""
        given = self.pretrained
        return given if isinstance(given, str) else given.name_or_path or type(given).__name__

    def _new_cache(self, longest: int, has_context: bool = True) -> Any:
        """An empty cache for texts of up to `longest` tokens; has_context: some are read before it compresses."""
        budget = self.budget
        if isinstance(budget, float) and (budget == 1.0 or not has_context):
            budget = max(1, round(budget * longest))
        return build(self.cache, self.model, budget)

    # requests, task by task

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Score]:
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _by_task(self, answer: Callable[..., list[Answer]], requests: list[Any], disable_tqdm: bool) -> list[Answer]:
        """Answers each task's requests by themselves, so that what its contexts took can be told."""
        if self.world_size > 1:
            # processes wait for one another, and may have requests of different tasks
            return answer(requests, disable_tqdm=disable_tqdm)
        tasks: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            tasks.setdefault(request.task_name, []).append(index)
        found: dict[int, Answer] = {}
        try:
            for name, indices in tasks.items():
                self._task = name
                own = answer([requests[index] for index in indices], disable_tqdm=disable_tqdm)
                found |= zip(indices, own, strict=True)
        finally:
            self._task = None
        without, having = self._with_hold_back[False], self._with_hold_back[True]
        self._with_hold_back = {False: 0, True: 0}
        if without and not having:
            warnings.warn(
                f"hold_back={self.hold_back!r} occurs in none of the {without} contexts: all but the last token of "
                "each was compressed, the question too",
                stacklevel=2,
            )
        return [found[index] for index in range(len(requests))]

    # likelihoods

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        """Log-likelihood of each continuation, and whether greedy decoding would give it."""
        # what is read before the cache compresses, and the requests that go on from there with what is read after that
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        held: dict[tuple[int, ...], int] = {}
        for index, (text, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            tokens = tuple(whole[: len(whole) - len(continuation)])
            if tokens not in held:
                # a text is encoded for it, once for all continuations
                held[tokens] = self._held_back(tokens, None if text is None else text[0])
            read = len(tokens) - held[tokens]
            groups.setdefault(tokens[:read], []).append((index, list(tokens[read:])))
        answers: dict[int, Score] = {}
        order = sorted(groups, key=len, reverse=True)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0 or None, desc="likelihoods")
        first = 0
        while first < len(order):

            def answer(size: int, first: int = first) -> tuple[dict[int, Score], list[Measured]]:
                return self._answered(requests, {head: groups[head] for head in order[first : first + size]}, size)

            (found, measured), size = self._fitted(answer, override_bs or self._size)
            first += size
            answers |= found
            self._note(measured)
            for index, score in found.items():
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
            bar.update(len(found))
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def _answered(
        self, requests: Sequence[Request], groups: dict[tuple[int, ...], list[tuple[int, list[int]]]], size: int
    ) -> tuple[dict[int, Score], list[Measured]]:
        """The scores, by index, of the requests that go on from these heads, and what their caches held.

        Args:
            groups: tokens that are read before the cache compresses, and for each request that goes on from there its
                index and what it reads after that.
            size: sequences at a time.
        """
        answers: dict[int, Score] = {}
        heads = [list(head) for head in groups]
        asked = [(row, index, rest) for row, group in enumerate(groups.values()) for index, rest in group]
        # rows that are read together are about as long
        asked.sort(key=lambda one: len(one[2]) + len(requests[one[1]][2]), reverse=True)
        longest = max(len(heads[row]) + len(rest) + len(requests[index][2]) for row, index, rest in asked)
        reader, measured = self._compressed(heads, longest)
        # if nothing is read beforehand, a fraction is a share of each text
        step = size if any(heads) or not isinstance(self.budget, float) else 1
        for start in range(0, len(asked), step):
            part = asked[start : start + step]
            continuations = [requests[index][2] for _, index, _ in part]
            if any(heads):
                fork = self._fork(reader, [row for row, *_ in part], last=start + step >= len(asked))
            else:
                texts = [len(kept) + len(own) for (*_, kept), own in zip(part, continuations, strict=True)]
                fork = Reader(self.model, self._new_cache(max(texts), has_context=False), self._pad)
            scores = self._scores(
                fork,
                [kept + own[:-1] for (*_, kept), own in zip(part, continuations, strict=True)],
                continuations,
            )
            if not any(heads) and all(requests[index][0] is None for _, index, _ in part):
                # a rolling likelihood, which is compressed as it is read
                measured.append(fork.measure())
            answers |= {index: score for (_, index, _), score in zip(part, scores, strict=True)}
        return answers, measured

    def _scores(self, reader: Reader, rows: list[list[int]], continuations: list[list[int]]) -> Iterator[Score]:
        """Reads rows through a compressed cache; returns the scores of the continuations at their ends."""
        width = max(map(len, rows))
        total, greedy = [0.0] * len(rows), [True] * len(rows)
        for first in range(0, width, self.chunk):
            last = min(first + self.chunk, width)
            # rows end together: what is in columns first .. last - 1 of a row
            pieces = [row[max(0, first - width + len(row)) : max(0, last - width + len(row))] for row in rows]
            scored = max(min(last - (width - len(continuation)), last - first) for continuation in continuations)
            logits = reader.read(pieces, max(1, scored))
            if scored <= 0:
                continue
            log = torch.log_softmax(logits[:, -scored:], -1, dtype=self.softmax_dtype or torch.float32)
            for index, continuation in enumerate(continuations):
                done = last - (width - len(continuation))
                count = min(scored, done)
                if count <= 0:
                    continue
                wanted = torch.tensor(continuation[done - count : done], device=log.device)
                own = log[index, -count:]
                total[index] += float(own.gather(-1, wanted[:, None]).sum())
                greedy[index] &= bool((own.argmax(-1) == wanted).all())
        return zip(total, greedy, strict=True)

    # generation

    @torch.inference_mode()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Called by lm-eval: context [batch, tokens] is padded on the left; returns it with what is generated."""
        seen = generation_kwargs.pop("attention_mask", torch.ones_like(context)).bool()
        found: list[Tensor] = []
        first = 0
        while first < len(context):

            def generate(size: int, first: int = first) -> tuple[Tensor, list[Measured]]:
                part = slice(first, first + size)
                return self._generated(context[part], seen[part], max_length, stop, dict(generation_kwargs))

            (rows, measured), size = self._fitted(generate, len(context))
            first += size
            found.append(rows)
            self._note(measured)
        width = max(rows.shape[1] for rows in found)
        return torch.cat([pad(rows, (0, width - rows.shape[1]), value=self._pad) for rows in found])

    def _generated(
        self, context: Tensor, mask: Tensor, max_length: int, stop: list[str], generation_kwargs: dict[str, Any]
    ) -> tuple[Tensor, list[Measured]]:
        """The rows with what is generated for them, and what the cache held that had read their contexts."""
        rows = [row[visible].tolist() for row, visible in zip(context, mask, strict=True)]
        held = [self._held_back(row, None) for row in rows]
        heads = [row[: len(row) - kept] for row, kept in zip(rows, held, strict=True)]
        reader, measured = self._compressed(heads, max(map(len, rows)) + max_length - context.shape[1])
        parts = [heads] if reader.mask is not None else []
        parts.append([row[len(row) - kept :] for row, kept in zip(rows, held, strict=True)])
        padded = [_left_padded(part, self._pad, context.device) for part in parts]
        ids, seen = (torch.cat(tensors, 1) for tensors in zip(*padded, strict=True))
        if generation_kwargs.get("do_sample") is None and not generation_kwargs.get("temperature"):
            generation_kwargs["do_sample"] = False
        if generation_kwargs.get("do_sample") is False:
            generation_kwargs.pop("temperature", None)
        found = self.model.generate(
            input_ids=ids,
            attention_mask=seen,
            **cache_argument(self.model, reader.cache),
            max_length=max_length - context.shape[1] + ids.shape[1],
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, ids.shape[1], ids.shape[0]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **generation_kwargs,
        )
        return torch.cat([context, found[:, ids.shape[1] :]], 1), measured

    # both

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    @property
    def batch_size(self) -> int:
        """Sequences at a time; with "auto", as many as have fitted so far."""
        return self._size

    def _fitted(self, answer: Callable[[int], Answer], size: int) -> tuple[Answer, int]:
        """What `answer` gives for so many sequences, or with "auto" for half as many until memory suffices; and how
        many that were."""
        size = min(size, self._size) if self._is_auto else size
        while True:
            try:
                return answer(size), size
            except torch.OutOfMemoryError:
                if not self._is_auto or size == 1:
                    raise
            # behind the handler, which holds the tensors of the frames that failed
            size = self._size = size // 2
            torch.cuda.empty_cache()

    def _note(self, measured: list[Measured]) -> None:
        self.measured += measured
        if self._task is not None:
            self.measured_by_task.setdefault(self._task, []).extend(measured)

    def _held_back(self, context: Sequence[int], text: str | None) -> int:
        """How many of a context's last tokens are read after compression, at least 1."""
        if isinstance(self.hold_back, int):
            return min(self.hold_back, len(context))
        text = self.tok_decode(list(context)) if text is None else text
        at = text.rfind(self.hold_back)
        # a rolling likelihood has one token before it
        if len(context) > 1:
            self._with_hold_back[at >= 0] += 1
        if at < 0:
            return 1
        return min(max(1, len(context) - len(self.tok_encode(text[:at]))), len(context))

    def _compressed(self, heads: list[list[int]], longest: int) -> tuple[Reader, list[Measured]]:
        """A cache that has read and compressed these tokens, for texts of up to `longest` tokens, and what it holds.

        Raises:
            NotCompressedError: it kept more than its budget.
        """
        reader = Reader(self.model, self._new_cache(longest, has_context=any(heads)), self._pad)
        if not any(heads):
            return reader, []
        reader.read(heads)
        measured = reader.measure()
        if self.budget is not None and parse(self.cache)[0].takes_budget and not parse(self.cache)[0].reads_budget:
            limit = self.budget if isinstance(self.budget, int) else self.budget * measured.tokens_seen
            # layers' budgets are rounded one by one, and are at least one token
            if measured.tokens_kept > max(limit, 1) + 1:
                raise NotCompressedError(
                    f"{self.cache} should keep {limit:.1f} of {measured.tokens_seen:.1f} tokens, but kept "
                    f"{measured.tokens_kept:.1f}"
                )
        return reader, [measured]

    def _fork(self, reader: Reader, rows: list[int], last: bool) -> Reader:
        """A reader with these rows of another; the other itself if it is no longer needed."""
        fork = Reader(self.model, reader.cache if last else reader.cache.clone(), self._pad)
        assert reader.mask is not None
        index = torch.tensor(rows, device=reader.mask.device)
        fork.mask = reader.mask[index]
        if rows != list(range(len(reader.mask))):
            fork.cache.batch_select_indices(index)
        return fork


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _is_auto(batch_size: int | str) -> bool:
    """Also as lm-eval has it, with how often to adapt: auto:4."""
    return str(batch_size).partition(":")[0] == "auto"


def _sequences(name: str, given: int | str) -> int:
    """A number of sequences; ValueError if it is none."""
    text = str(given)
    if not text.isdecimal() or int(text) < 1:
        expected = "a number of sequences" + ", or auto" * (name == "batch_size")
        raise ValueError(f"{name} must be {expected}, got {given!r}")
    return int(text)

"""Answers as they come in a terminal, and what is said about them in the end. Heavy imports wait until it is used."""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kvcompress.cli.arguments import UsageError, as_budget, check_seed, load, user_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# options of the commands that answer
BudgetOption = Annotated[
    str | None, "Tokens kept (512), or a fraction of those seen (0.2); else 512, if the cache takes a budget."
]
MaxNewTokensOption = Annotated[int, "At most so many of each answer."]
ChunkOption = Annotated[int | None, "Read at most so many tokens at a time: needs less memory.", 1]
TemperatureOption = Annotated[float, "0 is greedy."]
SeedOption = Annotated[int, "Of sampling."]
DeviceMapOption = Annotated[str | None, "auto, balanced, ...: spreads the model over devices."]
WeightBitsOption = Annotated[int | None, "4 or 8: bits of a weight, on a GPU (needs bitsandbytes)."]
QuietOption = Annotated[bool, "Print the answers and nothing else."]

# tokens that a cache with a budget keeps, unless told
_USUAL_BUDGET = 512


class Clock:
    """Records when each token of an answer came, and passes it to the printer."""

    def __init__(self, printer: Any) -> None:
        self.printer = printer
        # tokens of the newest prompt, and seconds until first tokens
        self.prompt, self.prefill = 0, 0.0
        self.tokens, self.steps, self.decode = 0, 0, 0.0
        self._times: list[float] = []

    def put(self, value: "torch.Tensor") -> None:
        if not self._times:
            self.prompt = value.numel()
        self._times.append(time.perf_counter())
        self.printer.put(value)

    def end(self) -> None:
        # the first time is the prompt's; the second is the first token's, which ends the prefill
        prompt, first, *_ = self._times
        self.prefill += first - prompt
        self.decode += self._times[-1] - first
        self.tokens += len(self._times) - 1
        self.steps += len(self._times) - 2
        self._times = []
        self.printer.end()

    @property
    def speed(self) -> str:
        return f"{self.steps / self.decode:.1f} tokens/s" if self.steps else "no speed of single tokens"


class Session:
    """A conversation of the command line: options read, model loaded, answers streamed."""

    def __init__(
        self,
        model: str | None,
        cache: str,
        budget: str | None,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        raw: bool,
        prefill_chunk_size: int | None,
        dtype: str | None,
        device: str | None,
        device_map: str | None,
        quantize_weights: int | None,
    ) -> None:
        tokens_kept = None if budget is None else as_budget(budget)
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise UsageError(f"--temperature must be 0 or more, got {temperature}")
        check_seed(seed)

        from transformers import TextStreamer, set_seed

        from kvcompress import registry
        from kvcompress.asking import Conversation

        with user_errors():
            method, _ = registry.parse(cache)
            registry.refuse_budget(method, f"the cache {cache}", tokens_kept, "--budget")
        loaded, tokenizer = load(model, dtype, device, device_map=device_map, quantize_weights=quantize_weights)
        with user_errors():
            built = registry.build(cache, loaded, _USUAL_BUDGET if tokens_kept is None else tokens_kept)
            self.conversation = Conversation(
                loaded, tokenizer, built, raw=raw or not tokenizer.chat_template, prefill_chunk_size=prefill_chunk_size
            )
        set_seed(seed)
        self.model_line = _described(loaded, quantize_weights)
        self.cache_name = registry.canonical(cache)
        self.clock = Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        self._sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
        self._max_new_tokens = max_new_tokens
        self.context_tokens, self.context_seconds = 0, 0.0

    def read(self, context: str) -> None:
        """Feeds a context to the cache."""
        start = time.perf_counter()
        self.conversation.read(context)
        self.context_tokens, self.context_seconds = self.conversation.tokens, time.perf_counter() - start

    def answer(self, question: str, fork: bool = False) -> None:
        """Prints an answer as it comes; a fork leaves the conversation as it is."""
        conversation = self.conversation.fork() if fork else self.conversation
        conversation.ask(question, max_new_tokens=self._max_new_tokens, streamer=self.clock, **self._sampling)

    @property
    def memory_line(self) -> str:
        return f"{self.cache_name}: {self.conversation.cache.memory()}"


def read_contexts(names: list[str]) -> str:
    """The texts of files, with an empty line between two; - is stdin."""
    from kvcompress.swiftkv.data import read_text

    with user_errors():
        texts = [sys.stdin.read() if name == "-" else read_text(Path(name)) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text.strip():
            raise UsageError(f"{name}: the context is empty")
    return "\n\n".join(texts)


def _described(model: "PreTrainedModel", bits: int | None) -> str:
    """The model, its dtype and where it is."""
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    kind = str(model.dtype).removeprefix("torch.")
    weights = "" if bits is None else f", weights of {bits} bits"
    return f"{model.name_or_path}: {kind}{weights} on {', '.join(places)}"

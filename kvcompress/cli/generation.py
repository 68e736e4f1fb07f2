"""The command generate: an answer through a cache, with its memory and speed."""

import math
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.cli.arguments import (
    CacheOption,
    DeviceOption,
    ModelOption,
    UsageError,
    as_budget,
    check_seed,
    load,
    user_errors,
)

if TYPE_CHECKING:
    import torch


class _Clock:
    """Records when each token came, and passes it to the printer."""

    def __init__(self, printer: Any) -> None:
        self.printer = printer
        self.times: list[float] = []

    def put(self, value: "torch.Tensor") -> None:
        self.times.append(time.perf_counter())
        self.printer.put(value)

    def end(self) -> None:
        self.printer.end()


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from stdin.")],
    model: ModelOption = None,
    cache: CacheOption = "h2o",
    budget: Annotated[str, "Tokens kept (512), or a fraction of those seen (0.2)."] = "512",
    max_new_tokens: Annotated[int, "At most so many."] = 256,
    temperature: Annotated[float, "0 is greedy."] = 0.0,
    raw: Annotated[bool, "Continue the prompt without the chat template."] = False,
    seed: Annotated[int, "Of sampling."] = 0,
    dtype: Annotated[str, "float32, bfloat16, float16 or auto."] = "float32",
    device: DeviceOption = None,
) -> None:
    """Answer a prompt through a cache, and show its memory and speed."""
    tokens_kept = as_budget(budget)
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature must be 0 or more, got {temperature}")
    check_seed(seed)
    question = sys.stdin.read() if prompt == "-" else prompt
    if not question.strip():
        raise UsageError("the prompt is empty")

    from transformers import TextStreamer, set_seed

    from kvcompress import registry
    from kvcompress.hf import cache_argument

    with user_errors():
        registry.parse(cache)
    loaded, tokenizer = load(model, dtype, device)
    with user_errors():
        built = registry.build(cache, loaded, tokens_kept)
    inputs = _encode(question, tokenizer, raw).to(loaded.device)
    set_seed(seed)
    clock = _Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    answer: Any = loaded.generate
    answer(**inputs, **cache_argument(loaded, built), max_new_tokens=max_new_tokens, streamer=clock, **sampling)
    # the first time is the prompt's; the second is the first token's, which ends the prefill
    prompt_tokens, new_tokens = inputs["input_ids"].shape[1], len(clock.times) - 1
    prefill, decode = clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]
    speed = f"{(new_tokens - 1) / decode:.1f} tokens/s" if new_tokens > 1 else "one token"
    print(f"\n{prompt_tokens} prompt tokens in {prefill:.2f} s; {new_tokens} new tokens, {speed}")
    print(f"{registry.canonical(cache)}: {built.memory()}")


def _encode(question: str, tokenizer: Any, raw: bool) -> Any:
    if raw or not tokenizer.chat_template:
        return tokenizer(question, return_tensors="pt")
    message = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)

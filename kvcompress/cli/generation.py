"""The command generate: answers through a cache, with its memory and speed."""

import sys
from typing import Annotated

import typer

from kvcompress.cli.arguments import CacheOption, DeviceOption, DtypeOption, ModelOption, UsageError
from kvcompress.cli.streaming import (
    BudgetOption,
    ChunkOption,
    DeviceMapOption,
    MaxNewTokensOption,
    QuietOption,
    SeedOption,
    Session,
    TemperatureOption,
    WeightBitsOption,
    read_contexts,
)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer; - reads it from stdin.")] = None,
    context_file: Annotated[
        list[str] | None, "Text that questions are about, read once; - reads stdin. May be given several times."
    ] = None,
    question: Annotated[
        list[str] | None, "About --context-file. May be given several times: each is answered by itself."
    ] = None,
    model: ModelOption = None,
    cache: CacheOption = "h2o",
    budget: BudgetOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    prefill_chunk_size: ChunkOption = None,
    temperature: TemperatureOption = 0.0,
    raw: Annotated[bool, "Continue the text without the chat template."] = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    quantize_weights: WeightBitsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Answer a prompt, or several questions about a text, through a cache, and show its memory and speed."""
    asked, context = _read(prompt, context_file or [], question or [])
    session = Session(
        model,
        cache,
        budget,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        raw=raw,
        prefill_chunk_size=prefill_chunk_size,
        dtype=dtype,
        device=device,
        device_map=device_map,
        quantize_weights=quantize_weights,
    )
    if context is not None:
        session.read(context)
    # of the context alone, before any question
    memory_line = session.memory_line
    for each in asked:
        if context is not None and not quiet:
            print(f"> {each}")
        session.answer(each, fork=context is not None)
        if context is not None and each is not asked[-1]:
            print()
    if quiet:
        return
    clock = session.clock
    print(f"\n{session.model_line}")
    if context is None:
        print(f"{clock.prompt} prompt tokens in {clock.prefill:.2f} s; ", end="")
        memory_line = session.memory_line
    else:
        print(f"{session.context_tokens} context tokens in {session.context_seconds:.2f} s; ", end="")
    print(f"{clock.tokens} new tokens, {clock.speed}")
    print(memory_line)


def _read(prompt: str | None, files: list[str], questions: list[str]) -> tuple[list[str], str | None]:
    """What is asked, and the text that it is about, if there is one."""
    if questions and not files:
        raise UsageError("--question asks about a text: give it as --context-file, or ask by the prompt alone")
    if prompt is None and not questions:
        instead = "a --question about the text" if files else "or a --context-file and a --question about it"
        raise UsageError(f"Missing argument 'prompt': what to answer, {instead}")
    if [*files, prompt].count("-") > 1:
        raise UsageError("stdin (-) can be read only once")
    asked = ([] if prompt is None else [sys.stdin.read() if prompt == "-" else prompt]) + questions
    for each in asked:
        if not each.strip():
            raise UsageError("a question is empty" if files else "the prompt is empty")
    return asked, read_contexts(files) if files else None

"""The command chat: a conversation in a terminal, all of it through one cache."""

import sys
from collections.abc import Iterator
from typing import Annotated

from kvcompress.cli.arguments import CacheOption, DeviceOption, DtypeOption, ModelOption
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

_SIGN = "> "
_COMMANDS = "/memory shows what the cache holds, /quit ends"


def chat(
    context_file: Annotated[list[str] | None, "Text to talk about, read first. May be given several times."] = None,
    model: ModelOption = None,
    cache: CacheOption = "h2o",
    budget: BudgetOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    prefill_chunk_size: ChunkOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    quantize_weights: WeightBitsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Talk to a model, turn by turn, through one cache; a line is a turn, and the end of the input ends it."""
    session = Session(
        model,
        cache,
        budget,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        raw=False,
        prefill_chunk_size=prefill_chunk_size,
        dtype=dtype,
        device=device,
        device_map=device_map,
        quantize_weights=quantize_weights,
    )
    if context_file:
        session.read(read_contexts(context_file))
    if not quiet:
        print(f"{session.model_line}; {_COMMANDS}")
    for line in _lines(quiet):
        if line == "/quit":
            break
        if line == "/memory":
            print(session.memory_line)
        elif line.startswith("/"):
            print(f"{line.split()[0]} is no command: {_COMMANDS}")
        else:
            session.answer(line)
    if not quiet:
        print(f"\n{session.clock.tokens} new tokens, {session.clock.speed}\n{session.memory_line}")


def _lines(quiet: bool) -> Iterator[str]:
    """What the user says, without empty lines."""
    # input() asks in a terminal, where lines can be edited; elsewhere lines are shown, so that the output can be read
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input(_SIGN if is_terminal else "").strip()
        except EOFError:
            return
        # bytes that are no UTF-8
        line = line.encode("utf-8", "replace").decode()
        if line and not is_terminal and not quiet:
            print(f"{_SIGN}{line}")
        if line:
            yield line

"""The command plan: what each cache would need, what fits, and which to take."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from kvcompress.cli.arguments import (
    IN_USUAL,
    KNOWN,
    USUAL,
    ModelOption,
    UsageError,
    as_budget,
    as_dtype,
    gibibytes,
    parts,
    show_table,
    user_errors,
)

if TYPE_CHECKING:
    from kvcompress.choosing import Choice
    from kvcompress.plan import Need

_UNITS = {"": 1, "k": 2**10, "m": 2**20}
# bytes of a GPU that are taken before anything runs
_CONTEXT = 2**29
_MOST_GIB = 2**20


def plan(
    context: Annotated[str, "Tokens that each sequence will have in the end: 131072, or 128k."],
    model: ModelOption = None,
    batch: Annotated[int, "Sequences at a time."] = 1,
    budget: Annotated[str, "Tokens kept (2048), or a fraction of the context (0.2)."] = "0.2",
    methods: Annotated[str, f"Comma-separated. Known: {KNOWN}. {USUAL}: {IN_USUAL}."] = f"none,{USUAL}",
    gpu_memory: Annotated[str, "Memory of the GPU: 24GiB, 80GB, or a number of GiB."] = "80",
    dtype: Annotated[str, "Of cache and weights: float32, bfloat16, float16; auto: the checkpoint's own."] = "auto",
    weights: Annotated[str, "Bits of the weights, 8 or 4 (bitsandbytes), or the dtype; else as --dtype."] = "",
    prefill_chunk: Annotated[str, "Tokens of a prompt in a forward; auto: all, or as many as fit."] = "auto",
    question_known: Annotated[
        Literal["yes", "no"], "Whether what is asked is at the end of the prompt, for the recommendation."
    ] = "no",
) -> None:
    """Tell, without loading weights, how much memory each cache would need, what would fit, and which to take."""
    tokens, tokens_kept, of_gpu = _tokens("--context", context), as_budget(budget), _memory(gpu_memory)
    memory = max(0, of_gpu - _CONTEXT)
    names = parts(methods)
    if not names:
        raise UsageError("--methods must name at least one")
    chunk = None if prefill_chunk == "auto" else _tokens("--prefill-chunk", prefill_chunk)

    from rich.console import Console
    from rich.table import Table

    from kvcompress.choosing import choose, largest_context, with_chunks
    from kvcompress.plan import is_sized, largest, make_plan, read_shape
    from kvcompress.registry import METHODS, expanded

    with user_errors():
        given = None if dtype == "auto" else as_dtype(dtype)
        bits = int(weights) if weights in ("4", "8") else None
        of_weights = None if weights == "" or bits is not None else as_dtype(weights, "--weights")
        shape = read_shape(model)
        kind = given or shape.dtype or as_dtype("bfloat16")
        if of_weights is not None and of_weights != kind:
            raise UsageError(
                f"--weights must be 8, 4 or the dtype of the cache, {str(kind).removeprefix('torch.')}, as a model "
                f"computes in the dtype of its weights; got {weights!r}"
            )
        # a refusal comes before all else
        make_plan(shape, ["none"], tokens, batch, tokens_kept, kind, chunk=chunk, weight_bits=bits)
        # installed caches are among the usual ones, and nobody asked for them by name
        unsized = [name for name in expanded([USUAL]) if name not in names and not is_sized(METHODS[name])]
        asked = [name for name in expanded(names) if name not in unsized]
        how: dict[str, Any] = {"chunk": chunk, "weight_bits": bits}

        def need_of(name: str, count: int) -> "Need":
            return with_chunks(shape, name, tokens, count, tokens_kept, kind, memory, **how)

        needs = [need_of(name, batch) for name in asked]
        choice = choose(shape, tokens, batch, kind, memory, question_known=question_known == "yes", **how)
        longest = [largest_context(shape, name, batch, tokens_kept, kind, memory, **how) for name in asked]
        widest = [largest(lambda count, name=name: need_of(name, count).peak <= memory, 2**16) for name in asked]  # type: ignore[misc]

    in_bits = "" if bits is None else f", linear layers in {bits} bits"
    table = Table(
        title=f"{shape.name}: {shape.parameters / 1e9:.2f} G parameters, {str(kind).removeprefix('torch.')}{in_bits}: "
        f"{gibibytes(needs[0].weights)} GiB; {tokens} tokens x batch {batch} on {gibibytes(of_gpu)} GiB"
    )
    for head in ("cache", "tokens kept", "cache, GiB", "of full", "prompt in chunks of", "peak, GiB", "fits"):
        table.add_column(head, justify="left" if head == "cache" else "right")
    for head in ("largest context", "largest batch"):
        table.add_column(head, justify="right")
    lines = list(zip(asked, needs, longest, widest, strict=True))
    best = None if choice is None else (choice.candidate.method, choice.need.budget)
    # what is recommended may be none of the rows, as those have no settings and one budget
    if choice is not None and best not in [(name, need.budget) for name, need, *_ in lines]:
        candidate = choice.candidate
        more = largest_context(shape, candidate.method, batch, candidate.budget or tokens_kept, kind, memory, **how)
        lines.append((candidate.method, choice.need, more, batch))
    for name, need, most_tokens, most_rows in lines:
        table.add_row(
            name,
            "all" if need.budget is None else str(need.budget),
            gibibytes(need.cache),
            f"{need.cache / need.full_cache:.1%}",
            "all" if need.chunk is None else str(need.chunk),
            gibibytes(need.peak),
            ("yes*" if (name, need.budget) == best else "yes") if need.peak <= memory else "no",
            str(most_tokens),
            str(most_rows),
        )
    show_table(table)
    console = Console()
    console.print(
        "Peak: weights, cache and what a forward over the prompt, or over a chunk of it, holds beside them. Half a GiB "
        "of the GPU is left to what it needs before anything runs. A cache that keeps every token grows in steps, and "
        f"may have room for more than it was fed.{'' if choice is None else ' *: recommended.'}"
    )
    if unsized:
        console.print(f"Left out, because their sizes are not known: {', '.join(unsized)}.")
    if shape.longest is not None and tokens > shape.longest:
        console.print(f"The model was trained for at most {shape.longest} tokens.")
    command, *why = _recommended(
        choice, model, str(kind).removeprefix("torch."), bits, question_known == "yes", any(longest)
    )
    # a line to copy is not broken
    print(command)
    for line in why:
        console.print(line, markup=False, highlight=False)


def _recommended(
    choice: "Choice | None", model: str | None, dtype: str, bits: int | None, question_known: bool, less_fits: bool
) -> list[str]:
    if choice is None:
        return ["Nothing fits: see the largest contexts, or try --weights 4." if less_fits else "Nothing fits at all."]
    candidate, need = choice.candidate, choice.need
    words = ["kvcompress generate", *(["--model", model] if model else []), "--cache", candidate.method]
    words += ["--budget", f"{candidate.budget:g}"] if candidate.budget is not None else []
    words += ["--prefill-chunk-size", str(need.chunk)] if need.chunk is not None else []
    words += ["--dtype", dtype, *(["--quantize-weights", str(bits)] if bits else [])]
    words += ["-"] if question_known else ["--context-file", "FILE", "--question", "..."]
    why = f"peak {gibibytes(need.peak)} GiB; measured on SmolLM2-135M: {candidate.measured}"
    return [f"Recommended: {' '.join(words)}", f"({why})"]


def _tokens(option: str, text: str) -> int:
    found = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if found is None:
        raise UsageError(f"{option} must be a number of tokens, such as 131072 or 128k, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def _memory(text: str) -> int:
    from kvcompress.memory import read_bytes

    try:
        number = float(text)
    except ValueError:
        try:
            return read_bytes("--gpu-memory", text)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if not 0 < number < _MOST_GIB:
        raise UsageError(f"--gpu-memory must be more than 0 GiB, and less than {_MOST_GIB}, got {text}")
    return int(number * 2**30)

"""The command plan: what each cache would need."""

import math
from typing import Annotated

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


def plan(
    context: Annotated[int, "Tokens that each sequence will have in the end."],
    model: ModelOption = None,
    batch: Annotated[int, "Sequences at a time."] = 1,
    budget: Annotated[str, "Tokens kept (2048), or a fraction of the context (0.2)."] = "0.2",
    methods: Annotated[str, f"Comma-separated. Known: {KNOWN}. {USUAL}: {IN_USUAL}."] = f"none,{USUAL}",
    gpu_memory: Annotated[float, "Memory of the GPU, in GiB."] = 80.0,
    dtype: Annotated[str, "Dtype of weights and cache: float32, bfloat16, float16."] = "bfloat16",
) -> None:
    """Tell, without loading weights, how much memory each cache would need and which fit."""
    tokens_kept = as_budget(budget)
    if not 0 < gpu_memory < math.inf:
        raise UsageError(f"--gpu-memory must be more than 0 GiB, got {gpu_memory}")
    names = parts(methods)
    if not names:
        raise UsageError("--methods must name at least one")

    from rich.console import Console
    from rich.table import Table

    from kvcompress.plan import is_sized, largest_batch, make_plan, read_shape
    from kvcompress.registry import METHODS, expanded

    with user_errors():
        kind = as_dtype(dtype)
        shape = read_shape(model)
        # installed caches are among the usual ones, and nobody asked for them by name
        unsized = [name for name in expanded([USUAL]) if name not in names and not is_sized(METHODS[name])]
        asked = [name for name in expanded(names) if name not in unsized]
        needs = make_plan(shape, asked, context, batch, tokens_kept, kind)
    table = Table(
        title=f"{shape.name}: {shape.parameters / 1e9:.2f} G parameters, {dtype}; {context} tokens x batch {batch}"
    )
    for head in ("cache", "tokens kept", "cache, GiB", "of full", "weights", "prefill, about", "peak", "fits"):
        table.add_column(head, justify="left" if head == "cache" else "right")
    table.add_column("largest batch", justify="right")
    for need in needs:
        fits = need.peak <= gpu_memory * 2**30
        table.add_row(
            need.method,
            "all" if need.budget is None else str(need.budget),
            gibibytes(need.cache),
            f"{need.cache / need.full_cache:.1%}",
            gibibytes(need.weights),
            gibibytes(need.prefill),
            gibibytes(need.peak),
            "yes" if fits else "no",
            str(largest_batch(need, batch, int(gpu_memory * 2**30))),
        )
    show_table(table)
    console = Console()
    console.print(
        f"GPU of {gpu_memory:g} GiB. Prefill: activations of one forward over the context and, for caches that evict, "
        "the full keys and values of one layer (kvzip and attention_matching: of all). Feeding the prompt in chunks "
        "needs less."
    )
    if unsized:
        console.print(f"Left out, because their sizes are not known: {', '.join(unsized)}.")
    if shape.longest is not None and context > shape.longest:
        console.print(f"The model was trained for at most {shape.longest} tokens.")

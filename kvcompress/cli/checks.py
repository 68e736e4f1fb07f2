"""The command check: compares every cache with the model run without one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcompress.cli.arguments import KNOWN, DeviceOption, UsageError, is_default, load, parts, user_errors

if TYPE_CHECKING:
    import torch

    from kvcompress.check.outcome import Checked


def check(
    context: typer.Context,
    model: Annotated[
        str | None,
        "Hub id, local folder, .gguf file or model type (qwen3); else SmolLM2, or a Llama.",
    ] = None,
    caches: Annotated[
        str | None,
        f"Comma-separated, with settings as in h2o:bits=4; else all. Known: {KNOWN}, across, swiftkv, prefix.",
    ] = None,
    weights: Annotated[bool, "Check the model itself instead of a tiny random one of its architecture."] = False,
    all_types: Annotated[
        bool,
        typer.Option("--all", help="Check every decoder-only type of the installed transformers instead of a model."),
    ] = False,
    out: Annotated[
        Path | None, "With --all: a .jsonl file of the results, from which the same command goes on."
    ] = None,
    verbose: Annotated[bool, "Show the traceback of each refusal and fault."] = False,
    dtype: Annotated[
        str | None,
        "With --weights: float32, bfloat16, float16 or auto; else the checkpoint's own on a GPU, float32 on a CPU.",
    ] = None,
    device: DeviceOption = None,
) -> int:
    """Tell whether kvcompress works here, with this model: compare every cache with the model run without one.

    It prints what a bug report needs. The exit status is 1 if a cache is at fault.
    """
    import torch
    from transformers import logging

    from kvcompress.check import check as checking
    from kvcompress.check.caches import default_caches
    from kvcompress.check.models import small_model
    from kvcompress.check.outcome import FULL
    from kvcompress.hf.small import described

    if out is not None and not all_types:
        raise UsageError("--out is of --all")
    if all_types:
        if any(not is_default(context, name) for name in ("model", "caches", "weights", "dtype", "device")):
            raise UsageError("--all checks tiny models of all types through the same caches: give it --out alone")
        return _check_all(out)
    specs = default_caches() if caches is None else list(parts(caches))
    if not specs:
        raise UsageError("--caches names no cache")
    with user_errors():
        asked = checking.read_specs(specs)
    # by a basis or a profile
    measured = [
        spec for spec, _, settings in asked if "basis" in settings or isinstance(settings.get("allocation"), Path)
    ]
    if not weights and measured:
        raise UsageError(
            f"{', '.join(measured)}: what was measured of a model does not fit the tiny random one that is checked "
            "without its weights: give --weights too"
        )
    if not weights and not is_default(context, "dtype"):
        raise UsageError("--dtype is of the model itself: give --weights too")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if weights:
        checked_model, _ = load(model, dtype, device)
    else:
        # products this small gain nothing from threads, and lose much if cores are busy
        torch.set_num_threads(1)
        with user_errors():
            checked_model = small_model(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    _show_facts(described(checked_model) + ("" if weights else "; tiny, with random weights"), checked_model.device)
    width = max(len(spec) for spec in (*specs, FULL))
    print(f"\n{'cache':<{width}}  {'':<7}  {'difference':>10}  {'lost':>6}")

    def show_one(row: "Checked") -> None:
        print(_line(row, width), flush=True)
        if verbose and row.trace:
            print(row.trace)

    rows = checking.check(checked_model, specs, show_one)
    count_of = {outcome: sum(row.outcome == outcome for row in rows) for outcome in ("OK", "REFUSED", "FAULT")}
    print(f"\n{count_of['OK']} OK, {count_of['REFUSED']} refused, {count_of['FAULT']} at fault")
    print("difference: the largest difference of logits that must be equal, over the largest logit")
    print("lost: the share of the prompt's worth, to what follows it, that packing loses")
    for limits in dict.fromkeys(row.limits for row in rows if row.limits):
        print(f"the model: {limits}")
    return 1 if count_of["FAULT"] else 0


def _check_all(out: Path | None) -> int:
    """Covers every type, and prints a line for each; 1 if a cache is at fault."""
    import torch
    from transformers import logging

    from kvcompress.check import coverage

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = coverage.read(out.read_text()) if out is not None and out.exists() else []

    def tell(covered: coverage.Covered) -> None:
        print(f"{covered.type:<28} {covered.served:<8} {covered.reason}".rstrip(), flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(coverage.line(covered) + "\n")

    rows = coverage.cover_all(known, tell)
    for kind in dict.fromkeys(row.kind for row in rows):
        print(f"{kind}: {coverage.counted([row for row in rows if row.kind == kind])}")
    return int(any(row.served == "fault" for row in rows))


def _line(row: "Checked", width: int) -> str:
    """A cache's line of the table, whose first column is so wide."""
    difference = "" if row.difference is None else f"{row.difference:.1e}"
    lost = "" if row.lost is None else f"{row.lost:.1%}"
    return f"{row.cache:<{width}}  {row.outcome:<7}  {difference:>10}  {lost:>6}  {row.reason}".rstrip()


def _show_facts(model: str, device: "torch.device") -> None:
    """What it ran on."""
    from kvcompress import __version__
    from kvcompress.evals.provenance import provenance

    facts = provenance(device)
    versions = {name: version or "not installed" for name, version in facts["versions"].items() if name != "kvcompress"}
    known = {
        "kvcompress": __version__ + (f", commit {facts['commit']}" if facts["commit"] else ""),
        **versions,
        "python": facts["python"],
        "system": facts["system"],
        "device": f"{device}: {facts['machine']}, {facts['threads']} threads",
        "command": facts["command"],
        "model": model,
    }
    for name, value in known.items():
        print(f"{name:<13} {value}")

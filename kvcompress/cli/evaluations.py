"""The command eval: lm-eval's tasks through a cache, with the bytes held beside the scores."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kvcompress.cli.arguments import (
    CacheOption,
    DeviceOption,
    ModelOption,
    UsageError,
    as_budget,
    as_object,
    check_extra,
    check_folder,
    parts,
    show_table,
    user_errors,
)

if TYPE_CHECKING:
    from rich.table import Table

    from kvcompress.evals.lm.model import CompressedLM

_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def evaluate(
    tasks: Annotated[str, "Comma-separated: tasks, groups and tags of lm-eval, mmlu_*, or those of --include-path."],
    model: ModelOption = None,
    cache: CacheOption = "none",
    budget: Annotated[str | None, "Tokens kept (512), or a fraction of the context (0.2)."] = None,
    hold_back: Annotated[
        str, "Read after compression: last tokens of a context, or all from a text such as Question:"
    ] = "1",
    chunk: Annotated[int, "Tokens read per forward after compression.", 1] = 64,
    num_fewshot: Annotated[int | None, "Examples in a context; else the task's own number.", 0] = None,
    limit: Annotated[float | None, "Documents per task (100), or a share of them (0.1)."] = None,
    batch_size: Annotated[str, "Sequences at a time; auto: on a GPU as many as fit, on a CPU 4."] = "1",
    max_batch_size: Annotated[int | None, "The most that --batch-size auto tries; else 64.", 1] = None,
    model_args: Annotated[str, "Others of lm-eval's hf model: dtype=bfloat16,max_length=4096."] = "",
    gen_kwargs: Annotated[str | None, "Of generation: temperature=0.7,do_sample=True."] = None,
    apply_chat_template: Annotated[bool, "Ask in the model's chat template."] = False,
    fewshot_as_multiturn: Annotated[bool, "With it: examples are turns of the chat."] = False,
    system_instruction: Annotated[str | None, "The chat's system prompt."] = None,
    include_path: Annotated[Path | None, "Folder with task files of your own."] = None,
    metadata: Annotated[str, 'For task files, as JSON: {"data": "/folder"}.'] = "{}",
    output_path: Annotated[Path | None, "Folder for the results as lm-eval writes them."] = None,
    log_samples: Annotated[bool, "Write every answer there too."] = False,
    use_cache: Annotated[str | None, "File that keeps answers from run to run."] = None,
    seed: Annotated[int | None, "Of everything random; else lm-eval's own."] = None,
    confirm_run_unsafe_code: Annotated[bool, "Run tasks that execute what the model writes."] = False,
    device: DeviceOption = None,
) -> int:
    """Run lm-eval's tasks through a cache, and show the bytes held beside the scores.

    Each context is compressed before the part held back is read, and scores are computed with what is left.

    Options have lm-eval's names, and may be written as lm-eval does: --num_fewshot.
    """
    check_extra("eval", "lm_eval")
    names = parts(tasks)
    if not names:
        raise UsageError("--tasks must name at least one")
    if log_samples and output_path is None:
        raise UsageError("--log-samples needs a folder to write them to: --output-path")
    if fewshot_as_multiturn and not apply_chat_template:
        raise UsageError("--fewshot-as-multiturn needs --apply-chat-template")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UsageError(f"--limit must be a number of documents, or a share of them below 1, got {limit:g}")
    given = as_object("--metadata", metadata)
    own = {
        "pretrained": model,
        "cache": cache,
        "budget": None if budget is None else as_budget(budget),
        "hold_back": int(hold_back) if hold_back.isdecimal() else hold_back,
        "chunk": chunk,
        "batch_size": batch_size,
        "max_batch_size": max_batch_size,
        "device": device,
    }
    if output_path is not None:
        check_folder(output_path)
    from kvcompress.evals.lm import harness

    with user_errors():
        # before the model is loaded, which may take minutes
        known = given if model is None else {"pretrained": model, **given}
        manager, found = harness.find_tasks(names, known, include_path)
    lm = _load(model_args, own)
    options: dict[str, Any] = {} if seed is None else dict.fromkeys(_SEEDS, seed)
    with user_errors():
        results = harness.run(
            lm,
            found,
            manager,
            output_path,
            log_samples,
            num_fewshot=num_fewshot,
            limit=limit,
            gen_kwargs=gen_kwargs,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            system_instruction=system_instruction,
            use_cache=use_cache,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            **options,
        )
    if results:
        _show(lm, results)
    return 0


def _load(model_args: str, own: dict[str, Any]) -> "CompressedLM":
    """The model with lm-eval's own arguments for it, beside those that have options here."""
    from transformers import logging

    from kvcompress.evals.lm.harness import errors_only
    from kvcompress.evals.lm.model import CompressedLM

    logging.disable_progress_bar()
    repeated = {part.partition("=")[0].strip() for part in parts(model_args)} & {
        name for name, value in own.items() if value is not None
    }
    if repeated:
        raise UsageError(
            f"--model-args must leave to their own options what these set, got {', '.join(sorted(repeated))}"
        )
    try:
        with user_errors(), errors_only():
            return CompressedLM.create_from_arg_string(model_args, own)
    except OSError as error:
        raise UsageError(f"cannot load the model {own['pretrained']}: {error}") from error


def _show(lm: "CompressedLM", results: dict[str, Any]) -> None:
    """Prints a row per metric, with what the cache held of the task's contexts."""
    from rich.table import Table

    asked = "" if lm.budget is None else f", budget {lm.budget}"
    table = Table(title=f"{lm.cache}{asked}: {lm.name}, {lm.batch_size} at a time", title_justify="left")
    for name in ("task", "shots", "metric"):
        table.add_column(name)
    for name in ("score", "±", "tokens kept", "of", "MiB held", "of the full cache"):
        table.add_column(name, justify="right")
    for name, found in results["results"].items():
        _add_rows(table, name, results.get("n-shot", {}).get(name, ""), found, lm.held(name))
    show_table(table)
    print("±: standard error. Tokens and MiB: of a context when its question came, on average")


def _add_rows(table: "Table", name: str, shots: Any, found: dict[str, Any], held: dict[str, float]) -> None:
    kept = []
    if held:
        mib = f"{held['bytes_held'] / 2**20:.3g}"
        kept = [f"{held['tokens_kept']:.1f}", f"{held['tokens_seen']:.1f}", mib, f"{held['ratio']:.1%}"]
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{kind}")
        shown = f"{error:.4f}" if isinstance(error, float) else ""
        kind = "" if kind == "none" else f" ({kind})"
        table.add_row(name, str(shots), metric + kind, f"{value:.4f}", shown, *kept)

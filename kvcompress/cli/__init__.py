"""The command line: sweep, report, eval, generate, plan, check, distill.

Heavy imports wait until a command runs. A user's mistake is one line on stderr and exit status 2.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.cli.arguments import (
    UsageError,
    as_budget,
    as_dtype,
    as_object,
    check_extra,
    check_folder,
    count,
    gibibytes,
    is_default,
    load,
    parts,
    unescaped,
    user_errors,
)
from kvcompress.cli.sweep import run_sweep, show

if TYPE_CHECKING:
    import torch


# what a sweep measures unless told: registry.USUAL
_METHODS = "usual"
_BUDGETS = "0.1,0.2,0.3,0.5,1.0"
_TASKS = "needle,needle_sentences,needle_essay,multikey,multivalue,kv,variables,passkey,text"

# what --quick sets, where the user does not
_QUICK: dict[str, Any] = {
    "budgets": "0.2,0.5",
    "tasks": "needle,text",
    "lengths": "512",
    "samples": 4,
    "continuation": 32,
    "chunk": 4,
}

# in a help text, until it is asked for: registry.METHODS, which takes seconds to import
_KNOWN = "{methods}"

app = typer.Typer(
    name="kvcompress",
    help="Compressed KV caches for transformers: measure them, use them, plan for them.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id, local folder or .gguf file; else SmolLM2-135M-Instruct.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; else a GPU where there is one.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0, or 1 where a point failed, 2 for a mistake, 130 for an interruption.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    if "--help" in arguments:
        _name_methods(command, arguments)
    try:
        status = command.main(args=arguments or ["--help"], prog_name="kvcompress", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # whoever read our output has gone; leave nothing for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, UsageError):
            message = str(error)
        elif hasattr(error, "format_message"):
            # typer carries click inside itself, or beside: its errors are known by this
            message = error.format_message()
        else:
            raise
        print("kvcompress: " + " ".join(message.split()), file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def _name_methods(command: Any, arguments: Sequence[str]) -> None:
    """Writes the known methods into the help of the command that the arguments name."""
    options = [
        option
        for name, part in getattr(command, "commands", {}).items()
        if name in arguments
        for option in part.params
        if _KNOWN in (getattr(option, "help", None) or "")
    ]
    if options:
        from kvcompress.registry import METHODS

        for option in options:
            option.help = option.help.replace(_KNOWN, ", ".join(METHODS))


def _show_versions(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version
        from platform import python_version

        from kvcompress import __version__

        print(f"kvcompress {__version__}\npython {python_version()}")
        for package in ("torch", "transformers", "triton"):
            try:
                print(package, version(package))
            except PackageNotFoundError:
                print(package, "not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="Of kvcompress, and of what it stands on."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def sweep(
    context: typer.Context,
    model: ModelOption = None,
    methods: Annotated[
        str, typer.Option(help=f"By commas; with settings as in h2o:sinks=4:bits=4. Of {_KNOWN}.")
    ] = _METHODS,
    budgets: Annotated[str, typer.Option(help="Fractions of the length (0.2), or tokens (512).")] = _BUDGETS,
    tasks: Annotated[str, typer.Option(help="By commas; any other name is that of a task of lm-eval's.")] = _TASKS,
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1024",
    samples: Annotated[int, typer.Option(help="Prompts, or windows of text, a point.")] = 20,
    protocols: Annotated[str, typer.Option(help="By commas.")] = "question-agnostic,question-aware",
    out: Annotated[Path, typer.Option(help="Folder for rows, table, plot and page.")] = Path("sweep"),
    quick: Annotated[bool, typer.Option("--quick", help="Some minutes on two cores; what else is set counts.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the folder already has.")] = False,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    hold_back: Annotated[int, typer.Option(help="Question-aware: question tokens read after compression.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    text: Annotated[str | None, typer.Option(help="UTF-8 file for the task text and for essays.")] = None,
    continuation: Annotated[int, typer.Option(help="Task text: tokens scored after each context.")] = 64,
    chunk: Annotated[int, typer.Option(help="Task text: tokens read a forward; generation reads 1.")] = 1,
    num_fewshot: Annotated[int | None, typer.Option(help="lm-eval's tasks: examples in a context.")] = None,
    limit: Annotated[int | None, typer.Option(help="lm-eval's tasks: documents a point.")] = None,
    metadata: Annotated[str, typer.Option(help='lm-eval\'s tasks: as JSON, {"data": "/folder"}.')] = "{}",
    question: Annotated[
        str | None,
        typer.Option(
            help="lm-eval's tasks, question-agnostic: how a question begins, such as Question:; else the last example."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: DeviceOption = None,
) -> int:
    """Measure accuracy against memory: every method, at every budget, on every task.

    Finished points are kept in the folder and not repeated; a point that fails is reported, and the rest goes on.
    Several processes share the points of a folder: accelerate launch -m kvcompress sweep ...
    """
    check_extra("eval", "matplotlib")
    values: dict[str, Any] = {
        "methods": methods,
        "budgets": budgets,
        "tasks": tasks,
        "lengths": lengths,
        "samples": samples,
        "protocols": protocols,
        "continuation": continuation,
        "chunk": chunk,
    }
    if quick:
        values |= {name: value for name, value in _QUICK.items() if is_default(context, name)}
    kinds: dict[str, Callable[[str], Any]] = {"lengths": count, "budgets": as_budget}
    for name in ("methods", "budgets", "tasks", "lengths", "protocols"):
        values[name] = tuple(kinds.get(name, str)(part) for part in parts(values[name]))

    from kvcompress.evals.sweep.points import Settings
    from kvcompress.registry import expanded

    values["methods"] = expanded(values["methods"])
    with user_errors():
        settings = Settings(
            **values, seed=seed, hold_back=hold_back, batch=batch, text=text, num_fewshot=num_fewshot, limit=limit,
            metadata=as_object("--metadata", metadata), question=None if question is None else unescaped(question),
        )  # fmt: skip
    check_folder(out)
    return run_sweep(settings, model, out, fresh, dtype, device)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Of sweeps.")],
    out: Annotated[Path, typer.Option(help="Folder for table, plot and page.")] = Path("report"),
) -> int:
    """Put the rows of several sweeps into one table, plot and page."""
    check_extra("eval", "matplotlib")
    from kvcompress.evals.sweep import report as reports

    with user_errors():
        rows = reports.collect(folders)
    check_folder(out)
    return show(rows, reports.write_all(rows, out))


@app.command(name="eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(
    context: typer.Context,
    model: ModelOption = None,
    cache: Annotated[str, typer.Option(help=f"With settings as in h2o:sinks=4:bits=4. Of {_KNOWN}.")] = "none",
    budget: Annotated[str | None, typer.Option(help="Tokens kept (512), or a fraction of the context (0.2).")] = None,
    hold_back: Annotated[
        str, typer.Option(help="Read after compression: last tokens of a context, or all from a text such as Question:")
    ] = "1",
    chunk: Annotated[int, typer.Option(help="Tokens read a forward after compression.")] = 64,
) -> int:
    """Run lm-eval's tasks through a cache. All other flags are those of `lm-eval run`: --tasks, --num_fewshot, ...

    The context is compressed before what is held back is read, and every score comes through what is left. Bytes held
    stand beside the scores, in the harness's own output.
    """
    check_extra("eval", "lm_eval")
    rest = list(context.args)
    settings = {"pretrained": model, "cache": cache, "budget": budget, "hold_back": hold_back, "chunk": chunk}
    for name, value in settings.items():
        if isinstance(value, str) and ("," in value or (name != "cache" and "=" in value)):
            raise UsageError(f"--{name.replace('_', '-')} must not contain a comma or an equals sign, got {value!r}")
    if budget is not None:
        as_budget(budget)
    passed = ",".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    if "--model_args" in rest:
        at = rest.index("--model_args")
        passed = ",".join([passed, *rest[at + 1 : at + 2]])
        del rest[at : at + 2]
    from kvcompress.evals.lm.model import run_harness

    with user_errors():
        run_harness(["--model_args", passed, *rest])
    return 0


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from stdin.")],
    model: ModelOption = None,
    cache: Annotated[str, typer.Option(help=f"With settings as in h2o:sinks=4:bits=4. Of {_KNOWN}.")] = "h2o",
    budget: Annotated[str, typer.Option(help="Tokens kept (512), or a fraction of those seen (0.2).")] = "512",
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt, without the chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: DeviceOption = None,
) -> None:
    """Answer a prompt through a cache, and show its memory and speed."""
    tokens_kept = as_budget(budget)
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise UsageError(f"--temperature must be 0 or more, got {temperature}")
    question = sys.stdin.read() if prompt == "-" else prompt
    if not question.strip():
        raise UsageError("the prompt is empty")

    from kvcompress import registry

    with user_errors():
        registry.parse(cache)
    _generate(question, model, cache, tokens_kept, max_new_tokens, temperature, raw, seed, dtype, device)


@app.command()
def plan(
    context: Annotated[int, typer.Option(help="Tokens a sequence will have in the end.")],
    model: ModelOption = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    budget: Annotated[str, typer.Option(help="Tokens kept (2048), or a fraction of the context (0.2).")] = "0.2",
    methods: Annotated[str, typer.Option(help=f"By commas. Of {_KNOWN}.")] = f"none,{_METHODS}",
    gpu_memory: Annotated[float, typer.Option(help="Of the GPU, in GiB.")] = 80.0,
    dtype: Annotated[str, typer.Option(help="Of weights and cache: float32, bfloat16, float16.")] = "bfloat16",
) -> None:
    """Tell, without loading weights, what each cache would need and which fits."""
    tokens_kept = as_budget(budget)
    if not 0 < gpu_memory < math.inf:
        raise UsageError(f"--gpu-memory must be more than 0 GiB, got {gpu_memory}")
    names = parts(methods)

    from rich.console import Console
    from rich.table import Table

    from kvcompress.plan import largest_batch, make_plan, read_shape
    from kvcompress.registry import expanded

    with user_errors():
        kind = as_dtype(dtype)
        shape = read_shape(model)
        needs = make_plan(shape, expanded(names), context, batch, tokens_kept, kind)
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
    console = Console()
    console.print(table)
    console.print(
        f"GPU of {gpu_memory:g} GiB. Prefill: activations of one forward over the context and, where a cache evicts, "
        "the full keys and values of one layer (kvzip: of all). Feeding the prompt in chunks needs less."
    )
    if shape.longest is not None and context > shape.longest:
        console.print(f"The model was trained for at most {shape.longest} tokens.")


@app.command()
def check(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Hub id, local folder, .gguf file or model type (qwen3); else SmolLM2, or a Llama."
        ),
    ] = None,
    caches: Annotated[
        str | None,
        typer.Option(
            help=f"By commas, with settings as in h2o:bits=4. Of {_KNOWN}, across, swiftkv, prefix; else all of them."
        ),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Check the model itself, and not a tiny random one of its architecture.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With the traceback of each refusal and fault.")] = False,
    dtype: Annotated[str, typer.Option(help="With --weights: float32, bfloat16, float16 or auto.")] = "float32",
    device: DeviceOption = None,
) -> int:
    """Tell whether kvcompress works here, with this model: every cache against the model run without one.

    What it prints is what a bug report needs. The exit status is 1 where a cache is at fault.
    """
    import torch
    from transformers import logging

    from kvcompress import __version__, registry
    from kvcompress import check as checks
    from kvcompress.evals.provenance import provenance
    from kvcompress.hf.small import described

    specs = checks.default_caches() if caches is None else list(parts(caches))
    if not specs:
        raise UsageError("--caches names no cache")
    with user_errors():
        for spec in specs:
            registry.parse(spec, checks.known_caches())
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if weights:
        checked_model, _ = load(model, dtype, device)
    else:
        # products this small gain nothing from threads, and lose much where cores are busy
        torch.set_num_threads(1)
        with user_errors():
            checked_model = checks.small_model(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    facts = provenance(checked_model.device)
    versions = {name: version or "not installed" for name, version in facts["versions"].items() if name != "kvcompress"}
    known = {
        "kvcompress": __version__ + (f", commit {facts['commit']}" if facts["commit"] else ""),
        **versions,
        "python": facts["python"],
        "system": facts["system"],
        "device": f"{checked_model.device}: {facts['machine']}, {facts['threads']} threads",
        "command": facts["command"],
        "model": described(checked_model) + ("" if weights else "; tiny, with random weights"),
    }
    for name, value in known.items():
        print(f"{name:<13} {value}")
    width = max(len(spec) for spec in (*specs, checks.FULL))
    print(f"\n{'cache':<{width}}  {'':<7}  {'difference':>10}  {'lost':>6}")

    def show_one(row: checks.Checked) -> None:
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        lost = "" if row.lost is None else f"{row.lost:.1%}"
        print(f"{row.cache:<{width}}  {row.outcome:<7}  {difference:>10}  {lost:>6}  {row.reason}".rstrip(), flush=True)
        if verbose and row.trace:
            print(row.trace)

    rows = checks.check(checked_model, specs, show_one)
    count_of = {outcome: sum(row.outcome == outcome for row in rows) for outcome in ("OK", "REFUSED", "FAULT")}
    print(f"\n{count_of['OK']} OK, {count_of['REFUSED']} refused, {count_of['FAULT']} at fault")
    print("difference: the largest between logits that must be equal, over the largest logit")
    print("lost: by packed tokens, of what the prompt is worth to what follows it")
    return 1 if count_of["FAULT"] else 0


@app.command()
def distill(
    data: Annotated[list[Path], typer.Argument(help="Text files, or .jsonl with a text or a chat a line.")],
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the model, losses and checkpoints; an old run goes on.")] = Path(
        "swiftkv"
    ),
    skip_from: Annotated[str, typer.Option(help="First layer the prompt skips: index, or fraction (0.5).")] = "0.5",
    share: Annotated[int, typer.Option(help="Later layers that share keys and values.")] = 1,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    batch: Annotated[int, typer.Option(help="Rows a process and forward.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Forwards an update.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a row at most.")] = 2048,
    fit_tokens: Annotated[int, typer.Option(help="Fit keys and values to so many by least squares first.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 2e-4,
    hidden_weight: Annotated[float, typer.Option(help="Of the hidden states' squared error.")] = 1.0,
    precision: Annotated[str, typer.Option(help="Of the forwards: no, bf16 or fp16.")] = "no",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute layers twice, hold less.")] = False,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    log_every: Annotated[int, typer.Option(help="Updates between lines of progress.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the data's order.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: float32, bfloat16, float16 or auto.")] = "float32",
) -> None:
    """Convert a model to SwiftKV and train what is new by its own teacher: accelerate launch -m kvcompress distill ...

    The folder then loads as any model: load_model("swiftkv").
    """
    check_extra("distill", "accelerate")
    for path in data:
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
    values: dict[str, Any] = {
        "steps": steps, "batch": batch, "accumulate": accumulate, "length": length, "fit_tokens": fit_tokens,
        "learning_rate": learning_rate, "hidden_weight": hidden_weight, "precision": precision,
        "checkpointing": checkpointing, "save_every": save_every, "log_every": log_every, "seed": seed,
    }  # fmt: skip
    try:
        split = float(skip_from) if "." in skip_from else int(skip_from)
    except ValueError:
        raise UsageError(
            f"--skip-from must be a layer such as 15, or a fraction such as 0.5, got {skip_from!r}"
        ) from None
    check_folder(out)

    from kvcompress.swiftkv import distill as distillation
    from kvcompress.swiftkv.data import read_rows
    from kvcompress.swiftkv.model import SwiftKVModel, convert

    with user_errors():
        settings = distillation.Distillation(**values)
    # each process then moves it to the device that is its own
    loaded, tokenizer = load(model, dtype, "cpu")
    with user_errors():
        student: Any = loaded if isinstance(loaded, SwiftKVModel) else convert(loaded, split, share)
        rows = read_rows(data, tokenizer, settings.length)

    def show(line: dict[str, float]) -> None:
        if line["step"] % settings.log_every == 0 or line["step"] in (1, settings.steps):
            print(
                f"{line['step']}/{settings.steps}  loss {line['loss']:.4f}  divergence {line['divergence']:.4f}  "
                f"hidden {line['hidden']:.4f}  {line['seconds']:.0f} s",
                flush=True,
            )

    with user_errors():
        distillation.distill(student, rows, settings, out, show)
    if int(os.environ.get("RANK", "0")) == 0:
        student.save_pretrained(out)
        tokenizer.save_pretrained(out)
        print(out)


def _generate(
    question: str,
    name: str | None,
    method: str,
    budget: int | float,
    max_new_tokens: int,
    temperature: float,
    raw: bool,
    seed: int,
    dtype: str,
    device: str | None,
) -> None:
    from transformers import TextStreamer, set_seed

    from kvcompress import registry
    from kvcompress.hf import cache_argument

    class Clock(TextStreamer):
        """Prints text as it comes and notes when each token did."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self.times: list[float] = []

        def put(self, value: "torch.Tensor") -> None:
            self.times.append(time.perf_counter())
            super().put(value)

    model, tokenizer = load(name, dtype, device)
    if raw or not tokenizer.chat_template:
        inputs = tokenizer(question, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    with user_errors():
        cache = registry.build(method, model, budget)
    set_seed(seed)
    clock = Clock(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    generate: Any = model.generate
    with_cache = cache_argument(model, cache)
    generate(**inputs.to(model.device), **with_cache, max_new_tokens=max_new_tokens, streamer=clock, **sampling)
    # the first time is the prompt's, the second the first token's, which ends the prefill
    prompt_tokens, new_tokens = inputs["input_ids"].shape[1], len(clock.times) - 1
    prefill, decode = clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]
    speed = f"{(new_tokens - 1) / decode:.1f} tokens/s" if new_tokens > 1 else "one token"
    print(f"\n{prompt_tokens} prompt tokens in {prefill:.2f} s; {new_tokens} new tokens, {speed}")
    print(f"{registry.canonical(method)}: {cache.memory()}")

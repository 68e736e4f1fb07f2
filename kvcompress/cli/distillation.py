"""The command distill: converts a model to SwiftKV, fits and trains what is new with the original model as teacher; or
tells beforehand what conversions would cost."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.cli.arguments import (
    DataArgument,
    ModelOption,
    UsageError,
    check_extra,
    check_folder,
    is_default,
    load,
    user_errors,
)

# what a fit alone reads
_FIT_TOKENS = 32768


def distill(
    context: typer.Context,
    data: DataArgument,
    model: ModelOption = None,
    out: Annotated[Path, "Folder for the model, losses and checkpoints; an earlier run is resumed."] = Path("swiftkv"),
    skip_from: Annotated[str, "First layer that prompts skip: its index, a fraction (0.5), or auto."] = "0.5",
    share: Annotated[int, "How many later layers share keys and values."] = 1,
    own_last: Annotated[int, "Last tokens of prompts that run all layers, and keep their own keys and values."] = 0,
    skip_between: Annotated[
        tuple[int, int] | None, "With --own-last, prompts skip these layers too: the first, and the one behind them."
    ] = None,
    diagnose: Annotated[bool, "Only tell what conversions from each layer on would cost and keep."] = False,
    text: Annotated[list[Path] | None, "Texts to measure on; without, the last of the data, not learned from."] = None,
    held_out: Annotated[int, "Tokens of each text to measure on, at every checkpoint too; 0 for none."] = 2048,
    retrieval: Annotated[float, "Share of generated rows that ask for what they hold."] = 0.5,
    steps: Annotated[int, "Updates; 0 only fits."] = 1000,
    batch: Annotated[int, "Rows per process and forward."] = 1,
    accumulate: Annotated[int, "Forwards per update."] = 1,
    length: Annotated[int, "Maximum tokens per row."] = 2048,
    fit_tokens: Annotated[int | None, "First fit keys and values to so many tokens by least squares."] = None,
    learning_rate: Annotated[float, "The highest."] = 2e-4,
    hidden_weight: Annotated[float, "Weight of the hidden states' squared error."] = 1.0,
    precision: Annotated[str, "Precision of the forwards: no, bf16 or fp16."] = "no",
    checkpointing: Annotated[bool, "Compute layers twice, to hold less memory."] = False,
    save_every: Annotated[int, "Updates between checkpoints."] = 100,
    log_every: Annotated[int, "Updates between lines of progress."] = 10,
    seed: Annotated[int, "Seed of the data's order."] = 0,
    dtype: Annotated[str, "Dtype of the frozen weights: float32, bfloat16, float16 or auto."] = "float32",
) -> None:
    """Convert a model to SwiftKV and distill the original into it: accelerate launch -m kvcompress distill ...

    The folder then loads like any model: load_model("swiftkv").
    """
    check_extra("distill", "accelerate")
    for path in (*data, *(text or ())):
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
    if steps < 0:
        raise UsageError(f"--steps must be 0 or more, got {steps}")
    auto = skip_from == "auto"
    split = 1 if auto else _layer(skip_from)
    if held_out < 0:
        raise UsageError(f"--held-out must be 0 or more tokens, got {held_out}")
    if not held_out and (auto or diagnose):
        raise UsageError("--held-out 0 leaves nothing for --diagnose and --skip-from auto to measure on")
    for given, option in ((text, "--text"), (held_out and not is_default(context, "held_out"), "--held-out")):
        if given and not (auto or diagnose or steps):
            raise UsageError(f"{option} is what training, --diagnose and --skip-from auto measure on; a fit does not")
    if text and not held_out:
        raise UsageError("--held-out 0 measures nothing, and --text is what to measure on")
    if own_last and share > 1:
        raise UsageError(f"--own-last gives each layer keys and values of its own, and --share {share} takes them away")
    if skip_between and not own_last:
        raise UsageError("--skip-between is for the tokens of a prompt that are not its last: it needs --own-last")
    if skip_between and steps and not diagnose:
        raise UsageError("--skip-between is fitted, not trained: it needs --steps 0")
    if steps == 0 and fit_tokens == 0 and not diagnose:
        raise UsageError("--steps 0 --fit-tokens 0 leaves nothing to do")
    if fit_tokens is None:
        fit_tokens = _FIT_TOKENS if auto or diagnose or steps == 0 else 0
    check_folder(out)

    from kvcompress.swiftkv import distill as distillation
    from kvcompress.swiftkv.conversion import convert
    from kvcompress.swiftkv.data import first_rows, read_rows
    from kvcompress.swiftkv.frontier import best_conversion
    from kvcompress.swiftkv.least_squares import fit
    from kvcompress.swiftkv.model import SwiftKVModel, set_own_last
    from kvcompress.swiftkv.probes import hold_out
    from kvcompress.swiftkv.retrieval import with_retrieval

    names = {setting.name for setting in dataclasses.fields(distillation.Distillation)}
    values = {name: value for name, value in context.params.items() if name in names}
    # what auto has fitted needs no other start
    values |= {"steps": max(1, steps), "fit_tokens": 0 if auto else fit_tokens}
    with user_errors():
        settings = distillation.Distillation(**values)
    # each process then moves it to its own device
    loaded, tokenizer = load(model, dtype, "cpu")
    with user_errors():
        rows = read_rows(data, tokenizer, length)
        named = {path.stem for path in text or ()}
        unique = len(named) == len(text or ())
        texts = {
            path.stem if unique else str(path): read_rows([path], tokenizer, length) for path in text or ()
        } or None
        how: Any = {"texts": texts, "fit_tokens": fit_tokens, "length": length, "retrieval": retrieval, "seed": seed}
        how |= {"own_last": own_last, "skip_between": skip_between, "probe_tokens": held_out}
        if diagnose:
            _diagnose(loaded, tokenizer, rows, share, how, out)
            return
        if auto:
            student: Any = best_conversion(loaded, tokenizer, rows, share, **how)
            print(f"prompts skip the layers from {student.config.num_key_value_layers} on", flush=True)
        else:
            if isinstance(loaded, SwiftKVModel):
                if skip_between:
                    raise ValueError(f"--skip-between makes another conversion; {model} is one: give its original")
                for name in ("skip_from", "share"):
                    if not is_default(context, name):
                        option = f"--{name.replace('_', '-')}"
                        raise ValueError(f"{option} makes another conversion; {model} is one: give its original")
                if own_last:
                    set_own_last(loaded, own_last)
                student = loaded
            else:
                student = convert(loaded, split, share, own_last=own_last, skip_between=skip_between)
        held = None
        if steps and held_out:
            rows, held = hold_out(
                rows, tokenizer, texts=texts, tokens=held_out, length=length, seed=seed, asks=bool(retrieval)
            )
        if retrieval:
            rows = with_retrieval(rows, tokenizer, length, retrieval, seed)

    def show(line: dict[str, float]) -> None:
        if line["step"] % settings.log_every == 0 or line["step"] in (1, settings.steps):
            losses = "  ".join(f"{name} {line[name]:.4f}" for name in ("loss", "divergence", "hidden"))
            print(f"{line['step']}/{settings.steps}  {losses}  {line['seconds']:.0f} s", flush=True)

    def show_score(score: dict[str, Any]) -> None:
        teacher = score["teacher"]
        parts = [
            f"perplexity of {name}: {value:.2f} (the model's {teacher['perplexity'][name]:.2f})"
            for name, value in score["perplexity"].items()
        ]
        parts += [f"found: {score['found']:.2f} ({teacher['found']:.2f})"] if score["found"] is not None else []
        parts += [f"KL: {score['divergence']:.4f}"]
        print(f"{score['step']}/{settings.steps}  {'  '.join(parts)}", flush=True)

    with user_errors():
        if steps:
            distillation.distill(student, rows, settings, out, show, held_out=held, on_score=show_score)
        elif not auto:
            fit(student, first_rows(rows, fit_tokens, seed))
    if int(os.environ.get("RANK", "0")) == 0:
        student.save_pretrained(out)
        tokenizer.save_pretrained(out)
        if held is not None:
            scores = [json.loads(line) for line in (out / "scores.jsonl").read_text("utf-8").splitlines()]
            best = next(score["step"] for score in reversed(scores) if score["best"])
            print(f"the model as it was after {best} updates, which scored best")
        print(out)


def _diagnose(model: Any, tokenizer: Any, rows: Any, share: int, how: dict[str, Any], out: Path) -> None:
    """Prints the frontier, and writes it to frontier.json and frontier.png."""
    from kvcompress import hf
    from kvcompress.swiftkv.frontier import Point, conversions, diagnose, usual_firsts

    shares = sorted({1, share})
    layers = hf.sizes(model.config).layers
    planned = len(conversions(layers, usual_firsts(layers, how["skip_between"]), shares))
    measured = itertools.count(1)
    print(f"{planned} conversions, after one pass over {how['fit_tokens']} tokens", flush=True)

    def show(point: Point) -> None:
        print(f"{next(measured)}/{planned}  layer {point.first}, share {point.share}: measured", flush=True)

    frontier, _ = diagnose(model, tokenizer, rows, shares=shares, on_point=show, **how)
    out.mkdir(parents=True, exist_ok=True)
    (out / "frontier.json").write_text(json.dumps(frontier.facts(), indent=1) + "\n", encoding="utf-8")
    frontier.plot(out / "frontier.png")
    print(frontier.table())
    print(out / "frontier.json")


def _layer(text: str) -> int | float:
    """A layer's index, or a fraction of the layers."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(f"--skip-from must be a layer such as 15, or a fraction such as 0.5, got {text!r}") from None

"""The command distill: converts a model to SwiftKV, and trains what is new with the original model as teacher."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompress.cli.arguments import DataArgument, ModelOption, UsageError, check_extra, check_folder, load, user_errors


def distill(
    context: typer.Context,
    data: DataArgument,
    model: ModelOption = None,
    out: Annotated[Path, "Folder for the model, losses and checkpoints; an earlier run is resumed."] = Path("swiftkv"),
    skip_from: Annotated[str, "First layer that prompts skip: its index, or a fraction (0.5)."] = "0.5",
    share: Annotated[int, "How many later layers share keys and values."] = 1,
    steps: Annotated[int, "Updates."] = 1000,
    batch: Annotated[int, "Rows per process and forward."] = 1,
    accumulate: Annotated[int, "Forwards per update."] = 1,
    length: Annotated[int, "Maximum tokens per row."] = 2048,
    fit_tokens: Annotated[int, "First fit keys and values to so many tokens by least squares."] = 0,
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
    for path in data:
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
    split = _layer(skip_from)
    check_folder(out)

    from kvcompress.swiftkv import distill as distillation
    from kvcompress.swiftkv.conversion import convert
    from kvcompress.swiftkv.data import read_rows
    from kvcompress.swiftkv.model import SwiftKVModel

    names = {setting.name for setting in dataclasses.fields(distillation.Distillation)}
    values = {name: value for name, value in context.params.items() if name in names}
    with user_errors():
        settings = distillation.Distillation(**values)
    # each process then moves it to its own device
    loaded, tokenizer = load(model, dtype, "cpu")
    with user_errors():
        student: Any = loaded if isinstance(loaded, SwiftKVModel) else convert(loaded, split, share)
        rows = read_rows(data, tokenizer, settings.length)

    def show(line: dict[str, float]) -> None:
        if line["step"] % settings.log_every == 0 or line["step"] in (1, settings.steps):
            losses = "  ".join(f"{name} {line[name]:.4f}" for name in ("loss", "divergence", "hidden"))
            print(f"{line['step']}/{settings.steps}  {losses}  {line['seconds']:.0f} s", flush=True)

    with user_errors():
        distillation.distill(student, rows, settings, out, show)
    if int(os.environ.get("RANK", "0")) == 0:
        student.save_pretrained(out)
        tokenizer.save_pretrained(out)
        print(out)


def _layer(text: str) -> int | float:
    """A layer's index, or a fraction of the layers."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(f"--skip-from must be a layer such as 15, or a fraction such as 0.5, got {text!r}") from None

"""The command calibrate: measures the basis of a model's keys and values, for `basis=` of GEARCache and for codecs."""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.arguments import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    UsageError,
    check_folder,
    check_seed,
    load,
    user_errors,
)


def calibrate(
    data: Annotated[list[Path], typer.Argument(help="Text files, or .jsonl with a text or a chat per line.")],
    model: ModelOption = None,
    out: Annotated[Path, "File for the basis; one that is there is replaced."] = Path("basis.safetensors"),
    length: Annotated[int, "Tokens of each piece of text that is read.", 16] = 1024,
    texts: Annotated[int, "How many pieces of that length, at most, of all files together.", 1] = 32,
    seed: Annotated[int, "Of which ones."] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure in which directions a model's keys and values vary, over all KV heads of a layer.

    Keys are then packed in these directions: --cache gear:bits=2:basis=basis.safetensors.
    """
    for path in data:
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
    check_seed(seed)
    if out.is_dir():
        raise UsageError(f"--out must be a file, {out} is a folder")

    from kvcompress.caches.calibration import SINKS, measure_basis
    from kvcompress.swiftkv.data import first_rows, read_rows

    check_folder(out.parent)
    loaded, tokenizer = load(model, dtype, device)
    with user_errors():
        found = first_rows(read_rows(data, tokenizer, length), texts * length, seed)
        used = [ids for ids in found if len(ids) > SINKS][:texts]
        basis = measure_basis(loaded, used, source=", ".join(path.name for path in data))
        basis.save(out)
    print(basis)
    print(out)

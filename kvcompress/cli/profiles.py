"""The command profile: measures each head's share of the budget, for `allocation=` of any evicting cache."""

from pathlib import Path
from typing import Annotated

from kvcompress.cli.arguments import (
    DataArgument,
    DeviceOption,
    DtypeOption,
    ModelOption,
    UsageError,
    as_budget,
    check_folder,
    check_seed,
    load,
    parts,
    user_errors,
)


def profile(
    data: DataArgument,
    model: ModelOption = None,
    out: Annotated[Path, "File for the profile; one that is there is replaced."] = Path("profile.safetensors"),
    policy: Annotated[str, "Whose scores heads compete with: kvzip, attention_matching, snapkv, h2o, ..."] = "kvzip",
    budgets: Annotated[
        str, "Fractions of a text (0.2), or tokens (128), by commas; shares are averaged."
    ] = "0.1,0.2,0.3",
    length: Annotated[int, "Tokens of each text that is read; as long as your own.", 1] = 1024,
    texts: Annotated[int, "How many texts of that length, at most.", 1] = 16,
    seed: Annotated[int, "Of which ones."] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure each layer's and KV head's share of the budget, where all compete.

    The file is then an allocation of any evicting cache: --cache h2o:allocation=profile.safetensors.
    """
    for path in data:
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
    amounts = [as_budget(part) for part in parts(budgets)]
    if not amounts:
        raise UsageError("--budgets must name at least one")
    check_seed(seed)
    if out.is_dir():
        raise UsageError(f"--out must be a file, {out} is a folder")

    from kvcompress import registry
    from kvcompress.caches.evicting import kept_budget
    from kvcompress.caches.profiling import least_tokens, measure_profile
    from kvcompress.swiftkv.data import first_rows, read_rows

    with user_errors():
        scores, of_cache = registry.policy_of(*registry.parse(policy))
        if of_cache:
            raise UsageError(f"--policy takes a policy's own settings, got {', '.join(of_cache)}")
        if scores.compares == "no":
            raise UsageError(f"--policy must be one whose scores compare across heads, such as kvzip, got {policy}")
        for amount in amounts:
            kept_budget(amount, scores)
    check_folder(out.parent)
    loaded, tokenizer = load(model, dtype, device)
    with user_errors():
        found = first_rows(read_rows(data, tokenizer, length), texts * length, seed)
        least = least_tokens(scores, amounts)
        used = [ids for ids in found if len(ids) >= least]
        if not used:
            raise UsageError(
                f"no text has the {least} tokens that these budgets need, the longest has {max(map(len, found))}; "
                f"--length is {length}"
            )
        if len(used) < len(found):
            print(f"left out: {len(found) - len(used)} of {len(found)} texts, shorter than {least} tokens")
        source = ", ".join(path.name for path in data)
        measured = measure_profile(loaded, used, policy=scores, budgets=amounts, source=source)
        measured.save(out)
    print(measured)
    print(out)

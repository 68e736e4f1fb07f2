r"""Answers the prompts of `kvcompress peers prompts` with kvpress, in kvpress's own environment.

kvpress needs transformers < 5.3, on which kvcompress does not run; this file imports nothing from kvcompress:

    python -m venv kvpress-venv
    kvpress-venv/bin/pip install torch 'kvpress==0.5.5' 'transformers>=5.0,<5.3'
    kvpress-venv/bin/python evals/peers/kvpress_answers.py prompts/prompts.jsonl --model FOLDER \
        --out prompts/kvpress.jsonl

A press compresses at the end of the first forward, which no press changes, so one prefill is enough for all: each
press's own `compress` gets what its hook would give it, and has its own copy of the result (`--verify` runs the first
prompt again through the press's own hooks, and compares). kvpress never compresses what follows, the question and the
answer: these are outside its budget and counted in `bytes_after`.

A press that only masks what it drops still holds it: such a row says masked, and its bytes include it.
"""

import argparse
import json
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache

# the first drop keys and values after a forward; the others read the context again, or mask what they drop in the
# attention function
TOGETHER = (
    "streaming", "snapkv", "tova", "knorm", "keydiff", "expected", "observed", "chunkkv-snapkv", "chunkkv-keydiff"
)  # fmt: skip
ALONE = ("adakv-expected", "adakv-keydiff", "kvzip")

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def make_press(name: str, ratio: float) -> Any:
    """A press with kvpress's own settings, which drops this share of the tokens."""
    import kvpress

    plain = {
        "streaming": kvpress.StreamingLLMPress,
        "snapkv": kvpress.SnapKVPress,
        "tova": kvpress.TOVAPress,
        "knorm": kvpress.KnormPress,
        "keydiff": kvpress.KeyDiffPress,
        "expected": kvpress.ExpectedAttentionPress,
        "observed": kvpress.ObservedAttentionPress,
        "kvzip": kvpress.KVzipPress,
    }
    around = {"chunkkv": kvpress.ChunkKVPress, "adakv": kvpress.AdaKVPress}
    outer, _, inner = name.rpartition("-")
    return around[outer](plain[inner](ratio)) if outer else plain[inner](ratio)


@torch.no_grad()
def prefill(model: Any, ids: list[int], presses: dict[tuple[str, float], Any]) -> dict[tuple[str, float], Pairs]:
    """The keys and values by layer that each press keeps of a context, after one forward."""
    kept: dict[tuple[str, float], Pairs] = {name: [] for name in presses}

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for name, press in presses.items():
            # its scores are attention weights, which only eager attention returns
            weights = output[1] if name[0] == "observed" else None
            pair = press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, weights, kwargs)
            kept[name].append((pair[0].clone(), pair[1].clone()))

    hooks = []
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    try:
        model.model(input_ids=torch.tensor([ids]), past_key_values=DynamicCache())
    finally:
        for one in hooks:
            one.remove()
    return kept


@torch.no_grad()
def answer(model: Any, cache: Any, seen: int, ids: list[int], longest: int, stops: set[int]) -> list[list[int]]:
    """Greedy answers of every row of a cache to the same question, without the stop token."""
    rows = cache.layers[0].keys.shape[0]
    answers: list[list[int]] = [[] for _ in range(rows)]
    stopped = [False] * rows
    feed = torch.tensor([ids]).expand(rows, -1)
    while True:
        places = torch.arange(seen, seen + feed.shape[1]).expand(rows, -1)
        logits = model(input_ids=feed, past_key_values=cache, position_ids=places, logits_to_keep=1).logits
        chosen = logits[:, -1].argmax(-1).tolist()
        for row, token in enumerate(chosen):
            stopped[row] = stopped[row] or token in stops
            if not stopped[row]:
                answers[row].append(token)
                stopped[row] = len(answers[row]) >= longest
        if all(stopped):
            return answers
        feed, seen = torch.tensor(chosen)[:, None], seen + feed.shape[1]


# for each layer, how many empty columns precede the tokens of each row, [rows]
_EMPTY: list[torch.Tensor] = []


def rows_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for rows that hold different numbers of tokens; transformers has only one mask for all layers."""
    queries, keys = query.shape[2], key.shape[2]
    at = torch.arange(keys)
    visible = (at >= _EMPTY[module.layer_idx][:, None])[:, None, None] & (at <= at[-queries:, None])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=kwargs.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


def joined(caches: list[Pairs]) -> DynamicCache:
    """One cache with these rows, the shorter ones after empty columns."""
    _EMPTY.clear()
    cache = DynamicCache()
    for index, layers in enumerate(zip(*caches, strict=True)):
        lengths = torch.tensor([key.shape[2] for key, _ in layers])
        _EMPTY.append(lengths.max() - lengths)
        pads = [(0, 0, int(empty), 0) for empty in _EMPTY[-1]]
        parts = [
            [torch.nn.functional.pad(pair[part], pad) for pair, pad in zip(layers, pads, strict=True)]
            for part in (0, 1)
        ]
        cache.update(torch.cat(parts[0]), torch.cat(parts[1]), index)
    return cache


def held_bytes(pairs: Pairs) -> int:
    """Bytes of these tensors; of a view, only what it shows, as the next token drops the rest."""
    return sum(x.numel() * x.element_size() for pair in pairs for x in pair)


def together(
    model: Any, prompt: dict[str, Any], names: list[str], ratios: dict[float, float]
) -> Iterator[dict[str, Any]]:
    """Rows of presses that do not change the attention function; ratios: the share dropped, by budget."""
    presses = {(name, budget): make_press(name, ratio) for name in names for budget, ratio in ratios.items()}
    # only the weights of a prefill need eager attention
    model.set_attn_implementation("eager")
    kept = prefill(model, prompt["first"], presses)
    model.set_attn_implementation("rows")
    seen, asked = len(prompt["first"]), prompt["last"]
    for budget in ratios:
        started = time.perf_counter()
        caches = [kept[name, budget] for name in names]
        answers = answer(model, joined(caches), seen, asked, prompt["max_new_tokens"], set(prompt["stops"]))
        seconds = (time.perf_counter() - started) / len(names)
        for name, pairs, tokens in zip(names, caches, answers, strict=True):
            lengths = [key.shape[2] for key, _ in pairs]
            a_token = held_bytes(pairs) / sum(lengths) * len(lengths)
            yield {
                "press": name,
                "budget": budget,
                "tokens": tokens,
                "bytes": held_bytes(pairs),
                "bytes_after": round(held_bytes(pairs) + (len(asked) + len(tokens)) * a_token),
                "kept": lengths,
                "masked": False,
                "seconds": round(seconds, 3),
            }


def by_itself(model: Any, prompt: dict[str, Any], name: str, budget: float, ratio: float) -> dict[str, Any]:
    """The row of one press, through its own context manager."""
    press, started = make_press(name, ratio), time.perf_counter()
    cache: Any = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=torch.tensor([prompt["first"]]), past_key_values=cache)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    size, seen = held_bytes(pairs), len(prompt["first"])
    dropped = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    heads = cache.layers[0].keys.shape[1]
    kept = [seen - (0 if gone is None else len(gone[0]) / heads) for gone in dropped]
    (tokens,) = answer(model, cache, seen, prompt["last"], prompt["max_new_tokens"], set(prompt["stops"]))
    after = held_bytes([(layer.keys, layer.values) for layer in cache.layers])
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return {
        "press": name,
        "budget": budget,
        "tokens": tokens,
        "bytes": size,
        "bytes_after": after,
        "kept": kept,
        "masked": any(gone is not None for gone in dropped),
        "seconds": round(time.perf_counter() - started, 3),
    }


@torch.no_grad()
def verify(model: Any, prompt: dict[str, Any], ratio: float) -> None:
    """Raises AssertionError unless the shared prefill keeps what each press keeps by itself."""
    shared = prefill(model, prompt["first"], {(name, ratio): make_press(name, ratio) for name in TOGETHER})
    for name in TOGETHER:
        if name.startswith("chunkkv"):
            # refuses eager attention; it takes its scores from a press that is checked
            continue
        press = make_press(name, ratio)
        cache: Any = DynamicCache()
        with press(model):
            model.model(input_ids=torch.tensor([prompt["first"]]), past_key_values=cache)
        for (key, value), layer in zip(shared[name, ratio], cache.layers, strict=True):
            assert key.shape == layer.keys.shape, f"{name}: {key.shape} and {layer.keys.shape}"
            # SnapKV and TOVA take eager's weights or make their own: the same up to rounding
            same = (torch.isclose(key, layer.keys) & torch.isclose(value, layer.values)).float().mean()
            assert same > 0.99, f"{name}: {same:.3f} of the numbers are the same"
        print(f"{name}: as by itself")


def main() -> None:
    """Reads prompts, and writes one row per answer; resumes where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", default="0.5,0.2,0.1", help="shares of the context to keep")
    parser.add_argument("--presses", default=",".join(TOGETHER))
    parser.add_argument("--alone", default="", help=f"also these, slowly: {','.join(ALONE)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    AttentionInterface.register("rows", rows_attention)
    AttentionMaskInterface.register("rows", lambda *args, **kwargs: None)
    where = {
        "kvpress": metadata.version("kvpress"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": arguments.threads,
    }
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    prompts = [json.loads(line) for line in arguments.prompts.read_text().splitlines()]
    budgets = [float(budget) for budget in arguments.budgets.split(",")]
    names = arguments.presses.split(",")
    if arguments.verify:
        verify(model, prompts[0], 1 - budgets[0])
    done = set()
    if arguments.out.exists():
        rows = [json.loads(line) for line in arguments.out.read_text().splitlines()]
        done = {(row["id"], row["press"], row["budget"]) for row in rows}
    with arguments.out.open("a") as file:
        for prompt in prompts:
            # as many tokens as kvcompress keeps at this budget: a share of the requested length
            ratios = {budget: 1 - (round(budget * prompt["length"]) + 0.5) / len(prompt["first"]) for budget in budgets}
            made: list[dict[str, Any]] = []
            if not all((prompt["id"], name, budget) in done for name in names for budget in budgets):
                made += together(model, prompt, names, ratios)
            if arguments.alone:
                model.set_attn_implementation("sdpa")
                for name in arguments.alone.split(","):
                    for budget, ratio in ratios.items():
                        if (prompt["id"], name, budget) not in done:
                            made.append(by_itself(model, prompt, name, budget, ratio))
            for row in made:
                if (prompt["id"], row["press"], row["budget"]) not in done:
                    file.write(json.dumps({"id": prompt["id"], **row, "where": where}) + "\n")
            file.flush()
            print(prompt["id"], flush=True)


if __name__ == "__main__":
    main()

"""The caches that the parallel tests run, and the one conversation that each of them has."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcompress import AcrossKVCache, AttentionMatchingCache, H2OCache, Profile, SwiftKVCache, measure_profile
from kvcompress.hf import cache_argument
from tests.contract.caches import ENTRIES
from tests.contract.models import left_padded, places, prompt

# four KV heads, so that two processes hold two each
SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "dtype": torch.float64}


def across(model: PreTrainedModel) -> AcrossKVCache:
    with warnings.catch_warnings():
        # it warns that the model was not trained for it
        warnings.simplefilter("ignore")
        return AcrossKVCache(model, share=2, skip_from=1)


CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {entry.name: entry.make for entry in ENTRIES} | {"across": across}
# on a converted model
CONVERTED: dict[str, Callable[[PreTrainedModel], Any]] = {
    "swiftkv": SwiftKVCache,
    "swiftkv_h2o": lambda model: SwiftKVCache(model, storage=CACHES["h2o"]),
}


@torch.no_grad()
def converse(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """A padded batch, 8 generated tokens and a second turn of 5.

    Returns:
        sequences: what `generate` gives. logits: of the generated tokens and of the second turn. kept: tokens by layer,
        [batch, kv_heads]. bytes, full_bytes: of `memory()`. heads: KV heads of the first layer. devices: by bytes.
    """
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    ids, mask = (x.to(device) for x in left_padded([prompt(23)[0], prompt(17, seed=2)[0]]))
    answer = model.generate(
        ids, attention_mask=mask, **cache_argument(model, cache), max_new_tokens=8, do_sample=False, pad_token_id=0,
        disable_compile=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    turn = torch.cat([answer.sequences[:, -1:], prompt(5, batch=2, seed=3).to(device)], 1)
    mask = torch.cat([mask, mask.new_ones(2, answer.sequences.shape[1] - mask.shape[1] + 5)], 1)
    position_ids = places(mask)[:, -turn.shape[1] :]
    logits = model(turn, attention_mask=mask, position_ids=position_ids, **cache_argument(model, cache)).logits
    report = cache.memory()
    return {
        "sequences": answer.sequences.cpu(),
        "logits": torch.cat([*(step[:, None].cpu() for step in answer.logits), logits.cpu()], 1),
        "kept": [layer.cpu() for layer in report.tokens_kept],
        "bytes": report.total_bytes,
        "full_bytes": report.full_bytes,
        "heads": cache.layers[0].kv_shape[1],
        "devices": report.by_device,
    }


@torch.no_grad()
def count(model: PreTrainedModel) -> dict[str, Any]:
    """What is decided by numbers of all heads: shares that are measured, and tokens kept where half of those held stay.

    Returns:
        shares: [layers, kv_heads]. kept: tokens by layer, [batch, kv_heads]; then those of a cache with a profile.
    """
    ids = prompt(40)
    cache = AttentionMatchingCache(model, budget=20)
    model(ids, **cache_argument(model, cache))
    cache.compact(ids, budget=0.5)
    # measured by one process
    profile = Profile.load(Path(model.config._name_or_path) / "profile")
    fixed = H2OCache(model, budget=12, allocation=profile)
    model(ids, **cache_argument(model, fixed))
    return {
        "shares": torch.tensor(measure_profile(model, [ids], budgets=(0.3,)).shares),
        "kept": [layer.cpu() for layer in (*cache.memory().tokens_kept, *fixed.memory().tokens_kept)],
    }

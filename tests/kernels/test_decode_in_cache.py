"""The fused decode step inside a cache: the same tokens, scores and logits as its separate operations."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompress import EvictingCache
from kvcompress.caches import evicting_layer
from kvcompress.hf import cache_argument
from kvcompress.kernels.common.runtime import runs_triton
from kvcompress.policies.h2o import H2O
from kvcompress.policies.snapkv import SnapKV
from kvcompress.storage import slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not runs_triton(torch.empty(0, device=DEVICE)), reason="needs a GPU, or TRITON_INTERPRET=1"
)


@needs_triton
@pytest.mark.parametrize("policy", [H2O(sinks=2), SnapKV(window=4, recent=4)], ids=lambda policy: type(policy).__name__)
def test_a_fused_step_equals_the_separate_operations(policy, monkeypatch):
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, **settings)
    model = LlamaForCausalLM(config).eval().to(DEVICE)
    ids = torch.randint(3, 64, (2, 14), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def decode(fused):
        steps = []
        with monkeypatch.context() as patch:
            if fused:
                plain = slots.decode_and_evict
                patch.setattr(slots, "decode_and_evict", lambda *a, **k: steps.append(1) or plain(*a, **k))
            else:
                patch.setattr(evicting_layer, "attends_in_triton", lambda tensor: False)
            cache = EvictingCache(model, policy=policy, budget=8)
            how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            out = model.generate(
                ids,
                attention_mask=mask,
                **cache_argument(model, cache),
                output_logits=True,
                return_dict_in_generate=True,
                **how,
            )
        assert len(steps) == (5 * 2 if fused else 0)
        held = [layer.slots for layer in cache.layers]
        return torch.stack(out.logits), [each.positions for each in held], [each.scores for each in held]

    logits, positions, scores = decode(fused=True)
    plain_logits, plain_positions, plain_scores = decode(fused=False)
    torch.testing.assert_close(positions, plain_positions, rtol=0, atol=0)
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-4)
    for held, score, plain_score in zip(positions, scores, plain_scores, strict=True):
        torch.testing.assert_close(score[held >= 0], plain_score[held >= 0], rtol=1e-4, atol=1e-5)

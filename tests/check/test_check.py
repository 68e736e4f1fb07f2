"""What works is OK, what is not served is refused by name, and what is broken is found."""

import functools

import pytest
import torch
from transformers import AutoConfig
from transformers.cache_utils import Cache

from kvcompress import DenseCache, hf
from kvcompress.caches.dense import DenseLayer
from kvcompress.caches.evicting_layer import EvictingLayer
from kvcompress.caches.evicting_step import ChunkStep
from kvcompress.check import models
from kvcompress.check.caches import default_caches
from kvcompress.check.check import check
from kvcompress.check.outcome import FULL
from kvcompress.check.subject import FED, PROMPTS, Subject
from kvcompress.hf.small import small_model
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.low_rank import ShadowSegment
from kvcompress.storage.quantized_blocks import QuantizedBlocks
from kvcompress.storage.quantized_slots import QuantizedSlots
from kvcompress.storage.rerotated import RerotatedSlots
from kvcompress.storage.slots import SlotSegment
from kvcompress.swiftkv.cache import FollowingLayer

FEW = ["none", "h2o", "gear", "shadowkv"]
MORE = [
    "qwen3",
    "mistral",
    "qwen2",
    "gemma2",
    "phi3",
    "opt",
    "mixtral",
    "gpt_oss",
    "smollm3",
    "olmo2",
    "granite",
    "cohere2",
]


@functools.cache
def tiny(model_type="llama"):
    return small_model(AutoConfig.for_model(model_type))


def outcomes(caches, model=None):
    """Outcome and reason of each cache, by its name."""
    rows = check(tiny() if model is None else model, caches)
    return {row.cache: (row.outcome, row.reason) for row in rows}


def fault(cache, model=None):
    """The reason of a cache's fault."""
    rows = outcomes([cache], model)
    outcome, reason = rows[cache]
    assert outcome == "FAULT", rows
    assert "\n" not in reason
    return reason


# what works


def test_every_cache_and_variant_is_ok_on_llama():
    told = []
    rows = check(tiny(), tell=told.append)
    assert [row.cache for row in rows] == [*default_caches(), FULL]
    assert told == rows
    assert {row.cache: row.reason for row in rows if row.outcome != "OK"} == {}
    # far from the tolerance, and from a comparison of nothing
    assert all(row.difference is not None and 0 < row.difference < 5e-5 for row in rows)
    lossy = {row.cache: row.lost for row in rows if row.lost is not None}
    assert set(lossy) == {"gear", "kivi", "h2o:bits=4"}
    assert all(0.001 < lost < 0.5 for lost in lossy.values())


@pytest.mark.parametrize(
    "family", ["gemma3_text", "gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_caches_are_ok_on_other_families(family):
    rows = outcomes(FEW, tiny(family))
    assert rows == dict.fromkeys([*FEW, FULL], ("OK", ""))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", *MORE])
def test_no_cache_is_at_fault_on_other_families(family):
    assert {name: said for name, said in outcomes(None, tiny(family)).items() if said[0] == "FAULT"} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_is_not_taken_for_a_fault(dtype):
    model = small_model(AutoConfig.for_model("llama")).to(dtype)
    caches = ["none", "h2o", "gear"]
    assert outcomes(caches, model) == dict.fromkeys([*caches, FULL], ("OK", ""))


def test_a_model_is_left_as_it_was():
    model = small_model(AutoConfig.for_model("llama"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = hf.attention_name(model), model(ids).logits
        check(model, ["none", "h2o"])
        assert hf.attention_name(model) == before[0]
        assert torch.equal(model(ids).logits, before[1])


# what is refused


def test_what_a_cache_does_not_serve_is_refused_with_the_reason():
    rows = outcomes(["h2o", "h2o:rerotated=true", "swiftkv"], tiny("opt"))
    assert rows["h2o"][0] == "OK"
    assert rows["h2o:rerotated=true"] == (
        "REFUSED",
        "rerotated closes gaps between rotary positions, and OPTForCausalLM has none; leave it off, and stay within "
        "the positions the model knows",
    )
    assert rows["swiftkv"][0] == "REFUSED"
    assert "got OPTForCausalLM" in rows["swiftkv"][1]


def test_a_model_that_all_caches_refuse_is_refused_by_each():
    model = tiny("bloom")
    rows = outcomes(["none", "h2o"], model)
    assert set(rows) == {"none", "h2o"}, "nothing is to be told about transformers' own cache then"
    for outcome, reason in rows.values():
        assert outcome == "REFUSED"
        assert "does not choose its attention through transformers' AttentionInterface" in reason


def test_a_refusal_in_the_first_forward_is_a_refusal():
    """What a model passes to its attention is known only then."""
    model = small_model(AutoConfig.for_model("llama"))
    kind = type(model.model)

    class Biased(kind):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs, head_mask=torch.ones(1))

    model.model.__class__ = Biased
    outcome, reason = outcomes(["none"], model)["none"]
    assert outcome == "REFUSED"
    assert reason.startswith("LlamaAttention passes 'head_mask' to its attention, which kvcompress does not know")


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_what_kvcompress_stumbles_over_is_no_refusal(monkeypatch, error):
    def layer(self, *args):
        return int("") if error is ValueError else len(None)

    monkeypatch.setattr(DenseCache, "_layer", layer)
    assert fault("none").startswith(f"building the cache: {error.__name__}: ")


# what is broken


def after(method, change):
    """The method, and then the change."""

    @functools.wraps(method)
    def both(self, *args, **kwargs):
        answer = method(self, *args, **kwargs)
        change(self, *args, **kwargs)
        return answer

    return both


def before(method, change):
    """The method, with arguments that were changed."""

    @functools.wraps(method)
    def both(self, *args, **kwargs):
        return method(self, *change(*args), **kwargs)

    return both


def forget_the_last(layer):
    layer.dense.drop_last(1)


def test_a_full_cache_that_drops_a_token_is_found(monkeypatch):
    monkeypatch.setattr(DenseLayer, "_drop", after(DenseLayer._drop, forget_the_last))
    assert "row 1 alone: single tokens: logits differ by" in fault("none")


def test_a_cache_that_forgets_in_the_second_turn_is_found(monkeypatch):
    def read(self, chunk, real=DenseLayer._read):
        if 1 < chunk.tokens < 100:
            self.dense, dense = DenseSegment(chunk.key, chunk.value), self.dense
            self.dense.append(chunk.key, chunk.value, chunk.visible)
            answer, self.dense = real(self, chunk), dense
            return answer
        return real(self, chunk)

    monkeypatch.setattr(DenseLayer, "_read", read)
    assert "row 1 alone: second turn: logits differ by" in fault("none")


def test_a_cache_that_takes_padding_for_tokens_is_found(monkeypatch):
    def attend(self, query, visible, spec, real=EvictingLayer.attend, **how):
        return real(self, query, None, spec, **how)

    monkeypatch.setattr(EvictingLayer, "attend", attend)
    for cache in ("h2o", "streaming", "knorm", "h2o:bits=4"):
        assert "padded batch" in fault(cache)


def test_an_evicting_cache_that_keeps_one_token_less_is_found(monkeypatch):
    def kept(self, ranking, real=ChunkStep._kept):
        chosen = real(self, ranking)
        # of each head its oldest
        first = chosen.to(torch.uint8).argmax(-1, keepdim=True)
        return chosen.scatter(-1, first, False)

    monkeypatch.setattr(ChunkStep, "_kept", kept)
    assert "with a budget of 48" in fault("h2o")


def test_an_evicting_cache_that_mixes_up_values_is_found(monkeypatch):
    def mix(key, value, *rest):
        return key, value.roll(1, 2), *rest

    monkeypatch.setattr(SlotSegment, "replace", before(SlotSegment.replace, mix))
    assert "row 1 alone: single tokens: logits differ by" in fault("tova")


def test_an_evicting_cache_that_names_tokens_it_was_not_fed_is_found(monkeypatch):
    def shift(step, *args, **kwargs):
        held = step.slots.positions
        held.copy_(torch.where(held < 0, held, held + 3))

    monkeypatch.setattr(ChunkStep, "commit", after(ChunkStep.commit, shift))
    assert "holds a token at place" in fault("streaming")


def test_an_evicting_cache_that_chooses_by_where_padding_stands_is_found(monkeypatch):
    """It attends rightly to what it keeps, and keeps other tokens than it would without the padding."""

    def scores(self, *args, real=ChunkStep._observe):
        attention = real(self, *args)
        if self.layer.padding.visible is None:
            return attention
        return attention.flip(-1)

    monkeypatch.setattr(ChunkStep, "_observe", scores)
    assert "padded batch, row" in fault("h2o")


def test_rolled_keys_at_wrong_places_are_found(monkeypatch):
    monkeypatch.setattr(RerotatedSlots, "_indices", lambda self, real=RerotatedSlots._indices: real(self) // 2)
    assert "budget 320, above the length" in fault("h2o:rerotated=true")


@pytest.mark.parametrize("cache", ["gear", "gear:bits=2", "gear:bits=8:rank=4", "kivi"])
def test_codes_that_stand_for_other_numbers_are_found(monkeypatch, cache):
    def append(self, key, value, *args, real=QuantizedBlocks.append, **kwargs):
        return real(self, key.roll(1, -2), value, *args, **kwargs)

    monkeypatch.setattr(QuantizedBlocks, "append", append)
    assert "keys of layer 0 are off by" in fault(cache)


@pytest.mark.parametrize("cache", ["gear", "kivi"])
def test_codes_that_are_read_wrongly_are_found(monkeypatch, cache):
    def attend(self, query, *args, real=QuantizedBlocks.attend, **kwargs):
        return real(self, query * 1.3, *args, **kwargs)

    monkeypatch.setattr(QuantizedBlocks, "attend", attend)
    assert "8 bits: codes of 8 bits lose" in fault(cache)


@pytest.mark.parametrize("cache", ["attention_matching:bits=4", "kvzip:bits=4", "h2o:allocation=heads:bits=4"])
def test_packed_heads_that_differ_are_no_fault(cache):
    # values that were fitted are not those that were fed
    outcome, reason = outcomes([cache])[cache]
    assert outcome == "OK", reason


def test_packed_slots_that_are_read_wrongly_are_found(monkeypatch):
    def attend(self, query, *args, real=QuantizedSlots._attend, **kwargs):
        return real(self, query * 1.3, *args, **kwargs)

    monkeypatch.setattr(QuantizedSlots, "_attend", attend)
    assert "8 bits, budget 320, above the length: codes of 8 bits lose" in fault("h2o:bits=4")


def test_chunks_rebuilt_from_the_wrong_space_are_found(monkeypatch):
    def fold(segment, *args, **kwargs):
        if segment.basis is not None:
            segment.basis.mul_(0.9)

    monkeypatch.setattr(ShadowSegment, "fold", after(ShadowSegment.fold, fold))
    assert "all chunks selected at full rank" in fault("shadowkv")


def test_memory_that_is_not_told_is_found(monkeypatch):
    monkeypatch.setattr(EvictingLayer, "counters", lambda self: {})
    assert "memory: memory() reports" in fault("h2o")


def test_slots_that_take_more_than_the_full_cache_are_found(monkeypatch):
    def hoard(step, *args, **kwargs):
        step.slots.hoard = torch.zeros(2**18)

    tensors = SlotSegment.tensors

    def told(self):
        return {**tensors(self), **({"keys_hoarded": self.hoard} if hasattr(self, "hoard") else {})}

    monkeypatch.setattr(ChunkStep, "commit", after(ChunkStep.commit, hoard))
    monkeypatch.setattr(SlotSegment, "tensors", told)
    monkeypatch.setattr(EvictingLayer, "_mark_static", lambda self: None)
    assert "memory: slots take" in fault("h2o")


def test_a_follower_that_stores_is_found(monkeypatch):
    def hoard(layer, key_states, *args, **kwargs):
        layer.hoarded = key_states.clone()

    monkeypatch.setattr(FollowingLayer, "update", after(FollowingLayer.update, hoard))
    assert "memory: memory() reports" in fault("across")


def losing(base, where):
    """A model class whose forward, or generate, loses the cache it is given."""

    class Losing(base):
        if where == "forward":

            def forward(self, *args, **kwargs):
                kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
                return super().forward(*args, **kwargs)

        else:

            def generate(self, *args, **kwargs):
                kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, Cache)}
                return super().generate(*args, **kwargs)

    return Losing


def test_a_model_that_swallows_the_cache_is_found():
    model = small_model(AutoConfig.for_model("llama"))
    model.__class__ = losing(type(model), "forward")
    rows = outcomes(["none", "h2o"], model)
    assert {outcome for outcome, _ in rows.values()} == {"FAULT"}
    assert rows[FULL][1] == "row 1 alone: 200 tokens were fed, but the cache has seen 0"


def test_a_generate_that_loses_the_cache_is_found():
    model = small_model(AutoConfig.for_model("llama"))
    model.__class__ = losing(type(model), "generate")
    assert (
        fault("none", model) == f"generate({hf.CACHE_SPELLINGS[0]}=...): 203 tokens were fed, but the cache has seen 0"
    )


# what a model cannot do with any cache


@pytest.mark.parametrize(
    ("family", "told_positions", "one_at_a_time"),
    [("gpt_neox", False, False), ("roberta", True, False), ("bamba", True, False), ("jamba", False, True)],
)
def test_what_a_model_cannot_do_with_transformers_cache_is_not_asked_of_ours(family, told_positions, one_at_a_time):
    model = models.small_model(family)
    subject = Subject(model)
    assert (subject.told_positions, subject.one_at_a_time) == (told_positions, one_at_a_time)
    assert len(subject.stops) == 1 + (sum(FED) if one_at_a_time else len(FED))
    assert subject.stops[-1] == PROMPTS[0] + sum(FED)
    rows = check(model, ["none"])
    assert [row.outcome for row in rows] == ["OK", "OK"]
    (limits,) = {row.limits for row in rows}
    assert ("position_ids" in limits, "token by token" in limits) == (told_positions, one_at_a_time)


@pytest.mark.parametrize("family", ["bamba", "jamba"])
def test_what_such_a_model_can_do_is_still_asked(monkeypatch, family):
    monkeypatch.setattr(DenseLayer, "_drop", after(DenseLayer._drop, forget_the_last))
    assert "logits differ" in fault("none", models.small_model(family))


def test_layers_that_share_the_weights_of_one_block_are_told_apart():
    """Zamba's attention has no layer number: each layer's has its own mask, and forgets by itself."""
    model = models.small_model("zamba2")
    found = [hf.attention_module(model, layer) for layer in Subject(model).attending]
    assert len({id(module) for module in found}) == len(found) == 2
    assert {type(module).__name__ for module in found} == {"Zamba2Attention"}
    assert hf.attention_module(model, 0) is None
    assert outcomes(["h2o"], model)["h2o"] == ("OK", "")

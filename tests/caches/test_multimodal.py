"""Multimodal models: the text decoder is compressed, images among its tokens included."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMultimodalLM, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from kvcompress import (
    AcrossKVCache,
    AttentionMatchingCache,
    DenseCache,
    EvictingCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzipCache,
    PrefixStore,
    ShadowKVCache,
    SnapKVCache,
    StreamingLLMCache,
    ask,
    hf,
    logprobs,
    release,
)
from kvcompress.check.models import small_model
from kvcompress.check.typical import COMMON, TYPICAL
from kvcompress.hf import cache_argument
from kvcompress.hf.judge import judge_of
from kvcompress.policies.h2o import H2O

IMAGE, PAD = 500, COMMON["pad_token_id"]
_TEXT = {**COMMON, "num_hidden_layers": 3}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# four tokens an image, each
SETTINGS = {
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_TOWER},
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    },
    "qwen2_vl": {
        "text_config": {
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "vision_start_token_id": IMAGE + 2,
        "vision_end_token_id": IMAGE + 3,
    },
    "gemma3": {
        "text_config": {**_TEXT, "head_dim": 16, "sliding_window": 32},
        "vision_config": _TOWER,
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
        "mm_tokens_per_image": 4,
    },
    # a whole prompt sees itself
    "paligemma": {
        "text_config": {"model_type": "gemma", **_TEXT, "head_dim": 16},
        "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
        "projection_dim": 64,
    },
    # the same with windows, longer than a prompt
    "paligemma2": {
        "model_type": "paligemma",
        "text_config": {
            "model_type": "gemma2",
            **_TEXT,
            "head_dim": 16,
            "sliding_window": 64,
            "attn_logit_softcapping": None,
        },
        "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
        "projection_dim": 64,
    },
    # images see themselves where the window slides, and not where all is seen
    "gemma4": {
        "text_config": {
            **_TEXT,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 4,
        "audio_token_id": IMAGE + 5,
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "head_dim": 16,
            "attention_chunk_size": 12,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "moe_layers": [1],
            "num_experts_per_tok": 1,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
    },
    "inkling_mm_model": {
        "text_config": TYPICAL["inkling_text"],
        "vision_config": {"patch_size": 4, "num_hidden_layers": 4, "hidden_size": 32},
        "image_token_id": IMAGE,
        "audio_token_id": IMAGE + 5,
    },
}
with_images = pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3", "paligemma"])


@pytest.fixture(scope="module")
def models():
    built = {}

    def of(kind):
        named = {"model_type": kind} | SETTINGS[kind]
        if named["model_type"] not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {kind}")
        if kind not in built:
            torch.manual_seed(0)
            config = AutoConfig.for_model(**named)
            model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.2)
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = PAD
            built[kind] = model
        return built[kind]

    yield of
    for model in built.values():
        release(model)


def row(tokens, images, seed=1):
    """Tokens with images among them: where they stand depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(480, generator=generator)[:tokens] + 3
    for index in range(images):
        start = 5 + seed + index * 12
        ids[start - 1] = IMAGE + 2
        ids[start : start + 4] = IMAGE
    return ids


def inputs_of(kind, rows):
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(each, (width - len(each), 0), value=PAD) for each in rows])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(each), (width - len(each), 0), value=0) for each in rows]
    )
    images = sum(int((each == IMAGE).sum()) for each in rows) // 4
    generator = torch.Generator().manual_seed(5)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "qwen2_vl":
        inputs["pixel_values"] = torch.randn(16 * images, 3 * 2 * 14 * 14, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * images)
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    else:
        inputs["pixel_values"] = torch.randn(images, 3, 28, 28, generator=generator)
        if kind == "gemma4":
            inputs["pixel_values"] = torch.rand(images, 16, 48, generator=generator)
            inputs["image_position_ids"] = torch.cartesian_prod(*[torch.arange(4)] * 2).expand(images, -1, -1)
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        elif kind == "llama4":
            inputs["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
        elif kind == "inkling_mm_model":
            # each patch is a token
            inputs["pixel_values"] = torch.randn(4 * images, 2, 4, 4, 3, generator=generator)
        elif kind == "gemma3":
            inputs["token_type_ids"] = (ids == IMAGE).long()
        elif kind.startswith("paligemma"):
            inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def answer(model, cache, inputs, tokens=12, **more):
    hf.forget_positions(model)
    return model.generate(
        **inputs,
        **hf.cache_argument(model, cache),
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
        **more,
    )


def logits_of(output):
    return torch.stack(output.logits, 1)


CACHES = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=400),
    "snapkv_heads": lambda model: SnapKVCache(model, budget=400, window=3, allocation="heads"),
    "streaming": lambda model: StreamingLLMCache(model, budget=400),
}


# README: Decoder-only models are supported, multimodal ones too
@with_images
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_with_room_for_all_answers_as_the_full_cache_does(kind, name, models):
    model = models(kind)
    inputs = inputs_of(kind, [row(50, 2), row(37, 1, seed=4)])
    wanted = answer(model, DynamicCache(config=model.config), inputs)
    cache = CACHES[name](model)
    got = answer(model, cache, inputs)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(logits_of(got), logits_of(wanted), rtol=1e-4, atol=1e-4)
    # and the images count: other images give other answers
    inputs["pixel_values"] = inputs["pixel_values"].flip(0) * 2
    other = answer(model, CACHES[name](model), inputs)
    assert not torch.allclose(logits_of(other), logits_of(wanted), atol=1e-2)


@pytest.mark.parametrize("name", ["dense", "h2o"])
@pytest.mark.parametrize("kind", ["paligemma2", "gemma4", "llama4", "inkling_mm_model"])
def test_further_models_answer_of_images_as_with_the_full_cache(kind, name, models, monkeypatch):
    if name != "dense" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("here generate makes other masks for any cache whose steps can be compiled")
    # in 5.24.0 the model asks this of its decoder, which does not have it, whatever the cache
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    test_a_cache_with_room_for_all_answers_as_the_full_cache_does(kind, name, models)


@with_images
def test_rows_beams_turns_and_files_work_with_images(kind, models, tmp_path):
    model = models(kind)
    inputs = inputs_of(kind, [row(50, 2), row(37, 1, seed=4)])
    settings = {"num_beams": 3, "tokens": 8}
    wanted = answer(model, DynamicCache(config=model.config), inputs, **settings)
    got = answer(model, DenseCache(model), inputs, **settings)
    assert torch.equal(got.sequences, wanted.sequences)
    # a second turn of text after an image
    first = inputs_of(kind, [row(50, 2)])
    full_cache, cache = DynamicCache(config=model.config), DenseCache(model)
    turns = []
    for each in (full_cache, cache):
        out = answer(model, each, first, tokens=8)
        if each is cache:
            cache.save(tmp_path / "cache")
            each = DenseCache.load(tmp_path / "cache", model)
        ids = torch.cat([out.sequences, row(9, 0, seed=7)[None]], 1)
        later = {name: value for name, value in first.items() if name in ("mm_token_type_ids", "token_type_ids")}
        later = {name: torch.nn.functional.pad(value, (0, ids.shape[1] - 50)) for name, value in later.items()}
        with torch.no_grad():
            turns.append(
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **later, **hf.cache_argument(model, each),
                    max_new_tokens=6, do_sample=False, disable_compile=True,
                )
            )  # fmt: skip
    assert torch.equal(turns[0], turns[1])


@with_images
@pytest.mark.parametrize(
    "build",
    [
        lambda model: H2OCache(model, budget=20),
        lambda model: SnapKVCache(model, budget=20, window=4, allocation="heads"),
        lambda model: GEARCache(model, bits=4, buffer=8, group_size=8, sinks=4),
    ],
    ids=["h2o", "snapkv", "gear"],
)
def test_caches_that_compress_hold_less_and_do_not_care_for_padding(kind, build, models):
    model = models(kind)
    rows = [row(90, 3), row(70, 2, seed=4)]
    both = inputs_of(kind, rows)
    cache = build(model)
    together = answer(model, cache, both)
    assert cache.memory().device_bytes < 0.75 * cache.memory().full_bytes
    # the first image tokens are those of the first row
    alone = inputs_of(kind, rows[:1])
    per_image = 16 if kind == "qwen2_vl" else 1
    alone["pixel_values"] = both["pixel_values"][: 3 * per_image]
    torch.testing.assert_close(
        logits_of(answer(model, build(model), alone))[0], logits_of(together)[0], rtol=1e-3, atol=1e-3
    )


def whole(model, inputs):
    """The model without a cache: its logits, and the attention of each layer, [batch, heads, queries, tokens]."""
    judge = judge_of(model)
    with torch.no_grad():
        output = judge(**inputs, use_cache=False, output_attentions=True)
    return output.logits, output.attentions


ROOMY = {
    **CACHES,
    "gear": lambda model: GEARCache(model, buffer=256, tail_bits=None),
    "shadowkv": lambda model: ShadowKVCache(model, budget=400),
}


@pytest.mark.parametrize("name", ROOMY)
def test_images_that_see_themselves_come_in_chunks_and_in_a_second_turn(name, models):
    """Images in two chunks, single tokens, and images again; of two rows, one padded."""
    model = models("gemma3")
    inputs = inputs_of("gemma3", [row(60, 4), row(48, 3, seed=4)])
    ids, mask, types = (inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    wanted, _ = whole(model, inputs)
    cache, logits, features = ROOMY[name](model), [], inputs["pixel_values"]
    start, used = 0, [0, 0]
    # where no image of either row is cut
    for stop in (14, 27, 28, 29, 39, 60):
        fresh = [int((each[start:stop] == IMAGE).sum()) // 4 for each in ids]
        # of the first row, then of the second
        pixels = [features[used[0] : used[0] + fresh[0]], features[4 + used[1] : 4 + used[1] + fresh[1]]]
        pixels = {"pixel_values": torch.cat(pixels)} if sum(fresh) else {}
        with torch.no_grad():
            out = model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], token_type_ids=types[:, :stop], **pixels,
                position_ids=(mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:], **hf.cache_argument(model, cache),
            )  # fmt: skip
        logits.append(out.logits)
        start, used = stop, [held + more for held, more in zip(used, fresh, strict=True)]
    torch.testing.assert_close(torch.cat(logits, 1)[mask > 0], wanted[mask > 0], rtol=1e-4, atol=1e-4)


# docs: A chunk that cuts an image of Gemma 3 is refused
def test_an_image_that_a_chunk_cuts_is_refused_before_anything_is_stored(models):
    model = models("gemma3")
    inputs = inputs_of("gemma3", [row(50, 2)])
    cache = DenseCache(model)
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    for stop, is_cut in [(first + 2, True), (first + 3, True), (first + 4, False)]:
        known = {"input_ids": inputs["input_ids"][:, :stop], "attention_mask": inputs["attention_mask"][:, :stop]}
        # of the images, as embeddings, what comes with this chunk
        embeds = model.get_input_embeddings()(known.pop("input_ids"))
        call = {**known, "token_type_ids": inputs["token_type_ids"], "inputs_embeds": embeds}
        if is_cut:
            with pytest.raises(
                ValueError, match=f"a span of row 0 goes on after the {stop} tokens seen and fed so far"
            ):
                model(**call, **hf.cache_argument(model, cache))
            assert cache.get_seq_length() == 0
        else:
            with torch.no_grad():
                model(**call, **hf.cache_argument(model, cache))
            assert cache.get_seq_length() == stop


@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
@pytest.mark.parametrize("last", [None, 12], ids=["h2o", "snapkv"])
def test_what_images_receive_of_their_own_tokens_counts_too(kind, last, models):
    """Column sums of the whole attention, of all queries or of the last ones, which see an image."""
    model = models(kind)
    inputs = inputs_of(kind, [row(50, 2), row(37, 2, seed=4)])
    _, weights = whole(model, inputs)
    policy = H2O() if last is None else _LastQueries()
    cache = EvictingCache(model, policy=policy, budget=400)
    with torch.no_grad():
        model(**inputs, **hf.cache_argument(model, cache))
    real = inputs["attention_mask"].bool()
    for layer, of_layer in zip(cache.layers, weights, strict=True):
        counted = of_layer.masked_fill(~real[:, None, :, None], 0.0)
        counted = counted if last is None else counted[:, :, -last:]
        sums = counted.unflatten(1, (2, 2)).sum((2, 3))
        slots, pads = layer.slots, 50 - real.sum(-1)
        at = (slots.positions.clamp(min=0) + pads[:, None, None]).long()
        held = slots.positions >= 0
        torch.testing.assert_close(slots.scores[held], sums.gather(2, at)[held], rtol=1e-4, atol=1e-4)


class _LastQueries(H2O):
    """What the last queries attend to, as it is."""

    @property
    def observes(self):
        return 12

    def score(self, candidates):
        return candidates.attention.clone()


def test_image_tokens_can_be_pinned(models):
    model = models("llava")
    inputs = inputs_of("llava", [row(90, 3), row(70, 2, seed=4)])
    is_image = inputs["input_ids"] == IMAGE
    cache = H2OCache(model, budget=20, recent=4, pin=is_image)
    answer(model, cache, inputs)
    for index, pads in enumerate((0, 20)):
        places = set((is_image[index].nonzero()[:, 0] - pads).tolist())
        for layer in cache.layers:
            assert all(places <= set(head.tolist()) for head in layer.held_positions()[index])


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3"])
def test_text_alone_is_answered_too_and_towers_keep_their_own_attention(kind, models):
    model = models(kind)
    towers = [
        module.config._attn_implementation
        for name, module in model.named_modules()
        if hasattr(module, "config") and ("vision" in name or "visual" in name)
    ]
    ids = row(40, 0)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = answer(model, DynamicCache(config=model.config), inputs)
    assert torch.equal(answer(model, DenseCache(model), inputs).sequences, wanted.sequences)
    assert towers
    assert set(towers) == {"sdpa"}
    assert hf.attention_name(model) == hf.IMPLEMENTATION
    release(model)
    assert hf.attention_name(model) == "sdpa"


def test_the_decoder_alone_is_a_text_model(models):
    model = models("llava")
    decoder = hf.decoder_of(model)
    ids = row(30, 0)[None]
    embeds = model.get_input_embeddings()(ids)
    cache = H2OCache(decoder, budget=400)
    with torch.no_grad():
        got = decoder(inputs_embeds=embeds, **hf.cache_argument(decoder, cache)).last_hidden_state
    release(decoder)
    with torch.no_grad():
        wanted = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (HydragenCache, "is multimodal: where two prompts have the same tokens, their images may differ"),
        (PrefixStore, "is multimodal: a PrefixStore finds documents by their tokens"),
        (lambda model: AcrossKVCache(model, share=1), "is multimodal; AcrossKVCache serves text models"),
        (lambda model: KVzipCache(model, budget=9), "KVzip reads the tokens again, and Llava.* is multimodal"),
        (lambda model: AttentionMatchingCache(model, budget=9), "AttentionMatching reads the tokens again"),
    ],
    ids=["hydragen", "store", "across", "kvzip", "attention_matching"],
)
def test_what_finds_or_reads_tokens_by_their_ids_refuses_by_name(build, told, models):
    model = models("llava")
    release(model)
    with pytest.raises(ValueError, match=told):
        build(model)
    assert hf.attention_name(model) == "sdpa"


@pytest.mark.parametrize("part", [lambda model: model, hf.decoder_of], ids=["wrapper", "decoder"])
def test_rotations_of_several_axes_are_not_taken_back(part, models):
    model = part(models("qwen2_vl"))
    for build in (
        lambda: ShadowKVCache(model, budget=16, rank=8),
        lambda: StreamingLLMCache(model, budget=16, rerotated=True),
    ):
        with pytest.raises(ValueError, match="Qwen2VL.* gives images positions of several axes"):
            build()


def test_continuations_are_scored_where_positions_count_tokens(models):
    model = models("llava")
    inputs, ids = inputs_of("llava", [row(50, 2)]), row(6, 0, seed=9)
    cache = DenseCache(model)
    with torch.no_grad():
        last = model(**inputs, **hf.cache_argument(model, cache)).logits[:, -1]
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids[None]], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        wanted = model(**whole, use_cache=False).logits[:, 49:-1].log_softmax(-1).gather(-1, ids[None, :, None])[..., 0]
    torch.testing.assert_close(logprobs(cache, ids[None], last_logits=last), wanted, rtol=1e-4, atol=1e-4)
    model = models("qwen2_vl")
    cache = DenseCache(model)
    answer(model, cache, inputs_of("qwen2_vl", [row(50, 2)]), tokens=2)
    with pytest.raises(ValueError, match="gives images positions of several axes"):
        logprobs(cache, ids[None], last_logits=torch.zeros(1, 512))


class _Tokenizer:
    """A token for each letter."""

    bos_token = chat_template = eos_token_id = None

    def __call__(self, text, **more):
        return SimpleNamespace(input_ids=[3 + ord(letter) % 400 for letter in text])

    def decode(self, ids, **more):
        return " ".join(str(int(each)) for each in ids)


def test_a_question_does_not_depend_on_the_image_before(models):
    model = models("qwen2_vl")
    hf.forget_positions(model)
    asked = {"context": "The cat sleeps on the charts.", "questions": ["Who sleeps?"], "max_new_tokens": 8}
    first = ask(model, _Tokenizer(), cache=DenseCache(model), **asked).answers
    answer(model, DynamicCache(config=model.config), inputs_of("qwen2_vl", [row(50, 2)]), tokens=3)
    assert ask(model, _Tokenizer(), cache=DenseCache(model), **asked).answers == first


@pytest.mark.skipif("gemma4_unified" not in CONFIG_MAPPING, reason="transformers before Gemma 4")
@torch.no_grad()
def test_blocks_that_attend_both_ways_are_served_and_a_mask_that_names_none_is_no_block():
    """Gemma 4's unified models lay a mask of blocks over every prompt; those of text are none."""
    model = small_model("gemma4_unified")
    ids = torch.arange(3, 43)[None]
    nothing, image = torch.zeros_like(ids), ((ids > 20) & (ids < 25)).long()
    plain = model(ids, use_cache=False).logits
    for given in ({}, {"mm_token_type_ids": nothing}, {"mm_token_type_ids": image}):
        wanted = model(ids, use_cache=False, **given).logits
        for cache in (DenseCache(model), H2OCache(model, budget=100)):
            logits = model(ids, **cache_argument(model, cache), **given).logits
            torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(wanted, plain, atol=1e-2)

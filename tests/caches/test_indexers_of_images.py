"""Multimodal models whose tokens, images among them, attend to what an indexer chooses."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, DynamicCache

from kvcompress import DenseCache, GEARCache, H2OCache
from kvcompress.hf import cache_argument
from tests.caches.test_index_blocks import SIZES as OF_BLOCKS
from tests.caches.test_index_blocks import skip_before_5_24
from tests.caches.test_indexers import SHARING
from tests.caches.test_indexers import SIZES as OF_LATENTS
from tests.caches.test_indexers import TYPES as OF_TYPE
from tests.caches.test_multimodal import IMAGE, answer, logits_of, row

VOCABULARY, PATCH = 512, 4
# three axes of half of what is rotated
_AXES = {"rope_type": "default", "rope_theta": 100.0}
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_LATENTS = {**OF_LATENTS, "vocab_size": VOCABULARY}
SETTINGS = {
    "qwen4_exp": {
        "text_config": {**OF_BLOCKS, "vocab_size": VOCABULARY, "eos_token_id": 511},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": OF_BLOCKS["hidden_size"],
            "num_position_embeddings": 16,
        },
        "video_token_id": IMAGE + 1,
        "vision_start_token_id": IMAGE + 2,
        "vision_end_token_id": IMAGE + 3,
    },
    "hy_v4_vl": {
        "text_config": {
            **_LATENTS,
            **SHARING,
            "rope_parameters": {**_AXES, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {**_TOWER, "patch_size": PATCH, "out_hidden_size": OF_LATENTS["hidden_size"]},
        "video_token_id": IMAGE + 1,
    },
    "dots3_note": {
        "text_config": {**_LATENTS, **OF_TYPE["dots3_note_text"]},
        "vision_config": {
            **_TOWER,
            "patch_size": PATCH,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": OF_LATENTS["hidden_size"],
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": OF_LATENTS["hidden_size"],
        },
        "video_token_id": IMAGE + 1,
        "audio_token_id": IMAGE + 2,
    },
    "mistral_large4": {
        "text_config": {**_LATENTS, "indexer_types": ["full", "shared", "full"]},
        "vision_config": {"model_type": "pixtral", **_TOWER, "patch_size": PATCH, "image_size": 16},
        "image_token_index": IMAGE,
    },
}
ROOMY = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=400),
    "gear": lambda model: GEARCache(model, tail_bits=None),
}


def build(kind):
    settings = {**SETTINGS[kind]}
    if "image_token_index" not in settings:
        settings["image_token_id"] = IMAGE
    skip_before_5_24()
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def inputs_of(kind, rows):
    """Of rows with images of four tokens each, padded on the left."""
    width = max(map(len, rows))
    ids, mask = (
        torch.stack([torch.nn.functional.pad(each, (width - len(each), 0)) for each in sides])
        for sides in (rows, [torch.ones_like(each) for each in rows])
    )
    images = int((ids == IMAGE).sum()) // 4
    generator, numbers = torch.Generator().manual_seed(5), 3 * PATCH * PATCH
    # in patches, of which four make a token, and in one model two columns of a row and what ends it
    grid = [1, 4, 2] if kind == "hy_v4_vl" else [1, 4, 4]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "mistral_large4":
        inputs["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
        inputs["image_sizes"] = torch.tensor([[16, 16]] * images)
        return inputs
    numbers *= 2 if kind == "qwen4_exp" else 1
    inputs["pixel_values"] = torch.randn(grid[1] * grid[2] * images, numbers, generator=generator)
    inputs["image_grid_thw"] = torch.tensor([grid] * images)
    if kind != "dots3_note":
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs


@pytest.mark.parametrize("kind", SETTINGS)
def test_caches_with_room_for_all_answer_of_images_as_the_full_cache_does(kind):
    model = build(kind)
    inputs = inputs_of(kind, [row(50, 2), row(37, 1, seed=4)])
    wanted = answer(model, DynamicCache(config=model.config), inputs, tokens=6)
    for make in ROOMY.values():
        got = answer(model, make(model), inputs, tokens=6)
        assert torch.equal(got.sequences, wanted.sequences)
        torch.testing.assert_close(logits_of(got), logits_of(wanted), rtol=1e-3, atol=1e-3)
    # and the images count
    inputs["pixel_values"] = inputs["pixel_values"].flip(0) * 2
    other = answer(model, DenseCache(model), inputs, tokens=6)
    assert not torch.allclose(logits_of(other), logits_of(wanted), atol=1e-2)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_second_turn_follows_an_image(kind):
    model = build(kind)
    first, later = inputs_of(kind, [row(30, 1)]), row(20, 0, seed=7)[None]
    answers = []
    for make in (lambda model: DynamicCache(config=model.config), ROOMY["dense"], ROOMY["h2o"]):
        cache = make(model)
        said = answer(model, cache, first, tokens=4)
        turn = {name: each for name, each in first.items() if name == "mm_token_type_ids"}
        ids = torch.cat([said.sequences, later], 1)
        turn = {name: torch.nn.functional.pad(each, (0, ids.shape[1] - 30)) for name, each in turn.items()}
        again = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(model, cache),
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **turn,
        )
        answers.append(logits_of(again))
    for each in answers[1:]:
        torch.testing.assert_close(each, answers[0], rtol=1e-3, atol=1e-3)

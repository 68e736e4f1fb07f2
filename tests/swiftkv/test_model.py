"""SwiftKV models: what converting keeps, what the fast path skips, and that it changes no number."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from kvcompress import DenseCache
from kvcompress.hf import cache_argument
from kvcompress.swiftkv import forward as single_input
from kvcompress.swiftkv.conversion import convert
from kvcompress.swiftkv.model import as_teacher, trained_parameters
from tests.contract.models import DEVICE, build, left_padded, places, prompt
from tests.test_readme import ROOT

LAYERS, FIRST = 5, 1
SERVED = [
    "llama", "mistral", "qwen2", "qwen2_windows", "qwen3", "gemma2", "gemma3", "granite", "olmo2", "olmo3", "phi3",
    "smollm3",
]  # fmt: skip
every_family = pytest.mark.parametrize("family", SERVED)
# layers of two kinds, for each number of layers that share; a group is of one
_KINDS = {1: [0, 1, 0, 1, 1], 2: [0, 1, 1, 0, 0], 4: [0, 1, 1, 1, 1]}
every_share = pytest.mark.parametrize("share", [1, 2, 4])
# float32 sums of other order, through layers of large weights
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def base(family="llama", share=1, kinds=None, **changes):
    """A tiny model; if its family has layers of two kinds, of these (0 or 1), or so that the later ones can share."""
    kinds = kinds or _KINDS[share]
    if family in ("gemma2", "gemma3", "olmo3"):
        changes = {"layer_types": [f"{('sliding', 'full')[kind]}_attention" for kind in kinds], **changes}
    if family == "smollm3":
        changes = {"no_rope_layers": [1 - kind for kind in kinds], **changes}
    return build(family, **{"num_hidden_layers": LAYERS, **changes})


def converted(family="llama", share=1, first=FIRST, seed=0, **changes):
    """A converted tiny model, whose common norm and projections are no copies of anything."""
    model = convert(base(family, share, seed=seed, **changes), first, share)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def caches(model):
    """No cache, and caches of transformers and of kvcompress, new ones."""
    return [None, DynamicCache(config=model.config), DenseCache(model)]


class Counted:
    """Columns that entered each layer's MLP, by layer."""

    def __init__(self, model):
        self.columns = [[] for _ in model.model.layers]
        self.hooks = [
            layer.mlp.register_forward_hook(lambda module, args, out, index=index: self.note(index, args[0]))
            for index, layer in enumerate(model.model.layers)
        ]

    def note(self, index, hidden):
        self.columns[index].append(hidden.shape[1])

    def close(self):
        for hook in self.hooks:
            hook.remove()


def seen_columns(model, *args, **kwargs):
    counted = Counted(model)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        counted.close()
    return counted.columns


@every_family
def test_with_no_later_layer_the_logits_are_those_of_the_base_model(family):
    model = base(family)
    ids = prompt(20, 2)
    with torch.no_grad():
        assert torch.equal(convert(model, 1.0)(ids).logits, model(ids).logits)


# docs: a conversion that skips nothing but the last layer changes no number
@every_family
@pytest.mark.parametrize("last", [0, 1], ids=["one kind", "the other kind"])
def test_a_single_later_layer_has_its_own_keys_and_values_so_nothing_changes(family, last):
    model = base(family, kinds=[0, 1, 0, 1, last])
    student = convert(model, LAYERS - 1)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=places(mask)).logits
        at = {"attention_mask": mask, "position_ids": places(mask)}
        torch.testing.assert_close(student(ids, **at).logits[mask.bool()], expected[mask.bool()], **CLOSE)
        for cache in caches(student):
            last = student(ids, **at, logits_to_keep=2, **cache_argument(student, cache), use_cache=cache is not None)
            torch.testing.assert_close(last.logits, expected[:, -2:], **CLOSE)
    answers = [one.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for one in (model, student)]
    assert torch.equal(*answers)


@every_family
@every_share
def test_the_teacher_is_the_unconverted_model_to_the_bit(family, share):
    model = base(family, share)
    student = convert(model, FIRST, share)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert not torch.allclose(student(ids, attention_mask=mask).logits, expected, atol=0.1)
        for parameter in trained_parameters(student).values():
            parameter.mul_(1.5)
        with as_teacher(student):
            assert torch.equal(student(ids, attention_mask=mask).logits, expected)
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


# docs: makes a SwiftKV model of a Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3
# docs: in prefill only the positions whose logits are asked for run the later layers
# docs: with the same numbers as if all positions did
@every_family
@every_share
def test_the_fast_path_gives_the_logits_of_the_slow_path(family, share):
    model = converted(family, share)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    at = {"attention_mask": mask, "position_ids": places(mask)}
    with torch.no_grad():
        slow = model(ids, **at).logits
        for cache in caches(model):
            for keep in (1, 3):
                fast = model(
                    ids, **at, logits_to_keep=keep, **cache_argument(model, cache), use_cache=cache is not None
                ).logits
                torch.testing.assert_close(fast, slow[:, -keep:], **CLOSE)
                if isinstance(cache, DynamicCache | DenseCache):
                    cache.reset()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_static_cache_is_attended_to_as_far_as_it_is_filled(family):
    model = converted(family)
    ids = prompt(20, 2)
    with torch.no_grad():
        slow = model(ids).logits
        for keep in (1, 3):
            cache = StaticCache(model.config, 40)
            for length in (12, 20):
                part = ids[:, cache.get_seq_length() : length]
                fast = model(part, logits_to_keep=keep, **cache_argument(model, cache)).logits
                torch.testing.assert_close(fast, slow[:, length - keep : length], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "phi3", "smollm3"])
def test_any_columns_can_be_asked_for(family):
    model = converted(family)
    ids = prompt(20, 2)
    each = torch.tensor([[3, 19, 7], [0, 5, 18]], device=DEVICE)
    with torch.no_grad():
        slow = model(ids).logits
        for cache in caches(model):
            for keep, expected in (
                (torch.tensor([2, 17], device=DEVICE), slow[:, [2, 17]]),
                (torch.tensor([-1, 4], device=DEVICE), slow[:, [-1, 4]]),
                (each, slow.take_along_dim(each[..., None], 1)),
            ):
                fast = model(
                    ids, logits_to_keep=keep, **cache_argument(model, cache), use_cache=cache is not None
                ).logits
                torch.testing.assert_close(fast, expected, **CLOSE)
                if cache is not None:
                    cache.reset()


# README: | a prompt skips half of the layers; needs a fit or training |
def test_the_prompt_ends_at_the_first_later_layer():
    model = converted()
    ids = prompt(20, 2)
    for cache in caches(model):
        columns = seen_columns(model, ids, logits_to_keep=1, **cache_argument(model, cache))
        assert columns == [[20]] * FIRST + [[1]] * (LAYERS - FIRST)
    assert seen_columns(model, ids) == [[20]] * LAYERS
    assert seen_columns(model, ids, logits_to_keep=1, output_hidden_states=True) == [[20]] * LAYERS
    with as_teacher(model):
        assert seen_columns(model, ids, logits_to_keep=1) == [[20]] * LAYERS


def test_generate_skips_and_gives_what_running_every_layer_gives():
    model = converted()
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    counted = Counted(model)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    counted.close()
    assert counted.columns == [[20] + [1] * 5] * FIRST + [[1] * 6] * (LAYERS - FIRST)
    for _ in range(6):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=places(mask)).logits[:, -1]
        ids, mask = torch.cat([ids, logits.argmax(-1)[:, None]], 1), torch.cat([mask, mask[:, :1] * 0 + 1], 1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, name) for family in ("llama", "gemma3", "phi3", "smollm3") for name in ("eager", "sdpa")],
)
def test_any_attention_of_torch_serves(family, implementation):
    model = converted(family)
    model.set_attn_implementation(implementation)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    with torch.no_grad():
        slow = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=2).logits, slow[:, -2:], **CLOSE)


@every_family
@every_share
def test_tokens_fed_one_by_one_or_in_chunks_give_the_logits_and_the_keys_of_all_at_once(family, share):
    model = converted(family, share)
    ids = prompt(20, 2)
    with torch.no_grad():
        whole = model(ids).logits
        stored = []
        for steps in ([20], [1] * 20, [7, 1, 12]):
            for cache in caches(model)[1:]:
                logits = [model(part, **cache_argument(model, cache)).logits for part in ids.split(steps, 1)]
                torch.testing.assert_close(torch.cat(logits, 1), whole, **CLOSE)
                # chunk by chunk, no logits but the last
                cache.reset()
                for part in ids.split(steps, 1):
                    last = model(part, **cache_argument(model, cache), logits_to_keep=1).logits
                torch.testing.assert_close(last, whole[:, -1:], **CLOSE)
                if isinstance(cache, DynamicCache):
                    stored.append([(x.keys, x.values) for x in cache.layers if x.is_initialized])
        window = getattr(model.config, "sliding_window", None)
        for other in stored[1:] if not window else ():
            torch.testing.assert_close(other, stored[0], **CLOSE)


@every_family
def test_rows_of_a_left_padded_batch_are_as_if_alone(family):
    model = converted(family, 2)
    rows = [prompt(20)[0], prompt(13, seed=2)[0]]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 20:]
    compressed = DenseCache(model)
    packed = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **cache_argument(model, compressed)
    )
    for index, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=6, do_sample=False)[:, len(row) :]
        assert torch.equal(together[index : index + 1], alone)
        assert torch.equal(packed[index : index + 1, 20:], alone)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "olmo3"])
def test_a_row_padded_at_its_end_gives_the_logits_of_its_last_real_token(family):
    model = converted(family)
    rows = [prompt(20)[0], prompt(13, seed=2)[0]]
    ids, mask = (x.flip(1) for x in left_padded([row.flip(0) for row in rows]))
    with torch.no_grad():
        alone = [model(row[None]).logits[:, -2:] for row in rows]
        for cache in caches(model):
            counted = Counted(model)
            logits = model(ids, attention_mask=mask, logits_to_keep=2, **cache_argument(model, cache)).logits
            counted.close()
            torch.testing.assert_close(logits, torch.cat(alone), **CLOSE)
            if not isinstance(cache, DenseCache):
                assert counted.columns[-1] == [2]


# docs: without the flag it begins as the paper does
@every_family
def test_one_layer_begins_with_its_own_weights_and_a_group_with_the_mean(family):
    model = base(family, 4)
    alone, grouped = convert(model, FIRST), convert(model, FIRST, 4)
    later = [layer.self_attn for layer in model.model.layers[FIRST:]]
    own = [own_parts(attention) for attention in later]
    assert {"q_proj", "k_proj", "v_proj"} <= own[0].keys()
    assert ("k_norm" in own[0]) == (family in ("qwen3", "gemma3", "olmo2", "olmo3"))
    for index, parts in enumerate(own):
        for name, wanted in parts.items():
            begun = getattr(alone.model.layers[FIRST + index].self_attn, f"{name}_swiftkv")
            torch.testing.assert_close(dict(begun.named_parameters()), wanted, rtol=0, atol=0)
            assert all(begun.get_parameter(part).data_ptr() != weight.data_ptr() for part, weight in wanted.items())
    leader = grouped.model.layers[FIRST].self_attn
    for name in {"k_proj", "v_proj", "k_norm"} & own[0].keys():
        for part, parameter in getattr(leader, f"{name}_swiftkv").named_parameters():
            mean = sum(parts[name][part] for parts in own) / len(own)
            torch.testing.assert_close(parameter, mean)
    assert not any("k_proj_swiftkv" in name for name in trained_parameters(grouped) if f".{FIRST}." not in name)
    if family in ("olmo2", "olmo3"):
        # their layers' attention takes the residual stream as it is
        assert isinstance(alone.model.norm_swiftkv, nn.Identity)
    else:
        first_norm = model.model.layers[FIRST].input_layernorm.weight
        assert torch.equal(alone.model.norm_swiftkv.weight, first_norm)
        assert alone.model.norm_swiftkv.weight.data_ptr() != first_norm.data_ptr()


def own_parts(attention):
    """Parameters of an attention's projections and norms, by what a conversion calls them."""
    parts = {name: dict(module.named_parameters()) for name, module in attention.named_children() if name != "o_proj"}
    if "qkv_proj" in parts:
        # heads and KV heads of the tiny models
        widths = [each * attention.head_dim for each in (4, 2, 2)]
        split = parts.pop("qkv_proj")["weight"].split(widths)
        parts |= {f"{name}_proj": {"weight": weight} for name, weight in zip("qkv", split, strict=True)}
    return parts


@every_share
def test_a_conversion_adds_only_what_is_trained_and_shares_the_rest(share):
    model = build("llama", num_hidden_layers=LAYERS)
    student = convert(model, FIRST, share)
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    rest = {
        name: parameter.data_ptr()
        for name, parameter in student.named_parameters()
        if name not in trained_parameters(student)
    }
    assert rest == own
    hidden, width = model.config.hidden_size, 2 * 16
    groups = (LAYERS - FIRST) // share
    expected = hidden + (LAYERS - FIRST) * hidden * hidden + groups * 2 * hidden * width
    assert sum(p.numel() for p in trained_parameters(student).values()) == expected


# README: every token; later layers in groups that share K and V, made from one layer's input |
@every_share
def test_only_group_leaders_store_keys_under_a_cache_of_transformers(share):
    model = converted("llama", share)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(20, 2), **cache_argument(model, cache))
    assert sum(layer.is_initialized for layer in cache.layers) == FIRST + (LAYERS - FIRST) // share
    out = model.generate(prompt(20, 2), max_new_tokens=5, num_beams=3, do_sample=False)
    again = model.generate(
        prompt(20, 2), max_new_tokens=5, num_beams=3, do_sample=False, **cache_argument(model, DenseCache(model))
    )
    assert torch.equal(out, again)


@every_family
@pytest.mark.parametrize("share", [1, 2])
def test_a_saved_model_loads_as_it_was(family, share, tmp_path):
    model = converted(family, share)
    model.save_pretrained(tmp_path)
    # older releases attend otherwise to Gemma 2 unless told
    attends = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attends).to(DEVICE).eval()
    assert type(loaded) is type(model)
    ids = prompt(20, 2)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        with as_teacher(loaded), as_teacher(model):
            assert torch.equal(loaded(ids).logits, model(ids).logits)


# docs: Published SwiftKV checkpoints load with `from_pretrained` once `kvcompress.swiftkv.model` is imported
@pytest.mark.parametrize(
    ("family", "share"),
    [("llama", 1), ("llama", 2), ("qwen2", 1), ("qwen3", 2), ("gemma3", 1), ("olmo2", 2), ("phi3", 1), ("smollm3", 2)],
)
def test_a_checkpoint_in_the_published_layout_loads(family, share, tmp_path):
    model = converted(family, share)
    model.save_pretrained(tmp_path)
    # as published: no fields of ours, no teacher's projections in the later layers
    config = json.loads((tmp_path / "config.json").read_text())
    del config["swiftkv_teacher"], config["swiftkv"]
    assert config["num_key_value_layers"] == FIRST
    assert config["key_value_group_size"] == share
    assert config["model_type"] == f"{family}_swiftkv"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    teacher = {
        name
        for name in tensors
        for index in range(FIRST, LAYERS)
        if any(name.startswith(f"model.layers.{index}.self_attn.{part}.") for part in TEACHER)
    }
    assert len(teacher) >= (1 if family == "phi3" else 3) * (LAYERS - FIRST)
    kept = {name: tensor for name, tensor in tensors.items() if name not in teacher}
    assert ("model.norm_swiftkv.weight" in kept) == (family != "olmo2")
    assert f"model.layers.{FIRST}.self_attn.k_proj_swiftkv.weight" in kept
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    loaded = loaded.to(DEVICE).eval()
    ids = prompt(20, 2)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="without the teacher's"):
        loaded.single_input = False


TEACHER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_norm", "k_norm")


# docs: `convert(model, skip_from=0.5, share=3)` makes
def test_the_guides_conversion_is_one_of_the_default_model(smollm2):
    guide = (ROOT / "docs/guides/swiftkv.md").read_text("utf-8")
    (settings,) = re.findall(r"`convert\(model, skip_from=([0-9.]+), share=([0-9]+)\)`", guide)
    model = convert(smollm2[0], float(settings[0]), int(settings[1]))
    assert (model.config.num_key_value_layers, model.config.num_hidden_layers) == (15, 30)


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_neox", "opt", "mixtral"])
def test_other_families_are_refused_by_name(family):
    model = build(family)
    with pytest.raises(ValueError, match=f"SwiftKV converts LlamaForCausalLM, .* got {type(model).__name__}"):
        convert(model)


def test_a_converted_model_is_not_converted_again():
    with pytest.raises(ValueError, match="LlamaSwiftKVForCausalLM was converted before; convert the model that it"):
        convert(convert(base()))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"skip_from": 0}, ValueError, "a layer from 1 to 5, got 0"),
        ({"skip_from": 6}, ValueError, "a layer from 1 to 5, got 6"),
        ({"skip_from": 0.0}, ValueError, r"in \(0, 1\] \(float\), got 0.0"),
        ({"skip_from": True}, TypeError, "skip_from must be"),
        ({"skip_from": 2, "share": 2}, ValueError, "share must divide the 3 later layers .*, got 2"),
        ({"skip_from": 1, "share": 0}, ValueError, "share must divide"),
    ],
)
def test_a_split_that_does_not_work_out_is_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        convert(build("llama", num_hidden_layers=LAYERS), **wrong)


def test_layers_of_two_kinds_of_attention_share_nothing():
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
    model = build("qwen2_windows", num_hidden_layers=LAYERS, layer_types=kinds)
    with pytest.raises(ValueError, match="layers 1 to 2 would share .*full_attention.*sliding_attention"):
        convert(model, 1, 2)
    assert isinstance(convert(model, 1), nn.Module)
    model = build("smollm3", num_hidden_layers=LAYERS, no_rope_layers=[1, 1, 0, 1, 1])
    with pytest.raises(ValueError, match=r"layers 1 to 2 would share .*full_attention', 'full_attention without RoPE"):
        convert(model, 1, 2)


def test_a_model_that_attends_both_ways_is_refused():
    model = build("gemma3", layer_types=["full_attention"] * 3, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="causal models; this Gemma3ForCausalLM attends both ways"):
        convert(model)


def test_gradients_reach_what_is_trained_with_checkpointing_and_without():
    model = converted("llama", 2)
    ids = prompt(12, 2)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trained_parameters(model).items()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


@every_family
def test_keys_are_projected_in_bulk_into_the_cache_as_layer_by_layer(family, monkeypatch):
    model = converted(family, 2)
    ids, calls = prompt(40, 2), []
    # groups of layers in each call: those of one kind, whose keys are rotated whole and normalised by head, if at all
    at_once = {"gemma2": [1, 1], "smollm3": [1], "gemma3": [], "olmo2": [], "olmo3": [], "phi3": []}.get(family, [2])
    project = single_input.bulk_key_values
    monkeypatch.setattr(
        single_input, "bulk_key_values", lambda *args, **more: (calls.append(len(args[1])), project(*args, **more))
    )
    bulk, lazy = DenseCache(model), DenseCache(model)
    for part in ids.split([30, 1, 9], 1):
        with torch.no_grad():
            logits = model(part, **cache_argument(model, bulk), logits_to_keep=1).logits
            monkeypatch.setattr(single_input.SingleInput, "_in_bulk", lambda self, cache: False)
            expected = model(part, **cache_argument(model, lazy), logits_to_keep=1).logits
            monkeypatch.undo()
            monkeypatch.setattr(
                single_input,
                "bulk_key_values",
                lambda *args, **more: (calls.append(len(args[1])), project(*args, **more)),
            )
        torch.testing.assert_close(logits, expected, **CLOSE)
    assert calls == [*at_once, *at_once]
    for one, other in zip(bulk.layers, lazy.layers, strict=True):
        torch.testing.assert_close(one.dense.held()[:2], other.dense.held()[:2], **CLOSE)


@every_share
@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_a_cache_that_was_filled_in_a_mode_goes_on_outside_of_it(share, mode):
    model = converted("llama", share)

    def last_logits(cache, tokens):
        ids = prompt(tokens, 2, seed=tokens)
        return model(ids, **cache_argument(model, cache), logits_to_keep=1).logits.float()

    cache, straight = DenseCache(model), DenseCache(model)
    with torch.no_grad():
        expected = [last_logits(straight, tokens) for tokens in (20, 3, 1)]
        with torch.inference_mode() if mode == "inference" else torch.autocast(DEVICE, torch.bfloat16):
            found = [last_logits(cache, tokens) for tokens in (20, 3)]
        found.append(last_logits(cache, 1))
    close = {"rtol": 0.0, "atol": 0.0} if mode == "inference" else {"rtol": 0.0, "atol": 0.3}
    assert expected[0].std() > 0.9
    torch.testing.assert_close(found, expected, **close)

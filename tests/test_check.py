"""`kvcompress check`: what works is OK, what is not served is refused by name, and what is broken is found."""

import functools
import sys

import pytest
import torch
from transformers import AutoConfig
from transformers.cache_utils import Cache

import kvcompress.evals.provenance
from kvcompress import DenseCache, check, hf
from kvcompress.caches.dense import DenseLayer
from kvcompress.caches.evicting_layer import EvictingLayer
from kvcompress.caches.evicting_step import ChunkStep
from kvcompress.cli import main
from kvcompress.hf.small import described, small_config, small_model
from kvcompress.loading import ModelUnavailableError
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.low_rank import ShadowSegment
from kvcompress.storage.quantized_blocks import QuantizedBlocks
from kvcompress.storage.quantized_slots import QuantizedSlots
from kvcompress.storage.rerotated import RerotatedSlots
from kvcompress.storage.slots import SlotSegment
from kvcompress.swiftkv.cache import FollowingLayer
from tests.cli.test_cli import folder  # noqa: F401

FEW = ["none", "h2o", "gear", "shadowkv"]
MORE = ["mistral", "qwen2", "gemma2", "phi3", "opt", "mixtral", "gpt_oss", "smollm3", "olmo2", "granite", "cohere2"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def tiny(model_type="llama"):
    return small_model(AutoConfig.for_model(model_type))


def outcomes(caches, model=None):
    """Outcome and reason of each cache, by its name."""
    rows = check.check(tiny() if model is None else model, caches)
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
    rows = check.check(tiny(), tell=told.append)
    assert [row.cache for row in rows] == [*check.default_caches(), check.FULL]
    assert told == rows
    assert {row.cache: row.reason for row in rows if row.outcome != "OK"} == {}
    # far from the tolerance, and from a comparison of nothing
    assert all(row.difference is not None and 0 < row.difference < 5e-5 for row in rows)
    lossy = {row.cache: row.lost for row in rows if row.lost is not None}
    assert set(lossy) == {"gear", "kivi", "h2o:bits=4"}
    assert all(0.001 < lost < 0.5 for lost in lossy.values())


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3_text", "gpt_neox", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_caches_are_ok_on_other_families(family):
    rows = outcomes(FEW, tiny(family))
    assert rows == dict.fromkeys([*FEW, check.FULL], ("OK", ""))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_neox", *MORE])
def test_no_cache_is_at_fault_on_other_families(family):
    assert {name: said for name, said in outcomes(None, tiny(family)).items() if said[0] == "FAULT"} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_is_not_taken_for_a_fault(dtype):
    model = small_model(AutoConfig.for_model("llama")).to(dtype)
    caches = ["none", "h2o", "gear"]
    assert outcomes(caches, model) == dict.fromkeys([*caches, check.FULL], ("OK", ""))


def test_a_model_is_left_as_it_was():
    model = small_model(AutoConfig.for_model("llama"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = hf.attention_name(model), model(ids).logits
        check.check(model, ["none", "h2o"])
        assert hf.attention_name(model) == before[0]
        assert torch.equal(model(ids).logits, before[1])


# what is refused


def test_what_a_cache_does_not_serve_is_refused_with_the_reason():
    rows = outcomes(["h2o", "h2o:rerotated=true", "swiftkv"], tiny("opt"))
    assert rows["h2o"][0] == "OK"
    assert rows["h2o:rerotated=true"] == (
        "REFUSED",
        "rerotated closes up rotary positions, and OPTForCausalLM has none; leave it off, and stay within the "
        "positions the model knows",
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepseek_v3", r"deepseek_v3 uses multi-head latent attention \(kv_lora_rank=512\)"),
        ("t5", "t5 is an encoder-decoder model"),
        ("gemma3", "gemma3 is multimodal; kvcompress serves text models: check its language model, gemma3_text"),
    ],
)
def test_a_model_that_is_not_served_at_all_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        check.small_model(name)


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
    def attend(self, query, visible, real=EvictingLayer.attend, **how):
        return real(self, query, None, **how)

    monkeypatch.setattr(EvictingLayer, "attend", attend)
    for cache in ("h2o", "streaming", "knorm", "h2o:bits=4"):
        assert "padded batch" in fault(cache)


def test_an_evicting_cache_that_keeps_one_token_less_is_found(monkeypatch):
    def kept(self, scores, positions, real=ChunkStep._kept):
        chosen = real(self, scores, positions)
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
    assert "keys of layer 0 are missed by" in fault(cache)


@pytest.mark.parametrize("cache", ["gear", "kivi"])
def test_codes_that_are_read_wrongly_are_found(monkeypatch, cache):
    def attend(self, query, *args, real=QuantizedBlocks.attend, **kwargs):
        return real(self, query * 1.3, *args, **kwargs)

    monkeypatch.setattr(QuantizedBlocks, "attend", attend)
    assert "8 bits: codes of 8 bits lose" in fault(cache)


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
    assert "memory: memory() tells" in fault("h2o")


def test_slots_that_take_more_than_the_full_cache_are_found(monkeypatch):
    def hoard(step, *args, **kwargs):
        step.slots.hoard = torch.zeros(2**18)

    tensors = SlotSegment.tensors

    def told(self):
        return {**tensors(self), **({"keys_hoarded": self.hoard} if hasattr(self, "hoard") else {})}

    monkeypatch.setattr(ChunkStep, "commit", after(ChunkStep.commit, hoard))
    monkeypatch.setattr(SlotSegment, "tensors", told)
    monkeypatch.setattr(EvictingLayer, "_pin", lambda self: None)
    assert "memory: slots take" in fault("h2o")


def test_a_follower_that_stores_is_found(monkeypatch):
    def hoard(layer, key_states, *args, **kwargs):
        layer.hoarded = key_states.clone()

    monkeypatch.setattr(FollowingLayer, "update", after(FollowingLayer.update, hoard))
    assert "memory: memory() tells" in fault("across")


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
    assert rows[check.FULL][1] == "row 1 alone: 200 tokens were fed, and the cache has seen 0"


def test_a_generate_that_loses_the_cache_is_found():
    model = small_model(AutoConfig.for_model("llama"))
    model.__class__ = losing(type(model), "generate")
    assert (
        fault("none", model) == f"generate({hf.CACHE_SPELLINGS[0]}=...): 203 tokens were fed, and the cache has seen 0"
    )


# models


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"num_attention_heads": 24, "num_key_value_heads": 6, "hidden_size": 24 * 80}),
        ("llama", {"num_attention_heads": 32, "num_key_value_heads": 1}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("phi3", {}),
        ("gpt_neox", {}),
        ("opt", {}),
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("smollm3", {}),
        ("nemotron", {}),
    ],
)
def test_a_small_model_has_the_features_of_the_large_one(model_type, changes):
    large = AutoConfig.for_model(model_type, **changes)
    untouched = large.to_dict()
    small = small_config(large)
    assert large.to_dict() == untouched
    of_large, of_small = hf.sizes(large), hf.sizes(small)
    assert type(small) is type(large)
    assert of_small.head_dim == of_large.head_dim
    group = min(16, of_large.heads // of_large.kv_heads)
    # a config without a head_dim of its own is as wide as its heads are together
    assert of_small.heads // of_small.kv_heads == (group if hasattr(large, "head_dim") else min(group, 2))
    assert of_small.kv_heads == min(of_large.kv_heads, 1 if group > 8 else 2)
    assert of_small.learned_positions == of_large.learned_positions
    assert of_small.layers <= 8
    assert of_small.hidden <= 512
    windows = hf.attention_windows(small)
    assert len(windows) == of_small.layers
    assert {window is None for window in windows} == {window is None for window in hf.attention_windows(large)}
    assert max((window for window in windows if window), default=0) <= 64
    for name in ("rope_parameters", "attn_logit_softcapping", "attention_bias", "rotary_pct"):
        assert getattr(small, name, None) == getattr(large, name, None)
    if model_type == "smollm3":
        assert set(small.no_rope_layers) == {0, 1}
    model = small_model(large)
    assert sum(parameter.numel() for parameter in model.parameters()) < 20e6
    assert described(model).startswith(f"{model_type} ({type(model).__name__}), {of_small.layers} layers")


def test_a_config_that_cannot_be_shrunk_is_an_error_that_says_so(monkeypatch):
    def fails(config):
        raise KeyError("rank")

    monkeypatch.setattr(check.small, "small_config", fails)
    with pytest.raises(ModelUnavailableError, match=r"no small model could be made of qwen3 \(KeyError: 'rank'\)"):
        check.small_model("qwen3")


def test_without_the_default_model_it_is_a_llama(monkeypatch):
    def missing():
        raise ModelUnavailableError("not here")

    monkeypatch.setattr(check.loading, "_bundled_gguf", missing)
    assert check.read_config(None).model_type == "llama"


# the command


def test_the_command_prints_a_head_and_a_row_for_each_cache(capsys):
    assert main(["check", "--model", "llama", "--caches", "none, gear:bits=2"]) == 0
    head, table, end = capsys.readouterr().out.strip().split("\n\n")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in head.splitlines()}
    assert list(lines) == [
        "kvcompress", "torch", "transformers", "triton", "python", "system", "device", "command", "model",
    ]  # fmt: skip
    assert lines["torch"] == torch.__version__
    assert lines["python"] == sys.version.split()[0]
    assert lines["device"].startswith("cpu: ")
    assert lines["model"].startswith("llama (LlamaForCausalLM), 4 layers")
    assert lines["model"].endswith("tiny, with random weights")
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["cache", "difference", "lost"]
    assert [row[:2] for row in rows[1:]] == [["none", "OK"], ["gear:bits=2", "OK"], [check.FULL, "OK"]]
    assert [len(row) for row in rows[1:]] == [3, 4, 3]
    assert end.startswith("3 OK, 0 refused, 0 at fault\n")


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(kvcompress.evals.provenance, "_version", lambda package: None)
    monkeypatch.setattr(kvcompress.evals.provenance, "_commit", lambda: None)
    assert main(["check", "--model", "bloom", "--caches", "none"]) == 0
    out = capsys.readouterr().out
    assert "triton        not installed\n" in out
    assert "commit" not in out
    assert "0 OK, 1 refused, 0 at fault" in out


@pytest.mark.parametrize("verbose", [False, True])
def test_a_fault_makes_the_status_1_and_has_its_reason_in_the_row(verbose, monkeypatch, capsys):
    monkeypatch.setattr(DenseLayer, "_drop", after(DenseLayer._drop, forget_the_last))
    more = ["--verbose"] if verbose else []
    assert main(["check", "--model", "llama", "--caches", "none", *more]) == 1
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("none ")]
    assert "FAULT" in row
    assert row.endswith("of the largest, where they must be equal")
    assert ("Traceback" in out) == verbose


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caches", "h3o"], "unknown method 'h3o'; known: "),
        (["--caches", "h2o:"], "a method's settings are written h2o:setting=value"),
        (["--caches", ","], "--caches names no cache"),
        (["--model", "/nowhere"], "there is no folder /nowhere"),
        (["--model", "/nowhere", "--weights"], "there is no folder /nowhere"),
        (["--model", "t5"], "t5 is an encoder-decoder model; kvcompress serves decoder-only models"),
        (["--model", "llama", "--device", "gpu"], "device must be one that torch knows"),
        (["--model", "llama", "--weights", "--dtype", "int8"], "--dtype must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert message in error


def test_a_folder_is_checked_by_its_config_or_with_its_weights(folder, capsys):  # noqa: F811
    assert main(["check", "--model", folder, "--caches", "none"]) == 0
    assert "llama (LlamaForCausalLM), 2 layers, hidden size 32, 2 query heads" in capsys.readouterr().out
    assert main(["check", "--model", folder, "--caches", "none,h2o", "--weights"]) == 0
    out = capsys.readouterr().out
    assert "vocabulary 260, float32\n" in out
    assert "3 OK" in out

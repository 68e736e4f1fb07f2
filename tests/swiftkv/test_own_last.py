"""Conversions whose last prompt tokens and answers have keys and values of their own."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from kvcompress import DenseCache, HydragenCache, SwiftKVCache, convert
from kvcompress.asking import Conversation
from kvcompress.evals.studies.swiftkv import counted_flops
from kvcompress.hf import Captured, cache_argument
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.distill import Distillation, distill
from kvcompress.swiftkv.frontier import Survey, projection_flops
from kvcompress.swiftkv.model import as_teacher, trained_parameters
from tests.contract.models import left_padded, places, prompt
from tests.evals import conftest
from tests.swiftkv.runs import SMALL, rows
from tests.swiftkv.test_model import CLOSE, FIRST, Counted, base, seen_columns

tokenizer = conftest.tokenizer
OWN, TOKENS = 6, 20
families = pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "olmo2", "phi3", "smollm3"])


def made(family="llama", own_last=OWN, first=FIRST, **changes):
    """A base model, and a conversion of it whose new projections are no copies of anything."""
    model = base(family, **changes)
    student = convert(model, first, own_last=own_last)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trained_parameters(student).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, student


@torch.no_grad()
def by_hand(model, student, ids, skipped, first=FIRST):
    """The logits [tokens - skipped, vocabulary] of a row [tokens]: the base model goes on from keys and values of which
    those of the skipped tokens, in the later layers, are the conversion's."""
    full = DynamicCache()
    layers = model.model.layers
    with Captured(inputs=[layers[first]]) as captured:
        model(ids[None, :skipped], **cache_argument(model, full))
        x = student.model.norm_swiftkv(captured.inputs[layers[first]])
    positions = torch.arange(skipped, device=ids.device)[None]
    mixed = DynamicCache()
    for index, layer in enumerate(full.layers):
        key, value = layer.keys, layer.values
        if index >= first:
            attention = student.model.layers[index].self_attn
            key, value = attention.project(x)
            key = attention.rotated(key, student.model.rotary_emb(x, positions), x.device)
        mixed.update(key, value, index)
    return model(ids[None, skipped:], **cache_argument(model, mixed)).logits[0]


@torch.no_grad()
def fed(student, cache, ids, mask=None, prompt_ends=TOKENS, logits=1, **settings):
    """The logits of the prompt's last tokens and of all that follow, one by one, [batch, logits + ..., vocabulary]."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = []
    for start, stop in [(0, prompt_ends), *((at, at + 1) for at in range(prompt_ends, ids.shape[1]))]:
        out.append(
            student(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=places(mask)[:, start:stop],
                logits_to_keep=logits if not start else 0, **cache_argument(student, cache),
            ).logits
        )  # fmt: skip
    return torch.cat(out, 1)


def test_a_draft_takes_no_tokens_of_the_prompt_their_own():
    _, student = made()
    ids = prompt(TOKENS + 6)
    with torch.no_grad():
        straight = fed(student, DynamicCache(), ids)
        drafted = student(ids, logits_to_keep=7, **cache_argument(student, DenseCache(student))).logits
    torch.testing.assert_close(drafted, straight, **CLOSE)


@families
def test_a_forward_for_all_logits_is_the_base_models(family):
    model, student = made(family)
    ids = prompt(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "phi3"])
@pytest.mark.parametrize("logits", [1, 4])
def test_tokens_that_ran_have_their_own_and_the_others_those_of_the_common_input(family, logits):
    model, student = made(family)
    ids, mask = left_padded([prompt(TOKENS + 4)[0], prompt(TOKENS - 5, seed=2)[0]])
    wanted = []
    for row, seen in zip(ids, mask, strict=True):
        real = row[seen.bool()]
        # one of the prompt's last gives the logits of each token that is asked for
        skipped = len(real) - 4 - (OWN + logits - 1)
        wanted.append(by_hand(model, student, real, skipped)[-(logits + 4) :])
    for cache in (DynamicCache(), DenseCache(student), SwiftKVCache(student)):
        found = fed(student, cache, ids, mask, logits=logits)
        for index in range(2):
            torch.testing.assert_close(found[index], wanted[index], **CLOSE)
    assert float((model(ids[:1]).logits[0, -4:] - wanted[0][-4:]).abs().max()) > 0.05


def test_prompts_skip_all_but_their_last_tokens():
    _, student = made()
    columns = seen_columns(student, prompt(TOKENS), logits_to_keep=1, use_cache=False)
    assert columns == [[TOKENS]] * FIRST + [[OWN]] * (len(columns) - FIRST)


def test_wanted_tokens_may_be_any():
    model, student = made()
    ids = prompt(TOKENS)
    at = torch.tensor([TOKENS - 9, 3])
    with torch.no_grad():
        first, second = student(ids, logits_to_keep=at, use_cache=False).logits[0]
        torch.testing.assert_close(second, by_hand(model, student, ids[0, :4], 3)[0], **CLOSE)
        assert float((first - model(ids).logits[0, TOKENS - 9]).abs().max()) > 0.05
        # caches run contiguous tokens: all from the first that is wanted
        wanted = by_hand(model, student, ids[0], 3)
        found = student(ids, logits_to_keep=at, **cache_argument(student, DenseCache(student))).logits[0]
        torch.testing.assert_close(found, wanted[at.to(wanted.device) - 3], **CLOSE)


def test_answers_of_a_padded_batch_are_those_of_its_rows_alone():
    _, student = made()
    ids, mask = left_padded([prompt(TOKENS)[0], prompt(TOKENS - 8, seed=2)[0]])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    both = student.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for index in range(2):
        row = ids[index][mask[index].bool()][None]
        alone = student.generate(row, **settings, **cache_argument(student, DenseCache(student)))
        assert torch.equal(alone[0, row.shape[1] :], both[index])


def test_a_file_keeps_it(tmp_path):
    _, student = made()
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.swiftkv_own_last == OWN
    ids = prompt(TOKENS + 4).to(again.device)
    torch.testing.assert_close(fed(again, DynamicCache(), ids), fed(student, DynamicCache(), ids), **CLOSE)


def test_what_it_cannot_be_used_with_is_refused():
    model = base()
    for wrong in (-1, True, 2.5):
        with pytest.raises(ValueError, match=f"own_last must be a number of tokens, 0 or more, got {wrong}"):
            convert(model, FIRST, own_last=wrong)
    with pytest.raises(ValueError, match="own_last=4 gives each layer keys and values of its own, which share=2"):
        convert(model, FIRST, 2, own_last=4)
    _, student = made()
    fields = student.config.to_dict() | {"swiftkv_teacher": False}
    with pytest.raises(ValueError, match="needs the model's own projections"):
        type(student.config).from_dict(fields)


def test_distillation_trains_what_stands_in_for_skipped_tokens(tmp_path, no_precision_of_an_earlier_run):
    model, student = made(num_hidden_layers=4)
    plain = convert(base(num_hidden_layers=4), FIRST)
    plain.load_state_dict(student.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(student).items()}
    lines = [
        distill(one, rows(), Distillation(**SMALL), tmp_path / name)
        for name, one in (("own", student), ("plain", plain))
    ]
    assert student.config.swiftkv_own_last == OWN
    assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"])
    assert lines[0][-1]["loss"] < lines[0][0]["loss"]
    for name, parameter in trained_parameters(student).items():
        assert torch.equal(parameter, before[name]) == (".q_" in name), name
    ids = prompt(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids).logits, **CLOSE)


def test_caches_do_not_pass_between_a_model_that_keeps_its_own_and_one_that_does_not(tmp_path):
    model, student = made()
    cache = DenseCache(student)
    fed(student, cache, prompt(TOKENS))
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="keep their own keys and values"):
        DenseCache.load(tmp_path / "cache", convert(model, FIRST))


def test_flops_are_those_of_the_formula():
    model, student = made()
    found = counted_flops(student, prompt(40))
    assert found == projection_flops(model.config, 40, FIRST, own_last=OWN)
    assert found > 1.2 * projection_flops(model.config, 40, FIRST)


def test_the_frontier_measures_what_follows_a_prompt():
    model, _ = made(num_hidden_layers=4)
    survey = Survey(model, [row.ids for row in rows()], [1, 2])
    text = prompt(30, seed=40)[0].cpu()
    asked = prompt(26, seed=50)[0].cpu()
    answered = torch.zeros(26, dtype=torch.bool)
    answered[20:23] = True
    frontier = survey.measure({"one": [text]}, [Row(asked, answered)], own_last=OWN, prompt=100)
    assert frontier.own_last == OWN

    def lost(logits):
        return torch.nn.functional.cross_entropy(logits[:-1].float(), text[16:].to(logits.device)).exp()

    with torch.no_grad():
        whole = model(text[None].to(model.device)).logits[0, 15:]
    assert frontier.base.perplexity["one"] == pytest.approx(float(lost(whole)), rel=1e-3)
    for point in frontier.points:
        student = survey.converted(point.first, own_last=OWN)
        logits = by_hand(model, student, text.to(model.device), 16 - OWN, point.first)[OWN - 1 :]
        assert point.fitted.perplexity["one"] == pytest.approx(float(lost(logits)), rel=1e-3)
        assert point.prefill == projection_flops(model.config, 100, point.first, own_last=OWN) / projection_flops(
            model.config, 100
        )
        with as_teacher(student), torch.no_grad():
            assert torch.equal(student(text[None].to(model.device)).logits[0, 15:], whole)


# docs: A text that `ask` reads and a prefix are prompts
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("own_last", [0, OWN])
def test_a_text_that_is_asked_about_is_a_prompt(tokenizer, chunk, own_last):
    student = convert(base("llama", vocab_size=len(tokenizer), max_position_embeddings=512), FIRST, own_last=own_last)
    conversation = Conversation(student, tokenizer, DenseCache(student), prefill_chunk_size=chunk)
    counted = Counted(student)
    conversation.read("The cat is called Pluto and sleeps on the star charts. " * 2)
    counted.close()
    ids = torch.tensor([conversation._ids])
    chunks = ids.split(chunk or ids.shape[1], 1)
    assert counted.columns[-1] == [min(max(own_last, 1), part.shape[1]) for part in chunks]
    wanted = DenseCache(student)
    with torch.no_grad():
        for part in chunks:
            student(part, **cache_argument(student, wanted), logits_to_keep=1)
    for layer, other in zip(conversation.cache.layers, wanted.layers, strict=True):
        torch.testing.assert_close(held(layer), held(other))


def test_a_prefix_is_a_prompt():
    _, student = made()
    ids = prompt(TOKENS)
    counted = Counted(student)
    cache, wanted = HydragenCache.from_prefix(student, ids[0]), DenseCache(student)
    counted.close()
    assert counted.columns[-1] == [OWN]
    with torch.no_grad():
        student(ids, **cache_argument(student, wanted), logits_to_keep=1)
        logits = [
            student(prompt(1, seed=3), **cache_argument(student, each), logits_to_keep=1).logits
            for each in (cache, wanted)
        ]
    torch.testing.assert_close(*logits, **CLOSE)


def held(layer):
    (segment,) = layer.segments()
    return [segment.tensors()[name][:, :, : segment.length] for name in ("keys", "values")]

"""Conversions whose prompts skip a span of layers before the later ones, too."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from kvcompress import DenseCache, SwiftKVCache, convert
from kvcompress.evals.studies.swiftkv import counted_flops
from kvcompress.hf import Captured, cache_argument
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.distill import Distillation, distill
from kvcompress.swiftkv.forward import projection
from kvcompress.swiftkv.frontier import Survey, projection_flops
from kvcompress.swiftkv.least_squares import fit
from kvcompress.swiftkv.model import as_teacher, entered_at, trained_parameters
from tests.contract.models import left_padded, places, prompt
from tests.swiftkv.runs import SMALL, rows
from tests.swiftkv.test_model import CLOSE, base, seen_columns
from tests.swiftkv.test_own_last import OWN, TOKENS, fed

LAYERS, FIRST, BETWEEN = 6, 4, (1, 3)
KINDS = [0, 1, 0, 0, 1, 0]


def made(family="llama", between=BETWEEN, own_last=OWN, **changes):
    """A base model, and a conversion of it whose new projections and map are no copies of anything."""
    model = base(family, kinds=KINDS, num_hidden_layers=LAYERS, **changes)
    student = convert(model, FIRST, own_last=own_last, skip_between=between)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trained_parameters(student).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, student


@torch.no_grad()
def by_hand(model, student, *chunks):
    """The logits [tokens - skipped, vocabulary] of the last of some chunks: (a row's tokens, how many are skipped).

    The base model goes on from keys and values of skipped tokens. Before the span these are its own. In it they are of
    what enters it. Behind it they are the base model's, which began there with what the map made; and in the later
    layers of what enters the first of these.
    """
    cache = DynamicCache()
    layers = model.model.layers
    start, stop, first = *student.config.swiftkv_skip_between, student.config.num_key_value_layers
    between = student.model.between_swiftkv
    for ids, skipped in chunks:
        past = cache.get_seq_length()
        positions = torch.arange(past, past + skipped, device=ids.device)[None]
        whole, path = copy.deepcopy(cache), copy.deepcopy(cache)
        with Captured(inputs=[layers[start], layers[first]]) as captured:
            model(ids[None, :skipped], **cache_argument(model, whole))
            entering = captured.inputs[layers[start]]
            x = between.norm(entering)
            moved = entering + x @ between.map.weight.T + between.map.bias
            with entered_at(model, stop, moved):
                model(ids[None, :skipped], **cache_argument(model, path))
            common = student.model.norm_swiftkv(captured.inputs[layers[first]])
        for index in range(len(layers)):
            of = whole if index < start else path
            if start <= index < stop or index >= first:
                attention = student.model.layers[index].self_attn
                normed = x if index < stop else common
                key, value = attention.project(normed)
                key = attention.rotated(key, student.model.rotary_emb(normed, positions), key.device)
            else:
                key, value = (each[:, :, past:] for each in (of.layers[index].keys, of.layers[index].values))
            cache.update(key, value, index)
        logits = model(ids[None, skipped:], **cache_argument(model, cache)).logits[0]
    return logits


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "olmo2", "phi3", "smollm3"])
def test_a_forward_for_all_logits_is_the_base_models(family):
    model, student = made(family)
    ids = prompt(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids).logits, **CLOSE)
        with as_teacher(student):
            assert torch.equal(student(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "phi3"])
@pytest.mark.parametrize("logits", [1, 4])
def test_a_prompt_skips_the_span_and_goes_on_from_what_stands_in_for_it(family, logits):
    model, student = made(family)
    ids, mask = left_padded([prompt(TOKENS + 4)[0], prompt(TOKENS - 5, seed=2)[0]])
    wanted = []
    for row, seen in zip(ids, mask, strict=True):
        real = row[seen.bool()]
        wanted.append(by_hand(model, student, (real, len(real) - 4 - (OWN + logits - 1)))[-(logits + 4) :])
    for cache in (DynamicCache(), DenseCache(student), SwiftKVCache(student), StaticCache(student.config, 40)):
        found = fed(student, cache, ids, mask, logits=logits)
        for index in range(2):
            torch.testing.assert_close(found[index], wanted[index], **CLOSE)
    # neither the base model's nor those of a conversion that runs the span
    assert float((model(ids[:1]).logits[0, -4:] - wanted[0][-4:]).abs().max()) > 0.05
    other = convert(model, FIRST, own_last=OWN)
    other.load_state_dict(student.state_dict(), strict=False)
    assert float((fed(other, DynamicCache(), ids, mask)[0, -4:] - wanted[0][-4:]).abs().max()) > 0.05


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_span_begins_with_its_own_keys_and_values_and_adds_nothing(family):
    model = base(family, num_hidden_layers=LAYERS)
    student = convert(model, FIRST, own_last=OWN, skip_between=BETWEEN)
    entering = torch.randn(1, 8, 64, device=model.device)
    with torch.no_grad():
        for index in range(*BETWEEN):
            own, rows = projection(model.model.layers[index].self_attn, "k")
            assert torch.equal(student.model.layers[index].self_attn.k_proj_swiftkv.weight, own.weight[rows])
        between = student.model.between_swiftkv
        assert torch.equal(between.norm.weight, model.model.layers[BETWEEN[0]].input_layernorm.weight)
        assert torch.equal(between(entering, between.norm(entering)), entering)


# docs: tokens that are not the last of a prompt skip layers 12 and 13, too
def test_prompts_skip_the_span_but_for_their_last_tokens():
    _, student = made()
    columns = seen_columns(student, prompt(TOKENS), logits_to_keep=1, use_cache=False)
    assert columns == [[TOKENS], [OWN], [OWN], [TOKENS], [OWN], [OWN]]


def test_rows_may_end_in_padding():
    model, student = made()
    whole, short = prompt(TOKENS)[0], prompt(TOKENS - 7, seed=2)[0]
    ids = torch.stack([whole, torch.cat([short, torch.zeros_like(whole[:7])])])
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    settings = {"attention_mask": mask, "position_ids": places(mask), "logits_to_keep": 1}
    with torch.no_grad():
        for begins, cache in ([None, None], [TOKENS - 7 - OWN, DenseCache(student)]):
            more = {"use_cache": False} if cache is None else cache_argument(student, cache)
            found = student(ids, **settings, **more).logits[:, -1]
            for index, row in enumerate((whole, short)):
                # a cache runs contiguous tokens: all from the first that one of the rows needs
                skipped = len(row) - OWN if begins is None else begins
                torch.testing.assert_close(found[index], by_hand(model, student, (row, skipped))[-1], **CLOSE)


def test_each_chunk_and_each_turn_counts_its_own():
    model, student = made()
    ids = prompt(TOKENS + 15)
    parts = ids.split([TOKENS, 12, 3], 1)
    chunks = [(part[0], max(0, part.shape[1] - OWN)) for part in parts[:2]]
    for cache in (DynamicCache(), DenseCache(student), SwiftKVCache(student), StaticCache(student.config, 40)):
        past = 0
        for index, part in enumerate(parts[:2]):
            with torch.no_grad():
                given = {"attention_mask": torch.ones_like(ids[:, : past + part.shape[1]])}
                found = student(part, logits_to_keep=1, **given, **cache_argument(student, cache)).logits[0, -1]
            past += part.shape[1]
            torch.testing.assert_close(found, by_hand(model, student, *chunks[: index + 1])[-1], **CLOSE)


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
    assert again.config.swiftkv_skip_between == [*BETWEEN]
    ids = prompt(TOKENS + 4).to(again.device)
    torch.testing.assert_close(fed(again, DynamicCache(), ids), fed(student, DynamicCache(), ids), **CLOSE)


def test_caches_do_not_pass_between_models_that_skip_other_layers(tmp_path):
    model, student = made()
    cache = DenseCache(student)
    fed(student, cache, prompt(TOKENS))
    cache.save(tmp_path / "cache")
    for other in (None, (1, 2)):
        with pytest.raises(ValueError, match="the others skip layers 1 to 2 too"):
            DenseCache.load(tmp_path / "cache", convert(model, FIRST, own_last=OWN, skip_between=other))


def test_what_it_cannot_be_used_with_is_refused(tmp_path):
    model, student = made()
    for wrong in ((0, 2), (2, 2), (3, 1), (1, 4), (2, 6), (1,), (1, 2, 3), (True, 2), (1.0, 2), 2, "12"):
        with pytest.raises(ValueError, match="skip_between must be the first layer of a span"):
            convert(model, FIRST, own_last=OWN, skip_between=wrong)
    with pytest.raises(ValueError, match="it needs own_last"):
        convert(model, FIRST, skip_between=BETWEEN)
    with pytest.raises(ValueError, match="own_last=4 gives each layer keys and values of its own, which share=2"):
        convert(model, FIRST, 2, own_last=4, skip_between=BETWEEN)
    before = copy.deepcopy(student.state_dict())
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=r"trains no conversion with skip_between=\(1, 3\)"):
        distill(student, rows(), Distillation(**SMALL), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_flops_are_those_of_the_formula():
    model, student = made()
    found = counted_flops(student, prompt(40))
    assert found == projection_flops(model.config, 40, FIRST, own_last=OWN, skip_between=BETWEEN)
    assert found < 0.9 * projection_flops(model.config, 40, FIRST, own_last=OWN)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_fit_of_the_later_layers_reads_what_tokens_have_that_skipped_the_span(family):
    model, student = made(family)
    ids = [row.ids.to(model.device) for row in rows()]
    found = fit(student, ids, 1e-9)
    between, layers = student.model.between_swiftkv, model.model.layers
    x, adds, keys, later, deep = [], [], [], [], []
    with torch.no_grad(), Captured(
        inputs=[layers[index] for index in (*BETWEEN, FIRST)], outputs=[layers[n].self_attn.k_proj for n in (2, 5)]
    ) as captured:  # fmt: skip
        for row in ids:
            model(row[None])
            entering, left = (captured.inputs[layers[index]][0] for index in BETWEEN)
            x.append(between.norm(entering))
            adds.append(left - entering)
            keys.append(captured.outputs[layers[2].self_attn.k_proj][0])
            deep.append(captured.outputs[layers[5].self_attn.k_proj][0])
            with entered_at(model, BETWEEN[1], (entering + between.map(x[-1]))[None]):
                model(row[None])
            later.append(student.model.norm_swiftkv(captured.inputs[layers[FIRST]][0]))

    def missed(linear, inputs, outputs):
        """How far the gradient of the squared error is from 0, over the parts that cancel in it."""
        a, y = torch.cat(inputs).double(), torch.cat(outputs).double()
        if linear.bias is not None:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        weights = torch.cat([linear.weight.T, *([] if linear.bias is None else [linear.bias[None]])]).double()
        return float((a.T @ (a @ weights - y)).norm() / (a.T @ y).norm())

    attentions = [layer.self_attn for layer in student.model.layers]
    assert missed(between.map, x, adds) < 1e-3
    assert missed(attentions[2].k_proj_swiftkv, x, keys) < 1e-3
    assert missed(attentions[5].k_proj_swiftkv, later, deep) < 1e-3
    assert all(after < before for before, after in found.values())
    assert len(found) == 2 * 2 + 1 + 2 * 2


def test_a_survey_fits_as_fit_does():
    model, _ = made()
    ids = [row.ids for row in rows()]
    student = convert(model, FIRST, own_last=OWN, skip_between=BETWEEN)
    fit(student, ids)
    survey = Survey(model, ids, skip_between=BETWEEN)
    assert survey.firsts == [4, 5]
    found = survey.converted(FIRST, own_last=OWN).state_dict()
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="it needs own_last"):
        survey.converted(FIRST)


def test_the_frontier_measures_what_follows_a_prompt():
    model, _ = made()
    survey = Survey(model, [row.ids for row in rows()], [4, 5], skip_between=BETWEEN)
    text, asked = prompt(30, seed=40)[0].cpu(), prompt(26, seed=50)[0].cpu()
    answered = torch.zeros(26, dtype=torch.bool)
    answered[20:23] = True
    frontier = survey.measure({"one": [text]}, [Row(asked, answered)], own_last=OWN, prompt=100)
    assert frontier.skip_between == BETWEEN
    assert frontier.facts()["skip_between"] == BETWEEN
    for point in frontier.points:
        student = survey.converted(point.first, own_last=OWN)
        logits = by_hand(model, student, (text.to(model.device), 16 - OWN))[OWN - 1 :]
        lost = torch.nn.functional.cross_entropy(logits[:-1].float(), text[16:].to(logits.device)).exp()
        assert point.fitted.perplexity["one"] == pytest.approx(float(lost), rel=1e-3)
        cost = projection_flops(model.config, 100, point.first, own_last=OWN, skip_between=BETWEEN)
        assert point.prefill == cost / projection_flops(model.config, 100)

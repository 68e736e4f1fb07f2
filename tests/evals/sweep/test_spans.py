import dataclasses

import pytest

from kvcompress import DenseCache, SnapKVCache, StreamingLLMCache, registry
from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.protocol import Measured, answer
from kvcompress.evals.sweep.samples import make_prompt, make_samples
from kvcompress.evals.sweep.spans import prompt_spans
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks
from tests.evals.sweep.test_protocol import prompts

NAMES = ["template", "instruction", "first_third", "middle_third", "last_third", "question"]


def test_spans_are_the_parts_of_a_prompt_in_order(tokenizer):
    (sample,) = make_samples("needle", tokenizer, 900, 1)
    prompt = make_prompt(tokenizer, sample)
    assert [name for name, _, _ in prompt.spans] == NAMES
    whole = prompt.context + prompt.question
    texts = [tokenizer.decode(whole[start:stop]) for _, start, stop in prompt.spans]
    assert "".join(texts) == tokenizer.decode(whole)
    assert texts[0] == "<user>"
    assert texts[1] == sample.context[: sample.instruction]
    assert texts[1].endswith("about the number afterwards.\n")
    assert texts[5] == sample.question + "</user><assistant>" + sample.answer_prefix
    assert max(map(len, texts[2:5])) - min(map(len, texts[2:5])) <= 1


def test_a_part_without_tokens_is_left_out(tokenizer):
    (sample,) = make_samples("needle", tokenizer, 900, 1)
    bare = dataclasses.replace(sample, instruction=0)
    assert [name for name, _, _ in make_prompt(tokenizer, bare).spans] == [NAMES[0], *NAMES[2:]]


def spanned(context=(60, 48)):
    """Prompts of a template of 2 tokens and an instruction of 4."""
    asked = prompts([(count, 9) for count in context])
    return [
        dataclasses.replace(prompt, spans=prompt_spans(2, 6, len(prompt.context), len(prompt.context) + 9))
        for prompt in asked
    ]


# docs: how much of each part of the prompts was kept
def test_what_sinks_and_recent_keep_is_their_beginning_and_end(model):
    # padding of the shorter row takes part in no span
    _, held = answer(model, lambda: StreamingLLMCache(model, budget=20, sinks=4), spanned(), "question-agnostic")
    # the last 16 of a last third of 18 tokens, and all 14 of another with 2 of the middle third
    assert held.kept_by_span == pytest.approx(
        {
            "template": 1.0,
            "instruction": 0.5,
            "first_third": 0.0,
            "middle_third": (0 + 2 / 14) / 2,
            "last_third": (16 / 18 + 1.0) / 2,
        }
    )


def test_a_question_that_was_read_counts_but_for_what_was_held_back(model):
    _, held = answer(
        model, lambda: StreamingLLMCache(model, budget=20, sinks=4), spanned((60,)), "question-aware", hold_back=3
    )
    # 6 of its 9 tokens were read, all of them among the recent 16
    assert held.kept_by_span["question"] == 1.0
    assert held.kept_by_span["last_third"] == pytest.approx(10 / 18)


def test_shares_are_those_of_the_positions_that_heads_hold(model):
    caches = []

    def make():
        caches.append(SnapKVCache(model, budget=24, window=8))
        return caches[0]

    (prompt,) = spanned((60,))
    prompt = dataclasses.replace(prompt, max_new_tokens=1)
    held = []

    def first(reader):
        reader.read([prompt.context])
        held.extend({*head} for layer in caches[0].layers for head in layer.held_positions()[0].tolist())

    _, measured = answer(model, make, [prompt], "question-agnostic", first=first)
    for name, start, stop in prompt.spans[:-1]:
        wanted = sum(len(head & {*range(start, stop)}) for head in held) / len(held) / (stop - start)
        assert measured.kept_by_span[name] == pytest.approx(wanted)
    assert len({frozenset(head) for head in held}) > 1


def test_a_cache_that_keeps_all_or_does_not_say_has_none(model):
    _, held = answer(model, lambda: DenseCache(model), spanned(), "question-agnostic")
    assert held.kept_by_span is None


def test_batches_count_by_their_sequences():
    one = {
        "bytes_held": 1.0, "full_bytes": 2.0, "by_component": {}, "tokens_seen": 1.0, "tokens_kept": 1.0,
        "least_kept": 1, "most_kept": 1,
    }  # fmt: skip
    parts = [
        Measured(sequences=1, kept_by_span={"template": 1.0, "question": 0.5}, **one),
        Measured(sequences=3, kept_by_span={"template": 0.0}, **one),
    ]
    assert Measured.mean(parts).kept_by_span == {"template": 0.25, "question": 0.5}
    assert Measured.mean([dataclasses.replace(part, kept_by_span=None) for part in parts]).kept_by_span is None


def test_rows_have_it(model, tokenizer, tmp_path):
    settings = Settings(("h2o",), (0.2,), ("needle",), (700,), 3, batch=2)
    rows = Sweep(settings, make_tasks(settings), model, tokenizer, tmp_path).run()
    for row in rows:
        spans = row["kept_by_span"]
        if row["budget"] is None:
            assert spans is None
            continue
        assert list(spans) == (NAMES[:5] if row["protocol"] == "question-agnostic" else NAMES)
        assert all(0.0 <= share <= 1.0 for share in spans.values())
    floor = next(row for row in rows if row["method"] == "streaming")
    assert floor["kept_by_span"]["middle_third"] == 0.0


@pytest.mark.parametrize("spec", ["h2o", "h2o:bits=4", "h2o:rerotated=true", "kvzip", "snapkv:allocation=heads"])
def test_a_full_budget_keeps_every_span_whole(model, spec):
    _, held = answer(model, lambda: registry.build(spec, model, 200), spanned(), "question-agnostic")
    assert set(held.kept_by_span.values()) == {1.0}

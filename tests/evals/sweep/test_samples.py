import hashlib

import pytest

from kvcompress.evals.sweep.recipes import needles
from kvcompress.evals.sweep.samples import make_prompt, make_samples, prose, read_text, score

LENGTH = 1500
OWN = tuple(needles.RECIPES)
# of samples that recorded rows were measured on
KNOWN = {
    "needle": "e4283eaaf68ec7c5",
    "needle_sentences": "0f4d60fe7634be52",
    "needle_essay": "ef66b10bbf900708",
    "multikey": "b42b37a813c938f4",
    "multivalue": "1b5fe38f26c0049e",
    "kv": "a5fdea560061c005",
    "variables": "a39d175fdfc51c5b",
    "passkey": "1434d66071e8b5f4",
}


@pytest.mark.parametrize("task", OWN)
def test_a_sample_depends_on_its_seed_alone(task, tokenizer):
    first = make_samples(task, tokenizer, LENGTH, 3, seed=1)
    assert first == make_samples(task, tokenizer, LENGTH, 3, seed=1)
    other = make_samples(task, tokenizer, LENGTH, 3, seed=2)
    assert all(a.answers != b.answers for a, b in zip(first, other, strict=True))
    assert len({sample.answers for sample in first}) == 3


@pytest.mark.parametrize("length", [1500, 4000])
@pytest.mark.parametrize("task", OWN)
def test_contexts_fill_the_length_and_never_exceed_it(task, length, tokenizer):
    for sample in make_samples(task, tokenizer, length, 4):
        tokens = len(make_prompt(tokenizer, sample).context)
        # one more unit of haystack would not fit; the manual's longest sentences have some 300 letters
        assert length - 450 < tokens <= length


@pytest.mark.parametrize("task", OWN)
def test_every_answer_is_in_the_context_and_not_in_the_question(task, tokenizer):
    for sample in make_samples(task, tokenizer, LENGTH, 4):
        assert all(answer in sample.context for answer in sample.answers)
        assert not any(answer in sample.question + sample.answer_prefix for answer in sample.answers)


@pytest.mark.parametrize("task", ["needle", "needle_sentences", "needle_essay", "multikey", "kv", "passkey"])
def test_single_answers_stand_at_depths_spread_evenly(task, tokenizer):
    samples = make_samples(task, tokenizer, 6000, 5)
    for index, sample in enumerate(samples):
        assert sample.depth == pytest.approx((index + 0.5) / 5, abs=0.1)
        (answer,) = sample.answers
        assert sample.context.index(answer) / len(sample.context) == pytest.approx(sample.depth, abs=0.06)


@pytest.mark.parametrize("task", KNOWN)
def test_samples_are_those_that_results_on_disk_were_measured_on(task, tokenizer, tmp_path):
    essay = tmp_path / "essay.txt"
    essay.write_text(
        " ".join(f"The {n} of them went home in the evening." for n in ["first", "second", "third", "fourth", "fifth"])
    )
    made = make_samples(task, tokenizer, LENGTH, 3, seed=7, text=essay)
    facts = [(s.context, s.question, s.answer_prefix, s.answers, s.max_new_tokens, s.depth) for s in made]
    assert hashlib.sha256(repr(facts).encode()).hexdigest()[:16] == KNOWN[task]


def test_multikey_hides_other_numbers_that_are_no_answer(tokenizer):
    (sample,) = make_samples("multikey", tokenizer, 3000, 1)
    assert sample.context.count("One of the special magic numbers") == 4
    assert len(sample.answers) == 1


def test_multivalue_asks_for_four_numbers_of_one_name(tokenizer):
    (sample,) = make_samples("multivalue", tokenizer, 3000, 1)
    assert len(set(sample.answers)) == 4
    name = sample.question.split(" for ")[1].split(" ")[0]
    assert sample.context.count(name) == 4


def test_the_lines_of_a_chain_come_in_order(tokenizer):
    for sample in make_samples("variables", tokenizer, 4000, 8):
        places = [sample.context.rindex(f"VAR {name} =") for name in sample.answers]
        assert places == sorted(places)


def test_score_is_the_share_of_answers_found_whatever_their_case(tokenizer):
    (sample,) = make_samples("variables", tokenizer, 2000, 1)
    assert score(sample, " and ".join(sample.answers).lower()) == 1.0
    assert score(sample, sample.answers[0]) == pytest.approx(1 / len(sample.answers))
    assert score(sample, "") == 0.0


def test_a_prompt_is_one_message_of_the_chat_template_split_before_the_question(tokenizer):
    (sample,) = make_samples("needle", tokenizer, LENGTH, 1)
    prompt = make_prompt(tokenizer, sample)
    assert tokenizer.decode(prompt.context) == "<user>" + sample.context
    assert tokenizer.decode(prompt.question) == sample.question + "</user><assistant>" + sample.answer_prefix


@pytest.mark.parametrize(
    "today", ["{{ date_string }}", "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}"]
)
def test_a_template_that_tells_the_day_tells_every_sweep_the_same(tokenizer, monkeypatch, today):
    monkeypatch.setattr(tokenizer, "chat_template", today + "{% for m in messages %}{{ m.content }}{% endfor %}")
    prompt = make_prompt(tokenizer, make_samples("passkey", tokenizer, LENGTH, 1)[0])
    assert tokenizer.decode(prompt.context).startswith("26 Jul 2024")


def test_without_a_chat_template_the_answer_starts_on_a_new_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (sample,) = make_samples("passkey", tokenizer, LENGTH, 1)
    prompt = make_prompt(tokenizer, sample)
    assert tokenizer.decode(prompt.context) == "<s>" + sample.context
    assert tokenizer.decode(prompt.question) == sample.question + "\n" + sample.answer_prefix


def test_essays_come_from_the_file_that_is_named(tokenizer, tmp_path):
    essay = tmp_path / "essay.txt"
    essay.write_text("Nobody in the valley had ever seen a horse before. The horse had never seen them either.")
    (sample,) = make_samples("needle_essay", tokenizer, LENGTH, 1, text=essay)
    assert sample.context.count("Nobody in the valley") > 3


def test_prose_is_whole_sentences():
    sentences = prose(read_text())
    assert len(sentences) > 500
    assert all(sentence[0].isupper() and sentence[-1] in ".!?" for sentence in sentences)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "needles"}, "task must be one of needle, .*got 'needles'"),
        ({"length": 40}, r"length must be at least \d+ tokens for the task needle, got 40"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"task": "needle_essay", "text": "/nowhere/essay.txt"}, "text must be a readable UTF-8 file"),
        # a text for a path, which is shown in part
        (
            {"task": "needle_essay", "text": "It was dark. " * 999},
            r"got 'It was dark.{100,190} \.\.\.' \(File name too long\)",
        ),
    ],
)
def test_mistakes_are_named(tokenizer, change, message):
    asked = {"task": "needle", "length": 1500, "samples": 1} | change
    with pytest.raises(ValueError, match=message):
        make_samples(tokenizer=tokenizer, **asked)

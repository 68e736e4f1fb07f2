import itertools
import re
import uuid
from collections import Counter
from random import Random

import pytest

from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.recipes import ruler, words
from kvcompress.evals.sweep.samples import RULER, RULER_OFFLINE, make_prompt, make_samples, score
from kvcompress.evals.tasks import make_tasks

TASKS = tuple(ruler.RECIPES)
# a token a letter: examples and ten common words take their room
LENGTH = 6000


def whole(sample):
    return sample.context + sample.question + sample.answer_prefix


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_seed_alone(task, tokenizer):
    first = make_samples(task, tokenizer, LENGTH, 2, seed=1)
    assert first == make_samples(task, tokenizer, LENGTH, 2, seed=1)
    other = make_samples(task, tokenizer, LENGTH, 2, seed=2)
    assert len({sample.answers for sample in (*first, *other)}) == 4


@pytest.mark.parametrize("length", [512, 1024, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_contexts_fill_the_length_in_real_tokens_and_never_exceed_it(task, length, smollm2):
    for sample in make_samples(task, smollm2[1], length, 2):
        tokens = len(make_prompt(smollm2[1], sample).context)
        # one more line of UUIDs, or one more word of all ranks, would not fit
        assert length - 100 < tokens <= length


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_in_the_context_and_not_in_the_question_which_is_not_in_the_context(task, tokenizer):
    for sample in make_samples(task, tokenizer, LENGTH, 3):
        asked = sample.question + sample.answer_prefix
        assert all(answer in sample.context for answer in sample.answers)
        assert not any(answer in asked for answer in sample.answers)
        question = sample.question.splitlines()[-1]
        # the examples of cwe ask the same of another list
        assert sample.context.count(question) == (task == "ruler_cwe")


# what the published generator's templates make of these parameters
FORMS = {
    "ruler_niah_single_1": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n",
        "\nWhat is the special magic number for {} mentioned in the provided text?",
        " The special magic number for {} mentioned in the provided text is",
        r"[a-z]+-[a-z]+",
        r"\d{7}",
    ),
    "ruler_niah_single_3": (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the uuid afterwards.\n",
        "\nWhat is the special magic uuid for {} mentioned in the provided text?",
        " The special magic uuid for {} mentioned in the provided text is",
        r"[a-z]+-[a-z]+",
        r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    ),
    "ruler_niah_multivalue": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n",
        "\nWhat are all the special magic numbers for {} mentioned in the provided text?",
        " The special magic numbers for {} mentioned in the provided text are",
        r"[a-z]+-[a-z]+",
        r"\d{7}",
    ),
}
FORMS["ruler_niah_single_2"] = FORMS["ruler_niah_multikey_1"] = FORMS["ruler_niah_single_1"]
FORMS["ruler_niah_multikey_2"] = FORMS["ruler_niah_single_1"]
FORMS["ruler_niah_multikey_3"] = (*FORMS["ruler_niah_single_3"][:3], r"[0-9a-f-]{36}", r"[0-9a-f-]{36}")
FORMS["ruler_niah_multiquery"] = (*FORMS["ruler_niah_multivalue"][:3], r"([\w-]+, ){3}and [\w-]+", r"\d{7}")


@pytest.mark.parametrize("task", FORMS)
def test_needles_are_worded_as_the_published_ones(task, tokenizer):
    head, question, prefix, key, value = FORMS[task]
    (sample,) = make_samples(task, tokenizer, LENGTH, 1)
    assert sample.context.startswith(head)
    assert sample.instruction == len(head)
    asked = re.fullmatch(re.escape(question).replace(r"\{\}", f"({key})"), sample.question)[1]
    assert sample.answer_prefix == prefix.format(asked)
    assert all(re.fullmatch(value, answer) for answer in sample.answers)
    assert sample.max_new_tokens == 128
    kind = "uuids" if "uuid" in head else "numbers"
    for name, answer in zip(re.split(r", and |, ", asked) * 4, sample.answers, strict=False):
        assert f"One of the special magic {kind} for {name} is: {answer}." in sample.context


# keys of a context, values of each, answers asked for
@pytest.mark.parametrize(
    ("task", "lines", "keys", "answers"),
    [
        ("ruler_niah_single_2", 1, 1, 1),
        ("ruler_niah_multikey_1", 4, 4, 1),
        ("ruler_niah_multivalue", 4, 1, 4),
        ("ruler_niah_multiquery", 4, 4, 4),
    ],
)
def test_as_many_needles_are_hidden_and_asked_for_as_published(task, lines, keys, answers, tokenizer):
    (sample,) = make_samples(task, tokenizer, LENGTH, 1)
    found = re.findall(r"One of the special magic numbers for (\S+) is:", sample.context)
    assert (len(found), len(set(found)), len(set(sample.answers))) == (lines, keys, answers)


@pytest.mark.parametrize("task", ["ruler_niah_multikey_2", "ruler_niah_multikey_3"])
def test_a_haystack_of_needles_has_no_other_line_and_no_key_twice(task, tokenizer):
    (sample,) = make_samples(task, tokenizer, LENGTH, 1)
    lines = sample.context.splitlines()[1:]
    needles = [re.fullmatch(r"One of the special magic \w+ for (\S+) is: (\S+)\.", line) for line in lines]
    assert len({needle[1] for needle in needles}) == len({needle[2] for needle in needles}) == len(lines) > 40


def test_uuids_are_of_version_4(tokenizer):
    (sample,) = make_samples("ruler_niah_single_3", tokenizer, LENGTH, 1)
    assert uuid.UUID(sample.answers[0]).version == 4


def test_single_needles_stand_at_depths_spread_evenly(tokenizer):
    for index, sample in enumerate(make_samples("ruler_niah_multikey_2", tokenizer, LENGTH, 5)):
        assert sample.depth == pytest.approx((index + 0.5) / 5, abs=0.05)


@pytest.mark.parametrize(("length", "noise"), [(900, 4), (LENGTH, 10)])
def test_variables_are_tracked_as_published_after_an_example(length, noise, tokenizer, monkeypatch):
    if length == 900:
        # the example is chosen by the length asked for; bytes need more of it
        monkeypatch.setattr(ruler, "_SHORT", 10**6)
    (sample,) = make_samples("ruler_vt", tokenizer, LENGTH, 1)
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    example, own = sample.context.split("\n\n\n\n")
    assert example.startswith(head)
    assert own.startswith(head)
    assert example.count("The grass is green. The sky is blue. The sun is yellow.") == noise
    # one chain of four hops, in order
    chain = sample.answers
    (value,) = re.findall(rf"VAR {chain[0]} = (\d{{5}})", own)
    assert re.findall(r"VAR (\w{5}) = VAR (\w{5}) ", own) == list(zip(chain[1:], chain[:-1], strict=True))
    asked = "Question: Find all variables that are assigned the value {} in the text above."
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        "value {}, they are: "
    )
    assert sample.question == "\n" + asked.format(value)
    assert sample.answer_prefix == prefix.format(value)
    assert sample.max_new_tokens == 30
    (solved,) = re.findall(r"VAR \w{3} = (\d{5})", example)
    first, said = example.split("\n" + asked.format(solved) + prefix.format(solved) + " ")
    assert re.findall(r"VAR (\w{3}) = VAR", first) == said.split()[1:]


@pytest.mark.parametrize("length", [2000, 9000])
def test_common_words_come_as_often_as_published(length, tokenizer):
    (sample,) = make_samples("ruler_cwe", tokenizer, length, 1)
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    _, example, own = sample.context.split(head)
    asked = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    assert (sample.question, sample.answer_prefix, sample.max_new_tokens) == (asked, prefix, 120)
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    counts = Counter(listed(own))
    assert {word for word, count in counts.items() if count == often} == set(sample.answers)
    assert {count for word, count in counts.items() if word not in sample.answers} == {seldom}
    shown, said = example.split(asked + prefix)
    often, seldom, others = (3, 1, 10) if length < 4096 else (10, 3, 30)
    counts = Counter(listed(shown))
    assert sorted(counts.values()) == [seldom] * others + [often] * 10
    assert set(listed(said)) == {word for word, count in counts.items() if count == often}


def listed(text):
    """The words of a numbered list."""
    found = re.findall(r"(\d+)\. (\w+)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


def test_thousands_of_words_are_at_hand_and_none_contains_another():
    from itertools import islice
    from random import Random

    made = list(islice(words.syllables(Random(0)), 9000))
    assert len(set(made)) == 9000
    assert {len(word) for word in made} == {5}


@pytest.mark.parametrize("length", [1500, 6000])
def test_the_frequencies_of_coded_words_fall_as_published(length, tokenizer):
    (sample,) = make_samples("ruler_fwe", tokenizer, length, 1)
    head = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    assert sample.context.startswith(head)
    assert sample.question == (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    assert sample.answer_prefix == (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    assert sample.max_new_tokens == 50
    ranked = Counter(sample.context.removeprefix(head).split()).most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == sample.answers
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    assert len({count for _, count in ranked[:5]}) == 5
    # in a sixth of all words for each word of rank 2, as 1 / 4 is to zeta(2)
    assert ranked[1][1] / ranked[0][1] == pytest.approx(1 / 4, abs=0.02)
    assert ranked[3][1] / ranked[0][1] == pytest.approx(1 / 16, abs=0.01)


def test_score_is_the_share_of_references_found(tokenizer):
    (sample,) = make_samples("ruler_cwe", tokenizer, LENGTH, 1)
    assert score(sample, " ".join(sample.answers[:3]).upper()) == pytest.approx(0.3)


def settings(**change):
    return Settings(("h2o",), (0.5,), ("ruler",), (2000,), 1, **change)


# docs: `ruler` is all of RULER
def test_ruler_stands_for_its_tasks_and_for_all_where_there_are_documents(tmp_path):
    assert (len(RULER_OFFLINE), len(RULER)) == (11, 13)
    assert tuple(make_tasks(settings())) == RULER_OFFLINE
    assert tuple(make_tasks(settings(documents=str(tmp_path)))) == RULER


def test_a_length_that_cannot_hold_the_examples_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"length must be at least \d+ tokens for the task ruler_vt, got 300"):
        make_samples("ruler_vt", tokenizer, 300, 1)


def test_words_do_not_run_out():
    drawn = list(itertools.islice(words.fresh(words.WORDS, Random(0)), 3 * len(words.names())))
    assert len(set(drawn)) == len(drawn)
    assert set(drawn[: len(words.names())]) == set(words.names())

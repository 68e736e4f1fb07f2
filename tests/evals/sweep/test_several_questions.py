import dataclasses

import pytest
import torch

from kvcompress import DenseCache, H2OCache
from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.protocol import SEVERAL, answer, answer_several
from kvcompress.evals.sweep.samples import RECIPES, Prompt, Turn, make_prompt, make_samples
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.sweep.synthetic import score_turns
from kvcompress.evals.tasks import make_tasks
from tests.evals.sweep.test_protocol import Spy

NEW = 6
ASKING = [name for name, recipe in RECIPES.items() if recipe.asks_several and not recipe.reads_documents]


def tokens(count, generator):
    return tuple(torch.randint(0, 256, (count,), generator=generator).tolist())


def prompts(contexts=(60, 52), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(
            tokens(context, generator),
            tokens(7, generator),
            NEW,
            tuple(Turn(tokens(4 + n, generator), tokens(9 + n, generator), NEW - n) for n in range(2)),
        )
        for context in contexts
    ]


def dense(model):
    return lambda: DenseCache(model)


def h2o(model):
    return lambda: H2OCache(model, budget=20)


def generated(model, ids, limit):
    ids = torch.tensor([ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=9999
    )
    return out[0, ids.shape[1] :].tolist()


# docs: Each question is asked of a copy of the cache
@pytest.mark.parametrize("make", [dense, h2o])
def test_each_request_is_answered_as_if_it_alone_came(model, make):
    asked = prompts()
    found, held = answer_several(model, make(model), asked, "multi-request")
    for number in range(3):
        alone = [
            Prompt(prompt.context, turn.alone, turn.max_new_tokens)
            for prompt in asked
            for turn in (Turn(prompt.question, (), NEW), *prompt.more)[number : number + 1]
        ]
        wanted, same = answer(model, make(model), alone, "question-agnostic")
        assert [each[number] for each in found] == wanted
    assert (held.tokens_kept, held.tokens_seen) == (same.tokens_kept, same.tokens_seen)


def test_requests_share_one_reading_of_the_context(model):
    spy = Spy(model)
    answer_several(spy, h2o(model), prompts(), "multi-request")
    assert [len(rows[0]) for rows in spy.fed if len(rows[0]) > 20] == [60]


# docs: one question after another, in one conversation
def test_a_conversation_goes_on_with_what_was_said(model):
    (prompt,) = prompts((60,))
    (found,), _ = answer_several(model, dense(model), [prompt], "multi-turn", hold_back=3)
    so_far = [*prompt.context, *prompt.question]
    assert found[0] == generated(model, so_far, NEW)
    for said, turn, after in zip(found, prompt.more, found[1:], strict=False):
        so_far += [*said, *turn.following]
        assert after == generated(model, so_far, turn.max_new_tokens)


@pytest.mark.parametrize("early", [False, True])
def test_a_conversation_reads_every_token_once_and_no_stop_token(model, early):
    (prompt,) = prompts((60,))
    stop = answer(model, h2o(model), [prompt], "question-aware")[0][0][2 if early else -1]
    spy = Spy(model)
    stops = frozenset([stop] if early else [])
    (found,), _ = answer_several(spy, h2o(model), [prompt], "multi-turn", stops=stops)
    fed = [token for rows in spy.fed for token in rows[0]]
    wanted = [*prompt.context, *prompt.question, *found[0], *prompt.more[0].following, *found[1]]
    wanted += [*prompt.more[1].following, *found[2]]
    # the last token of the last answer is read only if a stop token came after it
    assert fed in (wanted, wanted[:-1])
    assert len(found[0]) == (2 if early else NEW)


# docs: Conversations go on side by side
@pytest.mark.parametrize("make", [dense, h2o])
def test_conversations_side_by_side_are_answered_as_each_alone(model, make):
    asked = [
        dataclasses.replace(prompt, max_new_tokens=NEW - 2 * row) for row, prompt in enumerate(prompts((60, 52, 57)))
    ]
    said = [answer(model, make(model), [prompt], "question-aware")[0][0] for prompt in asked]
    # one ends by a stop token, others by their limits
    stops = frozenset([said[0][1]])
    assert [len(each) for each in said] == [NEW, NEW - 2, NEW - 4]
    found, _ = answer_several(model, make(model), asked, "multi-turn", stops=stops)
    alone = [answer_several(model, make(model), [prompt], "multi-turn", stops=stops)[0][0] for prompt in asked]
    assert found == alone
    assert len({len(each[0]) for each in found}) == 3


def test_the_first_turn_is_question_aware_and_later_ones_ask_what_is_left(model):
    (prompt,) = prompts((80,), seed=5)
    (found,), held = answer_several(model, h2o(model), [prompt], "multi-turn", hold_back=2)
    (wanted,), same = answer(model, h2o(model), [prompt], "question-aware", hold_back=2)
    assert found[0] == wanted
    assert held == same
    (full,), _ = answer_several(model, dense(model), [prompt], "multi-turn", hold_back=2)
    assert found[1:] != full[1:]


@pytest.mark.parametrize(
    ("asked", "protocol", "message"),
    [
        (prompts()[:1], "question-aware", "protocol must be one of multi-turn, multi-request, got 'question-aware'"),
        (
            [prompts()[0], Prompt((1, 2), (3,), 2)],
            "multi-request",
            "as many questions each; got 2 prompts with 1, 3 questions",
        ),
    ],
)
def test_mistakes_are_named(model, asked, protocol, message):
    with pytest.raises(ValueError, match=message):
        answer_several(model, dense(model), asked, protocol)


def test_later_questions_are_the_next_messages_of_the_template(tokenizer):
    (sample,) = make_samples("kv", tokenizer, 600, 1, questions=3)
    prompt = make_prompt(tokenizer, sample)
    for question, turn in zip(sample.more, prompt.more, strict=True):
        ending = "</user><assistant>" + question.answer_prefix
        assert tokenizer.decode(turn.alone) == question.text + ending
        assert tokenizer.decode(turn.following) == "</assistant><user>" + question.text.lstrip("\n") + ending


def test_without_a_chat_template_questions_follow_on_a_new_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (sample,) = make_samples("kv", tokenizer, 600, 1, questions=2)
    (turn,) = make_prompt(tokenizer, sample).more
    assert tokenizer.decode(turn.following).startswith("\nKey: ")


def test_the_markers_between_turns_are_those_of_the_real_template(smollm2):
    _, tokenizer = smollm2
    (sample,) = make_samples("kv", tokenizer, 600, 1, questions=2)
    prompt = make_prompt(tokenizer, sample)
    said = tokenizer.decode(prompt.more[0].following)
    assert said.startswith("<|im_end|>\n<|im_start|>user\nKey: ")
    assert "<|im_end|>\n<|im_start|>assistant\n" in said


@pytest.mark.parametrize("task", ASKING)
def test_every_question_of_a_context_has_its_own_answer_in_it(task, tokenizer):
    (sample,) = make_samples(task, tokenizer, 3000, 1, seed=2, questions=5)
    questions = sample.questions
    assert len(questions) == 5
    assert len({question.text for question in questions}) == len({q.answers for q in questions}) == 5
    for question in questions:
        assert len(question.answers) == 1
        assert question.answers[0] in sample.context
        assert not any(answer in question.text + question.answer_prefix for q in questions for answer in q.answers)
        assert question.text not in sample.context
    places = [sample.context.index(question.answers[0]) / len(sample.context) for question in questions]
    assert max(places) - min(places) > 0.2
    assert len(make_prompt(tokenizer, sample).context) <= 3000
    assert make_samples(task, tokenizer, 3000, 1, seed=2, questions=5) == [sample]


def settings(**change):
    small = {
        "methods": ("h2o",),
        "budgets": (0.2,),
        "tasks": ("kv",),
        "lengths": (700,),
        "samples": 3,
        "protocols": SEVERAL,
        "turns": 3,
    }
    return Settings(**(small | change))


@pytest.fixture
def sweep(model, tokenizer, tmp_path):
    def make(**change):
        asked = settings(**change)
        return Sweep(asked, make_tasks(asked), model, tokenizer, tmp_path)

    return make


# docs: the score is the mean over the questions
def test_rows_have_a_score_per_turn(sweep):
    for row in sweep().run():
        assert row["status"] == "ok", row["error"]
        assert row["turns"] == 3
        assert len(row["turn_scores"]) == 3
        assert [len(said) for said in row["predictions"]] == [len(said) for said in row["answers"]] == [3] * 3
        assert row["compressed"] == (row["budget"] is not None)


def test_the_score_of_a_conversation_is_that_of_the_turns_after_the_first(tokenizer):
    made = make_samples("kv", tokenizer, 700, 2, questions=3)
    right = [[list(tokenizer.encode(question.answers[0])) for question in sample.questions] for sample in made]
    wrong = [right[0], [right[1][0], [], right[1][2]]]
    scores, said = score_turns(tokenizer, made, wrong, slice(1, None))
    assert scores["turn_scores"] == [1.0, 0.5, 1.0]
    assert said["scores"] == [1.0, 0.5]
    assert scores["score"] == 0.75
    assert score_turns(tokenizer, made, wrong, slice(None))[0]["score"] == pytest.approx(5 / 6)


def test_a_sweep_scores_conversations_from_their_second_turn_on(sweep, monkeypatch):
    asked = []

    def spy(tokenizer, samples, answers, counted, real=score_turns):
        asked.append(range(3)[counted])
        return real(tokenizer, samples, answers, counted)

    monkeypatch.setattr("kvcompress.evals.sweep.synthetic.score_turns", spy)
    work = sweep(methods=("none",))
    for point in work.points[:: len(work.points) // 2]:
        work.measure(point)
    assert asked == [range(1, 3), range(3)]


def test_how_many_turns_there_are_decides_only_points_that_have_several(sweep):
    protocols = ("question-aware", *SEVERAL)
    three, four = ([sweep(turns=turns, protocols=protocols).key(p) for p in sweep(protocols=protocols).points]
                   for turns in (3, 4))  # fmt: skip
    same = [one == other for one, other in zip(three, four, strict=True)]
    assert same == [True] * 3 + [False] * 6


@pytest.mark.parametrize("protocol", SEVERAL)
@pytest.mark.parametrize("task", ["passkey", "ruler_vt"])
def test_a_task_of_one_question_is_left_out_of_them_and_refuses_them_alone(task, protocol):
    beside = settings(tasks=(task,), protocols=("question-aware", protocol))
    assert {point.protocol for point in make_tasks(beside)[task].points()} == {"question-aware"}
    asked = settings(tasks=(task,), protocols=(protocol,))
    with pytest.raises(ValueError, match=f"{protocol} asks several questions of one context, and the task {task} has"):
        make_tasks(asked)[task].points()


def test_samples_of_one_question_cannot_be_made_with_more(tokenizer):
    with pytest.raises(ValueError, match="the task passkey asks one question of a context, got 2; multikey, kv"):
        make_samples("passkey", tokenizer, 700, 1, questions=2)


def test_a_single_turn_is_refused():
    with pytest.raises(ValueError, match="turns must be at least 2, got 1"):
        settings(turns=1)

import re

import pytest
import torch

from kvcompress import DenseCache, StreamingLLMCache
from kvcompress.evals.sweep.forced import pieces, score_forced
from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.protocol import force
from kvcompress.evals.sweep.recipes.state_tracking import transcript
from kvcompress.evals.sweep.samples import make_prompt, make_samples, score
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks
from tests.evals.sweep.test_protocol import Spy, prompts


def made(tokenizer, length=1200, samples=1, **more):
    return make_samples("state_tracking", tokenizer, length, samples, **more)


def test_the_lines_are_what_the_steps_make_of_the_counters(tokenizer):
    (sample,) = made(tokenizer)
    start = re.search(r"^Start: A=(\d) B=(\d) C=(\d) D=(\d)$", sample.context, re.MULTILINE)
    state = dict(zip("ABCD", start.groups(), strict=True))
    steps = re.findall(r"^Step (\d+): set ([ABCD]) to (\d)\.$", sample.context, re.MULTILINE)
    assert len(steps) >= len(sample.answers) > 20
    for (number, counter, value), line in zip(steps, sample.answers, strict=False):
        assert state[counter] != value
        state[counter] = value
        after = " ".join(f"{name}={digit}" for name, digit in state.items())
        assert line == f"Step {number}: set {counter} to {value}. {after}"
    assert f"from step 1 to step {len(sample.answers)}, one line per step" in sample.question
    assert sample.answer_prefix == f"{start[0]}\nStep 1:"
    assert not any(line in sample.context + sample.question for line in sample.answers)


def test_a_sample_depends_on_its_seed_alone(tokenizer):
    assert made(tokenizer, samples=2, seed=1) == made(tokenizer, samples=2, seed=1)
    assert len({sample.answers for seed in (1, 2) for sample in made(tokenizer, samples=2, seed=seed)}) == 4


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_contexts_fill_the_length_and_never_exceed_it(length, smollm2):
    for sample in made(smollm2[1], length, 2):
        assert length - 14 < len(make_prompt(smollm2[1], sample).context) <= length


@pytest.mark.parametrize("most", [300, 2048, 5000])
def test_the_right_answer_takes_at_most_as_many_tokens_as_asked(most, smollm2):
    (sample,) = made(smollm2[1], 4096, transcript=most)
    tokens = len(smollm2[1].encode("\n".join(sample.answers)))
    assert most - 50 < tokens <= sample.max_new_tokens <= most


# docs: The score is the share of right lines
def test_score_is_the_share_of_right_lines(tokenizer):
    (sample,) = made(tokenizer, transcript=300)
    lines = list(sample.answers)
    assert 4 < len(lines) < 10
    right = "\n".join(lines).removeprefix("Step 1:")
    assert score(sample, right) == 1.0
    assert score(sample, right + "\nStep 99: set A to 1. A=1 B=1 C=1 D=1\n") == 1.0
    wrong = right.replace(lines[2], lines[1])
    assert score(sample, wrong) == pytest.approx(1 - 1 / len(lines))
    # what is right but in another line is wrong
    assert score(sample, "\n" + right) < 0.5
    assert score(sample, "") == 0.0


def test_a_transcript_that_holds_no_line_is_refused(tokenizer):
    with pytest.raises(ValueError, match="transcript must be at least 44 tokens, which one line takes, got 10"):
        made(tokenizer, transcript=10)


def test_the_transcript_is_the_right_answer_and_knows_steps_from_states(tokenizer):
    (sample,) = made(tokenizer, transcript=200)
    found = transcript(sample)
    assert sample.answer_prefix.splitlines()[-1] + "".join(text for text, _ in found) == "\n".join(sample.answers)
    for number, line in enumerate(sample.answers):
        counter, value = re.search(r"set (\w) to (\d)\.", line).groups()
        scored = [piece for piece in found if piece[1]][6 * number : 6 * number + 6]
        assert scored[:2] == [(f" {counter}", "step"), (value, "step")]
        assert scored[2:] == [(digit, "state") for digit in re.findall(r"=(\d)", line)]


def given(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def test_a_full_cache_predicts_as_one_forward_over_everything(model):
    asked, answers = prompts(), given((9, 5, 12))
    predicted, _ = force(model, lambda: DenseCache(model), asked, answers, "question-agnostic")
    for prompt, answer, said in zip(asked, answers, predicted, strict=True):
        ids = torch.tensor([[*prompt.context, *prompt.question, *answer]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        before = len(prompt.context) + len(prompt.question)
        assert said == logits[before - 1 : before - 1 + len(answer)].argmax(-1).tolist()


def test_the_answer_is_fed_one_token_at_a_time_through_what_is_left(model):
    (prompt,), (answer,) = prompts(((60, 9),)), given((7,))
    spy = Spy(model)
    few = force(spy, lambda: StreamingLLMCache(model, budget=8), [prompt], [answer], "question-aware", hold_back=2)
    assert [len(rows[0]) for rows in spy.fed] == [67, 2, *[1] * 6]
    assert [rows[0][0] for rows in spy.fed[2:]] == answer[:-1]
    full = force(model, lambda: DenseCache(model), [prompt], [answer], "question-aware", hold_back=2)
    assert few[0] != full[0]
    assert few[1].tokens_kept == 8


def test_the_forced_score_counts_steps_and_states_only(tokenizer):
    (sample,) = made(tokenizer, transcript=200)
    kinds = [kind for _, kind in pieces(tokenizer, sample)]
    right = [token for token, _ in pieces(tokenizer, sample)]
    said = [token if kind == "state" else 0 for token, kind in zip(right, kinds, strict=True)]
    scores, more = score_forced(tokenizer, [sample, sample], [right, said])
    # a space is a token of a step, in bytes
    steps, states = 3, 4
    wanted = (1 + states / (steps + states)) / 2
    assert more["scores"] == [1.0, pytest.approx(states / (steps + states))]
    assert (scores["score"], scores["step_score"], scores["state_score"]) == (pytest.approx(wanted), 0.5, 1.0)
    assert more["transcript_tokens"] == [len(right)] * 2


def settings(**change):
    tasks = ("state_tracking", "state_tracking_forced")
    return Settings(("h2o",), (0.3,), tasks, (600,), 2, transcript=100, protocols=("question-agnostic",), **change)


def test_rows_say_what_was_right(model, tokenizer, tmp_path):
    work = Sweep(settings(), make_tasks(settings()), model, tokenizer, tmp_path)
    work.check_tasks()
    rows = work.run()
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    assert {row["metric"] for row in rows} == {"lines right", "steps predicted"}
    for row in rows:
        assert row["transcript"] == 100
        assert 0.0 <= row["score"] <= 1.0
        assert row["compressed"] == (row["budget"] is not None)


@pytest.mark.slow
def test_the_real_model_predicts_more_with_everything_than_with_sinks_and_recent(smollm2):
    model, tokenizer = smollm2
    (sample,) = make_samples("state_tracking_forced", tokenizer, 300, 1, transcript=120)
    prompt, answer = make_prompt(tokenizer, sample), [token for token, _ in pieces(tokenizer, sample)]
    full, few = (
        score_forced(tokenizer, [sample], force(model, make, [prompt], [answer], "question-aware")[0])[0]
        for make in (lambda: DenseCache(model), lambda: StreamingLLMCache(model, budget=60))
    )
    assert full["score"] > few["score"]
    assert full["step_score"] > 0.5 + few["step_score"] / 2

"""A peer gets the prompts of a sweep, and its answers become rows that stand beside those of the sweep."""

import json

import pytest

from kvcompress.evals.peers import exchange
from kvcompress.evals.peers.exchange import read_rows, write_prompts
from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.rows import read_rows as read_folder
from kvcompress.evals.sweep.samples import make_prompt, make_samples
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks

SETTINGS = Settings(("none",), (1.0,), ("passkey", "needle"), (700,), 2)
CELLS = [(task, protocol) for task in SETTINGS.tasks for protocol in SETTINGS.protocols]


@pytest.fixture
def sweep(model, tokenizer, tmp_path):
    return Sweep(SETTINGS, make_tasks(SETTINGS), model, tokenizer, tmp_path)


@pytest.fixture
def prompts(sweep, tmp_path):
    write_prompts(sweep, tmp_path / "prompts")
    return [json.loads(line) for line in (tmp_path / "prompts" / "prompts.jsonl").read_text().splitlines()]


def answered(tmp_path, prompts, says, **change):
    """A file in which a peer says something to each prompt."""
    path = tmp_path / "answers.jsonl"
    rows = [
        {
            "id": prompt["id"],
            "press": "tova",
            "budget": 0.5,
            "tokens": says(prompt),
            "bytes": 1000 + 100 * index,
            "bytes_after": 5000,
            "kept": [350, 352],
            "masked": False,
            "seconds": 0.5,
            "where": {"kvpress": "0"},
        }
        | change
        for index, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_the_tokens_that_a_sweep_reads_before_and_after_compression(prompts, tokenizer):
    assert [prompt["id"] for prompt in prompts] == [
        f"{task}/700/{protocol}/{index}" for task, protocol in CELLS for index in range(2)
    ]
    for prompt in prompts:
        task, _, protocol, index = prompt["id"].split("/")
        made = make_prompt(tokenizer, make_samples(task, tokenizer, 700, 2)[int(index)])
        assert tuple(prompt["first"] + prompt["last"]) == made.context + made.question
        assert len(prompt["last"]) == (1 if protocol == "question-aware" else len(made.question))
        assert prompt["max_new_tokens"] == made.max_new_tokens


def test_answers_are_scored_as_the_sweep_scores_its_own(sweep, prompts, tmp_path, tokenizer):
    samples = {task: make_samples(task, tokenizer, 700, 2) for task in SETTINGS.tasks}

    def says(prompt):
        # the first of each pair is right
        task, _, _, index = prompt["id"].split("/")
        return tokenizer.encode(samples[task][0].answers[0] if index == "0" else "no", add_special_tokens=False)

    rows = read_rows(sweep, answered(tmp_path, prompts, says))
    assert [(row["task"], row["protocol"]) for row in rows] == CELLS
    for place, row in enumerate(rows):
        assert (row["method"], row["budget"], row["length"], row["samples"]) == ("kvpress-tova", 0.5, 700, 2)
        assert row["scores"] == [1.0, 0.0]
        assert row["score"] == 0.5
        # of two prompts one after the other
        assert row["bytes"] == 1050 + 200 * place
        assert (row["bytes_after"], row["tokens_kept"]) == (5000, 351)
        assert row["ratio"] == pytest.approx(row["bytes"] / row["full_bytes"], abs=1e-5)
        assert row["compressed"]
    assert len({row["key"] for row in rows}) == len(rows)


def test_full_bytes_are_those_that_our_full_cache_holds(sweep, prompts, tmp_path):
    row = read_rows(sweep, answered(tmp_path, prompts, lambda prompt: [5]))[0]
    own = next(point for point in sweep.points if (point.task, point.protocol) == CELLS[0] and point.method == "none")
    assert row["full_bytes"] == sweep.measure(own)["full_bytes"]


def test_a_peer_that_left_samples_out_is_refused(sweep, prompts, tmp_path):
    path = answered(tmp_path, prompts[1:], lambda prompt: [5])
    with pytest.raises(ValueError, match=r"answers 1 of the 2 samples of passkey 700 question-agnostic by tova at 0.5"):
        read_rows(sweep, path)


def test_a_peer_is_asked_one_question_of_a_context(model, tokenizer, tmp_path):
    asked = Settings(("none",), (1.0,), ("kv",), (700,), 1, ("multi-request",))
    with pytest.raises(ValueError, match="multi-request asks several questions .* the task kv of a peer has only one"):
        write_prompts(Sweep(asked, make_tasks(asked), model, tokenizer, tmp_path), tmp_path)


# docs: compare with kvpress on the same prompts
def test_a_peer_is_asked_about_documents_too(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "load_model", lambda name: (model, tokenizer))
    lines = [
        {"context": f"Stone {n} is grey.", "question": f"What is stone {n}?", "answers": ["grey"]} for n in range(3)
    ]
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    exchange.prompts(
        out,
        tasks="ruler_vt,ruler_qa_1",
        lengths="3000",
        samples=1,
        protocols="question-agnostic",
        documents=str(documents),
    )
    asked = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [prompt["id"].split("/")[0] for prompt in asked] == ["ruler_vt", "ruler_qa_1"]
    answers = answered(tmp_path, asked, lambda prompt: [5])
    exchange.rows(out, answers, tmp_path / "sweep")
    assert {row["task"] for row in read_folder(tmp_path / "sweep").values()} == {"ruler_vt", "ruler_qa_1"}


def test_answers_to_other_prompts_are_refused(sweep, prompts, tmp_path):
    prompts[0]["id"] = "passkey/900/question-agnostic/0"
    with pytest.raises(ValueError, match=r"answers 1 of the 2|1 answers .* to no prompt"):
        read_rows(sweep, answered(tmp_path, prompts, lambda prompt: [5]))
    extra = [dict(prompts[-1], id="needle/900/question-aware/0")]
    with pytest.raises(ValueError, match=r"1 answers in .* belong to no prompt of these settings"):
        read_rows(sweep, answered(tmp_path, prompts[2:] + extra, lambda prompt: [5]))
    with pytest.raises(ValueError, match=r"has two answers to needle/.* by tova at 0.5"):
        read_rows(sweep, answered(tmp_path, prompts[-1:] * 2, lambda prompt: [5]))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no answers"), ("{", "answers.jsonl:1 is not JSON"), ('\n{"id": 1}', ":1 is not JSON"),
     ('{"id": "a"}', "answers.jsonl:1 must be an answer with budget, bytes")],
)  # fmt: skip
def test_what_is_no_answer_is_named(sweep, tmp_path, text, message):
    (tmp_path / "answers.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(sweep, tmp_path / "answers.jsonl")

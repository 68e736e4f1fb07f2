"""lm-eval's tasks in a sweep: the harness's own scores, measured bytes, keys that hang on the prompts."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvcompress import cli
from kvcompress.evals.lm import harness
from kvcompress.evals.lm.harness import TASKS, find_manager
from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks

pytestmark = pytest.mark.usefixtures("no_description")

WORDS = ["red", "green", "blue", "black", "white", "amber", "coral", "ivory"]


def write(place, first=0):
    place.mkdir()
    rows = []
    for number in range(first, first + 12):
        words = [WORDS[(number * step) % 8] for step in (1, 2, 3)]
        query = f"Question: {' '.join(words)} {number}?\n"
        rows.append({"query": query, "choices": [words[0] + ".", words[2] + " too."], "gold": number % 2})
    (place / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "wiki.test.raw").write_text(" \n = Fish = \n \n" + "Fish swim in water . " * 20)
    (place / "lambada.jsonl").write_text(json.dumps({"context": "Question: red blue", "continuation": "red"}))
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "one")


@pytest.fixture
def settings(data):
    def make(**change):
        small = {
            "methods": ("h2o",),
            "budgets": (0.2,),
            "tasks": ("local_piqa",),
            "lengths": (700,),
            "samples": 1,
            "num_fewshot": 2,
            "limit": 5,
            "metadata": {"data": str(data)},
        }
        return Settings(**(small | change))

    return make


@pytest.fixture
def sweep(settings, model, tokenizer, tmp_path):

    def make(**change):
        asked = settings(**change)
        return Sweep(asked, make_tasks(asked), model, tokenizer, tmp_path)

    return make


# docs: `kvcompress sweep` runs its own tasks and those of lm-eval
def test_a_sweep_measures_them_beside_its_own(sweep, model, tokenizer, data):
    rows = sweep(tasks=("passkey", "local_piqa"), protocols=("question-aware",)).run()
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert [(row["task"], row["length"]) for row in rows[::3]] == [("passkey", 700), ("local_piqa", None)]
    full, h2o, floor = rows[3:]
    assert (full["method"], h2o["method"], floor["method"]) == ("none", "h2o", "streaming")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(data)})
    stock = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["local_piqa"],
        num_fewshot=2,
        limit=5,
        task_manager=manager,
        bootstrap_iters=10,
    )["results"]["local_piqa"]
    assert full["metric"] == "acc"
    assert full["score"] == stock["acc,none"]
    assert full["stderr"] == pytest.approx(stock["acc_stderr,none"])
    assert full["metrics"] == {"acc,none": stock["acc,none"], "acc_norm,none": stock["acc_norm,none"]}
    assert full["ratio"] == pytest.approx(1.0, abs=0.05)  # but for the padding of a batch
    for row in (h2o, floor):
        assert row["samples"] == len(row["scores"]) == 5
        assert row["tokens_kept"] <= 0.2 * row["tokens_seen"] + 1
        assert row["bytes"] < 0.4 * row["full_bytes"]
        assert row["bytes"] == pytest.approx(sum(row["by_component"].values()), abs=5)


def test_a_sweep_does_not_ask_pip_and_compilers_about_the_machine_at_each_point(sweep, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: pytest.fail("it was asked for"))
    rows = sweep(protocols=("question-aware",), methods=("none",), limit=1, num_fewshot=0).run()
    assert {row["status"] for row in rows} == {"ok"}


def test_the_question_is_compressed_or_not_as_the_protocol_says(sweep):
    def seen(**change):
        rows = sweep(limit=1, methods=("none", "streaming"), **change).run()
        return {row["protocol"]: row["tokens_seen"] for row in rows if row["method"] == "none"}, rows

    found, rows = seen()
    last = "\n\nQuestion: red red red 0?\nAnswer:"
    # a token a byte; the two choices of one context are read once
    assert found["question-aware"] - found["question-agnostic"] == len(last) - 1
    assert {row["hold_back"] for row in rows} == {1, "\n\n"}
    named, rows = seen(question="Answer:", num_fewshot=0)
    assert named["question-aware"] - named["question-agnostic"] == len("Answer:") - 1
    assert {row["hold_back"] for row in rows} == {1, "Answer:"}


def test_done_points_are_not_measured_again_wherever_the_same_data_lies(sweep, tmp_path):
    rows = sweep(protocols=("question-aware",)).run()
    again = sweep(protocols=("question-aware",), metadata={"data": str(write(tmp_path / "copy"))})
    assert again.missing() == []
    assert again.run() == rows


@pytest.mark.parametrize(
    "change", [{"limit": 4}, {"num_fewshot": 1}, {"hold_back": 2}, {"question": "Answer:"}], ids=str
)
def test_other_prompts_or_another_reading_are_other_points(sweep, change):
    before, after = sweep(), sweep(**change)
    assert len(before.points) == len(after.points) == 6
    keys = {before.key(point) for point in before.points} & {after.key(point) for point in after.points}
    # what the one protocol holds back does not concern the other
    assert len(keys) == (3 if set(change) & {"hold_back", "question"} else 0)


def test_other_data_are_other_points(sweep, tmp_path):
    before, after = sweep(), sweep(metadata={"data": str(write(tmp_path / "other", first=20))})
    assert not {before.key(point) for point in before.points} & {after.key(point) for point in after.points}


def test_rolling_likelihoods_have_no_question_and_a_share_of_their_text_as_budget(sweep):
    work = sweep(tasks=("local_wikitext",), num_fewshot=None, limit=1)
    assert {point.protocol for point in work.points} == {"continuation"}
    full, h2o, floor = work.run()
    assert full["metric"] == "word_perplexity"
    assert not full["higher_is_better"]
    assert full["stderr"] is None
    assert h2o["score"] != full["score"]
    for row in (h2o, floor):
        assert row["tokens_kept"] == pytest.approx(0.2 * row["tokens_seen"], abs=1)
        assert row["bytes"] < row["full_bytes"]


def test_contexts_of_which_nothing_is_left_to_compress_are_a_failure(sweep):
    rows = sweep(tasks=("local_lambada",), num_fewshot=0, question="Question:", protocols=("question-agnostic",)).run()
    assert [row["status"] for row in rows] == ["failed"] * 3
    assert "nothing of local_lambada's contexts was left to compress after holding back 'Question:'" in rows[0]["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_fewshot": 0}, "nothing marks where a question of local_piqa begins: ask for examples"),
        ({"metadata": {}}, "lm-eval cannot load the task local_piqa: ValueError: local_piqa needs a folder with data"),
        ({"limit": 0}, "limit must be at least 1 and num_fewshot at least 0, got 0 and 2"),
        ({"num_fewshot": -1}, "limit must be at least 1 and num_fewshot at least 0, got 5 and -1"),
    ],
)
def test_mistakes_are_named(settings, change, message):
    with pytest.raises(ValueError, match=message):
        [task.points() for task in make_tasks(settings(**change)).values()]


def test_a_group_stands_for_its_members_and_a_name_nobody_knows_is_refused(settings, few_tasks):
    with pytest.raises(
        ValueError,
        match="unknown task 'needles'; did you mean needle[?] known: .*text, local_arc_challenge, .*own",
    ):
        make_tasks(settings(tasks=("needles",)))
    assert list(make_tasks(settings(tasks=("passkey", "ai2_arc", "arc_easy")))) == [
        "passkey",
        "arc_challenge",
        "arc_easy",
    ]
    with pytest.raises(ValueError, match="ai2_arc is a group of lm-eval's tasks, not one of them"):
        find_manager("ai2_arc", "{}")


def test_groups_within_groups_are_taken_apart(monkeypatch):
    entries = {
        "all": SimpleNamespace(cfg={"task": ["some", "c"]}, tags=set()),
        "some": SimpleNamespace(cfg={"task": ["a", "b", "c"]}, tags=set()),
        "odd": SimpleNamespace(cfg={"task": [{"task": "a", "num_fewshot": 2}]}, tags=set()),
        **{name: SimpleNamespace(cfg={}, tags=set()) for name in "abc"},
    }
    manager = SimpleNamespace(task_index=entries, all_subtasks=["a", "b", "c"], all_tags=[])
    monkeypatch.setattr(harness, "_manager", lambda defaults, metadata: manager)
    assert harness.members("all", "{}") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="odd is a group of lm-eval's whose members cannot be told apart by name"):
        harness.members("odd", "{}")


def test_the_harness_is_imported_for_its_tasks_alone(fresh):
    code = (
        "import sys, kvcompress.cli, kvcompress.evals.sweep.sweep, kvcompress.evals.sweep.report\n"
        "from kvcompress.evals.sweep.points import Settings\nfrom kvcompress.evals.tasks import make_tasks\n"
        "for tasks in (('passkey', 'text'), ('local_piqa',)):\n"
        "    make_tasks(Settings(('h2o',), (0.2,), tasks, (700,), 1))\n"
        "    print('lm_eval' in sys.modules)"
    )
    ran = fresh(code)
    assert ran.stdout.split() == ["False", "True"], ran.stderr


def test_the_command_line_asks_for_them(folder, data, tmp_path, capsys):
    arguments = ["--model", str(folder), "--device", "cpu", "--out", str(tmp_path / "out"), "--methods", "h2o"]
    asked = ["--tasks", "local_piqa", "--num-fewshot", "2", "--limit", "3", "--budgets", "0.2", "--question", "Answer:"]
    more = ["--metadata", json.dumps({"data": str(data)})]
    assert cli.main(["sweep", *arguments, *asked, *more]) == 0
    assert "local_piqa" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["status"], row["samples"], row["num_fewshot"]) for row in rows] == [("ok", 3, 2)] * 6
    assert cli.main(["sweep", *arguments, "--tasks", "local_piqa", "--metadata", "[1]"]) == 2
    assert "--metadata must be a JSON object" in capsys.readouterr().err

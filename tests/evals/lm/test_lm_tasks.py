"""The task files for data of one's own: every one loads its layout, and asks what it should."""

import gzip
import json

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from kvcompress.evals.lm import harness
from kvcompress.evals.lm import model as lm
from kvcompress.evals.lm.tasks import local

pytestmark = pytest.mark.usefixtures("no_description")

CHOICE = {"query": "Question: Where do fish swim?\n", "choices": ["in water.", "in sand."], "gold": 0}
ROWS = {
    "piqa": CHOICE,
    "arc_easy": CHOICE,
    "arc_challenge": CHOICE,
    "openbook_qa": CHOICE | {"query": "Fish swim"},
    "copa": CHOICE | {"query": "The fish was thirsty, therefore it swam"},
    "boolq": {"query": "Passage: Fish swim.\nQuestion: do fish swim?\n", "choices": ["no", "yes"], "gold": 1},
    "winogrande": {
        "context_options": ["Ann met Eve, and Ann", "Ann met Eve, and Eve"],
        "continuation": "smiled.",
        "gold": 1,
    },
    "lambada_openai": {"context": "She gave the fish some", "continuation": "water"},
    "gsm8k": {"question": "How many fish are 2 and 3 fish?", "answer": "2 + 3 = 5\n#### 5"},
}
WIKI = " \n = Fish = \n \n Fish swim . \n = = Kinds = = \n Many . \n = Sand = \n \n Sand does not swim . \n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    for index, (name, row) in enumerate(ROWS.items()):
        # examples are never the question itself
        lines = "\n".join(json.dumps(row | {"number": number}) for number in range(4)) + "\n"
        if index % 2:
            (place / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (place / f"{name}.jsonl").write_text(lines)
    (place / "deeper").mkdir()
    (place / "deeper" / "wiki.test.raw").write_text(WIKI)
    return place


@pytest.fixture(scope="module")
def run(folder, data):
    model = lm.CompressedLM(pretrained=str(folder), device="cpu", cache="streaming", budget=0.5, batch_size=4)

    def run(*tasks, shots=0, **metadata):
        manager = TaskManager(
            include_path=str(harness.TASKS),
            include_defaults=False,
            metadata={"data": str(data), "pretrained": str(folder), **metadata},
        )
        return simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, num_fewshot=shots, bootstrap_iters=0, log_samples=True
        )

    return run


def prompts(found, task):
    return [sample["arguments"][0] for sample in found["samples"][task]]


def test_every_task_file_is_tested_here():
    tasks = {path.stem for path in harness.TASKS.glob("*.yaml")}
    same = {f"{name}_same_shots" for name in ("piqa", "arc_easy", "openbookqa")}
    assert tasks == {*local._FILES, *same, "needle", "kv", "variables"}


@pytest.mark.parametrize("task", ["piqa", "arc_easy", "openbookqa"])
def test_the_same_examples_stand_before_every_question(run, tmp_path, task):
    stem = local._FILES[task][0]
    rows = [ROWS[stem] | {"query": f"Question: {number}?"} for number in range(35)]
    (tmp_path / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = f"local_{task}_same_shots"
    asked = prompts(run(name, shots=2, data=str(tmp_path)), name)
    heads = {prompt[: prompt.rfind("Question:")] for prompt, *_ in asked}
    assert len(asked) == 3
    assert len(heads) == 1
    assert "Question: 3?" in heads.pop()
    (tmp_path / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, rows[:32])))
    with pytest.raises(ValueError, match="needs more than 32 documents, got 32"):
        run(name, shots=2, data=str(tmp_path))


# docs: Without a network, `--tasks local_piqa --metadata
@pytest.mark.parametrize("task", ["piqa", "arc_easy", "arc_challenge", "boolq", "openbookqa", "copa", "winogrande"])
def test_choices_are_asked_with_examples_before_them(run, task):
    name = f"local_{task}"
    found = run(name, shots=2)
    assert 0.0 <= found["results"][name]["acc,none"] <= 1.0
    context, continuation = prompts(found, name)[0]
    assert context.count("Fish") + context.count("fish") + context.count("Ann met") >= 3
    assert continuation.startswith(" ")
    if task in ("piqa", "boolq"):
        assert context.endswith("Answer:")
    if task == "winogrande":
        assert continuation == " smiled."
        assert context.endswith("and Ann")


def test_lambada_asks_for_the_last_word(run):
    found = run("local_lambada")
    assert prompts(found, "local_lambada")[0] == ("She gave the fish some", " water")


def test_gsm8k_reads_the_number_behind_the_marks(run):
    found = run("local_gsm8k", shots=1)
    assert found["results"]["local_gsm8k"]["exact_match,number"] == 0.0
    assert "#### 5" in prompts(found, "local_gsm8k")[0][0]


def test_wikitext_is_read_an_article_at_a_time(run):
    found = run("local_wikitext")
    pages = [sample["doc"]["page"] for sample in found["samples"]["local_wikitext"]]
    assert [page.split(" = ")[1] for page in pages] == ["Fish", "Sand"]
    assert found["results"]["local_wikitext"]["word_perplexity,none"] > 1


def test_needles_are_made_as_long_as_asked(run):
    found = run("local_needle", length=700, samples=3)
    texts = [sample["arguments"][0][0] for sample in found["samples"]["local_needle"]]
    assert len(texts) == 3
    assert all(600 < len(text) < 900 for text in texts)
    assert all("\nWhat is the special magic number" in text for text in texts)
    assert found["results"]["local_needle"]["found,none"] == 0.0


def test_an_answer_counts_where_it_is_found():
    document = {"answers": ["12", "Ann"]}
    assert local.found(document, ["it was ANN"]) == {"found": 0.5}
    assert local.found(document, ["12 for Ann"]) == {"found": 1.0}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="local_piqa needs a folder with data"):
        local.piqa()
    with pytest.raises(ValueError, match=r"no file for local_gsm8k below .*expected one of gsm8k.jsonl, "):
        local.gsm8k(data=str(tmp_path))
    (tmp_path / "test.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="no file for local_gsm8k"):
        local.gsm8k(data=str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(ROWS["gsm8k"]))
    assert local.gsm8k(data=str(tmp_path))["test"][0]["answer"].endswith("5")

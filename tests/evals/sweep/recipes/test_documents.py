import json
import re

import pytest

from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.recipes.documents import read_documents
from kvcompress.evals.sweep.samples import make_prompt, make_samples, score
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
# articles of three paragraphs with six questions each, one of which has no answer
SQUAD = {
    "data": [
        {
            "title": f"Town {town}",
            "paragraphs": [
                {
                    "context": f"In town {town} the street number {street} has a tower of {town}{street} metres.",
                    "qas": [
                        {
                            "question": f"How high is tower {number} in street {street} of town {town}?",
                            "answers": [{"text": f"{town}{street} metres"}, {"text": f"{town}{street}"}],
                            "is_impossible": False,
                        }
                        for number in range(5)
                    ]
                    + [{"question": "Who knows?", "answers": [], "is_impossible": True}],
                }
                for street in range(3)
            ],
        }
        for town in range(10, 14)
    ]
}
HOTPOT = [
    {
        "question": f"Which river is longer than river {n}?",
        "answer": f"River {n}9",
        "context": [[f"River {n}{k}", [f"River {n}{k} is long.", " It is wet."]] for k in (1, 9)],
    }
    for n in range(6)
]
LINES = [
    {"context": f"The key of room {n} is {n}{n}{n}.", "question": f"Which key opens {n}?", "answers": [f"{n}{n}{n}"]}
    for n in range(8)
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return tmp_path


def documents(sample):
    head = f"{INSTRUCTION}\n\nThe following are given documents.\n\n"
    assert sample.context.startswith(head)
    return re.split(r"(?:^|\n\n)Document \d+:\n", sample.context.removeprefix(head))[1:]


def test_a_question_is_worded_as_published_and_asked_of_its_own_document_among_others(folder, tokenizer):
    for sample in make_samples("ruler_qa_1", tokenizer, 1000, 4, documents=str(folder)):
        assert sample.question.startswith(f"\n\n{INSTRUCTION}\n\nQuestion: How high is tower")
        assert (sample.answer_prefix, sample.max_new_tokens) == (" Answer:", 32)
        street, town = re.findall(r"street (\d) of town (\d+)", sample.question)[0]
        found = documents(sample)
        own = f"In town {town} the street number {street} has a tower of {town}{street} metres."
        assert own in found
        # then the rest of the article, then others
        assert sum(f"In town {town}" in each for each in found) == 3
        assert len(found) == len(set(found)) > 4
        assert sample.answers == (f"{town}{street} metres", f"{town}{street}")
        assert sample.question.splitlines()[-1] not in sample.context


def test_a_question_about_two_documents_has_both(folder, tokenizer):
    (sample,) = make_samples("ruler_qa_2", tokenizer, 600, 1, documents=str(folder))
    number = re.findall(r"river (\d)\?", sample.question)[0]
    found = documents(sample)
    assert {f"River {number}{k}\nRiver {number}{k} is long. It is wet." for k in (1, 9)} < set(found)


def test_lines_of_json_are_documents_too(folder, tokenizer):
    made = make_samples("ruler_qa_2", tokenizer, 500, 8, documents=str(folder / "lines.jsonl"))
    assert {sample.answers[0] for sample in made} == {f"{n}{n}{n}" for n in range(8)}
    assert all(sample.answers[0] in sample.context for sample in made)


def test_contexts_never_exceed_the_length_and_end_with_the_documents(folder, tokenizer):
    for length in (512, 1024, 4096):
        for sample in make_samples("ruler_qa_1", tokenizer, length, 3, documents=str(folder)):
            tokens = len(make_prompt(tokenizer, sample).context)
            # a document takes some hundred letters
            assert length - 100 < tokens <= length or len(documents(sample)) == 12


def test_samples_depend_on_seed_and_number_and_are_of_different_questions(folder, tokenizer):
    first = make_samples("ruler_qa_1", tokenizer, 800, 6, seed=3, documents=str(folder))
    assert first == make_samples("ruler_qa_1", tokenizer, 800, 6, seed=3, documents=str(folder))
    assert len({sample.question for sample in first}) == 6
    other = make_samples("ruler_qa_1", tokenizer, 800, 6, seed=4, documents=str(folder))
    assert [sample.question for sample in first] != [sample.question for sample in other]


def test_any_of_the_answers_is_right(folder, tokenizer):
    (sample,) = make_samples("ruler_qa_1", tokenizer, 800, 1, documents=str(folder))
    assert score(sample, sample.answers[1]) == 1.0
    assert score(sample, "I do not know") == 0.0


def test_several_questions_share_a_document(folder, tokenizer):
    (sample,) = make_samples("ruler_qa_1", tokenizer, 800, 1, documents=str(folder), questions=5)
    assert len({question.text for question in sample.questions}) == 5
    assert len({re.sub(r"tower \d", "", question.text) for question in sample.questions}) == 1
    with pytest.raises(ValueError, match="ruler_qa_2 must have 5 questions about one document, .* have 1 at most"):
        make_samples("ruler_qa_2", tokenizer, 800, 1, documents=str(folder), questions=5)


def settings(**change):
    return Settings(("h2o",), (0.5,), ("ruler_qa_1",), (800,), 1, **change)


def test_other_documents_are_another_point(folder, model, tokenizer, tmp_path):
    def key(file):
        asked = settings(documents=str(file))
        work = Sweep(asked, make_tasks(asked), model, tokenizer, tmp_path)
        work.check_tasks()
        return work.key(work.points[0])

    assert key(folder) == key(folder / "squad.json")
    assert key(folder) != key(folder / "lines.jsonl")


# docs: Nothing is downloaded
def test_without_a_file_a_sweep_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"ruler_qa_1 needs documents: name a file of .* squad.json \(--documents\)"):
        make_tasks(settings())["ruler_qa_1"].points()
    with pytest.raises(ValueError, match=r"needs documents, and there is no file .*squad.json"):
        make_tasks(settings(documents=str(tmp_path)))["ruler_qa_1"].points()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "must be SQuAD's JSON, HotpotQA's JSON, or lines of JSON with context, question and answers"),
        ('{"question": "Who?"}', r"lines of JSON with context, question and answers \(KeyError: 'answers'\)"),
        ('{"context": "", "question": "Who?", "answers": "me"}', "answers must be a list of at least one text"),
        ("[]", "holds no question that has an answer"),
    ],
)
def test_a_file_of_another_form_is_an_error_that_names_the_forms(tokenizer, tmp_path, text, message):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        make_samples("ruler_qa_1", tokenizer, 800, 1, documents=str(file))


def in_file(tmp_path, text):
    file = tmp_path / "documents.json"
    file.write_text(text, encoding="utf-8")
    read_documents.cache_clear()
    return read_documents(file)


@pytest.mark.parametrize(
    "line",
    [
        {"context": "A town.", "question": "Where?", "answers": ["Here"]},
        {"context": "A town.", "question": "Where?", "answers": {"text": ["Here", "Here"], "answer_start": [1, 1]}},
    ],
    ids=["list", "columns"],
)
def test_answers_may_be_in_columns_and_lines_hold_any_character(tmp_path, line):
    whole = json.dumps(line | {"context": "A\u2028town."}, ensure_ascii=False)
    found = in_file(tmp_path, "\ufeff" + "\n".join([whole, whole]))
    assert [(each.answers, each.documents) for each in found] == [(("Here",), ("A\u2028town.",))] * 2


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"context": "A.", "question": "Q?", "answers": [""]}),
        json.dumps({"context": None, "question": "Q?", "answers": ["A"]}),
        json.dumps({"context": "A.", "question": "Q?", "answers": [None]}),
        json.dumps([{"question": "Q?", "answer": 5, "context": [["T", ["S"]]]}]),
        json.dumps([{"question": "Q?", "answer": "A", "context": []}]),
        "[" * 100_000,
    ],
)
def test_documents_without_text_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="must be SQuAD's JSON, HotpotQA's JSON, or lines of JSON"):
        in_file(tmp_path, text)

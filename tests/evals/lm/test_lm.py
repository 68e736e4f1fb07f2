"""The lm-eval model: without compression it scores as the harness's own, with it only through what is left."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress.cli import main
from kvcompress.evals.lm.model import CompressedLM
from kvcompress.evals.sweep.protocol import NotCompressedError

pytestmark = pytest.mark.usefixtures("no_description")

WORDS = ["red", "green", "blue", "black", "white", "amber", "coral", "ivory", "olive", "pearl"]


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # attention that tells tokens apart
            parameter.data.mul_(12.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return {"pretrained": model, "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task of each kind of request, on local files."""
    place = tmp_path_factory.mktemp("tasks")
    lines = []
    for index in range(6):
        colours = [WORDS[(index * step + step) % 10] for step in range(1, 4)]
        text = " ".join(WORDS[(index + 3 * n) % 10] for n in range(4 + 5 * index))
        lines.append({"text": text, "colours": colours, "gold": index % 3})
    data = place / "colours.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    (place / "choice.yaml").write_text(
        f"task: colours_choice\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{text}}\\nQuestion: which?"\ndoc_to_choice: colours\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc}]\n"
    )
    (place / "rolling.yaml").write_text(
        f"task: colours_rolling\n{common}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: text\nmetric_list: [{metric: word_perplexity}]\n'
    )
    (place / "until.yaml").write_text(
        f"task: colours_until\n{common}output_type: generate_until\n"
        'doc_to_text: "{{text}}\\nQuestion: which?"\ndoc_to_target: text\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n'
    )
    return TaskManager(include_path=str(place), include_defaults=False)


def evaluated(lm, tasks, *names, shots=0):
    return simple_evaluate(
        model=lm, tasks=list(names), task_manager=tasks, num_fewshot=shots, bootstrap_iters=0, log_samples=True
    )


def answers(found, task):
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


# docs: `--cache none` gives lm-eval's own numbers
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("hold_back", [1, 7, "Question:"])
def test_without_compression_likelihoods_are_the_harness_own(loaded, tasks, shots, hold_back):
    ours = CompressedLM(**loaded, cache="none", hold_back=hold_back, batch_size=4, chunk=5)
    stock = HFLM(**loaded, batch_size=4)
    for name in ("colours_choice", "colours_rolling"):
        found, expected = (answers(evaluated(lm, tasks, name, shots=shots), name) for lm in (ours, stock))
        for one, other in zip(found, expected, strict=True):
            flat, wanted = (torch.tensor([float(x) for x in _numbers(part)]) for part in (one, other))
            torch.testing.assert_close(flat, wanted, rtol=1e-5, atol=1e-4)


def _numbers(part):
    if isinstance(part, list | tuple):
        for item in part:
            yield from _numbers(item)
    else:
        yield part


@pytest.mark.parametrize("hold_back", [1, "Question:"])
def test_without_compression_generation_is_the_harness_own(loaded, tasks, hold_back):
    ours = CompressedLM(**loaded, cache="none", hold_back=hold_back, batch_size=4)
    stock = HFLM(**loaded, batch_size=4)
    found, expected = (answers(evaluated(lm, tasks, "colours_until"), "colours_until") for lm in (ours, stock))
    assert found == expected
    assert len({str(answer) for answer in found}) > 1


def test_the_batch_changes_nothing(loaded, tasks):
    found = []
    for size in (1, 4):
        lm = CompressedLM(**loaded, cache="h2o:sinks=1", budget=12, hold_back="Question:", batch_size=size)
        run = evaluated(lm, tasks, "colours_choice", "colours_rolling", "colours_until", shots=1)
        found.append(
            (
                torch.tensor([float(x) for x in _numbers(answers(run, "colours_choice"))]),
                answers(run, "colours_until"),
            )
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-3)
    assert found[0][1] == found[1][1]


# docs: compresses each context before it reads the part held back, and scores with what is left
def test_compression_moves_every_kind_of_score_and_is_written_beside_it(loaded, tasks):
    names = ["colours_choice", "colours_rolling", "colours_until"]
    whole = evaluated(CompressedLM(**loaded, batch_size=4), tasks, *names, shots=1)
    lm = CompressedLM(**loaded, cache="h2o", budget=0.2, hold_back="Question:", batch_size=4, chunk=8)
    found = evaluated(lm, tasks, *names, shots=1)
    for name in names:
        assert answers(found, name) != answers(whole, name), name
    told = found["config"]["kvcompress"]
    assert (told["cache"], told["budget"], told["hold_back"]) == ("h2o", 0.2, "Question:")
    assert told["tokens_kept"] <= 0.2 * told["tokens_seen"] + 1
    assert told["bytes_held"] > 0
    assert told["contexts"] >= 12


def test_a_budget_of_all_tokens_changes_no_score(loaded, tasks):
    found = []
    for settings in ({}, {"cache": "streaming:sinks=1", "budget": 1.0}):
        lm = CompressedLM(**loaded, **settings, hold_back="Question:", batch_size=3, chunk=8)
        run = evaluated(lm, tasks, "colours_choice", "colours_until", shots=1)
        found.append((torch.tensor(list(_numbers(answers(run, "colours_choice")))), answers(run, "colours_until")))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-3)
    assert found[0][1] == found[1][1]


def test_one_letter_answers_see_the_compression_too(loaded):
    """With nothing held back the first token scored comes from the uncompressed prefill."""
    request = [(("", ""), list(range(5, 90)), [7]), (("", ""), list(range(5, 90)), [8])]
    scores = [
        CompressedLM(**loaded, **settings)._loglikelihood_tokens(request, disable_tqdm=True)
        for settings in ({}, {"cache": "streaming:sinks=1", "budget": 4})
    ]
    assert abs(scores[0][0][0] - scores[1][0][0]) > 1e-3


def test_a_context_is_read_once_for_all_of_its_continuations(loaded):
    lm = CompressedLM(**loaded, cache="h2o", budget=20, batch_size=8)
    fed = []
    hook = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(args[0].numel()), with_kwargs=True
    )
    requests = [(("", ""), list(range(5, 90)), [continuation, 3]) for continuation in range(10, 14)]
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    hook.remove()
    # 84 tokens once; then for each continuation the one held back and all of it but its last
    assert sum(fed) == 84 + 4 * 2


def test_examples_are_read_once_for_all_questions_after_them(loaded):
    fed, scores = [], []
    text = "The cat sat on the mat. " * 8
    requests = []
    for question in ("Question: why?", "Question: who sat there, and on what?"):
        requests += [((text + question, ""), loaded["tokenizer"].encode(text + question), own) for own in ([7, 3], [9])]
    for part in (requests, requests[:2], requests[2:]):
        lm = CompressedLM(**loaded, cache="h2o", budget=20, hold_back="Question:", batch_size=3)
        hook = lm.model.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(args[0].shape), with_kwargs=True
        )
        scores.append(lm._loglikelihood_tokens(part, disable_tqdm=True))
        hook.remove()
        assert lm.held()["contexts"] == 1
    shots = len(loaded["tokenizer"].encode(text))
    assert [shape for shape in fed if shape[1] == shots] == [(1, shots)] * 3
    for (got, greedy), (alone, alone_greedy) in zip(scores[0], [*scores[1], *scores[2]], strict=True):
        assert got == pytest.approx(alone, rel=1e-4)
        assert greedy == alone_greedy


def test_too_long_a_context_is_cut_on_the_left_as_the_harness_does(loaded):
    requests = [(("", ""), list(range(5, 200)), [9, 8, 7])]
    found, expected = (
        kind(**loaded, max_length=64)._loglikelihood_tokens(requests, disable_tqdm=True)
        for kind in (CompressedLM, HFLM)
    )
    assert found[0][0] == pytest.approx(expected[0][0], rel=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "h3o"}, "unknown method 'h3o'"),
        ({"cache": "h2o"}, "the cache h2o needs a budget"),
        ({"cache": "h2o", "budget": 8, "hold_back": 0}, "hold_back must be at least 1 token.*got 0"),
        ({"chunk": 0}, "chunk must be at least 1 token, got 0"),
    ],
)
def test_mistakes_are_named(loaded, settings, message):
    with pytest.raises(ValueError, match=message):
        CompressedLM(**loaded, **settings)


def test_a_cache_that_keeps_more_than_its_budget_is_an_error(loaded, monkeypatch):
    from kvcompress import DenseCache
    from kvcompress.evals.lm import model as module

    lm = CompressedLM(**loaded, cache="h2o", budget=10)
    monkeypatch.setattr(module, "build", lambda spec, model, budget: DenseCache(model))
    with pytest.raises(NotCompressedError, match=r"h2o should keep 10.0 of 84.0 tokens, but kept 84.0"):
        lm._loglikelihood_tokens([(("", ""), list(range(5, 90)), [7])], disable_tqdm=True)


# docs: Standard tasks go through lm-eval
# docs: takes lm-eval's other flags
def test_the_command_line_takes_the_flags_of_the_harness(folder, tasks, few_tasks, tmp_path, capsys):
    include = str(next(iter(tasks.include_path)) if isinstance(tasks.include_path, list) else tasks.include_path)
    arguments = ["--model", str(folder), "--cache", "h2o", "--budget", "0.5", "--hold-back", "Question:"]
    harness = ["--tasks", "colours_choice", "--include_path", include, "--device", "cpu", "--batch_size", "2"]
    assert main(["eval", *arguments, *harness, "--limit", "3", "--output_path", str(tmp_path)]) == 0
    assert "colours_choice" in capsys.readouterr().out
    written = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    assert written["results"]["colours_choice"]["acc,none"] >= 0
    assert written["config"]["kvcompress"]["cache"] == "h2o"
    assert written["config"]["kvcompress"]["contexts"] == 3

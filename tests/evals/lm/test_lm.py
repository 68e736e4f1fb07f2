"""The lm-eval model: without compression it scores as the harness's own, with it only through what is left."""

import json
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import EntryPoint

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress.cli import main
from kvcompress.evals.lm import harness
from kvcompress.evals.lm.model import CompressedLM
from kvcompress.evals.sweep.protocol import NotCompressedError
from tests.test_layout import ROOT

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


# docs: compresses each context before it reads the part held back, scores with what is left
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


@pytest.mark.parametrize("name", ["colours_until", "colours_choice"])
def test_a_text_to_hold_back_that_is_in_no_context_is_told(loaded, tasks, name):
    wrong = CompressedLM(**loaded, cache="h2o", budget=20, hold_back="Qestion:", batch_size=4)
    with pytest.warns(UserWarning, match=r"hold_back='Qestion:' occurs in none of the \d+ contexts"):
        evaluated(wrong, tasks, name)
    right = CompressedLM(**loaded, cache="h2o", budget=20, hold_back="Question:", batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "hold_back=")
        evaluated(right, tasks, name)


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
        ({"budget": 0.2}, "the cache none takes no budget: leave it out; got 0.2"),
        ({"cache": "gear:bits=4", "budget": 8}, "the cache gear:bits=4 takes no budget"),
        ({"batch_size": "many"}, "batch_size must be a number of sequences, or auto, got 'many'"),
        ({"batch_size": 0}, "batch_size must be a number of sequences, or auto, got 0"),
        ({"batch_size": "auto", "max_batch_size": 0}, "max_batch_size must be a number of sequences, got 0"),
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


class Short:
    """Memory for so many sequences in a forward, and what was fed."""

    def __init__(self, model, rows):
        self.rows, self.fed = rows, []
        self.hook = model.register_forward_pre_hook(self.feed, with_kwargs=True)

    def feed(self, module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if len(ids) > self.rows:
            raise torch.OutOfMemoryError(f"no room for {len(ids)} rows")
        self.fed.append(len(ids))


# docs: halves that for good whenever a batch runs out of memory
@pytest.mark.parametrize("name", ["colours_choice", "colours_rolling", "colours_until"])
def test_an_automatic_batch_is_halved_until_it_fits_and_changes_nothing(loaded, tasks, name):
    compressed = {"cache": "h2o:sinks=1", "budget": 12, "hold_back": "Question:"}
    # 64, .. 4, 2; requests of a kind that lm-eval itself puts into batches are 6, 3, 1
    fitting = 2 if name == "colours_choice" else 1
    fixed = CompressedLM(**loaded, **compressed, batch_size=fitting)
    automatic = CompressedLM(**loaded, **compressed, batch_size="auto")
    assert automatic.batch_size == 4
    # as on a GPU
    automatic._size = 64
    memory = Short(automatic.model, rows=2)
    try:
        found = evaluated(automatic, tasks, name)
    finally:
        memory.hook.remove()
    assert max(memory.fed) == automatic.batch_size == fitting
    expected = evaluated(fixed, tasks, name)
    if name == "colours_until":
        assert answers(found, name) == answers(expected, name)
    else:
        got, wanted = (torch.tensor([float(x) for x in _numbers(answers(run, name))]) for run in (found, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    # what failed is not counted
    assert automatic.held() == pytest.approx(fixed.held())


def test_a_batch_of_a_given_size_that_does_not_fit_is_an_error(loaded):
    lm = CompressedLM(**loaded, batch_size=4)
    memory = Short(lm.model, rows=2)
    requests = [(("", ""), list(range(5 + index, 90)), [7]) for index in range(4)]
    try:
        with pytest.raises(torch.OutOfMemoryError, match="no room for 4 rows"):
            lm._loglikelihood_tokens(requests, disable_tqdm=True)
        alone = CompressedLM(**loaded, batch_size="auto")
        memory.rows = 0
        with pytest.raises(torch.OutOfMemoryError, match="no room for 1 rows"):
            alone._loglikelihood_tokens(requests, disable_tqdm=True)
    finally:
        memory.hook.remove()


# docs: Where running out cannot be noticed, on a CPU, it is 4
def test_an_automatic_batch_is_four_on_a_cpu(loaded):
    for given, size in (("auto", 4), ("auto:3", 4), ("8", 8), (3, 3)):
        assert CompressedLM(**loaded, batch_size=given).batch_size == size
    assert CompressedLM(**loaded, batch_size="auto", max_batch_size=2).batch_size == 2


# docs: What it held is in `config["kvcompress"]` of the results, for each task
def test_what_each_task_took_is_told_apart(loaded, tasks):
    lm = CompressedLM(**loaded, cache="h2o", budget=10, batch_size=4)
    found = evaluated(lm, tasks, "colours_choice", "colours_until")
    alone = CompressedLM(**loaded, cache="h2o", budget=10, batch_size=4)
    evaluated(alone, tasks, "colours_choice")
    told = found["config"]["kvcompress"]["by_task"]
    assert set(told) == {"colours_choice", "colours_until"}
    assert told["colours_choice"] == pytest.approx(alone.held())
    assert told["colours_choice"]["contexts"] == told["colours_until"]["contexts"] == 6
    assert lm.held()["contexts"] == 12


# docs: Standard tasks go through lm-eval
# docs: Its options have lm-eval's names, in either spelling
# docs: and prints the bytes held beside the scores
@pytest.mark.parametrize("sign", ["_", "-"])
def test_the_command_prints_scores_and_bytes_and_writes_what_the_harness_writes(
    folder, tasks, few_tasks, tmp_path, capsys, monkeypatch, sign
):
    monkeypatch.setenv("COLUMNS", "200")
    include = str(next(iter(tasks.include_path)) if isinstance(tasks.include_path, list) else tasks.include_path)
    arguments = ["--model", str(folder), "--cache", "h2o", "--budget", "0.5", "--hold-back", "Question:"]
    options = ["--tasks", "colours_choice,colours_rol*", "--include_path", include, "--batch_size", "2", "--limit", "3"]
    options += ["--output_path", str(tmp_path), "--log_samples"]
    assert main(["eval", *arguments, *(word.replace("_", sign) if word[:2] == "--" else word for word in options)]) == 0
    out = capsys.readouterr().out
    written = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    found, held = written["results"]["colours_choice"], written["config"]["kvcompress"]
    assert found["acc,none"] >= 0
    assert (held["cache"], held["budget"]) == ("h2o", 0.5)
    assert held["by_task"]["colours_choice"]["contexts"] == 3
    row = next(line.split("│")[1:-1] for line in out.splitlines() if "colours_choice" in line)
    own = held["by_task"]["colours_choice"]
    assert [cell.strip() for cell in row] == [
        "colours_choice", "0", "acc", f"{found['acc,none']:.4f}", f"{found['acc_stderr,none']:.4f}",
        f"{own['tokens_kept']:.1f}", f"{own['tokens_seen']:.1f}", f"{own['bytes_held'] / 2**20:.3g}",
        f"{own['ratio']:.1%}",
    ]  # fmt: skip
    assert "colours_rolling" in out
    assert len(list(tmp_path.rglob("samples_colours_choice*"))) == 1


def test_results_of_a_loaded_model_are_written_under_its_name(loaded, tasks, tmp_path, monkeypatch):
    lm = CompressedLM(**loaded)
    assert lm.name == loaded["pretrained"].name_or_path
    monkeypatch.setattr(loaded["pretrained"], "name_or_path", "")
    assert lm.name == "LlamaForCausalLM"
    harness.run(lm, ["colours_choice"], tasks, tmp_path, True, limit=2)
    assert sorted(file.name.partition("_")[0] for file in (tmp_path / lm.name).iterdir()) == ["results", "samples"]
    # which no folder can be called
    monkeypatch.setattr(CompressedLM, "name", "x" * 999)
    with pytest.raises(OSError, match=f"lm-eval wrote 0 of 2 files of results to {tmp_path}"):
        harness.run(lm, ["colours_choice"], tasks, tmp_path, True, limit=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_easy"], "lm-eval cannot load arc_easy: "),
        (
            ["--tasks", "arc_easy"],
            '--tasks local_arc_easy --metadata \'{"data": "/folder"}\' reads the documents from a',
        ),
        (["--tasks", "local_piqa"], "local_piqa needs a folder with data"),
        (["--tasks", "arc_esy"], "unknown task 'arc_esy'; did you mean arc_easy?"),
        (["--tasks", "arc_easy", "--include_path", "/nowhere"], "there is no folder /nowhere with task files"),
        (["--tasks", ","], "--tasks must name at least one"),
        (["--tasks", "arc_easy", "--batch_sise", "3"], "No such option: --batch-sise (Possible options: --batch-size"),
        (["--tasks", "arc_easy", "--batch_size", "x"], "batch_size must be a number of sequences, or auto, got 'x'"),
        (["--tasks", "arc_easy", "--cache", "h20"], "unknown method 'h20'; did you mean h2o?"),
        (["--tasks", "arc_easy", "--cache", "gear", "--budget", "0.2"], "the cache gear takes no budget"),
        (
            ["--tasks", "arc_easy", "--limit", "1.5"],
            "--limit must be a number of documents, or a share of them below 1",
        ),
        (["--tasks", "arc_easy", "--log_samples"], "--log-samples needs a folder to write them to: --output-path"),
        (["--tasks", "arc_easy", "--model_args", "budget=3"], "the cache none takes no budget"),
        (["--tasks", "arc_easy", "--budget", "3", "--model_args", "budget=3"], "what these set, got budget"),
        (["--tasks", "arc_easy", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--tasks", "arc_easy", "--model", "nobody/nothing"], "cannot load the model nobody/nothing: We couldn't"),
        (["--tasks", "arc_easy", "--fewshot_as_multiturn"], "--fewshot-as-multiturn needs --apply-chat-template"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_an_evaluation_is_one_clear_line_and_status_2(arguments, message, folder, few_tasks, capfd):
    model = [] if "--model" in arguments else ["--model", str(folder)]
    assert main(["eval", *arguments, *model]) == 2
    out, error = capfd.readouterr()
    lines = [line for line in error.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1, error
    assert lines[0].startswith("kvcompress: ")
    assert message in lines[0]
    assert "Traceback" not in out + error


# docs: Without `--device` the model is on a GPU if there is one
@pytest.mark.parametrize(("has_gpu", "device"), [(False, "cpu"), (True, "cuda")])
def test_a_model_is_loaded_onto_a_gpu_only_where_there_is_one(folder, monkeypatch, has_gpu, device):
    class AskedError(Exception):
        pass

    def ask(self, *, device, **settings):
        raise AskedError(device)

    lm = CompressedLM(pretrained=str(folder))
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(HFLM, "__init__", ask)
    for given, wanted in ((None, device), ("cpu", "cpu")):
        with pytest.raises(AskedError, match=f"^{wanted}$"):
            CompressedLM(pretrained=str(folder), device=given)


# docs: Releases of lm-eval after 0.4.13 find it by the entry point group `lm_eval.models`
def test_the_entry_point_for_the_harness_is_the_registered_model():
    (declared,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "lm_eval.models"
    ].items()
    point = EntryPoint(*declared, "lm_eval.models")
    assert point.load() is get_model(point.name) is CompressedLM
    # lm-eval takes the two for one by this
    assert point.value == f"{CompressedLM.__module__}:{CompressedLM.__name__}"


# docs: The same model works in `lm_eval` itself
@pytest.mark.slow
def test_the_harness_own_command_takes_the_model(folder, tasks, tmp_path):
    include = str(next(iter(tasks.include_path)) if isinstance(tasks.include_path, list) else tasks.include_path)
    code = "import kvcompress.evals.lm.model; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = [
        "--model",
        "kvcompress",
        "--model_args",
        f"pretrained={folder},cache=h2o,budget=0.5,hold_back=Question:",
    ]
    arguments += ["--tasks", "colours_choice", "--include_path", include, "--batch_size", "auto", "--device", "cpu"]
    command = [sys.executable, "-c", code, *arguments, "--output_path", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|colours_choice|" in done.stdout
    told = json.loads(next(tmp_path.rglob("results*.json")).read_text())["config"]["kvcompress"]
    assert (told["cache"], told["budget"], told["hold_back"], told["batch_size"]) == ("h2o", 0.5, "Question:", 4)
    assert told["contexts"] == 6

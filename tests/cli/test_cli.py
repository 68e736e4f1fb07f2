import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import typer
from transformers import AutoTokenizer, LlamaForCausalLM

from kvcompress import H2O, Basis, EvictingCache, Profile, registry
from kvcompress.cli import app, main, sweeps
from kvcompress.evals.sweep.first_forward import FirstForward
from kvcompress.evals.tasks import OWN
from kvcompress.swiftkv.distill import Distillation

SMALL = ["--tasks", "passkey", "--lengths", "700", "--samples", "1", "--budgets", "0.2", "--methods", "h2o"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model over bytes, as save_pretrained writes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=257,
    )
    raw = Tokenizer(
        models.BPE(vocab={x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    place = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(place)
    return str(place)


@pytest.fixture
def sweep(folder, tmp_path):
    """Runs a small sweep into tmp_path/out."""
    return lambda *more: main(
        ["sweep", "--model", folder, "--device", "cpu", "--out", str(tmp_path / "out"), *SMALL, *more]
    )


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'"),
        (["sweep", "--samples", "many"], "Invalid value for '--samples'"),
        (["sweep", "--samples", "0"], "samples must be at least 1, got 0"),
        (["sweep", "--methods", "h2o,h3o"], "unknown method 'h3o'; did you mean h2o? known: none, "),
        (["sweep", "--methods", "h2o:sinks"], "settings must be written as h2o:setting=value"),
        (["sweep", "--methods", ","], "methods must name at least one"),
        (["sweep", "--protocols", "aware"], "unknown protocol 'aware'; known: question-agnostic"),
        (["sweep", "--lengths", "long"], "a length must be a number of tokens, got 'long'"),
        (["sweep", "--budgets", "2.5"], "budget must be a count of tokens"),
        (["sweep", "--budgets", "0"], "budget must be at least 1 token, got 0"),
        (["sweep", "--budgets", "-3"], "budget must be at least 1 token, got -3"),
        (["sweep", "--budgets", "half"], "budget must be a count of tokens"),
        (["sweep", "--budgets", "nan"], "budget must be a count of tokens"),
        (["sweep", "--text", "/nowhere.txt"], "text must be a readable UTF-8 file, got '/nowhere.txt'"),
        (["sweep", "--model", "/nowhere"], "there is no folder /nowhere"),
        (["sweep", "--model", "/nowhere.gguf"], "there is no file /nowhere.gguf"),
        (["sweep", "--dtype", "float8"], "--dtype must be one of float32, bfloat16, float16 or auto, got 'float8'"),
        (["sweep", "--device", "toaster"], "device must be one that torch knows"),
        (["generate"], "Missing argument 'prompt'"),
        (["generate", " "], "the prompt is empty"),
        (["generate"], "what to answer, or a --context-file and a --question about it"),
        (["generate", "--context-file", "TEXT"], "what to answer, a --question about the text"),
        (["generate", "--question", "hi"], "--question asks about a text: give it as --context-file"),
        (["generate", "--context-file", "TEXT", "--question", " "], "a question is empty"),
        (["generate", "--context-file", "/nowhere.txt", "--question", "hi"], "/nowhere.txt: No such file"),
        (["generate", "-", "--context-file", "-"], "stdin (-) can be read only once"),
        (["generate", "hi", "--prefill-chunk-size", "0"], "Invalid value for '--prefill-chunk-size'"),
        (["generate", "hi", "--quantize-weights", "3"], "--quantize-weights must be 4 or 8 bits, got 3"),
        (["generate", "hi", "--quantize-weights", "4", "--device", "cpu"], "--quantize-weights needs a GPU"),
        (["generate", "hi", "--device", "cpu", "--device-map", "auto"], "give device or device_map, not both"),
        (
            ["generate", "hi", "--dtype", "float8"],
            "--dtype must be one of float32, bfloat16, float16 or auto, got 'float8'",
        ),
        (["chat", "--cache", "h3o"], "unknown method 'h3o'; did you mean h2o? known: none, "),
        (["chat", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["chat", "--context-file", "/nowhere.txt", "--model", "FOLDER"], "/nowhere.txt: No such file"),
        (["generate", "hi", "--cache", "h3o"], "unknown method 'h3o'; did you mean h2o? known: none, "),
        (["generate", "hi", "--budget", "none"], "budget must be a count of tokens"),
        (["generate", "hi", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["generate", "hi", "--temperature", "-1"], "--temperature must be 0 or more"),
        (["generate", "hi", "--temperature", "nan"], "--temperature must be 0 or more, got nan"),
        (["generate", "hi", "--temperature", "inf"], "--temperature must be 0 or more, got inf"),
        (["generate", "hi", "--seed", "-1"], "--seed must be a number from 0 to 2**32 - 1, got -1"),
        (["generate", "hi", "--seed", "4294967296"], "--seed must be a number from 0 to 2**32 - 1, got 4294967296"),
        (["generate", "hi", "--model", "FOLDER", "--device", "mps"], "device mps was requested, but torch"),
        (
            ["generate", "hi", "--model", "FOLDER", "--device", "meta"],
            "device meta was requested, but torch",
        ),
        (["generate", "hi", "--cache", "h2o:recent=abc"], "the method h2o takes as recent a number, got 'abc'"),
        (
            ["generate", "hi", "--cache", "h2o:rerotated=no"],
            "the method h2o takes as rerotated true or false",
        ),
        (["plan", "--context", "9", "--methods", ","], "--methods must name at least one"),
        (["plan", "--context", "9", "--model", "FOLDER", "--methods", "none:x=1"], "the method none does not take"),
        (["plan", "--context", "9", "--model", "FOLDER", "--methods", "gear:x=1"], "the method gear does not take"),
        (["report", "ROWS"], "the row 'a' in "),
        (["distill", "TEXT", "--hidden-weight", "nan"], "hidden_weight 0 or more"),
        (["generate", "hi", "--model", "/nowhere"], "there is no folder /nowhere"),
        (["plan"], "Missing option '--context'"),
        (["calibrate"], "Missing argument 'data'"),
        (["calibrate", "/nowhere.txt"], "there is no file /nowhere.txt"),
        (["calibrate", "TEXT", "--out", "."], "--out must be a file, . is a folder"),
        (["calibrate", "TEXT", "--model", "FOLDER", "--texts", "1", "--length", "16"], "at least 32 tokens in all"),
        (["generate", "hi", "--model", "FOLDER", "--cache", "gear:basis=text.txt"], "is not a safetensors file"),
        (
            ["generate", "hi", "--model", "FOLDER", "--cache", "gear", "--budget", "64"],
            "the cache gear takes no --budget",
        ),
        (["chat", "--model", "FOLDER", "--cache", "none", "--budget", "0.2"], "the cache none takes no --budget"),
        (["profile"], "Missing argument 'data'"),
        (["profile", "/nowhere.txt"], "there is no file /nowhere.txt"),
        (["profile", "TEXT", "--budgets", "2.5"], "budget must be a count of tokens"),
        (["profile", "TEXT", "--budgets", ","], "--budgets must name at least one"),
        (["profile", "TEXT", "--policy", "tova"], "--policy must be one whose scores compare across heads"),
        (["profile", "TEXT", "--policy", "h2o:allocation=heads"], "--policy takes a policy's own settings, got alloc"),
        (["profile", "TEXT", "--policy", "h3o"], "unknown method 'h3o'"),
        (["profile", "TEXT", "--out", "."], "--out must be a file, . is a folder"),
        (
            ["profile", "TEXT", "--model", "FOLDER"],
            "no text has the 61 tokens that these budgets need, the longest has",
        ),
        (
            ["generate", "hi", "--model", "FOLDER", "--cache", "h2o:allocation=no.safetensors"],
            "no.safetensors: No such file",
        ),
        (["generate", "hi", "--model", "FOLDER", "--cache", "h2o:allocation=text.txt"], "is not a safetensors file"),
        (["plan", "--context", "0", "--model", "FOLDER"], "context must be at least 1, got 0"),
        (["plan", "--context", "9", "--batch", "0", "--model", "FOLDER"], "batch must be at least 1, got 0"),
        (["plan", "--context", "9" * 20, "--model", "FOLDER"], "context must be at most 134217728"),
        (["plan", "--context", "9", "--model", "FOLDER", "--gpu-memory", "1e300"], "less than 1048576, got 1e300"),
        (["plan", "--context", "9", "--gpu-memory", "0"], "--gpu-memory must be more than 0 GiB"),
        (
            ["plan", "--context", "9", "--gpu-memory", "nan"],
            "and less than 1048576, got nan",
        ),
        (
            ["plan", "--context", "9", "--gpu-memory", "24 sacks"],
            "--gpu-memory must be a number of bytes",
        ),
        (["plan", "--context", "9kb"], "--context must be a number of tokens, such as 131072 or 128k, got '9kb'"),
        (["plan", "--context", "9", "--prefill-chunk", "x"], "--prefill-chunk must be a number of tokens"),
        (["plan", "--context", "9", "--prefill-chunk", "0", "--model", "FOLDER"], "chunk must be at least 1, got 0"),
        (["plan", "--context", "9", "--weights", "3", "--model", "FOLDER"], "--weights must be one of float32"),
        (
            ["plan", "--context", "9", "--weights", "float16", "--dtype", "bfloat16", "--model", "FOLDER"],
            "--weights must be 8, 4 or the dtype of the cache, bfloat16",
        ),
        (
            ["plan", "--context", "9", "--gpu-memory", "inf"],
            "and less than 1048576, got inf",
        ),
        (["plan", "--context", "9", "--model", "/nowhere"], "there is no folder /nowhere"),
        (["plan", "--context", "9", "--model", "FOLDER", "--methods", "h3o"], "unknown method 'h3o'"),
        (["plan", "--context", "9", "--model", "FOLDER", "--dtype", "int8"], "--dtype must be one of"),
        (
            ["sweep", "--model", "FOLDER", "--methods", "snapkv", "--budgets", "8"],
            "snapkv at a budget of 8 tokens: budget",
        ),
        (["sweep", "--model", "FOLDER", "--methods", "h2o:size=1"], "the method h2o does not take these settings"),
        (["sweep", "--model", "FOLDER", "--lengths", "30", "--budgets", "16"], "length must be at least"),
        (["generate", "hi", "--model", "FOLDER", "--cache", "snapkv", "--budget", "8"], "budget must be at least"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_clear_line_and_status_2(arguments, message, folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    is_one_clear_line_and_status_2(arguments, message, folder, tmp_path, capfd)


def test_a_task_nobody_knows_is_one_too(few_tasks, folder, tmp_path, capfd):
    message = "unknown task 'haystack'; known: needle, "
    is_one_clear_line_and_status_2(["sweep", "--tasks", "haystack"], message, folder, tmp_path, capfd)


def is_one_clear_line_and_status_2(arguments, message, folder, tmp_path, capfd):
    more = ["--methods", "h2o"] if arguments[0] == "sweep" and "--methods" not in arguments else []
    (tmp_path / "results.jsonl").write_text('{"key": "a"}\n')
    (tmp_path / "text.txt").write_text("text")
    known = {"FOLDER": folder, "ROWS": str(tmp_path), "TEXT": "text.txt"}
    assert main([known.get(word, word) for word in arguments] + more) == 2
    out, error = capfd.readouterr()
    lines = [line for line in error.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("kvcompress: ")
    assert message in lines[0]
    assert "Traceback" not in out + error


def test_an_unwritable_folder_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["sweep", "--out", str(tmp_path / "file" / "out")]) == 2
    assert f"cannot write to the folder {tmp_path}/file/out: Not a directory" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["sweep", "--out", str(tmp_path)]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    assert main(["sweep", "--methods", "h3o", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*arguments):
        raise ValueError("ours")

    monkeypatch.setattr(sweeps, "run_sweep", broken)
    with pytest.raises(ValueError, match="ours"):
        main(["sweep", "--out", str(tmp_path)])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["sweep", "--help"], ["generate", "--help"], ["plan", "--help"]])
def test_help_is_printed(arguments, capsys):
    assert main(arguments) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sweep", "generate", "chat", "plan", "eval"])
def test_help_names_every_method(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert main([command, "--help"]) == 0
    assert f"Known: {', '.join(registry.names())}." in capsys.readouterr().out


def test_help_of_a_sweep_names_every_task_and_what_usual_stands_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    main(["sweep", "--help"])
    said = capsys.readouterr().out
    assert f"Known: {', '.join(OWN)}. ruler is" in said
    assert f"usual: {', '.join(registry.expanded(['usual']))}." in said


def test_help_takes_what_a_user_has_registered(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setitem(registry.METHODS, "own", registry.METHODS["h2o"])
    main(["generate", "--help"])
    assert "attention_matching, own, pyramidkv, adakv, criticalkv." in capsys.readouterr().out


def test_the_version_is_told_with_those_it_stands_on(capsys):
    import torch
    import transformers

    import kvcompress

    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"kvcompress {kvcompress.__version__}"
    assert [line.split()[0] for line in lines[1:]] == ["python", "torch", "transformers", "triton"]
    assert f"torch {torch.__version__}" in lines
    assert f"transformers {transformers.__version__}" in lines


# README: | `distill` | `kvcompress distill`; includes `cli` |
# README: | `eval` | `kvcompress sweep`, `report` and `eval`: tasks, plots, lm-eval; includes all of the above |
@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["sweep", "--out", "OUT"], "matplotlib", "eval"),
        (["report", ".", "--out", "OUT"], "matplotlib", "eval"),
        (["eval", "--tasks", "arc_easy"], "lm_eval", "eval"),
        (["distill", "text.txt", "--out", "OUT"], "accelerate", "distill"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks_before_it_begins(
    arguments, package, extra, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([str(tmp_path / "out") if word == "OUT" else word for word in arguments]) == 2
    assert capsys.readouterr().err == f"kvcompress: this command needs {package}: pip install 'kvcompress[{extra}]'\n"
    assert not (tmp_path / "out").exists()


def test_the_module_runs_as_a_program(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "kvcompress", "plan", "--context", "none"],
        capture_output=True,
        text=True,
        cwd=os.getcwd(),
    )
    assert made.returncode == 2
    assert made.stderr.startswith("kvcompress: ")


# docs: plots quality against bytes, with the Pareto front
def test_a_sweep_prints_its_table_and_writes_its_files(sweep, tmp_path, capsys):
    assert sweep() == 0
    out = capsys.readouterr().out
    for words in ("6 points", "h2o", "full cache (ceiling)", "streaming (floor)", "accuracy.png", "report.html"):
        assert words in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.jsonl", "results.csv", "accuracy.png", "report.html"} <= names
    assert {row["status"] for row in rows(tmp_path)} == {"ok"}


# docs: and the command says so
def test_a_sweep_says_where_it_reads_fewer_at_a_time(sweep, capsys, monkeypatch):
    # two sequences of 400 tokens fit, and not one of 600
    monkeypatch.setattr(FirstForward, "size", lambda model, tokens: 2**32 if tokens == 400 else 2**34)
    monkeypatch.setattr(sweeps, "_run", lambda work: [])
    assert sweep("--batch", "3", "--lengths", "400,600") == 0
    told = capsys.readouterr().err.splitlines()[:2]
    assert told == [
        "2 sequences of 400 tokens are read at a time instead of 3, as many as a recorded forward holds in 8 GiB",
        "a forward over 600 tokens takes more than 8 GiB to record: each method reads every prompt itself",
    ]
    assert sweep("--batch", "2", "--lengths", "400") == 0
    assert "at a time" not in capsys.readouterr().err


def test_a_sweep_says_which_lengths_the_model_was_not_trained_for(sweep, capsys, monkeypatch):
    monkeypatch.setattr(sweeps, "_run", lambda work: [])
    assert sweep("--lengths", "400,9000") == 0
    assert re.search(r"was trained for \d+ tokens: 9000 are more", capsys.readouterr().err)
    assert sweep("--lengths", "400") == 0
    assert "was trained for" not in capsys.readouterr().err


def test_a_sweep_that_is_done_measures_nothing_again(sweep, tmp_path, capsys):
    sweep()
    before = rows(tmp_path)
    capsys.readouterr()
    assert sweep() == 0
    assert "6 of them are already in" in capsys.readouterr().out
    assert rows(tmp_path) == before
    assert sweep("--fresh") == 0
    assert len(rows(tmp_path)) == 12


def test_a_failing_method_is_reported_and_the_status_is_1(sweep, tmp_path, capsys, monkeypatch):
    def broken(model, budget, settings):
        cache = EvictingCache(model, policy=H2O(), budget=budget)
        monkeypatch.setattr(cache, "update", lambda *_: 1 / 0)
        return cache

    method = registry.Method("h2o", "fails", broken)
    monkeypatch.setitem(registry.METHODS, "h2o", method)
    assert sweep() == 1
    out, error = capsys.readouterr()
    assert "failed: ZeroDivisionError: division by zero" in out
    assert "kvcompress: failed: passkey 700 question-agnostic, h2o 0.2: ZeroDivisionError" in error
    assert [row["status"] for row in rows(tmp_path)].count("failed") == 2
    assert [row["status"] for row in rows(tmp_path)].count("ok") == 4
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)


# docs: `kvcompress report` joins sweeps
def test_sweeps_are_reported_together(sweep, tmp_path, capsys):
    sweep()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "both")]) == 0
    assert "h2o" in capsys.readouterr().out
    assert {"results.csv", "accuracy.png", "report.html"} <= {path.name for path in (tmp_path / "both").iterdir()}
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "both")]) == 2
    assert "there are no rows of a sweep" in capsys.readouterr().err


def test_two_sweeps_do_not_share_a_folder(sweep, tmp_path, capsys):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert sweep() == 2
    assert "another sweep is writing to" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(sweep, capsys, monkeypatch):
    from kvcompress.evals.sweep.sweep import Sweep

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sweep, "_measure", interrupted)
    assert sweep() == 130
    assert "the same command continues" in capsys.readouterr().err


def test_quick_sets_what_the_user_does_not(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweeps, "run_sweep", lambda settings, *_: seen.append(settings) or 0)
    assert main(["sweep", "--quick", "--samples", "3", "--out", str(tmp_path)]) == 0
    assert main(["sweep", "--out", str(tmp_path)]) == 0
    quick, usual = seen
    assert (quick.samples, usual.samples) == (3, 50)
    assert quick.lengths == (256,)
    assert usual.lengths == (1024,)
    assert len(quick.tasks) < len(usual.tasks)
    # what reads little of all it keeps, or shares what batches have in common, is asked for by name
    assert set(usual.methods) == set(registry.METHODS) - {"none", "hydragen", "shadowkv"}
    assert set(quick.methods) - set(usual.methods) == {"h2o:bits=4", "kvzip:bits=4"}
    assert len(quick.methods) < len(usual.methods)


@pytest.mark.parametrize("cache", ["none", "H2O", "tova:sinks=2"])
def test_generate_prints_answer_speed_and_memory(cache, folder, capsys):
    arguments = ["--model", folder, "--device", "cpu", "--cache", cache, "--max-new-tokens", "8"]
    arguments += [] if cache == "none" else ["--budget", "16"]
    assert main(["generate", "What is the pass key of the old castle?", *arguments]) == 0
    out = capsys.readouterr().out
    assert "prompt tokens in" in out
    assert "tokens/s" in out
    assert "of the full cache's" in out
    assert cache.lower().partition(":")[0] in out


# docs: On the command line, the file's name is the allocation
def test_a_profile_is_measured_written_and_used_and_refused_for_another_model(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The pass key of the old castle lies below the third stone. " * 20)
    options = ["--length", "100", "--texts", "3", "--budgets", "0.2,30", "--out", "a/profile.safetensors"]
    assert main(["profile", "text.txt", "--model", folder, "--device", "cpu", *options]) == 0
    out = capsys.readouterr().out
    profile = Profile.load("a/profile.safetensors")
    assert str(profile) in out
    assert (profile.measured["texts"], profile.measured["tokens"]) == (3, 300)
    assert profile.measured["source"] == "text.txt"
    spec = "snapkv:window=4:recent=4:allocation=a/profile.safetensors"
    ask = ["generate", "What is the pass key of the old castle?", "--device", "cpu", "--cache", spec, "--budget", "16"]
    assert main([*ask, "--model", folder, "--max-new-tokens", "8"]) == 0
    assert f"{registry.canonical(spec)}: " in capsys.readouterr().out
    assert main(["plan", "--model", folder, "--context", "100", "--methods", spec, "--budget", "16"]) == 0
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    model.save_pretrained("other")
    AutoTokenizer.from_pretrained(folder).save_pretrained("other")
    capsys.readouterr()
    assert main([*ask, "--model", "other"]) == 2
    assert "the profile was made with LlamaForCausalLM" in capsys.readouterr().err


# docs: `kvcompress calibrate` measures them once, and keys are then packed in them
def test_a_basis_is_measured_written_and_used(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The pass key of the old castle lies below the third stone. " * 20)
    options = ["--length", "100", "--texts", "3", "--out", "a/basis.safetensors"]
    assert main(["calibrate", "text.txt", "--model", folder, "--device", "cpu", *options]) == 0
    out = capsys.readouterr().out
    basis = Basis.load("a/basis.safetensors")
    assert str(basis) in out
    assert max(map(len, out.splitlines())) <= 120
    assert (basis.measured["texts"], basis.measured["tokens"], basis.measured["source"]) == (3, 288, "text.txt")
    spec = "gear:bits=2:basis=a/basis.safetensors"
    ask = ["generate", "What is the pass key of the old castle?", "--device", "cpu", "--cache", spec]
    assert main([*ask, "--model", folder, "--max-new-tokens", "8"]) == 0
    assert f"{registry.canonical(spec)}: " in capsys.readouterr().out
    assert main(["plan", "--model", folder, "--context", "100", "--methods", spec]) == 0
    assert main(["check", "--model", folder, "--device", "cpu", "--caches", spec, "--weights"]) == 0


def test_the_options_of_distill_are_its_settings_and_those_of_the_model():
    options = {option.name for option in typer.main.get_command(app).commands["distill"].params}
    settings = {setting.name for setting in dataclasses.fields(Distillation)}
    assert options - settings == {
        *("data", "model", "out", "skip_from", "share", "dtype"),
        "diagnose",
        *("own_last", "skip_between"),
        *("text", "held_out"),
        "retrieval",
    }
    # what the paper gives no reason to change
    assert settings - options == {"temperature", "betas", "warmup"}


def test_plan_tells_what_fits(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--model", folder, "--context", "1000000", "--batch", "64", "--gpu-memory", "30", "--budget", "1000"]
    assert main(["plan", *arguments, "--methods", "none,h2o"]) == 0
    lines = capsys.readouterr().out.splitlines()
    none, h2o = (next(line for line in lines if f" {name} " in line) for name in ("none", "h2o"))
    assert " no " in none
    assert " yes " in h2o
    assert any("trained for at most 2048 tokens" in line for line in lines)


# docs: Units are as people write them.
@pytest.mark.parametrize(("memory", "as_well"), [("24", "24GiB"), ("1.5GiB", "1536 MiB"), ("80GB", "80000000000 B")])
def test_a_plan_takes_units_as_people_write_them(folder, capsys, memory, as_well):
    shown = []
    for written, context in ((memory, "128k"), (as_well, "131072")):
        assert main(["plan", "--model", folder, "--context", context, "--methods", "h2o", "--gpu-memory", written]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


# docs: Below the table stands the command that runs the best of what fits.
@pytest.mark.parametrize(
    ("memory", "more", "cache"),
    [
        ("80GiB", [], "--cache none --dtype"),
        ("600MiB", [], "--cache none --prefill-chunk-size"),
        ("560MiB", ["--question-known", "yes"], "--cache gear "),
        ("518MiB", [], "--cache kvzip:bits=4 --budget 0.2 --prefill-chunk-size 1024 --dtype float32"),
    ],
)
def test_a_plan_recommends_a_command_that_exists(folder, capsys, monkeypatch, tmp_path, memory, more, cache):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--context", "100k", "--gpu-memory", memory, "--methods", "none", "--dtype", "float32", *more]
    assert main(["plan", "--model", folder, *arguments]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("Recommended: ")]
    assert cache in line
    # it has a row of its own, which fits
    (row,) = [row for row in out.splitlines() if " yes* " in row]
    assert row.split()[1] == re.search(r"--cache (\S+)", line)[1]
    command = line.removeprefix("Recommended: kvcompress ").split()
    text = tmp_path / "text"
    text.write_text("Amber is red. " * 20)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Amber is red. Is it?"))
    command = [str(text) if word == "FILE" else word for word in command]
    assert main([*command, "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("memory", "said"), [("513MiB", "Nothing fits: see the largest"), ("400MiB", "Nothing fits at")]
)
def test_a_plan_says_that_nothing_fits(folder, capsys, memory, said):
    arguments = ["--context", "100k", "--gpu-memory", memory, "--methods", "none", "--dtype", "float32"]
    assert main(["plan", "--model", folder, *arguments]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "Recommended" not in out


def test_a_plan_says_what_would_fit_where_nothing_does(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "--model", folder, "--context", "100k", "--gpu-memory", "520MiB", "--methods", "none"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "│ none" in line).split("│")
    assert row[7].strip() == "no"
    assert 1000 < int(row[8]) < 100 * 1024


def test_a_plan_cuts_no_word_in_a_narrow_terminal(folder, capsys, monkeypatch):
    methods = ["none", "attention_matching", "snapkv:window=4:recent=4:second_stage=0.5:allocation=pyramid:bits=4"]
    shown = []
    for columns in ("300", "140", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["plan", "--model", folder, "--context", "1000", "--methods", ",".join(methods)]) == 0
        # without the lines between columns
        out = re.sub("[│┃]", " ", capsys.readouterr().out)
        rows = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in methods]
        assert [row[0] for row in rows] == methods
        assert [len(row) for row in rows] == [9] * 3
        shown.append(rows)
        assert "…" not in out
    assert shown[0] == shown[1] == shown[2]


def test_a_plan_of_usual_methods_fits_into_80_columns(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--model", folder, "--context", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("attention_matching " in line for line in lines)
    # the command to copy is not broken
    assert max(len(line) for line in lines if not line.startswith("Recommended: ")) <= 80


def test_a_sweeps_tables_cut_no_word_in_a_narrow_terminal(sweep, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert sweep("--methods", "h2o:second_stage=0.25:allocation=pyramid") == 0
    out = capsys.readouterr().out
    assert re.search(r"^h2o:allocation=pyramid:second_stage=0.25 +[01]\.", out, re.M), out
    assert "…" not in out


# docs: The texts of a file, its paragraphs or the lines of a `.jsonl`, are read as one
def test_a_profile_reads_all_paragraphs_of_a_file_as_one_text_and_says_so(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    for command in ("profile", "distill"):
        assert main([command, "--help"]) == 0
        assert "All texts of a file, its paragraphs or lines, are read as one" in capsys.readouterr().out
    # none is as long as asked
    paragraphs = ["The pass key lies below the third stone."] * 8
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in paragraphs))
    for name in ("text.txt", "text.jsonl"):
        options = ["--length", "100", "--budgets", "0.2", "--policy", "h2o", "--out", "profile.safetensors"]
        assert main(["profile", name, "--model", folder, "--device", "cpu", *options]) == 0
        measured = Profile.load("profile.safetensors").measured
        assert (measured["texts"], measured["tokens"]) == (4, len("\n\n".join(paragraphs)))

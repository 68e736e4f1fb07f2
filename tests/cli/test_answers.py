import io
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

from kvcompress import DenseCache, H2OCache, load_model
from kvcompress.asking import Conversation
from kvcompress.cli import arguments, main, streaming
from kvcompress.cli.arguments import UsageError
from tests.evals import conftest

folder, model, tokenizer = conftest.folder, conftest.model, conftest.tokenizer
TEXT = "The pass key of the old castle is 4711. The cat is called Pluto and sleeps on the star charts. " * 3
QUESTIONS = ["What is the key?", "Who sleeps?"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Runs a command on the tiny model, and gives what it prints."""
    monkeypatch.setattr("transformers.TextStreamer", _Printer)

    def run(command, *words, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        assert main([command, *words, "--model", str(folder), "--device", "cpu", "--max-new-tokens", "6"]) == 0
        return capsys.readouterr().out

    return run


class _Printer:
    """Prints the ids of an answer: most letters that a random model writes are none."""

    def __init__(self, *args, **kwargs):
        self.ids = []

    def put(self, value):
        self.ids.append(value.tolist())

    def end(self):
        print(*(token for (token,) in self.ids[1:]))
        self.ids = []


def ids_of(conversation, question):
    """What an answer is made of, greedily, 6 tokens at most."""
    printer = _Printer()
    told = []
    printer.end = lambda: told.extend(token for (token,) in printer.ids[1:])
    conversation.ask(question, max_new_tokens=6, streamer=printer)
    return " ".join(map(str, told))


# docs: The context is read once, and each question is answered by itself
@pytest.mark.parametrize("chunk", [[], ["--prefill-chunk-size", "32"]])
def test_a_context_is_read_once_and_each_question_gets_its_answer_under_it(chunk, run, file, folder):
    asked = [word for question in QUESTIONS for word in ("--question", question)]
    out = run("generate", "--context-file", file, *asked, "--cache", "h2o", "--budget", "64", *chunk).splitlines()
    model, tokenizer = load_model(folder)
    conversation = Conversation(
        model, tokenizer, H2OCache(model, budget=64), prefill_chunk_size=int(chunk[1]) if chunk else None
    )
    conversation.read(TEXT)
    wanted = [ids_of(conversation.fork(), question) for question in QUESTIONS]
    assert out[:5] == [f"> {QUESTIONS[0]}", wanted[0], "", f"> {QUESTIONS[1]}", wanted[1]]
    assert out[6] == f"{folder}: float32 on cpu"
    assert out[7].startswith(f"{len('<user>' + TEXT)} context tokens in ")
    assert "; 12 new tokens, " in out[7]
    assert out[7].endswith(" tokens/s")
    # of the context alone
    assert out[8] == f"h2o: tokens seen {len('<user>' + TEXT)}, kept per layer and head 64 to 64"


def test_files_and_stdin_are_one_context_and_a_prompt_is_a_question(run, file, tmp_path):
    both = tmp_path / "both.txt"
    both.write_text(f"{TEXT}\n\nMore of it.")
    wanted = run("generate", QUESTIONS[0], "--context-file", str(both), "--quiet")
    assert run("generate", "--context-file", file, "--context-file", "-", "--question", QUESTIONS[0], "--quiet",
               stdin="More of it.") == wanted  # fmt: skip
    # an answer, and nothing else
    assert len(wanted.splitlines()) == 1


def test_a_prompt_in_chunks_is_answered_as_one_in_a_piece_where_nothing_is_lost(run):
    whole = run("generate", TEXT, "--cache", "none", "--quiet")
    assert run("generate", TEXT, "--cache", "none", "--quiet", "--prefill-chunk-size", "32") == whole
    assert len(whole.split()) == 6


def test_a_prompt_counts_its_tokens_and_says_dtype_and_device(run, folder):
    out = run("generate", "Who sleeps?", "--dtype", "bfloat16").splitlines()
    assert out[2] == f"{folder}: bfloat16 on cpu"
    assert out[3].startswith(f"{len('<user>Who sleeps?</user><assistant>')} prompt tokens in ")
    raw = run("generate", "Who sleeps?", "--raw").splitlines()
    assert raw[3].startswith(f"{len('Who sleeps?')} prompt tokens in ")


# docs: A chat is one conversation through one cache, a line a turn
def test_a_chat_is_one_conversation_through_one_cache(run, folder):
    out = run("chat", "--cache", "none", stdin=f"{QUESTIONS[0]}\n\n/memory\n{QUESTIONS[1]}\n/help\n/quit\nnever\n")
    model, tokenizer = load_model(folder)
    conversation = Conversation(model, tokenizer, DenseCache(model))
    lines = out.splitlines()
    assert lines[0] == f"{folder}: float32 on cpu; /memory shows what the cache holds, /quit ends"
    assert lines[1:3] == [f"> {QUESTIONS[0]}", ids_of(conversation, QUESTIONS[0])]
    assert lines[3] == "> /memory"
    seen = conversation.cache.get_seq_length()
    assert lines[4] == f"none: tokens seen {seen}, kept per layer and head {seen} to {seen}"
    at = lines.index(f"> {QUESTIONS[1]}")
    assert lines[at + 1] == ids_of(conversation, QUESTIONS[1])
    assert lines[at + 2 : at + 4] == ["> /help", "/help is no command: /memory shows what the cache holds, /quit ends"]
    assert "never" not in out
    assert "12 new tokens, " in out
    assert f"none: tokens seen {conversation.cache.get_seq_length()}, " in out


def test_a_chat_may_begin_with_a_text_and_ends_with_its_input(run, file, folder):
    out = run("chat", "--context-file", file, "--cache", "none", "--quiet", stdin="\n".join(QUESTIONS))
    model, tokenizer = load_model(folder)
    conversation = Conversation(model, tokenizer, DenseCache(model))
    conversation.read(TEXT)
    assert out.splitlines() == [ids_of(conversation, question) for question in QUESTIONS]


def test_an_empty_context_is_named(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    assert main(["generate", "hi", "--context-file", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt: the context is empty" in capsys.readouterr().err


# docs: Weights have the checkpoint's own dtype on a GPU, and float32 on a CPU, unless `--dtype` says otherwise
@pytest.mark.parametrize(
    ("has_gpu", "device", "asked", "expected"),
    [
        (False, None, None, torch.float32),
        (True, None, None, "auto"),
        (True, "cpu", None, torch.float32),
        (True, None, "float16", torch.float16),
        (False, None, "auto", "auto"),
    ],
)
def test_weights_have_the_checkpoints_own_dtype_on_a_gpu_and_float32_on_a_cpu(
    has_gpu, device, asked, expected, monkeypatch
):
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("kvcompress.loading.load_model", lambda name, **options: told.append(options))
    arguments.load("name", asked, device)
    assert told[0]["dtype"] == expected
    assert "quantization_config" not in told[0]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, with bitsandbytes, as far as the command line asks; what is loaded is told."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("kvcompress.loading.load_model", lambda name, **options: told.append(options))
    monkeypatch.setattr("kvcompress.loading.read_config", lambda name: SimpleNamespace(dtype=torch.bfloat16))
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    return told


# docs: `--quantize-weights 4` has bitsandbytes keep the weights in 4 bits, on a GPU
def test_weights_of_4_bits_compute_in_the_dtype_asked_for_or_the_checkpoints_own(gpu):
    arguments.load("name", None, None, quantize_weights=4)
    arguments.load("name", "float16", None, device_map="auto", quantize_weights=4)
    arguments.load("name", None, None, quantize_weights=8)
    four, spread, eight = (options["quantization_config"] for options in gpu)
    assert isinstance(four, transformers.BitsAndBytesConfig)
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)
    assert spread.bnb_4bit_compute_dtype == torch.float16
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert [(options["device"], options["device_map"]) for options in gpu] == [
        ("cuda:0", None), (None, "auto"), ("cuda:0", None),
    ]  # fmt: skip


def test_what_takes_long_while_a_model_is_loaded_is_said(monkeypatch, capsys):
    def load(*args, **kwargs):
        logging.getLogger("kvcompress.loading").info("unpacking %s", "it")

    monkeypatch.setattr("kvcompress.loading.load_model", load)
    arguments.load("name", None, "cpu")
    assert capsys.readouterr().err == "kvcompress: unpacking it\n"
    load()
    assert capsys.readouterr().err == ""


def test_a_missing_quantizer_is_named(gpu, monkeypatch):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(UsageError, match="--quantize-weights needs bitsandbytes: pip install bitsandbytes"):
        arguments.load("name", None, None, quantize_weights=4)


def test_a_clock_counts_the_tokens_of_all_answers(monkeypatch):
    now = iter([0.0, 2.0, 2.5, 3.0, 10.0, 11.0])
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: next(now))
    clock = streaming.Clock(SimpleNamespace(put=lambda value: None, end=lambda: None))
    for tokens in (3, 1):
        clock.put(torch.zeros(1, 7))
        for _ in range(tokens):
            clock.put(torch.zeros(1))
        clock.end()
    assert (clock.prompt, clock.prefill, clock.tokens, clock.decode) == (7, 3.0, 4, 1.0)
    assert clock.speed == "2.0 tokens/s"

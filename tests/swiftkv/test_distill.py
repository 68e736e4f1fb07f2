"""Distillation: what the loss is, what trains, and that a run may stop, go on and be spread over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvcompress.cli import main
from kvcompress.swiftkv.data import Row, chat_row, read_rows
from kvcompress.swiftkv.distill import Distillation, batches, distill, distillation_loss
from kvcompress.swiftkv.model import as_teacher, convert, trained_parameters
from tests.contract.models import build, prompt

pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]
SMALL = {"length": 16, "steps": 6, "batch": 2, "learning_rate": 3e-3}


@pytest.fixture(autouse=True)
def _no_precision_of_an_earlier_run():
    AcceleratorState._reset_state(reset_partial_state=True)


def student(share=1, first=1, **changes):
    return convert(build("llama", num_hidden_layers=4, **changes), first, share)


def rows(count=12, tokens=16):
    return [Row(prompt(tokens, seed=seed)[0].cpu(), torch.ones(tokens, dtype=torch.bool)) for seed in range(count)]


def test_the_divergence_is_the_definition_and_finite_where_a_probability_is_zero():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    answered = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    p, q = (theirs / 3).softmax(-1), (ours / 3).softmax(-1)
    expected = 9 * ((p * (p / q).log()).sum(-1) * answered).sum() / 10
    torch.testing.assert_close(distillation_loss(ours, theirs, answered, 10, 3.0), expected.float())
    assert distillation_loss(ours, ours, answered, 10) == 0
    ours = torch.zeros(1, 1, 4, requires_grad=True)
    theirs = torch.tensor([[[300.0, -300.0, 0.0, -1000.0]]])
    loss = distillation_loss(ours, theirs, torch.ones(1, 1, dtype=torch.bool), 1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(ours.grad).all()


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path):
    # the weights that begin the last layer are its own, and its input is what the common norm takes
    model = student(first=3)
    lines = distill(model, rows(), Distillation(**{**SMALL, "steps": 1}), tmp_path)
    assert lines[0]["divergence"] == pytest.approx(0, abs=1e-9)
    assert lines[0]["hidden"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_losses_are_those_of_two_whole_forwards_and_early_layers_run_once(family, tmp_path):
    model = convert(build(family, num_hidden_layers=4), 2)
    # rows of several lengths, the shorter ones padded
    data = [Row(row.ids[: 10 + 2 * index], row.answered[: 10 + 2 * index]) for index, row in enumerate(rows(4))]
    divergence = error = torch.zeros(())
    total = sum(len(row.ids) for row in data)
    for row in data:
        with torch.no_grad():
            ids = row.ids[None].to(model.device)
            ours = model(ids, output_hidden_states=True)
            with as_teacher(model):
                theirs = model(ids, output_hidden_states=True)
        answered = torch.nn.functional.pad(row.answered[1:], (0, 1))[None].to(model.device)
        divergence = divergence + distillation_loss(ours.logits, theirs.logits, answered, total).cpu()
        error = error + (ours.hidden_states[3] - theirs.hidden_states[3]).square().mean(-1).sum().cpu() / total
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_, index=layer.self_attn.layer_idx: calls.append(index))
    (line,) = distill(model, data, Distillation(steps=1, batch=4, length=16), tmp_path)
    assert line["divergence"] == pytest.approx(divergence.item(), rel=1e-4)
    assert line["hidden"] == pytest.approx(error.item(), rel=1e-4)
    assert sorted(calls) == [0, 1, 2, 2, 3, 3]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


# docs: `kvcompress distill` trains what the conversion added
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_was_added_trains_and_the_loss_falls(checkpointing, tmp_path):
    model = student(2, first=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad(), as_teacher(model):
        taught = model(prompt(16, 2)).logits
    lines = distill(model, rows(), Distillation(**{**SMALL, "steps": 30, "checkpointing": checkpointing}), tmp_path)
    for name, parameter in model.named_parameters():
        changes = name in trained_parameters(model)
        assert torch.equal(parameter, before[name]) != changes, name
        assert parameter.requires_grad
    assert sum(line["loss"] for line in lines[-5:]) < 0.7 * sum(line["loss"] for line in lines[:5])
    with torch.no_grad(), as_teacher(model):
        assert torch.equal(model(prompt(16, 2)).logits, taught)


def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path):
    settings = Distillation(**SMALL, save_every=2)
    whole, halves = student(), student()
    expected = distill(whole, rows(), settings, tmp_path / "whole")

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(halves, rows(), settings, tmp_path / "halves", stop)
    lines = distill(student(), rows(), settings, tmp_path / "halves")
    for line, wanted in zip(lines, expected, strict=True):
        assert {**line, "seconds": 0} == {**wanted, "seconds": 0}
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "halves")]
    for name in ("trained", "optimiser", "step"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds another run, which differs in learning_rate"):
        distill(student(), rows(), Distillation(**{**SMALL, "learning_rate": 1.0}), tmp_path / "whole")


def interrupted(folder, step=3, data=None, **settings):
    """A folder of a run that was interrupted after so many steps."""

    def stop(line):
        if line["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student(), data or rows(), Distillation(**{**SMALL, **settings}, save_every=2), folder, stop)


def test_a_run_killed_between_its_two_files_goes_on_as_if_it_had_not(tmp_path):
    """The checkpoint is written first, and says by itself how many updates are in it."""
    settings = Distillation(**SMALL, save_every=2)
    expected = distill(student(), rows(), settings, tmp_path / "whole")
    interrupted(tmp_path / "halves", 2)
    losses = tmp_path / "halves" / "losses.jsonl"
    before = losses.read_text()
    interrupted(tmp_path / "halves", 4)
    losses.write_text(before)
    lines = distill(student(), rows(), settings, tmp_path / "halves")
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in expected]
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "halves")]
    for name in ("trained", "optimiser", "step"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=0)
    # at the very end too
    losses.write_text(before)
    distill(student(), rows(), settings, tmp_path / "halves")
    assert losses.read_text().count("\n") == 6


def test_a_run_goes_on_with_the_model_and_the_data_that_it_began_with(tmp_path):
    interrupted(tmp_path)
    settings = Distillation(**SMALL, save_every=2)
    other = convert(build("llama", num_hidden_layers=4, seed=1), 1)
    with pytest.raises(ValueError, match=r"the run in .* was made with Llama.*differ in weights"):
        distill(other, rows(), settings, tmp_path)
    assert all(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(ValueError, match=r"other data: 12 rows of 192 tokens, \w+, got 13 rows of 208 tokens"):
        distill(student(), rows(13), settings, tmp_path)
    changed = rows()
    changed[5].answered[3] = False
    with pytest.raises(ValueError, match="other data"):
        distill(student(), changed, settings, tmp_path)
    assert len(distill(student(), rows(), settings, tmp_path)) == 6


def test_a_damaged_checkpoint_is_refused(tmp_path):
    interrupted(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    weight = torch.load(path, weights_only=True)["trained"]["model.norm_swiftkv.weight"].numpy().tobytes()
    data = bytearray(whole)
    data[whole.index(weight)] ^= 1
    for damaged in (bytes(data), whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged"):
            distill(student(), rows(), Distillation(**SMALL, save_every=2), tmp_path)


def test_a_checkpoint_of_an_earlier_release_goes_on(tmp_path):
    settings = Distillation(**SMALL, save_every=2)
    expected = distill(student(), rows(), settings, tmp_path / "whole")
    interrupted(tmp_path / "halves")
    path = tmp_path / "halves" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: state[name] for name in ("trained", "optimiser", "scaler", "settings", "step")}, path)
    with pytest.warns(UserWarning, match="earlier kvcompress"):
        lines = distill(student(), rows(), settings, tmp_path / "halves")
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in expected]


def test_forwards_accumulate_to_what_one_large_forward_gives(tmp_path):
    one, several = student(), student()
    distill(one, rows(), Distillation(**{**SMALL, "batch": 4}), tmp_path / "one")
    distill(several, rows(), Distillation(**{**SMALL, "batch": 1, "accumulate": 4}), tmp_path / "several")
    for parameter, other in zip(trained_parameters(one).values(), trained_parameters(several).values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)


def test_every_token_weighs_the_same_however_rows_of_several_lengths_are_cut_into_forwards(tmp_path):
    data = [
        Row(row.ids[: 3 + 4 * (index % 4)], row.answered[: 3 + 4 * (index % 4)]) for index, row in enumerate(rows())
    ]
    settings = {**SMALL, "steps": 2}
    one, several = student(), student()
    wanted = distill(one, data, Distillation(**{**settings, "batch": 4}), tmp_path / "one")
    found = distill(several, data, Distillation(**{**settings, "batch": 2, "accumulate": 2}), tmp_path / "several")
    for name in ("divergence", "hidden", "tokens"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in wanted], rel=1e-4), name
    for parameter, other in zip(trained_parameters(one).values(), trained_parameters(several).values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5)


def test_every_process_is_fed_its_own_rows_and_all_rows_once_an_epoch():
    settings = Distillation(batch=2, seed=3)
    data = rows(8)
    fed = [batches(data, settings, rank, 2) for rank in (0, 1)]
    alone = batches(data, Distillation(batch=4, seed=3), 0, 1)
    for _ in range(2):
        epoch = []
        for _ in range(2):
            parts = [next(feed) for feed in fed]
            epoch += parts[0] + parts[1]
            assert {id(row) for row in parts[0] + parts[1]} == {id(row) for row in next(alone)}
        assert sorted(map(id, epoch)) == sorted(map(id, data))


def test_mixed_precision_trains_float32_weights(tmp_path):
    model = student(dtype=torch.bfloat16)
    lines = distill(model, rows(), Distillation(**SMALL, precision="bf16"), tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in trained_parameters(model).values())
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)


def test_of_a_chat_the_assistants_words_count(smollm2):
    _, tokenizer = smollm2
    messages = [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another?"},
        {"role": "assistant", "content": "Green, then."},
    ]
    row = chat_row(messages, tokenizer, 500)
    answered = tokenizer.decode(row.ids[row.answered])
    assert "Blue." in answered
    assert "Green, then." in answered
    assert "colour" not in answered
    assert "Another" not in answered
    assert len(chat_row(messages, tokenizer, 10).ids) == 10


LINE_BY_LINE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{LAST}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# what templates do to the answer that comes last
LAST_TURNS = {
    "like all others": "",
    "an empty thought before it": "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}",
    "a thought before each": "{% if m.role == 'assistant' %}<think></think>{% endif %}",
}


def letters(template):
    """A tokenizer whose tokens are bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(sorted(alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Blue. Another?"},
    {"role": "assistant", "content": "Blue."},
]


@pytest.mark.parametrize("last", LAST_TURNS)
def test_whole_answers_count_and_nothing_else_however_the_last_turn_is_rendered(last):
    tokenizer = letters(LINE_BY_LINE.replace("{LAST}", LAST_TURNS[last]))
    row = chat_row(CHAT, tokenizer, 500)
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    first = "Blue.<|end|>\n"
    thoughts = {"like all others": ("", ""), "a thought before each": ("<think></think>",) * 2}
    before, behind = thoughts.get(last, ("", "<think>\n\n</think>\n\n"))
    assert tokenizer.decode(row.ids[row.answered]) == before + first + behind + first


def test_thoughts_that_only_the_last_answer_keeps_leave_the_earlier_answers_whole():
    shown = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    tokenizer = letters(LINE_BY_LINE.replace("{LAST}", "").replace("{{ m.content }}", shown))
    chat = [dict(message) for message in CHAT]
    for message in chat[1::2]:
        message["content"] = "<think>Sky?</think>" + message["content"]
    row = chat_row(chat, tokenizer, 500)
    assert tokenizer.decode(row.ids[row.answered]) == "Blue.<|end|>\n<think>Sky?</think>Blue.<|end|>\n"


def test_an_answer_that_an_end_renders_in_other_words_is_refused():
    shown = "{{ m.content if loop.last else m.content.upper() }}"
    tokenizer = letters(LINE_BY_LINE.replace("{LAST}", "").replace("{{ m.content }}", shown))
    with pytest.raises(ValueError, match=r"renders the answer 'Blue\.' otherwise within the conversation"):
        chat_row(CHAT, tokenizer, 500)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"x\.jsonl:2 is not JSON: .* at column 10"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', r"x\.jsonl:3 is not UTF-8: byte 0xff at byte 25"),
        (b'\xff\xfe{\x00"\x00', r"x\.jsonl:1 is not UTF-8: byte 0xff at byte 0"),
        (b'{"messages": [{"role": "user"}]}', r"x\.jsonl:1: message 0 must have a role and a content.*\['role'\]"),
        (b'{"messages": ["hello"]}', r"x\.jsonl:1: message 0 must have a role and a content.*got str"),
        (b'{"messages": [{"role": "user", "content": null}]}', r"x\.jsonl:1: message 0 must have a role"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', r"x\.jsonl:1 cannot be rendered: no robots"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(data, message, tmp_path):
    template = "{% if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_rows([tmp_path / "x.jsonl"], letters(template), 20)


def test_a_line_ends_where_json_lines_say_and_a_byte_order_mark_is_no_text(tmp_path):
    texts = ["one\u2028two", "three\x85four", "five\x0csix\u2029seven"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    tokenizer = letters(LINE_BY_LINE)
    (row,) = read_rows([tmp_path / "x.jsonl"], tokenizer, 500)
    assert tokenizer.decode(row.ids) == "\n\n".join(texts)


# docs: It reads text files, and `.jsonl` files with a text or a chat per line
def test_text_and_jsonl_are_read_and_anything_else_is_refused(smollm2, tmp_path):
    _, tokenizer = smollm2
    text, lines, wrong = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl"))
    text.write_text("one two three four five six seven eight " * 8)
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    lines.write_text(json.dumps({"text": "a text of its own"}) + "\n\n" + json.dumps(chat) + "\n")
    found = read_rows([text, lines], tokenizer, 50)
    assert len(found[0].ids) == 50
    assert all(1 < len(row.ids) <= 50 for row in found)
    assert any(not row.answered.all() for row in found)
    wrong.write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl:1 must be"):
        read_rows([wrong], tokenizer, 20)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds nothing"):
        read_rows([tmp_path / "empty.txt"], tokenizer, 20)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"fit_tokens": -1}, "fit_tokens must be 0 or more"),
        ({"precision": "fp8"}, "precision must be"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**wrong)


def test_a_model_without_later_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no later layers"):
        distill(convert(build("llama", num_hidden_layers=2), 1.0), rows(), Distillation(**SMALL), tmp_path)


WORKER = """
import sys, torch
from pathlib import Path
from kvcompress.swiftkv.distill import Distillation, distill
from kvcompress.swiftkv.model import trained_parameters
from tests.swiftkv.test_distill import SMALL, rows, student
torch.set_num_threads(1)
model = student()
distill(model, rows(), Distillation(**{**SMALL, "batch": 1}), Path(sys.argv[1]))
"""


# docs: alone or under `accelerate launch -m`
def test_two_processes_under_accelerate_launch_train_as_one_with_twice_the_rows(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1",
        str(tmp_path / "worker.py"), str(tmp_path / "two"),
    ]  # fmt: skip
    # the launcher of several processes on one machine, each on the CPU
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    distill(student(), rows(), Distillation(**SMALL), tmp_path / "one")
    two, one = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("two", "one"))
    torch.testing.assert_close(two["trained"], one["trained"], rtol=1e-3, atol=1e-4)
    losses = [(tmp_path / name / "losses.jsonl").read_text().splitlines() for name in ("two", "one")]
    for line, wanted in zip(*(map(json.loads, lines) for lines in losses), strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
        assert line["tokens"] == wanted["tokens"]


# docs: The folder it writes loads like any model: `load_model("swiftkv")`
def test_the_command_line_leaves_a_model_that_loads(smollm2, tmp_path, capsys):
    _, tokenizer = smollm2
    build("llama", num_hidden_layers=4, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    command = ["distill", str(tmp_path / "text.txt"), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    rest = ["--steps", "2", "--length", "32", "--share", "2", "--fit-tokens", "64", "--hidden-weight", "0.5"]
    assert main([*command, *rest]) == 0
    assert "2/2  loss" in capsys.readouterr().out
    settings = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["settings"]
    assert (settings["fit_tokens"], settings["hidden_weight"], settings["length"]) == (64, 0.5, 32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.num_key_value_layers, loaded.config.key_value_group_size) == (2, 2)
    assert (tmp_path / "out" / "losses.jsonl").read_text().count("\n") == 2
    assert main(["distill", str(tmp_path / "none.txt")]) == 2
    assert main([*command, "--skip-from", "half"]) == 2
    assert "--skip-from must be a layer" in capsys.readouterr().err

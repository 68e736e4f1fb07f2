"""What a distillation reads: texts, chats, and which words count."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcompress.swiftkv.data import batches, chat_row, read_rows
from tests.swiftkv.runs import rows


def test_every_process_is_fed_its_own_rows_and_all_rows_once_an_epoch():
    data = rows(8)
    fed = [batches(data, 2, rank, 2, seed=3) for rank in (0, 1)]
    alone = batches(data, 4, 0, 1, seed=3)
    for _ in range(2):
        epoch = []
        for _ in range(2):
            parts = [next(feed) for feed in fed]
            epoch += parts[0] + parts[1]
            assert {id(row) for row in parts[0] + parts[1]} == {id(row) for row in next(alone)}
        assert sorted(map(id, epoch)) == sorted(map(id, data))


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
    with pytest.raises(ValueError, match=r"renders the answer 'Blue\.' differently within the conversation"):
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

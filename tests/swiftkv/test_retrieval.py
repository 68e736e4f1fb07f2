"""Generated rows: what they ask for is in them, and they are of the size that was ordered."""

import pytest
import torch

from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.retrieval import retrieval_rows, with_retrieval
from tests.swiftkv.test_data import LINE_BY_LINE, letters

PROSE = (
    "The river rose during the night, and every family along the lower road carried furniture upstairs. By morning the "
    "mill stood alone in brown water. Nobody had slept, yet somebody was already selling bread from a boat. "
)


def prose(tokenizer, count=8):
    ids = tokenizer(PROSE * 3, return_tensors="pt").input_ids[0]
    return [Row(ids, torch.ones_like(ids, dtype=torch.bool)) for _ in range(count)]


def runs(row):
    """The runs of answered tokens, as lists, each with where it begins."""
    found, start = [], None
    for index, answered in enumerate([*row.answered.tolist(), False]):
        if answered and start is None:
            start = index
        if not answered and start is not None:
            found.append((start, row.ids[start:index].tolist()))
            start = None
    return found


# docs: half of what it reads is generated rows
@pytest.mark.parametrize("template", [LINE_BY_LINE.replace("{LAST}", ""), None], ids=["template", "no template"])
def test_what_a_row_asks_for_stands_in_it_before(template):
    tokenizer = letters(template)
    made = retrieval_rows(prose(tokenizer), tokenizer, 12_000, 512, seed=1)
    asked = 0
    for index, row in enumerate(made):
        assert len(row.ids) == len(row.answered) <= 512
        ids = row.ids.tolist()
        for start, said in runs(row):
            before = ids[:start]
            assert any(before[at : at + len(said)] == said for at in range(start - len(said) + 1)), index
            asked += 1
        # of every kind: facts, pairs, passages
        assert runs(row), index
    assert asked > 1.5 * len(made)
    assert 12_000 <= sum(len(row.ids) for row in made) < 12_000 + 512
    texts = [tokenizer.decode(row.ids) for row in made]
    assert len(set(texts)) == len(texts)
    assert ("<|assistant|>" in texts[0]) == (template is not None)


def test_a_seed_gives_the_same_rows_and_another_gives_others():
    tokenizer = letters(None)
    one, same, other = ([row.ids.tolist() for row in retrieval_rows(prose(tokenizer), tokenizer, 2000, 256, seed)]
                        for seed in (3, 3, 4))  # fmt: skip
    assert one == same != other


def test_generated_rows_have_the_share_that_was_ordered():
    tokenizer = letters(None)
    given = prose(tokenizer)
    for share in (0.0, 0.25, 0.5):
        mixed = with_retrieval(given, tokenizer, 256, share)
        assert mixed[: len(given)] == given
        total = sum(len(row.ids) for row in mixed)
        generated = total - sum(len(row.ids) for row in given)
        assert generated / total == pytest.approx(share, abs=0.04)
    assert mixed != given


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 64}, "length must be at least 128 tokens .*, got 64"),
        ({"prose": []}, "0 rows of prose hold 0 words"),
        ({"prose": [Row(torch.tensor([3, 4, 5]), torch.ones(3).bool())]}, "1 rows of prose hold 0 words"),
    ],
)
def test_what_gives_no_rows_is_refused(wrong, message):
    tokenizer = letters(None)
    with pytest.raises(ValueError, match=message):
        retrieval_rows(wrong.get("prose", prose(tokenizer)), tokenizer, 1000, wrong.get("length", 256))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1"):
        with_retrieval(prose(tokenizer), tokenizer, 256, 1)

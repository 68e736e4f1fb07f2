"""A model's row: each figure is that of its definition."""

import json

import pytest
import torch

from kvcompress import convert
from kvcompress.evals.studies.quality import Exam, Quality, measure, needles, perplexity, tasks
from tests.contract.models import build, prompt


def quality(**perplexities):
    return Quality("", perplexities, {}, {}, {})


def test_perplexity_is_that_of_the_definition():
    model = build("llama")
    ids = prompt(30)[0].cpu()
    with torch.no_grad():
        log = [model(part[None].to(model.device)).logits[0].log_softmax(-1) for part in (ids[:20], ids[20:])]
    losses = [-log[0][i, ids[i + 1]] for i in range(19)] + [-log[1][i, ids[21 + i]] for i in range(9)]
    assert perplexity(model, ids, 20) == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)


def test_what_is_recovered_is_a_share_of_what_was_lost():
    base, worst, own = quality(a=10.0, b=5.0), quality(a=40.0, b=20.0), quality(a=20.0, b=25.0)
    found = own.recovered(base, worst)
    assert found["a"] == pytest.approx((20 / 30, 0.5))
    assert found["b"][0] == pytest.approx(-1 / 3)
    assert base.recovered(base, worst)["a"] == (1, 1)


def test_the_model_finds_a_needle_that_its_conversion_does_not(smollm2):
    model, tokenizer = smollm2
    assert needles(model, tokenizer, 200, 1) == 1
    assert needles(convert(model), tokenizer, 200, 1) == 0


@pytest.mark.slow
def test_tasks_are_those_of_the_data_given(smollm2, tmp_path):
    pytest.importorskip("lm_eval")
    _, tokenizer = smollm2
    model = build("llama", vocab_size=len(tokenizer))
    question = {"query": "The fish was thirsty, therefore it swam", "choices": ["in water.", "in sand."]}
    exam = Exam({"x": prompt(20)[0].cpu()}, tasks=("local_copa",), shots=1, limit=3, data=str(tmp_path))
    found = []
    for gold in (0, 1):
        rows = [json.dumps({**question, "gold": gold, "number": number}) for number in range(5)]
        (tmp_path / "copa.jsonl").write_text("\n".join(rows))
        accuracy, errors = tasks(model, tokenizer, exam)
        found.append(accuracy["local_copa"])
        assert errors == {"local_copa": 0}
    assert sorted(found) == [0, 1]
    row = measure("a", model, tokenizer, exam)
    assert (row.name, row.accuracy, row.needles) == ("a", {"local_copa": found[1]}, {})
    assert row.perplexity["x"] == perplexity(model, exam.texts["x"], exam.window)

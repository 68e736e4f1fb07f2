"""Every method that a sweep knows, through every kind of task."""

import dataclasses
import json
from functools import partial

import pytest
import torch

pytest.importorskip("lm_eval")

from kvcompress import convert
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.points import Settings, check_budgets
from kvcompress.evals.sweep.protocol import answer_several
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks
from kvcompress.hf import cache_argument
from tests.contract.models import tiny
from tests.evals.sweep.test_several_questions import prompts

pytestmark = pytest.mark.usefixtures("no_description")

SPECS = [
    *sorted({*baselines.METHODS} - {"across", "shadowkv", "quanto", "hqq"}), "h2o:bits=4", "h2o:allocation=pyramid",
    "gear:bits=2:group_size=16:buffer=32", "quanto:group_size=16", "quanto:bits=2:group_size=16",
    "hqq:group_size=16", "swiftkv:bits=4", "across:share=1",
    "shadowkv:chunk=4:outlier_chunks=2:local_chunks=2:rank=6",
]  # fmt: skip
EXACT = {"none", "dynamic", "hydragen", "across:share=1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("data")
    rows = [
        {"query": f"Question: {n} red green blue {n * 7}?\n", "choices": ["red.", "blue."], "gold": n % 2}
        for n in range(6)
    ]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"data": str(tmp_path)}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all, so that ceiling and floor are measured once."""
    return tmp_path_factory.mktemp("out")


# docs: It measures every method at every budget, next to sinks + recent
@pytest.mark.filterwarnings("ignore:AcrossKVCache on")
@pytest.mark.parametrize("spec", SPECS)
def test_it_works_in_a_sweep(spec, model, tokenizer, data, out):
    name = spec.partition(":")[0]
    if not baselines.installed(name):
        pytest.skip(f"{name} is not installed")
    if name == "swiftkv":
        model = convert(model, 0.5, 1)
        model.name_or_path = "converted"
    settings = Settings(
        (spec,), (0.5,), ("passkey", "text", "local_piqa"), (600,), 2, protocols=("question-agnostic",),
        continuation=6, chunk=3, num_fewshot=5, limit=2, metadata=data, batch=2,
    )  # fmt: skip
    work = Sweep(settings, make_tasks(settings), model, tokenizer, out)
    try:
        check_budgets(model, work.points)
    except ValueError as error:
        if name != "fp8":
            raise
        pytest.skip(f"not in this transformers: {error}")
    rows = {(row["task"], row["method"]): row for row in work.run()}
    assert {row["status"] for row in rows.values()} == {"ok"}, [row.get("error") for row in rows.values()]
    method = baselines.canonical(spec)
    for task in settings.tasks:
        full, row = rows[task, "none"], rows[task, method]
        assert 0.0 <= row["score"] <= 1.0
        assert row["bytes"] > 0
        if spec in EXACT:
            assert row["scores"] == full["scores"]
            # Hydragen holds once what the batch shares
            assert (0.5 if name == "hydragen" else 0.98) < row["bytes"] / full["bytes"] < 1.02
        elif name not in ("swiftkv", "across", "shadowkv"):
            assert row["bytes"] < 0.8 * full["bytes"]
    if spec in EXACT:
        assert rows["passkey", method]["predictions"] == rows["passkey", "none"]["predictions"]
        assert rows["text", method]["kl"] < 1e-6


# docs: Each question is asked of a copy of the cache
@pytest.mark.filterwarnings("ignore:AcrossKVCache on")
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=() if spec in ("none", "h2o", "gear", "kvzip", "hydragen") else pytest.mark.slow)
        for spec in SPECS
        if not spec.startswith("swiftkv")
    ],
)
def test_a_copy_of_it_answers_each_of_several_questions(spec, model, tokenizer, tmp_path):
    if not baselines.installed(spec.partition(":")[0]):
        pytest.skip(f"{spec} is not installed")
    settings = Settings((spec,), (0.5,), ("kv",), (600,), 2, protocols=("multi-request",), batch=2, turns=2)
    work = Sweep(settings, make_tasks(settings), model, tokenizer, tmp_path)
    full, row = work.measure(work.points[0]), work.measure(work.points[spec != "none"])
    assert len(row["turn_scores"]) == 2
    if spec in EXACT:
        assert row["predictions"] == full["predictions"]


# docs: Conversations go on side by side
@pytest.mark.filterwarnings("ignore:AcrossKVCache on")
@pytest.mark.parametrize("spec", SPECS)
def test_conversations_with_it_go_on_side_by_side(spec, model):
    if not baselines.installed(spec.partition(":")[0]):
        pytest.skip(f"{spec} is not installed")
    if spec.startswith("swiftkv"):
        model = convert(model, 0.5, 1)
    make = partial(baselines.build, spec, model, 100)
    # answers of different lengths
    asked = [
        dataclasses.replace(prompt, max_new_tokens=limit)
        for prompt, limit in zip(prompts((200, 200, 200)), (6, 1, 3), strict=True)
    ]
    found, _ = answer_several(model, make, asked, "multi-turn")
    if spec == "fp8":
        # has one scale for a batch, whether conversations end together or not
        assert [[len(each) for each in row] for row in found] == [[6, 6, 5], [1, 6, 5], [3, 6, 5]]
        return
    alone = [answer_several(model, make, [prompt], "multi-turn")[0][0] for prompt in asked]
    assert found == alone


def test_swiftkv_is_refused_for_a_model_that_was_not_converted(model):
    settings = Settings(("swiftkv",), (0.5,), ("passkey",), (600,), 1)
    with pytest.raises(ValueError, match=r"swiftkv: SwiftKVCache supports converted models, got LlamaForCausalLM"):
        check_budgets(model, make_tasks(settings)["passkey"].points())


@torch.no_grad()
def test_groups_of_layers_hold_once_and_pack_where_asked():
    model = convert(tiny(), 1, 2)
    sizes = {}
    for spec in ("none", "swiftkv", "swiftkv:bits=4"):
        cache = baselines.build(spec, model)
        model(torch.arange(3, 203)[None], **cache_argument(model, cache))
        sizes[spec] = cache.memory().total_bytes
    assert sizes["swiftkv"] == pytest.approx(sizes["none"] * 2 / 3, rel=0.02)
    assert sizes["swiftkv:bits=4"] < 0.6 * sizes["swiftkv"]

"""The model file for lighteval: its documents get the answers that lm-eval's requests get."""

import re
from importlib.util import find_spec

import pytest

pytest.importorskip("lighteval")
pytest.importorskip("lm_eval")

from lighteval.models.custom.custom_model import CustomModelConfig
from lighteval.models.model_loader import load_model
from lighteval.tasks.requests import Doc
from lm_eval.api.instance import Instance

from kvcompress.evals.lm.model import CompressedLM
from tests.evals.conftest import folder, model, tokenizer  # noqa: F401

FILE = find_spec("kvcompress.evals.lm.lighteval_model").origin
TEXTS = ["red green blue " * count for count in (4, 9, 6)]


@pytest.fixture
def loaded(folder, tmp_path):  # noqa: F811
    def load(arguments):
        name = f"pretrained={folder},{arguments}"
        return load_model(
            CustomModelConfig(model_name=name, model_definition_file_path=FILE, cache_dir=str(tmp_path))
        ), CompressedLM.create_from_arg_string(name, {})

    return load


def docs(**facts):
    return [
        Doc(query=text, choices=[" red", " green"], gold_index=0, id=str(index), task_name="colours|0", **facts)
        for index, text in enumerate(TEXTS)
    ]


def asked(kind, *arguments):
    return [Instance(kind, {}, pair, 0, ("colours", index, 1)) for index, pair in enumerate(arguments)]


# docs: takes the same arguments as the name of a model
@pytest.mark.parametrize("arguments", ["cache=none", "cache=h2o,budget=0.3,batch_size=2"])
def test_likelihoods_and_answers_are_those_of_the_harness(loaded, arguments, capsys):
    ours, lm = loaded(arguments)
    # as without a chat template
    ours._prompts.use_chat_template = False
    pairs = [(text, choice) for text in TEXTS for choice in (" red", " green")]
    expected = lm.loglikelihood(asked("loglikelihood", *pairs))
    found = ours.loglikelihood.__wrapped__(ours, docs())
    got = [score for answer in found for score in zip(answer.logprobs, answer.argmax_logits_eq_gold, strict=True)]
    assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    texts = lm.generate_until(asked("generate_until", *((text, until) for text in TEXTS)))
    answers = ours.greedy_until.__wrapped__(ours, docs(generation_size=6, stop_sequences=["\n"]))
    assert [answer.text for answer in answers] == [[text] for text in texts]
    rolling = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in TEXTS)))
    found = ours.loglikelihood_rolling.__wrapped__(ours, docs())
    assert [answer.logprobs[0] for answer in found] == pytest.approx(rolling, rel=1e-4)
    ours.cleanup()
    out = capsys.readouterr().out
    assert f"{ours._lm.cache}: " in out
    kept, seen = re.search(r"([\d.]+) of ([\d.]+) tokens kept", out).groups()
    assert (kept == seen) == (arguments == "cache=none")


def test_several_answers_of_a_document_are_refused(loaded):
    ours, _ = loaded("cache=none")
    with pytest.raises(ValueError, match="asks for 2 samples of a document, greedy is one"):
        ours.greedy_until.__wrapped__(ours, docs(num_samples=2, generation_size=6))


def test_an_argument_that_is_wrong_is_named(loaded):
    with pytest.raises(ValueError, match="unknown method 'h20'; did you mean h2o"):
        loaded("cache=h20,budget=8")

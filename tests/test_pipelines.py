import pytest
import transformers

import kvcompress
import kvcompress.pipelines
from kvcompress import H2OCache, ask
from tests.evals import conftest

folder, model, tokenizer = conftest.folder, conftest.model, conftest.tokenizer

TASK = "kvcompress-text-generation"
TEXT = "The pass key of the old castle is 4711. The cat is called Pluto and sleeps on the star charts. " * 3
QUESTIONS = ["What is the key?", "Who sleeps?"]


@pytest.fixture
def pipe(model, tokenizer):
    yield transformers.pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu")
    kvcompress.release(model)


# docs: Its arguments are those of kvpress's pipeline, with `cache` in place of `press`
def test_one_question_gets_an_answer_and_several_get_answers(pipe, model, tokenizer):
    settings = {"cache": "h2o:sinks=4", "budget": 64, "max_new_tokens": 6}
    wanted = ask(model, tokenizer, TEXT, QUESTIONS, **settings).answers
    assert pipe(TEXT, questions=QUESTIONS, **settings) == {"answers": wanted}
    assert pipe(context=TEXT, question=QUESTIONS[0], **settings) == {"answer": wanted[0]}
    assert pipe(TEXT, questions=QUESTIONS[:1], **settings) == {"answers": wanted[:1]}


def test_contexts_in_a_list_are_asked_one_after_another(pipe):
    both = pipe([TEXT, TEXT[:100]], question="Who?", max_new_tokens=4)
    assert both == [pipe(TEXT, question="Who?", max_new_tokens=4), pipe(TEXT[:100], question="Who?", max_new_tokens=4)]


def test_without_a_cache_it_is_the_full_one_and_answers_have_50_tokens(pipe, model, tokenizer):
    wanted = ask(model, tokenizer, TEXT, "Who?", "none", max_new_tokens=50).answers
    assert pipe(TEXT, question="Who?") == {"answer": wanted[0]}


def test_it_takes_a_cache_that_was_built_and_what_ask_takes(pipe, model, tokenizer):
    settings = {"answer_prefix": "It ", "prefill_chunk_size": 32, "max_context_length": 100, "max_new_tokens": 4}
    cache = H2OCache(model, budget=64)
    with pytest.warns(UserWarning, match="the context is cut after 100"):
        found = pipe(TEXT, question="Who?", cache=cache, **settings)
    assert cache.get_seq_length() == 100
    with pytest.warns(UserWarning, match="the context is cut after 100"):
        assert found == {"answer": ask(model, tokenizer, TEXT, "Who?", "h2o", budget=64, **settings).answers[0]}
    with pytest.raises(ValueError, match="the cache must be empty to read a text, but has seen 100 tokens"):
        pipe(TEXT, question="Who?", cache=cache)


def test_settings_of_the_pipeline_hold_for_every_call(model, tokenizer):
    made = transformers.pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=3, cache="gear")
    assert made(TEXT, question="Who?") == made(TEXT, question="Who?", max_new_tokens=3, cache="gear")
    kvcompress.release(model)


def test_thinking_is_off_unless_it_is_asked_for(pipe, tokenizer, monkeypatch):
    told = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda *args, **kwargs: told.append(kwargs.pop("enable_thinking")) or render(*args, **kwargs),
    )
    pipe(TEXT, question="Who?", max_new_tokens=1)
    assert set(told) == {False}
    told.clear()
    pipe(TEXT, question="Who?", max_new_tokens=1, enable_thinking=True)
    assert set(told) == {True}


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({}, ValueError, "needs a question, or a list of questions; got neither"),
        ({"question": "Who?", "questions": ["Who?"]}, ValueError, "give question or questions, not both"),
        ({"question": "Who?", "press": 1}, TypeError, "does not take 'press'; give a cache in its place; it takes"),
        ({"question": "Who?", "top": 1}, TypeError, "does not take 'top'; it takes question, questions, enable_th"),
        ({"question": " "}, ValueError, "a question must not be empty"),
    ],
)
def test_a_mistake_is_named(settings, kind, message, pipe):
    with pytest.raises(kind, match=message):
        pipe(TEXT, **settings)


# docs: Importing `kvcompress.pipelines` registers a pipeline with transformers
def test_the_task_is_known_once_the_module_is_imported_and_loads_model_and_tokenizer(fresh, folder):
    done = fresh(
        f"""
import kvcompress
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY
[getattr(kvcompress, name) for name in kvcompress.__all__]
assert {TASK!r} not in PIPELINE_REGISTRY.get_supported_tasks()
import kvcompress.pipelines
pipe = pipeline({TASK!r}, model={str(folder)!r}, device="cpu")
print(list(pipe("A cat sleeps here.", question="Who?", max_new_tokens=2)))
"""
    )
    assert done.returncode == 0, done.stderr
    assert "['answer']" in done.stdout

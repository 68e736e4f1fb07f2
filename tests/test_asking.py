import pytest
import torch
from transformers import TextIteratorStreamer

import kvcompress
from kvcompress import (
    DenseCache,
    EvictingCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzipCache,
    ShadowKVCache,
    SnapKVCache,
    ask,
)
from kvcompress.asking import Conversation
from kvcompress.policies.tova import TOVA
from tests.evals import conftest

folder, model, tokenizer = conftest.folder, conftest.model, conftest.tokenizer

TEXT = "The pass key of the old castle is 4711. The cat is called Pluto and sleeps on the star charts. " * 3
QUESTIONS = ["What is the key?", "Who sleeps?", "Where is it kept?"]
CACHES = {
    "dense": DenseCache,
    "hydragen": HydragenCache,
    "h2o": lambda model: H2OCache(model, budget=64),
    "snapkv": lambda model: SnapKVCache(model, budget=64),
    "tova": lambda model: EvictingCache(model, policy=TOVA(), budget=64),
    "kvzip": lambda model: KVzipCache(model, budget=0.3),
    "gear": lambda model: GEARCache(model, buffer=16, group_size=16),
    "shadowkv": lambda model: ShadowKVCache(model, budget=64, rank=8),
}


@pytest.fixture(autouse=True)
def released(model):
    yield
    kvcompress.release(model)


def state(cache):
    """Everything that a cache holds, and what it has seen."""
    held = [segment.tensors() for layer in cache.layers for segment in layer.segments()]
    copies = [{name: tensor.clone() for name, tensor in each.items()} for each in held]
    return int(cache.get_seq_length()), cache.memory().by_component, copies


def assert_unchanged(cache, before):
    seen, size, held = state(cache)
    assert (seen, size) == before[:2]
    torch.testing.assert_close(held, before[2], rtol=0, atol=0, equal_nan=True)


def by_hand(model, tokenizer, cache, text, tokens=12):
    """What transformers' generate answers to a prompt that is read as one piece."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, **kvcompress.hf.cache_argument(model, cache), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# docs: No answer depends on another question, and the cache is left holding the text
@pytest.mark.parametrize("name", CACHES)
def test_each_question_is_answered_as_if_it_were_the_only_one(name, model, tokenizer):
    found = ask(model, tokenizer, TEXT, QUESTIONS, CACHES[name](model), max_new_tokens=12)
    alone = [ask(model, tokenizer, TEXT, [one], CACHES[name](model), max_new_tokens=12).answers for one in QUESTIONS]
    assert [[answer] for answer in found.answers] == alone
    assert len(set(found.answers)) > 1
    assert all(len(answer) > 0 for answer in found.answers)


@pytest.mark.parametrize("name", CACHES)
def test_answers_change_nothing_that_the_cache_holds_of_the_context(name, model, tokenizer):
    conversation = Conversation(model, tokenizer, CACHES[name](model))
    conversation.read(TEXT)
    if name == "hydragen":
        # its first fork puts what was read into a node, which all share
        conversation.fork()
    before = state(conversation.cache)
    for question in QUESTIONS:
        conversation.fork().ask(question, max_new_tokens=12)
    assert_unchanged(conversation.cache, before)


# docs: Text and question are one user message of the chat template
@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("name", ["dense", "hydragen"])
def test_an_exact_cache_answers_as_the_whole_message_does(name, chunk, model, tokenizer):
    found = ask(model, tokenizer, TEXT, QUESTIONS, CACHES[name](model), max_new_tokens=12, prefill_chunk_size=chunk)
    prompts = [f"<user>{TEXT}{question}</user><assistant>" for question in QUESTIONS]
    assert found.answers == [by_hand(model, tokenizer, DenseCache(model), prompt) for prompt in prompts]


# docs: With `turns=True` the questions are one conversation instead
def test_turns_are_one_conversation_of_the_template(model, tokenizer):
    found = ask(model, tokenizer, TEXT, QUESTIONS, DenseCache(model), turns=True, max_new_tokens=12)
    # letter by letter, as some that this model writes are none
    said = tokenizer(f"<user>{TEXT}{QUESTIONS[0]}</user><assistant>", return_tensors="pt").input_ids
    for question, answer in zip([*QUESTIONS[1:], "End"], found.answers, strict=True):
        out = model.generate(said, max_new_tokens=12, do_sample=False)
        assert answer == tokenizer.decode(out[0, said.shape[1] :], skip_special_tokens=True)
        more = tokenizer(f"</assistant><user>{question}</user><assistant>", return_tensors="pt").input_ids
        said = torch.cat([out, more], 1)
    apart = ask(model, tokenizer, TEXT, QUESTIONS, DenseCache(model), max_new_tokens=12).answers
    assert found.answers[0] == apart[0]
    assert found.answers[1:] != apart[1:]
    assert found.cache.get_seq_length() > found.memory.tokens_seen


def test_the_token_that_ends_an_answer_is_left_to_the_template(model, tokenizer):
    conversation = Conversation(model, tokenizer, DenseCache(model))
    conversation.ask("Who sleeps?", max_new_tokens=12)
    begins = len("<user>Who sleeps?</user><assistant>")
    said = conversation._ids[begins:]
    end = next(token for token in said[1:] if token not in said[:1])
    own, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [257, end]
    try:
        ended = Conversation(model, tokenizer, DenseCache(model))
        ended.ask("Who sleeps?", max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = own
    assert ended._ids[begins:] == said[: said.index(end)]
    assert ended.tokens == ended.cache.get_seq_length()


def test_without_a_template_the_text_is_plain_and_begins_as_the_tokenizer_says(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    found = ask(model, tokenizer, TEXT.strip(), QUESTIONS[:1], DenseCache(model), max_new_tokens=12)
    assert found.answers == [by_hand(model, tokenizer, DenseCache(model), f"{TEXT.strip()}\n\n{QUESTIONS[0]}\n")]


@pytest.mark.parametrize(
    ("context", "question", "between"),
    [("A text.", "Who?", "\n\n"), ("A text.\n", "Who?", ""), ("A text.", "\nWho?", "")],
)
def test_an_empty_line_is_put_only_where_nothing_is_between(context, question, between, model, tokenizer):
    conversation = Conversation(model, tokenizer, DenseCache(model))
    conversation.read(context)
    conversation.ask(question, max_new_tokens=1)
    held = tokenizer.decode(conversation._ids[:-1])
    assert held == f"<user>{context}{between}{question}</user><assistant>"


# docs: The cache is a method's name, with settings as on the command line
def test_the_memory_is_that_of_the_context_before_any_question(model, tokenizer):
    found = ask(model, tokenizer, TEXT, QUESTIONS, "h2o:sinks=4", budget=64, max_new_tokens=4)
    assert found.memory.tokens_seen == len("<user>" + TEXT)
    assert all((kept == 64).all() for kept in found.memory.tokens_kept)
    assert found.memory.ratio < 0.5
    assert type(found.cache).__name__ == "EvictingCache"
    assert found.cache.memory().by_component == found.memory.by_component


# docs: forks of a `HydragenCache` share the text
def test_hydragen_shares_the_context_among_forks(model, tokenizer):
    conversation = Conversation(model, tokenizer, HydragenCache(model))
    conversation.read(TEXT)
    forks = [conversation.fork() for _ in range(3)]
    (node,) = forks[0].cache.tree.nodes
    held = [fork.cache.layers[0].held[node][0] for fork in forks]
    assert held[0] is held[1] is held[2]


def test_a_chunk_is_what_one_forward_is_fed(model, tokenizer):
    fed = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        ask(model, tokenizer, "x" * 70, "y" * 50, H2OCache(model, budget=32), prefill_chunk_size=32, max_new_tokens=1)
    finally:
        hook.remove()
    assert fed == [32, 32, 12, 32, 32, 6]


def test_a_context_that_is_too_long_is_cut_with_a_warning(model, tokenizer):
    with pytest.warns(UserWarning, match=r"the context is cut after 20 of its 76 tokens \(max_context_length\)"):
        found = ask(model, tokenizer, "x" * 70, "Who?", DenseCache(model), max_context_length=20, max_new_tokens=1)
    assert found.memory.tokens_seen == 20


def test_a_cut_that_leaves_nothing_of_the_context_is_refused(model, tokenizer):
    cache = DenseCache(model)
    for most in (1, 6):
        with pytest.raises(ValueError, match=rf"must be more than the 6 tokens that the template .* got {most}"):
            ask(model, tokenizer, "x" * 70, "Who?", cache, max_context_length=most)
    assert cache.get_seq_length() == 0


def test_an_answer_goes_on_from_its_prefix_and_is_streamed(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = ask(
        model, tokenizer, TEXT, "Who sleeps?", "none", answer_prefix="The cat", max_new_tokens=8, streamer=streamer
    )
    prompt = f"<user>{TEXT}Who sleeps?</user><assistant>The cat"
    assert found.answers == [by_hand(model, tokenizer, DenseCache(model), prompt, tokens=8)]
    assert ["".join(streamer)] == found.answers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": " \n"}, r"context must be a text to ask about, got ' \n'"),
        ({"questions": []}, "questions must hold at least one question, got none"),
        ({"questions": ["Who?", " "]}, "a question must not be empty, but number 2 of 2 is ' '"),
        ({"questions": ""}, "a question must not be empty, but number 1 of 1 is ''"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_context_length": 0}, "max_context_length must be at least 1, got 0"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be at least 1, got 0"),
        ({"budget": 64}, "budget is for a method's name, such as 'h2o'; this H2OCache has been built: got 64"),
    ],
)
def test_bad_input_is_named_and_leaves_the_cache_as_it_was(change, message, model, tokenizer):
    cache = H2OCache(model, budget=64)
    with pytest.raises(ValueError, match=message.replace("\\n", r"\\n")):
        ask(model, tokenizer, **{"context": TEXT, "questions": QUESTIONS, "cache": cache, **change})
    assert cache.get_seq_length() == 0
    assert cache.memory().total_bytes == H2OCache(model, budget=64).memory().total_bytes


def test_a_cache_that_holds_tokens_is_refused_and_stays_as_it_is(model, tokenizer):
    cache = ask(model, tokenizer, TEXT, "Who?", H2OCache(model, budget=64), max_new_tokens=1).cache
    before = state(cache)
    with pytest.raises(ValueError, match=f"must be empty to read a text, but has seen {before[0]} tokens: build ano"):
        ask(model, tokenizer, TEXT, "Who?", cache)
    assert_unchanged(cache, before)
    conversation = Conversation(model, tokenizer, DenseCache(model))
    conversation.read(TEXT)
    with pytest.raises(ValueError, match="a context must come first, but 291 tokens were read before it"):
        conversation.read(TEXT)


def test_a_cache_of_another_kind_is_refused(model, tokenizer):
    from transformers import DynamicCache

    with pytest.raises(TypeError, match=r"must be one of kvcompress's, such as .* got DynamicCache"):
        ask(model, tokenizer, TEXT, "Who?", DynamicCache())
    with pytest.raises(ValueError, match="unknown method 'h3o'; did you mean h2o"):
        ask(model, tokenizer, TEXT, "Who?", "h3o")
    with pytest.raises(ValueError, match="the method h2o needs a budget"):
        ask(model, tokenizer, TEXT, "Who?", "h2o")


def test_a_template_that_changes_messages_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content | upper }}")
    with pytest.raises(ValueError, match="must show a message once and as it is.* it shows message 0 0 times"):
        ask(model, tokenizer, TEXT, "Who?", DenseCache(model))


class _Interrupts:
    """A streamer that stops a generation at its third token, as Ctrl-C would."""

    def __init__(self):
        self.tokens = 0

    def put(self, value):
        self.tokens += 1
        if self.tokens == 4:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize("name", ["dense", "h2o", "hydragen"])
def test_a_conversation_that_was_interrupted_says_so_and_its_forks_go_on(name, model, tokenizer):
    conversation = Conversation(model, tokenizer, CACHES[name](model))
    conversation.read(TEXT)
    fork = conversation.fork()
    expected = conversation.fork().ask(QUESTIONS[0], max_new_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask(QUESTIONS[0], max_new_tokens=8, streamer=_Interrupts())
    with pytest.raises(RuntimeError, match="interrupted, and its cache has read part of it"):
        conversation.ask(QUESTIONS[0], max_new_tokens=8)
    assert fork.ask(QUESTIONS[0], max_new_tokens=8) == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_beams": 2}, "leave num_beams out, got 2"),
        ({"num_return_sequences": 2}, "leave num_return_sequences out"),
        ({"use_cache": False}, "leave use_cache out"),
        ({"return_dict_in_generate": True}, "leave return_dict_in_generate out"),
    ],
)
def test_what_ask_cannot_pass_on_is_refused_and_the_conversation_goes_on(more, message, model, tokenizer):
    conversation = Conversation(model, tokenizer, DenseCache(model), prefill_chunk_size=8)
    conversation.read(TEXT)
    seen = int(conversation.cache.get_seq_length())
    expected = conversation.fork().ask(QUESTIONS[0], max_new_tokens=4)
    with pytest.raises(ValueError, match=message):
        conversation.ask(QUESTIONS[0], max_new_tokens=4, **more)
    assert int(conversation.cache.get_seq_length()) == seen
    assert conversation.ask(QUESTIONS[0], max_new_tokens=4) == expected


def test_a_bad_argument_of_generate_that_comes_too_late_is_noticed(model, tokenizer):
    conversation = Conversation(model, tokenizer, DenseCache(model), prefill_chunk_size=8)
    conversation.read(TEXT)
    with pytest.raises(ValueError, match="nonsense"):
        conversation.ask(QUESTIONS[0], max_new_tokens=4, nonsense=3)
    with pytest.raises(RuntimeError, match="interrupted"):
        conversation.ask(QUESTIONS[0], max_new_tokens=4)


def test_a_budget_for_a_cache_that_takes_none_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="the cache gear takes no budget: leave it out; got 0.3"):
        ask(model, tokenizer, TEXT, QUESTIONS, "gear", budget=0.3)


SINGLE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('single turn only') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
)


def test_a_template_of_a_single_turn_answers_single_questions(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", SINGLE)
    found = ask(model, tokenizer, TEXT, QUESTIONS[:2], DenseCache(model), max_new_tokens=4)
    assert len(found.answers) == 2
    with pytest.raises(ValueError, match="cannot write user, assistant, user messages: single turn only"):
        ask(model, tokenizer, TEXT, QUESTIONS[:2], DenseCache(model), turns=True, max_new_tokens=4)


def test_a_broken_template_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in %}")
    with pytest.raises(ValueError, match="chat template cannot write user messages"):
        ask(model, tokenizer, TEXT, QUESTIONS[:1], DenseCache(model))

import pytest
import torch

from kvcompress import DenseCache, H2OCache, StreamingLLMCache
from kvcompress.evals.sweep.protocol import PROTOCOLS, Measured, NotCompressedError, Reader, answer, split
from kvcompress.evals.sweep.samples import Prompt

NEW = 12


def prompts(lengths=((60, 9), (52, 7), (60, 4)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(
            tuple(torch.randint(0, 256, (context,), generator=generator).tolist()),
            tuple(torch.randint(0, 256, (question,), generator=generator).tolist()),
            NEW,
        )
        for context, question in lengths
    ]


def h2o(model, budget):
    return lambda: H2OCache(model, budget=budget)


class Spy:
    """Records the tokens of each forward, and spoils the logits of the first."""

    def __init__(self, model, spoil=False):
        self.model, self.spoil, self.fed = model, spoil, []

    device = torch.device("cpu")

    @property
    def forward(self):
        return self.model.forward

    def __call__(self, tokens, **kwargs):
        out = self.model(tokens, **kwargs)
        if self.spoil and not self.fed:
            out.logits.fill_(float("nan"))
        self.fed.append(tokens.tolist())
        return out


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cache", [DenseCache, lambda model: H2OCache(model, budget=200)], ids=["dense", "roomy h2o"])
def test_a_cache_that_keeps_everything_answers_as_generate_does(model, cache, protocol):
    asked = prompts()
    answers, _ = answer(model, lambda: cache(model), asked, protocol, hold_back=3)
    for prompt, said in zip(asked, answers, strict=True):
        ids = torch.tensor([prompt.context + prompt.question])
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=9999
        )
        assert said == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_answers_as_each_prompt_alone(model, protocol):
    asked = prompts()
    together, held = answer(model, h2o(model, 20), asked, protocol, hold_back=2)
    alone = [answer(model, h2o(model, 20), [prompt], protocol, hold_back=2) for prompt in asked]
    assert together == [answers[0] for answers, _ in alone]
    assert held.tokens_kept == 20
    assert held.tokens_seen == pytest.approx(sum(one.tokens_seen for _, one in alone) / 3)
    assert held.full_bytes == pytest.approx(sum(one.full_bytes for _, one in alone) / 3)


@pytest.mark.parametrize(
    ("protocol", "hold_back"), [("question-agnostic", 1), ("question-aware", 1), ("question-aware", 5)]
)
def test_the_question_is_read_after_compression_but_for_what_the_method_may_see(model, protocol, hold_back):
    (prompt,) = prompts(((60, 9),))
    spy = Spy(model)
    answer(spy, h2o(model, 20), [prompt], protocol, hold_back=hold_back)
    after = 9 if protocol == "question-agnostic" else hold_back
    assert [len(rows[0]) for rows in spy.fed] == [69 - after, after] + [1] * (NEW - 1)
    assert tuple(spy.fed[0][0] + spy.fed[1][0]) == prompt.context + prompt.question


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_logits_of_the_uncompressed_forward_are_never_used(model, protocol):
    asked = prompts()
    wanted, _ = answer(model, h2o(model, 20), asked, protocol)
    got, _ = answer(Spy(model, spoil=True), h2o(model, 20), asked, protocol)
    assert got == wanted


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_first_answer_token_comes_through_the_compressed_cache(model, protocol):
    asked = prompts(((80, 4),) * 8, seed=3)
    full, _ = answer(model, lambda: DenseCache(model), asked, protocol)
    few, _ = answer(model, lambda: StreamingLLMCache(model, budget=2, sinks=1), asked, protocol)
    assert sum(a[0] != b[0] for a, b in zip(full, few, strict=True)) >= 4


def test_answers_end_before_a_stop_token(model):
    asked = prompts()
    whole, _ = answer(model, lambda: DenseCache(model), asked, "question-agnostic")
    stop = whole[0][5]
    cut, _ = answer(model, lambda: DenseCache(model), asked, "question-agnostic", stops=frozenset([stop]))
    assert cut == [said[: said.index(stop)] if stop in said else said for said in whole]


def test_memory_is_measured_when_the_question_comes(model):
    (prompt,) = prompts(((60, 9),))
    _, agnostic = answer(model, h2o(model, 20), [prompt], "question-agnostic")
    _, aware = answer(model, h2o(model, 20), [prompt], "question-aware", hold_back=2)
    assert (agnostic.tokens_seen, aware.tokens_seen) == (60, 67)
    # 2 layers, keys and values, 2 KV heads, head_dim 16, 4 bytes
    assert agnostic.full_bytes == 2 * 2 * 2 * 16 * 4 * 60
    assert agnostic.most_kept == aware.most_kept == 20
    assert agnostic.bytes_held == sum(agnostic.by_component.values()) < agnostic.full_bytes


def test_batches_count_by_their_sequences():
    one = Measured(1, 100.0, 400.0, {"keys": 100.0}, 10.0, 2.0, 1, 3, host_bytes=40.0)
    other = Measured(3, 300.0, 800.0, {"keys": 200.0, "codes": 100.0}, 20.0, 4.0, 2, 9)
    mean = Measured.mean([one, other])
    assert (mean.sequences, mean.bytes_held, mean.full_bytes, mean.host_bytes) == (4, 250.0, 700.0, 10.0)
    assert mean.by_component == {"keys": 175.0, "codes": 75.0}
    assert (mean.tokens_seen, mean.tokens_kept, mean.least_kept, mean.most_kept) == (17.5, 3.5, 1, 9)


def test_a_cache_that_does_not_compress_is_found_out(model):
    with pytest.raises(NotCompressedError, match=r"budget of 20 tokens the cache kept 60.0 of 60.0 tokens"):
        answer(model, lambda: DenseCache(model), prompts(((60, 9),)), "question-agnostic", must_keep_at_most=20)
    answer(model, h2o(model, 20), prompts(), "question-agnostic", must_keep_at_most=20)


def test_padding_is_kept_from_the_budget_and_the_positions(model):
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    cache = H2OCache(model, budget=4)
    reader = Reader(model, cache)
    reader.read(rows)
    assert cache.memory().tokens_kept[0].tolist() == [[4, 4], [3, 3]]
    alone = Reader(model, H2OCache(model, budget=4))
    alone.read(rows[1:])
    torch.testing.assert_close(reader.read([[5], [6]])[1], alone.read([[6]])[0])


@pytest.mark.parametrize(
    ("protocol", "hold_back", "message"),
    [
        ("question-aware", 0, "hold_back must be at least 1 token, or the first answer token would come from"),
        ("question-aware", 10, "at most the question's 9; got 10"),
        ("aware", 1, "protocol must be one of question-agnostic, question-aware, multi-turn, multi-request, got"),
    ],
)
def test_mistakes_are_named(protocol, hold_back, message):
    with pytest.raises(ValueError, match=message):
        split(prompts()[0], protocol, hold_back)

"""Each policy's scores against its formula, in float64 and plain loops."""

import copy
import math
import pickle
from collections import defaultdict

import pytest
import torch

from kvcompress import GEAR, EvictingCache, GEARCache
from kvcompress.policies.chunkkv import ChunkKV
from kvcompress.policies.h2o import H2O
from kvcompress.policies.keydiff import KeyDiff
from kvcompress.policies.knorm import Knorm
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.policy import Policy
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.streaming_llm import StreamingLLM
from kvcompress.policies.tova import TOVA
from tests.contract.drive import feed
from tests.contract.models import prompt, tiny
from tests.policies.scene import check, probabilities, scene

forwards = pytest.mark.parametrize(("queries", "padded"), [(1, False), (6, False), (6, True)])


def summed(made, row, head, queries):
    """Attention received from these queries, by candidate, over the group."""
    total = dict.fromkeys((token for token, _ in made.tokens[row][head]), 0.0)
    for index, place in queries:
        for query_head in range(head * made.group, (head + 1) * made.group):
            for token, probability in probabilities(made, row, head, query_head, index, place).items():
                total[token] += probability
    return total


# README: column sums of attention in prefill, one add per slot in decode
@forwards
def test_h2o_adds_up_attention(queries, padded):
    made = scene(H2O(), queries, padded=padded)
    expected = {}
    for row, head in made.heads():
        total = summed(made, row, head, made.queries[row])
        for token in total:
            expected[row, head, token] = float(made.candidates.scores[row, head, token]) + total[token]
    check(made, H2O().score(made.candidates), expected)


@forwards
def test_kvzip_keeps_the_highest_attention_and_takes_a_single_querys_mean_over_heads(queries, padded):
    """A forward of several tokens brings the second reading's highest attention, which a scene knows nothing of."""
    made = scene(KVzip(), queries, padded=padded)
    expected = {}
    for row, head in made.heads():
        group = 1 if len(made.queries[row]) > 1 else made.group
        for token, _ in made.tokens[row][head]:
            received = float(made.candidates.attention[row, head, token]) / group
            expected[row, head, token] = max(float(made.candidates.scores[row, head, token]), received)
    check(made, KVzip().score(made.candidates), expected)


# README: | `EvictingCache(policy=TOVA())` | what the newest query attends to | sums of one query |
@forwards
def test_tova_takes_the_newest_querys_attention_over_all_heads(queries, padded):
    # slots agree between the heads of a layer, because all heads keep the same
    made = scene(TOVA(), queries, padded=padded)
    made.candidates.positions[:] = made.candidates.positions[:, :1].clone()
    made.tokens = [[row[0]] * 2 for row in made.tokens]
    attention = torch.zeros(made.candidates.positions.shape)
    for row, head in made.heads():
        for token, probability in summed(made, row, head, made.queries[row][-1:]).items():
            attention[row, head, token] = probability
    made.candidates.attention = attention
    expected = {
        (row, head, token): (float(attention[row, 0, token]) + float(attention[row, 1, token])) / 2
        for row, head in made.heads()
        for token, _ in made.tokens[row][head]
    }
    check(made, TOVA().score(made.candidates), expected)


# README: | `SnapKVCache` | what the last queries attend to, pooled |
@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("queries", "padded"), [(6, False), (6, True)])
def test_snapkv_pools_the_windows_attention_over_neighbours_before_the_window(pooling, kernel, queries, padded):
    policy = SnapKV(window=3, recent=3, kernel=kernel, pooling=pooling)
    made = scene(policy, queries, padded=padded)
    expected = {}
    for row, head in made.heads():
        total = summed(made, row, head, made.queries[row][-3:])
        first = int(made.candidates.lengths[row]) - 3
        in_order = sorted(made.tokens[row][head], key=lambda pair: pair[1])
        lent = [total[token] if place < first else 0.0 for token, place in in_order]
        for rank, (token, place) in enumerate(in_order):
            around = [
                lent[other] if 0 <= other < len(lent) else 0.0
                for other in range(rank - kernel // 2, rank + kernel // 2 + 1)
            ]
            pooled = max(around) if pooling == "max" else sum(around) / kernel
            expected[row, head, token] = pooled if place < first and kernel > 1 else total[token]
    check(made, policy.score(made.candidates), expected)


# README: by SnapKV's sums | sums of the last 32 queries | 2502.00299 |
@pytest.mark.parametrize("chunk", [1, 4, 50])
@pytest.mark.parametrize(("queries", "padded"), [(6, False), (6, True)])
def test_chunkkv_gives_each_chunk_of_the_text_its_mean_over_tokens_and_heads(chunk, queries, padded):
    policy = ChunkKV(window=3, recent=3, chunk=chunk)
    made = scene(policy, queries, padded=padded)
    own, chunks = {}, defaultdict(list)
    for row, head in made.heads():
        total = summed(made, row, head, made.queries[row][-3:])
        for token, place in made.tokens[row][head]:
            before = place < int(made.candidates.lengths[row]) - 3
            own[row, head, token] = total[token], place // chunk if before else None
            if before:
                chunks[row, place // chunk].append(total[token])
    expected = {
        (row, head, token): value if of is None else sum(chunks[row, of]) / len(chunks[row, of])
        for (row, head, token), (value, of) in own.items()
    }
    check(made, policy.score(made.candidates), expected)


# README: | `EvictingCache(policy=ChunkKV())` | chunks of text, all but the last one whole
def test_chunkkv_keeps_whole_chunks():
    """Of 40 tokens the 3 newest, and of those before them the four best chunks of 4 and a token of the next."""
    model = tiny()
    cache = EvictingCache(model, policy=ChunkKV(window=3, recent=3, chunk=4), budget=20)
    feed(model, cache, prompt(40, batch=2))
    for layer in cache.layers:
        for places in layer.slots.positions.flatten(0, 1).tolist():
            kept = {place for place in places if 0 <= place < 37}
            whole = [first for first in range(0, 36, 4) if {first, first + 1, first + 2, first + 3} <= kept]
            assert len(kept) == 17
            assert len(whole) == 4
        assert torch.equal(*(layer.slots.positions[:, head].sort(-1).values for head in (0, 1)))


@pytest.mark.parametrize(("queries", "padded"), [(1, False), (4, False), (6, True)])
def test_snapkv_fades_what_it_observed_before_by_what_is_new(queries, padded):
    policy = SnapKV(window=8, recent=8, kernel=1)
    made = scene(policy, queries, padded=padded)
    expected = {}
    for row, head in made.heads():
        total = summed(made, row, head, made.queries[row])
        fade = 1 - len(made.queries[row]) / 8
        for token in total:
            expected[row, head, token] = fade * float(made.candidates.scores[row, head, token]) + total[token]
    check(made, policy.score(made.candidates), expected)


# README: | `EvictingCache(policy=KeyDiff())` | keys least like the others |
@forwards
def test_keydiff_keeps_keys_unlike_the_mean_direction(queries, padded):
    made = scene(KeyDiff(), queries, padded=padded)
    keys = made.candidates.keys.double()
    expected = {}
    for row, head in made.heads():
        unit = {token: keys[row, head, token] / keys[row, head, token].norm() for token, _ in made.tokens[row][head]}
        anchor = sum(unit.values()) / len(unit)
        for token, direction in unit.items():
            expected[row, head, token] = -float(direction @ anchor / anchor.norm())
    check(made, KeyDiff().score(made.candidates), expected)


# README: | `EvictingCache(policy=Knorm())` | keys of small norm |
@forwards
def test_knorm_keeps_short_keys(queries, padded):
    made = scene(Knorm(), queries, padded=padded)
    keys = made.candidates.keys.double()
    expected = {
        (row, head, token): -math.sqrt(sum(x * x for x in keys[row, head, token].tolist()))
        for row, head in made.heads()
        for token, _ in made.tokens[row][head]
    }
    check(made, Knorm().score(made.candidates), expected)


# README: | `StreamingLLMCache` | sinks + recent |
@forwards
def test_streaming_keeps_the_newest(queries, padded):
    made = scene(StreamingLLM(), queries, padded=padded)
    expected = {
        (row, head, token): float(place) for row, head in made.heads() for token, place in made.tokens[row][head]
    }
    check(made, StreamingLLM().score(made.candidates), expected)


# README: pooled | sums of the last 32 queries | 2404.14469 |
def test_the_papers_defaults():
    assert StreamingLLM().sinks == 4
    assert H2O().recent == 0.5
    assert (SnapKV().window, SnapKV().kernel, SnapKV().pooling) == (32, 5, "avg")
    assert all(policy.sinks == 0 for policy in (H2O(), SnapKV(), TOVA(), KeyDiff(), Knorm()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: H2O(recent=0), "recent must be at least 1 token"),
        (lambda: H2O(recent=1.5), r"fraction in \(0, 1\]"),
        (lambda: TOVA(sinks=-1), "sinks must be 0 tokens or more"),
        (lambda: ChunkKV(chunk=0), "chunk must be at least 1 token, got 0"),
        (lambda: KVzip(chunk=0), "chunk must be at least 1 token, got 0"),
        (lambda: SnapKV(window=0), "window must be at least 1 query"),
        (lambda: SnapKV(kernel=4), "kernel must be an odd number"),
        (lambda: SnapKV(pooling="mean"), "pooling must be 'avg' or 'max'"),
    ],
)
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_policy_cannot_be_changed():
    with pytest.raises(AttributeError):
        H2O().sinks = 3
    with pytest.raises(NotImplementedError):
        Policy().score(scene(H2O(), 1).candidates)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TOVA(sink=1), "sink is no setting of TOVA; did you mean sinks[?] It takes recent, sinks$"),
        (lambda: SnapKV(windw=8), "windw is no setting of SnapKV; did you mean window"),
        (lambda: GEAR(bit=2), "bit is no setting of GEAR; did you mean bits"),
        (lambda: GEARCache.preset(tiny(), "kivi", bit=2), "bit is no setting of GEAR; did you mean bits"),
    ],
)
def test_a_setting_that_is_none_is_answered_with_the_nearest(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_preset_that_is_none_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown preset 'kiwi'; did you mean kivi[?] known: default, "):
        GEARCache.preset(tiny(), "kiwi")


def test_a_policy_may_take_settings_of_its_own_making():
    class Free(TOVA):
        def __init__(self, **settings):
            super().__init__(sinks=settings["first"])

    assert Free(first=3).sinks == 3
    assert copy.deepcopy(SnapKV(window=8)) == pickle.loads(pickle.dumps(SnapKV(window=8))) == SnapKV(window=8)

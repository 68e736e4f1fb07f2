import pytest
import torch

from kvcompress.kernels.chunk_scores import chunk_scores_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.selection import (
    EMPTY,
    chunk_positions,
    reuse_slots,
    select_chunks,
    select_chunks_reference,
)
from tests.kernels.inputs import DEVICE, DTYPES, heads

SPEC = LogitSpec(0.2)
# group, queries, chunks, slots, chunk, head_dim, options
CASES = [
    (1, 1, 1, 1, 8, 64, {}),
    (4, 1, 70, 20, 8, 80, {}),
    (3, 1, 700, 33, 1, 64, {"group": "mean"}),
    (1, 1, 4500, 150, 3, 64, {}),
    (1, 5, 7, 7, 8, 96, {}),
    (3, 7, 65, 16, 64, 64, {"group": "mean"}),
    (2, 10, 150, 60, 5, 129, {"group": "sum"}),
    (64, 1, 20, 9, 8, 64, {"group": "sum"}),
]


def distinct(count, chunks, filled, seed):
    """Distinct chunks in no order, with gaps between, [2, 2, count]."""
    torch.manual_seed(seed)
    chosen = torch.rand(2, 2, chunks).argsort(-1)[..., :count]
    return chosen.masked_fill(torch.rand(2, 2, count) > filled, EMPTY).to(DEVICE)


def scene(group, queries, chunks, slots, chunk, head_dim, dtype=torch.float32):
    """Queries, landmarks and what is open, as of test_chunk_scores; a buffer with places beyond its slots; limits."""
    held = distinct(slots, chunks, 0.8, 1)
    is_open = torch.rand(2, 2, chunks, device=DEVICE) < 0.8
    # of one head nothing is open
    is_open[..., 0], is_open[1, 1] = True, False
    positions = torch.full((2, 2, slots * chunk + 5), -7, dtype=torch.int32, device=DEVICE)
    positions[:, :, : slots * chunk] = chunk_positions(held, chunk, None)
    limits, fetched = torch.tensor([slots, max(1, slots // 2)], device=DEVICE), torch.tensor([100, 7], device=DEVICE)
    query, landmarks = heads(2, 2 * group, queries, head_dim, dtype), heads(2, 2, chunks, head_dim, dtype)
    return query, landmarks, is_open, held, positions, limits, fetched


def cloned(arguments):
    return [argument.clone() for argument in arguments]


def check(case, spec, options):
    *sizes, chunk, head_dim, more = case
    ours, options = scene(*sizes, chunk, head_dim), options | more
    if "hidden" in options:
        ours[4][:, :, : sizes[3] * chunk] = chunk_positions(ours[3], chunk, options["hidden"])
    theirs = cloned(ours)
    found = select_chunks(*ours, spec, chunk, **options)
    expected = select_chunks_reference(*theirs, spec, chunk, **options)
    # which new chunk takes which free slot does not matter
    for got, wanted in zip(ours[3:5], theirs[3:5], strict=True):
        assert torch.equal(got.sort(-1).values, wanted.sort(-1).values)
    assert torch.equal(ours[4][:, :, : sizes[3] * chunk], chunk_positions(ours[3], chunk, options.get("hidden")))
    assert torch.equal(found, expected)
    assert torch.equal(ours[6], theirs[6])
    assert int(ours[6][0]) == 100 + int(found.sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_selected_agrees_with_the_reference(case):
    check(case, SPEC, {})


@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
@pytest.mark.parametrize("option", ["padded", "hidden", "softcap"])
def test_with_padding_hidden_tokens_or_a_softcap_too(case, option):
    _, queries, chunks, _, chunk, *_ = case
    options = {}
    if option == "padded":
        options["visible"] = torch.rand(2, queries, device=DEVICE) < 0.6
        # who sees nothing chooses nothing in particular
        options["visible"][:, -1] = True
    if option == "hidden":
        options["hidden"] = torch.rand(2, chunks * chunk, device=DEVICE) < 0.3
    check(case, LogitSpec(0.2, softcap=5.0) if option == "softcap" else SPEC, options)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_in_16_bits_as_many_of_the_best_are_selected(dtype, queries):
    query, landmarks, is_open, held, *rest = scene(4, queries, 200, 32, 8, 64, dtype)
    before = is_open.clone()
    select_chunks(query, landmarks, is_open, held, *rest, LogitSpec(0.1), 8)
    scores = chunk_scores_reference(query.float(), landmarks.float(), is_open, LogitSpec(0.1))
    assert torch.equal(is_open, before)
    for row, limit in enumerate((32, 16)):
        for head in range(2):
            chosen = held[row, head][held[row, head] != EMPTY]
            enough = min(limit, int(is_open[row, head].sum()))
            assert len(chosen) == len(chosen.unique()) == enough
            if enough:
                least = scores[row, head].topk(enough).values[-1]
                assert (scores[row, head, chosen] >= least * (1 - 1e-2)).all()


@pytest.mark.parametrize(("chunks", "slots"), [(12, 7), (500, 33), (130, 100)])
def test_hits_stay_where_they_are_and_hits_and_misses_are_the_selection(chunks, slots):
    query, landmarks, is_open, held, *rest = scene(2, 1, chunks, slots, 2, 64)
    was = held.clone()
    is_new = select_chunks(query, landmarks, is_open, held, *rest, SPEC, 2)
    scores = chunk_scores_reference(query, landmarks, is_open, SPEC)
    for row, limit in enumerate((slots, max(1, slots // 2))):
        for head in range(2):
            enough = min(limit, int(is_open[row, head].sum()))
            asked = set(scores[row, head].topk(enough).indices.tolist())
            before, after, new = (x[row, head].tolist() for x in (was, held, is_new))
            assert {chunk for chunk in after if chunk != EMPTY} == asked
            for slot, chunk in enumerate(before):
                if chunk in asked:
                    assert after[slot] == chunk
                    assert not new[slot]
            assert {chunk for chunk, fresh in zip(after, new, strict=True) if fresh} == asked - set(before)


def test_asking_the_same_again_moves_nothing():
    arguments = scene(2, 1, 300, 40, 4, 64)
    select_chunks(*arguments, SPEC, 4)
    before = cloned(arguments)
    assert not select_chunks(*arguments, SPEC, 4).any()
    for was, now in zip(before[:6], arguments[:6], strict=True):
        assert torch.equal(was, now)
    assert (arguments[6] - before[6]).tolist() == [0, 1]


def test_between_equals_as_many_are_taken_as_there_is_room_for():
    query, landmarks, is_open, held, *rest = scene(2, 1, 300, 40, 1, 64)
    landmarks[:, :, 10:] = landmarks[:, :, 10:11]
    is_open[:] = True
    select_chunks(query, landmarks, is_open, held, *rest, SPEC, 1)
    assert (held != EMPTY).sum(-1).tolist() == [[40, 40], [20, 20]]
    assert all(len(chosen[chosen != EMPTY].unique()) == len(chosen[chosen != EMPTY]) for chosen in held.flatten(0, 1))


def test_a_head_of_nan_selects_as_many():
    query, landmarks, is_open, held, *rest = scene(2, 1, 50, 10, 2, 64)
    is_open[:] = True
    query[0, 0, 0, 3] = torch.nan
    select_chunks(query, landmarks, is_open, held, *rest, SPEC, 2)
    assert (held != EMPTY).sum(-1).tolist() == [[10, 10], [5, 5]]


@pytest.mark.parametrize(("slots", "chunks"), [(7, 12), (33, 500), (100, 130)])
def test_the_reference_gives_new_chunks_the_free_slots_in_order(slots, chunks):
    held, wanted = distinct(slots, chunks, 0.8, 2), distinct(slots, chunks, 0.9, 3)
    now, is_new = reuse_slots(held, wanted, chunks)
    for row in range(2):
        for head in range(2):
            asked = [chunk for chunk in wanted[row, head].tolist() if chunk != EMPTY]
            before, after = held[row, head].tolist(), now[row, head].tolist()
            fresh = [chunk for chunk in asked if chunk not in before]
            expected = [chunk if chunk in asked else None for chunk in before]
            expected = [(fresh.pop(0) if fresh else EMPTY) if chunk is None else chunk for chunk in expected]
            assert after == expected
            assert is_new[row, head].tolist() == [a != b and a != EMPTY for a, b in zip(after, before, strict=True)]


def test_what_is_written_to_must_be_contiguous():
    query, landmarks, is_open, held, positions, *rest = scene(2, 1, 50, 10, 2, 64)
    with pytest.raises(ValueError, match="held, positions and fetched, which must be contiguous"):
        select_chunks(query, landmarks, is_open, held, positions[:, :, :20], *rest, SPEC, 2)

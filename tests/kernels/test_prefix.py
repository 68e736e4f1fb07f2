import pytest
import torch

from kvcompress.kernels.attention import slot_attention_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.shared_blocks import KeyBlocks, Sharing
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.prefix import prefix_attention, prefix_attention_reference
from tests.kernels.inputs import DEVICE, DTYPES, heads, needs_triton, some_of, tolerance

FLAT = ([range(5)], 5)
# two roots, depth 3, rows apart from each other, a row in no block, a block without rows
TREE = ([(0, 1, 3, 4), (2,), (0, 3), (1, 4), (), (3,)], 6)


def blocks(tokens, kv_heads, head_dim, value_dim, dtype=torch.float32):
    """Blocks of these lengths, some of them views of longer ones, and positions that follow on each other."""
    keys, values = [], []
    for index, count in enumerate(tokens):
        room = count + (7 if index % 2 else 0)
        for made, dim in ((keys, head_dim), (values, value_dim)):
            made.append(torch.randn(kv_heads, room, dim, device=DEVICE).to(dtype)[:, :count])
    starts = [sum(tokens[:index]) for index in range(len(tokens))]
    return KeyBlocks(keys, values, starts)


def check(sharing, tokens, group, queries, head_dim, value_dim, dtype=torch.float32, kv_heads=2, **options):
    sharing = Sharing(*sharing)
    own = blocks(tokens, kv_heads, head_dim, value_dim, dtype)
    query = heads(sharing.batch, kv_heads * group, queries, head_dim, dtype)
    causal, at = options.pop("causal", False), None
    if "window" in options or causal:
        # ragged: each row stands somewhere else behind its blocks, or within them
        back = 60 if causal else 0
        end = sum(tokens) + torch.randint(-back, 9, (sharing.batch, 1), device=DEVICE)
        at = (end + torch.arange(queries, device=DEVICE)).int()
    arguments = (query, own, sharing, LogitSpec(head_dim**-0.5, **options), at, causal)
    out, lse = prefix_attention(*arguments)
    expected_out, expected_lse = prefix_attention_reference(*arguments)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected_out, **tolerance(dtype))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 2e-2)


# sharing, tokens of the blocks, group, queries, head_dim, value_dim, options
CASES = [
    (FLAT, [1], 1, 1, 64, 64, {}),
    (FLAT, [7], 3, 1, 64, 64, {}),
    (FLAT, [600], 3, 1, 64, 64, {}),
    (FLAT, [65], 4, 30, 64, 64, {}),
    (FLAT, [130], 1, 3, 129, 96, {}),
    (FLAT, [300], 2, 2, 64, 64, {"window": 40}),
    (FLAT, [33], 2, 1, 80, 80, {"softcap": 5.0}),
    (FLAT, [50], 2, 1, 256, 256, {}),
    (TREE, [64, 33, 1, 16, 5, 300], 2, 1, 64, 64, {}),
    (TREE, [64, 33, 1, 16, 5, 70], 3, 7, 80, 80, {}),
    (TREE, [20, 33, 40, 16, 5, 30], 2, 3, 64, 64, {"window": 70, "softcap": 5.0}),
    (TREE, [0, 3, 5, 0, 5, 9], 1, 1, 64, 64, {}),
    (FLAT, [65], 4, 30, 64, 64, {"causal": True}),
    (FLAT, [300], 2, 2, 80, 96, {"causal": True, "window": 40}),
    (TREE, [20, 33, 40, 16, 5, 30], 2, 3, 64, 64, {"causal": True, "softcap": 5.0}),
]


@pytest.mark.parametrize(("sharing", "tokens", "group", "queries", "head_dim", "value_dim", "options"), CASES, ids=str)
def test_prefix_attention_agrees_with_the_reference(sharing, tokens, group, queries, head_dim, value_dim, options):
    check(sharing, tokens, group, queries, head_dim, value_dim, **options)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_prefix_attention_agrees_with_the_reference_in_16_bits(queries, dtype):
    check(TREE, [64, 33, 1, 16, 5, 90], 3, queries, 64, 64, dtype)


@needs_triton
def test_many_rows_fill_large_tiles():
    # more than one tile of 128 rows a block
    check(([range(40), range(7, 29)], 40), [70, 40], 4, 2, 64, 64, torch.bfloat16, kv_heads=1)


def test_the_reference_is_attention_to_all_tokens_of_the_path():
    """Rows see their blocks one after the other, as if they stood in one cache."""
    own = blocks([5, 9], 1, 64, 64)
    query = heads(2, 3, 4, 64)
    out, lse = prefix_attention_reference(query, own, Sharing([(0, 1), (1,)], 2), LogitSpec(0.125))
    key, value = (torch.cat(parts, 1)[None] for parts in (own.keys, own.values))
    for row, tokens in ((0, 5), (1, 14)):
        logits = query[row].float() @ key[0, 0, :tokens].mT * 0.125
        torch.testing.assert_close(out[row], logits.softmax(-1) @ value[0, 0, :tokens])
        torch.testing.assert_close(lse[row], logits.logsumexp(-1))


def test_a_query_within_a_block_sees_what_precedes_it():
    own = blocks([40, 20], 2, 64, 64)
    query = heads(2, 4, 3, 64)
    at = torch.tensor([[37, 38, 39], [58, 59, 60]], dtype=torch.int32, device=DEVICE)
    sharing = Sharing([(0, 1), (0, 1)], 2)
    out, lse = prefix_attention(query, own, sharing, LogitSpec(0.125), at, causal=True)
    key, value = (torch.cat(parts, 1) for parts in (own.keys, own.values))
    for row in range(2):
        for index in range(3):
            seen = int(at[row, index]) + 1
            logits = query[row, :, index].unflatten(0, (2, 2)) @ key[:, :seen].mT * 0.125
            torch.testing.assert_close(out[row, :, index], (logits.softmax(-1) @ value[:, :seen]).flatten(0, 1))
            torch.testing.assert_close(lse[row, :, index], logits.logsumexp(-1).flatten())
    # and all of both blocks where nothing says that it stands within them
    assert (prefix_attention(query, own, sharing, LogitSpec(0.125))[1][0] > lse[0]).all()


def test_how_a_path_is_cut_into_blocks_changes_nothing():
    """The merge is exact for any partition, in any order."""
    query = heads(4, 6, 2, 64)
    whole = blocks([90], 2, 64, 64)
    wanted = prefix_attention(query, whole, Sharing([range(4)], 4), LogitSpec(0.125))
    key, value = whole.keys[0], whole.values[0]
    cuts = [(31, 90), (0, 1), (1, 31)]
    parts = KeyBlocks([key[:, a:b] for a, b in cuts], [value[:, a:b] for a, b in cuts])
    for made, expected in zip(
        prefix_attention(query, parts, Sharing([range(4)] * 3, 4), LogitSpec(0.125)), wanted, strict=True
    ):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_permuting_rows_permutes_the_result():
    own = blocks([33, 20], 2, 64, 64)
    query = heads(4, 6, 1, 64)
    order = torch.tensor([2, 0, 3, 1])
    out, lse = prefix_attention(query, own, Sharing([(0, 1, 2, 3), (1, 3)], 4), LogitSpec(0.125))
    # row 1 is now the last, row 3 the third
    moved = prefix_attention(query[order], own, Sharing([(0, 1, 2, 3), (2, 3)], 4), LogitSpec(0.125))
    torch.testing.assert_close(moved[0], out[order])
    torch.testing.assert_close(moved[1], lse[order])


def test_a_row_in_no_block_sees_nothing_and_merges_to_what_else_it_sees():
    own = blocks([40], 2, 64, 64)
    query = heads(3, 4, 2, 64)
    out, lse = prefix_attention(query, own, Sharing([(0, 2)], 3), LogitSpec(0.125))
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    other = torch.randn_like(out), torch.randn_like(lse)
    merged, _ = merge_states([out, other[0]], [lse, other[1]])
    torch.testing.assert_close(merged[1], other[0][1])
    assert torch.isfinite(merged).all()


def test_without_blocks_nothing_is_seen():
    query = heads(3, 4, 2, 64)
    out, lse = prefix_attention(query, KeyBlocks([], []), Sharing([], 3), LogitSpec(1.0))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_a_window_may_leave_a_block_behind():
    own = blocks([50], 2, 64, 64)
    query = heads(2, 4, 1, 64)
    at = torch.tensor([[60], [59]], dtype=torch.int32, device=DEVICE)
    out, lse = prefix_attention(query, own, Sharing([(0, 1)], 2), LogitSpec(0.125, window=11), at)
    assert (lse[0] == -torch.inf).all()
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1].view(2, 2, 64), own.values[0][:, -1:].expand(-1, 2, -1))


def test_each_block_is_read_where_it_lies():
    """No copy: what changes in a block changes the next result, by the same table of addresses."""
    own = blocks([32, 20], 2, 64, 64)
    query = heads(2, 4, 1, 64)
    sharing = Sharing([(0, 1), (0,)], 2)
    prefix_attention(query, own, sharing, LogitSpec(0.125))
    own.values[0].fill_(3.0)
    out, _ = prefix_attention(query, own, sharing, LogitSpec(0.125))
    torch.testing.assert_close(out[1], torch.full_like(out[1], 3.0))


def test_wrong_shapes_are_refused():
    own = blocks([8], 2, 64, 64)
    for query, sharing, message in (
        (heads(3, 4, 1, 64), Sharing([(0,)], 2), "queries of 2 rows"),
        (heads(2, 4, 1, 64), Sharing([(0,), (1,)], 2), "2 blocks"),
        (heads(2, 3, 1, 64), Sharing([(0,)], 2), "multiple of kv_heads"),
        (heads(2, 4, 1, 80), Sharing([(0,)], 2), "head_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            prefix_attention(query, own, sharing, LogitSpec(1.0))
    with pytest.raises(ValueError, match="query_positions"):
        prefix_attention(heads(2, 4, 1, 64), own, Sharing([(0,)], 2), LogitSpec(1.0, window=4))
    with pytest.raises(ValueError, match="or it is causal"):
        prefix_attention(heads(2, 4, 1, 64), own, Sharing([(0,)], 2), LogitSpec(1.0), causal=True)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Sharing([(2,)], 2)
    with pytest.raises(ValueError, match="as many values"):
        KeyBlocks([torch.zeros(1, 1, 1)], [])
    with pytest.raises(ValueError, match="kv_heads, tokens"):
        KeyBlocks([torch.zeros(1, 2, 1)], [torch.zeros(1, 3, 1)])


def test_shared_rows_equal_slots_of_each_row():
    """Against the other attention of this package: the block copied into every row's slots."""
    own = blocks([45], 2, 64, 64)
    query = heads(3, 6, 2, 64)
    copies = [tensor[0].expand(3, -1, -1, -1) for tensor in (own.keys, own.values)]
    positions = torch.arange(45, dtype=torch.int32, device=DEVICE).expand(3, 2, -1)
    wanted = slot_attention_reference(query, *copies, positions, positions[:, 0, :2], LogitSpec(0.125))
    ours = prefix_attention(query, own, Sharing([range(3)], 3), LogitSpec(0.125))
    for made, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(made, expected)


@some_of(
    {
        "tokens": [[3, 2, 1, 2, 5, 3], [64, 33, 1, 16, 5, 300]],
        "options": [{}, {"softcap": 5.0}],
        "where": ["query", "key", "every key", "value"],
    }
)
def test_nan_reaches_the_rows_that_see_it_and_no_others(where, options, tokens):
    sharing, own = Sharing(*TREE), blocks(tokens, 2, 64, 64)
    query = heads(6, 4, 2, 64)
    if where == "query":
        query[3, 0, 1, 2] = torch.nan
    elif where == "value":
        own.values[2][0, -1, 1] = torch.nan
    else:
        own.keys[2][0, -1 if where == "key" else slice(None), 1] = torch.nan
    spec = LogitSpec(0.125, **options)
    expected = prefix_attention_reference(query, own, sharing, spec)
    torch.testing.assert_close(prefix_attention(query, own, sharing, spec), expected, equal_nan=True)
    assert expected[0][3].isnan().any()
    assert expected[0][1:3].isfinite().all()

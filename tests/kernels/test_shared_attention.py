import pytest
import torch

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import HAS_TRITON, recording
from kvcompress.kernels.common.shared_blocks import KeyBlocks, Sharing
from kvcompress.kernels.shared_attention import block_tables, shared_attention, shared_attention_reference
from tests.kernels.inputs import DEVICE, DTYPES, heads, some_of, tolerance
from tests.kernels.test_prefix import FLAT, TREE, blocks


def own_keys(batch, kv_heads, tokens, head_dim, value_dim, dtype, start):
    """Keys and values of each row's own tokens, in slots with room behind them, and the position of each."""
    key, value = heads(batch, kv_heads, tokens, head_dim, dtype), heads(batch, kv_heads, tokens, value_dim, dtype)
    held = torch.randint(1, tokens + 1, (batch,), device=DEVICE)
    place = torch.arange(tokens, device=DEVICE)
    positions = torch.where(place < held[:, None], place + start, -1).int()
    return key, value, positions[:, None].expand(-1, kv_heads, -1), (start + held - 1).int()[:, None]


# sharing, tokens of the blocks, group, own tokens, head_dim, value_dim, options
CASES = [
    (FLAT, [1], 1, 1, 64, 64, {}),
    (FLAT, [600], 3, 7, 64, 64, {}),
    (FLAT, [65], 4, 700, 80, 80, {}),
    (FLAT, [30], 1, 17, 129, 96, {}),
    (FLAT, [90], 2, 33, 64, 64, {"window": 40, "softcap": 5.0}),
    (FLAT, [90], 2, 60, 64, 64, {"window": 40}),
    (TREE, [64, 33, 1, 16, 5, 300], 2, 9, 64, 64, {}),
    (TREE, [64, 33, 1, 16, 5, 70], 3, 65, 128, 128, {"softcap": 5.0}),
    (TREE, [20, 33, 40, 16, 5, 30], 2, 5, 64, 64, {"window": 70}),
]


@some_of(
    {
        "sharing, tokens, group, own, head_dim, value_dim, options": CASES,
        "slotted": [False, True],
        "sinks": [False, True],
    }
)
def test_it_agrees_with_the_reference(sharing, tokens, group, own, head_dim, value_dim, options, slotted, sinks):
    check(sharing, tokens, group, own, head_dim, value_dim, options, slotted, sinks)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_it_agrees_with_the_reference_in_16_bits(dtype):
    check(TREE, [64, 33, 1, 16, 5, 90], 3, 20, 64, 64, {}, True, True, dtype)


def check(sharing, tokens, group, own, head_dim, value_dim, options, slotted, sinks, dtype=torch.float32):
    sharing, spec = Sharing(*sharing), LogitSpec(head_dim**-0.5, **options)
    batch = sharing.batch
    tables = block_tables(blocks(tokens, 2, head_dim, value_dim, dtype), sharing, group, spec)
    query = heads(batch, 2 * group, 1, head_dim, dtype)
    key, value, positions, at = own_keys(batch, 2, own, head_dim, value_dim, dtype, sum(tokens))
    of_sinks = torch.randn(2 * group, device=DEVICE).to(dtype) if sinks else None
    if slotted:
        how = {"positions": positions, "query_positions": at}
    else:
        shown = torch.arange(own, device=DEVICE) >= torch.randint(0, own, (batch, 1), device=DEVICE)
        how = {"visible": shown, "query_positions": torch.full_like(at, sum(tokens) + own - 1)}
    arguments = (query, key, value, tables, spec)
    found = shared_attention(*arguments, sinks=of_sinks, **how)
    expected = shared_attention_reference(*arguments, sinks=of_sinks, **how)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **tolerance(dtype))


def test_it_is_attention_to_the_path_and_the_own_keys_as_if_they_stood_in_one_cache():
    own = blocks([5, 9], 1, 64, 64)
    query, key, value = heads(2, 3, 1, 64), heads(2, 1, 4, 64), heads(2, 1, 4, 64)
    spec, sinks = LogitSpec(0.125), torch.randn(3, device=DEVICE)
    tables = block_tables(own, Sharing([(0, 1), (1,)], 2), 3, spec)
    out = shared_attention(query, key, value, tables, spec, sinks=sinks)
    keys, values = (torch.cat(parts, 1)[0] for parts in (own.keys, own.values))
    for row, tokens in ((0, 5), (1, 14)):
        seen, of_seen = torch.cat([keys[:tokens], key[row, 0]]), torch.cat([values[:tokens], value[row, 0]])
        logits = torch.cat([query[row, :, 0] @ seen.mT * 0.125, sinks[:, None]], -1)
        torch.testing.assert_close(out[row, :, 0], logits.softmax(-1)[:, :-1] @ of_seen)


def test_rows_that_see_no_block_attend_to_their_own_keys():
    query, key, value = heads(2, 4, 1, 64), heads(2, 2, 4, 64), heads(2, 2, 4, 64)
    spec, own = LogitSpec(0.125), blocks([40], 2, 64, 64)
    for rows in ((0,), ()):
        out = shared_attention(query, key, value, block_tables(own, Sharing([rows], 2), 2, spec), spec)
        logits = query[1].view(2, 2, 64) @ key[1].mT * 0.125
        torch.testing.assert_close(out[1], (logits.softmax(-1) @ value[1]).view(4, 1, 64))


def test_wrong_calls_are_refused():
    tables = block_tables(blocks([40], 2, 64, 64), Sharing([(0, 1)], 2), 2, LogitSpec(1.0))
    key = heads(2, 2, 4, 64)
    with pytest.raises(ValueError, match="one token per row"):
        shared_attention(heads(2, 4, 2, 64), key, key, tables, LogitSpec(1.0))
    with pytest.raises(ValueError, match="query_positions where there is a window"):
        shared_attention(heads(2, 4, 1, 64), key, key, tables, LogitSpec(1.0, window=4))


# docs: Whatever the tree, a decode step launches three kernels per layer
@pytest.mark.skipif(not HAS_TRITON, reason="launches are Triton's")
def test_a_step_takes_three_launches_whatever_the_tree_and_its_lengths():
    key = torch.empty(2, 5000, 64)
    with recording() as launches:
        for rows in ([range(6)], [(0, 1, 2), (3,), (0, 2), (1,)]):
            own = torch.empty(6, 2, 3000, 64)
            tables = block_tables(KeyBlocks([key] * len(rows), [key] * len(rows)), Sharing(rows, 6), 2, LogitSpec(1.0))
            shared_attention(torch.empty(6, 4, 1, 64), own, own, tables, LogitSpec(1.0), sinks=torch.empty(4))
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == ["_split_kernel", "_prefix_kernel", "_merge_stack_kernel"] * 2

import pytest
import torch

from kvcompress.kernels import packed_attention as module
from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.common import packed_pieces
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.packed_tile import tile_shape
from kvcompress.kernels.common.quantized import QuantScheme
from kvcompress.kernels.common.runtime import INTERPRETED, runs_triton
from kvcompress.kernels.packed_attention import packed_attention, packed_attention_reference
from kvcompress.kernels.quantise import dequantise
from tests.kernels.inputs import DEVICE, DTYPES, blocks, heads, packed_blocks, some_of, tolerance

# key bits, value bits, key group, value group, outliers, rank, group of heads, block, blocks, head_dim, options
CASES = [
    (2, 2, 64, 64, 0, 0, 1, 64, 5, 64, {}),
    (2, 2, 64, 64, 1, 4, 3, 64, 5, 64, {}),
    (2, 2, 16, 32, 2, 2, 4, 16, 9, 128, {"window": 60}),
    (3, 3, 64, 64, 1, 2, 3, 64, 3, 80, {}),
    (3, 3, 32, 16, 0, 0, 2, 8, 11, 64, {"softcap": 3.0}),
    (4, 4, 32, 64, 1, 0, 8, 64, 3, 96, {}),
    (4, 4, 128, 128, 0, 2, 2, 128, 2, 128, {"window": 100, "softcap": 5.0}),
    (8, 8, 64, 64, 1, 2, 1, 64, 3, 129, {}),
    (8, 8, 16, 32, 0, 0, 3, 16, 9, 64, {}),
    (4, 2, 64, 64, 1, 2, 3, 64, 3, 64, {"window": 90}),
    (2, 8, 16, 16, 0, 0, 2, 128, 2, 80, {}),
    (3, 4, 32, 64, 1, 2, 2, 16, 5, 64, {}),
    (8, 3, 64, 32, 0, 0, 2, 64, 2, 64, {}),
    (3, 2, 8, 8, 0, 0, 2, 8, 11, 16, {}),
    (4, 2, 64, 16, 0, 3, 2, 32, 3, 16, {}),
    (2, 3, 32, 32, 0, 0, 3, 16, 5, 32, {}),
    (2, 2, 64, 64, 0, 0, 3, 64, 5, 64, {"centred": True}),
    (2, 2, 128, 128, 0, 2, 2, 16, 9, 80, {"centred": True, "window": 60}),
    (3, 4, 128, 128, 0, 0, 2, 32, 5, 96, {"centred": True, "softcap": 3.0}),
    (4, 2, 64, 64, 0, 2, 4, 64, 3, 64, {"centred": True}),
]
# sums over 16, 32 and more numbers, of codes with and without outliers, are products that a GPU lays out differently
IN_16_BITS = [CASES[n] for n in (0, 1, 3, 4, 6, 8, 9, 10, 13, 14, 15, 16, 18)]


def ids(case):
    return "-".join(str(part) for part in case)


def scene(case, dtype=torch.float32, queries=1):
    """A row with all blocks and one that lacks the first; two spans; the arguments and the options."""
    key_bits, value_bits, key_group, value_group, outliers, rank, group, block, count, head_dim, options = case
    key_coding = QuantScheme(key_bits, key_group, "channel", outliers, rank)
    value_coding = QuantScheme(value_bits, value_group, "token", outliers, rank)
    options = dict(options)
    if options.pop("centred", False):
        key_coding = key_coding._replace(axis="token", zeros="block")
        value_coding = value_coding._replace(zeros="none")
    spans = torch.zeros(2, count, dtype=torch.int32, device=DEVICE)
    spans[:, (count + 1) // 2 :] = 1
    keys = packed_blocks(blocks(2, 2, count, block, head_dim, dtype) * 0.5, key_coding, spans)
    values = packed_blocks(blocks(2, 2, count, block, head_dim, dtype), value_coding, spans)
    tokens = count * block
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)
    positions[1, :, :block] = -1
    query_positions = torch.arange(tokens, tokens + queries, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    query = heads(2, 2 * group, queries, head_dim, dtype)
    arguments = (query, keys, values, key_coding, value_coding, positions, query_positions)
    return arguments, {"spec": LogitSpec(head_dim**-0.5, **options), "spans": spans if rank else None}


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_step_agrees_with_the_reference(case):
    arguments, options = scene(case)
    found = packed_attention(*arguments, **options, with_logits=True)
    expected = packed_attention_reference(*arguments, **options, with_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="what a GPU can launch is set by its registers")
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[5], CASES[11], CASES[17], CASES[18]], ids=ids)
def test_tiles_of_several_blocks_and_groups_agree_with_the_reference(case, monkeypatch):
    def tiles(rows, block, bits, *others):
        return 16, tile_shape(block, bits, 64), 4, 1

    monkeypatch.setattr(module, "_tiles", tiles)
    arguments, options = scene(case)
    found = packed_attention(*arguments, **options, with_logits=True)
    expected = packed_attention_reference(*arguments, **options, with_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@some_of({"case": IN_16_BITS, "dtype": DTYPES[1:]}, at_once=1)
def test_a_step_agrees_with_the_reference_in_16_bits(case, dtype):
    arguments, options = scene(case, dtype)
    out, lse, logits = packed_attention(*arguments, **options, with_logits=True)
    expected, expected_lse, expected_logits = packed_attention_reference(*arguments, **options, with_logits=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=tolerance(dtype)["atol"] * 2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits, expected_logits, rtol=2e-2, atol=tolerance(dtype)["atol"] * 4)


# tiles of 32 rows, and of 64
@some_of({"case": [CASES[4], CASES[13]], "dtype": DTYPES[1:], "queries": [9, 33]})
def test_several_queries_agree_with_the_reference_in_16_bits(case, dtype, queries):
    arguments, options = scene(case, dtype, queries)
    out, lse = packed_attention(*arguments, **options)
    expected, expected_lse = packed_attention_reference(*arguments, **options)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=tolerance(dtype)["atol"] * 2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)


# in the last, the rows of a KV head are two tiles
@pytest.mark.parametrize(("case", "queries"), [(CASES[1], 2), (CASES[2], 2), (CASES[6], 11), (CASES[17], 2)], ids=str)
def test_several_queries_agree_with_the_reference(case, queries):
    arguments, options = scene(case, queries=queries)
    found, expected = packed_attention(*arguments, **options), packed_attention_reference(*arguments, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(runs_triton(torch.empty(0, device=DEVICE)), reason="only the PyTorch path has pieces")
@pytest.mark.parametrize("piece", [2**11, 2**13])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("case", [2, 16, 18])
def test_the_size_of_the_pieces_changes_nothing(case, piece, queries, monkeypatch):
    arguments, options = scene(CASES[case], queries=queries)
    whole = packed_attention(*arguments, **options)
    monkeypatch.setattr(packed_pieces, "_PIECE", piece)
    # and of the queries whose logits are there at once
    monkeypatch.setattr(packed_pieces, "_LOGITS", piece)
    torch.testing.assert_close(packed_attention(*arguments, **options), whole, rtol=1e-4, atol=1e-5)


# one token's groups of 8, as slots have them
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_tokens_packed_one_by_one_agree_with_the_reference(head_dim, dtype):
    case = (3, 3, 8, 8, 0, 0, 2, 32, 3, head_dim, {})
    (query, _, values, _, coding, *rest), options = scene(case, dtype)
    keys = packed_blocks(blocks(2, 2, 3, 32, head_dim, dtype) * 0.5, coding)
    arguments = (query, keys, values, coding, coding, *rest)
    found = packed_attention(*arguments, **options, with_logits=True)
    expected = packed_attention_reference(*arguments, **options, with_logits=True)
    bounds = {"rtol": 1e-4, "atol": 1e-5}
    if dtype != torch.float32:
        bounds = {"rtol": 2e-2, "atol": tolerance(dtype)["atol"] * 4}
    torch.testing.assert_close(found, expected, **bounds)


@pytest.mark.parametrize("axes", [("token", "token"), ("channel", "channel"), ("token", "channel")])
def test_keys_and_values_may_be_packed_along_either_axis(axes):
    arguments, options = scene(CASES[9])
    query, _, _, *codings, positions, query_positions = arguments
    codings = [coding._replace(axis=axis, group=32) for coding, axis in zip(codings, axes, strict=True)]
    packed = [packed_blocks(blocks(2, 2, 3, 64, 64), coding, options["spans"]) for coding in codings]
    arguments = (query, *packed, *codings, positions, query_positions)
    found, expected = packed_attention(*arguments, **options), packed_attention_reference(*arguments, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_is_attention_to_the_decoded_tensors():
    (query, keys, values, *codings, positions, query_positions), options = scene((*CASES[9][:-1], {}))
    key, value = (
        dequantise(packed, coding, torch.float64, options["spans"]).flatten(2, 3)
        for packed, coding in ((keys, codings[0]), (values, codings[1]))
    )
    bias = torch.zeros(2, 1, 1, key.shape[2], dtype=torch.float64, device=DEVICE)
    bias.masked_fill_(positions[:, :, None] < 0, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key, value, bias, scale=options["spec"].scale, enable_gqa=True
    )
    out, _ = packed_attention(query, keys, values, *codings, positions, query_positions, **options)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)


def test_float64_queries_stay_float64():
    arguments, options = scene(CASES[3])
    arguments = (arguments[0].double(), *arguments[1:])
    out, lse = packed_attention(*arguments, **options)
    expected, expected_lse = packed_attention_reference(*arguments, **options)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_positions_of_each_head_and_queries_without_a_token():
    arguments, options = scene(CASES[1], queries=2)
    *arguments, positions, query_positions = arguments
    positions = positions.repeat(1, 2, 1)
    positions[0, 1, 7:200] = -1
    # the second row sees nothing, its first head lacks all and the other stands outside of the window
    positions[1, 0] = -1
    query_positions[1] += 1000
    options["spec"] = options["spec"]._replace(window=320)
    found = packed_attention(*arguments, positions, query_positions, **options)
    expected = packed_attention_reference(*arguments, positions, query_positions, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found[0][1].any()
    assert (found[1][1] == -torch.inf).all()


def test_absent_blocks_leave_no_trace():
    (query, keys, values, *rest), options = scene((*CASES[9][:-1], {}))
    whole = packed_attention(query, keys, values, *rest, **options)
    for packed in (keys, values):
        packed.codes[1, :, 0] = 255
        packed.scales[1, :, 0] = 100.0
        packed.outlier_values[1, :, 0] = 1000.0
    for part, other in zip(packed_attention(query, keys, values, *rest, **options), whole, strict=True):
        assert (part == other).all()


def test_nothing_stored_is_nothing_seen():
    arguments, options = scene(CASES[0])
    query, keys, values, *codings, positions, query_positions = arguments
    keys, values = (type(p)(*(None if t is None else t[:, :, :0] for t in p)) for p in (keys, values))
    out, lse = packed_attention(query, keys, values, *codings, positions[..., :0], query_positions, **options)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_what_does_not_fit_is_refused():
    (query, keys, values, *rest), options = scene(CASES[1])
    with pytest.raises(ValueError, match=r"got query \[2, 5, 1, 64\]"):
        packed_attention(query[:, :5], keys, values, *rest, **options)
    with pytest.raises(ValueError, match=r"positions \[2, 1, 319\]"):
        packed_attention(query, keys, values, *rest[:2], rest[2][..., 1:], rest[3], **options)
    arguments, options = scene(CASES[1], queries=2)
    with pytest.raises(ValueError, match="logits of one query"):
        packed_attention(*arguments, **options, with_logits=True)


@some_of({"queries": [1, 3], "case": CASES[:6], "where": ["query", "key", "every key", "value"]})
def test_nan_comes_through(where, case, queries):
    (query, keys, values, *rest), options = scene(case, queries=queries)
    if where == "query":
        query[0, 0, -1, 2] = torch.nan
    elif where == "value":
        values.zeros[0, 0, -1] = torch.nan
    else:
        keys.zeros[0, 0, -1 if where == "key" else slice(None), :, 3] = torch.nan
    options["with_logits"] = queries == 1
    found = packed_attention(query, keys, values, *rest, **options)
    expected = packed_attention_reference(query, keys, values, *rest, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert expected[0].isnan().any()
    assert expected[0][1].isfinite().all()


# one query and several, with a bound of the logits and without, and more rows than a tile has
@pytest.mark.parametrize(
    ("case", "queries"), [(CASES[2], 1), (CASES[4], 1), (CASES[4], 5), (CASES[6], 11), (CASES[9], 3)], ids=str
)
def test_an_offset_of_a_query_is_added_to_its_products(case, queries):
    arguments, options = scene(case, queries=queries)
    query, keys, values, key_coding, value_coding, positions, query_positions = arguments
    centre = heads(2, 2, 1, query.shape[-1]) * 2
    offsets = (query.unflatten(1, (2, -1)) * centre[:, :, None]).sum(-1).flatten(1, 2)
    options |= {"offsets": offsets, "with_logits": queries == 1}
    found, expected = packed_attention(*arguments, **options), packed_attention_reference(*arguments, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # as if every key had it
    key, value = (
        dequantise(packed, coding, torch.float64, options["spans"]).flatten(2, 3)
        for packed, coding in ((keys, key_coding), (values, value_coding))
    )
    out, lse = slot_attention(
        query.double(), key + centre, value, positions.expand(-1, 2, -1).contiguous(), query_positions, options["spec"]
    )
    torch.testing.assert_close(found[0].double(), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].double(), lse.double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"offsets \[batch, heads, queries\]"):
        packed_attention(*arguments, **options | {"offsets": offsets[..., :0]})


@pytest.mark.skipif(not INTERPRETED, reason="only the kernel has products with means at hand")
def test_queries_are_taken_in_parts_where_their_products_with_means_are_many(monkeypatch):
    arguments, options = scene(CASES[17], queries=5)
    whole = packed_attention(*arguments, **options)
    monkeypatch.setattr(module, "_MEANS", 2 * 2 * 2 * 9 * 2)
    torch.testing.assert_close(packed_attention(*arguments, **options), whole)


def test_values_around_the_mean_of_a_block_are_refused():
    arguments, options = scene(CASES[16])
    query, keys, _, key_coding, *others = arguments
    with pytest.raises(ValueError, match="only keys are packed around the mean of a block"):
        packed_attention(query, keys, keys, key_coding, key_coding, *others[1:], **options)

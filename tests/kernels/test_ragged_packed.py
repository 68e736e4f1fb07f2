import pytest
import torch

from kvcompress.kernels.common import packed_rows
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.packed_rows import takes_rows
from kvcompress.kernels.common.quantized import QuantScheme
from kvcompress.kernels.common.runtime import runs_triton
from kvcompress.kernels.common.split_attention import Extents
from kvcompress.kernels.packed_attention import packed_attention_reference
from kvcompress.kernels.ragged_packed import ragged_packed_attention, ragged_packed_attention_reference
from kvcompress.storage.ragged_packed import BLOCK, RaggedPackedSlots
from kvcompress.storage.segment import EMPTY
from tests.kernels.inputs import DEVICE, heads, packed_blocks

needs_kernel = pytest.mark.skipif(not runs_triton(torch.empty(0, device=DEVICE)), reason="needs a kernel")

# bits, group, outliers, heads of a group, queries, head_dim, options
CASES = [
    (4, 64, 0, 4, 1, 64, {}),
    (3, 64, 0, 3, 1, 128, {"window": 900}),
    (2, 32, 0, 2, 5, 64, {"window": 700, "softcap": 5.0}),
    (4, 64, 1, 3, 1, 80, {"softcap": 5.0}),
    (8, 64, 0, 2, 3, 64, {}),
]


def ragged(case, dtype=torch.float32, block=BLOCK, lengths=((64, 16), (32, 608))):
    """Arguments of ragged_packed_attention up to the spec; heads lie in no order, and one is all empty."""
    bits, group_size, outliers, group, queries, head_dim, options = case
    capacities = torch.tensor(lengths, device=DEVICE)
    order = torch.randperm(capacities.numel(), device=DEVICE)
    sizes = capacities.flatten()[order]
    starts = torch.empty_like(order)
    starts[order] = sizes.cumsum(0) - sizes
    slots, (batch, kv_heads) = int(capacities.max()), capacities.shape
    coding = QuantScheme(bits, group_size, "token", outliers)
    keys, values = (
        packed_blocks(torch.randn(1, 1, int(sizes.sum()) // block, block, head_dim, device=DEVICE).to(dtype), coding)
        for _ in range(2)
    )
    positions = torch.rand(batch, kv_heads, 2 * slots, device=DEVICE).argsort(-1)[..., :slots].int()
    positions[torch.rand(positions.shape, device=DEVICE) > 0.8] = EMPTY
    positions[0, 0] = EMPTY
    query = heads(batch, kv_heads * group, queries, head_dim, dtype)
    at = (2 * slots + torch.arange(batch * queries, device=DEVICE).view(batch, queries)).int()
    spec = LogitSpec(head_dim**-0.5, **options)
    return query, keys, values, coding, Extents(starts.view_as(capacities), capacities), positions, at, spec


def options_of(arguments):
    query, slots = arguments[0], arguments[1].codes.shape[2] * BLOCK
    offsets, bias = torch.randn(query.shape[:3], device=DEVICE), 3 * torch.randn(slots, device=DEVICE)
    return {"offsets": offsets, "bias": bias, "with_logits": query.shape[2] == 1}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_agrees_with_the_reference(case, plain):
    arguments = ragged(case)
    options = {"with_logits": case[4] == 1} if plain else options_of(arguments)
    found = ragged_packed_attention(*arguments, **options)
    expected = ragged_packed_attention_reference(*arguments, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[1][0, : case[3]].eq(-torch.inf).all()
    assert found[0][0, : case[3]].eq(0).all()


@needs_kernel
@pytest.mark.parametrize("cores", [1, 2**20])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_few_rows_of_16_bits_agree_with_the_reference(case, cores, monkeypatch):
    """In one part, and in as many as there are tiles."""
    monkeypatch.setattr(packed_rows, "resident_programs", lambda warps, device: cores)
    arguments = ragged(case, torch.bfloat16)
    assert takes_rows(*arguments[:4], arguments[3], 2)
    options = options_of(arguments)
    found = ragged_packed_attention(*arguments, **options)
    expected = ragged_packed_attention_reference(arguments[0].double(), *arguments[1:], **options)
    assert torch.linalg.vector_norm(found[0].double() - expected[0]) < 1.5e-2 * torch.linalg.vector_norm(expected[0])
    for part, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(part.double(), wanted.double(), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_of_other_heads_do_not_matter(dtype):
    arguments = ragged(CASES[0], dtype)
    before = ragged_packed_attention(*arguments, with_logits=True)
    extents = arguments[4]
    first, count = (int(x[1, 0]) // BLOCK for x in extents)
    for packed in arguments[1:3]:
        packed.scales[0, 0, first : first + count] = torch.nan
    after = ragged_packed_attention(*arguments, with_logits=True)
    for found, of_before in zip(after, before, strict=True):
        torch.testing.assert_close([found[0], found[1, 4:]], [of_before[0], of_before[1, 4:]])
    assert after[0][1, :4].isnan().all()


def test_heads_of_equal_length_give_what_one_tensor_of_them_gives():
    query, keys, values, coding, extents, positions, at, spec = ragged(CASES[0], lengths=((64, 64), (64, 64)))
    index = extents.starts[..., None] // BLOCK + torch.arange(4, device=DEVICE)
    key, value = (x._make(None if part is None else part[0, 0][index] for part in x) for x in (keys, values))
    uniform = packed_attention_reference(query, key, value, coding, coding, positions, at, spec)
    torch.testing.assert_close(
        ragged_packed_attention(query, keys, values, coding, extents, positions, at, spec), uniform
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rotates", [False, True])
def test_slots_of_a_cache_attend_to_what_they_decode_to(bits, rotates):
    coding = QuantScheme(bits, 64, "token", 1 if bits == 3 else 0)
    key, value, at = heads(2, 2, 40, 64), heads(2, 2, 40, 64), torch.tensor([[40], [40]], device=DEVICE).int()
    key += 5 * (torch.arange(64, device=DEVICE) == 7)
    places = torch.arange(40, device=DEVICE).int().expand(2, 2, -1)
    slots = RaggedPackedSlots(key, value, 1, coding, rotates, has_bias=True)
    kept = torch.rand(2, 2, 40, device=DEVICE) < torch.tensor([[[0.1], [0.9]], [[0.5], [1.0]]], device=DEVICE)
    kept = torch.cat([kept.new_zeros(2, 2, BLOCK), kept], -1)
    slots.refill(key, value, places, torch.zeros(kept.shape, device=DEVICE), kept, kept.sum(-1).cpu() + 1)
    assert (slots.capacities % BLOCK == 0).all()
    assert slots.contents()[0].shape == (2, 2, int(slots.capacities.max()), 64)
    query, spec = heads(2, 4, 1, 64), LogitSpec(0.125)
    slots.weigh(torch.randn(slots.positions.shape, device=DEVICE))

    def expected(query):
        rows = query.double().unflatten(1, (2, 2))
        keys, values = (x.double() for x in slots.contents())
        logits = rows @ keys[:, :, None].mT * spec.scale + slots.bias.double()[:, :, None, None]
        logits = logits.masked_fill((slots.positions == EMPTY)[:, :, None, None], -torch.inf)
        return (logits.softmax(-1) @ values[:, :, None]).flatten(1, 2), logits.logsumexp(-1).flatten(1, 2)

    for queries in (query, heads(2, 4, 3, 64)):
        found = slots.attend(queries, at[:1].expand(1, queries.shape[2]), spec)
        wanted = expected(queries)
        torch.testing.assert_close([x.double() for x in found], [*wanted], rtol=1e-4, atol=1e-4)

    # a token that is written alone is what it is where many are
    held = [x.clone() for x in slots.contents()]
    slots.log_weights = None
    spare = slots.spare.clone()
    slots.decode(query, key[:, :, :1], value[:, :, :1], at[:, 0], at[:1], spec)
    written = slots.contents()
    alone = RaggedPackedSlots(key, value, 1, coding, rotates)
    alone.centre, alone.spread = slots.centre, slots.spread
    stays = torch.cat([kept.new_zeros(2, 2, BLOCK), kept.new_ones(2, 2, 1)], -1)
    # it has learnt already
    alone._learn = lambda *args: None
    alone.refill(
        key[:, :, :1], value[:, :, :1], places[..., :1], torch.zeros(stays.shape, device=DEVICE), stays,
        torch.ones(2, 2, dtype=torch.int64),
    )  # fmt: skip
    for side in range(2):
        wanted = held[side].scatter(2, spare[..., None, None].expand(-1, -1, 1, 64), alone.contents()[side][:, :, :1])
        torch.testing.assert_close(written[side], wanted)


@pytest.mark.parametrize("rotates", [False, True])
def test_slots_hold_what_they_were_given(rotates):
    """Channels far from the others are centred, and `as_held` tells what the keys will be."""
    key, value = heads(2, 2, 48, 64), heads(2, 2, 48, 64)
    key += 80 * (torch.arange(64, device=DEVICE) == 7)
    places = torch.arange(48, device=DEVICE).int().expand(2, 2, -1)
    slots = RaggedPackedSlots(key, value, 1, QuantScheme(8, 64, "token"), rotates)
    told = slots.as_held(key, places)
    kept = torch.rand(2, 2, 48, device=DEVICE) < torch.tensor([[[0.1], [0.9]], [[0.5], [1.0]]], device=DEVICE)
    kept = torch.cat([kept.new_zeros(2, 2, BLOCK), kept], -1)
    slots.refill(key, value, places, torch.zeros(kept.shape, device=DEVICE), kept, kept.sum(-1).cpu() + 1)
    there = slots.positions != EMPTY
    at = slots.positions.clamp(min=0).long()[..., None].expand(-1, -1, -1, 64)
    keys, values = slots.contents()
    assert torch.equal(keys[there], told.gather(2, at)[there])
    for held, given in ((keys, key), (values, value)):
        error = (held - given.gather(2, at))[there]
        # of numbers that are about 1 large, without the channel that stands out
        assert error.square().mean() < 0.02**2
    assert int(there.sum()) == int(kept.sum())


def test_mismatched_shapes_are_named_in_the_error():
    query, keys, values, coding, extents, positions, at, spec = ragged(CASES[0])
    bias, several, by_channel = torch.zeros(719), query.expand(-1, -1, 3, -1), coding._replace(axis="channel")
    with pytest.raises(ValueError, match=r"a multiple of block.*positions \[2, 2, 600\]"):
        ragged_packed_attention(query, keys, values, coding, extents, positions[..., :600], at, spec)
    with pytest.raises(ValueError, match=r"bias \[719\]"):
        ragged_packed_attention(query, keys, values, coding, extents, positions, at, spec, bias=bias)
    with pytest.raises(ValueError, match="packed a token at a time"):
        ragged_packed_attention(query, keys, values, by_channel, extents, positions, at, spec)
    with pytest.raises(ValueError, match="logits of one query"):
        ragged_packed_attention(several, keys, values, coding, extents, positions, at, spec, with_logits=True)

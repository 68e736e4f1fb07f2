import pytest
import torch

from kvcompress.kernels.attention import slot_attention, slot_attention_reference
from kvcompress.kernels.common import split_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import recording, shaped
from kvcompress.kernels.common.split_attention import Extents
from kvcompress.kernels.decode import decode_attention, decode_attention_reference
from kvcompress.kernels.ragged import (
    ragged_attention,
    ragged_attention_reference,
    ragged_decode_attention,
    ragged_decode_attention_reference,
)
from kvcompress.storage.ragged import RaggedSlots
from tests.kernels.inputs import DEVICE, DTYPES, heads, tolerance

# the slots of two heads of two rows, the longest ten times the shortest
LENGTHS = ((60, 6), (17, 600))


def ragged(group, queries, head_dim, value_dim, dtype=torch.float32, lengths=LENGTHS):
    """Arguments of ragged_attention up to the queries' positions; heads lie in no order, and one is all empty."""
    capacities = torch.tensor(lengths, device=DEVICE)
    order = torch.randperm(capacities.numel(), device=DEVICE)
    sizes = capacities.flatten()[order]
    starts = torch.empty_like(order)
    starts[order] = sizes.cumsum(0) - sizes
    slots, (batch, kv_heads) = int(capacities.max()), capacities.shape
    key, value = (torch.randn(int(sizes.sum()), dim, device=DEVICE).to(dtype) for dim in (head_dim, value_dim))
    positions = torch.rand(batch, kv_heads, 2 * slots, device=DEVICE).argsort(-1)[..., :slots].int()
    positions[torch.rand(positions.shape, device=DEVICE) > 0.8] = -1
    positions[0, 0] = -1
    query = heads(batch, kv_heads * group, queries, head_dim, dtype)
    at = (2 * slots + torch.arange(batch * queries, device=DEVICE).view(batch, queries)).int()
    return query, key, value, Extents(starts.view_as(capacities), capacities), positions, at


# group, queries, head_dim, value_dim, options; positions and biases are noise from a head's capacity on
CASES = [
    (1, 1, 64, 64, {}),
    (3, 3, 80, 129, {"window": 900}),
    (4, 20, 64, 96, {}),
    (2, 1, 96, 64, {"window": 700, "softcap": 5.0}),
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("group", "queries", "head_dim", "value_dim", "options"), CASES, ids=str)
def test_attention_to_ragged_slots_agrees_with_the_reference(group, queries, head_dim, value_dim, options, biased):
    arguments = (*ragged(group, queries, head_dim, value_dim), LogitSpec(head_dim**-0.5, **options))
    bias = 3 * torch.randn(len(arguments[1]), device=DEVICE) if biased else None
    out, lse = ragged_attention(*arguments, bias)
    torch.testing.assert_close((out, lse), ragged_attention_reference(*arguments, bias), rtol=1e-5, atol=1e-5)
    assert lse[0, :group].eq(-torch.inf).all()
    assert out[0, :group].eq(0).all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("group", "head_dim", "value_dim", "options"), [(g, d, v, o) for g, _, d, v, o in CASES])
def test_a_step_over_ragged_slots_agrees_with_the_reference(group, head_dim, value_dim, options, sinks):
    arguments = (*ragged(group, 1, head_dim, value_dim), LogitSpec(head_dim**-0.5, **options))
    sink_logits = torch.linspace(-1.0, 4.0, 2 * group, device=DEVICE) if sinks else None
    found = ragged_decode_attention(*arguments, sink_logits)
    torch.testing.assert_close(found, ragged_decode_attention_reference(*arguments, sink_logits))
    beyond = torch.arange(600, device=DEVICE) >= arguments[3].capacities[..., None]
    assert found[1][beyond].eq(0).all()


@pytest.mark.parametrize("cores", [1, 100])
@pytest.mark.parametrize("lengths", [((32, 64), (0, 33)), ((96, 31), (1, 128))], ids=str)
def test_heads_may_end_anywhere_in_a_tile(lengths, cores, monkeypatch):
    """Of 32 slots, in one part and in as many as tiles: a head has parts that are whole, short and empty."""
    monkeypatch.setattr(split_attention, "core_count", lambda device: cores)
    for queries in (1, 12):
        arguments = (*ragged(3, queries, 64, 64, lengths=lengths), LogitSpec(0.125))
        torch.testing.assert_close(ragged_attention(*arguments), ragged_attention_reference(*arguments))
    arguments = (*ragged(3, 1, 64, 64, lengths=lengths), LogitSpec(0.125))
    torch.testing.assert_close(ragged_decode_attention(*arguments), ragged_decode_attention_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_ragged_slots_in_16_bits_agree_with_the_reference(dtype):
    arguments = (*ragged(3, 1, 64, 64, dtype), LogitSpec(0.125))
    out, lse = ragged_attention(*arguments)
    expected, expected_lse = ragged_attention_reference(*arguments)
    torch.testing.assert_close(out, expected, **tolerance(dtype))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
    out, received = ragged_decode_attention(*arguments)
    torch.testing.assert_close(out, expected, **tolerance(dtype))
    torch.testing.assert_close(received, ragged_decode_attention_reference(*arguments)[1])


def test_heads_of_equal_length_give_what_one_tensor_of_them_gives():
    query, key, value, extents, positions, at = ragged(2, 1, 64, 64, lengths=((70, 70), (70, 70)))
    index = extents.starts[..., None] + torch.arange(70, device=DEVICE)
    spec = LogitSpec(0.125)
    uniform = (query, key[index], value[index], positions, at, spec)
    given = (query, key, value, extents, positions, at, spec)
    torch.testing.assert_close(ragged_attention(*given), slot_attention(*uniform))
    torch.testing.assert_close(ragged_decode_attention(*given), decode_attention(*uniform))


def test_slots_of_other_heads_do_not_matter():
    arguments = (*ragged(2, 1, 64, 64), LogitSpec(0.125))
    before = ragged_attention(*arguments), ragged_decode_attention(*arguments)
    extents = arguments[3]
    start, capacity = extents.starts[1, 0], extents.capacities[1, 0]
    for stored in arguments[1:3]:
        stored[start : start + capacity] = torch.nan
    after = ragged_attention(*arguments), ragged_decode_attention(*arguments)
    for found, of_before in zip(after, before, strict=True):
        assert found[0][1, :2].isnan().all()
        torch.testing.assert_close([found[0][0], found[0][1, 2:]], [of_before[0][0], of_before[0][1, 2:]])
        torch.testing.assert_close(found[1][0], of_before[1][0])


def test_parts_are_as_long_as_those_of_the_average_head():
    uniform = split_attention.even_parts(32, 4096, 4096, 64, 264)
    assert split_attention.even_parts(32, 4096, 4 * 4096, 64, 264) == (4 * uniform[0], uniform[1])
    # so long a head that its parts would be too many
    splits, part = split_attention.even_parts(32, 256, 2**20, 64, 264)
    assert (splits, part) == (split_attention.MOST_SPLITS, 2**20 // split_attention.MOST_SPLITS)


def test_a_head_without_slots_gives_nothing():
    query, key, value, extents, positions, at = ragged(2, 1, 64, 64)
    none = extents._replace(capacities=torch.zeros_like(extents.capacities))
    out, lse = ragged_attention(query, key, value, none, positions, at, LogitSpec(0.125))
    assert lse.eq(-torch.inf).all()
    assert out.eq(0).all()


def test_ragged_slots_of_a_cache_give_what_slots_as_wide_as_the_longest_give():
    key, value, at = heads(2, 2, 20, 64), heads(2, 2, 20, 64), torch.tensor([[20], [20]], device=DEVICE).int()
    places = torch.arange(20, device=DEVICE).int().expand(2, 2, -1)
    slots = RaggedSlots(key, value, 1)
    kept = torch.rand(2, 2, 21, device=DEVICE) < torch.tensor([[[0.2], [0.9]], [[0.5], [1.0]]], device=DEVICE)
    kept[..., 0] = False
    slots.refill(key, value, places, torch.zeros(2, 2, 21, device=DEVICE), kept, kept.sum(-1).cpu() + 1)
    query, spec, sinks = heads(2, 4, 1, 64), LogitSpec(0.125), torch.linspace(-1.0, 4.0, 4, device=DEVICE)
    for bias in (None, torch.randn(slots.positions.shape, device=DEVICE)):
        slots.log_weights = None
        if bias is not None:
            slots.weigh(bias)
        expected = slot_attention_reference(query, *slots.contents(), slots.positions, at, spec, bias)
        torch.testing.assert_close(slots.attend(query, at[:1], spec), expected)
    slots.log_weights = None
    found = slots.decode(query, key[:, :, :1], value[:, :, :1], at[:, 0], at[:1], spec, sinks)
    padded = (*slots.contents(), slots.positions, at, spec)
    torch.testing.assert_close(found, decode_attention_reference(query, *padded, sinks))


def test_ragged_heads_take_as_many_launches_as_uniform_ones():
    query, key, positions = shaped(2, 4, 1, 64), shaped(700, 64), shaped(2, 2, 600, dtype=torch.int32)
    extents = Extents(*(shaped(2, 2, dtype=torch.int64) for _ in range(2)))
    at, sinks = shaped(2, 1, dtype=torch.int32), shaped(4)
    with recording() as launches:
        ragged_decode_attention(query, key, key, extents, positions, at, LogitSpec(0.1), sinks)
    assert [launch.kernel.__name__ for launch in launches] == ["_split_kernel", "_finish_kernel"]


def test_mismatched_ragged_shapes_are_named_in_the_error():
    query, key, value, extents, positions, at = ragged(2, 1, 64, 64)
    with pytest.raises(ValueError, match=r"heads a multiple of kv_heads; got query \[2, 4, 1, 64\], key \[683, 63\]"):
        ragged_attention(query, key[:, 1:], value, extents, positions, at, LogitSpec(1.0))
    with pytest.raises(ValueError, match=r"one query per sequence, got query \[2, 4, 2, 64\]"):
        ragged_decode_attention(query.expand(-1, -1, 2, -1), key, value, extents, positions, at, LogitSpec(1.0))


def test_log_weights_of_older_files_are_as_wide_as_the_longest_head():
    key, places = heads(2, 2, 9, 64), torch.arange(9, device=DEVICE).int().expand(2, 2, -1)
    slots = RaggedSlots(key, key, 1, has_bias=True)
    kept = torch.rand(2, 2, 10, device=DEVICE) < torch.tensor([[[0.3], [0.9]], [[0.5], [1.0]]], device=DEVICE)
    kept[..., 0] = False
    slots.refill(key, key, places, torch.zeros(2, 2, 10, device=DEVICE), kept, kept.sum(-1).cpu().clamp(min=1))
    slots.weigh(torch.randn(slots.positions.shape, device=DEVICE))
    saved, _ = slots.dump()
    older = {name: tensor for name, tensor in saved.items() if name != "log_weights"} | {"bias": slots.bias}
    assert torch.equal(RaggedSlots.load(older).log_weights, saved["log_weights"])

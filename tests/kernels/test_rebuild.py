import pytest
import torch

from kvcompress.kernels.fill import FoldedChunks, Rotation, fill_buffer
from kvcompress.kernels.rebuild import rebuild_keys_reference
from kvcompress.storage.rope import Rope
from tests.kernels.inputs import DEVICE, DTYPES, needs_triton, tolerance

# chunk, rank, head_dim, rotary_dim (0: none), interleaved
CASES = [
    (8, 30, 64, 64, False),
    (8, 48, 80, 20, False),
    (1, 7, 96, 96, True),
    (5, 33, 129, 64, True),
    (32, 64, 128, 128, False),
    (64, 16, 64, 32, False),
    (8, 20, 64, 0, False),
    (3, 1, 20, 10, True),
]
SLOTS = 11


def scene(chunk, rank, head_dim, rotary_dim, interleaved, dtype=torch.float32):
    torch.manual_seed(0)
    chunks, kv_heads = 29, 3
    # a view into a larger buffer, whose other places must stay as they are
    buffer = torch.full((2, kv_heads, SLOTS * chunk + 5, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    coefficients = torch.randn(2, chunks * chunk, rank, device=DEVICE).to(dtype)
    basis = (torch.randn(2, rank, kv_heads * head_dim, device=DEVICE) / rank**0.5).to(dtype)
    held = torch.rand(2, kv_heads, chunks, device=DEVICE).argsort(-1)[..., :SLOTS]
    is_new = torch.rand(2, kv_heads, SLOTS, device=DEVICE) < 0.5
    is_new[0, 0], is_new[1, 1] = False, True
    inv_freq = 1.0 / 10000 ** (torch.arange(rotary_dim // 2, device=DEVICE) * 2 / max(rotary_dim, 1))
    rope = (inv_freq, 1.3, interleaved) if rotary_dim else (None, 1.0, False)
    return buffer, (coefficients, basis, held, is_new, *rope)


def rebuild(keys, coefficients, basis, held, is_new, *rope):
    """The keys that fill_buffer writes."""
    batch, kv_heads, slots = held.shape
    chunk = keys.shape[2] // slots
    slab = torch.zeros(1, kv_heads, chunk, 16, dtype=keys.dtype)
    slab = slab.pin_memory() if DEVICE.type == "cuda" else slab
    pages = torch.zeros(batch, int(held.max()) + 1, dtype=torch.int64, device=DEVICE)
    addresses = torch.tensor([slab.data_ptr()], device=DEVICE)
    values = torch.zeros(batch, kv_heads, slots * chunk, 16, dtype=keys.dtype, device=DEVICE)
    positions = torch.zeros(batch, kv_heads, slots * chunk, dtype=torch.int32, device=DEVICE)
    folded = FoldedChunks(coefficients, basis, pages, addresses, [slab])
    marks = torch.zeros(batch, 3, dtype=torch.int64, device=DEVICE)
    fill_buffer(keys, values, positions, marks, held, is_new, folded, Rotation(*rope), chunk, 0)


def whole(chunk, coefficients, basis, held, is_new, inv_freq, scaling, interleaved):
    """Every slot's keys by the formula, head by head, with the rotary embedding of the caches."""
    keys = []
    for row in range(2):
        for head in range(held.shape[1]):
            head_dim = basis.shape[2] // held.shape[1]
            places = (held[row, head][:, None] * chunk + torch.arange(chunk, device=DEVICE)).flatten()
            key = coefficients[row, places].float() @ basis[row, :, head * head_dim : (head + 1) * head_dim].float()
            if inv_freq is not None:
                key = Rope(inv_freq, scaling, interleaved).rotate(key, places)
            keys.append(key)
    return torch.stack(keys).unflatten(0, (2, -1))


@pytest.mark.parametrize(("chunk", "rank", "head_dim", "rotary_dim", "interleaved"), CASES, ids=str)
def test_new_keys_are_the_formula_and_their_rotation(chunk, rank, head_dim, rotary_dim, interleaved):
    buffer, arguments = scene(chunk, rank, head_dim, rotary_dim, interleaved)
    rebuild(buffer[:, :, : SLOTS * chunk], *arguments)
    is_new = arguments[3].repeat_interleave(chunk, 2)
    # angles of some hundred radians, of which float32 knows seven digits
    torch.testing.assert_close(
        buffer[:, :, : SLOTS * chunk][is_new], whole(chunk, *arguments)[is_new], rtol=1e-4, atol=1e-4
    )
    assert buffer[:, :, SLOTS * chunk :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_new_keys_agree_with_the_reference_in_16_bits(dtype):
    buffer, arguments = scene(8, 30, 64, 64, False, dtype)
    other = buffer.clone()
    rebuild(buffer[:, :, : SLOTS * 8], *arguments)
    rebuild_keys_reference(other[:, :, : SLOTS * 8], *arguments)
    is_new = arguments[3].repeat_interleave(8, 2)
    torch.testing.assert_close(buffer[:, :, :88][is_new], other[:, :, :88][is_new], **tolerance(dtype))


@needs_triton
def test_slots_that_are_not_new_are_not_written():
    buffer, arguments = scene(8, 30, 64, 64, False)
    rebuild(buffer[:, :, : SLOTS * 8], *arguments)
    assert buffer[:, :, : SLOTS * 8][~arguments[3].repeat_interleave(8, 2)].isnan().all()


def test_a_slot_that_is_written_again_stays_what_it_was():
    """What the PyTorch path writes beside the new slots is what stands there."""
    buffer, (coefficients, basis, held, is_new, *rope) = scene(8, 30, 64, 64, False)
    view = buffer[:, :, : SLOTS * 8]
    rebuild(view, coefficients, basis, held, torch.ones_like(is_new), *rope)
    before = view.clone()
    rebuild(view, coefficients, basis, held, is_new, *rope)
    torch.testing.assert_close(view, before)


def test_far_places_turn_as_near_ones_do():
    """A key of one coefficient, at places up to 131072: cosine and sine stay good where the angle is large."""
    chunk, chunks = 8, 2**14
    coefficients = torch.ones(1, chunk * chunks, 1, device=DEVICE)
    basis = torch.tensor([[[1.0] * 8 + [0.0] * 8]], device=DEVICE)
    held = torch.tensor([[[0, 1, 500, 4095, 12345, chunks - 1]]], device=DEVICE)
    # as in the models, and some that turn by about a quarter a place
    inv_freq = torch.tensor([1.0, 0.5, 0.1, 1.5707964, 1e-3, 3.1415927, 0.7853982, 1e-6], device=DEVICE)
    keys = torch.empty(1, 1, 6 * chunk, 16, device=DEVICE)
    rebuild(keys, coefficients, basis, held, torch.ones_like(held, dtype=torch.bool), inv_freq)
    places = (held[0, 0][:, None] * chunk + torch.arange(chunk, device=DEVICE)).flatten()
    angles = (places[:, None].float() * inv_freq).double()
    expected = torch.cat([angles.cos(), angles.sin()], -1).float()
    torch.testing.assert_close(keys[0, 0], expected, rtol=0.0, atol=1e-6)

import pytest
import torch

from kvcompress.kernels import decode_evict
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.decode_evict import Slots, decode_and_evict, decode_and_evict_reference
from tests.kernels.inputs import DEVICE, heads, needs_triton, some_of, tolerance


class State:
    """Slots half full, and tokens to come; rows differ in their limits and recent windows."""

    def __init__(self, batch, kv_heads, slots, head_dim, value_dim, dtype):
        filled = slots // 2
        order = torch.rand(batch, kv_heads, slots, device=DEVICE).argsort(-1)
        self.keys = heads(batch, kv_heads, slots, head_dim, dtype).contiguous()
        self.values = heads(batch, kv_heads, slots, value_dim, dtype).contiguous()
        self.positions = torch.where(order < filled, order, -1).int()
        self.scores = torch.rand(batch, kv_heads, slots, device=DEVICE)
        self.spare = self.positions.argmin(-1)
        self.length = filled
        self.limits = torch.tensor([filled, filled + 2], dtype=torch.int32, device=DEVICE)[:batch]
        self.recents = torch.tensor([1, 3], dtype=torch.int32, device=DEVICE)[:batch]

    def slots(self):
        return Slots(self.keys, self.values, self.positions, self.scores, self.spare)

    def clone(self):
        other = object.__new__(State)
        other.__dict__ = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in self.__dict__.items()}
        return other

    def step(self, function, query, key, value, token, window=None, softcap=None, **options):
        spec = LogitSpec(key.shape[-1] ** -0.5, window, softcap)
        return function(query, key, value, self.slots(), token, self.limits, self.recents, spec, **options)


CASES = [
    (1, 6, 64, 64, {}),
    (2, 60, 64, 64, {}),
    (3, 70, 80, 129, {"window": 30, "softcap": 3.0, "sinks": 2}),
    (2, 300, 64, 64, {"memory": 0.75, "sinks": 4}),
    (2, 60, 64, 64, {"sink_logits": torch.linspace(-1.0, 4.0, 4, device=DEVICE)}),
]


# the PyTorch path multiplies in 16 bits, which can change a victim
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_triton)], ids=str)
@pytest.mark.parametrize(("group", "slots", "head_dim", "value_dim", "options"), CASES, ids=str)
def test_steps_agree_with_the_reference_to_the_last_slot(group, slots, head_dim, value_dim, options, dtype):
    state = State(2, 2, slots, head_dim, value_dim, dtype)
    expected = state.clone()
    for index in range(4):
        query = heads(2, 2 * group, 1, head_dim, dtype)
        key, value = heads(2, 2, 1, head_dim, dtype), heads(2, 2, 1, value_dim, dtype)
        token = torch.full((2,), state.length + index, dtype=torch.int32, device=DEVICE)
        token[0] = -1 if index == 2 else token[0]
        out = state.step(decode_and_evict, query, key, value, token, **options)
        reference = expected.step(decode_and_evict_reference, query, key, value, token, **options)
        torch.testing.assert_close(out, reference, **tolerance(dtype))
        torch.testing.assert_close(state.slots(), expected.slots(), rtol=1e-5, atol=1e-5)


def test_heads_with_many_slots_are_shared_among_programs(monkeypatch):
    monkeypatch.setattr(decode_evict, "_CHUNK", 64)
    test_steps_agree_with_the_reference_to_the_last_slot(2, 300, 64, 64, {"sinks": 2}, torch.float32)


def test_a_full_cache_keeps_its_number_and_its_newest():
    state = State(2, 2, 12, 64, 64, torch.float32)
    for index in range(20):
        token = torch.full((2,), state.length + index, dtype=torch.int32, device=DEVICE)
        before = state.positions.clone()
        state.step(decode_and_evict, heads(2, 4, 1, 64), heads(2, 2, 1, 64), heads(2, 2, 1, 64), token)
        assert (state.positions == state.length + index).sum(-1).eq(1).all()
        gone = (before != state.positions).sum(-1)
        assert gone.le(2).all()
        assert state.positions.gather(-1, state.spare[..., None]).eq(-1).all()
    assert torch.equal((state.positions >= 0).sum(-1), state.limits[:, None].expand(-1, 2).long())


def test_padding_changes_no_slot():
    state = State(2, 2, 12, 64, 64, torch.float32)
    before = state.clone()
    token = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    state.step(decode_and_evict, heads(2, 4, 1, 64), heads(2, 2, 1, 64), heads(2, 2, 1, 64), token)
    torch.testing.assert_close(state.slots(), before.slots(), rtol=0, atol=0)


def test_a_state_that_cannot_be_written_in_place_is_refused():
    state = State(2, 2, 12, 64, 64, torch.float32)
    state.scores = state.scores.mT.contiguous().mT
    token = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="positions, scores and spare, which must be contiguous"):
        state.step(decode_and_evict, heads(2, 4, 1, 64), heads(2, 2, 1, 64), heads(2, 2, 1, 64), token)


@some_of(
    {
        "group, slots, head_dim, value_dim, options": CASES,
        "where": ["key", "value", "new key", "new value", "query"],
    },
    at_once=1,
)
def test_nan_comes_through_and_no_slot_is_lost_over_it(where, group, slots, head_dim, value_dim, options):
    state = State(2, 2, slots, head_dim, value_dim, torch.float32)
    held = state.positions[0, 0].argmax()
    if where in ("key", "value"):
        (state.keys if where == "key" else state.values)[0, 0, held] = torch.nan
    other = state.clone()
    for step in range(5):
        query, key = heads(2, 2 * group, 1, head_dim), heads(2, 2, 1, head_dim)
        value = heads(2, 2, 1, value_dim)
        if where in ("new key", "new value", "query") and step == 1:
            {"new key": key, "new value": value, "query": query}[where][0, 0, 0, 1] = torch.nan
        token = torch.full((2,), state.length + step, dtype=torch.int32, device=DEVICE)
        found = state.step(decode_and_evict, query, key, value, token, **options)
        expected = other.step(decode_and_evict_reference, query, key, value, token, **options)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert expected[0, 0].isnan().any() or step == 0 or where not in ("key", "new key", "query") or step > 1
        assert torch.equal(state.positions, other.positions)
        assert torch.equal(state.spare, other.spare)
        # the kernel weighs what the spare slot still holds with zero, plain PyTorch has overwritten it by then: a NaN
        # that was just evicted would reach one step more of the one than of the other
        for values in (state.values, other.values):
            values.scatter_(2, state.spare[..., None, None].expand(-1, -1, 1, value_dim), 0.0)
        # the spare slot is empty, and no head holds more than its limit
        assert (state.positions.gather(2, state.spare[..., None]) == -1).all()
        assert ((state.positions >= 0).sum(-1) <= state.limits[:, None]).all()

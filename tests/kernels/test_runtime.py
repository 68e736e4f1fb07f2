import importlib
from pathlib import Path

import pytest
import torch

from kvcompress.kernels.attention import causal_attention, slot_attention
from kvcompress.kernels.chunk_scores import chunk_scores
from kvcompress.kernels.column_sums import causal_column_sums, slot_column_maxima
from kvcompress.kernels.decode import decode_attention
from kvcompress.kernels.decode_evict import decode_and_evict
from kvcompress.kernels.evict import choose_victim
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.packed_attention import packed_attention
from kvcompress.kernels.quantise import QuantizedTensor, QuantScheme, quantise
from kvcompress.kernels.rebuild import rebuild_keys
from kvcompress.kernels.selection import reuse_slots
from tests.kernels.inputs import DEVICE, blocks, heads, packed_blocks, slot_positions

QUERY, KEY, STEP = heads(2, 4, 9, 64), heads(2, 2, 9, 64), heads(2, 4, 1, 64)
POSITIONS = slot_positions(2, 2, 9)
AT = torch.full((2, 9), 18, dtype=torch.int32, device=DEVICE)
LSE = torch.randn(2, 4, 9, device=DEVICE)
SCORES = torch.rand(2, 2, 9, device=DEVICE)
LIMITS = torch.full((2,), 7, dtype=torch.int32, device=DEVICE)
HELD = torch.rand(2, 2, 6, device=DEVICE).argsort(-1)

CODING = QuantScheme(2, 16, "channel", 1, 2)
PACKED = packed_blocks(blocks(2, 2, 3, 16, 64), CODING)
THERE = torch.arange(48, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)

# an op, its arguments, and the same as the op that compiled code sees takes them
CALLS = {
    "merge_states": (lambda a, b: merge_states([a, a], [b, b]), (QUERY, LSE)),
    "causal_attention": (lambda q, k: causal_attention(q, k, k, scale=0.1), (QUERY, KEY)),
    "slot_attention": (lambda q, k, p, a: slot_attention(q, k, k, p, a, scale=0.1), (QUERY, KEY, POSITIONS, AT)),
    "causal_column_sums": (lambda q, k, m: causal_column_sums(q, k, m, scale=0.1), (QUERY, KEY, LSE)),
    "slot_columns": (
        lambda q, k, p, a, m: slot_column_maxima(q, k, p, a, m, scale=0.1),
        (QUERY, KEY, POSITIONS, AT, LSE),
    ),
    "decode_attention": (
        lambda q, k, p, a: decode_attention(q, k, k, p, a, scale=0.1),
        (STEP, KEY, POSITIONS, AT[:, :1]),
    ),
    "packed_attention": (
        lambda q, p, a, *of: packed_attention(
            q, QuantizedTensor(*of), QuantizedTensor(*of), CODING, CODING, p, a, scale=0.1, with_logits=True
        ),
        (STEP, THERE, AT[:, :1], *PACKED),
    ),
    "choose_victim": (lambda s, p, r: choose_victim(s, p, r, 2), (SCORES, POSITIONS, LIMITS)),
    "decode_and_evict": (
        lambda q, k, p, s, f, a, m: decode_and_evict(
            q, k[:, :, :1], k[:, :, :1], k, k.clone(), p, s, f, a, m, m, scale=0.1
        ),
        (STEP, KEY, POSITIONS, SCORES, POSITIONS.argmin(-1), AT[:, 0], LIMITS),
    ),
}


def rebuilt(keys, coefficients, basis, held, is_new):
    rebuild_keys(keys, coefficients, basis, held, is_new)
    return keys


CALLS |= {
    "chunk_scores": (lambda q, k, o: chunk_scores(q, k, o, scale=0.1), (STEP, KEY, POSITIONS >= 0)),
    "quantise": (lambda x: quantise(x, CODING)[:5], (blocks(2, 2, 3, 16, 64),)),
    "rebuild_keys": (
        rebuilt,
        (
            heads(2, 2, 12, 64).contiguous(),
            torch.randn(2, 12, 5, device=DEVICE),
            torch.randn(2, 5, 128, device=DEVICE),
            HELD,
            HELD < 3,
        ),
    ),
    "reuse_slots": (lambda held, wanted: reuse_slots(held, wanted, 9), (HELD, HELD.flip(-1) + 2)),
}


def test_every_op_is_tested_here():
    for file in sorted((Path(__file__).parents[2] / "kernels").glob("*.py")):
        importlib.import_module(f"kvcompress.kernels.{file.stem}")
    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    assert {name for space, _, name in names if space == "kvcompress"} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_is_one_op_and_gives_what_the_eager_call_gives(name):
    call, arguments = CALLS[name]
    graphs = []

    def keep_graph(graph, _):
        graphs.append(graph)
        return graph.forward

    def fresh():
        return [argument.clone() for argument in arguments]

    compiled, eager = fresh(), fresh()
    found = torch.compile(call, fullgraph=True, backend=keep_graph)(*compiled)
    torch.testing.assert_close(found, call(*eager))
    torch.testing.assert_close(compiled, eager)
    assert [str(node.target) for node in graphs[0].graph.nodes].count(f"kvcompress.{name}.default") <= 1
    assert f"kvcompress.{name}" in graphs[0].code


@pytest.mark.parametrize("name", CALLS)
def test_the_fake_op_predicts_shapes_dtypes_and_mutations(name, monkeypatch):
    call, arguments = CALLS[name]
    seen = []
    op = getattr(torch.ops.kvcompress, name).default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is op:
                seen.append((args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Watch():
        call(*(argument.clone() for argument in arguments))
    monkeypatch.undo()
    ((args, kwargs),) = seen
    torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_an_eager_call_passes_the_dispatcher_by():
    call, arguments = CALLS["choose_victim"]
    ops = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ops.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        call(*arguments)
    assert not any("kvcompress" in name for name in ops)

import ast
import importlib
import pkgutil
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import kvcompress.kernels
from kvcompress.kernels.calibrated import CalibratedScheme, KeyDecoder, calibrated_codes
from kvcompress.kernels.common import runtime
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme
from kvcompress.kernels.common.runtime import ALL_REGISTERS, OPS, launch, op, recalling, recording, runs_triton, shaped
from kvcompress.kernels.common.shared_blocks import KeyBlocks, Sharing
from kvcompress.kernels.common.split_attention import Extents
from kvcompress.kernels.decode_evict import Slots
from kvcompress.kernels.fill import FoldedChunks, Rotation
from kvcompress.kernels.selection import chunk_positions
from kvcompress.kernels.shared_attention import block_tables
from tests.kernels.inputs import DEVICE, blocks, heads, packed_blocks, slot_positions

for module in pkgutil.iter_modules(kvcompress.kernels.__path__, "kvcompress.kernels."):
    importlib.import_module(module.name)

QUERY, KEY, STEP = heads(2, 4, 9, 64), heads(2, 2, 9, 64), heads(2, 4, 1, 64)
POSITIONS = slot_positions(2, 2, 9)
POSITIONS[..., 4] = -1  # decode_and_evict needs an empty slot in every head
AT = torch.full((2, 9), 18, dtype=torch.int32, device=DEVICE)
LSE = torch.randn(2, 4, 9, device=DEVICE)
SCORES = torch.rand(2, 2, 9, device=DEVICE)
LIMITS = torch.full((2,), 7, dtype=torch.int32, device=DEVICE)
HELD = torch.rand(2, 2, 6, device=DEVICE).argsort(-1)
X = blocks(2, 2, 3, 16, 64)
CODING = QuantScheme(2, 16, "channel", 1, 2)
PACKED = packed_blocks(X, CODING)
THERE = torch.arange(48, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)
NEW = KEY[:, :, :1]
FLAT = torch.randn(20, 64, device=DEVICE)
EXTENTS = Extents(*(torch.tensor(x, device=DEVICE) for x in ([[9, 0], [18, 12]], [[3, 9], [2, 6]])))
SLOT_CODING = QuantScheme(4, 64, "token")
SLOTTED = [packed_blocks(blocks(1, 1, 7, 16, 64), SLOT_CODING) for _ in range(2)]
SLOT_EXTENTS = Extents(*(torch.tensor(x, device=DEVICE) for x in ([[48, 0], [64, 96]], [[16, 48], [32, 16]])))
SPEC = LogitSpec(0.1)
HELD_PLACES = chunk_positions(HELD, 2, None)
# read by its address, so that it is not to go
SLAB = torch.randn(1, 2, 2, 64, device=DEVICE)
FOLDED = FoldedChunks(
    *(torch.randn(2, 12, 5), torch.randn(2, 5, 128), torch.zeros(2, 6, dtype=torch.int64)),
    *(torch.tensor([SLAB.data_ptr()]), [SLAB]),
)

NODES = block_tables(KeyBlocks([KEY[0], KEY[1]], [KEY[0], KEY[1]]), Sharing([(0, 1), (1,)], 2), 2, SPEC)

COMPONENTS = CalibratedScheme(8, 24, 32)
CALIBRATED = calibrated_codes(
    torch.randn(2, 3, 16, 128, device=DEVICE),
    torch.ones(128, device=DEVICE),
    COMPONENTS,
    torch.arange(0, 48, 16, dtype=torch.int32, device=DEVICE).repeat(2, 1),
)
VALUE_CODING = QuantScheme(2, 64, "token", zeros="none")
OF_BASIS = KeyDecoder(torch.randn(64, 128), torch.randn(128), torch.rand(32))

# arguments of every op
CALLS = {
    "calibrated_attention": (
        (STEP, CALIBRATED, packed_blocks(X, VALUE_CODING), OF_BASIS, VALUE_CODING, THERE[:, :1], AT[:, :1], SPEC),
        {},
    ),
    "merge_states": (([QUERY, QUERY], [LSE, LSE]), {}),
    "causal_attention": ((QUERY, KEY, KEY, SPEC), {}),
    "slot_attention": ((QUERY, KEY, KEY, POSITIONS, AT, SPEC), {"bias": SCORES}),
    "causal_column_sums": ((QUERY, KEY, LSE, SPEC), {}),
    "slot_column_sums": ((QUERY, KEY, POSITIONS, AT, LSE, SPEC), {}),
    "slot_column_maxima": ((QUERY, KEY, POSITIONS, AT, LSE, LogitSpec(0.1, 12)), {}),
    "decode_attention": ((STEP, KEY, KEY, POSITIONS, AT[:, :1], SPEC), {}),
    "ragged_attention": (
        (QUERY, FLAT, FLAT, EXTENTS, POSITIONS, AT, SPEC),
        {"bias": torch.randn(len(FLAT), device=DEVICE)},
    ),
    "ragged_decode_attention": (
        (STEP, FLAT, FLAT, EXTENTS, POSITIONS, AT[:, :1], SPEC),
        {"sink_logits": torch.randn(4, device=DEVICE)},
    ),
    "ragged_packed_attention": (
        (STEP, *SLOTTED, SLOT_CODING, SLOT_EXTENTS, THERE.repeat(1, 2, 1), AT[:, :1], SPEC),
        {"bias": torch.randn(112, device=DEVICE), "with_logits": True},
    ),
    "shared_attention": (
        (STEP, KEY, KEY, NODES, SPEC),
        {"positions": POSITIONS, "sinks": torch.randn(4, device=DEVICE)},
    ),
    "packed_attention": ((STEP, PACKED, PACKED, CODING, CODING, THERE, AT[:, :1], SPEC), {"with_logits": True}),
    "choose_victim": ((SCORES, POSITIONS, LIMITS, 2), {}),
    "decode_and_evict": (
        (STEP, NEW, NEW, Slots(KEY, KEY, POSITIONS, SCORES, POSITIONS.argmin(-1)), AT[:, 0], LIMITS, LIMITS, SPEC),
        {"sink_logits": torch.randn(4, device=DEVICE)},
    ),
    "chunk_scores": ((STEP, KEY, POSITIONS >= 0, SPEC), {"group": "mean"}),
    "quantise": ((X, CODING), {}),
    "rotate": ((X,), {"back": True}),
    "select_chunks": (
        # one chunk: between several that are new it does not matter which takes which slot
        (STEP, KEY, POSITIONS >= 0, HELD, HELD_PLACES, *torch.tensor([[1, 1], [0, 0]])),
        {"spec": SPEC, "chunk": 2},
    ),
    "fill_buffer": (
        (
            *(heads(2, 2, 14, 64).contiguous(), heads(2, 2, 14, 64).contiguous(), THERE[:, :, :14].repeat(1, 2, 1)),
            *(torch.tensor([[12, 12], [13, 12]]), HELD, HELD >= 0, FOLDED, Rotation(interleaved=True), 2, 12, NEW, NEW),
        ),
        {},
    ),
}


def fresh(name):
    """Arguments of an op, to write to."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE).clone(), CALLS[name])


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def public(name):
    return getattr(importlib.import_module(OPS[name].function.__module__), name)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes which functions are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((str(function), args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def test_every_op_is_tested_here():
    assert set(OPS) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_is_one_op_and_gives_what_the_eager_call_gives(name):
    # the ops share the code of one function, of which torch.compile keeps few versions
    torch._dynamo.reset()
    graphs = []

    def keep_graph(graph, _):
        graphs.append(graph)
        return graph.forward

    (compiled, options), (eager, _) = fresh(name), fresh(name)
    found = torch.compile(public(name), fullgraph=True, backend=keep_graph)(*compiled, **options)
    expected = public(name)(*eager, **options)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(tensors(compiled), tensors(eager))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count(f"kvcompress.{name}.default") + called.count(f"kvcompress.{name}") == 1


@pytest.mark.parametrize("name", CALLS)
def test_the_fake_op_predicts_shapes_dtypes_and_mutations(name):
    arguments, options = fresh(name)
    leaves = OPS[name].leaves(*arguments, **options)
    torch.library.opcheck(OPS[name].compiled, (), leaves, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", CALLS)
def test_an_op_gives_what_its_reference_gives(name):
    (arguments, options), (others, _) = fresh(name), fresh(name)
    found, expected = OPS[name].function(*arguments, **options), OPS[name].reference(*others, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors(arguments), tensors(others), rtol=1e-4, atol=1e-4)


def test_an_eager_call_bypasses_the_dispatcher():
    arguments, options = fresh("choose_victim")
    with Watch() as watch:
        public("choose_victim")(*arguments, **options)
    assert watch.seen
    assert not any("kvcompress" in name for name, *_ in watch.seen)


def pair_reference(x: QuantizedTensor, scale: float) -> QuantizedTensor:
    return QuantizedTensor(x.codes * scale, x.scales, x.zeros)


def test_named_tuples_enter_an_op_as_their_fields_and_leave_it_whole(monkeypatch):
    @op(fake=lambda x, scale: QuantizedTensor(*map(torch.empty_like, x[:3])))
    def pair(x: QuantizedTensor, *, scale: float = 2.0) -> QuantizedTensor:
        return QuantizedTensor(x.codes * scale, x.scales.clone(), x.zeros.clone())

    made = OPS.pop("pair")
    assert made.reference is pair_reference
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = QuantizedTensor(*(torch.full((2,), value) for value in (1.0, 2.0, 3.0)))
    for found in (pair(x), pair(x=x)):
        torch.testing.assert_close(found, pair_reference(x, 2.0))
    assert set(made.leaves(x)) == {f"x_{field}" for field in QuantizedTensor._fields} | {"scale"}


class Kernel:
    """Notes its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((grid, arguments, constants))


def test_a_launch_has_all_registers():
    kernel, x = Kernel(), torch.zeros(3, device=DEVICE)
    launch(kernel, (2,), (x, x), x, 5, BLOCK=16)
    assert kernel.launches == [((2,), ((x, x), x, 5), {"BLOCK": 16} | ALL_REGISTERS)]


def test_a_recorded_launch_is_listed_and_not_made():
    kernel, x = Kernel(), shaped(2, 3, dtype=torch.float16)
    before = runs_triton(x)
    assert before == runtime.INTERPRETED
    with recording(has_wgmma=True) as launches:
        assert runs_triton(x)
        assert not runs_triton(x.double())
        assert runtime.has_wgmma(x.device)
        launch(kernel, (2,), x, 5, BLOCK=16)
    assert launches == [(kernel, (x, 5), {"BLOCK": 16})]
    assert not kernel.launches
    assert not runtime.has_wgmma(x.device)
    assert runs_triton(x) == before


def test_what_a_thread_recalls_is_not_asked_for_others():
    asked = []

    def recall(function, *args, **kwargs):
        asked.append(function)
        return function(*args, **kwargs)

    def elsewhere():
        with recalling(recall):
            begun.set()
            ended.wait(60)

    begun, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    begun.wait(60)
    public("rotate")(X)
    ended.set()
    thread.join()
    public("rotate")(X)
    assert asked == []
    with recalling(recall):
        public("rotate")(X)
    assert len(asked) == 1


def launches_past_the_launcher(source):
    """Lines that launch a kernel by themselves: without the device guard, the registers and the recording."""
    for node in ast.walk(ast.parse(source)):
        launched = getattr(getattr(getattr(node, "func", None), "value", None), "id", "")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and launched.endswith("kernel"):
            yield node.lineno


def test_every_kernel_is_launched_by_the_launcher():
    folder = Path(__file__).parents[2] / "kernels"
    found = [
        (file.name, file.read_text().splitlines()[line - 1].strip())
        for file in sorted(folder.rglob("*.py"))
        for line in launches_past_the_launcher(file.read_text())
    ]
    assert found == [("runtime.py", "kernel[grid](*arguments, **constants, **ALL_REGISTERS)")]

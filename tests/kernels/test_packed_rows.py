import itertools

import pytest
import torch

from kvcompress.kernels import packed_attention as module
from kvcompress.kernels.common import packed_rows, packed_words
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.packed_rows import takes_rows
from kvcompress.kernels.common.packed_words import decode_assembly, decode_numbers, decode_shift
from kvcompress.kernels.common.quantized import QuantScheme
from kvcompress.kernels.common.runtime import INTERPRETED, runs_ptx, runs_triton, tl, triton
from kvcompress.kernels.packed_attention import packed_attention, packed_attention_reference
from tests.kernels.inputs import DEVICE, DTYPES, blocks, heads, packed_blocks

HAS_KERNEL = runs_triton(torch.empty(0, device=DEVICE))
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="only the kernel decodes words")

# key bits, value bits, how keys are grouped, group of keys, of values, rows (heads of a group, queries), block, blocks,
# head_dim, options
CASES = [
    (2, 2, "centred", 256, 256, (4, 1), 64, 5, 128, {}),
    (4, 4, "channel", 64, 64, (4, 1), 64, 5, 128, {}),
    (4, 3, "channel", 64, 64, (3, 1), 64, 5, 128, {}),
    (3, 2, "channel", 64, 64, (1, 1), 64, 3, 64, {"window": 90}),
    (2, 2, "channel", 64, 64, (8, 1), 64, 3, 64, {"softcap": 3.0}),
    (2, 4, "channel", 32, 32, (4, 4), 64, 3, 128, {}),
    (4, 4, "channel", 32, 128, (3, 3), 64, 3, 128, {"window": 70, "softcap": 5.0}),
    (3, 3, "channel", 64, 64, (2, 2), 64, 2, 128, {"window": 100}),
    (4, 2, "channel", 64, 64, (4, 1), 256, 2, 64, {}),
    (4, 4, "token", 64, 64, (4, 1), 32, 5, 128, {}),
    (2, 3, "token", 32, 32, (2, 5), 32, 5, 64, {"window": 60}),
    (3, 3, "token", 64, 64, (1, 16), 64, 3, 96, {}),
    (2, 2, "centred", 128, 128, (3, 1), 16, 9, 80, {"window": 60}),
    (4, 3, "centred", 128, 128, (2, 3), 16, 5, 128, {"softcap": 3.0}),
    (4, 2, "centred", 128, 128, (2, 3), 8, 11, 128, {"softcap": 3.0}),
    (3, 4, "centred", 32, 32, (5, 3), 32, 3, 32, {}),
    (4, 4, "none", 128, 128, (4, 1), 64, 3, 128, {}),
]


def ids(case):
    return "-".join(str(part) for part in case)


def scene(case, dtype, heads_apart=False):
    """A sequence that lacks a token and one that lacks its first block; the arguments and the options."""
    key_bits, value_bits, kind, key_group, value_group, (group, queries), block, count, head_dim, options = case
    key_coding = QuantScheme(key_bits, key_group, "channel" if kind == "channel" else "token")
    value_coding = QuantScheme(value_bits, value_group, "token")
    if kind in ("centred", "none"):
        key_coding = key_coding._replace(zeros="block" if kind == "centred" else "none")
        value_coding = value_coding._replace(zeros="none")
    # as keys are: some channels are far from 0
    lift = 6 * torch.randn(head_dim, device=DEVICE) * (torch.rand(head_dim, device=DEVICE) > 0.9)
    keys = packed_blocks((blocks(2, 2, count, block, head_dim) + lift).to(dtype), key_coding)
    values = packed_blocks(blocks(2, 2, count, block, head_dim, dtype), value_coding)
    tokens = count * block
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE).repeat(2, 2 if heads_apart else 1, 1)
    positions[1, :, :block] = -1
    positions[0, -1, tokens // 2 + 3] = -1
    query_positions = torch.arange(tokens, tokens + queries, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    query = heads(2, 2 * group, queries, head_dim, dtype)
    arguments = (query, keys, values, key_coding, value_coding, positions, query_positions)
    return arguments, {"spec": LogitSpec(head_dim**-0.5, **options)}


def check(arguments, options, dtype):
    assert takes_rows(*arguments[:5], 2)
    with_logits = arguments[0].shape[2] == 1
    found = packed_attention(*arguments, **options, with_logits=with_logits)
    # in float64, of the same packed numbers
    exact = [arguments[0].double(), *arguments[1:]]
    expected = packed_attention_reference(*exact, **options, with_logits=with_logits)
    assert found[0].dtype == dtype
    # rounded to 16 bits: weights, before they meet codes, and outputs
    limit = 1.5e-2 if dtype == torch.bfloat16 else 1e-2
    assert torch.linalg.vector_norm(found[0].double() - expected[0]) < limit * torch.linalg.vector_norm(expected[0])
    torch.testing.assert_close(found[1].double(), expected[1].double(), rtol=2e-3, atol=4e-3)
    if with_logits:
        torch.testing.assert_close(found[2].double(), expected[2].double(), rtol=2e-3, atol=1e-2)


# one warp, which otherwise only many programs have, and two; the interpreter has none
@needs_kernel
@pytest.mark.parametrize("warps", [1] if INTERPRETED else [1, 2])
@pytest.mark.parametrize("n", range(len(CASES)), ids=[ids(case) for case in CASES])
def test_few_rows_agree_with_the_reference(n, warps, monkeypatch):
    case, dtype = CASES[n], DTYPES[1 + n % 2]
    monkeypatch.setattr(packed_rows, "resident_programs", lambda warps_of, device: 4 if warps == 1 else 2**20)
    check(*scene(case, dtype), dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_small_weights_beside_a_large_one_are_not_lost(dtype):
    # the first token has all but nothing of the weight, and no value
    (query, _, values, key_coding, value_coding, positions, at), options = scene(CASES[1], dtype)
    keys, small = torch.zeros(2, 2, 5, 64, 128, device=DEVICE), 0.05 * torch.randn(2, 2, 5, 64, 128, device=DEVICE)
    query = torch.ones_like(query)
    keys[:, :, 0, 0] = 12 / 128**0.5
    small[:, :, 0, 0] = 0.0
    keys, values = packed_blocks(keys.to(dtype), key_coding), packed_blocks(small.to(dtype), value_coding)
    positions[:] = torch.arange(320, dtype=torch.int32, device=DEVICE)
    arguments = (query, keys, values, key_coding, value_coding, positions, at)
    found = packed_attention(*arguments, **options)[0].double()
    expected = packed_attention_reference(query.double(), *arguments[1:], **options)[0]
    assert torch.linalg.vector_norm(found - expected) < 1.5e-2 * torch.linalg.vector_norm(expected)


@needs_kernel
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[9]], ids=ids)
def test_offsets_positions_and_log_weights_of_each_head(case):
    arguments, options = scene(case, torch.bfloat16, heads_apart=True)
    options["offsets"] = torch.randn(arguments[0].shape[:3], device=DEVICE) * 3
    options["bias"] = torch.randn(arguments[5].shape, device=DEVICE) * 3
    check(arguments, options, torch.bfloat16)


@needs_kernel
def test_slices_of_a_larger_storage_are_read_in_place():
    arguments, options = scene(CASES[1], torch.bfloat16)
    query, keys, values, *rest = arguments
    expected = packed_attention(*arguments, **options)

    def roomy(packed):
        parts = [None if part is None else torch.cat([part, part.flip(2)], 2) for part in packed]
        count = packed.codes.shape[2]
        return packed._make(None if part is None else part[:, :, :count] for part in parts)

    found = packed_attention(query, roomy(keys), roomy(values), *rest, **options)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@needs_kernel
def test_a_query_that_sees_nothing_has_no_weight():
    arguments, options = scene(CASES[0], torch.bfloat16)
    arguments[5][1] = -1
    out, lse = packed_attention(*arguments, **options)
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    assert out[0].any()


@needs_kernel
def test_the_other_kernel_takes_what_does_not_fit(monkeypatch):
    launched = []
    monkeypatch.setattr(module, "launch_rows", lambda *args: launched.append(args))
    for case, dtype in (
        (CASES[0], torch.float32),
        ((2, 2, "centred", 256, 256, (4, 5), 64, 2, 64, {}), torch.bfloat16),
    ):
        arguments, options = scene(case, dtype)
        found = packed_attention(*arguments, **options)
        expected = packed_attention_reference(*arguments, **options)
        torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)
    assert not launched


def test_what_does_not_fit_is_not_taken():
    (query, keys, values, of_keys, of_values, *_), _ = scene(CASES[1], torch.bfloat16)
    assert takes_rows(query, keys, values, of_keys, of_values, 2)
    wide = torch.cat([keys.codes, keys.codes], -1)
    for changed in (
        (query.float(), keys, values, of_keys, of_values),
        (query.repeat(1, 1, 5, 1), keys, values, of_keys, of_values),
        (query, keys._replace(codes=wide), values, of_keys, of_values),
        (query, keys, values, of_keys, of_values._replace(group=16)),
        (query, keys, values, of_keys._replace(group=16), of_values),
        (query, keys, values, of_keys._replace(bits=8), of_values),
        (query, keys._replace(outlier_index=keys.codes), values, of_keys, of_values),
        (query, keys, values._replace(left=keys.scales), of_keys, of_values),
        (query, keys._replace(codes=torch.zeros(keys.codes.numel() + 1, dtype=torch.uint8)[1:].view_as(keys.codes)),
         values, of_keys, of_values),
    ):  # fmt: skip
        assert not takes_rows(*changed, 2)
    # two tokens of an operand have their third bits at different places
    for key_bits, value_bits in ((4, 3), (3, 4)):
        arguments, _ = scene((key_bits, value_bits, "centred", 128, 128, (1, 1), 8, 8, 128, {}), torch.bfloat16)
        assert not takes_rows(*arguments[:5], 2)


# what a lane does, instruction for instruction


def emulate(assembly, registers):
    """Runs the PTX of decode_assembly on 32-bit numbers in int64; fma on pairs of 16-bit floats."""
    values = dict(registers)
    for line in assembly.strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        given = [values.get(source, int(source, 0) if source[:1].isdigit() else None) for source in sources]
        if name == "shl.b32":
            values[target] = given[0] << given[1] & 0xFFFFFFFF
        elif name == "shr.u32":
            values[target] = given[0] >> given[1]
        elif name == "lop3.b32":
            assert given[3] == 0xEA
            values[target] = given[0] & given[1] | given[2]
        else:
            assert name in ("fma.rn.bf16x2", "fma.rn.f16x2")
            dtype = torch.bfloat16 if "bf16" in name else torch.float16
            first = torch.stack([given[0] & 0xFFFF, given[0] >> 16], -1).to(torch.int32)
            as_float = first.to(torch.uint16).view(dtype).double()
            values[target] = (as_float * given[1] + given[2]).to(dtype)
    return values["$0"]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("bits", "middle"), [(2, 1.5), (2, 0.0), (3, 3.5), (3, 0.0), (4, 7.5), (4, 0.0)])
def test_the_assembly_decodes_every_word_exactly(bits, middle, dtype):
    words = torch.arange(2**16)
    high = words[torch.randperm(2**16)]
    low_bits = 2 if bits == 3 else bits
    significand, exponent = (7, 127) if dtype == torch.bfloat16 else (10, 15)
    kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    for first_bit in range(0, 16, low_bits):
        mask, put_in, added, third = decode_numbers(first_bit, bits, middle, significand, exponent)
        assert float(torch.tensor(added, dtype=dtype)) == added
        twice = {"$2": mask, "$3": put_in, "$7": third}
        registers = {name: number << 16 | number for name, number in twice.items()}
        # any other word may lie in the other half
        registers |= {"$1": words | high << 16, "$6": high | words << 16, "$4": 1.0, "$5": added}
        found = emulate(decode_assembly(decode_shift(first_bit, bits), bits, kind), registers)
        for half, (word, third_bits) in enumerate(((words, high), (high, words))):
            codes = word >> first_bit & (1 << low_bits) - 1
            if bits == 3:
                codes = codes + ((third_bits >> first_bit & 1) << 2)
            assert torch.equal(found[:, half].double(), codes - middle)


@triton.jit
def decode(words_ptr, high_ptr, out_ptr, FIRST_BIT: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 4096 + tl.arange(0, 4096)[None, :]
    words, high = tl.load(words_ptr + at), tl.load(high_ptr + at)
    levels = packed_words.plane_levels(
        words, high, FIRST_BIT, BITS, (2**BITS - 1) / 2, out_ptr.dtype.element_ty, ASSEMBLY
    )
    tl.store(out_ptr + at, levels)


@pytest.mark.skipif(not runs_ptx(torch.device(DEVICE)), reason="needs a GPU that runs PTX")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_assembly_and_its_twin_agree_on_the_device(dtype):
    words = torch.arange(2**16, device=DEVICE).to(torch.int16)
    high = words[torch.randperm(2**16, device=DEVICE)]
    for bits, first_bit in itertools.product((2, 3, 4), range(0, 16, 2)):
        if first_bit % (2 if bits == 3 else bits):
            continue
        outs = [torch.empty(2**16, dtype=dtype, device=DEVICE) for _ in range(2)]
        for out, assembly in zip(outs, (True, False), strict=True):
            decode[(1,)](words, high, out, FIRST_BIT=first_bit, BITS=bits, ASSEMBLY=assembly)
        assert torch.equal(*outs)

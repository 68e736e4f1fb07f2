"""Machine code is read right, and what was recorded of the kernels' does not get worse."""

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvcompress.evals.bench import machine_code, roofline, sass
from kvcompress.evals.bench.machine_code import Loop, Program, parse
from kvcompress.evals.bench.tile_code import TileLoop, read_tile_loops
from kvcompress.kernels.common.runtime import INTERPRETED

triton = pytest.importorskip("triton")

RECORDED = Path(__file__).parents[3] / "evals" / "results" / "sass"
compiles = pytest.mark.skipif(INTERPRETED, reason="under the interpreter there is nothing to compile")

# one kernel that copies tiles ahead of their product, as cuobjdump lists it: a loop in a loop, and code behind the end
# that the inner loop waits in
LISTING = """
 Function _some_kernel:
  REG:90 STACK:0 SHARED:0 LOCAL:8 CONSTANT[0]:0
        /*0000*/                   MOV R1, c[0x0][0x28] ;                         /* 0x1 */
        /*0010*/              @!P0 EXIT ;                                         /* 0x1 */
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;                        /* 0x1 */
        /*0030*/                   DEPBAR.LE SB0, 0x2 ;                           /* 0x1 */
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                  /* 0x1 */
        /*0050*/               @P1 BRA 0x0140 ;                                   /* 0x1 */
        /*0060*/                   LDSM.16.M88.4 R4, [R3] ;                       /* 0x1 */
        /*0070*/                   LDG.E.U16 R9, desc[UR4][R10.64] ;              /* 0x1 */
        /*0080*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;         /* 0x1 */
        /*0090*/                   HMMA.16816.F32.BF16 R16, R4, R8, R16 ;         /* 0x1 */
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;   /* 0x1 */
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R3+0x80], desc[UR4][R6.64] ;  /* 0x1 */
        /*00c0*/                   LDGDEPBAR ;                                    /* 0x1 */
        /*00d0*/                   STS.64 [R3], R4 ;                              /* 0x1 */
        /*00e0*/                   MUFU.EX2 R7, R7 ;                              /* 0x1 */
        /*00f0*/              @!P2 BRA 0x0030 ;                                   /* 0x1 */
        /*0100*/                   STG.E.128 desc[UR4][R6.64], R12 ;              /* 0x1 */
        /*0110*/               @P3 BRA 0x0020 ;                                   /* 0x1 */
        /*0120*/                   EXIT ;                                         /* 0x1 */
        /*0130*/                   BRA 0x0130;                                    /* 0x1 */
        /*0140*/                   NANOSLEEP 0x8 ;                                /* 0x1 */
        /*0150*/                   BRA 0x0060 ;                                   /* 0x1 */
"""


def loop_of(*lines, repeats=True):
    return Loop(parse("".join(f"        /*{16 * at:04x}*/ {line} ;\n" for at, line in enumerate(lines))), repeats)


def test_registers_and_spilled_bytes_are_those_of_a_thread():
    assert machine_code.usage(LISTING) == (90, 8)


def test_the_innermost_loop_counts_with_the_code_that_lies_behind_the_end():
    (loop,) = Program(90, 8, parse(LISTING)).loops
    assert [each.address for each in loop.instructions] == [*range(0x30, 0x100, 16), 0x140, 0x150]
    assert loop.repeats


def test_a_branch_back_from_behind_the_end_is_no_loop():
    straight = LISTING.replace("@!P2 BRA 0x0030", "@!P2 MOV R0, R0").replace("@P3 BRA 0x0020", "@P3 MOV R0, R0")
    (loop,) = Program(90, 8, parse(straight)).loops
    assert not loop.repeats
    assert len(loop.instructions) == len(parse(straight))


def test_the_mix_counts_instructions_by_what_they_do_and_how_wide_they_move():
    (loop,) = Program(90, 8, parse(LISTING)).loops
    assert loop.mix == {
        "barrier": 4, "branch": 3, "copy 16": 2, "load 2": 1, "shared load 16": 1, "shared store 8": 1, "special": 1,
        "tensor": 2,
    }  # fmt: skip
    assert loop.bytes == 32 * (16 + 16 + 2)
    assert loop.flops == 2 * 2 * 16 * 8 * 16
    assert loop.narrow == ["LDG.E.U16"]


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("UTCHMMA", None),
        ("FFMA", 0),
    ],
)
def test_the_flops_of_a_product_are_in_its_name_or_unknown(name, flops):
    assert loop_of(f"{name} R0, R4, R8, R0").flops == flops


def test_a_copy_to_shared_memory_below_16_bytes_is_narrow_and_a_load_of_4_is_not():
    loop = loop_of("LDGSTS.E [R0], desc[UR4][R2.64]", "LDG.E R4, desc[UR4][R2.64]", "LDS.U8 R5, [R0]")
    assert loop.narrow == ["LDGSTS.E", "LDS.U8"]


COPY, WAIT, PRODUCT = (
    "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]",
    "DEPBAR.LE SB0, 0x{}",
    "HMMA.16816.F32 R4, R8, R12, R4",
)


@pytest.mark.parametrize(
    ("lines", "prefetch"),
    [
        # two groups of copies an iteration, four are left under way
        ([WAIT.format(4), PRODUCT, COPY, "LDGDEPBAR", COPY, "LDGDEPBAR"], "cp.async 2"),
        ([WAIT.format(0), COPY, "LDGDEPBAR", PRODUCT], "cp.async"),
        # what is copied at the end is waited for at the beginning
        ([WAIT.format(0), PRODUCT, COPY, "LDGDEPBAR"], ""),
        (["UTMALDG.2D [UR8], [UR4]", PRODUCT], "tma"),
        (["FADD R9, R9, R4", "LDG.E.128 R4, desc[UR4][R2.64]", "BRA 0x0"], "registers"),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R9, R9, R7", "BRA 0x0"], ""),
        # a product names the first of several registers
        (["LDG.E R6, desc[UR4][R2.64]", "HMMA.16816.F32 R12, R4, R8, R12"], ""),
        (["FADD R9, R9, R4"], ""),
    ],
)  # fmt: skip
def test_prefetch_is_what_an_iteration_asks_for_and_does_not_read(lines, prefetch):
    assert loop_of(*lines).prefetch == prefetch
    assert loop_of(*lines, repeats=False).prefetch == ""


TILES = """
  tt.func public @_some_kernel() {
    %a = tt.load %p : tensor<64x128x!tt.ptr<bf16>, #blocked>
    %b:2 = scf.for %i = %c0 to %c1 step %c2 iter_args(%x = %a) -> (tensor<64xf32>)  : i32 {
      %c:2 = scf.for %j = %c0 to %c1 step %c2 iter_args(%y = %a) -> (tensor<64xf32>)  : i32 {
        %d = ttg.async_copy_global_to_local %p, %m {contiguity = 8 : i32} : tensor<64x32x!tt.ptr<bf16>, #b>
        %e = tt.load %p, %k : tensor<64x!tt.ptr<i32>, #blocked>
        %f = tt.load %q : !tt.ptr<i64>
        %g = tt.dot %t, %u, %v : tensor<16x128xbf16, #d> * tensor<128x64xbf16, #d> -> tensor<16x64xf32, #mma>
        %h = "tt.reduce"(%g) <{axis = 1 : i32}> ({
        }) : (tensor<16x64xf32, #mma>) -> tensor<16xf32>
        scf.yield %h
      } loc(#loc1)
      tt.store %p, %g : tensor<16x64x!tt.ptr<f32>, #blocked>
    }
    scf.for %i = %c0 to %c1 step %c2  : i32 {
      ttng.tc_gen5_mma %s, %t, %u : !ttg.memdesc<128x64xbf16, #s> , !ttg.memdesc<64x128xbf16, #s>, !ttg.memdesc<128x128>
    }
  }
"""


def test_tiles_tell_what_an_innermost_loop_moves_and_multiplies():
    inner, outer, last = (
        TileLoop(64 * 32 * 2 + 64 * 4 + 8, 2 * 16 * 128 * 64),
        16 * 64 * 4,
        TileLoop(0, 2 * 128**2 * 64),
    )
    assert read_tile_loops(TILES, unrolled=False) == [inner, last]
    # one of a constant number of iterations is part of the loop around it
    thrice = TILES.replace("%j = %c0 to %c1 step %c2", "%j = %c1_i32 to %c6_i32 step %c2_i32")
    assert read_tile_loops(thrice, unrolled=False) == [inner, last]
    assert read_tile_loops(thrice, unrolled=True) == [TileLoop(3 * inner.bytes + outer, 3 * inner.flops), last]


def test_the_slowest_of_three_binds():
    loop = loop_of(*[PRODUCT] * 6, *[COPY] * 2, *["FADD R0, R0, R0"] * 12)
    gpu = roofline.GPU("some", 16.0, 1024)
    found = roofline.iteration(loop, [], warps=8, schedulers=4, gpu=gpu)
    assert found.clocks == {"issue": 20 * 8 / 4, "memory": 2 * 32 * 16 * 8 / 16, "tensor": 6 * 4096 * 8 / 1024}
    assert found.binds == "memory"
    assert found.of_limit == (512 / 744, 1.0)
    # lanes that ask for the same bytes: tiles say how many there are, and not more than is asked for; one warp has one
    # scheduler
    found = roofline.iteration(
        loop, [TileLoop(256, 1), TileLoop(16, 1), TileLoop(2000, 1)], warps=1, schedulers=1, gpu=gpu
    )
    assert found.clocks == {"issue": 20, "memory": 16, "tensor": 24}
    assert found.binds == "tensor"
    found = roofline.iteration(loop, [TileLoop(16, 1)], warps=1, schedulers=1, gpu=roofline.GPU("some", 16.0, 4096))
    assert found.of_limit == (6 / 27, 6 / 20)


def iteration_of(instructions, **facts):
    given = {"repeats": True, "bytes": 64, "flops": 0, "prefetch": "", "narrow": {}, "mix": {}} | facts
    return roofline.Iteration(instructions, clocks={"issue": 9.0, "memory": 4.0, "tensor": 0.0}, **given)


ROW = roofline.Row("_some_kernel", "bf16", "sm_90", True, 90, 0, 2048, 4, 3, 0.5, [iteration_of(100)])


def test_the_main_loop_is_the_shortest_of_those_with_most_work():
    loops = [iteration_of(100, flops=8), iteration_of(90, flops=8), iteration_of(300), iteration_of(80, flops=4)]
    assert replace(ROW, loops=loops).main is loops[1]


def test_rows_are_written_with_a_page_and_those_of_other_kernels_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(sass, "provenance", lambda device: {"versions": {"triton": "9"}, "commit": "c", "command": "x"})
    other = replace(ROW, kernel="_other_kernel")
    sass.write(tmp_path / "table", [ROW, other], [])
    sass.write(tmp_path / "table", [replace(ROW, registers=91)], [])
    assert sass.read_rows(tmp_path / "table.json") == [other, replace(ROW, registers=91)]
    text = (tmp_path / "table.md").read_text()
    assert "| sm_90 `_some_kernel` | bf16 | 91 | 2 | 4 | 50% | 3 | none | 100 |" in text
    assert "| issue | 31% to 44% |" in text
    monkeypatch.setattr(sass, "provenance", lambda device: {"versions": {"triton": "10"}})
    with pytest.raises(ValueError, match="has rows of Triton 9, this is Triton 10: name another file"):
        sass.write(tmp_path / "table", [ROW], [])


@compiles
def test_what_was_measured_stands_beside_what_the_model_bounds():
    (chosen,) = (each for each in roofline.launches("sm_90")["_choose_victim_kernel"])
    loop = replace(iteration_of(100), clocks={"issue": 1.0, "memory": 4.0, "tensor": 0.0})
    row = replace(ROW, kernel="_choose_victim_kernel", label=chosen.case.label, loops=[loop])

    def measured(microseconds, share, unit="GB/s"):
        return {
            "kernel": "choose_victim", "shape": {"batch": 1, "tokens": round(microseconds)}, "unit": unit,
            "achieved": {"ours": 100 * share}, "limit": 100, "seconds": {"ours": {"median": microseconds / 1e6}},
        }  # fmt: skip

    groups = {"limits": {}, "some": {"rows": [measured(30, 0.2), measured(10, 0.4), measured(5, 0.9, "TFLOP/s")]}}
    (found,) = sass.compare([row], {"kernels": groups})
    # at the limit it would have taken 4 us
    assert (found.shape, found.microseconds, found.predicted) == ("1 x 10", 10, (4, 5))
    assert found.misses_by == 2
    assert found._replace(microseconds=4.5).misses_by == 1
    assert found._replace(microseconds=2.0).misses_by == 0.5


def test_where_no_disassembler_is_the_error_says_what_is_missing(monkeypatch):
    class Tools:
        @property
        def cuobjdump(self):
            raise RuntimeError("Cannot find cuobjdump")

    knobs = SimpleNamespace(nvidia=Tools())
    monkeypatch.setattr(machine_code, "triton", SimpleNamespace(knobs=knobs, __version__="9"))
    with pytest.raises(FileNotFoundError, match="takes cuobjdump, which Triton 9 does not bring here: install"):
        machine_code.find_cuobjdump()


@compiles
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "sm_80,sm_70"}, "--arch must be one of sm_80, sm_90, sm_100, got 'sm_70'"),
        ({"which": "all"}, "--which must be one of first, typical, every, got 'all'"),
        ({"kernel": "_no_kernel"}, "--kernel must be one of .*_split_kernel.*, got '_no_kernel'"),
    ],
)
def test_an_option_that_is_not_known_is_refused_with_those_that_are(options, message):
    with pytest.raises(ValueError, match=message):
        sass.main(**options)


# what may move in pieces of one or two bytes in a loop, or be copied in pieces below 16
NARROW = {
    "_causal_kernel": {"LDG.E.U8": "the padding mask, a byte a token"},
    "_chunk_scores_kernel": {"LDG.E.U8": "whether a chunk is there, a byte each"},
    "_fill_kernel": {"LDG.E.U16": "coefficients, whose mask is not known to be constant over 16 bytes: a loss"},
    "_landmark_lse_kernel": {"LDG.E.U8": "whether a chunk is open, a byte each"},
    "_packed_kernel": {
        "LDG.E.U16": "scales and zeros, one for a group; outliers",
        "LDG.E.U8": "places of outliers in their row, a byte each",
        "STS.U16": "codes unpacked, which are laid out anew for the product: a loss, and its time is in the table",
        "LDS.U16": "the same",
        "LDGSTS.E": "positions; rows of short groups, whose codes lie apart",
        "LDGSTS.E.64": "rows of short groups, whose codes lie apart",
    },
    "_packed_rows_kernel": {
        "LDG.E.U16": "scales of slots' tokens, one for a group",
        "LDGSTS.E": "positions, scales and zeros, one a token",
        "LDGSTS.E.64": "the same of two tokens",
        "STS.U16": "third bits of 3-bit codes and scales that are laid out anew",
        "LDS.U16": "the same",
    },
    "_quantise_kernel": dict.fromkeys(
        ("LDS.U8", "LDS.U16", "STS.U8", "STS.U16", "STG.E.U8", "STG.E.U16"),
        "codes and outliers leave as bytes and 16-bit numbers, once a block",
    ),
    "_rebuild_kernel": {"LDGSTS.E.64": "a tile's 2-bit codes, a kilobyte beside 16 of the matrix"},
    "_residual_kernel": {
        "LDG.E.U16": "scales and outliers",
        "LDG.E.U8": "codes and places of outliers",
        "STG.E.U16": "a factor of few columns",
    },
    "_select_chunks_kernel": {
        "LDG.E.U8": "whether a chunk is open, a byte each",
        "STS.U8": "which slots have a new chunk, a byte each",
        "STG.E.U8": "which slots have a new chunk, a byte each",
    },
    "_split_kernel": {"LDG.E.U8": "the padding mask, a byte a token", "LDGSTS.E": "positions, one a token"},
}
# an instruction more of thirty is no loss
SLACK = 1.03


# besides every kernel for an H100, what is compiled in each run for the GPUs before and after it; the others are slow
FOR_OTHER_GPUS = ("_bulk_kv_kernel", "_causal_kernel", "_split_kernel")


def recorded_rows(arch):
    """What was recorded of this Triton for a GPU; nothing for a Triton of which nothing was."""
    file = RECORDED / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.json"
    return [row for row in sass.read_rows(file) if row.arch == arch] if file.exists() else []


def recorded_launches():
    """The launch that stands for each kernel, on each GPU."""
    for row in (row for arch in roofline.GPUS for row in recorded_rows(arch) if row.is_representative):
        is_slow = row.arch != "sm_90" and row.kernel not in FOR_OTHER_GPUS
        yield pytest.param(row, id=f"{row.arch}-{row.kernel}", marks=pytest.mark.slow if is_slow else ())


def faults(row, recorded):
    """In what a launch is worse than recorded."""
    if row.error:
        return [row.error]
    found = [f"spills {row.spilled} bytes"] if row.spilled else []
    for loop, before in zip_longest(row.loops, recorded.loops):
        for name, count in (loop.narrow if loop and loop.repeats else {}).items():
            if name not in NARROW.get(row.kernel, {}):
                found.append(f"moves narrowly: {count} {name} in a loop")
            elif count > (before.narrow.get(name, 0) if before else 0):
                found.append(f"moves narrowly: {count} {name} in a loop, more than recorded")
    main, before = row.main, recorded.main
    if before.prefetch and not main.prefetch:
        found.append(f"does not prefetch, and did by {before.prefetch}")
    if main.instructions > SLACK * before.instructions:
        found.append(f"takes {main.instructions} instructions an iteration, {before.instructions} were recorded")
    return found


@pytest.mark.parametrize(
    ("worse", "fault"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"loops": [iteration_of(104, prefetch="tma")]}, "takes 104 instructions an iteration, 100 were recorded"),
        ({"loops": [iteration_of(100)]}, "does not prefetch, and did by cp.async 2"),
        ({"loops": [iteration_of(9, prefetch="tma", narrow={"STS.U8": 1})]}, "moves narrowly: 1 STS.U8 in a loop"),
        (
            {"loops": [iteration_of(9, prefetch="tma", narrow={"LDG.E.U8": 3})]},
            "moves narrowly: 3 LDG.E.U8 in a loop, more than recorded",
        ),
        ({"error": "does not compile"}, "does not compile"),
        ({"loops": [iteration_of(103, prefetch="tma", narrow={"LDG.E.U8": 2})]}, None),
    ],
)
def test_the_ratchet_finds_what_is_worse(worse, fault):
    loop = iteration_of(100, prefetch="cp.async 2", narrow={"LDG.E.U8": 2})
    row = replace(ROW, kernel="_causal_kernel", loops=[loop])
    assert faults(replace(row, **worse), row) == ([fault] if fault else [])


@compiles
@pytest.mark.parametrize("arch", roofline.GPUS)
def test_every_kernel_has_a_recorded_launch_that_stands_for_it(arch):
    rows = recorded_rows(arch)
    if not rows:
        pytest.skip(f"nothing is recorded of Triton {triton.__version__}")
    assert {row.kernel for row in rows if row.is_representative} == set(roofline.launches(arch))


# docs: It does so for an H100, and with `--arch sm_80,sm_100` for an A100 and a B200.
@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_what_is_recorded_was_compiled_without_spills_on_every_gpu(version):
    rows = sass.read_rows(RECORDED / f"triton-{version}.json")
    assert {row.arch for row in rows} == set(roofline.GPUS)
    # compared with itself: what is worse than nothing is allowed to be
    assert {f"{row.arch} {row.kernel} {row.label}": faults(row, row) for row in rows if faults(row, row)} == {}


# docs: `kvcompress bench sass` needs no GPU
@compiles
@pytest.mark.parametrize("recorded", recorded_launches())
def test_the_machine_code_of_a_kernel_is_no_worse_than_recorded(recorded):
    """What is better, or has to be otherwise, is recorded.

    By `kvcompress bench sass --kernel NAME --out evals/results/sass/triton-3.9`, with `--arch sm_80,sm_100 --which
    first` for other GPUs; the number is this Triton's.
    """
    (first,) = (each for each in roofline.launches(recorded.arch)[recorded.kernel] if each.is_representative)
    found = faults(roofline.read_launch(recorded.kernel, first.place, recorded.arch), recorded)
    assert found == []


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("kernel", sorted({row.kernel for row in recorded_rows("sm_90") if not row.is_representative}))
def test_the_machine_code_of_every_recorded_launch_is_no_worse(kernel):
    rows = {row.label: row for row in recorded_rows("sm_90") if row.kernel == kernel}
    typical = [each for each in roofline.launches("sm_90")[kernel] if each.is_typical]
    assert {each.case.label for each in typical} == set(rows)
    found = {
        each.case.label: faults(roofline.read_launch(kernel, each.place, "sm_90"), rows[each.case.label])
        for each in typical
    }
    assert not {label: worse for label, worse in found.items() if worse}

import json

import pytest

from kvcompress import measure_basis
from kvcompress.cli import main
from kvcompress.evals.studies import bits
from kvcompress.evals.sweep import baselines
from tests.contract.models import prompt, tiny


@pytest.fixture(scope="module")
def study():
    rows = [row.tolist() for row in prompt(105, 4)]
    return bits.Study(tiny(), {"one": rows[:2], "other": rows[2:]}, context=64, chunk=8)


def test_more_bits_are_closer_to_the_full_cache(study):
    found = [study.measure(f"gear:bits={size}:group_size=16:buffer=16") for size in (2, 3, 4, 8)]
    assert [row.kl for row in found] == sorted((row.kl for row in found), reverse=True)
    assert found[-1].kl < 0.01 < found[0].kl
    assert found[-1].top1 > 0.98
    assert set(found[0].losses) == {"one", "other"}
    # of a small model one text's loss may be near 0 by chance
    assert max(map(abs, found[-1].losses.values())) < 0.01 < 0.1 < max(map(abs, found[0].losses.values()))


def test_what_is_never_packed_loses_nothing(study):
    row = study.measure("gear:buffer=256:tail_bits=none")
    assert row.bits is None
    assert row.kl < 1e-6
    assert row.top1 == 1.0
    assert row.perplexity == pytest.approx(row.full_perplexity)


def test_bits_are_those_of_the_packed_tokens_with_all_that_belongs_to_them(study):
    row = study.measure("gear:bits=4:value_bits=4:sinks=0:group_size=16:buffer=16")
    # head_dim 16, groups of 16: a scale and a zero for 16 numbers; a position of 32 bits for 2 heads' keys and values
    assert row.bits == pytest.approx(4 + 32 / 16 + 32 / (2 * 2 * 16))
    # a tail of 16 tokens in 8 bits beside 64 packed ones
    assert row.all_bits == pytest.approx(row.bits + (8 + 32 / 16 + 32 / (2 * 2 * 16)) * 16 / 64)
    longer = bits.Study(study.model, {"one": [prompt(80)[0].tolist()]}, context=70, chunk=8)
    assert longer.measure("gear:bits=4:value_bits=4:sinks=0:group_size=16:buffer=16").bits == pytest.approx(
        row.bits, rel=0.02
    )


def test_transformers_own_caches_are_measured_beside_ours(study):
    row = study.measure("dynamic")
    assert (row.bits, row.all_bits) == (None, 32.0)
    assert row.kl < 1e-6
    if baselines.installed("quanto"):
        assert study.measure("quanto:bits=4").kl > 1e-3


def test_files_are_measured_by_what_lies_on_the_disk(study):
    with_basis = bits.Study(
        study.model,
        {"one": [row.tolist() for row in prompt(405, 2)]},
        context=360,
        chunk=45,
        basis=measure_basis(study.model, [prompt(200, 2, seed=9)]),
    )
    found = [with_basis.measure(f"dense:codec_bits={size}") for size in (3, 6)]
    assert found[0].kl > 3 * found[1].kl
    # what a file says beside its tensors counts for much in a tiny model
    assert all(size < row.bits < size + 0.6 for size, row in zip((3, 6), found, strict=True))
    for row in found:
        assert row.file.nbytes * 8 == pytest.approx(row.bits * 2 * 3 * 2 * 32 * 360)
        assert row.file.nbytes < 0.25 * row.file.plain_nbytes
        assert min(row.file.save_seconds, row.file.load_seconds, row.file.prefill_seconds) > 0
    exact = with_basis.measure("dense:codec=zstd")
    assert exact.kl < 1e-6
    assert 16 < exact.bits < 32.6
    half = with_basis.measure("dense:dtype=bfloat16:codec=zstd")
    assert half.all_bits == 16
    assert half.bits < 14
    packed = with_basis.measure("gear:bits=4:buffer=16:group_size=16:codec=zstd")
    assert packed.bits < packed.all_bits + 0.6


def test_a_codec_that_cannot_be_measured_says_why(study):
    for setting, match in (
        ("dense:codec_bits=2", "needs a basis: --basis basis.safetensors"),
        ("dense:codec=gzip", "codec must be zstd, or codec_bits be given"),
        ("dense:codec=zstd:x=1", "dense takes dtype, codec and codec_bits"),
        ("none:codec=zstd", "files are measured of dense, gear and kivi"),
    ):
        with pytest.raises(ValueError, match=match):
            study.measure(setting)


def test_other_caches_are_refused(study):
    with pytest.raises(ValueError, match="bits can be measured for gear, kivi, dynamic, quanto, hqq, fp8, got 'none'"):
        study.measure("none")


def test_the_command_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    class Words:
        def encode(self, text, add_special_tokens):
            return [2 + (7 * number) % 500 for number, _ in enumerate(text)]

    monkeypatch.setattr(bits, "load_model", lambda name: (tiny(), Words()))
    text = tmp_path / "words.txt"
    text.write_text("x" * 200)
    out = tmp_path / "rows.json"
    sizes = ["--context", "64", "--scored", "16", "--chunk", "8", "--windows", "2"]
    settings = ["--settings", "gear:buffer=16:group_size=16,kivi"]
    assert main(["study", "bits", *settings, "--text", str(text), *sizes, "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [row["setting"] for row in written["rows"]] == ["gear:buffer=16:group_size=16", "kivi"]
    printed = capsys.readouterr().out
    for row in written["rows"]:
        loss = row["perplexity"]["words"] / row["full_perplexity"]["words"] - 1
        assert f"words {loss:+.1%}" in printed
    assert written["versions"]["torch"]
    assert main(["study", "bits", "--text", str(text), *sizes[:-1], "9"]) == 2
    assert "text must hold 9 windows of 64 + 17 = 81 tokens, got 200 tokens" in capsys.readouterr().err

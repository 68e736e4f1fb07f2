"""Which model types are served: the page in the docs is what was found, and what is refused stays refused by name."""

from pathlib import Path

import pytest
import transformers

from kvcompress import hf
from kvcompress.check import coverage, models
from kvcompress.check.coverage import CORE, Covered
from kvcompress.check.outcome import FULL
from kvcompress.check.typical import TYPICAL
from kvcompress.cli import main

ROOT = Path(__file__).parents[2]
FOUND = coverage.read((ROOT / "evals/results/coverage/types.jsonl").read_text("utf-8"))
PAGE = (ROOT / "docs/reference/types.md").read_text("utf-8")
of_this_release = pytest.mark.skipif(
    {row.release for row in FOUND} != {transformers.__version__}, reason="found with another transformers"
)


def test_the_page_is_what_was_found():
    assert coverage.table(FOUND) == PAGE


@of_this_release
def test_every_type_is_on_the_page_and_none_is_at_fault():
    known = {row.type for row in FOUND}
    assert known <= set(hf.model_types())
    # the others are encoder-decoders
    for name in set(hf.model_types()) - known:
        with pytest.raises(ValueError, match="is an encoder-decoder model"):
            models.small_model(name)
    assert [row.type for row in FOUND if row.served == "fault"] == []


@of_this_release
@pytest.mark.parametrize("name", [row.type for row in FOUND if row.served == "refused" and not row.outcomes])
def test_what_no_cache_serves_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name.partition("_")[0]):
        models.small_model(name)


@pytest.mark.parametrize("name", ["llama", "lfm2", "bert", "llava"])
def test_types_are_served_as_the_page_says(name):
    (known,) = [row for row in FOUND if row.type == name]
    found = coverage.cover(name, known.kind)
    assert (found.served, dict(found.outcomes)) == (known.served, dict(known.outcomes))
    assert found.served == "served"


@pytest.mark.slow
@of_this_release
@pytest.mark.parametrize("row", FOUND, ids=lambda row: row.type)
def test_every_type_is_served_as_the_page_says(row):
    assert coverage.cover(row.type, row.kind).served == row.served


@pytest.mark.parametrize(
    ("outcomes", "reason", "served"),
    [
        ("OOOOO", "", "served"),
        ("OOORO", "rotates in its own way", "served"),
        ("OORRO", "", "partly"),
        ("ORRRO", "", "partly"),
        ("RRRR", "", "refused"),
        ("RRRRF", "", "refused"),
        ("OFOOO", "", "fault"),
        ("OOFRO", "", "fault"),
        ("OOOOF", "", "unknown"),
        ("FFFFF", "", "unknown"),
        ("", "chooses what tokens attend to by an indexer", "refused"),
        ("", "no small model could be made", "unknown"),
    ],
)
def test_a_type_is_what_its_caches_make_it(outcomes, reason, served):
    words = {"O": "OK", "R": "REFUSED", "F": "FAULT"}
    each = {name: words[letter] for name, letter in zip((*CORE, FULL), outcomes, strict=False)}
    assert Covered("x", "text", each, reason).served == served


def test_a_file_of_results_is_read_again_and_told_on_a_page():
    rows = [
        Covered("zeta", "text", dict.fromkeys((*CORE, FULL), "OK")),
        Covered("alpha_moe", "text", {}, "alpha_moe uses a | b <c>"),
        Covered("sees", "multimodal", {}, "no small model could be made of sees"),
    ]
    again = coverage.read("\n".join(map(coverage.line, rows)))
    assert again == rows
    page = coverage.table(rows)
    assert "2 types: 1 served, 1 refused." in page
    assert "| `zeta` | served | OK | OK | OK | OK |  |" in page
    assert r"| `alpha_moe` | refused |  |  |  |  | alpha\_moe uses a   b  c  |" in page
    assert page.index("alpha_moe") < page.index("zeta") < page.index("sees")


def test_the_command_goes_on_from_its_file_and_its_status_is_a_fault(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(coverage.hf, "model_types", lambda: {"a": "text", "b": "text", "c": "multimodal"})
    asked = []

    def cover(name, kind):
        asked.append(name)
        return Covered(name, kind, dict.fromkeys((*CORE, FULL), "FAULT" if name == "b" else "OK") | {FULL: "OK"})

    monkeypatch.setattr(coverage, "cover", cover)
    out = tmp_path / "types.jsonl"
    out.write_text(coverage.line(cover("a", "text")) + "\n")
    assert main(["check", "--all", "--out", str(out)]) == 1
    assert asked == ["a", "b", "c"]
    told = capsys.readouterr().out
    assert "text: 2 types: 1 served, 1 fault" in told
    assert "multimodal: 1 types: 1 served" in told
    assert [row.type for row in coverage.read(out.read_text())] == ["a", "b", "c"]
    assert main(["check", "--all", "--out", str(out)]) == 1
    assert asked == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "x.jsonl"], "--out is of --all"),
        (["--all", "--model", "llama"], "--all checks tiny models of all types"),
        (["--all", "--caches", "h2o"], "give it --out alone"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, told, capsys):
    assert main(["check", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_an_encoder_is_refused_unless_it_is_told_to_decode():
    assert models.read_config("bert").is_decoder
    with pytest.raises(ValueError, match=r"bert is an encoder \(is_decoder=False\)"):
        hf.check_served(transformers.AutoConfig.for_model("bert"), "bert")


def test_typical_sizes_are_those_of_the_type_alone(tmp_path):
    """A checkpoint of such a type is made smaller by rule, as any."""
    config = transformers.AutoConfig.for_model("lfm2", **TYPICAL["lfm2"] | {"hidden_size": 128})
    config.save_pretrained(tmp_path / "mine")
    assert models.read_config(str(tmp_path / "mine")).hidden_size == 128
    assert models.read_config("lfm2").hidden_size == 64

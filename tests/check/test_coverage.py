"""Which model types are served: the page in the docs is what was found, and what is refused stays refused by name."""

from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from kvcompress import hf
from kvcompress.check import coverage, models
from kvcompress.check.coverage import CORE, Covered
from kvcompress.check.outcome import FULL
from kvcompress.check.typical import COMPLETED, TYPICAL
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


@of_this_release
def test_types_are_grouped_as_transformers_lists_them():
    """What is known as a masked language model is an encoder, and counts with no decoder-only language model."""
    kinds = hf.model_types()
    assert {row.type: row.kind for row in FOUND} == {row.type: kinds[row.type] for row in FOUND}
    masked = [name for name in kinds if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES]
    assert {name for name in masked if kinds[name] != "other"} == {"reformer"}
    further = {name for name, kind in kinds.items() if kind == "other"} - set(masked)
    assert further == {"bert-generation", "gemma4_assistant", "gemma4_unified_assistant", "pi0", "trocr", "xlnet"}
    for name in further:
        assert f"`{name}`" in PAGE.partition("## No decoder-only language models")[2].partition("|")[0]
    # whatever is known by masked tokens and is not told to decode is refused
    for name in masked:
        config = transformers.AutoConfig.for_model(name)
        if getattr(config, "is_decoder", True) is False and name != "reformer":
            with pytest.raises(ValueError, match=r"is an encoder \(is_decoder=False\)"):
                hf.check_served(config, name)


@of_this_release
def test_what_has_no_keys_and_values_is_refused_in_those_words():
    states = [row for row in FOUND if row.kind == "states"]
    assert {row.type for row in states} == {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}
    for row in states:
        assert row.reason.startswith(f"{row.type} has no attention whose keys and values could be compressed")


def test_the_page_says_how_many_decoder_only_types_are_served():
    decoders = [row for row in FOUND if row.kind in ("text", "multimodal")]
    served = [row for row in decoders if row.served == "served"]
    (release,) = {row.release for row in FOUND}
    said = (
        f"Of {len(decoders)} types of decoder-only language models in transformers {release}, {len(served)} are served."
    )
    assert said in PAGE
    assert len(decoders) == len(FOUND) - sum(row.kind in ("other", "states") for row in FOUND) > len(served)


@pytest.mark.parametrize("name", ["llama", "lfm2", "bert", "roberta", "llava", "hunyuan_vl"])
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
    assert "Of 3 types of decoder-only language models" in page
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


@pytest.mark.slow
@of_this_release
@pytest.mark.parametrize("name", COMPLETED)
def test_without_its_settings_a_type_makes_no_model_that_runs(monkeypatch, name):
    """None stands for nothing: a later transformers may have better defaults."""
    assert name not in TYPICAL
    monkeypatch.setattr(models, "COMPLETED", {})
    found = coverage.cover(name, "text")
    assert found.served in ("unknown", "refused")
    assert (found.served, found.reason) != next((row.served, row.reason) for row in FOUND if row.type == name)

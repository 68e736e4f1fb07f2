"""The notebook runs, shows what is stored in it, and keeps its promise."""

import json
import re
from pathlib import Path

import kvcompress

PATH = Path(__file__).parents[1] / "examples" / "long_document.ipynb"
CELLS = json.loads(PATH.read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def stored(cell):
    """What a cell printed when `make notebooks` ran it."""
    return "".join("".join(each["text"]) for each in cell["outputs"] if each["output_type"] == "stream")


def test_the_notebook_answers_three_questions_at_a_tenth_of_the_memory(smollm2, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.setattr(kvcompress, "load_model", lambda: smollm2)
    names = {}
    printed = []
    for cell in CODE:
        exec(compile("".join(cell["source"]), str(PATH), "exec"), names)
        printed.append(capsys.readouterr().out)
    # what it shows is what comes out, but for a last word on another machine
    for cell, out in zip(CODE, printed, strict=True):
        assert re.findall(r"^.*\?$|[\d.]+%", out, re.M) == re.findall(r"^.*\?$|[\d.]+%", stored(cell), re.M)
    answers = next(out for out in printed if "?" in out)
    assert len(names["QUESTIONS"]) == 3
    for word in ("blue door", "Thursday", "Pluto"):
        assert word in answers
        assert word in names["document"]
    assert float(re.search(r"([\d.]+)% of the full cache", answers)[1]) <= 10
    # bytes over time: everything is held until the second reading, and after it little
    full, compressed = ([one.bytes for one in names[name]] for name in ("full", "compressed"))
    assert max(compressed) > 0.9 * full[1]
    assert compressed[-1] < 0.15 * full[-1]
    (figure,) = [names["figure"]]
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["full cache", "KVzip, 40 % in 4 bits"]
    assert all(
        list(line.get_ydata()) == [size / 2**20 for size in held]
        for line, held in zip(lines, (full, compressed), strict=True)
    )
    matplotlib.pyplot.close(figure)


def test_it_is_stored_with_what_it_shows():
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}
    assert not [each for cell in CODE for each in cell["outputs"] if each.get("name") == "stderr"]
    assert "image/png" in CODE[-1]["outputs"][0]["data"]


def test_its_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        page, _, anchor = link.partition("#")
        text = (PATH.parent / page).read_text("utf-8")
        assert not anchor or f"## {anchor.replace('-', ' ')}" in text.lower(), link

import csv
import json

import pytest

from kvcompress.evals.sweep import report
from tests.evals.sweep.reported import FAILED, row, rows


def test_protocols_are_plotted_apart_and_text_has_its_kl():
    panels = report.make_panels(rows())
    assert [[(p.rows[0]["protocol"], p.value) for p in line] for line in panels] == [
        [("question-aware", "score"), ("question-agnostic", "score")],
        [("continuation", "score"), ("continuation", "kl")],
    ]


def test_rows_without_a_figure_are_left_out_of_its_plot(tmp_path):
    newer = {"task": "text", "protocol": "continuation", "kl": 0.1, "kl_stderr": 0.01}
    more = {"attention_error": 0.2, "attention_error_stderr": 0.02}
    made = [row("none", None, **newer), row("h2o", 0.5, **newer, **more), row("h2o", 0.2, **newer, **more)]
    (line,) = report.make_panels(made)
    assert [(panel.value, len(panel.rows)) for panel in line] == [("score", 3), ("kl", 3), ("attention_error", 2)]
    assert report.draw(made, tmp_path / "plot.png")


def test_failed_rows_are_in_no_plot_but_in_table_and_page(tmp_path):
    broken = [*rows(), row("knorm", 0.5) | FAILED]
    assert all(r["status"] == "ok" for line in report.make_panels(broken) for panel in line for r in panel.rows)
    paths = report.write_all(broken, tmp_path)
    assert [path.name for path in paths] == ["results.csv", "accuracy.png", "report.html"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    page = paths[2].read_text()
    assert "RuntimeError: &lt;no&gt; luck" in page
    assert "kvcompress sweep &lt;b&gt;" in page
    with paths[0].open() as file:
        assert [line["status"] for line in csv.DictReader(file)].count("failed") == 1
    assert not list(tmp_path.glob("*.partial"))


def test_where_everything_failed_there_is_a_page_and_no_plot(tmp_path):
    paths = report.write_all([row() | FAILED], tmp_path)
    assert [path.name for path in paths] == ["results.csv", "report.html"]


def test_tables_have_a_line_a_method_and_a_column_a_budget():
    tables = report.make_tables([*rows(), row("knorm", 0.5) | FAILED])
    aware = tables[0]
    assert aware.title == "needle, 512 tokens, question-aware: answers found"
    assert aware.budgets == ("50%", "20%")
    assert [line[0] for line in aware.lines] == ["full cache (ceiling)", "h2o", "streaming (floor)", "knorm"]
    # two points make the front: the floor is worse in as many bytes, and has found nothing in fewer
    assert aware.lines[1][1:] == ("0.75 ±0.10 (2.0 MiB) *", "0.25 ±0.10 (0.8 MiB) *")
    assert aware.lines[2][1] == "0.50 ±0.10 (1.9 MiB) *"
    assert aware.lines[3] == ("knorm", "failed", "")
    assert tables[-1].lines[1][1] == "0.90 / 0.100 (2.0 MiB) *"


@pytest.mark.parametrize("budget", [64, 0.5])
def test_a_budget_in_tokens_is_told_from_a_fraction(budget):
    (table,) = report.make_tables([row("none", None), row(budget=budget)])
    assert table.budgets == (("64 tokens",) if budget == 64 else ("50%",))


# docs: what each method gains over sinks + recent at equal bytes
def test_each_method_is_held_against_the_floor_at_equal_bytes():
    tables = report.make_comparisons([*rows(), row("knorm", 0.5) | FAILED])
    assert [table.title for table in tables] == [
        "needle, 512 tokens, question-aware: answers found, gained over the floor at equal bytes",
        "needle, 512 tokens, question-agnostic: answers found, gained over the floor at equal bytes",
        "text, 512 tokens, continuation: answers found, gained over the floor at equal bytes",
        "text, 512 tokens, continuation: KL from the full cache, nats, gained over the floor at equal bytes",
    ]
    assert tables[0].budgets == ("50%", "20%")
    # between the floor's point of 1990 KiB and the full cache; between its two points
    assert tables[0].lines == (("h2o", "+0.248 ±0.141", "+0.246 ±0.141"),)
    # the text has no floor but the full cache
    assert tables[2].lines == (("h2o", ""),)


def test_the_table_for_a_spreadsheet_has_front_and_floor(tmp_path):
    report.write_csv(rows(), tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        found = [(line["pareto"], line["over_floor"]) for line in list(csv.DictReader(file))[:5]]
    assert found == [("False", "0.0"), ("True", "0.247512"), ("True", "0.245833"), ("True", "0.0"), ("False", "0.0")]


def test_tasks_without_a_length_are_named_with_their_examples():
    harness = {"task": "local_piqa", "length": None, "num_fewshot": 5, "metric": "acc"}
    (table,) = report.make_tables([row("none", None, **harness), row("h2o", 0.2, **harness)])
    assert table.title == "local_piqa, 5-shot, question-aware: acc"
    assert report.describe(row(**harness)) == "local_piqa question-aware, h2o 0.5"


def test_where_less_is_better_the_front_falls_in_plot_and_table(tmp_path):
    less = {"higher_is_better": False, "metric": "word_perplexity"}
    made = [
        row("none", None, 10.0, 4000, **less),
        row("h2o", 0.5, 12.0, 2000, **less),
        row("h2o", 0.6, 13.0, 2400, **less),
    ]
    (table,) = report.make_tables(made)
    assert [cell.endswith("*") for cell in table.lines[1][1:]] == [True, False]
    (line,) = report.make_panels(made)
    assert not line[0].rises
    assert report.draw(made, tmp_path / "plot.png")


def write(folder, *made):
    folder.mkdir()
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, made)) + "\n")
    return folder


def test_several_sweeps_are_put_into_one_order(tmp_path):
    first = write(tmp_path / "one", row("streaming", 0.2), row("none", None), row("h2o", 0.5), row("h2o", 0.2) | FAILED)
    other = write(tmp_path / "two", row("h2o", 0.2), row("h2o", 64), row("none", None, task="kv"), row("h2o", 0.1))
    found = [(r["task"], r["method"], r["budget"], r["status"]) for r in report.collect([first, other])]
    assert found == [
        ("needle", "none", None, "ok"), ("needle", "h2o", 0.1, "ok"), ("needle", "h2o", 0.2, "ok"),
        ("needle", "h2o", 0.5, "ok"), ("needle", "h2o", 64, "ok"), ("needle", "streaming", 0.2, "ok"),
        ("kv", "none", None, "ok"),
    ]  # fmt: skip


def test_sweeps_of_several_models_keep_them_apart(tmp_path):
    first = write(tmp_path / "one", row("h2o", 0.2))
    other = write(tmp_path / "two", row("h2o", 0.2, model="org/large") | {"key": "x"})
    assert [r["task"] for r in report.collect([first, other])] == ["tiny: needle", "large: needle"]


def test_a_folder_without_rows_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there are no rows of a sweep \(results.jsonl\) in "):
        report.collect([tmp_path])


def test_a_peers_rows_stand_after_ours_in_plot_table_and_page(tmp_path):
    made = [row("kvpress-tova", 0.2, 0.75, 800), row("h2o", 0.2), row("none", None, 1.0, 2000)]
    write(tmp_path / "ours", *made[1:])
    write(tmp_path / "theirs", made[0])
    rows = report.collect([tmp_path / "ours", tmp_path / "theirs"])
    paths = report.write_all(rows, tmp_path)
    assert [found["method"] for found in rows] == ["none", "h2o", "kvpress-tova"]
    assert [path.name for path in paths] == ["results.csv", "accuracy.png", "report.html"]
    assert "kvpress-tova" in paths[-1].read_text()

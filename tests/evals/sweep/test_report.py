import csv
import json

import pytest

from kvcompress.cli import main
from kvcompress.cli.sweeps import show
from kvcompress.evals.sweep import report
from tests.evals.sweep.reported import FAILED, row, rows, scored


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
    assert aware.title == "needle, 512 tokens, question-aware: answers found, n = 4"
    assert aware.budgets == ("50%", "20%")
    assert [line[0] for line in aware.lines] == ["full cache (ceiling)", "h2o", "streaming (floor)", "knorm"]
    # two points make the front: the floor is worse in as many bytes, and has found nothing in fewer
    assert aware.lines[1][1:] == ("0.75 [0.55,0.95] (2.0 MiB) *", "0.25 [0.05,0.45] (0.8 MiB) *")
    assert aware.lines[2][1] == "0.50 [0.30,0.70] (1.9 MiB) *"
    assert aware.lines[3] == ("knorm", "failed", "")
    (early,) = report.make_tables([row(), row("tova", samples=3, stopped_at={"precision": None})])
    assert early.lines[1][1] == "0.50 [0.30,0.70] (1.0 MiB, n = 3, stopped early)"
    assert tables[-1].lines[1][1] == "0.90 / 0.100 (2.0 MiB) *"


@pytest.mark.parametrize("budget", [64, 0.5])
def test_a_budget_in_tokens_is_told_from_a_fraction(budget):
    (table,) = report.make_tables([row("none", None), row(budget=budget)])
    assert table.budgets == (("64 tokens",) if budget == 64 else ("50%",))


def test_ties_are_told_in_a_sentence():
    made = [scored([1.0] * 12, "none", None), scored([1.0] * 12, "tova"), scored([1.0] * 11 + [0.0], "h2o")]
    made += [scored([0.0] * 12, "knorm"), scored([0.0] * 12, "knorm", 0.2), scored([1.0] * 12, "gear", None)]
    place = "needle, 512 tokens, question-aware"
    assert [str(tie) for tie in report.make_ties(made)] == [
        f"{place}, 50%: best is tova with 1.00, not told apart from h2o; not told apart from the full cache: tova, h2o",
        f"{place}, 20%: nothing was found; not told apart from the full cache: no method",
        f"{place}, all tokens: gear alone was measured, with 1.00; not told apart from the full cache: gear",
    ]
    apart = [scored([1.0] * 12, "tova"), scored([0.0] * 12, "knorm")]
    assert [str(tie) for tie in report.make_ties(apart)] == [
        f"{place}, 50%: best is tova with 1.00, told apart from all others"
    ]


def test_nothing_found_in_a_few_samples_is_no_tie():
    made = [scored([1.0, 0.0, 0.0], "none", None), scored([0.0] * 3, "h2o"), scored([0.0] * 3, "tova")]
    (tie,) = report.make_ties(made)
    assert str(tie).endswith("50%: nothing was found; too few samples (3) to tell from the full cache")
    # of many, it is one
    none = [scored([0.0] * 30, name, None if name == "none" else 0.5) for name in ("none", "h2o")]
    assert str(report.make_ties(none)[0]).endswith("not told apart from the full cache: h2o")


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
    assert tables[0].lines == (("h2o", "+0.248 [-0.03,+0.52]", "+0.246 [-0.03,+0.44]"),)
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
    assert table.title == "local_piqa, 5-shot, question-aware: acc, n = 4"
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


# docs: the names of their tasks then say what differs
def test_sweeps_of_other_settings_keep_them_apart(tmp_path):
    first = write(tmp_path / "one", row("none", None, turns=3), row("h2o", 0.2, turns=3))
    changes = {"dtype": "bfloat16"}, {"turns": 5}, {"text": "0123456789abcdef"}
    # one that lacks a setting, and one without a text
    others = [write(tmp_path / f"{at}", row("none", None, **new) | {"key": f"{at}"}) for at, new in enumerate(changes)]
    assert [r["task"] for r in report.collect([first, others[0]])] == ["needle (float32)"] * 2 + ["needle (bfloat16)"]
    assert [r["task"] for r in report.collect([first, others[1]])] == ["needle (turns 3)"] * 2 + ["needle (turns 5)"]
    assert {r["task"] for r in report.collect([first, others[2]])} == {"needle"}
    texts = write(tmp_path / "text", row("h2o", 0.2, text="fedcba9876543210") | {"key": "z"})
    assert [r["task"] for r in report.collect([others[2], texts])] == [
        "needle (text 01234567)",
        "needle (text fedcba98)",
    ]
    # in another protocol nothing differs
    other = write(tmp_path / "aware", row("h2o", 0.2, protocol="question-agnostic", dtype="bfloat16"))
    assert {r["task"] for r in report.collect([first, other])} == {"needle"}


def test_lines_that_are_no_rows_are_named(tmp_path, capsys):
    folder = write(tmp_path / "one", row("none", None), row("h2o", 0.2), row("streaming", 0.2))
    file = folder / "results.jsonl"
    file.write_text("\x00\xff\n" + file.read_text()[:-30])
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert f"{file}:1 is not a row of a sweep, and is left out" in said
    assert f"{file}:4 is not a row of a sweep, and is left out" in said
    assert f"{file}:2" not in said


# docs: Of a point with several rows, such as those of two seeds, the one with more samples is shown
def test_rows_that_are_not_shown_are_counted_and_marked(tmp_path, capsys):
    folder = write(
        tmp_path / "one",
        row("none", None),
        row("h2o", 0.2, samples=9),
        row("h2o", 0.2, score=0.9, samples=4, seed=1) | {"key": "x"},
    )
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "1 of 3 rows are not shown" in capsys.readouterr().err
    with (tmp_path / "out" / "results.csv").open() as file:
        assert [(line["shown"], line["samples"], line["error"]) for line in csv.DictReader(file)] == [
            ("True", "4", ""), ("True", "9", ""), ("False", "4", ""),
        ]  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert "4 to 9 samples per point" in page


def test_a_score_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is none of a sweep: it lacks score"):
        report.collect([write(tmp_path / "rows", row(score=None))])


def test_old_rows_take_the_full_caches_bytes_from_its_row(tmp_path):
    old = [row("none", None, size=4000), row("h2o", size=1000), row("h2o", size=900, task="kv")]
    for one in old:
        del one["full_bytes"]
    found = report.collect([write(tmp_path / "old", *old)])
    # a task without a row of the full cache stays as it is
    assert [one.get("full_bytes") for one in found] == [4000 * 1024, 4000 * 1024, None]
    assert report.draw(found, tmp_path / "plot.png")
    assert not report.draw(found[2:], tmp_path / "plot.png")


@pytest.mark.parametrize(("status", "lacking"), [("ok", "bytes, score"), ("failed", None)])
def test_a_row_that_says_it_succeeded_has_what_was_measured(tmp_path, status, lacking):
    row_without = {name: value for name, value in row(status=status).items() if name not in ("bytes", "score")}
    folder = write(tmp_path / "rows", row_without)
    if lacking is None:
        assert len(report.collect([folder])) == 1
        return
    with pytest.raises(ValueError, match=f"is none of a sweep: it lacks {lacking}"):
        report.collect([folder])


def test_the_table_for_a_spreadsheet_says_what_is_told_apart(tmp_path):
    made = [scored([1.0] * 12, "none", None, size=4000), scored([1.0] * 12, "tova", size=2000)]
    made += [scored([1.0] * 11 + [0.0], "h2o", size=2000), scored([0.0] * 12, "streaming", size=1900)]
    report.write_csv(made, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        full, tova, h2o, floor = csv.DictReader(file)
    assert [(line["best_of_budget"], line["like_best"], line["like_full"]) for line in (full, tova, h2o, floor)] == [
        ("", "", ""), ("True", "True", "True"), ("", "True", "True"), ("", "", ""),
    ]  # fmt: skip
    # Wilson's, for eleven of twelve
    assert (float(h2o["score_low"]), float(h2o["score_high"])) == pytest.approx((0.6461, 0.9851), abs=1e-4)
    assert float(h2o["over_full"]) == pytest.approx(-1 / 12, abs=1e-6)
    assert float(h2o["over_full_low"]) < float(h2o["over_full"]) < 0 < float(h2o["over_full_high"])
    assert float(floor["over_full_high"]) < 0
    assert (h2o["paired"], float(h2o["over_floor_low"]) > 0) == ("True", True)


def test_of_two_seeds_the_one_that_the_page_shows_is_compared_with_the_others(tmp_path):
    shown, hidden = row(score=0.4, samples=9), row(score=0.9, samples=4, seed=1)
    report.write_csv([shown, hidden, row("tova", score=0.3)], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        assert [line["best_of_budget"] for line in csv.DictReader(file)] == ["True", "", ""]


def test_both_protocols_are_marked_in_the_table_for_a_spreadsheet(tmp_path):
    report.write_csv(rows(), tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        assert all(line["pareto"] and line["score_low"] for line in csv.DictReader(file))


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


def test_the_terminal_uses_the_width_that_it_has(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    made = [row(name, budget) for name in ("h2o:bits=4", "tova", "snapkv") for budget in (0.1, 0.2, 0.3, 0.5)]
    early = row("knorm", 0.2, samples=3, stopped_at={"precision": None})
    assert show([*reversed(made), early], []) == 0
    out = capsys.readouterr().out
    table = out.partition("[low,high]: 95 % interval")[0].splitlines()
    assert 76 <= max(map(len, map(str.rstrip, table))) <= 80
    assert "10%" in table[1] + table[2]
    assert "(floor): sinks + recent tokens" in out
    assert "1 of 13 points stopped early" in out


def axes(made, tmp_path, monkeypatch):
    """The axes of the plot that is drawn of rows, as it is saved."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    assert report.draw(made, tmp_path / "plot.png")
    return saved[0]


# docs: The bars of `accuracy.png` are the same intervals
def test_the_plots_bars_are_the_intervals_of_the_page(tmp_path, monkeypatch):
    figure = axes([scored([1.0] * 12, "h2o")], tmp_path, monkeypatch)
    assert "bars are 95 % intervals" in figure.get_suptitle()
    ((segment,),) = [bar.get_segments() for bar in figure.axes[0].collections if hasattr(bar, "get_segments")]
    assert segment[:, 1] == pytest.approx([0.757, 1.0], abs=1e-3)


def test_the_plots_limits_come_from_what_is_drawn(tmp_path, monkeypatch):
    text = {"task": "text", "protocol": "continuation", "kl_stderr": 0.001}
    made = [row("none", None, 1.0, 4000, kl=1e-9, **text), row("kivi", None, size=1000, kl=1e-8, **text)]
    made += [row("h2o", 0.2, size=800, kl=0.4, **text), row("h2o", 0.5, size=2000, kl=0.1, **text)]
    figure = axes(made, tmp_path, monkeypatch)
    low, high = figure.axes[1].get_ylim()
    assert 0.05 < low < 0.1 / 1.1
    assert 0.4 * 1.1 < high < 0.8
    assert [text.get_text() for text in figure.axes[1].texts] == ["1 point at or near 0 not drawn"]
    titles = [place.get_title() for place in figure.axes]
    assert titles == [
        "text, 512 tokens\ncontinuation: answers found",
        "text, 512 tokens\ncontinuation: KL from the full cache, nats",
    ]


def test_tasks_of_unequal_panels_leave_no_holes(tmp_path, monkeypatch):
    text = {"task": "text", "protocol": "continuation", "kl": 0.1, "attention_error": 0.1}
    made = [row(), row("h2o", **text), *(row(task=task) for task in ("kv", "multikey", "passkey"))]
    figure = axes(made, tmp_path, monkeypatch)
    assert sum(place.get_visible() for place in figure.axes) == 7
    assert len(figure.axes) == 9
    assert [place.get_visible() for place in figure.axes][:7] == [True] * 7

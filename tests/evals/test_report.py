import csv

import pytest

from kvcompress.evals import report


def row(method="h2o", budget=0.5, score=0.5, size=1000, task="needle", protocol="question-aware", **more):
    return {
        "key": f"{task}{protocol}{method}{budget}",
        "status": "ok",
        "task": task,
        "length": 512,
        "protocol": protocol,
        "method": method,
        "budget": budget,
        "metric": "answers found",
        "score": score,
        "stderr": 0.1,
        "bytes": size * 1024,
        "full_bytes": 4000 * 1024,
        "samples": 4,
        "seed": 0,
        "model": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "seconds": 1.0,
        "provenance": {
            "time": "2020-01-01",
            "command": "kvcompress sweep <b>",
            "commit": "abc",
            "machine": "m",
            "threads": 1,
            "python": "3",
            "versions": {"torch": "2"},
        },
    } | more


def rows():
    made = []
    for protocol in ("question-aware", "question-agnostic"):
        made += [
            row("none", None, 1.0, 4000, protocol=protocol),
            row("h2o", 0.5, 0.75, 2000, protocol=protocol),
            row("h2o", 0.2, 0.25, 800, protocol=protocol),
            row("streaming", 0.5, 0.5, 1990, protocol=protocol),
            row("streaming", 0.2, 0.0, 790, protocol=protocol),
        ]
    text = {"task": "text", "protocol": "continuation", "kl_stderr": 0.01}
    return [*made, row("none", None, 1.0, 4000, kl=0.0, **text), row("h2o", 0.5, 0.9, 2000, kl=0.1, **text)]


FAILED = {"status": "failed", "error": "RuntimeError: <no> luck\nmore"}


def test_the_front_is_what_no_other_beats():
    made = [row(score=s, size=b) for s, b in [(0.2, 100), (0.5, 200), (0.4, 250), (0.5, 300), (0.9, 400), (0.0, 50)]]
    full = row("none", None, 1.0, 1000)
    assert [(r["score"], r["bytes"] // 1024) for r in report.pareto_front([*made, full])] == [
        (0.2, 100),
        (0.5, 200),
        (0.9, 400),
    ]


def test_where_less_is_better_the_front_falls():
    made = [row(size=b, kl=k) for k, b in [(0.9, 100), (0.5, 200), (0.6, 250), (0.1, 400)]]
    assert [r["kl"] for r in report.pareto_front(made, "kl", rises=False)] == [0.9, 0.5, 0.1]


def test_of_equal_bytes_the_better_row_is_on_the_front():
    made = [row("h2o", score=0.4), row("knorm", score=0.6)]
    assert [r["method"] for r in report.pareto_front(made)] == ["knorm"]


def test_protocols_are_plotted_apart_and_text_has_its_kl():
    panels = report.make_panels(rows())
    assert [[(p.rows[0]["protocol"], p.value) for p in line] for line in panels] == [
        [("question-aware", "score"), ("question-agnostic", "score")],
        [("continuation", "score"), ("continuation", "kl")],
    ]


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


def test_the_page_needs_nothing_beside_it(tmp_path):
    *_, page = report.write_all(rows(), tmp_path)
    text = page.read_text()
    assert 'src="data:image/png;base64,' in text
    assert "http" not in text


def test_where_everything_failed_there_is_a_page_and_no_plot(tmp_path):
    paths = report.write_all([row() | FAILED], tmp_path)
    assert [path.name for path in paths] == ["results.csv", "report.html"]


def test_tables_have_a_line_a_method_and_a_column_a_budget():
    tables = report.make_tables([*rows(), row("knorm", 0.5) | FAILED])
    aware = tables[0]
    assert aware.title == "needle, 512 tokens, question-aware: answers found"
    assert aware.budgets == ("50%", "20%")
    assert [line[0] for line in aware.lines] == ["full cache (ceiling)", "h2o", "streaming (floor)", "knorm"]
    assert aware.lines[1][1] == "0.75 ±0.10 (2.0 MiB)"
    assert aware.lines[3] == ("knorm", "failed", "")
    assert tables[-1].lines[1][1] == "0.90 / 0.100 (2.0 MiB)"


@pytest.mark.parametrize("budget", [64, 0.5])
def test_a_budget_in_tokens_is_told_from_a_fraction(budget):
    (table,) = report.make_tables([row("none", None), row(budget=budget)])
    assert table.budgets == (("64 tokens",) if budget == 64 else ("50%",))

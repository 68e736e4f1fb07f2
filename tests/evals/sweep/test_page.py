import csv
import html
import json
import os
import re
import shutil
import subprocess

import pytest

from kvcompress.evals.sweep import report
from kvcompress.evals.sweep.page import write_page
from kvcompress.evals.sweep.styles import make_styles
from tests.evals.sweep.reported import FAILED, row, rows, scored
from tests.evals.sweep.test_proxies import both

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)


@pytest.fixture
def page(tmp_path):
    """Writes a report of rows and returns the page's text, without plotly's own code."""

    def write(made):
        write_page(made, tmp_path / "report.html")
        assert not list(tmp_path.glob("*.partial"))
        text = (tmp_path / "report.html").read_text()
        return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)

    return write


def cells(text, section):
    """The tables of a section: for each, its lines as texts of cells."""
    part = text.partition(f'<section id="{section}">')[2].partition("</section>")[0]
    bodies = re.findall(r"<tbody>(.*?)</tbody>", part, flags=re.DOTALL)

    def plain(cell):
        return html.unescape(re.sub(r"<[^>]*>", "", cell.replace("<small>", " | ")))

    return [
        [
            [plain(cell) for cell in re.findall(r"<td.*?>(.*?)</td>", line)]
            for line in re.findall("<tr>(.*?)</tr>", body)
        ]
        for body in bodies
    ]


def figures(text):
    return json.loads(re.search(r'id="figures">(.*?)</script>', text, flags=re.DOTALL)[1])


# docs: is one file that opens without a network
def test_the_page_needs_nothing_beside_it(page, tmp_path):
    text = page(rows())
    assert "http" not in text
    assert not re.search(r"\s(src|href)=\"(?!#)", text)
    # as much code as plotly has, once
    assert (tmp_path / "report.html").read_text().count("plotly.js v") == 1
    assert (tmp_path / "report.html").stat().st_size < 6e6


# docs: A mean is taken over the tasks that every method of a protocol and length has
def test_the_summary_has_a_line_for_each_method_and_budget(page):
    made = [scored([1.0, 1.0, 0.0, 0.0], method, 0.5, task=task) for method in ("h2o", "tova") for task in "ab"]
    (table,) = cells(page([*made, scored([1.0] * 4, "none", None, task="a")]), "summary")
    assert table == [
        ["full cache (ceiling)", "all tokens", "1.000 | [0.51, 1.00]", "25 %"],
        ["h2o", "50%", "0.500 | [0.15, 0.85]", "25 %"],
        ["tova", "50%", "0.500 | [0.15, 0.85]", "25 %"],
    ]
    assert "question-aware, 512 tokens: without b: not measured with none." in page(
        [*made, scored([1.0] * 4, "none", None, task="a")]
    )
    alone = [row("h2o", task="a"), row("tova", task="b")]
    assert "512 tokens: no mean, a are left out: not measured with tova." in page(alone)


# docs: in a table `≈` marks what is not told apart from the best of its budget
def test_a_score_says_its_interval_bytes_and_what_it_is_not_told_apart_from(page):
    made = [scored([1.0] * 12, "none", None, size=4000), scored([1.0] * 11 + [0.0], "h2o", size=2000)]
    made += [scored([1.0] * 12, "tova", size=2000), scored([0.0] * 12, "knorm", size=2000)]
    (table,) = cells(page(made), "scores")
    assert table == [
        ["full cache (ceiling)", "1.00 | [0.76, 1.00] · 100 %"],
        ["h2o", "0.92 ≈° | [0.65, 0.99] · 50 %"],
        ["tova", "1.00 °* | [0.76, 1.00] · 50 %"],
        ["knorm", "0.00 | [0.00, 0.24] · 50 %"],
    ]
    assert "<b>1.00 °*</b>" in page(made)
    ((tie,),) = cells(page(made), "ties")
    assert tie[2:] == ["tova (1.00)", "h2o (1 of 2)", "h2o, tova (2 of 3)"]


def test_what_is_exact_has_no_interval(page):
    text = {"task": "text", "protocol": "continuation", "kl": 0.0, "kl_stderr": 0.0}
    made = [scored([1.0] * 4, "none", None, size=4040, **text), scored([0.9, 0.95, 0.96, 0.9], size=2000, **text)]
    written = page(made)
    (table,) = cells(written, "summary")
    assert table[0] == ["full cache (ceiling)", "all tokens", "1.000", "101 %"]
    assert "with masks and padding, so the full cache may hold 101 %" in html.unescape(written)
    assert cells(written, "scores")[0][0][1] == "1.00 | 101 % · KL 0.000"
    # nor does its point in the plot
    assert [trace["text"][0] for trace in figures(written)[0]["data"] if "full" in trace["name"]] == [
        "budget all tokens<br>3.95 MiB, 101 % of the full cache<br>1.000"
    ]


# docs: A point that failed is listed with its error
def test_failures_and_what_others_wrote_are_escaped(page):
    text = page([*rows(), row("knorm", 0.5) | FAILED, row("a</script><b>", 0.5)])
    assert "RuntimeError: &lt;no&gt; luck" in text
    assert "kvcompress sweep &lt;b&gt;" in text
    assert "a</script>" not in text
    assert cells(text, "failed") == [[["needle 512 question-aware, knorm 0.5", "RuntimeError: <no> luck"]]]
    assert figures(text)


# docs: the page shows scores turn by turn, and what is kept of each span
def test_turns_and_spans_are_shown_where_rows_have_them(page):
    turns = {"turn_scores": [1.0, 0.5], "kept_by_span": {"system": 1.0, "document": 0.25}}
    odd = {"turn_scores": None, "kept_by_span": []}
    text = page([row(**turns), row("tova", turn_scores=[1.0, 0.5, 0.25]), row("knorm", **odd)])
    assert cells(text, "turns") == [[["h2o", "50%", "1.00", "0.50", ""], ["tova", "50%", "1.00", "0.50", "0.25"]]]
    assert cells(text, "spans") == [[["h2o", "50%", "1.00", "0.25"]]]
    assert not cells(page(rows()), "turns")


def test_what_a_text_predicts_is_shown_with_its_points(page):
    ((line,),) = cells(page(both([0.9, 0.7, 0.4, 0.1], [0.01, 0.02, 0.5, 3.0])), "proxies")
    assert line[3:] == ["+1.00 | only 4 points, which chance may put in order"] * 2 + [""]
    made = both([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.1], [0.01, 0.02, 0.03, 0.04, 0.5, 0.6, 1.0, 3.0])
    ((line,),) = cells(page(made), "proxies")
    assert line[3:] == ["+1.00 | 8 points", "+1.00 | 8 points", ""]


def test_a_plot_for_each_panel_after_those_of_the_means(page):
    made = [*rows(), *(one | {"task": "kv", "key": one["key"] + "kv"} for one in rows()[:10])]
    shown = figures(page(made))
    assert [(figure["group"], figure["name"]) for figure in shown] == [
        ("mean over tasks", "question-aware, 512 tokens"),
        ("mean over tasks", "question-agnostic, 512 tokens"),
        ("needle, 512 tokens", "question-aware: answers found"),
        ("needle, 512 tokens", "question-agnostic: answers found"),
        ("text, 512 tokens", "continuation: answers found"),
        ("text, 512 tokens", "continuation: KL from the full cache, nats"),
        ("kv, 512 tokens", "question-aware: answers found"),
        ("kv, 512 tokens", "question-agnostic: answers found"),
    ]
    traces = {trace["name"]: trace for trace in shown[2]["data"]}
    assert [*traces] == ["h2o", "streaming (floor)", "full cache (ceiling)", "Pareto front"]
    assert traces["h2o"]["x"] == [20.0, 50.0]
    assert traces["h2o"]["y"] == [0.25, 0.75]
    assert traces["h2o"]["text"][1] == "budget 50%<br>1.95 MiB, 50 % of the full cache<br>0.750 [0.554, 0.946]"
    assert traces["h2o"]["error_y"]["array"] == pytest.approx([0.196, 0.196], abs=1e-4)
    assert traces["Pareto front"]["x"] == [20.0, 49.75, 50.0]


def test_the_axis_of_kl_comes_from_what_is_drawn(page):
    text = {"task": "text", "protocol": "continuation", "kl_stderr": 0.001}
    made = [row("none", None, 1.0, 4000, kl=1e-4, **text), row("h2o", 0.2, kl=0.4, **text), row("tova", kl=0.1, **text)]
    low, high = figures(page(made))[1]["layout"]["yaxis"]["range"]
    assert (10**low, 10**high) == pytest.approx((0.1 / 1.5, 0.4 * 1.5))


def test_a_hundred_methods_all_look_different():
    names = [f"m{index}" for index in range(100)]
    styles = make_styles(["none", "streaming", *names])
    assert "none" not in styles
    for part in (0, 1):
        looks = {(style.color, style.marker[part], style.line[part]) for style in styles.values()}
        assert len(looks) == 101
    # the lines alone of the first forty differ, as do the markers with their colours of all
    lines = {(styles[name].color, styles[name].line[1]) for name in names[:40]}
    assert len(lines) == 40
    assert len({(style.color, style.marker[0]) for style in styles.values()}) == 101


def many(count):
    made = [scored([1.0] * 8, "none", None, size=4000)]
    for index in range(count):
        right = index % 9
        for budget in (0.2, 0.5):
            scores = [1.0] * right + [0.0] * (8 - right)
            made.append(scored(scores, f"method{index}", budget, size=4000 * budget + index))
    return made


OLD = ("full_bytes", "samples", "seed", "dtype", "device", "seconds", "stderr", "metric")


@pytest.mark.parametrize(
    "made",
    [
        [row() | FAILED],
        [row() | {"status": "failed"}],
        [row() | {"status": "failed", "error": ""}],
        [row()],
        [row("none", None)],
        [{name: value for name, value in one.items() if name not in OLD} for one in rows()],
        [{**row(), "provenance": {}}],
        [row(score=0.2, key="a"), row(score=0.4, key="b", seed=1, samples=9), row(score=0.3, key="c", seed=2)],
        [row("streaming", key="a"), row("streaming", key="b", seed=1), row("none", None), row("h2o", size=1000)],
        many(25),
        [row(score=-1.0), row("none", None, -2.0)],
        [row(length=None, task="local_piqa", num_fewshot=5, scores=[1, 0]), row(kl=0.0, attention_error=0.0)],
    ],
    ids=[
        *("failed", "failed-without-message", "failed-with-empty-message", "one", "full-alone", "old", "no-provenance"),
        *("seeds", "two-floors", "25-methods", "negative", "mixed"),
    ],
)
def test_a_report_is_made_of_any_rows(made, tmp_path):
    (tmp_path / "in").mkdir()
    lines = (json.dumps(one | {"key": str(index)}) for index, one in enumerate(made))
    (tmp_path / "in" / "results.jsonl").write_text("\n".join(lines) + "\n")
    collected = report.collect([tmp_path / "in"])
    assert len(collected) == len(made)
    paths = {path.name: path for path in report.write_all(collected, tmp_path)}
    succeeded = any(one["status"] == "ok" and one.get("full_bytes") for one in collected)
    assert set(paths) == {"results.csv", "report.html", *(["accuracy.png"] if succeeded else [])}
    with paths["results.csv"].open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(made)
    assert report.make_tables(collected)
    assert all(str(tie) for tie in report.make_ties(collected))
    report.make_comparisons(collected)


# docs: Where a point has another number of samples than the others of its table, it says so
def test_what_is_not_finished_does_not_look_finished(page):
    full = scored([1.0] * 12, "none", None, size=4000)
    early = scored([1.0, 0.0, 1.0], "h2o", size=2000, stopped_at={"precision": None})
    made = [full, early, scored([0.0] * 12, "tova", size=2000), full | {"task": "kv"}]
    made += [scored([0.0] * 12, "h2o", task="kv", size=2000)]
    text = page(made)
    table, _ = cells(text, "scores")
    assert table[1] == ["h2o", "0.67 °* | [0.21, 0.94] · 50 % · n = 3, stopped early"]
    assert "needle, 512 tokens, question-aware: answers found, n = 12<" in text
    assert "1 stopped early, before all of their samples" in text
    assert cells(text, "unfinished") == [[["needle 512 question-aware, h2o 0.5", "n = 3, stopped early"]]]
    # a mean over a task of 12 samples and one of 3
    both = [one for one in made if one["method"] != "tova"]
    (means,) = cells(page(both), "summary")
    assert "question-aware, 512 tokens: needle, kv; n = 12 of each" in page(both)
    assert [line[2].partition("·")[2] for line in means] == ["", " n = 3 to 12"]


# docs: counts the planned points that have no row
def test_planned_points_without_a_row_are_named(page, tmp_path):
    made = [row("none", None), row("h2o"), row("tova"), row("none", None, task="kv"), row("h2o", task="kv")]
    assert not cells(page(made), "unfinished")
    report.write_all(made, tmp_path, planned=8)
    text = (tmp_path / "report.html").read_text()
    assert "5 points of 8 planned" in text
    assert "3 planned points without a row" in text
    assert cells(text, "unfinished") == [[["kv 512 question-aware, tova 0.5"]]]
    assert "And 2 of tasks or methods that have no row." in text
    report.write_all(made, tmp_path, planned=5)
    assert "planned" not in re.sub(r"<script>/\*\*.*?</script>", "", (tmp_path / "report.html").read_text(), flags=re.S)


def test_methods_are_in_one_order_in_all_tables(page):
    turns = {"turn_scores": [1.0], "kept_by_span": {"document": 0.25}}
    names = ["tova", "h2o:bits=4", "peer-x", "h2o", "none", "snapkv"]
    made = [
        scored([0.5, 0.75, 0.5], name, None if name == "none" else budget, size=2000, task=task, **turns)
        for task in ("needle", "kv")
        for budget in (0.5, 0.2)
        for name in names
    ]
    text = page(made)
    orders = {
        tuple(dict.fromkeys(line[0] for line in table))
        for part in ("summary", "scores", "turns", "spans")
        for table in cells(text, part)
    }
    assert len(orders) == 1
    assert {tie[4] for tie in cells(text, "ties")[0]} == {"h2o, h2o:bits=4, tova, snapkv, peer-x (5 of 5)"}


# docs: A method that holds less than the floor's smallest point has nothing to be compared with
def test_fewer_bytes_than_the_floors_least_are_told(page):
    made = [row("none", None, 1.0, 4000), row("h2o", size=900), row("tova", size=2000), row("streaming", size=1000)]
    ((h2o, tova),) = cells(page(made), "floor")
    assert h2o == ["h2o", " | fewer bytes than the floor's least"]
    assert tova[1].startswith("-0.167")
    (table,) = report.make_comparisons(made)
    assert table.lines[0] == ("h2o", "fewer bytes than the floor's least")


def test_nothing_found_in_a_few_samples_is_not_called_like_the_full_cache(page):
    made = [scored([1.0, 0.0, 0.0], "none", None), scored([0.0] * 3, "h2o"), scored([0.0] * 3, "tova")]
    ((tie,),) = cells(page(made), "ties")
    assert tie[2:] == ["nothing found", "", "too few samples (3)"]
    ((tie,),) = cells(page([scored([1.0] * 3, "h2o"), scored([1.0] * 3, "none", None)]), "ties")
    assert tie[2:] == ["h2o (1.00)", "measured alone", "h2o (1 of 1)"]


def test_of_two_seeds_the_one_with_more_samples_is_shown_and_the_page_says_so(page):
    made = [row(score=0.2), row(score=0.4, seed=1, samples=9), row(score=0.3, seed=2)]
    text = page(made)
    assert cells(text, "scores")[0][0][1].startswith("0.40")
    assert "2 rows of points that another row shows" in text


def browse(path, *options):
    """Opens a page in a headless browser; returns its document and what its console said."""
    profile = path.parent / "profile"
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=8000", *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HOME": str(path.parent)},
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# sorts the first table by its third column, twice, and chooses the last plot
CLICKS = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("#summary table");
  const first = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join(" ");
  const said = [first()];
  for (let click = 0; click < 2; click++) {
    table.querySelectorAll("thead tr:last-child button")[2].click();
    said.push(first());
  }
  table.querySelector("thead tr:last-child button").click();
  said.push(first());
  const chosen = document.getElementById("chart");
  chosen.value = chosen.options.length - 1;
  chosen.dispatchEvent(new Event("change"));
  document.body.dataset.said = JSON.stringify([said, plot.layout.yaxis.title.text, plot.data.length]);
});
</script>
"""


# docs: Tables sort by a click on a column's head
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium: apt-get install chromium")
def test_in_a_browser_the_plot_is_drawn_and_tables_sort(tmp_path):
    values = (("tova", 0.25), ("h2o", 0.75), ("knorm", 0.5))
    made = [scored([1.0] * 8, "none", None, size=4000)]
    made += [scored([1.0] * int(8 * share) + [0.0] * int(8 - 8 * share), name, task="needle") for name, share in values]
    made += [row(name, 0.5, share, task="text", protocol="continuation", kl=1 - share) for name, share in values]
    write_page(made, tmp_path / "report.html")
    clicked = tmp_path / "clicked.html"
    clicked.write_text((tmp_path / "report.html").read_text().replace("</body>", CLICKS + "</body>"))

    document, console = browse(clicked, "--dump-dom", "--host-resolver-rules=MAP * ~NOTFOUND")
    assert console == []
    assert document.count('class="main-svg"') == 3
    # the last plot: a line for each method, and the front
    assert document.count('class="trace scatter') == 4
    said, label, traces = json.loads(html.unescape(re.search(r'data-said="(.*?)"', document)[1]))
    full = "full cache (ceiling)"
    # a number's first click sorts from the best, and names go by the alphabet; what has no mean stays below
    assert said[1:] == [
        f"{full} h2o knorm tova",
        f"tova knorm h2o {full}",
        f"{full} h2o knorm tova",
    ]
    assert said[0] not in said[1:]
    assert (label, traces) == ("KL from the full cache, nats", 4)
    assert 'aria-sort="ascending"' in document


MEASURE = """
<script>
addEventListener("load", () => {
  document.body.dataset.said = document.body.scrollWidth;
  const bar = document.querySelector("#plot .modebar").getBoundingClientRect();
  const entries = [...document.querySelectorAll("#plot .legend .traces")].map((entry) => entry.getBoundingClientRect());
  const covers = (one) => one.left < bar.right && one.right > bar.left && one.top < bar.bottom && one.bottom > bar.top;
  document.body.dataset.covered = entries.some(covers) || !entries.length || !bar.width;
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1400, 700])
def test_in_a_browser_the_page_is_as_wide_as_the_window(tmp_path, width):
    write_page(many(25), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text().replace("</body>", MEASURE + "</body>")
    (tmp_path / "measured.html").write_text(text)
    document, console = browse(tmp_path / "measured.html", "--dump-dom", f"--window-size={width},1000")
    assert console == []
    assert int(re.search(r'data-said="(\d+)"', document)[1]) <= width
    # the toolbar is beside all of the legend's entries
    assert 'data-covered="false"' in document
    # 25 methods and the full cache in the legend, and the front
    assert document.count('class="legendtext"') == 27

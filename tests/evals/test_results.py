"""README's measured figures are those of the rows in evals/results, or of the page beside them."""

import json
import math
import re
import statistics

import pytest

from kvcompress.choosing import FORESEEN, UNFORESEEN
from kvcompress.evals.studies.swiftkv import projection_flops
from kvcompress.evals.sweep.intervals import difference, estimate
from tests.test_readme import MARKS, ROOT

RESULTS = ROOT / "evals" / "results"
PAGE = (RESULTS / "README.md").read_text("utf-8")
FILES = [*sorted(RESULTS.glob("*.json")), *sorted(RESULTS.glob("*/results.jsonl"))]


def said(beginning):
    """The sentence or table row of README, or of a guide, that begins so."""
    (found,) = [sentence for pages in MARKS.values() for sentence in pages if sentence.startswith(beginning)]
    return found


def of(name):
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def rows(folder, **wanted):
    """The rows of a sweep that have these values, the newest of each point."""
    lines = (RESULTS / folder / "results.jsonl").read_text("utf-8").splitlines()
    newest = {row["key"]: row for row in map(json.loads, lines)}.values()
    return [row for row in newest if all(row[name] == value for name, value in wanted.items())]


def score(folder, method, budget, **wanted):
    (row,) = rows(folder, method=method, budget=budget, **wanted)
    return row["score"]


# how rows name wikitext-2's test set
WIKITEXT = "173c87a53759e020"


def medians(name, what):
    return {method: spread["median"] for method, spread in of(name)[what].items()}


# README: [evals/results/](evals/results) has the tables, commands, machine and losses behind each line
# README: SmolLM2-135M-Instruct, its 4-bit weights read into float32, on two shared CPU cores
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_figure_has_its_command_and_machine(path):
    text = path.read_text("utf-8")
    facts = [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    if path.stem == "swiftkv":
        facts = facts[0]["rows"]
    for fact in facts:
        behind = fact.get("provenance", fact)
        assert behind["command"]
        assert behind["machine"].endswith("2 cores")
        assert "SmolLM2-135M-Instruct" in fact.get("model", "SmolLM2-135M-Instruct")
        assert fact.get("dtype", "float32") == "float32"


# README: | `H2OCache(budget=512)`, decode step at 4k, batch 8; prefill with its scores | DynamicCache |
def test_the_speed_of_h2o():
    decode, prefill = medians("speed", "decode"), medians("speed", "prefill")
    gained = decode["DynamicCache"] / decode["h2o"]
    limit = decode["DynamicCache"] / decode["DynamicCache, 512 tokens only"]
    assert f"{gained:.1f}" == f"{limit:.1f}"
    assert f"**{gained:.1f}x** faster, as a cache of 512 tokens allows" in said("| `H2OCache(budget=512)`")
    assert f"prefill {prefill['h2o'] / prefill['DynamicCache']:.2f}x as long" in said("| `H2OCache(budget=512)`")


# README: | `HydragenCache`, 32 prompts sharing 2k tokens |
def test_the_speed_of_hydragen():
    step = {name: spread["median"] for name, spread in of("shared_prefix_decode")["decode_seconds"].items()}
    fewer = of("shared_prefix")["row"]["ratios"]["bytes"]
    words = f"decode step {step['dynamic'] / step['hydragen']:.1f}x faster, {fewer:.0f}x fewer bytes"
    assert words in said("| `HydragenCache`, 32 prompts")
    little = [case["node_over_rows"] - 1 for case in of("shared_prefix_switch")["switch"] if case["batch"] <= 2]
    slower = f"when little is shared, {100 * min(little):.0f} to {100 * max(little):.0f} % slower"
    assert slower in said("| `HydragenCache`, 32 prompts")


# README: | `GEARCache()`, decode step at 4k, batch 8 (batch 1) |
def test_the_speed_of_gear():
    step = medians("speed_gear", "decode")
    ours, quanto = (step["DynamicCache"] / step[name] for name in ("gear", "quanto:bits=4"))
    # of batch 1 the page has the milliseconds
    assert "| batch 1 | 117 ms | 144 ms, 0.81x | 129 ms, 0.90x | 158 ms |" in PAGE
    elsewhere = medians("speed_gear_epyc", "decode")
    assert "| batch 1, AMD EPYC | 163 ms | 265 ms, 0.61x | 251 ms, 0.65x | |" in PAGE
    idle = medians("speed_gear_idle", "decode")
    other = f"on others {elsewhere['DynamicCache'] / elsewhere['gear']:.2f}x ({162.7 / 264.7:.2f}x) and, idle and with "
    other += f"today's 8-bit tail, {idle['DynamicCache'] / idle['gear']:.2f}x"
    words = f"{ours:.2f}x ({117 / 144:.2f}x) the speed, {other}; quanto {quanto:.2f}x ({117 / 158:.2f}x)"
    assert words in said("| `GEARCache()`, decode step")


# README: | `GEARCache()`, 4.1 bits per number (`bits=3`, 3.1; `bits=2`, 2.5); three texts |
# README: | `GEARCache(bits=2, basis=...)`, calibrated on other text, 2.3 (`bits=4`, 3.8) bits |
def test_what_a_bit_is_worth():
    rows = {row["setting"]: row for name in ("bits_basis", "bits_unbiased") for row in of(name)["rows"]} | {
        row["setting"]: row for row in of("bits")["rows"] if row["setting"] == "quanto:bits=4"
    }

    def figures(setting):
        row = rows[setting]
        bits = 5.0 if row["bits"] is None else row["bits"]
        (wiki,) = [name for name in row["perplexity"] if "wiki" in name]
        more = f"{row['perplexity'][wiki] / row['full_perplexity'][wiki] - 1:+.1%}".replace("%", " %")
        return f"{bits:.1f}", f"{row['kl']:.3f}", more

    four, three, two, theirs = map(figures, ("gear:bits=4", "gear:bits=3", "gear:bits=2", "quanto:bits=4"))
    line = said("| `GEARCache()`, 4.1")
    assert f"{four[0]} bits per number (`bits=3`, {three[0]}; `bits=2`, {two[0]}); three texts" in line
    # of two of the texts
    assert f"full cache; `QuantizedCache` of transformers, {theirs[0]} bits: KL {theirs[1]}, {theirs[2]} |" in line
    assert f"KL {four[1]} ({three[1]}; {two[1]}) nats" in line
    assert f"perplexity of wikitext-2 {four[2]} ({three[2]}; {two[2]})" in line
    bits, kl, more = figures("gear:bits=2:basis=basis.safetensors")
    others, less, little = figures("gear:bits=4:basis=basis.safetensors")
    line = said("| `GEARCache(bits=2, basis=...)`")
    assert f"{bits} (`bits=4`, {others}) bits | full cache | KL {kl} ({less}) nats" in line
    assert f"perplexity {more} ({little})" in line


# README: On this model, GEAR's low-rank part and outliers are not worth their bits
def test_neither_low_rank_nor_outliers_repay_their_bits():
    """At any bits of theirs, codes alone with sinks lose less in no more."""
    found = of("bits")["rows"]
    dear = [row for row in found if "preset=gear" in row["setting"] or "outliers=" in row["setting"]]
    plain = [row for row in found if row["setting"].startswith("gear:bits=") and "sinks=0" not in row["setting"]]
    assert len(dear) >= 12
    for row in dear:
        assert any(other["bits"] <= row["bits"] and other["kl"] < row["kl"] for other in plain), row["setting"]


# README: | `H2OCache(budget=0.2)`, 5-shot tasks, 1000 questions |
def test_h2o_on_tasks_of_five_shots():
    differences = []
    for task in ("local_piqa", "local_arc_easy", "local_openbookqa", "local_copa"):
        point = {"task": task, "protocol": "question-aware", "num_fewshot": 5}
        (ours,), (full,) = (
            rows("study", method=name, budget=at, **point) for name, at in (("h2o", 0.2), ("none", None))
        )
        differences += [mine - theirs for mine, theirs in zip(ours["scores"], full["scores"], strict=True)]
    count, mean = len(differences), sum(differences) / len(differences)
    error = math.sqrt(sum((each - mean) ** 2 for each in differences) / (count - 1) / count)
    assert count == 1000
    assert f"accuracy {100 * mean:+.1f} ± {100 * error:.1f} points" in said("| `H2OCache(budget=0.2)`")


# how rows at a budget of 20 % are named in README, beside what keeps every token
ONCE = ("h2o", "chunkkv", "snapkv", "tova", "keydiff")
TABLE = {
    "full cache": ("none",),
    "`gear`, every token": ("gear",),
    "`shadowkv`, every token, most on the host": ("shadowkv",),
    "`kvzip`, which reads twice": ("kvzip",),
    "`kvzip:bits=4`": ("kvzip:bits=4",),
    "the best of `h2o`, `chunkkv`, `snapkv`, `tova`, `keydiff`": ONCE,
    "`streaming`: sinks + recent, the floor": ("streaming",),
}


# README: | full cache | 100 % |
# README: | `gear`, every token |
# README: | `shadowkv`, every token, most on the host |
# README: | `kvzip`, which reads twice | 21 % |
# README: | `kvzip:bits=4` |
# README: | the best of `h2o`, `chunkkv`, `snapkv`, `tova`, `keydiff` |
# README: | `streaming`: sinks + recent, the floor |
def test_the_table_of_every_method_at_a_fifth_of_the_tokens():
    def found(folder, method, field="score", **wanted):
        budget = None if method in ("none", "gear") else 0.2
        return [row[field] for row in rows(folder, method=method, budget=budget, length=1024, **wanted)]

    for name, methods in TABLE.items():
        cells = said(f"| {name} |").strip("| ").split(" | ")[1:]
        needles = {
            place: [
                value
                for method in methods
                for value in found("study_1k", method, task="multikey", protocol=f"question-{asked}", samples=50)
            ]
            for place, asked in ((1, "agnostic"), (2, "aware"))
        }
        # all but TOVA were asked again
        needles[3] = [value for method in methods for value in found("study_1k_turns", method, samples=50)]
        assert len(needles[3]) >= len(methods) - 1
        for place, values in needles.items():
            assert cells[place].strip("*") == f"{max(values):.2f}", name
        kl = min(value for method in methods for value in found("study_1k", method, "kl", task="text"))
        assert float(cells[4].strip("*")) == pytest.approx(kl, abs=0.0005)
        (held,) = {
            round(100 * value, 1 if "bits" in name else None)
            for value in found("study_1k", methods[0], "ratio", task="multikey", protocol="question-agnostic")
        }
        # the full cache has room for what comes
        assert cells[0].strip("*") == f"{min(held, 133 if 'shadowkv' in name else 100)} %"


SPELLED = {
    "pyramidkv": "snapkv:allocation=pyramid",
    "adakv": "snapkv:allocation=heads",
    "criticalkv": "snapkv:second_stage=0.5",
    "full cache": "none",
}


def cells_by_method(table):
    """The lines of a table of the 18 methods, each its method as rows spell it and its other cells."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 18
    named = [(name.split("`")[1] if "`" in name else name, cells) for name, *cells in lines]
    return [[SPELLED.get(name, name), *cells] for name, cells in named]


def test_the_table_of_fifty_samples_is_that_of_the_rows():
    at = {"task": "multikey", "protocol": "question-agnostic", "length": 1024, "samples": 50}
    table = PAGE[PAGE.index("**Fifty samples of 1,024 tokens**") : PAGE.index("What surprised: among many needles")]
    scores = {(row["method"], row["budget"]): row["score"] for row in rows("study_1k", **at)}
    for method, *cells in cells_by_method(table):
        for budget, cell in zip((0.05, 0.1, 0.2, 0.5), cells, strict=False):
            number = re.search(r"0\.\d\d", cell)
            if number is not None:
                found = scores[method, budget if (method, budget) in scores else None]
                assert number[0] == f"{found:.2f}"


def test_the_table_of_foreseen_needles_and_text_is_that_of_the_rows():
    foreseen = {"task": "multikey", "protocol": "question-aware", "length": 1024, "samples": 50}
    text = {"task": "text", "protocol": "continuation", "length": 1024, "samples": 50}
    start = PAGE.index("*The question foreseen*")
    table = PAGE[start : PAGE.index("What surprised: to foresee", start)]
    for method, *cells in cells_by_method(table):
        for cell, at, field in zip(cells[:2], (foreseen, text), ("score", "kl"), strict=True):
            found = {row["budget"]: row[field] for row in rows("study_1k", method=method, **at)}
            numbers = cell.replace("*", "").split(" / ")
            for budget, number in zip((0.05, 0.1, 0.2, 0.5), numbers, strict=False):
                measured = found[budget if budget in found else None]
                assert float(number) == pytest.approx(measured, abs=0.0051 if field == "score" else 0.00051), method
            assert len(numbers) == len(found)
        agreement = {row["budget"]: row["score"] for row in rows("study_1k", method=method, **text)}
        assert float(cells[2]) == pytest.approx(agreement.get(0.2, agreement.get(None)), abs=0.0051)


def test_the_table_of_4096_tokens_is_that_of_the_rows():
    at = {"task": "needle", "protocol": "question-agnostic", "length": 4096, "samples": 20}
    start = PAGE.index("**Twenty samples of 4,096 tokens**")
    table = PAGE[start : PAGE.index("What surprised", start)]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    measured = {SPELLED.get(row["method"], row["method"]): row for row in rows("study_4k")}
    assert len(lines) == len(measured) == 8
    for name, found, interval, device, host in lines:
        row = measured[name.split("`")[1] if "`" in name else SPELLED[name]]
        assert {key: row[key] for key in at} == at
        # cells that have read all of their samples
        assert row["status"] == "ok"
        assert "stopped_at" not in row
        assert len(row["scores"]) == 20
        assert found.strip("*") == f"{sum(row['scores']):.0f} of 20"
        known = estimate(row)
        assert interval == f"{known.low:.2f} to {known.high:.2f}"
        assert device == f"{100 * row['device_bytes'] / row['full_bytes']:.1f}"
        assert host == (f"{100 * row['host_bytes'] / row['full_bytes']:.1f}" if row["host_bytes"] else "0")


# what `plan` and `auto_cache` say was measured
def test_the_candidates_are_told_as_measured():
    at = {"task": "multikey", "length": 1024, "samples": 50}
    told = [(each, "agnostic") for each in UNFORESEEN[1:]] + [(each, "aware") for each in FORESEEN[1:]]
    assert len(told) == 6
    for each, asked in told:
        at["protocol"] = f"question-{asked}"
        full = score("study_1k", "none", None, **at)
        assert each.measured.startswith(
            f"{score('study_1k', each.method, each.budget, **at):.2f} of needles, as the full cache has {full:.2f}"
        )


# README: | `KVzipCache(budget=0.2)`, the same needles, not foreseen, 9.7 MB |
def test_kvzip_beside_kvpress():
    point = {"task": "multikey", "length": 1024, "protocol": "question-agnostic", "samples": 50, "budget": 0.2}
    presses = rows("peers_1k", **point)
    (theirs,) = [row for row in presses if row["peer"]["masked"]]
    dropping = [row for row in presses if row is not theirs]
    assert theirs["method"] == "kvpress-kvzip"
    assert len(dropping) == 6
    best, most = (max(row[field] for row in dropping) for field in ("score", "bytes"))
    (ours,) = rows("study_1k", method="kvzip", **point)
    # the same prompts, to the token
    assert theirs["answers"] == ours["answers"]
    line = said("| `KVzipCache(budget=0.2)`")
    assert f"not foreseen, {ours['bytes'] / 1e6:.1f} MB" in line
    assert f"{theirs['bytes'] / 1e6:.1f} MB; the best of six presses that drop, {most / 1e6:.1f} MB" in line
    assert line.endswith(f"| {ours['score']:.2f}; {theirs['score']:.2f}; {best:.2f} |")
    told = " ".join(PAGE[PAGE.index("*Beside kvpress 0.5.5*") :].split("\n\n")[0].split())
    for name, press in (("KeyDiff", "keydiff"), ("ExpectedAttention", "expected")):
        (row,) = [row for row in presses if row["method"] == f"kvpress-{press}"]
        assert f"{name} {row['score']:.2f}" in told
    floor = score("study_1k", "streaming", **point)
    assert floor == next(row["score"] for row in presses if row["method"] == "kvpress-streaming")
    assert f"sinks + recent {floor:.2f}, as ours" in told


def test_the_table_of_conversations_is_that_of_the_rows():
    start = PAGE.index("*Five questions in one conversation*")
    table = PAGE[start : PAGE.index("What surprised", start)]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 11
    for name, later, turns in lines:
        method = name.split("`")[1] if "`" in name else SPELLED[name]
        found = {row["budget"]: row for row in rows("study_1k_turns", method=method) if row["status"] == "ok"}
        assert {(row["samples"], row["turns"]) for row in found.values()} == {(50, 5)}
        budgets = [None] if None in found else sorted(found)
        assert later == " / ".join(f"{found[budget]['score']:.3f}" for budget in budgets)
        assert turns == " ".join(f"{turn:.2f}" for turn in found[0.2 if 0.2 in found else None]["turn_scores"])


def test_what_todays_scales_find():
    told = PAGE[PAGE.index("*GEAR with today's scales*") :].split("\n\n")[0]
    for method, words in (
        ("gear", "`gear` {:.2f}, as before"),
        ("gear:bits=3", "0.62"),
        ("gear:bits=2", "`gear:bits=2` {:.2f}"),
    ):
        assert words.format(score("study_1k_gear", method, None)) in told
    assert score("study_1k_gear", "gear:bits=3", None) == 0.62


# README: | `AttentionMatchingCache(budget=0.1)`, text of 512 tokens;
def test_attention_matching_beside_kvzip():
    kl = {}
    for method in ("attention_matching", "kvzip"):
        (row,) = rows("allocation", method=method, budget=0.1, samples=12, length=512, text=WIKITEXT)
        kl[method] = row["kl"]
    told = f"KL {kl['attention_matching']:.3f} nats; {kl['kvzip']:.3f}"
    at = {"task": "multikey", "length": 1024, "protocol": "question-agnostic", "samples": 50}
    start = PAGE.index("*Attention Matching on the same prompts*")
    page = " ".join(PAGE[start:].split("\n\n")[0].split())
    found, gaps, held = {}, [], []
    for budget in (0.1, 0.2):
        (ours,) = rows("study_1k_matched", method="attention_matching", budget=budget, **at)
        (kvzip,) = rows("study_1k", method="kvzip", budget=budget, **at)
        assert ours["answers"] == kvzip["answers"]
        found[budget] = ours["score"], kvzip["score"]
        gap = difference(ours, [(1.0, kvzip)])
        assert gap.paired
        assert not gap.is_apart
        gaps.append(f"{gap.value:+.2f} [{gap.low:.2f}, {gap.high:.2f}]")
        held.append(100 * ours["bytes"] / ours["full_bytes"])
        (full,) = rows("study_1k", method="none", **at)
        assert difference(ours, [(1.0, full)]).is_apart == (budget == 0.1)
    assert f"({' and '.join(gaps)})" in page
    assert (
        "{:.2f} at 10 % and {:.2f} at 20 %, in {:.1f} and {:.1f} %".format(found[0.1][0], found[0.2][0], *held) in page
    )
    assert f"`kvzip` finds {found[0.1][1]:.2f} and {found[0.2][1]:.2f};" in page
    line = said("| `AttentionMatchingCache(budget=0.1)`")
    assert told in line
    assert line.endswith("needles {:.2f}; {:.2f} |".format(*found[0.2]))


def test_what_training_brings_back_of_swiftkv():
    base, converted, fitted, distilled = of("swiftkv")["rows"]

    def back(row, of_log):
        shares = []
        for text, best in base["perplexity"].items():
            at = [best, converted["perplexity"][text], row["perplexity"][text]]
            low, high, now = map(math.log, at) if of_log else at
            shares.append((high - now) / (high - low))
        return f"{sum(shares) / len(shares):.0%}".replace("%", " %")

    for of_log, beginning in ((False, "| of the perplexity lost, recovered"), (True, "| of its log")):
        (line,) = [line for line in PAGE.splitlines() if line.startswith(beginning)]
        assert f"| {back(fitted, of_log)} (" in line
        assert f"{back(distilled, of_log)}" in line
    assert set(distilled["needles"].values()) == {0.0}
    assert "287k tokens in 46 minutes" in PAGE


# README: | SwiftKV, layers 18 to 29 of 30 skipped
def test_what_a_conversion_costs_whose_tokens_keep_their_own():
    frontier = of("swiftkv_frontier")["frontier"]
    assert frontier["own_last"] == 32
    (point,) = [point for point in frontier["points"] if point["first"] == 18]
    line, _ = said("| SwiftKV, layers 18 to 29 of 30 skipped").rsplit("; ", 1)
    _costs(line, frontier, point, of("swiftkv_frontier_18")["exam"])
    assert line.endswith("5-shot tasks +0.1 ± 0.6 points")
    assert "| mean | | | **+0.1 ± 0.6** |" in PAGE


# README: 12 and 13 too, `skip_between=(12, 14)`
def test_what_a_conversion_costs_that_skips_a_span_too():
    results = of("swiftkv_frontier_between")
    frontier = results["frontier"]
    assert (frontier["own_last"], frontier["skip_between"]) == (32, [12, 14])
    (point,) = frontier["points"]
    assert point["first"] == 18
    _, line = said("| SwiftKV, layers 18 to 29 of 30 skipped").rsplit("; ", 1)
    _costs(line.replace(" (on fewer tokens)", ""), frontier, point, results["exam"])
    by_text = [f"{point['fitted']['perplexity'][text] / of_base:.3f}x" for text, of_base in _perplexities(frontier)]
    assert f"Perplexity by text {', '.join(by_text[:3])}, and {by_text[3]} of GSM8K's" in PAGE.replace("\n", " ")


def test_what_a_conversion_costs_on_tasks_of_five_shots():
    start = PAGE.index("**Tasks of five shots**")
    table = PAGE[start : PAGE.index("So nothing is lost", start)]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    measured = of("swiftkv_frontier_five_shot")["rows"]
    found: dict[str, list[tuple[float, float]]] = {"acc": [], "acc_norm": []}
    for (_, base, converted, *told), row in zip(lines, measured, strict=False):
        for (metric, pairs), words in zip(found.items(), told, strict=True):
            # WinoGrande has one kind of score
            of_base, of_ours = ([int(one) for one in row[name].get(metric, row[name]["acc"])] for name in NAMES)
            assert len(of_base) == len(of_ours) == row["questions"] == 300
            if metric == "acc":
                assert (base, converted) == (f"{sum(of_base) / 300:.3f}", f"{sum(of_ours) / 300:.3f}")
            differences = [ours - theirs for ours, theirs in zip(of_ours, of_base, strict=True)]
            pairs.append((statistics.mean(differences), statistics.stdev(differences) / math.sqrt(300)))
            assert words == _points(*pairs[-1])
            # what a conversion may lose
            assert pairs[-1][0] > -0.02
    for pairs, words in zip(found.values(), lines[-1][-2:], strict=True):
        error = math.sqrt(sum(each**2 for _, each in pairs)) / len(pairs)
        assert words.strip("*") == _points(statistics.mean(mean for mean, _ in pairs), error)


NAMES = ("base", "converted")


def _points(mean, error):
    return f"{100 * mean:+.1f} ± {100 * error:.1f}"


def _perplexities(frontier):
    return frontier["base"]["perplexity"].items()


def _costs(line, frontier, point, exam):
    """Asserts that a line has the figures of a conversion, whose base model found every needle."""
    fitted = point["fitted"]["perplexity"]
    logs = [math.log(fitted[text] / of_base) for text, of_base in _perplexities(frontier)]
    lost = math.exp(sum(logs) / len(logs)) - 1
    told, converted = exam
    assert set(told["needles"].values()) == {1.0}
    found = [round(24 * converted["needles"][length]) for length in ("512", "1024")]
    assert f"prefill {point['prefill']:.2f}x, perplexity +{100 * lost:.1f} %, needles at 512 {found[0]} of 24" in line
    assert f"at 1k {found[1]} of 24" in line


# docs: With half of SmolLM2 skipped, a prompt of 4k tokens costs
def test_the_flops_of_a_prompt_that_skips_half_of_smollm2(smollm2):
    config = smollm2[0].config
    half = config.num_hidden_layers // 2
    share = projection_flops(config, 4096, half) / projection_flops(config, 4096)
    assert f"{share:.3f} of the projections' flops" in said("With half of SmolLM2 skipped")


# README: | `ShadowKVCache(budget=128)`, needle at 2k, not foreseen; `budget=512`, decode step at 8k |
# README: | H2O with `rerotated=True`, text of 13k tokens |
@pytest.mark.parametrize(
    ("beginning", "told", "on_the_page"),
    [
        (
            "| `ShadowKVCache(budget=128)`",
            "8 of 8 (H2O with as many tokens 1 of 8)",
            "answers\n8 of 8 as the full cache",
        ),
        ("| `ShadowKVCache(budget=128)`", "H2O with as many tokens 1 of 8", "what ShadowKV reads, answers 1 of 8"),
        ("| `ShadowKVCache(budget=128)`", "1.83x faster", "161 ms, DynamicCache's 295 ms: **1.83x**"),
        (
            "| H2O with `rerotated=True`",
            "perplexity 13.0",
            "| `H2OCache(sinks=4, rerotated=True)` | 11.4 | 11.7 | 9.1 | 13.0 |",
        ),
        ("| H2O with `rerotated=True`", "21.7 without", "| `H2OCache(sinks=4)` | 11.5 | 11.7 | 9.5 | 21.7 |"),
    ],
)
def test_figures_without_rows_are_on_the_page_with_their_command(beginning, told, on_the_page):
    assert told in said(beginning)
    assert on_the_page in PAGE


# README: Where they lose: H2O and SnapKV evict what nobody has asked about yet
def test_where_evicting_caches_lose():
    needles = {"task": "needle", "length": 512, "protocol": "question-agnostic"}
    for missed in ("h2o", "snapkv"):
        assert score("study", missed, 0.2, **needles) < 0.1
        assert score("study", "keydiff", 0.2, **needles) > 0.5
        text = {"task": "text", "length": 512}
        assert score("study", "keydiff", 0.2, **text) < score("study", missed, 0.2, **text)


# README: they have run on one GPU, an H100
# README: There a compiled step of `H2OCache(budget=0.2)` after 32k tokens takes 7.6 ms
# README: A step's attention to what `GEARCache()` packs takes 0.33 times as long as to bf16
def test_what_ran_on_a_gpu():
    first, second, kernels = (
        json.loads((RESULTS / "gpu" / name).read_text("utf-8"))
        for name in ("h100_first/results.json", "h100_second/endtoend.json", "h100_fifth/kernels.json")
    )
    assert all("H100" in results["provenance"]["machine"] for results in (first, second, kernels))
    ours = second["endtoend"]["compiled, h2o 20%, 32768 tokens, batch 1"]["seconds"]["median"]
    dynamic = first["endtoend"]["decode, dynamic, 32768 tokens, batch 1"]["seconds"]["median"]
    packed = {
        row["kernel"]: row["seconds"]["ours"]["median"] / row["seconds"]["dense slot_attention"]["median"]
        for row in kernels["kernels"]["packed batch 8, 32/8 heads of 128, 32768 tokens"]["rows"]
        if row["kernel"].startswith("packed_attention")
    }
    sentence = said("There a compiled step")
    assert f"takes {ours * 1e3:.1f} ms" in sentence
    assert f"uncompiled, {dynamic * 1e3:.1f} ms" in sentence
    sentence = said("A step's attention to what")
    assert f"takes {packed['packed_attention, 4 and 3 bits']:.2f} times" in sentence
    assert f"with `bits=2` {packed['packed_attention, 2 bits, centred']:.2f} times" in sentence
    assert f"but {packed['packed_attention, GEAR at 2 bits']:.1f} times" in sentence


def coded(setting, name="bits_codec"):
    (row,) = [row for row in of(name)["rows"] if row["setting"] == setting]
    return row


# docs: and [loses less](../results.md) than in a `GEARCache` of as many
def test_coded_files_are_as_small_and_as_close_as_asked():
    for setting, bits, kl in (("dense:codec_bits=2", 2.0, 0.035), ("dense:codec_bits=4", 4.0, 0.004)):
        assert coded(setting)["bits"] <= bits
        assert coded(setting)["kl"] <= kl
        assert coded(setting, "bits_codec_alone")["bits"] <= bits
        assert coded(setting, "bits_codec_alone")["kl"] <= kl
    for bits in (2, 4):
        assert coded(f"gear:bits={bits}")["bits"] > bits
        assert coded(f"gear:bits={bits}")["kl"] > 3 * coded(f"dense:codec_bits={bits}")["kl"]


# docs: float32 by a sixth, bfloat16 by a third, packed codes by little
def test_what_is_not_coded_through_a_basis_gets_smaller_too():
    for setting, share in (("dense:codec=zstd", 5 / 6), ("dense:dtype=bfloat16:codec=zstd", 2 / 3)):
        file = coded(setting)["file"]
        assert file["nbytes"] / file["plain_nbytes"] == pytest.approx(share, abs=0.015)
    for bits in (2, 4):
        file = coded(f"gear:bits={bits}:codec=zstd")["file"]
        assert 0.8 < file["nbytes"] / file["plain_nbytes"] < 0.9


# docs: Saving takes a quarter to a half of the time of a prefill, loading a seventh to a quarter
def test_coding_takes_part_of_the_time_of_a_prefill():
    for name, save, load in (("bits_codec", 1 / 4, 1 / 7), ("bits_codec_alone", 1 / 2, 1 / 4)):
        file = coded("dense:codec_bits=2", name)["file"]
        assert file["save_seconds"] / file["prefill_seconds"] == pytest.approx(save, abs=0.04)
        assert file["load_seconds"] / file["prefill_seconds"] == pytest.approx(load, abs=0.03)

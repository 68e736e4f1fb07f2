import json
import math
import sys

import pytest

from kvcompress import DenseCache, registry
from kvcompress.evals.sweep import first_forward, report
from kvcompress.evals.sweep import sweep as sweeps
from kvcompress.evals.sweep.first_forward import FirstForward
from kvcompress.evals.sweep.points import Point, Settings, check_budgets
from kvcompress.evals.sweep.points import make_points as points_of
from kvcompress.evals.sweep.protocol import answer
from kvcompress.evals.sweep.rows import Parts, Results
from kvcompress.evals.sweep.samples import make_prompt, make_samples
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks


def settings(**change):
    small = {
        "methods": ("h2o", "knorm"),
        "budgets": (0.1, 0.5),
        "tasks": ("passkey",),
        "lengths": (700,),
        "samples": 2,
        "protocols": ("question-agnostic",),
    }
    return Settings(**(small | change))


def make_points(settings):
    return [point for task in make_tasks(settings).values() for point in task.points()]


@pytest.fixture
def sweep(model, tokenizer, tmp_path):
    def make(build=registry.build, **change):
        asked = settings(**change)
        return Sweep(asked, make_tasks(asked), model, tokenizer, tmp_path, build=build)

    return make


class Counting:
    """Builds caches, counts them by method, and raises what it is told to at the n-th."""

    def __init__(self, at=None, error=None, method=None):
        self.at, self.error, self.method, self.built = at, error, method, []

    def __call__(self, method, model, budget):
        self.built.append((method, budget))
        if len(self.built) == self.at or (method == self.method and self.error):
            raise self.error
        return registry.build(method, model, budget)


def test_ceiling_and_floor_always_take_part():
    points = make_points(settings(protocols=("question-aware", "question-agnostic"), tasks=("passkey", "text")))
    groups = {(point.task, point.protocol) for point in points}
    assert groups == {("passkey", "question-aware"), ("passkey", "question-agnostic"), ("text", "continuation")}
    for task, protocol in groups:
        own = [(p.method, p.budget) for p in points if (p.task, p.protocol) == (task, protocol)]
        assert own == [("none", None)] + [(m, b) for m in ("h2o", "knorm", "streaming") for b in (0.1, 0.5)]


def test_points_named_twice_are_measured_once():
    twice = settings(methods=("h2o", "h2o", "streaming", "none", "full"), budgets=(0.5, 0.5), lengths=(700, 700))
    assert [(point.method, point.budget) for point in make_points(twice)] == [
        ("none", None),
        ("h2o", 0.5),
        ("streaming", 0.5),
    ]


@pytest.mark.parametrize(("budget", "tokens"), [(0.1, 70), (64, 64), (1.0, 1234), (0.0001, 1), (None, None)])
def test_a_budget_is_tokens_of_the_length_asked_for(budget, tokens):
    assert Point("passkey", 700, "question-aware", "h2o", budget).budget_tokens(1234) == tokens


def test_rows_carry_measured_bytes_a_proof_of_compression_and_provenance(sweep):
    rows = sweep(tasks=("passkey", "text"), lengths=(600,), continuation=4).run()
    assert [row["status"] for row in rows] == ["ok"] * 14
    for row in rows:
        assert row["provenance"]["versions"]["torch"]
        assert row["provenance"]["machine"]
        assert row["compressed"] == (row["budget"] is not None)
        assert 0.0 <= row["score"] <= 1.0
        assert row["bytes"] == pytest.approx(sum(row["by_component"].values()), abs=5)
        if row["budget"] is None:
            assert row["ratio"] == pytest.approx(1.0, abs=0.01)
        else:
            assert row["budget_tokens"] == row["most_kept"] == round(row["budget"] * 600)
            assert row["bytes"] < row["full_bytes"]
    text = [row for row in rows if row["task"] == "text"]
    assert text[0]["kl"] < 1e-6
    assert text[0]["perplexity"] == pytest.approx(text[0]["full_perplexity"], rel=1e-4)
    assert all(row["kl"] > 1e-4 and math.isfinite(row["perplexity"]) for row in text[1:])
    assert text[0]["attention_error"] < 1e-5
    for row in text[1:]:
        assert len(row["attention_error_by_layer"]) == 2
        assert row["attention_error"] == pytest.approx(sum(row["attention_error_by_layer"]) / 2, abs=1e-5)
        assert row["attention_error"] > 1e-3


def test_a_budget_of_all_tokens_answers_as_the_full_cache(sweep):
    rows = sweep(budgets=(1.0,), protocols=("question-agnostic", "question-aware")).run()
    for protocol in ("question-agnostic", "question-aware"):
        said = {tuple(row["predictions"]) for row in rows if row["protocol"] == protocol}
        assert len(said) == 1


def test_all_methods_hold_equally_many_tokens(sweep):
    evicting = tuple(name for name, m in registry.METHODS.items() if m.takes_budget and not m.reads_budget)
    rows = sweep(methods=evicting, budgets=(0.2,)).run()
    kept = {row["method"]: (row["least_kept"], row["most_kept"]) for row in rows if row["budget"]}
    # heads of these compete, and keep as many on average, but for rounding
    competing = [kept.pop(name) for name in ("kvzip", "attention_matching")]
    assert all(least <= 140 <= most for least, most in competing)
    assert set(kept.values()) == {(140, 140)}
    of_all = [row["tokens_kept"] for row in rows if row["budget"]]
    assert all(135 < count <= 140 for count in of_all)


# docs: A sweep that was stopped resumes where it was
def test_what_was_interrupted_goes_on_without_repeating_a_point(sweep):
    first = Counting(at=4, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sweep(first).run()
    assert len(sweep().results.rows) == 3

    second = Counting()
    work = sweep(second)
    assert len(work.missing()) == 4
    rows = work.run()
    assert [row["status"] for row in rows] == ["ok"] * 7
    assert not set(first.built[:3]) & set(second.built)
    assert len(first.built[:3]) + len(second.built) == 7

    third = Counting()
    assert sweep(third).run() == rows
    assert third.built == []


def test_a_torn_last_line_costs_that_row_only(sweep):
    work = sweep()
    work.run()
    path = work.results.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    counting = Counting()
    torn = sweep(counting)
    assert len(torn.missing()) == 1
    rows = torn.run()
    assert len(counting.built) == 1
    assert [row["status"] for row in rows] == ["ok"] * 7
    lines = path.read_text().splitlines()
    assert len(lines) == 8
    assert json.loads(lines[-1])["key"] == torn.key(torn.points[-1])
    assert sweep().missing() == []


def test_a_method_that_fails_is_a_row_and_the_rest_goes_on(sweep):
    rows = sweep(Counting(method="h2o", error=RuntimeError("no luck"))).run()
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok", "ok", "ok", "ok"]
    assert rows[1]["error"] == "RuntimeError: no luck"
    assert "Counting" in rows[1]["traceback"] or "__call__" in rows[1]["traceback"]
    # the next run tries it again, and nothing else
    again = Counting()
    assert [row["status"] for row in sweep(again).run()] == ["ok"] * 7
    assert {method for method, _ in again.built} == {"h2o"}


def test_a_cache_that_keeps_everything_under_a_budget_is_a_failure(sweep):
    rows = sweep(lambda method, model, budget: DenseCache(model)).run()
    assert [row["status"] for row in rows] == ["ok"] + ["failed"] * 6
    assert "NotCompressedError" in rows[1]["error"]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"samples": 3}, {"lengths": (701,)}, {"hold_back": 2}, {"tasks": ("needle",)}], ids=str
)
def test_other_settings_are_other_points(sweep, change):
    same = {"protocols": ("question-aware",)}
    before, after = sweep(**same), sweep(**same | change)
    assert before.key(before.points[0]) == sweep(**same).key(before.points[0])
    assert before.key(before.points[0]) != after.key(after.points[0])


def test_another_text_is_another_point(sweep, tmp_path):
    essay = tmp_path / "essay.txt"
    essay.write_text("Nobody in the valley had ever seen a horse before. " * 40)
    before, after = sweep(tasks=("text",)), sweep(tasks=("text",), text=str(essay))
    assert before.key(before.points[0]) != after.key(after.points[0])


def test_each_prediction_stands_by_its_own_sample(sweep, model, tokenizer):
    made = make_samples("needle_essay", tokenizer, 1500, 4)
    prompts = [make_prompt(tokenizer, sample) for sample in made]
    # else the order they run in is the order they stand in
    assert sorted(prompts, key=lambda prompt: len(prompt.context)) != prompts
    alone = [answer(model, lambda: DenseCache(model), [prompt], "question-agnostic")[0][0] for prompt in prompts]
    said = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in alone]
    assert len(set(said)) == 4
    for batch in (1, 3):
        work = sweep(tasks=("needle_essay",), lengths=(1500,), samples=4, batch=batch)
        row = work.measure(work.points[0])
        assert row["predictions"] == said
        assert row["answers"] == [list(sample.answers) for sample in made]


def test_points_are_the_same_however_many_run_at_a_time(sweep):
    assert sweep(batch=1).key(sweep().points[0]) == sweep(batch=2).key(sweep().points[0])


def test_the_newest_row_of_a_key_stands(tmp_path):
    results = Results(tmp_path)
    results.append({"key": "a", "status": "ok", "score": 1})
    results.append({"key": "a", "status": "failed"})
    assert Results(tmp_path).rows["a"]["status"] == "failed"
    assert not Results(tmp_path).is_done("a")
    assert Results(tmp_path, forget=True).rows == {}


def test_a_budget_a_method_cannot_keep_is_refused_before_anything_runs(model):
    points = make_points(settings(methods=("snapkv",), budgets=(10,)))
    with pytest.raises(ValueError, match="snapkv at a budget of 10 tokens: budget must be at least"):
        check_budgets(model, points)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (60,)}, "length must be at least .* for the task passkey, got 60"),
        ({"hold_back": 500, "protocols": ("question-aware",)}, "hold_back must be at least 1 token"),
        ({"tasks": ("text",), "lengths": (10**6,)}, "text must hold 2 windows"),
    ],
)
def test_tasks_that_cannot_be_made_are_refused_before_anything_runs(sweep, change, message):
    with pytest.raises(ValueError, match=message):
        sweep(**change).check_tasks()


def test_without_the_harness_a_task_of_its_own_is_an_unknown_task(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvcompress.evals.lm.task", None)
    with pytest.raises(
        ValueError, match=r"unknown task 'arc_easy'; known: needle, .* pip install 'kvcompress\[eval\]'"
    ):
        make_tasks(settings(tasks=("arc_easy",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": ("aware",)}, "unknown protocol 'aware'; known: question-agnostic, question-aware"),
        ({"methods": ("h3o",)}, "unknown method 'h3o'; did you mean h2o[?] known: none, .*h2o"),
        ({"methods": ()}, "methods must name at least one"),
        ({"budgets": (1.5,)}, "budget must be .* a fraction .* got 1.5"),
        ({"budgets": (0,)}, "budget must be at least 1 token, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"lengths": (1,)}, "a length must be at least 2 tokens, got 1"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_caches_share_one_first_forward_and_its_rows_are_those_of_their_own(sweep, monkeypatch, tmp_path):
    recorded = []
    monkeypatch.setattr(
        FirstForward, "fill", lambda self, reader, fill=FirstForward.fill: recorded.append(fill(self, reader))
    )
    change = {"protocols": ("question-agnostic", "question-aware"), "batch": 1}
    shared = sweep(**change).run()
    # two prompts, two protocols, three methods at two budgets and the full cache
    assert len(recorded) == 28
    monkeypatch.setattr(first_forward, "MOST_BYTES", 0)
    (tmp_path / "results.jsonl").unlink()
    alone = sweep(**change).run()
    assert len(recorded) == 28
    for row, other in zip(shared, alone, strict=True):
        assert {**row, "seconds": 0, "provenance": 0} == {**other, "seconds": 0, "provenance": 0}


# docs: Where so many cannot be recorded in 8 GiB, fewer are read at a time
@pytest.mark.parametrize("task", ["passkey", "text"])
def test_what_cannot_be_recorded_at_once_is_read_fewer_at_a_time(sweep, model, monkeypatch, tmp_path, task):
    change = {"tasks": (task,), "samples": 3, "lengths": (700,), "continuation": 4, "methods": ("h2o", "kvzip")}
    in_twos = sweep(**change, batch=2).run()
    (tmp_path / "results.jsonl").unlink()
    made = []
    monkeypatch.setattr(FirstForward, "__init__", lambda *given, init=FirstForward.__init__: made.append(init(*given)))
    # questions come on top of a length
    monkeypatch.setattr(first_forward, "MOST_BYTES", 2 * FirstForward.size(model, 700))
    work = sweep(**change, batch=3)
    rows = work.run()
    assert len(made) == 2
    assert without_times(rows) == without_times(in_twos)
    assert {row["provenance"]["batch"] for row in rows} == {2}
    # what was measured in twos is not taken for parts of three
    assert {work.batch(point) for point in work.points} == {2}
    # nothing of so long a prompt can be recorded: as many are read as were asked for
    monkeypatch.setattr(first_forward, "MOST_BYTES", 2 * FirstForward.size(model, 300))
    assert {work.batch(point) for point in work.points} == {3}


def test_a_part_of_all_methods_comes_before_the_next_part(sweep):
    built = Counting()
    rows = sweep(built, samples=3, batch=2).run()
    methods = [row["method"] for row in rows]
    assert [method for method, _ in built.built] == methods * 2
    assert [len(row["scores"]) for row in rows] == [3] * 7


def without_times(rows):
    return [{name: row[name] for name in row if name not in ("seconds", "provenance")} for row in rows]


# docs: in the middle of a point too
def test_what_was_interrupted_between_parts_goes_on_with_the_next_part(sweep, tmp_path):
    whole = sweep(samples=3, batch=1, tasks=("passkey", "text"), continuation=4).run()
    assert not list(tmp_path.glob("parts*"))
    (tmp_path / "results.jsonl").unlink()
    change = {"samples": 3, "batch": 1, "tasks": ("passkey", "text"), "continuation": 4}
    first, second = Counting(at=12, error=KeyboardInterrupt()), Counting()
    with pytest.raises(KeyboardInterrupt):
        sweep(first, **change).run()
    assert not sweep().results.rows
    assert without_times(sweep(second, **change).run()) == without_times(whole)
    # 11 parts of the first task were done
    assert len(second.built) == 2 * 21 - 11
    assert not list(tmp_path.glob("parts*"))


def test_parts_of_other_batches_are_not_taken_for_these(sweep):
    with pytest.raises(KeyboardInterrupt):
        sweep(Counting(at=12, error=KeyboardInterrupt()), samples=4, batch=1).run()
    again = Counting()
    sweep(again, samples=4, batch=2).run()
    assert len(again.built) == 14


def test_a_method_that_fails_in_a_later_part_is_a_failed_row_and_the_rest_goes_on(sweep):
    rows = sweep(Counting(at=9, error=RuntimeError("no luck")), samples=3, batch=1).run()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok", "ok", "ok", "ok"]
    again = Counting()
    assert [row["status"] for row in sweep(again, samples=3, batch=1).run()] == ["ok"] * 7
    # its first part was measured before
    assert len(again.built) == 2


def sequential(sweep, **change):
    work = sweep(samples=24, batch=8, tasks=("text",), lengths=(64,), continuation=2, **change)
    work.precision = 0.3
    return work


# docs: it reads no more samples, from eight on, once half of every score's 95 % interval is at most 0.1
def test_points_end_early_once_they_are_known_well_enough(sweep, monkeypatch):
    # the first point is not known well enough from its first part
    widths = iter([0.5] + [0.2] * 100)
    monkeypatch.setattr(sweeps, "_half_width", lambda row: next(widths))
    built = Counting()
    rows = sequential(sweep, build=built).run()
    assert [row["samples"] for row in rows] == [16] * 7
    assert [row["stopped_at"] for row in rows] == [{"reason": "precision", "half_width": 0.2}] * 7
    assert len(built.built) == 14
    monkeypatch.undo()
    # another run that asks for no more is done; one that asks for all goes on
    assert sequential(sweep).missing() == []
    work = sequential(sweep)
    work.precision = None
    assert len(work.missing()) == 7


# docs: it begins nothing after an hour; the same command goes on
def test_a_sweep_out_of_time_says_how_many_samples_it_has_and_goes_on_later(sweep, monkeypatch):
    change = {"samples": 3, "batch": 1}
    whole = sweep(**change).run()
    work = sweep(**change)
    work.results.path.unlink()
    # read when the sweep starts, and before each part and each point: time is up after the second point of the third
    clock = iter([0.0] * (1 + 2 * 8 + 3) + [99.0] * 1000)
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: next(clock))
    built = Counting()
    work = sweep(built, **change)
    work.seconds = 50.0
    rows = work.run()
    assert len(built.built) == 16
    assert [row["samples"] for row in rows] == [3, 3, 2, 2, 2, 2, 2]
    assert [row["stopped_at"]["reason"] for row in rows[2:]] == ["time"] * 5
    monkeypatch.undo()
    rest = Counting()
    rows = sweep(rest, **change).run()
    assert len(rest.built) == 5
    assert without_times(rows) == without_times(whole)


class Given:
    """A task of somebody's own, that measures what it is given."""

    def __init__(self, settings, found):
        self.settings, self.found = settings, found

    def points(self):
        return points_of("mine", [None], ["mine"], self.settings)

    def check(self, tokenizer):
        pass

    def cost(self, point):
        return 1

    def facts(self, point):
        return {}

    def measure(self, point, subject):
        return self.found


ENOUGH = {"metric": "points", "score": 1.0, "stderr": None, "bytes": 5}


def test_the_first_parts_are_not_those_of_one_depth(sweep):
    work = sweep(samples=20, batch=5)
    task, point = work.tasks["passkey"], work.points[0]
    chosen = [task._part(point, work.subject, part)[2] for part in range(4)]
    assert sorted(index for part in chosen for index in part) == list(range(20))
    # in the order in which they are made, which is that of their depths, the first would be 0 to 4
    assert all(max(part) - min(part) > 8 for part in chosen)
    assert chosen == [task._part(point, work.subject, part)[2] for part in range(4)]


def test_what_is_known_of_a_point_is_not_lost_to_a_run_that_knows_less(tmp_path):
    def row(status="ok", samples=5, at=1, **more):
        return {"key": "a", "status": status, "samples": samples, "provenance": {"time": f"{at}"}, **more}

    results = Results(tmp_path)
    stopped = {"stopped_at": {"reason": "time", "half_width": 0.5}}
    for newer, stands in (
        (row(samples=2, at=1, **stopped), 2),
        (row("failed", at=2), 2),
        (row(samples=4, at=3, **stopped), 4),
        (row(samples=3, at=4, **stopped), 4),
        (row(samples=5, at=5), 5),
        (row(samples=4, at=6, **stopped), 5),
    ):
        results.append(newer)
        assert results.rows["a"]["samples"] == Results(tmp_path).rows["a"]["samples"] == stands
    # one that had all of its samples is measured again only on demand
    results.append(row("failed", at=7))
    assert results.rows["a"]["status"] == Results(tmp_path).rows["a"]["status"] == "failed"


def test_lines_that_are_no_parts_are_passed_over(tmp_path):
    good = {"key": "a", "batch": 4, "part": 0, "found": {}, "seconds": 1.0}
    lines = [{"key": "a"}, {**good, "batch": [1]}, good, ["a"]]
    (tmp_path / "parts.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"key": "a", "ba')
    assert Parts(tmp_path).of("a", 4) == [good]


def test_parts_that_make_no_row_are_measured_again_in_the_next_run(sweep, tmp_path):
    change = {"samples": 2, "batch": 1}
    with pytest.raises(KeyboardInterrupt):
        sweep(Counting(at=10, error=KeyboardInterrupt()), **change).run()
    lines = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    lines[4]["found"] = {"answers": 7}
    # as another process may have written them, whose file is read later
    (tmp_path / "parts.jsonl").unlink()
    (tmp_path / "parts.z.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert [row["status"] for row in sweep(**change).run()] == [*["ok"] * 4, "failed", "ok", "ok"]
    again = Counting()
    assert [row["status"] for row in sweep(again, **change).run()] == ["ok"] * 7
    assert len(again.built) == 2


def test_a_point_that_had_stopped_and_now_fails_is_tried_once_and_keeps_its_row(sweep, monkeypatch):
    clock = iter([0.0] * (1 + 8) + [99.0] * 1000)
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: next(clock))
    work = sweep(samples=2, batch=1)
    work.seconds = 50.0
    before = work.run()
    assert [row["samples"] for row in before] == [1] * 7
    monkeypatch.undo()
    monkeypatch.setattr(sweeps, "_PAUSE", 0.0)
    failing = Counting(method="h2o", error=RuntimeError("no luck"), at=20)
    rows = sweep(failing, samples=2, batch=1).run()
    assert [(row["status"], row["samples"]) for row in rows] == [("ok", 2), ("ok", 1), ("ok", 1), *[("ok", 2)] * 4]
    assert len(failing.built) == 7


def test_time_that_is_up_in_the_first_part_leaves_rows_of_what_was_read(sweep, monkeypatch):
    clock = iter([0.0] * (1 + 1 + 3) + [99.0] * 1000)
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: next(clock))
    work = sweep(samples=3, batch=1)
    work.seconds = 50.0
    rows = work.run()
    assert [(row["method"], row["samples"]) for row in rows] == [("none", 1), ("h2o", 1), ("h2o", 1)]
    assert len(work.missing()) == 7


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (ENOUGH, None),
        ({"score": 1.0, "stderr": None}, "ValueError: the task mine must measure metric, score, stderr, bytes, got no"),
        (None, "ValueError: the task mine must measure metric"),
        (ENOUGH | {"score": math.nan}, "ValueError: the task mine measured what JSON cannot hold"),
        (ENOUGH | {"score": {1}}, "ValueError: the task mine measured what JSON cannot hold: Object of type set"),
    ],
)
def test_a_task_of_ones_own_is_measured_and_one_that_fails_is_a_failed_row(model, tokenizer, tmp_path, found, error):
    asked = settings(tasks=("mine",))
    rows = Sweep(asked, {"mine": Given(asked, found)}, model, tokenizer, tmp_path).run()
    assert len(rows) == 7
    for row in rows:
        assert row["status"] == ("ok" if error is None else "failed")
        assert row.get("error", "").startswith(error or "")
    report.write_all(report.collect([tmp_path]), tmp_path)
    assert report.make_tables(rows)

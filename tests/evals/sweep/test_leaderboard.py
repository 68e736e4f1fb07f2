import ast
import csv
import json

import pytest
import yaml

from kvcompress.cli import main
from kvcompress.evals.sweep.leaderboard import TASKS, string_match, write_leaderboard
from tests.evals.sweep.reported import FAILED, row, scored
from tests.evals.sweep.test_report import write


def ruler(task="niah_single_1", method="h2o", budget=0.25, **more):
    answers, said = [["7", "seven"], ["8"]], ["It is 7.", "Nine, or\x00 8?"]
    own = {"length": 4096, "model": "Qwen/Qwen3-8B", "answers": answers, "predictions": said}
    return scored([0.5, 1.0], method, budget, task=f"ruler_{task}", **(own | more))


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


# docs: of a sweep with RULER's tasks, `--leaderboard` writes a folder for each method and budget
# docs: Each has `predictions.csv`, `metrics.json` and `config.yaml`
def test_a_folder_for_each_method_and_budget(tmp_path):
    made = [ruler(), ruler("qa_1"), ruler(budget=0.5), ruler(method="gear:bits=2", budget=None)]
    made += [ruler(protocol="question-agnostic"), row(task="needle"), ruler(protocol="multi-turn", predictions=[])]
    places = write_leaderboard(made, tmp_path)
    assert [place.name for place in places] == [
        "ruler__4096__Qwen--Qwen3-8B__h2o__budget_0.25__compressed_questions",
        "ruler__4096__Qwen--Qwen3-8B__h2o__budget_0.5__compressed_questions",
        "ruler__4096__Qwen--Qwen3-8B__gear_bits=2__compressed_questions",
        "ruler__4096__Qwen--Qwen3-8B__h2o__budget_0.25",
    ]
    assert metrics(places[0]) == {"niah_single_1": {"string_match": 75.0}, "qa_1": {"string_match": 100.0}}
    with (places[0] / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["task"], line["predicted_answer"]) for line in lines] == [
        ("niah_single_1", "It is 7."), ("niah_single_1", "Nine, or\x00 8?"),
        ("qa_1", "It is 7."), ("qa_1", "Nine, or\x00 8?"),
    ]  # fmt: skip
    assert ast.literal_eval(lines[0]["answer"]) == ["7", "seven"]
    assert {line["compression_ratio"] for line in lines} == {"0.75"}


def test_what_differs_by_a_sign_has_a_folder_of_its_own(tmp_path):
    methods = [f"gear:basis=a{sign}b" for sign in "/_ @#"]
    places = write_leaderboard([ruler(method=method, budget=None) for method in methods], tmp_path)
    assert len({place.name.lower() for place in places}) == len(methods)
    assert all(place.parent == tmp_path for place in places)


# docs: the bytes that were measured are in `config.yaml`, as is which of the 13 tasks did not run
def test_the_config_says_what_ran_and_what_it_held(tmp_path):
    (place,) = write_leaderboard([ruler(size=1000)], tmp_path)
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert config["dataset"] == "ruler"
    assert (config["data_dir"], config["model"], config["press_name"]) == ("4096", "Qwen/Qwen3-8B", "h2o")
    assert (config["budget"], config["compression_ratio"], config["compress_questions"]) == (0.25, 0.75, True)
    assert config["bytes_share_of_full_cache"] == 0.25
    assert config["samples_per_task"] == {"niah_single_1": 2}
    assert config["tasks_not_run"] == list(TASKS[1:])


# docs: `compression_ratio` is nominal there
@pytest.mark.parametrize(("budget", "ratio"), [(1024, 0.75), (0.125, 0.875), (1.0, 0.0), (None, 0.75), (8192, 0.0)])
def test_the_ratio_is_what_was_to_be_dropped_or_else_the_bytes_saved(budget, ratio, tmp_path):
    (place,) = write_leaderboard([ruler(budget=budget, size=1000)], tmp_path)
    assert json.loads((place / "config.yaml").read_text())["compression_ratio"] == ratio


@pytest.mark.parametrize(
    ("task", "score"), [("vt", 50.0), ("qa_2", 100.0), ("niah_multivalue", 50.0)], ids=["all", "any", "values"]
)
def test_questions_ask_for_any_answer_and_the_others_for_all(task, score):
    assert string_match(task, [["Red", "blue"]], ["It is RED."]) == score


def test_what_was_not_answered_is_an_error():
    lacking = ruler()
    del lacking["predictions"]
    message = "the row niah_single_1 4096 question-aware, h2o 0.25 has no predictions"
    with pytest.raises(ValueError, match=message):
        write_leaderboard([lacking], None)
    with pytest.raises(ValueError, match="a prediction for each of its 2 samples, got 1"):
        write_leaderboard([ruler(predictions=["7"])], None)
    with pytest.raises(ValueError, match="RULER's tasks that succeeded, .* the tasks are ruler_niah_single_1, .*qa_2"):
        write_leaderboard([row(), ruler() | FAILED], None)


def test_a_point_that_failed_leaves_its_task_out(tmp_path):
    (place,) = write_leaderboard([ruler(), ruler("vt") | FAILED], tmp_path)
    assert set(metrics(place)) == {"niah_single_1"}
    assert "vt" in json.loads((place / "config.yaml").read_text())["tasks_not_run"]


def test_the_command_writes_it_beside_the_report(tmp_path, capsys):
    folder = write(tmp_path / "rows", ruler(), ruler(model="other/model") | {"key": "x"})
    arguments = ["report", str(folder), "--out", str(tmp_path / "out"), "--leaderboard", str(tmp_path / "board")]
    assert main(arguments) == 0
    assert len(list((tmp_path / "board").glob("*/metrics.json"))) == 2
    assert "compressed_questions" in capsys.readouterr().out


# docs: A leaderboard that is refused leaves no folder, and the report is there
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (row(), "a leaderboard needs rows of RULER's tasks"),
        (
            ruler(protocol="multi-turn"),
            "a leaderboard needs rows of the protocol question-agnostic or question-aware; "
            "those of RULER's tasks that succeeded are of multi-turn",
        ),
    ],
)
def test_a_refusal_leaves_the_report_and_no_folder(tmp_path, capsys, made, said):
    folder = write(tmp_path / "other", made)
    out, board = tmp_path / "out", tmp_path / "deep" / "board"
    assert main(["report", str(folder), "--out", str(out), "--leaderboard", str(board)]) == 2
    assert said in capsys.readouterr().err
    assert (out / "report.html").exists()
    assert not board.parent.exists()


def test_a_leaderboard_that_cannot_be_written_is_an_error(tmp_path, capsys):
    (tmp_path / "board").write_text("a file")
    folder = write(tmp_path / "rows", ruler())
    arguments = ["report", str(folder), "--out", str(tmp_path / "out"), "--leaderboard", str(tmp_path / "board")]
    assert main(arguments) == 2
    assert str(tmp_path / "board") in capsys.readouterr().err

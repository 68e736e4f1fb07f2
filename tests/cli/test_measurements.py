"""bench, study and peers: every command is listed without its import, and takes its function's parameters."""

import importlib
import sys
from pathlib import Path
from typing import Annotated

import pytest

from kvcompress.cli import main, measurements

FILES = [Path("a.txt"), Path("b.txt")]
COMMANDS = [(group, name, *entry[:2]) for group, (_, own) in measurements.GROUPS.items() for name, entry in own.items()]


@pytest.mark.parametrize(("group", "name", "module", "function"), COMMANDS)
def test_every_command_has_its_function(group, name, module, function):
    assert callable(getattr(importlib.import_module(f"kvcompress.evals.{module}"), function))


def test_groups_are_listed_and_so_are_their_commands(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for group, (about, commands) in measurements.GROUPS.items():
        assert f" {group} " in listed
        assert about.split(",")[0].rstrip(".") in listed
        assert main([group, "--help"]) == 0
        own = capsys.readouterr().out
        assert all(f" {name} " in own for name in commands)


@pytest.fixture
def asked(monkeypatch):
    """What a command of two lists, a flag and a number was called with."""
    calls = []

    def measure(
        number: Annotated[int, "how many"],
        fit: Annotated[list[Path] | None, "texts"] = None,
        needles: Annotated[list[int] | None, "lengths"] = None,
        fit_tokens: Annotated[int, "of them"] = 7,
        tiny: Annotated[bool, "small"] = False,
    ) -> None:
        """What it measures."""
        if number < 0:
            raise ValueError(f"number must be at least 0,\ngot {number}")
        calls.append((number, fit, needles, fit_tokens, tiny))

    module = type(sys)("measured")
    module.measure = measure
    monkeypatch.setitem(sys.modules, "kvcompress.evals.measured", module)
    monkeypatch.setitem(measurements.GROUPS, "study", ("", {"this": ("measured", "measure", "")}))
    return calls


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("--number 3", (3, None, None, 7, False)),
        ("--fit a.txt b.txt --needles 512 1024 --tiny --number 1", (1, FILES, [512, 1024], 7, True)),
        ("--number 1 --fit a.txt --fit b.txt --fit-tokens 9", (1, FILES, None, 9, False)),
    ],
)
def test_parameters_are_options_and_lists_take_several_words(asked, words, call):
    assert main(["study", "this", *words.split()]) == 0
    (found,) = asked
    assert [value or None for value in found] == [value or None for value in call]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--number -1", "kvcompress: number must be at least 0, got -1\n"),
        ("--number many", "Invalid value for '--number'"),
        ("", "Missing option '--number'"),
        ("--number 1 b.txt", "Got unexpected extra argument"),
        ("--number 1 --no-tiny", "No such option: --no-tiny"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(asked, words, message, capsys):
    assert main(["study", "this", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not asked


def test_the_words_about_a_parameter_are_its_help(asked, capsys):
    assert main(["study", "this", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("What it measures.", "how many", "--fit-tokens", "of them", "default: 7"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench speed --context 0", "Invalid value for '--context': Input should be greater than or equal to 1"),
        ("bench speed --steps 1", "Invalid value for '--steps': Input should be greater than or equal to 2"),
        ("bench stream --sections 0", "Invalid value for '--sections'"),
        ("bench shared-prefix --batch 0", "Invalid value for '--batch'"),
        ("bench kernels --attempts 0", "Invalid value for '--attempts'"),
        ("study bits --chunk 0", "Invalid value for '--chunk'"),
        ("peers rows --prompts /none --answers a --out OUT", "/none/settings.json: No such file or directory"),
    ],
)
def test_a_number_or_a_file_that_makes_no_sense_is_named(words, message, tmp_path, capsys):
    assert main([str(tmp_path) if word == "OUT" else word for word in words.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_group_without_a_command_shows_its_help(capsys):
    assert main(["bench"]) == 2
    assert "shared-prefix" in capsys.readouterr().out

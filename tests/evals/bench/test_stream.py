import torch

from kvcompress.evals.bench.stream import chunk_losses
from tests.contract.models import DEVICE, prompt, tiny


def test_a_cache_that_keeps_everything_gives_the_loss_of_one_forward():
    model = tiny().to(DEVICE)
    ids = prompt(30)
    losses = chunk_losses(model, ids, "h2o", budget=64, chunk=10)
    logits = model(ids).logits[0].float()
    straight = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    scored = [straight[start : start + 9].mean().item() for start in (0, 10, 20)]
    torch.testing.assert_close(losses, scored, rtol=1e-4, atol=1e-4)


def test_a_small_budget_changes_what_comes_later_and_not_what_comes_first():
    model, ids = tiny().to(DEVICE), prompt(30)
    roomy, tight = (chunk_losses(model, ids, "streaming", budget=budget, chunk=10) for budget in (64, 6))
    assert roomy[0] == tight[0]
    assert roomy[2] != tight[2]

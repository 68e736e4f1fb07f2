import pytest
import torch

from kvcompress.kernels.evict import choose_victim, choose_victim_reference
from tests.kernels.inputs import DEVICE, slot_positions


def brute_force(scores, positions, recent_from, sinks):
    best = None
    for slot, (score, position) in enumerate(zip(scores.tolist(), positions.tolist(), strict=True)):
        if sinks <= position < recent_from and (best is None or (score, position) < best[:2]):
            best = score, position, slot
    return None if best is None else best[2]


@pytest.mark.parametrize("choose", [choose_victim, choose_victim_reference])
@pytest.mark.parametrize("slots", [1, 7, 1100])
@pytest.mark.parametrize("sinks", [0, 4])
def test_the_victim_is_the_lowest_score_then_the_lowest_position(choose, slots, sinks):
    positions = slot_positions(3, 2, slots)
    # few values, so that scores tie
    scores = torch.randint(0, 5, positions.shape, device=DEVICE).float()
    recent_from = torch.tensor([2 * slots, slots, 1], dtype=torch.int32, device=DEVICE)
    victims = choose(scores, positions, recent_from, sinks)
    assert victims.dtype == torch.int64
    for batch in range(3):
        for head in range(2):
            expected = brute_force(scores[batch, head], positions[batch, head], int(recent_from[batch]), sinks)
            assert expected is None or expected == victims[batch, head]


def test_what_must_go_and_what_must_stay_may_be_infinite():
    positions = slot_positions(2, 2, 70)
    scores = torch.rand(2, 2, 70, device=DEVICE)
    scores[..., ::2], scores[..., 1::4] = torch.inf, -torch.inf
    recent_from = torch.full((2,), 100, dtype=torch.int32, device=DEVICE)
    found = choose_victim(scores, positions, recent_from, 3)
    assert torch.equal(found, choose_victim_reference(scores, positions, recent_from, 3))


@pytest.mark.parametrize("choose", [choose_victim, choose_victim_reference])
def test_of_equal_scores_the_oldest_goes_wherever_it_lies(choose):
    positions = torch.rand(2, 3, 2500, device=DEVICE).argsort(-1).int()
    recent_from = torch.full((2,), 2500, dtype=torch.int32, device=DEVICE)
    for sinks in (0, 7):
        victims = choose(torch.zeros(2, 3, 2500, device=DEVICE), positions, recent_from, sinks)
        assert positions.gather(-1, victims[..., None]).eq(sinks).all()


@pytest.mark.parametrize("choose", [choose_victim, choose_victim_reference])
def test_neither_the_first_recent_token_nor_the_last_sink_goes_though_they_score_least(choose):
    positions = torch.arange(20, device=DEVICE).int().expand(1, 1, -1)
    scores = torch.ones(1, 1, 20, device=DEVICE)
    scores[..., 3], scores[..., 12], scores[..., 8] = -2.0, -2.0, -1.0
    recent_from = torch.tensor([12], dtype=torch.int32, device=DEVICE)
    assert choose(scores, positions, recent_from, 4).item() == 8


@pytest.mark.parametrize("choose", [choose_victim, choose_victim_reference])
@pytest.mark.parametrize("slots", [9, 1100])
def test_what_scores_nan_goes_after_all_others_and_before_what_is_protected(choose, slots):
    positions = torch.rand(2, 3, slots, device=DEVICE).argsort(-1).int()
    positions[..., 4] = -1
    scores = torch.full((2, 3, slots), torch.nan, device=DEVICE)
    recent_from = torch.full((2,), slots - 3, dtype=torch.int32, device=DEVICE)
    oldest = torch.where(positions >= 2, positions, slots).amin(-1)
    victims = choose(scores, positions, recent_from, 2)
    assert torch.equal(positions.gather(-1, victims[..., None])[..., 0], oldest)
    scores[positions == slots - 4] = 1e30
    if bool((positions == slots - 4).any(-1).all()):
        victims = choose(scores, positions, recent_from, 2)
        assert positions.gather(-1, victims[..., None]).eq(slots - 4).all()

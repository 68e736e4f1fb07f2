"""`tp_plan="auto"` over two processes: every cache holds its rank's KV heads and gives what one process gives."""

import pytest
import torch

from tests.parallel.runs import CACHES, CONVERTED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(folders, python, tmp_path_factory):
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("ranks")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    python(*torchrun, "-m", "tests.parallel.rank", *folders, out)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


# docs: except that ShadowKV then factorises the keys of each process separately
@pytest.mark.parametrize("name", [*CACHES, *CONVERTED])
def test_two_processes_give_what_one_gives(ranks, alone, name):
    first, second = (found[name] for found in ranks)
    assert isinstance(first, dict), first
    assert [first["heads"], second["heads"]] == [2, 2]
    assert alone[name]["heads"] == 4
    torch.testing.assert_close(first["logits"], second["logits"])
    if name == "shadowkv":
        # a space of its own for each process's keys errs otherwise; of a rank that loses nothing, see shadowkv_whole
        return
    torch.testing.assert_close(first["sequences"], alone[name]["sequences"])
    # transformers gives logits as float32
    torch.testing.assert_close(first["logits"], alone[name]["logits"], rtol=1e-5, atol=1e-4)


# docs: `tp_plan="auto"` (each process holds its KV heads, and heads that compete do so with those of all; `memory()`
# docs: counts its own bytes)
@pytest.mark.parametrize("name", [*CACHES, *CONVERTED])
def test_each_process_counts_the_bytes_of_its_heads(ranks, alone, name):
    first, second = (found[name] for found in ranks)
    assert isinstance(first, dict), first
    assert first["full_bytes"] + second["full_bytes"] == alone[name]["full_bytes"]
    # counters and positions that belong to no head are on both
    together, whole = first["bytes"] + second["bytes"], alone[name]["bytes"]
    low_rank = name.startswith("shadowkv")
    assert whole * (0.85 if low_rank else 1) <= together <= whole * 1.06
    for mine, other, all_heads in zip(first["kept"], second["kept"], alone[name]["kept"], strict=True):
        assert torch.equal(torch.cat([mine, other], 1), all_heads)


def test_heads_of_two_processes_share_one_budget(ranks, alone):
    first, second, wanted = ranks[0]["counts"], ranks[1]["counts"], alone["counts"]
    # heads differ, or any number of tokens would do
    assert wanted["shares"].std() > 0.05
    for found in (first, second):
        torch.testing.assert_close(found["shares"], wanted["shares"])
    for mine, other, all_heads in zip(first["kept"], second["kept"], wanted["kept"], strict=True):
        assert torch.equal(torch.cat([mine, other], 1), all_heads)

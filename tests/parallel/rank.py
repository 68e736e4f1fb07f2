"""One process of a tensor-parallel run: `torchrun --nproc-per-node 2 -m tests.parallel.rank plain converted out`."""

import sys
import traceback
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.parallel.runs import CACHES, CONVERTED, converse, count


def main(plain: str, converted: str, out: str) -> None:
    """Runs every cache on its rank of each model, and writes what came out."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {}
    for folder, caches in ((plain, CACHES), (converted, CONVERTED)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, distributed_config=DistributedConfig(tp_plan="auto")
        ).eval()
        if folder == plain:
            counts = count(model)
        for name, make in caches.items():
            try:
                found[name] = converse(model, make(model))
            except Exception:
                # the ranks fail alike, as they do the same
                found[name] = traceback.format_exc()
    found["counts"] = counts
    torch.save(found, Path(out) / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    import kvcompress.swiftkv.model  # noqa: F401 (registers converted models)

    main(*sys.argv[1:])

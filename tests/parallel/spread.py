"""Every cache on models spread over two devices: `python -m tests.parallel.spread plain converted out.pt`.

A process of its own, because it gives torch a second kind of device.
"""

import sys
import traceback
from pathlib import Path

import torch
from accelerate import dispatch_model
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM

import kvcompress.swiftkv.model  # noqa: F401 (registers converted models)
from kvcompress import H2OCache
from tests.parallel.devices import KIND, Devices
from tests.parallel.runs import CACHES, CONVERTED, converse

FIRST, SECOND = f"{KIND}:0", f"{KIND}:1"
# the layers of the groups that `across` and `swiftkv` share are parted
MAP = {
    "model.embed_tokens": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": FIRST,
    "model.layers.2": SECOND,
    "model.norm": SECOND,
    "lm_head": SECOND,
}


def main(plain: str, converted: str, out: str) -> None:
    """Runs every cache, and writes what came out."""
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend()
    found = {}
    with Devices():
        for folder, caches, more in ((plain, CACHES, {}), (converted, CONVERTED, {"model.norm_swiftkv": SECOND})):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
            model = dispatch_model(model, MAP | more, main_device=FIRST, skip_keys=model._skip_keys_device_placement)
            for name, make in caches.items():
                try:
                    found[name] = converse(model, make(model))
                except Exception:
                    found[name] = traceback.format_exc()
            if folder == plain:
                cache = H2OCache(model, budget=8)
                converse(model, cache)
                # files hold CPU tensors
                for layer in cache.layers:
                    layer.map_tensors(lambda tensor: tensor.cpu())
                    layer.clock.count_on(layer.clock.tensor.cpu())
                cache.padding.visible = cache.padding.visible.cpu()
                file = Path(out).with_suffix(".safetensors")
                cache.save(file)
                found["loaded"] = H2OCache.load(file, model).memory().by_device
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

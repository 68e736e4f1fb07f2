"""A step of decoding asks no more of a GPU than was recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompress.kernels.common.runtime import HAS_TRITON, INTERPRETED
from tests.contract.launches import KINDS

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "evals" / "results" / "launches.json"


def excess(found, recorded):
    """What is more than recorded, by name: (found, recorded)."""
    pairs = {
        f"launches of {kernel}": (count, recorded["launches"].get(kernel, 0))
        for kernel, count in found["launches"].items()
    }
    pairs |= {kind: (found[kind], recorded[kind]) for kind in KINDS}
    pairs |= {f"{kind} a step": (found["step"][kind], recorded["step"][kind]) for kind in KINDS}
    return {name: pair for name, pair in pairs.items() if pair[0] > pair[1]}


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="launches are recorded where Triton compiles")
def test_no_cache_asks_more_of_a_gpu_than_recorded():
    """What is less, or has to be more, is recorded: python -m tests.contract.launches evals/results/launches.json"""
    # on a machine with a GPU too the device is pretended
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.contract.launches"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found, recorded = (json.loads(text)["caches"] for text in (ran.stdout, RECORDED.read_text("utf-8")))
    wasteful = excess(found.pop("wasteful"), recorded["dense"])
    assert wasteful == {
        "operations": (recorded["dense"]["operations"] + 2, recorded["dense"]["operations"]),
        "reads": (2, 0),
        "copies": (1, 0),
    }
    assert set(found) == set(recorded)
    worse = {name: excess(each, recorded[name]) for name, each in found.items()}
    assert not {name: pairs for name, pairs in worse.items() if pairs}

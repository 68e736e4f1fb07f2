"""Checkpoints that the parallel tests load, and what one process on one device finds with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcompress import Profile
from kvcompress.swiftkv.conversion import convert
from tests.contract.models import build
from tests.parallel.runs import CACHES, CONVERTED, SIZES, converse, count

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A model, and one converted to SwiftKV, as checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    model = build("llama", **SIZES)
    model.save_pretrained(folder / "plain")
    Profile.of(model, torch.arange(1.0, 13.0).view(3, 4)).save(folder / "plain" / "profile")
    convert(model, 1, share=2).save_pretrained(folder / "converted")
    return [folder / "plain", folder / "converted"]


@pytest.fixture(scope="session")
def alone(folders):
    """What one process on one device finds, by cache."""
    found = {}
    for folder, caches in zip(folders, (CACHES, CONVERTED), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        found |= {name: converse(model, make(model)) for name, make in caches.items()}
        if folder == folders[0]:
            found["counts"] = count(model)
    return found


@pytest.fixture(scope="session")
def python():
    """Runs python with these arguments from the root, without a GPU."""

    def run(*arguments):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run

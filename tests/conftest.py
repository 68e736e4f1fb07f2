import os

# before transformers is imported: no test waits for a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what cuBLAS asks of those who want the deterministic mode of `fresh_memory_is_nan`
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import gc
import random
import shutil
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers share the cores
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds none"))


def pytest_collection_finish(session):
    """What was imported and collected stays to the end: the garbage collector need not look through it every time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """torch.empty and its kin hold NaN (integers: their maximum), so a read before the first write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def shared_models_stay_as_they_are():
    """A model of `tiny` that a test changed would change the tests after it."""
    yield
    if models := sys.modules.get("tests.contract.models"):
        models.take_back()


@pytest.fixture(scope="session")
def fresh():
    """Runs code in interpreters that have not imported kvcompress, as `Interpreters.run`."""
    from tests.fresh import Interpreters

    interpreters = Interpreters()
    yield interpreters.run
    interpreters.close()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 on the CPU, and its tokenizer. Do not change either."""
    from kvcompress.loading import ModelUnavailableError, load_model

    try:
        return load_model()
    except ModelUnavailableError as error:
        pytest.skip(f"needs the real model: {error}")


@pytest.fixture(scope="session")
def tasks_of_arc(tmp_path_factory):
    """Of the thousands of files of lm-eval's own tasks the few in the folder of ARC."""
    manager = pytest.importorskip("lm_eval.tasks.manager")
    place = tmp_path_factory.mktemp("lm-eval")
    shutil.copytree(Path(manager.__file__).parent / "arc", place / "arc")
    return place


@pytest.fixture
def few_tasks(tasks_of_arc, monkeypatch):
    """lm-eval knows few tasks of its own; it takes ten seconds to read all of their files."""
    from lm_eval.tasks import manager

    from kvcompress.evals.lm import harness

    monkeypatch.setattr(manager, "__file__", str(tasks_of_arc / "manager.py"))
    harness._manager.cache_clear()
    yield
    harness._manager.cache_clear()

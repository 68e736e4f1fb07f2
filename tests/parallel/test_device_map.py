"""`device_map`: caches on models whose layers are on several devices, or on the disk, give what one device gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.parallel.runs import CACHES, CONVERTED, converse
from tests.parallel.spread import FIRST, SECOND

every_cache = pytest.mark.parametrize("name", [*CACHES, *CONVERTED])


@pytest.fixture(scope="module")
def spread(folders, python, tmp_path_factory):
    """What caches find on two devices."""
    out = tmp_path_factory.mktemp("spread") / "found.pt"
    python("-m", "tests.parallel.spread", *folders, out)
    return torch.load(out)


# docs: Every cache gives the results of one device
@pytest.mark.slow
@every_cache
def test_layers_on_two_devices_give_what_one_device_gives(spread, alone, name):
    found = spread[name]
    assert isinstance(found, dict), found
    assert torch.equal(found["sequences"], alone[name]["sequences"])
    torch.testing.assert_close(found["logits"], alone[name]["logits"])
    assert found["bytes"] == alone[name]["bytes"]


# docs: Models may be spread by `device_map="auto"` (each layer's cache is on its layer's device)
@pytest.mark.slow
@every_cache
def test_each_layers_bytes_are_on_its_device(spread, name):
    # a group of shared layers is stored where its first layer is
    shares = name in ("across", *CONVERTED)
    assert set(spread[name]["devices"]) - {"cpu"} == ({FIRST} if shares else {FIRST, SECOND})
    assert ("cpu" in spread[name]["devices"]) == name.startswith("shadowkv")


@pytest.mark.slow
def test_a_loaded_cache_is_on_its_layers_devices(spread):
    assert spread["loaded"] == spread["h2o"]["devices"]


@pytest.fixture(scope="module")
def offloaded(folders, tmp_path_factory):
    """Both models with weights on the disk, as device_map="auto" puts what no device has room for."""
    folder = tmp_path_factory.mktemp("offload")
    models = []
    for index, source in enumerate(folders):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float64,
            device_map="auto",
            max_memory={"cpu": 600_000},
            offload_folder=folder / str(index),
        ).eval()
        assert "disk" in model.hf_device_map.values()
        models.append(model)
    return models


@every_cache
def test_weights_on_the_disk_change_nothing(offloaded, alone, name):
    model, make = (offloaded[0], CACHES[name]) if name in CACHES else (offloaded[1], CONVERTED[name])
    found = converse(model, make(model))
    assert torch.equal(found["sequences"], alone[name]["sequences"])
    torch.testing.assert_close(found["logits"], alone[name]["logits"])
    assert found["bytes"] == alone[name]["bytes"]

"""Bytes of live storages."""

import pytest
import torch
from transformers import StaticCache

from kvcompress import DenseCache, EvictingCache, H2OCache
from kvcompress.hf import cache_argument
from kvcompress.memory import MemoryReport, full_cache_bytes, read_bytes, storage_bytes
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.policies.h2o import H2O
from tests.contract.models import prompt, tiny


def test_a_storage_is_counted_whole_and_once():
    base = torch.zeros(10, 4)
    by_component, by_device = storage_bytes({"keys": [base[:1], base[5:]], "values": [base, torch.zeros(3)]})
    assert by_component == {"keys": 160, "values": 12}
    assert by_device == {"cpu": 172}


def test_an_empty_tensor_weighs_nothing():
    assert storage_bytes({"keys": [torch.empty(0)], "values": []}) == ({}, {})


def test_the_full_cache_of_a_sliding_layer_holds_its_window():
    assert full_cache_bytes(100, None, (2, 3, 8), 8, torch.bfloat16) == 2 * 2 * 3 * 8 * 100 * 2
    assert full_cache_bytes(100, 16, (2, 3, 8), 8, torch.bfloat16) == 2 * 2 * 3 * 8 * 16 * 2
    assert full_cache_bytes(10, 16, (2, 3, 8), 8, torch.float32) == 2 * 2 * 3 * 8 * 10 * 4
    # values narrower than keys, and latents, which are both
    assert full_cache_bytes(10, None, (2, 3, 8), 4, torch.float32) == 2 * 3 * (8 + 4) * 10 * 4
    assert full_cache_bytes(10, None, (2, 1, 64), 0, torch.float32) == 2 * 64 * 10 * 4


# docs: fits the prompt exactly and then takes room for 256 tokens, or an eighth of those that there are
@pytest.mark.parametrize(("tokens", "room"), [(5, 256), (2400, 300)])
@torch.no_grad()
def test_room_for_tokens_to_come_counts_as_held(tokens, room):
    model = tiny("llama")
    cache = DenseCache(model)
    model(torch.arange(tokens)[None] % 100, **cache_argument(model, cache))
    assert cache.memory().ratio == 1.0
    model(prompt(1, batch=1), **cache_argument(model, cache))
    assert cache.memory().ratio == pytest.approx((tokens + 1 + room) / (tokens + 1))


def test_devices_are_told_apart():
    report = MemoryReport({"keys": 300}, {"cpu": 100, "cuda:0": 200}, 600, 150, 7, [])
    assert (report.total_bytes, report.host_bytes, report.device_bytes) == (300, 100, 200)
    assert report.ratio == 0.5
    alone = MemoryReport({"keys": 300}, {"cpu": 300}, 600, 150, 7, [])
    assert (alone.host_bytes, alone.device_bytes) == (0, 300)


def test_what_is_offloaded_is_told_apart():
    on_cpu = MemoryReport({"keys": 300}, {"cpu": 300}, 600, 150, 7, [], {"host": 120, "disk": 30}, 4, 1000)
    assert (on_cpu.device_bytes, on_cpu.host_bytes, on_cpu.disk_bytes) == (150, 120, 30)
    assert (on_cpu.ratio, on_cpu.device_ratio, on_cpu.fetched_per_forward) == (0.5, 0.25, 250.0)
    # what a GPU leaves in CPU memory is on the host, whether a segment says so or not
    on_gpu = MemoryReport({"keys": 300}, {"cpu": 100, "cuda:0": 200}, 600, 150, 7, [], {"host": 60, "disk": 30})
    assert (on_gpu.device_bytes, on_gpu.host_bytes, on_gpu.disk_bytes) == (200, 70, 30)
    assert on_gpu.fetched_per_forward == 0.0
    for word in ("device tier", "host tier", "disk tier", "fetched"):
        assert word in str(on_cpu)


def test_an_empty_cache_reports_nothing_and_prints():
    report = H2OCache(tiny("llama"), budget=8).memory()
    assert (report.total_bytes, report.full_bytes, report.tokens_seen, report.ratio) == (0, 0, 0, 0.0)
    assert "tokens seen 0, kept per layer and head 0" in str(report)


def test_the_printed_report_names_components_and_the_ratio():
    model = tiny("llama")
    cache = H2OCache(model, budget=8)
    with torch.no_grad():
        model(prompt(40), **cache_argument(model, cache))
    report = cache.memory()
    text = str(report)
    assert "tokens seen 40, kept per layer and head 8 to 8" in text
    for name in ("keys", "values", "positions", "scores", "total", f"{report.ratio:.1%} of the full cache's"):
        assert name in text
    assert sum(report.by_component.values()) == sum(report.by_device.values()) == report.total_bytes


@pytest.mark.parametrize(
    "settings",
    [{"policy": H2O()}, {"policy": H2O(), "rerotated": True}, {"policy": ExpectedAttention(sinks=1, future=8)}],
    ids=["h2o", "rolled", "expected"],
)
@pytest.mark.parametrize("tokens", [5, 40])
def test_what_is_reported_is_every_tensor_a_cache_can_reach(tokens, settings):
    model = tiny("llama")
    cache = EvictingCache(model, budget=8, **settings)
    with torch.no_grad():
        model(prompt(tokens, batch=2), **cache_argument(model, cache))
    found: dict[int, int] = {}

    def visit(value, seen):
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item, seen)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item, seen)
        elif type(value).__module__.startswith("kvcompress"):
            visit(vars(value), seen)

    visit(cache, set())
    assert sum(found.values()) == cache.memory().total_bytes


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (8, 8), (torch.tensor(8), 8), ("8 B", 8), ("8GiB", 8 << 30), ("8 gib", 8 << 30), ("1.5KiB", 1536),
        ("8GB", 8 * 10**9), ("2TiB", 2 << 40),
    ],
)  # fmt: skip
def test_a_size_is_read_as_people_write_it(given, size):
    assert read_bytes("max_bytes", given) == size


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("8", ValueError, "max_bytes must be a number of bytes .int., or a size with its unit such as '8GiB', got '8'"),
        ("8 apples", ValueError, "got '8 apples'"),
        ("-8GiB", ValueError, "got '-8GiB'"),
        ("0 GiB", ValueError, "max_bytes must be at least 1, got 0"),
        (0, ValueError, "max_bytes must be at least 1, got 0"),
        (2.5, TypeError, "max_bytes must be a number of bytes .int., or a size such as '8GiB', got 2.5"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
    ],
)
def test_what_is_no_size_is_named(given, error, message):
    with pytest.raises(error, match=message):
        read_bytes("max_bytes", given)


# docs: It is allocated once and has one shape
def test_transformers_static_cache_has_one_shape_and_saves_nothing():
    model, ids = tiny(), prompt(20)
    cache = StaticCache(model.config, max_cache_len=64)
    shapes = []
    for _ in range(2):
        model(ids, **cache_argument(model, cache))
        shapes += [tuple(layer.keys.shape) for layer in cache.layers]
    assert set(shapes) == {(1, model.config.num_key_value_heads, 64, model.config.head_dim)}

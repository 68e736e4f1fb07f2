"""Pages off the device: whose the room is that is left, how it grows, and what a full disk does."""

import copy
import errno
import os

import pytest
import torch

from kvcompress import ShadowKVCache
from kvcompress.kernels.pages import fetch_pages_reference
from kvcompress.storage.offload import ADDRESSES, OffloadedPages
from tests.contract.drive import feed
from tests.contract.models import DEVICE, prompt, tiny

PAGE = (2, 4, 8)


def pages_in(folder=None):
    return OffloadedPages("pinned" if folder is None else f"mmap:{folder}", PAGE, torch.float32, torch.device(DEVICE))


def values(count, first=0):
    """Pages that each hold one number of their own, [count, *PAGE]."""
    return torch.arange(first, first + count, dtype=torch.float32, device=DEVICE)[:, None, None, None].expand(-1, *PAGE)


def read(pages, numbers):
    """The number in each of these pages."""
    count = len(numbers)
    held = torch.arange(count, device=DEVICE).expand(1, PAGE[0], -1)
    found = torch.empty(1, PAGE[0], count * PAGE[1], PAGE[2], device=DEVICE)
    fetch_pages_reference(found, numbers[None], held, torch.ones_like(held, dtype=torch.bool), pages.slabs)
    found = found.unflatten(2, (count, -1)).transpose(1, 2).flatten(2)[0]
    assert (found == found[:, :1]).all()
    return found[:, 0].tolist()


def with_room(folder=None):
    """Twenty pages, and room for some more."""
    pages = pages_in(folder)
    numbers = torch.cat([pages.append(16, [values(10), values(6, 10)]), pages.append(1, [values(1, 16)])])
    assert sum(map(len, pages.slabs)) > 17
    return pages, numbers


def test_pages_come_back_whatever_slab_and_part_they_came_in(tmp_path):
    for folder in (None, tmp_path):
        pages, numbers = with_room(folder)
        more = pages.append(40, [values(40, 17)])
        assert read(pages, torch.cat([more, numbers])) == [*range(17, 57), *range(17)]
        assert sum(map(len, pages.slabs)) <= 57 * 9 / 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_of_the_process_and_its_parent_leave_each_others_pages_alone(tmp_path):
    """Both go on from one file, which they share."""
    pages, numbers = with_room(tmp_path)
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.read(wait, 1)
            mine = pages.append(1, [values(1, 100)])
            code = 0 if read(pages, torch.cat([numbers, mine])) == [*range(17), 100] else 2
        finally:
            os._exit(code)
    mine = pages.append(1, [values(1, 17)])
    os.write(go, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(pages, torch.cat([numbers, mine])) == list(range(18))


def test_a_clone_and_the_original_leave_each_others_pages_alone():
    pages, numbers = with_room()
    slabs = len(pages.slabs)
    clone = copy.deepcopy(pages)
    theirs, mine = clone.append(1, [values(1, 100)]), pages.append(1, [values(1, 17)])
    # what is written for a clone goes with it, and takes no room from the original
    assert (len(pages.slabs), len(clone.slabs)) == (slabs, slabs + 1)
    again = clone.append(3, [values(3, 101)])
    assert read(pages, torch.cat([numbers, mine])) == list(range(18))
    assert read(clone, torch.cat([numbers, theirs, again])) == [*range(17), 100, 101, 102, 103]


def test_a_clone_takes_over_the_room_of_an_original_that_is_gone():
    pages, numbers = with_room()
    held = sum(map(len, pages.slabs))
    one, other = copy.deepcopy(pages), copy.deepcopy(pages)
    del pages
    mine = one.append(1, [values(1, 17)])
    assert sum(map(len, one.slabs)) == held
    # the first to ask: the room is no longer free
    theirs = other.append(1, [values(1, 100)])
    assert read(one, torch.cat([numbers, mine])) == list(range(18))
    assert read(other, torch.cat([numbers, theirs])) == [*range(17), 100]


def small(model, **settings):
    how = {"budget": 8, "chunk": 2, "outlier_chunks": 2, "local_chunks": 2, "fold": 8, "rank": 12}
    return ShadowKVCache(model, **how | settings)


def test_a_cache_that_is_cloned_and_continued_holds_what_one_that_is_fed_does():
    """Forty rounds took 5.75 GB where the full cache takes 1.35 MB."""
    model = tiny()
    cache, straight = small(model), small(model)
    for turn in range(40):
        cache = cache.clone()
        for each in (cache, straight):
            feed(model, each, prompt(24, seed=turn))
    report = cache.memory()
    assert report.host_bytes == straight.memory().host_bytes
    # of keys and values half, and an eighth to spare
    assert report.host_bytes <= report.full_bytes / 2 * 9 / 8
    token = prompt(1, seed=99)
    assert torch.equal(feed(model, cache, token), feed(model, straight, token))


def test_any_number_of_living_clones_goes_on_and_each_holds_little_of_its_own():
    model = tiny(num_hidden_layers=1)
    caches = [small(model)]
    feed(model, caches[0], prompt(60))
    for turn in range(ADDRESSES + 10):
        caches.append(caches[-1].clone())
        feed(model, caches[-1], prompt(24, seed=turn))
    report = caches[-1].memory()
    assert len(caches[-1].layers[0].segment.host.slabs) > ADDRESSES
    assert report.host_bytes <= report.full_bytes / 2 * 9 / 8
    straight = small(model)
    for ids in (prompt(60), *(prompt(24, seed=turn) for turn in range(ADDRESSES + 10)), prompt(1, seed=99)):
        expected = feed(model, straight, ids)
    assert torch.equal(feed(model, caches[-1], prompt(1, seed=99)), expected)


# a full disk


def test_a_file_has_its_bytes_on_the_disk_before_it_is_mapped(tmp_path, monkeypatch):
    """A byte that is not there ends the process, when it is written."""
    found, map_file = [], torch.from_file

    def look(name, **how):
        found.append((os.stat(name).st_blocks * 512, how["size"] * 4))
        return map_file(name, **how)

    monkeypatch.setattr(torch, "from_file", look)
    pages_in(tmp_path).append(1000, [values(1000)])
    # and where the system cannot reserve a file
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr("kvcompress.storage.offload._PIECE", 1000)
    pages_in(tmp_path).append(1000, [values(1000)])
    assert len(found) == 2
    assert all(there >= size for there, size in found)


def test_a_full_disk_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    def fail(handle, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = tiny()
    cache, other = small(model, host=f"mmap:{tmp_path}"), small(model)
    for each in (cache, other):
        feed(model, each, prompt(60))
    # all but what is read at the moment
    stays = ("lengths", "folded", "coefficients", "basis", "missed", "landmarks", "is_open", "outliers", "pages")
    before = [{name: getattr(layer.segment, name).clone() for name in stays} for layer in cache.layers]
    slabs = [list(map(len, layer.segment.host.slabs)) for layer in cache.layers]
    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)
    with pytest.raises(OSError, match=r"mmap:.* has no room for \d+ more bytes .*No space.*or host='pinned'") as error:
        feed(model, cache, prompt(40, seed=2))
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    for layer, tensors, there in zip(cache.layers, before, slabs, strict=True):
        assert all(torch.equal(getattr(layer.segment, name), tensors[name]) for name in stays)
        assert list(map(len, layer.segment.host.slabs)) == there
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"interrupted.*cache.reset\(\)"):
        feed(model, cache, prompt(1))
    cache.reset()
    for ids in (prompt(60), prompt(40, seed=2)):
        found = feed(model, cache, ids)
    assert torch.equal(found, feed(model, other, prompt(40, seed=2)))


def test_a_limit_on_the_size_of_files_is_an_error_that_names_the_folder(tmp_path):
    resource = pytest.importorskip("resource", reason="the system has no limits")
    pages, numbers = with_room(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="has no room") as error:
            pages.append(1000, [values(1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path))
    assert read(pages, torch.cat([numbers, pages.append(1, [values(1, 17)])])) == list(range(18))

"""Tensors in zstd frames: without loss, smaller or as they are, checked, and not readable without zstandard."""

import json
import sys

import pytest
import torch
from safetensors import safe_open

from kvcompress.storage import frames
from kvcompress.storage.tensor_file import DamagedFileError, TensorFile, write_tensors


def tensors():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 3, 41, 8, generator=generator)
    wanted = {str(dtype): normal.to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    wanted |= {
        "ids": torch.arange(700).view(7, 100).T,
        "bytes": torch.randint(0, 256, (999,), generator=generator, dtype=torch.uint8),
        "flags": torch.rand(7, 33, generator=generator) > 0.5,
        "odd": torch.tensor([torch.nan, -0.0, torch.inf, 1e-42] * 50),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "one": torch.tensor([7], dtype=torch.uint8),
    }
    return wanted


def same(found, wanted):
    return (found.dtype, found.shape) == (wanted.dtype, wanted.shape) and torch.equal(
        found.reshape(-1).contiguous().view(torch.uint8), wanted.reshape(-1).contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("piece", [64, 1 << 22])
@pytest.mark.parametrize("name", tensors())
def test_a_tensor_comes_back_bit_for_bit_in_pieces_too(name, piece, monkeypatch):
    monkeypatch.setattr(frames, "_PIECE", piece)
    wanted = tensors()[name]
    encoded = frames.encode(name, wanted)
    if encoded is not None:
        assert len(encoded.payload) < wanted.nbytes
        assert len(encoded.payload) % 8 == 0
        assert same(frames.decode(memoryview(encoded.payload), wanted.dtype, list(wanted.shape)), wanted)


def test_floats_get_smaller_and_what_does_not_is_left():
    encoded = {name: frames.encode(name, tensor) for name, tensor in tensors().items()}
    assert [name for name, one in encoded.items() if one is None] == ["bytes", "scalar", "empty", "one"]
    for dtype, most in (("float32", 0.95), ("bfloat16", 0.85), ("float16", 0.98)):
        tensor = torch.randn(200, 200, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
        assert len(frames.encode("", tensor).payload) < most * tensor.nbytes


def written(path, wanted, encode=frames.encode):
    with path.open("w+b") as file:
        return write_tensors(file, "test", {"a": 1}, lambda: iter([(wanted, {"b": 2}), ({}, {})]), encode)


def test_a_file_says_by_itself_how_its_tensors_are_read(tmp_path):
    wanted = tensors()
    digest = written(tmp_path / "file", wanted)
    plain = written(tmp_path / "plain", wanted, None)
    assert digest != plain
    assert (tmp_path / "file").stat().st_size < (tmp_path / "plain").stat().st_size
    with safe_open(tmp_path / "file", framework="pt") as theirs, TensorFile(tmp_path / "file") as ours:
        assert json.loads(theirs.metadata()["facts"]) == {"a": 1, "parts": [{"b": 2}, {}]}
        assert ours.digest == digest
        assert {name for name in ours.names if not name.startswith("gap.")} == set(wanted)
        for name, tensor in wanted.items():
            assert same(ours.tensor(name), tensor)
            coded = theirs.get_tensor(name)
            assert coded.dtype == torch.uint8 if ours.codec(name) else same(coded, tensor)
        assert ours.nbytes("torch.float") == sum(
            tensor.nbytes for name, tensor in wanted.items() if name.startswith("torch.float")
        )


@pytest.mark.parametrize("piece", [64, 1 << 22])
def test_a_header_has_room_for_any_sizes(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "_PIECE", piece)
    # a payload of a byte less has more digits than the shape it stands for
    for size in (1, 5, 12, 13, 63, 99, 125, 1250):
        wanted = {f"t{index}": torch.zeros(size, dtype=torch.int64) for index in range(40)}
        written(
            tmp_path / "file",
            wanted,
            lambda name, tensor: frames.EncodedTensor("transform", bytes(tensor.nbytes - 8)),
        )
        with TensorFile(tmp_path / "file") as file:
            assert file.tensor("t39", lambda payload, *_: len(payload)) == 8 * size - 8


def test_what_is_not_the_payload_that_was_written_is_an_error():
    wanted = torch.arange(600.0)
    payload = frames.encode("", wanted).payload
    for shape, dtype in (([601], torch.float32), ([300], torch.float32), ([600], torch.float16)):
        with pytest.raises(ValueError, match="frame"):
            frames.decode(memoryview(payload), dtype, shape)
    facts, parts = frames.unpack(memoryview(payload))
    assert facts == {}
    with pytest.raises(ValueError, match="cannot be read"):
        frames.expand(memoryview(bytes(parts[3][:-1])), 600)
    with pytest.raises(ValueError, match="has"):
        frames.unpack(memoryview(payload + bytes(8)))


def test_a_payload_that_cannot_be_decoded_is_a_damaged_file(tmp_path):
    wrong = frames.EncodedTensor(frames.LOSSLESS, frames.pack({}, [b"no frame"]))
    written(tmp_path / "file", {"x": torch.zeros(99)}, lambda name, tensor: wrong)
    with TensorFile(tmp_path / "file") as file, pytest.raises(DamagedFileError, match="x cannot be decoded"):
        file.tensor("x")


def test_without_zstandard_the_error_says_what_to_install(tmp_path, monkeypatch):
    written(tmp_path / "file", {"x": torch.zeros(99)})
    monkeypatch.setitem(sys.modules, "zstandard", None)
    match = r"files with a codec need zstandard: pip install 'kvcompress\[codec\]'"
    with TensorFile(tmp_path / "file") as file, pytest.raises(ImportError, match=match):
        file.tensor("x")
    with pytest.raises(ImportError, match=match):
        frames.encode("x", torch.zeros(99))

"""Files with a codec: every cache comes back through zstd, and through a basis those that hold tokens as they are."""

import itertools
import json
import random
import sys

import pytest
import torch

from kvcompress import (
    AcrossKVCache,
    DenseCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    PrefixStore,
    SwiftKVCache,
    TransformCodec,
    convert,
    measure_basis,
)  # fmt: skip
from kvcompress.caches import transform_codec
from kvcompress.caches.dense import SLACK
from kvcompress.storage.tensor_file import DamagedFileError, TensorFile
from tests.contract.caches import every_cache
from tests.contract.drive import feed, generate
from tests.contract.models import DEVICE, VOCABULARY, WINDOW, build, families, left_padded, places, prompt, tiny

# files of more than so few tokens hold little else
LONG = 700


@pytest.fixture(scope="module")
def bases():
    """Each model's basis."""
    found = {}

    def of(model):
        if model not in found:
            found[model] = measure_basis(model, [prompt(200, 2, seed=9)])
        return found[model]

    return of


def long(tokens=LONG, batch=1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY - 2, (batch, tokens), generator=generator).to(DEVICE)


def filled(model, kind=DenseCache):
    """A cache of two rows of which one is padded."""
    cache = kind(model)
    feed(model, cache, *left_padded([prompt(300)[0], prompt(180, seed=2)[0]]))
    return cache


def errors(ours, theirs):
    """How far keys and values are off, relative to theirs, of each layer; of visible tokens."""
    found = []
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        for x, y in zip(one.dense.held()[:2], other.dense.held()[:2], strict=True):
            _, _, visible = other.dense.held()
            shown = torch.ones_like(y[..., :1]) if visible is None else visible[:, None, :, None]
            assert x.dtype == y.dtype
            found.append(float(((x - y) * shown).float().norm() / (y * shown).float().norm()))
    return found


def numbers(cache):
    return sum(2 * int(layer.tokens_kept().sum()) * layer.kv_shape[2] for layer in cache.layers)


# docs: `codec="zstd"` makes the file of any cache smaller, and loses nothing
@every_cache
def test_every_cache_comes_back_through_zstd_as_it_was(entry, tmp_path):
    model = tiny(dtype=entry.dtype)
    cache = entry.build(model)
    feed(model, cache, *left_padded([prompt(20)[0], prompt(13, seed=2)[0]]))
    cache.save(tmp_path / "plain")
    cache.save(tmp_path / "coded", codec="zstd")
    plain, coded = (type(cache).load(tmp_path / name, model) for name in ("plain", "coded"))
    token, mask = prompt(1, 2, seed=5), torch.cat([cache.padding.visible.long(), torch.ones(2, 1).long()], 1)
    assert torch.equal(feed(model, plain, token, mask), feed(model, coded, token, mask))
    with TensorFile(tmp_path / "coded") as file:
        assert "zstd" in {file.codec(name) for name in file.names}
        assert json.loads(file.metadata["facts"])["codec"] == "zstd"


@pytest.mark.parametrize("kind", [DenseCache, GEARCache])
def test_files_get_smaller(kind, tmp_path):
    cache = filled(tiny(), kind)
    sizes = []
    for codec in (None, "zstd"):
        cache.save(tmp_path / "cache", codec=codec)
        sizes.append((tmp_path / "cache").stat().st_size)
    assert sizes[1] < (0.8 if kind is DenseCache else 0.99) * sizes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_dtype_comes_back(dtype, bases, tmp_path):
    model = tiny(dtype=dtype)
    cache = filled(model)
    for codec in ("zstd", TransformCodec(bases(model), bits=6)):
        cache.save(tmp_path / "coded", codec=codec)
        found = DenseCache.load(tmp_path / "coded", model, basis=bases(model))
        assert found.padding.visible.equal(cache.padding.visible)
        assert found.layers[0].dense.visible.equal(cache.layers[0].dense.visible)
        assert max(errors(found, cache)) < (1e-9 if codec == "zstd" else 0.05)


# docs: A `TransformCodec` codes keys and values in a few bits a number, where a cache keeps them as they are
@families("llama", "mistral", "opt", "gpt_neox", slow=("gemma3", "gemma4", "phi3", "qwen3", "gemma2"))
def test_more_bits_are_closer_whatever_the_rope_and_the_padding(family, bases, tmp_path):
    model = tiny(family)
    cache = filled(model)
    token = prompt(1, 2, seed=5)
    mask = torch.cat([cache.padding.visible.long(), torch.ones(2, 1, device=DEVICE).long()], 1)
    wanted = feed(model, cache.clone(), token, mask)
    off, far = [], []
    for bits in (2, 4, 8):
        cache.save(tmp_path / "coded", codec=TransformCodec(bases(model), bits=bits))
        found = DenseCache.load(tmp_path / "coded", model, basis=bases(model))
        off.append(errors(found, cache))
        far.append(float((feed(model, found, token, mask) - wanted).norm() / wanted.norm()))
    for more, less in itertools.pairwise(off):
        assert all(y < 0.5 * x for x, y in zip(more, less, strict=True))
    assert far == sorted(far, reverse=True)
    assert max(off[-1]) < 0.02
    assert far[-1] < 0.1


# docs: Everything counts into `bits`
def test_a_file_has_no_more_bits_than_asked_for(bases, tmp_path):
    model = build("llama", num_key_value_heads=4, head_dim=48, max_position_embeddings=2048)
    basis = measure_basis(model, [long(300, 2)])
    cache = DenseCache(model)
    feed(model, cache, long(1600))
    for bits in (2.0, 4.0):
        cache.save(tmp_path / "coded", codec=TransformCodec(basis, bits=bits))
        # the fingerprint and the like take some 2 kB
        measured = 8 * ((tmp_path / "coded").stat().st_size - 2000) / numbers(cache)
        assert 0.97 * bits < measured <= bits


def test_positions_may_be_those_of_the_columns(bases, tmp_path):
    model = tiny()
    ids, mask = left_padded([prompt(300)[0], prompt(150, seed=2)[0]])
    by_row, by_column = DenseCache(model), DenseCache(model)
    feed(model, by_row, ids, mask)
    columns = torch.arange(300, device=DEVICE).expand(2, -1)
    feed(model, by_column, ids, mask, columns)
    assert not places(mask).equal(columns)
    off = []
    for cache in (by_row, by_column):
        cache.save(tmp_path / "coded", codec=TransformCodec(bases(model), bits=3))
        off.append(errors(DenseCache.load(tmp_path / "coded", model, basis=bases(model)), cache)[0])
    assert off[1] == pytest.approx(off[0], rel=0.05)


def test_autocast_and_inference_mode_change_nothing(bases, tmp_path):
    model = tiny()
    cache = filled(model)
    codec = TransformCodec(bases(model), bits=4)
    cache.save(tmp_path / "plain", codec=codec)
    with torch.inference_mode(), torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        cache.save(tmp_path / "cast", codec=codec)
    assert (tmp_path / "cast").read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_window_whose_first_tokens_are_gone_keeps_its_positions(bases, tmp_path):
    model = tiny("mistral", max_position_embeddings=4096)
    cache, whole = DenseCache(model), DenseCache(model)
    text = long(3 * SLACK)
    feed(model, whole, text[:, : SLACK + 2 * WINDOW])
    feed(model, cache, text)
    assert cache.layers[0].dropped
    off = []
    for one in (whole, cache):
        one.save(tmp_path / "coded", codec=TransformCodec(bases(model), bits=3))
        off.append(errors(DenseCache.load(tmp_path / "coded", model, basis=bases(model)), one)[0])
    assert off[1] < 1.1 * off[0]


def test_nodes_and_suffixes_of_a_tree_are_coded(bases, tmp_path):
    model = tiny()
    basis = bases(model)
    cache = HydragenCache.from_tree(model, [prompt(200)[0], prompt(90, seed=2)[0], prompt(100, seed=3)[0]], [-1, 0, 0])
    feed(model, cache, prompt(60, 2, seed=4), cache.cover(torch.ones(2, 60, device=DEVICE).long()))
    token, mask = prompt(1, 2, seed=5), cache.cover(torch.ones(2, 1, device=DEVICE).long())
    wanted = feed(model, cache.clone(), token, mask)
    far = []
    for bits in (2, 8):
        cache.save(tmp_path / "coded", codec=TransformCodec(basis, bits=bits))
        with TensorFile(tmp_path / "coded") as file:
            coded = [name for name in file.names if file.codec(name) == "transform"]
        # keys and values of three nodes and of the suffixes, in three layers
        assert len(coded) == 2 * 4 * 3
        found = HydragenCache.load(tmp_path / "coded", model, basis=basis)
        assert found.known_ids(1).equal(cache.known_ids(1))
        far.append(float((feed(model, found, token, mask) - wanted).norm() / wanted.norm()))
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.1


# docs: of a `HydragenCache`, a prefix that was loaded and is saved again loses next to nothing more
def test_a_prefix_loses_once_and_its_continuation_too(bases, tmp_path):
    model = tiny()
    basis = bases(model)
    HydragenCache.from_prefix(model, prompt(300)[0]).save(tmp_path / "first", codec=TransformCodec(basis, bits=2))
    once = HydragenCache.load(tmp_path / "first", model, basis=basis)
    once.save(tmp_path / "second", codec=TransformCodec(basis, bits=3))
    continued = once.clone()
    continued.push(prompt(100, seed=2))
    continued.save(tmp_path / "third", codec=TransformCodec(basis, bits=1))
    cut = once.clone()
    cut.cut(200)
    cut.save(tmp_path / "fourth", codec=TransformCodec(basis, bits=1))
    other = measure_basis(model, [prompt(200, 2, seed=19)])
    once.save(tmp_path / "fifth", codec=TransformCodec(other, bits=1))
    for name, of in (("second", basis), ("third", basis), ("fourth", basis), ("fifth", other)):
        again = HydragenCache.load(tmp_path / name, model, basis=of)
        for layer, before in zip(again.layers, once.layers, strict=True):
            ours, theirs = (next(iter(each.held.values()))[0] for each in (layer, before))
            tokens = 200 if name == "fourth" else 300
            assert ours.tokens == tokens
            assert torch.equal(ours.prefix_keys, theirs.prefix_keys[:, :, :tokens]), name
            assert torch.equal(ours.prefix_values, theirs.prefix_values[:, :, :tokens]), name
    assert (tmp_path / "first").stat().st_size == pytest.approx((tmp_path / "second").stat().st_size, abs=16)


def test_what_is_coded_over_and_over_does_not_drift(tmp_path):
    model = build("llama", num_key_value_heads=4, head_dim=64, hidden_size=256)
    basis = measure_basis(model, [long(300, 2)])
    first = filled(model)
    cache, off = first, []
    for _ in range(5):
        cache.save(tmp_path / "coded", codec=TransformCodec(basis, bits=12))
        cache = DenseCache.load(tmp_path / "coded", model)
        off.append(errors(cache, first))
    # what rounding adds by chance grows with the root of how often; what vectors in float16 lack, with how often
    assert all(often < 2.7 * once for often, once in zip(off[-1], off[0], strict=True))


@pytest.mark.parametrize("kind", [AcrossKVCache, SwiftKVCache])
def test_layers_that_share_storage_are_coded_by_those_that_hold_it(kind, tmp_path):
    model = build("llama", num_hidden_layers=4)
    model = model if kind is AcrossKVCache else convert(model, 2)
    cache = AcrossKVCache(model, share=2) if kind is AcrossKVCache else SwiftKVCache(model)
    feed(model, cache, prompt(200))
    codec = TransformCodec(measure_basis(model, [prompt(200, 2, seed=9)]), bits=8)
    cache.save(tmp_path / "coded", codec=codec)
    with TensorFile(tmp_path / "coded") as file:
        assert "transform" in {file.codec(name) for name in file.names}
    found = kind.load(tmp_path / "coded", model, basis=codec.basis)
    logits = [feed(model, each, prompt(1, seed=5)) for each in (cache, found)]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.1


def test_what_is_packed_in_a_prefix_is_left_as_it_is(bases, tmp_path):
    model = tiny()
    donor = GEARCache(model, group_size=16, buffer=16)
    feed(model, donor, prompt(100))
    cache = HydragenCache.from_cache(donor)
    feed(model, cache, prompt(40, seed=2))
    cache.save(tmp_path / "coded", codec=TransformCodec(bases(model), bits=8))
    with TensorFile(tmp_path / "coded") as file:
        # the suffix
        assert len([name for name in file.names if file.codec(name) == "transform"]) == 2 * 3
    found = HydragenCache.load(tmp_path / "coded", model, basis=bases(model))
    logits = [feed(model, each, prompt(1, seed=5)) for each in (cache, found)]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.15


def test_an_empty_cache_and_a_short_one_and_beams_come_back(bases, tmp_path):
    model = tiny()
    codec = TransformCodec(bases(model), bits=4)
    empty = DenseCache(model)
    empty.save(tmp_path / "coded", codec=codec)
    assert DenseCache.load(tmp_path / "coded", model, basis=codec.basis).get_seq_length() == 0
    for tokens in (1, 5):
        short = DenseCache(model)
        feed(model, short, prompt(tokens))
        short.save(tmp_path / "coded", codec=codec)
        assert max(errors(DenseCache.load(tmp_path / "coded", model, basis=codec.basis), short)) < 0.2
    beams = DenseCache(model)
    generate(model, beams, prompt(100), num_beams=3)
    beams.save(tmp_path / "coded", codec=codec)
    assert max(errors(DenseCache.load(tmp_path / "coded", model, basis=codec.basis), beams)) < 0.2


def test_a_token_that_is_not_finite_is_not_made_finite(bases, tmp_path):
    model = tiny()
    cache = DenseCache(model)
    feed(model, cache, prompt(100))
    cache.layers[1].dense.keys[0, 1, 50, 3] = torch.inf
    cache.layers[1].dense.values[0, 0, 60, 3] = torch.nan
    cache.save(tmp_path / "coded", codec=TransformCodec(bases(model), bits=4))
    keys, values, _ = DenseCache.load(tmp_path / "coded", model, basis=bases(model)).layers[1].dense.held()
    assert (~keys.isfinite()).all(-1).all(1).nonzero()[:, 1].tolist() == [50]
    assert (~values.isfinite()).all(-1).all(1).nonzero()[:, 1].tolist() == [60]
    assert keys.isfinite().sum() == values.isfinite().sum() == 99 * 32


# docs: The file names its basis, and any other is refused
def test_a_file_names_its_basis(tmp_path):
    # the same weights, of which the second was given no basis
    writer, model = build("llama"), build("llama")
    basis, other = (measure_basis(writer, [prompt(200, 2, seed=seed)]) for seed in (18, 19))
    filled(writer).save(tmp_path / "coded", codec=TransformCodec(basis, bits=4))
    with pytest.raises(ValueError, match=rf"coded in the basis {basis.digest}, .* given none"):
        DenseCache.load(tmp_path / "coded", model)
    match = rf"coded in the basis {basis.digest}, .* given {other.digest}"
    with pytest.raises(ValueError, match=match):
        DenseCache.load(tmp_path / "coded", model, basis=other)
    basis.save(tmp_path / "basis")
    assert DenseCache.load(tmp_path / "coded", model, basis=tmp_path / "basis").get_seq_length() == 300
    # which other files do not ask for
    filled(model).save(tmp_path / "plain")
    assert DenseCache.load(tmp_path / "plain", model, basis=basis).get_seq_length() == 300


# docs: The model that a cache was saved with knows its basis; in another process pass it to `load`
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_model_knows_the_basis_that_its_caches_were_saved_with(is_stored, tmp_path):
    model = build("llama")
    codec = TransformCodec(measure_basis(model, [prompt(200, 2, seed=18)]), bits=4)
    if is_stored:
        store = PrefixStore(model)
        store.prefix(prompt(300)[0])
        store.save(tmp_path / "coded", codec=codec)
        again = PrefixStore.load(tmp_path / "coded", model).get(prompt(300)[0])
    else:
        filled(model).save(tmp_path / "coded", codec=codec)
        again = DenseCache.load(tmp_path / "coded", model)
    assert again.get_seq_length() == 300


@pytest.mark.parametrize("held", ["nothing", "packed"])
def test_a_file_of_which_nothing_was_coded_in_its_basis_needs_none(held, tmp_path):
    writer, model = build("llama"), build("llama")
    cache = DenseCache(writer)
    if held == "packed":
        donor = GEARCache(writer, group_size=16, buffer=16)
        feed(writer, donor, prompt(100))
        cache = HydragenCache.from_cache(donor)
    cache.save(tmp_path / "coded", codec=TransformCodec(measure_basis(writer, [prompt(200, 2, seed=18)])))
    again = type(cache).load(tmp_path / "coded", model)
    assert again.get_seq_length() == cache.get_seq_length()


def test_what_cannot_be_coded_is_refused_before_a_file_is_touched(bases, tmp_path):
    model, path = tiny(), tmp_path / "cache"
    basis = bases(model)
    for kind in (lambda model: H2OCache(model, budget=8), GEARCache):
        cache = filled(model, kind)
        with pytest.raises(ValueError, match=rf"in DenseCache, HydragenCache.*; got a {type(cache).__name__}: save it"):
            cache.save(path, codec=TransformCodec(basis))
    cache = filled(model)
    foreign = measure_basis(build("llama", seed=1), [prompt(200, 2)])
    with pytest.raises(ValueError, match="the basis was made with LlamaForCausalLM.*differ in weights"):
        cache.save(path, codec=TransformCodec(foreign))
    for wrong in ("gzip", 2.0, basis):
        with pytest.raises(TypeError, match="codec must be 'zstd', a TransformCodec or None, got"):
            cache.save(path, codec=wrong)
    for bits in (0.4, 12.5, float("nan")):
        with pytest.raises(ValueError, match="bits must be from 0.5 to 12 a number, got"):
            TransformCodec(basis, bits=bits)
    for bits in ("2", None, True, [2.0]):
        with pytest.raises(TypeError, match="bits must be a number from 0.5 to 12, got"):
            TransformCodec(basis, bits=bits)
    assert TransformCodec(basis, bits=torch.tensor(3)).bits == 3.0
    with pytest.raises(TypeError, match="basis must be a Basis or the path of its file, got float"):
        TransformCodec(2.0)
    assert not list(tmp_path.iterdir())
    assert repr(TransformCodec(basis, bits=2)).endswith(", bits=2)")


# docs: brings zstandard, which such files need, to be written and to be read
def test_without_zstandard_nothing_is_written_and_the_error_says_what_to_install(bases, tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "cache"
    cache = filled(model)
    cache.save(path, codec=TransformCodec(bases(model)))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for codec in ("zstd", TransformCodec(bases(model))):
        with pytest.raises(ImportError, match=r"pip install 'kvcompress\[codec\]'"):
            cache.save(tmp_path / "other", codec=codec)
    with pytest.raises(ImportError, match=r"pip install 'kvcompress\[codec\]'"):
        DenseCache.load(path, model, basis=bases(model))
    cache.save(tmp_path / "other")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "other"]


@pytest.mark.parametrize("lossy", [False, True])
def test_every_flipped_bit_of_a_coded_file_is_an_error(lossy, bases, tmp_path):
    model, path = tiny(), tmp_path / "cache"
    filled(model).save(path, codec=TransformCodec(bases(model)) if lossy else "zstd")
    whole = path.read_bytes()
    generator = random.Random(0)
    head = 8 + int.from_bytes(whole[:8], "little")
    spots = [
        *(generator.randrange(head) for _ in range(20)),
        *(generator.randrange(head, len(whole)) for _ in range(20)),
    ]
    for at in spots:
        data = bytearray(whole)
        data[at] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged|not a saved kvcompress cache"):
            DenseCache.load(path, model, basis=bases(model))
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedFileError):
        DenseCache.load(path, model, basis=bases(model))


def test_a_save_that_fails_while_it_encodes_leaves_what_was_there(bases, tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "cache"
    cache = filled(model)
    cache.save(path)
    whole, encode, calls = path.read_bytes(), transform_codec.transform_coding.encode, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 5:
            raise OSError("No space left on device")
        return encode(*args)

    monkeypatch.setattr(transform_codec.transform_coding, "encode", fails)
    with pytest.raises(OSError, match="No space left"):
        cache.save(path, codec=TransformCodec(bases(model)))
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert path.read_bytes() == whole


def test_other_releases_know_that_a_coded_file_is_not_theirs(tmp_path):
    cache = filled(tiny())
    formats = []
    for codec in (None, "zstd"):
        cache.save(tmp_path / "cache", codec=codec)
        with TensorFile(tmp_path / "cache") as file:
            formats.append(file.metadata["format"])
    assert formats == ["kvcompress-cache-2", "kvcompress-cache-3"]

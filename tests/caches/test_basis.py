"""Keys in a calibrated basis: how it is measured, its file, and the cache that packs in it."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from kvcompress import Basis, DenseCache, GEARCache, HydragenCache, PrefixStore, measure_basis
from kvcompress.caches.basis import nine_tenths
from kvcompress.hf import cache_argument
from kvcompress.plan import largest_batch, make_plan, read_shape
from kvcompress.storage.key_codec import Directions, KeyCodec, scheme_for
from kvcompress.storage.rope import Rope
from kvcompress.storage.tensor_file import write_tensors
from tests.contract.caches import basis_of
from tests.contract.drive import feed
from tests.contract.models import DEVICE, build, left_padded, prompt, tiny


def held(model, ids):
    """The keys and values of each layer, [batch, kv_heads, tokens, head_dim]."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids.to(DEVICE), **cache_argument(model, cache))
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma3", "gemma4"])
def test_directions_are_the_principal_components_of_keys_without_rope(family):
    model = tiny(family)
    texts = [torch.randint(1, 500, (2, 40)), torch.randint(1, 500, (90,))]
    basis = measure_basis(model, texts)
    for index, found in enumerate(basis.layers):
        rope = Rope.of(model, index)
        keys, values = [], []
        for text in texts:
            # sliding layers of transformers' own cache hold no more than their window
            for row in text.view(-1, text.shape[-1]):
                key, value = all_of(model, row[None], index)
                key = key if rope is None else rope.unrotate(key, torch.arange(len(row), device=DEVICE))
                keys.append(key[0, :, 4:].transpose(0, 1).flatten(1))
                values.append(value[0, :, 4:].transpose(0, 1).flatten(1))
        for directions, vectors in ((found.keys, torch.cat(keys)), (found.values, torch.cat(values))):
            vectors = vectors.double().cpu()
            mean, spread = vectors.mean(0), torch.cov(vectors.mT, correction=0)
            torch.testing.assert_close(directions.mean.double(), mean, rtol=1e-2, atol=1e-3)
            turned = directions.vectors.double().mT @ spread @ directions.vectors.double()
            expected = torch.diag(directions.variances.double())
            torch.testing.assert_close(turned, expected, rtol=1e-2, atol=2e-3 * float(expected.max()))
            assert bool((directions.variances.diff() <= 0).all())
            unit = directions.vectors.mT @ directions.vectors
            torch.testing.assert_close(unit, torch.eye(len(unit)), rtol=0, atol=5e-3)


def all_of(model, ids, index):
    """All keys and values of a layer, whatever it keeps."""
    taken = {}

    class Taking(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            taken[layer_idx] = key_states, value_states
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    with torch.no_grad():
        model(ids.to(DEVICE), **cache_argument(model, Taking(config=model.config)))
    return taken[index]


def test_one_text_or_its_halves_in_one_batch_measure_alike():
    model, ids = tiny(), torch.randint(1, 500, (2, 60))
    together, apart = measure_basis(model, [ids]), measure_basis(model, [ids[0], ids[1]])
    assert together.measured["tokens"] == apart.measured["tokens"] == 112
    for one, other in zip(together.layers, apart.layers, strict=True):
        torch.testing.assert_close(one.keys.variances, other.keys.variances, rtol=1e-3, atol=1e-5)


def test_a_basis_comes_back_from_its_file_and_names_its_model(tmp_path):
    model = tiny()
    basis = measure_basis(model, [torch.randint(1, 500, (3, 60))], source="made up")
    basis.save(tmp_path / "basis.safetensors")
    again = Basis.load(tmp_path / "basis.safetensors")
    assert again.digest == basis.digest
    assert again.measured == basis.measured
    assert again.measured["source"] == "made up"
    for one, other in zip(basis.layers, again.layers, strict=True):
        for side, of_other in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(side, of_other, strict=True))
    assert "made up" in str(again)
    assert "3 layers, 32 numbers" in repr(again)
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(ValueError, match="the basis was made with LlamaForCausalLM"):
        GEARCache(other, bits=2, basis=again)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "at least 32 tokens in all"),
        ([torch.randint(1, 9, (35,))], ValueError, "without the first 4 of each: as many .* got 31"),
        ([[1, 2, 3]], TypeError, "texts must be tensors of token ids"),
        ([torch.zeros(2, 3)], TypeError, "texts must be tensors of token ids"),
        (None, TypeError, "texts must be a list of tensors of token ids, got NoneType"),
        ("a text", TypeError, "texts must be tensors of token ids"),
    ],
)
def test_what_is_no_text_is_refused(texts, error, message):
    with pytest.raises(error, match=message):
        measure_basis(tiny(), texts)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "basis.safetensors"
    with path.open("wb") as file:
        write_tensors(file, "kvcompress-profile-1", {}, lambda: iter([({}, {})]))
    with pytest.raises(ValueError, match="is not a basis .* got format 'kvcompress-profile-1'"):
        Basis.load(path)
    basis_of(tiny()).save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its checksum"):
        Basis.load(path)
    with pytest.raises(TypeError, match="basis must be a Basis or the path of its file, got int"):
        GEARCache(tiny(), basis=3)


@pytest.mark.parametrize(
    "settings", [{"rank": 2}, {"outliers": 0.1}, {"backbone": "whole"}, {"rank_decode": 1}], ids=str
)
def test_settings_that_do_not_go_with_a_basis_are_refused(settings):
    with pytest.raises(ValueError, match="packed without a low-rank part, outliers and the backbone"):
        GEARCache(tiny(), basis=basis_of(tiny()), **settings)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_more_bits_come_nearer_to_what_was_fed(family):
    model, ids = tiny(family), prompt(68, 2)
    lost = []
    for bits in (2, 3, 4):
        cache = GEARCache(model, bits=bits, buffer=16, group_size=16, basis=basis_of(model))
        feed(model, cache, ids)
        of_layers = []
        for layer, (keys, _) in zip(cache.layers, held(model, ids), strict=True):
            key, _ = layer.prompt.decoded()
            assert key.shape[2] == 64
            true = keys[:, :, 4:68]
            of_layers.append(float((key - true).square().mean() / true.square().mean()))
        lost.append(sum(of_layers) / len(of_layers))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.02
    assert lost[0] < 0.2


def test_bytes_are_those_of_the_codes_and_of_the_basis():
    model, basis = tiny(), basis_of(tiny())
    cache = GEARCache(model, bits=2, basis=basis, buffer=16, group_size=16)
    feed(model, cache, prompt(100, 1))
    report = cache.memory()
    schemes = [scheme_for(layer.keys.variances, 2) for layer in basis.layers]
    # 6 blocks of 16 tokens: codes of keys; of values 2 bits, each of two heads of 16 numbers
    keys = sum(6 * 16 * scheme.bits // 8 for scheme in schemes)
    assert report.by_component["codes"] == keys + 3 * 6 * 16 * 32 * 2 // 8
    # 16 bits for a token's keys, and for its values of each head
    assert report.by_component["scales"] == 3 * 6 * 16 * 2 * (1 + 2)
    frequencies = 3 * 4 * 8
    assert report.by_component["basis"] == sum(KeyCodec.nbytes_for(scheme, 32, 4) for scheme in schemes) + frequencies
    assert sum(scheme.bits for scheme in schemes) <= 3 * 2 * 32


def test_plan_knows_the_bytes(tmp_path):
    model, basis = tiny(), basis_of(tiny())
    basis.save(tmp_path / "basis.safetensors")
    spec = f"gear:bits=2:buffer=16:group_size=16:basis={tmp_path / 'basis.safetensors'}"
    model.config.save_pretrained(tmp_path)
    (need,) = make_plan(read_shape(str(tmp_path)), [spec], 100, 1, 1.0, torch.float32)
    cache = GEARCache(model, bits=2, basis=basis, buffer=16, group_size=16)
    feed(model, cache, prompt(100, 1))
    assert need.cache == pytest.approx(cache.memory().total_bytes, rel=0.01)


def test_keys_stay_where_they_were_rotated_when_padding_comes_to_light():
    # positions move when tokens are hidden; a key that was packed at its place must not turn with them
    model = tiny()
    ids, mask = left_padded([prompt(40)[0], prompt(33, 1, 2)[0]])
    cache = GEARCache(model, bits=4, buffer=8, group_size=8, basis=basis_of(model))
    feed(model, cache, ids, mask)
    before = [layer.prompt.decoded()[0].clone() for layer in cache.layers]
    hidden = mask.clone()
    hidden[0, 10:14] = 0
    feed(model, cache, prompt(1, 2), torch.cat([hidden, hidden.new_ones(2, 1)], 1))
    for layer, expected in zip(cache.layers, before, strict=True):
        assert int((layer.prompt.positions[0] >= 0).sum()) < int((layer.prompt.positions[1] >= 0).sum()) + 7
        torch.testing.assert_close(layer.prompt.decoded()[0][:, :, : expected.shape[2]], expected)


def test_a_saved_cache_names_its_basis_and_goes_on_with_it(tmp_path):
    model = build("llama")
    basis = measure_basis(model, [torch.randint(1, 500, (3, 60))])
    basis.save(tmp_path / "basis.safetensors")
    cache = GEARCache(model, bits=2, buffer=8, group_size=8, basis=basis)
    feed(model, cache, prompt(30, 2))
    cache.save(tmp_path / "cache.safetensors")
    copy = cache.clone()
    assert copy.layers[0].codec is cache.layers[0].codec
    expected = feed(model, copy, prompt(5, 2))
    again = GEARCache.load(tmp_path / "cache.safetensors", model)
    torch.testing.assert_close(feed(model, again, prompt(5, 2)), expected)
    # the same weights, elsewhere
    twin = build("llama")
    with pytest.raises(ValueError, match=f"coded in the basis {basis.digest}, which has a file of its own"):
        GEARCache.load(tmp_path / "cache.safetensors", twin)
    again = GEARCache.load(tmp_path / "cache.safetensors", twin, basis=tmp_path / "basis.safetensors")
    torch.testing.assert_close(feed(twin, again, prompt(5, 2)), expected)


def test_a_prefix_of_packed_tokens_keeps_its_basis(tmp_path):
    model = tiny()
    cache = GEARCache(model, bits=3, buffer=8, group_size=8, basis=basis_of(model))
    ids = prompt(40, 1)
    feed(model, cache, ids)
    prefix = HydragenCache.from_cache(cache.clone())
    prefix.save(tmp_path / "prefix.safetensors")
    again = HydragenCache.load(tmp_path / "prefix.safetensors", model)
    rest = prompt(6, 1)
    expected = feed(model, cache, rest)
    torch.testing.assert_close(feed(model, prefix, rest), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(feed(model, again, rest), expected, rtol=1e-4, atol=1e-4)


def test_another_model_is_refused_even_by_an_empty_cache():
    model, other = tiny(), build("llama", seed=1)
    cache = GEARCache(model, bits=2, basis=basis_of(model))
    # which kvcompress serves too
    DenseCache(other)
    with pytest.raises(ValueError, match="packs in a basis of the LlamaForCausalLM that it was built for"):
        feed(other, cache, prompt(20))
    feed(model, cache, prompt(20))


def test_keys_are_turned_back_by_the_positions_that_the_model_gave_them():
    """Also where padding in front counts, or a text begins elsewhere: else a basis is worth nothing."""
    model, ids = tiny(), prompt(68, 2)
    expected = torch.cat([keys[:, :, 4:68] for keys, _ in held(model, ids)])

    def lost(shift):
        cache = GEARCache(model, bits=2, buffer=16, group_size=16, basis=basis_of(model))
        positions = torch.arange(68).expand(2, -1) + torch.tensor([[0], [shift]])
        feed(model, cache, ids, position_ids=positions)
        found = torch.cat([layer.prompt.decoded()[0] for layer in cache.layers])
        ropes = [Rope.of(model, index) for index in range(3)]
        back = torch.cat([
            rope.unrotate(layer, torch.arange(4, 68) + torch.tensor([0, shift])[:, None, None])
            for rope, layer in zip(ropes, found.split(2), strict=True)
        ])  # fmt: skip
        true = torch.cat(
            [rope.unrotate(keys, torch.arange(4, 68)) for rope, keys in zip(ropes, expected.split(2), strict=True)]
        )
        return (back - true).square().mean((1, 2, 3)).view(3, 2).mean(0)

    torch.testing.assert_close(lost(37), lost(0), rtol=0.02, atol=1e-4)


def test_keys_that_do_not_vary_are_their_mean():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.zero_()
    cache = GEARCache(model, bits=2, buffer=16, group_size=16, basis=measure_basis(model, [prompt(200, 2)]))
    feed(model, cache, prompt(90))
    assert bool(feed(model, cache, prompt(1)).isfinite().all())
    torch.testing.assert_close(cache.layers[1].prompt.decoded()[0], torch.zeros(1, 2, 80, 16), rtol=0, atol=1e-5)


def test_eight_bits_are_refused_as_they_lose_less_without():
    with pytest.raises(ValueError, match="packed in 2, 3 or 4 bits a number"):
        GEARCache(tiny(), bits=8, basis=basis_of(tiny()))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("1.self_attn.k_proj", "layer 1 of LlamaForCausalLM makes keys that are not finite: its weights hold NaN"),
        ("1.self_attn.v_proj", r"layer 1 of LlamaForCausalLM makes values of texts\[0\] that are not finite: its"),
        ("0.mlp.up_proj", r"layer 1 of LlamaForCausalLM makes keys of texts\[0\] that are not finite: its weights"),
    ],
)
def test_a_layer_whose_keys_or_values_are_not_finite_is_named(weights, message):
    model = build("llama")
    with torch.no_grad():
        model.get_submodule(f"model.layers.{weights}").weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=message):
        measure_basis(model, [prompt(200, 2)])


def test_what_json_cannot_hold_is_refused_and_the_file_stays(tmp_path):
    basis = basis_of(tiny())
    basis.save(tmp_path / "basis")
    with pytest.raises(ValueError, match="a file cannot hold the facts of how the basis was measured: Object of type"):
        dataclasses.replace(basis, measured={"texts": {1}}).save(tmp_path / "basis")
    assert Basis.load(tmp_path / "basis").measured == basis.measured


def test_a_basis_tells_what_it_is_in_short_lines(tmp_path):
    for name in ("llama", "gemma3"):
        model = tiny(name)
        basis = measure_basis(model, [prompt(200, 2)], source=", ".join(f"{number}.txt" for number in range(90)))
        lines = str(basis).splitlines()
        assert lines[0] == f"model      {type(model).__name__}"
        assert max(map(len, lines)) <= 111
        assert [line.split()[0] for line in lines[:9]] == [
            "model", "sizes", "attention", "rope", "weights", "texts", "tokens", "sha256", "source",
        ]  # fmt: skip
        assert lines[8].endswith(".txt, ...")


def test_few_tokens_are_warned_of():
    with pytest.warns(
        UserWarning, match="a basis of 96 tokens: directions of 32 numbers are known well from about 320"
    ):
        measure_basis(tiny(), [prompt(100)])


def test_caches_that_are_alike_share_what_they_decode_with_and_it_counts_everywhere():
    model, basis = tiny(), basis_of(tiny())
    one, other = (GEARCache(model, bits=2, buffer=8, group_size=8, basis=basis) for _ in range(2))
    assert one.layers[0].codec is other.layers[0].codec
    assert one.layers[0].codec is not GEARCache(model, bits=3, basis=basis).layers[0].codec
    ids = prompt(40)
    feed(model, one, ids)
    of_basis = one.memory().by_component["basis"]
    prefix = HydragenCache.from_cache(one)
    assert prefix.memory().by_component["basis"] == of_basis
    store = PrefixStore(model, min_tokens=4)
    store.put(ids, prefix)
    assert store.nbytes() > of_basis


def test_a_codec_follows_its_model():
    model = build("llama")
    codec = measure_basis(model, [prompt(200, 2)]).codec(model, 0, 2)
    codec._follow(torch.device("meta"))
    assert {tensor.device.type for tensor in codec.tensors()} == {"meta"}


def test_plan_refuses_the_basis_of_another_model_and_counts_it_once(tmp_path):
    basis_of(tiny()).save(tmp_path / "basis.safetensors")
    spec = f"gear:bits=2:basis={tmp_path / 'basis.safetensors'}"
    build("llama", num_hidden_layers=2).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be of 2 layers with 32 numbers .* got 3 layers with 32"):
        make_plan(read_shape(str(tmp_path)), [spec], 100, 1, 1.0, torch.float32)
    tiny().config.save_pretrained(tmp_path)
    one, many = (make_plan(read_shape(str(tmp_path)), [spec], 1000, batch, 1.0, torch.float32)[0] for batch in (1, 100))
    assert one.fixed == many.fixed > 0
    assert largest_batch(one, 1, many.peak) == 100


def test_components_that_do_not_vary_take_no_bits():
    variances = torch.tensor([4.0] * 8 + [1e-9] * 24)
    assert scheme_for(variances, 2).components == 8
    assert nine_tenths(variances) == 8
    # equally good signs are told apart
    squares = torch.randn(64, 16, dtype=torch.float64)
    one = Directions.of(64, squares.sum(0), squares.mT @ squares)
    assert bool((one.vectors.gather(0, one.vectors.abs().argmax(0, keepdim=True)) > 0).all())

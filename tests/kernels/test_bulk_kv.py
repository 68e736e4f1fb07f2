import pytest
import torch

from kvcompress.kernels.bulk_kv import bulk_key_values, bulk_key_values_reference
from tests.kernels.inputs import DEVICE, DTYPES, tolerance

# batch, kv_heads, tokens, head_dim, hidden, layers, bias, norm
CASES = [
    (1, 1, 1, 64, 32, 1, False, False),
    (2, 3, 7, 64, 48, 2, False, False),
    (2, 2, 33, 80, 40, 3, True, False),
    (1, 2, 40, 96, 70, 2, False, True),
    (2, 1, 35, 128, 33, 2, True, True),
    (1, 1, 130, 16, 64, 2, False, False),
]


def scene(batch, kv_heads, tokens, head_dim, hidden, layers, bias, norm, dtype=torch.float32, shared_turns=False):
    torch.manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes, device=DEVICE).to(dtype)

    x = random(batch, tokens, hidden)
    weights = [[random(kv_heads * head_dim, hidden) / hidden**0.5 for _ in range(layers)] for _ in range(2)]
    angles = torch.rand(1 if shared_turns else batch, tokens, head_dim // 2, device=DEVICE) * 6
    angles = torch.cat([angles, angles], -1)
    # views into larger buffers, whose other places must stay as they are
    buffers = [
        [
            torch.full((batch, kv_heads, tokens + 5, head_dim), torch.nan, dtype=dtype, device=DEVICE)
            for _ in range(layers)
        ]
        for _ in range(2)
    ]
    places = [[buffer[:, :, 3 : 3 + tokens] for buffer in side] for side in buffers]
    more = {}
    if bias:
        more["key_biases"], more["value_biases"] = ([random(kv_heads * head_dim) for _ in range(layers)] for _ in "kv")
    if norm:
        more["norms"] = [random(head_dim) for _ in range(layers)]
    return buffers, (x, *weights, angles.cos().to(dtype), angles.sin().to(dtype), *places), more


def formula(x, key_weights, value_weights, cos, sin, keys, values, key_biases=None, value_biases=None, norms=None):
    """Keys and values by einsum in float64, [layers, batch, kv_heads, tokens, head_dim] each."""
    found = [[], []]
    for layer in range(len(keys)):
        kv_heads, head_dim = keys[0].shape[1], keys[0].shape[3]
        for side, (weights, biases) in enumerate(((key_weights, key_biases), (value_weights, value_biases))):
            weight = weights[layer].double().view(kv_heads, head_dim, -1)
            made = torch.einsum("btk,hdk->bhtd", x.double(), weight)
            if biases is not None:
                made = made + biases[layer].double().view(1, kv_heads, 1, head_dim)
            if side == 0:
                if norms is not None:
                    made = made / (made.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norms[layer].double()
                swapped = torch.cat([-made[..., head_dim // 2 :], made[..., : head_dim // 2]], -1)
                made = made * cos.double()[:, None] + swapped * sin.double()[:, None]
            found[side].append(made)
    return [torch.stack(side) for side in found]


@pytest.mark.parametrize("shared_turns", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layer_gets_the_formulas_keys_and_values_and_nothing_else_changes(case, shared_turns):
    buffers, arguments, more = scene(*case, shared_turns=shared_turns)
    bulk_key_values(*arguments, **more)
    for side, places, wanted in zip(buffers, arguments[5:], formula(*arguments, **more), strict=True):
        torch.testing.assert_close(torch.stack(places), wanted.float(), rtol=1e-4, atol=1e-4)
        for buffer in side:
            assert buffer[:, :, :3].isnan().all()
            assert buffer[:, :, 3 + case[2] :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees_with_the_reference_in_every_dtype(dtype):
    for case in CASES[1:4]:
        _, arguments, more = scene(*case, dtype=dtype)
        bulk_key_values(*arguments, **more)
        ours = [torch.stack(places).clone() for places in arguments[5:]]
        bulk_key_values_reference(*arguments, **more)
        for one, other in zip(ours, arguments[5:], strict=True):
            limits = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {**tolerance(dtype), "atol": 2e-2}
            torch.testing.assert_close(one, torch.stack(other), **limits)


def test_weights_that_begin_anywhere_give_the_same():
    # views of one buffer, as of weights that are sharded flat: 16 bytes at a time would be a fault on a GPU
    _, (x, *weights, cos, sin, keys, values), _ = scene(*CASES[1], dtype=torch.bfloat16)
    bulk_key_values(x, *weights, cos, sin, keys, values)
    wanted = [torch.stack(side).clone() for side in (keys, values)]
    moved = [[torch.nn.functional.pad(w.flatten(), (1, 0))[1:].view_as(w) for w in side] for side in weights]
    bulk_key_values(x, *moved, cos, sin, keys, values)
    for side, places in zip(wanted, (keys, values), strict=True):
        assert torch.equal(torch.stack(places), side)


def test_layers_that_differ_are_refused():
    _, arguments, _ = scene(*CASES[1])
    x, key_weights, *rest = arguments
    with pytest.raises(ValueError, match="weights of keys and values and a place for both, got"):
        bulk_key_values(x, key_weights[:1], *rest)
    with pytest.raises(ValueError, match=r"weights \[kv_heads \* head_dim, hidden\]"):
        bulk_key_values(x[..., :-1], key_weights, *rest)
    bulk_key_values(x, [], [], *rest[1:3], [], [])

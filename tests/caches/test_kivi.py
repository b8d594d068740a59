"""KIVI through its fused kernels, and TailorKV's quantised layers as settings of it; all else is in
test_baselines.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.caches.harness import LAYER, chunk_at
from tests.kernels import lane_simulator
from vecinfer_jax.caches import KIVI
from vecinfer_jax.errors import InputError
from vecinfer_jax.rope import Rope

HOPPER = dataclasses.replace(
    LAYER, num_query_heads=6, num_kv_heads=2, head_dim=64, dtype=jnp.dtype("bfloat16"), rope=Rope(1e4, 64)
)


def chunk_of(start, lengths, tokens, first):
    chunk = chunk_at(start, lengths, tokens, first)
    cos, sin = HOPPER.rope.cos_sin(chunk.positions)
    return dataclasses.replace(chunk, layer=HOPPER, cos=cos, sin=sin)


@pytest.mark.parametrize(("residual", "sink"), [(5, 3), pytest.param(0, 0, marks=pytest.mark.slow)])
def test_a_step_through_the_kernels_is_the_step_in_plain_jax(residual, sink, monkeypatch):
    lane_simulator.install(monkeypatch)
    rng = np.random.default_rng(0)
    plain, fused = (
        KIVI(bits=2, group=32, residual=residual, sink=sink, implementation=name) for name in ("xla", "mosaic_gpu")
    )

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    lengths = np.array([32 + residual + sink - 2, 2])  # row 0 fills a group with the second token
    tokens = int(lengths.max())
    _, cache = jax.jit(plain.prefill)(
        random(2, tokens, 6, 64),
        random(2, tokens, 2, 64),
        random(2, tokens, 2, 64),
        chunk_of([0, 0], lengths, tokens, True),
        plain.init(HOPPER, 2, 96),
    )
    caches = [cache, cache]
    decode = [jax.jit(method.decode) for method in (plain, fused)]
    for step in range(2):
        at = chunk_of(lengths + step, np.array([1, 1]), 1, False)
        q, k, v = random(2, 6, 64), random(2, 2, 64), random(2, 2, 64)
        outs = []
        for i in range(2):
            out, caches[i] = decode[i](q, k, v, at, caches[i])
            outs.append(np.asarray(out, np.float32))
        np.testing.assert_allclose(outs[1], outs[0], atol=2e-2)
        for a, b in zip(*map(jax.tree.leaves, caches), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    assert plain.coded_count(caches[0].lengths).tolist() == [32, 0]
    assert caches[0].store.key_codes.any()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tailorkvs_quantised_layers_are_served_by_the_kernels(bits, head_dim):
    """Section 3.2: groups of 64, keys' along tokens and values' along channels."""
    layout = KIVI(bits=bits, group=64, residual=128).layout(head_dim)
    assert layout.for_lanes
    assert (layout.token_group, layout.channel_group, layout.parts) == (64, 64, head_dim // 64)


def test_values_may_have_groups_of_their_own():
    method = KIVI(bits=2, group=64, channels=32)
    assert method.layout(128).parts == 4 and method.layout(16).channel_group == 16
    assert method.bits_per_element(dataclasses.replace(LAYER, head_dim=128)) == 2 + (32 / 64 + 32 / 32) / 2
    assert method.reading() != KIVI(bits=2, group=64).reading() == KIVI(bits=2, group=64, channels=64).reading()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"channels": 0}, "channels=0"), ({"channels": 2.5}, "channels=2.5"), ({"implementation": "cuda"}, "mosaic_gpu")],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(settings, said):
    with pytest.raises(InputError, match=said) as error:
        KIVI(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dtype", "residual"), [("bfloat16", 0), pytest.param("float16", 3, marks=pytest.mark.slow)])
def test_a_prompt_leaves_the_codes_of_its_tokens_one_by_one_in_16_bits_too(dtype, residual):
    """From before RoPE: a compiler must not leave out the rounding behind it."""
    layer = dataclasses.replace(HOPPER, dtype=jnp.dtype(dtype))
    method = KIVI(bits=4, group=32, residual=residual)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 64, heads, 64)), dtype) for heads in (6, 2, 2))
    whole = dataclasses.replace(chunk_of([0], [64], 64, True), layer=layer)
    _, bulk = jax.jit(method.prefill)(q, k, v, whole, method.init(layer, 1, 64))
    stepped, decode = method.init(layer, 1, 64), jax.jit(method.decode)
    for i in range(64):
        chunk = dataclasses.replace(chunk_of([i], [1], 1, False), layer=layer)
        _, stepped = decode(q[:, i], k[:, i], v[:, i], chunk, stepped)
    for a, b in zip(jax.tree.leaves(bulk.store), jax.tree.leaves(stepped.store), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

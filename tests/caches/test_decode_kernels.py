"""A decoding step through VecInfer's Mosaic GPU kernels (on a CPU, simulated) is the step in plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.caches.harness import LAYER, chunk_at
from tests.kernels import lane_simulator
from vecinfer_jax.caches import VecInfer
from vecinfer_jax.rope import Rope

HOPPER = dataclasses.replace(
    LAYER, num_query_heads=6, num_kv_heads=2, head_dim=64, dtype=jnp.dtype("bfloat16"), rope=Rope(1e4, 64)
)


def chunk_of(start, lengths, tokens, first):
    chunk = chunk_at(start, lengths, tokens, first)
    cos, sin = HOPPER.rope.cos_sin(chunk.positions)
    return dataclasses.replace(chunk, layer=HOPPER, cos=cos, sin=sin)


@pytest.mark.parametrize(
    ("residual", "sink", "transform", "fp8"),
    [(5, 3, "smooth-hadamard", False), (0, 0, "hadamard-smooth", False), (4, 1, "smooth-hadamard", True)],
)
def test_the_same_tokens_and_the_same_attention(residual, sink, transform, fp8, monkeypatch):
    lane_simulator.install(monkeypatch)
    rng = np.random.default_rng(0)
    plain, fused = (
        VecInfer(residual=residual, sink=sink, transform=transform, implementation=name, fp8_values=fp8)
        for name in ("xla", "mosaic_gpu")
    )

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    calibration = {
        "smooth": rng.uniform(0.5, 2.0, (2, 64)).astype(np.float32),
        "key_codebook": rng.normal(size=(2, 256, 4)).astype(np.float32),
        "value_codebook": rng.normal(size=(2, 256, 4)).astype(np.float32),
    }
    lengths = np.array([14, 2])
    chunk = chunk_of([0, 0], lengths, 14, True)
    empty = plain.init(HOPPER, 2, 32, calibration)
    prefill = jax.jit(plain.prefill)
    _, cache = prefill(random(2, 14, 6, 64), random(2, 14, 2, 64), random(2, 14, 2, 64), chunk, empty)
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
        for field in ("key_codes", "value_codes"):
            a, b = (np.asarray(getattr(c.store, field)) for c in caches)
            np.testing.assert_array_equal(a, b)
        for field in ("ring_keys", "ring_values", "sink_keys", "sink_values", "lengths"):
            np.testing.assert_array_equal(*(np.asarray(getattr(c, field), np.float32) for c in caches))

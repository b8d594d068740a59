"""Activation statistics, collected by a cache method that keeps statistics where others keep keys and values.

Running the model over calibration text with `Statistics` as its method leaves, per layer, what every method's
calibration needs. All of it is updated in place of a cache, so memory does not grow with the text.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import hadamard
from vecinfer_jax.caches.attention import causal_attention
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field
from vecinfer_jax.rope import apply_rope


@struct.dataclass
class LayerStatistics:
    """Of one layer; keys are after RoPE. n is the number of tokens sampled.

    count:                 tokens seen.
    key_abs_max:           [Hkv, D], largest |k_i| over all tokens.
    rotated_key_abs_max:   [Hkv, D], the same of the Hadamard-rotated keys (zeros if D is no power of two).
    key_sum:               [Hkv, D], sum of the keys.
    query_moment:          [Hkv, D, D], sum over tokens and the group's query heads of q q^T.
    keys, values:          [n, Hkv, D], a uniform random sample of the tokens.
    positions:             int32[n], where in their passage the sampled tokens stood; -1: slot not filled.
    priority:              [n], the random numbers by which the sample is kept (the n smallest of all tokens').
    draws:                 how many chunks have been drawn from: the state of the random numbers.
    key_gradients, value_gradients: bfloat16[n, Hkv, D], gradients of the sampled tokens' passages' loss with respect
        to their keys before RoPE and their values, where they were asked for (`vecinfer_jax.calibration.fisher`).
    """

    count: Int[Array, ""] = array_field("state")
    key_abs_max: Float32[Array, "Hkv D"] = array_field("state")
    rotated_key_abs_max: Float32[Array, "Hkv D"] = array_field("state")
    key_sum: Float32[Array, "Hkv D"] = array_field("state")
    query_moment: Float32[Array, "Hkv D D"] = array_field("state")
    keys: Float[Array, "n Hkv D"] = array_field("state")
    values: Float[Array, "n Hkv D"] = array_field("state")
    positions: Int[Array, "n"] = array_field("state")
    priority: Float32[Array, "n"] = array_field("state")
    draws: Int[Array, ""] = array_field("state")
    key_gradients: Float[Array, "n Hkv D"] | None = array_field("state", default=None)
    value_gradients: Float[Array, "n Hkv D"] | None = array_field("state", default=None)


@dataclasses.dataclass(frozen=True)
class Statistics(CacheMethod):
    """samples: tokens kept per layer; seed: of which ones (the same tokens in every layer)."""

    samples: int
    seed: int
    name: ClassVar[str] = "statistics"

    def init(
        self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None
    ) -> LayerStatistics:
        h, d, n = layer.num_kv_heads, layer.head_dim, self.samples
        return LayerStatistics(
            count=jnp.int32(0),
            key_abs_max=jnp.zeros((h, d), jnp.float32),
            rotated_key_abs_max=jnp.zeros((h, d), jnp.float32),
            key_sum=jnp.zeros((h, d), jnp.float32),
            query_moment=jnp.zeros((h, d, d), jnp.float32),
            keys=jnp.zeros((n, h, d), layer.dtype),
            values=jnp.zeros((n, h, d), layer.dtype),
            positions=jnp.full((n,), -1, jnp.int32),
            priority=jnp.full((n,), jnp.inf, jnp.float32),
            draws=jnp.int32(0),
        )

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: LayerStatistics,
    ) -> tuple[Float[Array, "B T Hq D"], LayerStatistics]:
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        out = causal_attention(q, k, v, chunk.lengths, chunk.layer.scale)
        b, t, heads, d = k.shape
        counts = (jnp.arange(t)[None, :] < chunk.lengths[:, None]).reshape(-1)
        keys = jnp.where(counts[:, None, None], k.astype(jnp.float32).reshape(-1, heads, d), 0.0)
        queries = jnp.where(counts[:, None, None], q.astype(jnp.float32).reshape(b * t, -1, d), 0.0)
        queries = queries.reshape(b * t, heads, -1, d)
        moment = jnp.einsum("nhgd,nhge->hde", queries, queries, precision=jax.lax.Precision.HIGHEST)
        rotated = cache.rotated_key_abs_max
        if d & (d - 1) == 0:
            rotated = jnp.maximum(rotated, jnp.max(jnp.abs(hadamard(keys)), axis=0))

        priority, keep = draw(self.seed, cache.draws, counts, cache.priority)

        def sample(old: Array, new: Array) -> Array:
            return jnp.concatenate([old, new.astype(old.dtype)])[keep]

        return out, LayerStatistics(
            count=cache.count + jnp.sum(counts),
            key_abs_max=jnp.maximum(cache.key_abs_max, jnp.max(jnp.abs(keys), axis=0)),
            rotated_key_abs_max=rotated,
            key_sum=cache.key_sum + jnp.sum(keys, axis=0),
            query_moment=cache.query_moment + moment,
            keys=sample(cache.keys, keys),
            values=sample(cache.values, v.reshape(-1, heads, d)),
            positions=jnp.where(jnp.isinf(priority[keep]), -1, sample(cache.positions, chunk.positions.reshape(-1))),
            priority=priority[keep],
            draws=cache.draws + 1,
        )

    def decode(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        raise NotImplementedError("activation statistics are collected over passages, not while decoding")

    def bits_per_element(self, layer: LayerShape) -> float:
        return 0.0


def draw(
    seed: int, draws: Int[Array, ""], counts: Bool[Array, "tokens"], held: Float32[Array, "n"]
) -> tuple[Float32[Array, "both"], Int[Array, "n"]]:
    """Priorities of the n tokens held and of a chunk's after them, and which n of these are held from now on."""
    key = jax.random.fold_in(jax.random.key(seed), draws)
    priority = jnp.where(counts, jax.random.uniform(key, counts.shape), jnp.inf)
    priority = jnp.concatenate([held, priority])
    return priority, jax.lax.top_k(-priority, held.shape[0])[1]

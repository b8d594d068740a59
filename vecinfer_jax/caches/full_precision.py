"""The cache that everything is measured against: keys after RoPE and values as they are."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vecinfer_jax.caches.attention import (
    Tokens,
    causal_attention,
    mixed_attention,
    no_tokens,
    partial_attention,
)
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.rows import write_chunk, write_token
from vecinfer_jax.rope import apply_rope


@struct.dataclass
class FullPrecisionCache:
    """keys, values: [B, Hkv, capacity, D]; lengths: int32[B], tokens held."""

    keys: Float[Array, "B Hkv S D"] = array_field("codes")
    values: Float[Array, "B Hkv S D"] = array_field("codes")
    lengths: Int[Array, "B"] = array_field("state")


@dataclasses.dataclass(frozen=True)
class FullPrecision(CacheMethod):
    """Keeps keys and values in the model's dtype."""

    name: ClassVar[str] = "full"

    def init(
        self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None
    ) -> FullPrecisionCache:
        shape = (batch, layer.num_kv_heads, capacity, layer.head_dim)
        return FullPrecisionCache(
            jnp.zeros(shape, layer.dtype), jnp.zeros(shape, layer.dtype), jnp.zeros((batch,), jnp.int32)
        )

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: FullPrecisionCache,
    ) -> tuple[Float[Array, "B T Hq D"], FullPrecisionCache]:
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        offset = jnp.arange(k.shape[1])[None, :]
        slot = jnp.where(offset < chunk.lengths[:, None], cache.lengths[:, None] + offset, -1)
        cache = FullPrecisionCache(
            write_chunk(cache.keys, k, slot),
            write_chunk(cache.values, v, slot),
            cache.lengths + chunk.lengths,
        )
        scale = chunk.layer.scale
        if chunk.first:
            return causal_attention(q, k, v, chunk.lengths, scale), cache
        slots = jnp.arange(cache.keys.shape[2])[None, :]
        held = Tokens(cache.keys, cache.values, jnp.where(slots < cache.lengths[:, None], slots, -1))
        nothing = no_tokens(cache.keys)
        boundary = jnp.zeros_like(chunk.positions)
        out = mixed_attention(q, chunk.positions, boundary, held, nothing, sink=0, scale=scale)
        return out, cache

    def decode(
        self,
        q: Float[Array, "B Hq D"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        chunk: Chunk,
        cache: FullPrecisionCache,
    ) -> tuple[Float[Array, "B Hq D"], FullPrecisionCache]:
        cos, sin = chunk.cos[:, 0], chunk.sin[:, 0]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        at = chunk.positions[:, 0]
        keys, values = write_token(cache.keys, k, at), write_token(cache.values, v, at)
        lengths = at + 1
        out = _decode_attention(q, keys, values, lengths, chunk.layer.scale)
        return out, FullPrecisionCache(keys, values, lengths)

    def bits_per_element(self, layer: LayerShape) -> float:
        return 8.0 * jnp.dtype(layer.dtype).itemsize


def _decode_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv S D"],
    values: Float[Array, "B Hkv S D"],
    lengths: Int[Array, "B"],
    scale: float,
) -> Float[Array, "B Hq D"]:
    """One token a sequence over the first `lengths` slots."""
    valid = jnp.arange(keys.shape[2])[None, :] < lengths[:, None]
    out, _ = partial_attention(q, keys, values, valid, scale)
    return out.astype(q.dtype)

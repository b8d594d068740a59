"""The cache that everything is measured against: keys after RoPE and values as they are."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vecinfer_jax.caches.attention import (
    Source,
    Tokens,
    blockwise_attention,
    causal_attention,
    cudnn_serves,
    partial_attention,
)
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field
from vecinfer_jax.rope import apply_rope


@struct.dataclass
class FullPrecisionCache:
    """keys, values: [B, capacity, Hkv, D], as projections give them and cuDNN reads them; lengths: int32[B]."""

    keys: Float[Array, "B S Hkv D"] = array_field("codes")
    values: Float[Array, "B S Hkv D"] = array_field("codes")
    lengths: Int[Array, "B"] = array_field("state")


@dataclasses.dataclass(frozen=True)
class FullPrecision(CacheMethod):
    """Keeps keys and values in the model's dtype."""

    name: ClassVar[str] = "full"

    def init(
        self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None
    ) -> FullPrecisionCache:
        shape = (batch, capacity, layer.num_kv_heads, layer.head_dim)
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
            _write(cache.keys, k, slot),
            _write(cache.values, v, slot),
            cache.lengths + chunk.lengths,
        )
        scale = chunk.layer.scale
        if chunk.first:
            return causal_attention(q, k, v, chunk.lengths, scale), cache

        def read(start: jax.Array, size: int) -> Tokens:
            slots = start + jnp.arange(size)[None, :]
            keys, values = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (cache.keys, cache.values))
            return Tokens(
                keys.swapaxes(1, 2), values.swapaxes(1, 2), jnp.where(slots < cache.lengths[:, None], slots, -1)
            )

        held = Source(read, cache.keys.shape[1], jnp.max(cache.lengths), lambda s, t, boundary: s >= boundary)
        start = jnp.zeros_like(chunk.positions)
        return blockwise_attention(q, chunk.positions, start, [held], chunk.layer.num_kv_heads, scale), cache

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
        keys = _write(cache.keys, k[:, None], at[:, None])
        values = _write(cache.values, v[:, None], at[:, None])
        out = _decode_attention(q, keys, values, at + 1, chunk.layer.scale)
        return out, FullPrecisionCache(keys, values, at + 1)

    def bits_per_element(self, layer: LayerShape) -> float:
        return 8.0 * jnp.dtype(layer.dtype).itemsize


def _write(
    buffer: Float[Array, "B S Hkv D"], tokens: Float[Array, "B T Hkv D"], slots: Int[Array, "B T"]
) -> Float[Array, "B S Hkv D"]:
    """Puts tokens[b, t] into slots[b, t]; slots outside the buffer (-1, say) are dropped."""
    slots = jnp.where(slots < 0, buffer.shape[1], slots)
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slots].set(tokens.astype(buffer.dtype), mode="drop")


def _decode_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B S Hkv D"],
    values: Float[Array, "B S Hkv D"],
    lengths: Int[Array, "B"],
    scale: float,
) -> Float[Array, "B Hq D"]:
    """One token a sequence over the first `lengths` slots."""
    if cudnn_serves(q):
        out = jax.nn.dot_product_attention(
            q[:, None],
            keys,
            values,
            scale=scale,
            key_value_seq_lengths=lengths.astype(jnp.int32),
            implementation="cudnn",
        )
        return out[:, 0]
    valid = jnp.arange(keys.shape[1])[None, :] < lengths[:, None]
    out, _ = partial_attention(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), valid, scale)
    return out.astype(q.dtype)

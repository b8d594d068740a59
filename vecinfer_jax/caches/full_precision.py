"""The cache that everything is measured against: keys after RoPE and values as they are."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vecinfer_jax.caches.attention import (
    Coded,
    Source,
    Tokens,
    blockwise_attention,
    causal_attention,
    later_attention,
    partial_attention,
)
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.cudnn import cudnn_attention, cudnn_serves, partial_cudnn_attention
from vecinfer_jax.caches.stripes import merged, stripes, whole_prompt
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
        shape = (batch, stripes(layer.axes).whole_turns(capacity), layer.num_kv_heads, layer.head_dim)
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
        layer, dealt = chunk.layer, stripes(chunk.layer.axes)
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        k, v = (whole_prompt(x, layer.axes) for x in (k, v))
        offset = jnp.arange(k.shape[1])[None, :]
        slot = jnp.where(offset < chunk.lengths[:, None], cache.lengths[:, None] + offset, -1)
        place, own_k, own_v = dealt.own(cache.lengths, slot, k, v)
        cache = FullPrecisionCache(
            _write(cache.keys, own_k, place),
            _write(cache.values, own_v, place),
            cache.lengths + chunk.lengths,
        )
        if chunk.first:
            return causal_attention(q, k, v, chunk.lengths, layer.scale, layer.axes), cache

        def in_order(start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
            keys, values = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (cache.keys, cache.values))
            return keys, values

        if cudnn_serves(q) and dealt.shards == 1:
            before = Coded(in_order, cache.keys.shape[1], cache.lengths - chunk.lengths)
            return later_attention(q, k, v, chunk.lengths, None, before, layer.scale), cache

        def read(start: jax.Array, size: int) -> Tokens:
            slots = dealt.slot(start + jnp.arange(size))[None, :]
            held_at = jnp.where(slots < cache.lengths[:, None], slots, -1)
            keys, values = (dealt.gathered(x.swapaxes(1, 2), 2) for x in in_order(start, size))
            return Tokens(keys, values, dealt.gathered(held_at, 1))

        used = jnp.max(dealt.most_held(cache.lengths))
        held = Source(read, cache.keys.shape[1], used, lambda s, t, boundary: s >= boundary, shards=dealt.shards)
        start = jnp.zeros_like(chunk.positions)
        return blockwise_attention(q, chunk.positions, start, [held], layer.num_kv_heads, layer.scale), cache

    def decode(
        self,
        q: Float[Array, "B Hq D"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        chunk: Chunk,
        cache: FullPrecisionCache,
    ) -> tuple[Float[Array, "B Hq D"], FullPrecisionCache]:
        axes, dealt = chunk.layer.axes, stripes(chunk.layer.axes)
        cos, sin = chunk.cos[:, 0], chunk.sin[:, 0]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        at = chunk.positions[:, 0]
        place = dealt.place(at[:, None])
        keys, values = _write(cache.keys, k[:, None], place), _write(cache.values, v[:, None], place)
        part = _decode_attention(q, keys, values, dealt.held(at + 1), chunk.layer)
        return merged(*part, axes).astype(q.dtype), FullPrecisionCache(keys, values, at + 1)

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
    layer: LayerShape,
) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"] | None]:
    """One token a sequence over the first `lengths` slots: output and, where others are to be merged, log-sum-exp."""
    if cudnn_serves(q):
        if layer.axes.context is None:
            return cudnn_attention(q[:, None], keys, values, lengths, layer.scale)[:, 0], None
        out, lse = partial_cudnn_attention(q[:, None], keys, values, lengths, layer.scale)
        return out[:, 0], lse[:, 0]
    valid = jnp.arange(keys.shape[1])[None, :] < lengths[:, None]
    return partial_attention(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), valid, layer.scale)

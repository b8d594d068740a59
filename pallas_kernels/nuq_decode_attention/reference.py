"""Attention over non-uniformly quantised keys and values in plain JAX: the meaning of `nuq_decode_attention`, a chunk
of tokens at a time.

Rotations compose, so no angle of a token's position is formed: with s a chunk's start, q rotated by -s meets keys that
are rotated by their place in the chunk only. The angles of both are made on the host in float64.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, Float32, Int32, UInt8, UInt32

from pallas_kernels import nuq, split_k
from pallas_kernels.exact import ExactTokens, merge_exact, rounded
from pallas_kernels.vq_decode_attention.reference import attend

# Elements of a dequantised chunk of keys, [B, Hkv, chunk, D] float32.
_CHUNK_ELEMENTS = 2**22


def nuq_decode_attention(
    q: Float[Array, "B Hq D"],
    key_codes: UInt8[Array, "B Hkv S bytes"],
    value_codes: UInt8[Array, "B Hkv S vbytes"],
    key_scale: Float32[Array, "Hkv D"],
    key_zero: Float32[Array, "Hkv D"],
    key_codebook: Float32[Array, "Kk"],
    value_codebook: Float32[Array, "Kv"],
    value_scale_zero: Float16[Array, "B S 2"],
    key_outliers: UInt32[Array, "B Hkv tiles kslots"] | None,
    value_outliers: UInt32[Array, "B Hkv tiles vslots"] | None,
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    inverse_frequencies: tuple[float, ...] | None = None,
    first_position: int | tuple[int, ...] = 0,
    tile_stride: int = 1,
    shard: Array | None = None,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    num_splits: int | None = None,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The meaning of `pallas_kernels.nuq_decode_attention`. Chunks past the longest row are not read."""
    del num_splits, interpret
    batch, query_heads, dim = q.shape
    kv_heads, tokens = key_codes.shape[1:3]
    group = query_heads // max(1, kv_heads)
    output = jnp.zeros((batch, kv_heads, group, dim), jnp.float32)
    lse = jnp.full((batch, kv_heads, group), split_k.EMPTY, jnp.float32)
    if tokens > 0:
        most = _CHUNK_ELEMENTS // max(1, batch * kv_heads * dim)
        chunk = min(tokens, max(most // nuq.TILE, 1) * nuq.TILE)
        lengths = jnp.minimum(lengths, tokens)
        queries = q.astype(jnp.float32).reshape(batch, kv_heads, group, dim) * scale
        # 16-bit inputs let an accelerator multiply in 16 bits; float32 inputs ask for float32.
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
        # The last chunk starts early where S is no multiple of the chunk; what was already read is masked.
        starts = np.minimum(np.arange(-(-tokens // chunk)) * chunk, tokens - chunk)
        turns = None
        if inverse_frequencies is not None:
            offsets, places = (nuq.positions_of(slots, tile_stride) for slots in (starts, np.arange(chunk)))
            of_chunks = nuq.turns_of_first(first_position, shard, offsets, inverse_frequencies)
            turns = [*of_chunks, *(jnp.asarray(x) for x in nuq.angles(places, inverse_frequencies))]

        entries = nuq.value_entries(value_codebook, q.dtype)

        def step(i, carry):
            start = jnp.asarray(starts, jnp.int32)[i]
            position = start + jnp.arange(chunk)
            valid = (position >= i * chunk) & (position < lengths[:, None])
            tile = start // nuq.TILE
            keys = nuq.dense_keys(_rows(key_codes, start, chunk), key_scale, key_zero, key_codebook)
            scale_zero = lax.dynamic_slice_in_dim(value_scale_zero, start, chunk, axis=1)
            values = nuq.dense_values(_rows(value_codes, start, chunk), scale_zero, entries, dim)
            if key_outliers is not None:
                keys += nuq.outliers_of(_rows(key_outliers, tile, chunk // nuq.TILE), dim)
            if value_outliers is not None:
                values += nuq.outliers_of(_rows(value_outliers, tile, chunk // nuq.TILE), dim)
            turned = queries
            if turns is not None:
                chunk_cos, chunk_sin, cos, sin = turns
                turned = nuq.rotate(queries, chunk_cos[i], -chunk_sin[i])
                keys = nuq.rotate(keys, cos, sin)
            part = attend(turned, keys, values, valid[:, None, None], precision)
            outputs, lses = zip(carry, part, strict=True)
            return split_k.merge(jnp.stack(outputs, axis=-2), jnp.stack(lses, axis=-1))

        chunks = (jnp.max(lengths, initial=0) + chunk - 1) // chunk
        output, lse = lax.fori_loop(0, chunks, step, (output, lse))
    output, lse = output.reshape(batch, query_heads, dim), lse.reshape(batch, query_heads)
    return rounded(*merge_exact(output, lse, exact_q, exact, scale), out_dtype)


def _rows(array: Array, start: Array, count: int) -> Array:
    return lax.dynamic_slice_in_dim(array, start, count, axis=2)

"""Attention over coded keys and values in plain JAX: the meaning of `vq_decode_attention`, a chunk at a
time."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import packing, split_k
from pallas_kernels.exact import ExactTokens, merge_exact, rounded
from pallas_kernels.vq_decode_attention.queries import transform_queries

# Elements of a dequantised chunk of keys, [B, Hkv, chunk, D] float32.
_CHUNK_ELEMENTS = 2**22


def vq_decode_attention(
    q: Float[Array, "B Hq D"],
    key_codes: UInt8[Array, "B Hkv S kbytes"],
    value_codes: UInt8[Array, "B Hkv S vbytes"],
    key_codebook: Float[Array, "Hk Kk dk"],
    value_codebook: Float[Array, "Hv Kv dv"],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    query_scale: Float[Array, "Hkv D"] | None = None,
    query_hadamard: bool = False,
    query_map: Float[Array, "Hkv D D"] | None = None,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    num_splits: int | None = None,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The meaning of `pallas_kernels.vq_decode_attention`. Chunks past the longest row are not read."""
    del num_splits
    q = transform_queries(q, query_scale, query_hadamard, query_map, implementation="xla", interpret=interpret)
    batch, query_heads, dim = q.shape
    kv_heads, tokens = key_codes.shape[1:3]
    group = query_heads // max(1, kv_heads)
    output = jnp.zeros((batch, kv_heads, group, dim), jnp.float32)
    lse = jnp.full((batch, kv_heads, group), split_k.EMPTY, jnp.float32)
    if tokens > 0:
        chunk = min(tokens, max(128, _CHUNK_ELEMENTS // max(1, batch * kv_heads * dim)))
        lengths = jnp.minimum(lengths, tokens)
        queries = q.astype(jnp.float32).reshape(batch, kv_heads, group, dim) * scale
        # bfloat16 inputs let a TPU multiply in bfloat16; float32 inputs ask for float32.
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT

        def step(i, carry):
            # The last chunk starts early where S is no multiple of the chunk; what was already read is
            # masked.
            start = jnp.minimum(i * chunk, tokens - chunk)
            position = start + jnp.arange(chunk)
            valid = (position >= i * chunk) & (position < lengths[:, None])
            keys = dequantise(_rows(key_codes, start, chunk), key_codebook, dim, q.dtype)
            values = dequantise(_rows(value_codes, start, chunk), value_codebook, dim, q.dtype)
            part = attend(queries, keys, values, valid[:, None, None], precision)
            outputs, lses = zip(carry, part, strict=True)
            return split_k.merge(jnp.stack(outputs, axis=-2), jnp.stack(lses, axis=-1))

        chunks = (jnp.max(lengths, initial=0) + chunk - 1) // chunk
        output, lse = lax.fori_loop(0, chunks, step, (output, lse))
    output, lse = output.reshape(batch, query_heads, dim), lse.reshape(batch, query_heads)
    return rounded(*merge_exact(output, lse, exact_q, exact, scale), out_dtype)


def _rows(codes: Array, start: Array, chunk: int) -> Array:
    return lax.dynamic_slice_in_dim(codes, start, chunk, axis=2)


def dequantise(
    codes: UInt8[Array, "B H C bytes"], codebook: Float[Array, "Hc K d"], dim: int, dtype
) -> Float[Array, "B H C D"]:
    """The coded vectors, rounded to `dtype`, as float32."""
    batch, heads, chunk, _ = codes.shape
    shared, entries, length = codebook.shape
    index = packing.unpack(codes, entries.bit_length() - 1, dim // length)
    if shared > 1:
        index = index + entries * jnp.arange(heads)[:, None, None]
    table = codebook.astype(dtype).astype(jnp.float32).reshape(shared * entries, length)
    return table.at[index].get(mode="promise_in_bounds").reshape(batch, heads, chunk, dim)


def attend(queries, keys, values, valid, precision) -> tuple[Array, Array]:
    """Attention of [B, H, G, D] scaled queries over one chunk; `valid` broadcasts to [B, H, G, C]."""
    scores = jnp.einsum("bhgd,bhcd->bhgc", queries, keys, precision=precision)
    scores = jnp.where(valid, scores, split_k.EMPTY)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(valid, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    output = jnp.einsum("bhgc,bhcd->bhgd", weights, values, precision=precision) / safe[..., None]
    return output, jnp.where(some, top[..., 0] + jnp.log(safe), split_k.EMPTY)

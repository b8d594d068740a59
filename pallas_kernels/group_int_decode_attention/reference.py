"""Attention over integer codes in plain JAX: the meaning of `group_int_decode_attention`, a chunk of tokens at a
time."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float16, Int32, UInt8

from pallas_kernels import split_k
from pallas_kernels.exact import ExactTokens, merge_exact, rounded
from pallas_kernels.group_int import Layout
from pallas_kernels.vq_decode_attention.reference import attend

# Elements of a dequantised chunk of keys, [B, Hkv, chunk, D] float32.
_CHUNK_ELEMENTS = 2**22


def group_int_decode_attention(
    q: Float[Array, "B Hq D"],
    key_codes: UInt8[Array, "B Hkv tiles bytes"],
    key_scale_zero: Float16[Array, "B Hkv groups kscales"],
    value_codes: UInt8[Array, "B Hkv tiles bytes"],
    value_scale_zero: Float16[Array, "B Hkv tiles vscales"],
    lengths: Int32[Array, "B"],
    *,
    layout: Layout,
    scale: float,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    num_splits: int | None = None,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The meaning of `pallas_kernels.group_int_decode_attention`. Chunks past the longest row are not read."""
    del num_splits, interpret
    batch, query_heads, dim = q.shape
    kv_heads, tokens = key_codes.shape[1], key_codes.shape[2] * layout.tile
    group, multiple = query_heads // max(1, kv_heads), layout.token_group
    output = jnp.zeros((batch, kv_heads, group, dim), jnp.float32)
    lse = jnp.full((batch, kv_heads, group), split_k.EMPTY, jnp.float32)
    if tokens > 0:
        most = _CHUNK_ELEMENTS // max(1, batch * kv_heads * dim)
        chunk = min(tokens, max(most // multiple, 1) * multiple)
        lengths = jnp.minimum(lengths, tokens)
        queries = q.astype(jnp.float32).reshape(batch, kv_heads, group, dim) * scale
        # 16-bit inputs let an accelerator multiply in 16 bits; float32 inputs ask for float32.
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT

        def step(i, carry):
            # The last chunk starts early where S is no multiple of the chunk; what was already read is masked.
            start = jnp.minimum(i * chunk, tokens - chunk)
            position = start + jnp.arange(chunk)
            valid = (position >= i * chunk) & (position < lengths[:, None])

            def rows(array: Array, of_tokens: int) -> Array:
                return lax.dynamic_slice_in_dim(array, start // of_tokens, chunk // of_tokens, axis=2)

            keys = layout.decode_keys(rows(key_codes, layout.tile), rows(key_scale_zero, multiple))
            values = layout.decode_values(rows(value_codes, layout.tile), rows(value_scale_zero, layout.tile))
            part = attend(queries, keys, values, valid[:, None, None], precision)
            outputs, lses = zip(carry, part, strict=True)
            return split_k.merge(jnp.stack(outputs, axis=-2), jnp.stack(lses, axis=-1))

        chunks = (jnp.max(lengths, initial=0) + chunk - 1) // chunk
        output, lse = lax.fori_loop(0, chunks, step, (output, lse))
    output, lse = output.reshape(batch, query_heads, dim), lse.reshape(batch, query_heads)
    return rounded(*merge_exact(output, lse, exact_q, exact, scale), out_dtype)

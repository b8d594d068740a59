"""One decoding step of attention over keys and values coded as integers in groups (KIVI: arXiv 2402.02750)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Int32, UInt8

from pallas_kernels import dispatch
from pallas_kernels.exact import ExactTokens, check
from pallas_kernels.group_int import Layout

_DTYPES = ("float32", "bfloat16", "float16")
_NAME = "group_int_decode_attention"


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
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """softmax(scale * q K^T) V over the first lengths[b] tokens of each row, K and V read from their codes.

    Query heads h * G to (h + 1) * G - 1 read KV head h.

    Args:
        q: queries after RoPE.
        key_codes, key_scale_zero, value_codes, value_scale_zero: of S tokens, as `layout` stores them (`encode_keys`
            and `encode_values` make them). No scale is negative.
        lengths: tokens that count in each row, 0 to S; not only whole groups.
        layout: how they are stored; static.
        scale: factor on the scores, usually 1/sqrt(D).
        exact: further tokens, attended to as they are in the same softmax (a residual window, sinks).
        exact_q: the queries for those; default q.
        num_splits: programs that share a row; None lets the kernel choose. Affects speed and rounding only.
        out_dtype: of the output, which is rounded once.
        implementation: "mosaic_gpu" (16-bit queries, layouts in the order of lanes, up to 16 query heads a KV head),
            "triton" (any queries, the same layouts and heads), "xla", or None for the best on the default device.
        interpret: run the Pallas kernel in interpret mode (on a CPU, for tests).

    Returns:
        The normalised output in `out_dtype` and the natural-log log-sum-exp of the scaled scores in float32. Where no
        token counts they are 0 and `split_k.EMPTY`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NotImplementedError: the named implementation does not serve this layout.
    """
    if q.ndim != 3 or jnp.dtype(q.dtype).name not in _DTYPES or q.shape[2] != layout.dim:
        raise ValueError(f"{_NAME}: q must be [B, Hq, {layout.dim}] of {_DTYPES}, got {q.dtype}{list(q.shape)}")
    batch, query_heads, _ = q.shape
    if key_codes.ndim != 4 or query_heads % max(1, key_codes.shape[1]):
        raise ValueError(
            f"{_NAME}: key_codes must be [{batch}, Hkv, tiles, bytes], Hkv dividing {query_heads}, got "
            f"{list(key_codes.shape)}"
        )
    heads, tokens = key_codes.shape[1], key_codes.shape[2] * layout.tile
    if tokens % layout.token_group:
        raise ValueError(f"{_NAME}: {tokens} tokens are no whole groups of {layout.token_group}")
    shapes = *layout.key_shapes(tokens), *layout.value_shapes(tokens)
    for name, array, shape, dtype in (
        ("key_codes", key_codes, shapes[0], jnp.uint8),
        ("key_scale_zero", key_scale_zero, shapes[1], jnp.float16),
        ("value_codes", value_codes, shapes[2], jnp.uint8),
        ("value_scale_zero", value_scale_zero, shapes[3], jnp.float16),
    ):
        if array.shape != (batch, heads, *shape) or array.dtype != dtype:
            raise ValueError(
                f"{_NAME}: {name} must be {jnp.dtype(dtype).name}{[batch, heads, *shape]} for {layout}, got "
                f"{array.dtype}{list(array.shape)}"
            )
    if lengths.shape != (batch,) or lengths.dtype != jnp.int32:
        raise ValueError(f"{_NAME}: lengths must be int32[{batch}], got {lengths.dtype}{list(lengths.shape)}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"{_NAME}: num_splits={num_splits} must be 1 or more")
    exact_q = q if exact_q is None else exact_q
    check(_NAME, q, heads, exact, exact_q)
    return dispatch.call(
        _NAME, implementation, interpret,
        q, key_codes, key_scale_zero, value_codes, value_scale_zero, lengths,
        layout=layout, scale=float(scale), exact=tuple(exact), exact_q=exact_q, num_splits=num_splits,
        out_dtype=out_dtype,
    )  # fmt: skip

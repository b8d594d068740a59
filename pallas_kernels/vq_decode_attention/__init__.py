"""One decoding step of attention over coded keys and values (VecInfer, section 3.3: arXiv 2510.06175)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import dispatch, packing
from pallas_kernels.exact import ExactTokens, check

_DTYPES = ("float32", "bfloat16", "float16")


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
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """softmax(scale * q K^T) V over the first lengths[b] tokens of each row, K and V read from their codes.

    Query heads h * G to (h + 1) * G - 1 read KV head h. Keys and values may differ in codebook size and
    sub-vector length. The arithmetic is that of q.dtype (a bfloat16 q means bfloat16 products with float32
    sums).

    Args:
        q: queries; in the basis of the coded keys, if the two next do not bring them there.
        key_codes, value_codes: packed as `vq_encode` returns them.
        key_codebook, value_codebook: a codebook for every KV head, or one for all (first axis 1), rounded to q.dtype
            unless they are float8_e4m3fn. Mosaic GPU multiplies an fp8 table in float16: a query element beyond 65504
            overflows there.
        lengths: tokens that count in each row, 0 to S.
        scale: factor on the scores, usually 1/sqrt(D).
        query_scale, query_hadamard: multiply the queries of each KV head's group by a factor for every element, and
            then by the normalised Walsh-Hadamard matrix, in float32, rounded to q.dtype.
        query_map: in their place, a matrix by which the queries (rows) of each KV head's group are multiplied.
        exact: further tokens, attended to as they are in the same softmax (a residual window, sinks); keys and
            values of any float type, multiplied as that type and exact_q's are.
        exact_q: the queries for those, in the basis of their keys, of q's shape.
        num_splits: programs that share a row; None lets the kernel choose. Affects speed and rounding only.
        out_dtype: of the output, which is rounded once; float32 for what is to be merged with other parts.
        implementation: "mosaic_gpu", "triton", "xla", or None for the best on the default device.
        interpret: run the Pallas kernel in interpret mode (on a CPU, for tests).

    Returns:
        The normalised output in `out_dtype` and the natural-log log-sum-exp of the scaled scores in float32. Where no
        token counts they are 0 and `split_k.EMPTY`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NotImplementedError: the named implementation does not serve this format.
    """
    _check(q, key_codes, value_codes, key_codebook, value_codebook, lengths, num_splits)
    check("vq_decode_attention", q, key_codes.shape[1], exact, exact_q)
    heads, dim = key_codes.shape[1], q.shape[2]
    if query_scale is not None and query_scale.shape != (heads, dim):
        raise ValueError(f"vq_decode_attention: query_scale must be [{heads}, {dim}], got {query_scale.shape}")
    if query_map is not None and (query_map.shape != (heads, dim, dim) or query_hadamard or query_scale is not None):
        raise ValueError(
            f"vq_decode_attention: query_map must be [{heads}, {dim}, {dim}] without query_scale and query_hadamard, "
            f"got {query_map.shape}"
        )
    if query_hadamard and dim & (dim - 1):
        raise ValueError(f"vq_decode_attention: query_hadamard needs a power-of-two head dimension, got {dim}")
    return dispatch.call(
        "vq_decode_attention", implementation, interpret,
        q, key_codes, value_codes, key_codebook, value_codebook, lengths,
        scale=float(scale), query_scale=query_scale, query_hadamard=query_hadamard, query_map=query_map,
        exact=tuple(exact), exact_q=exact_q, num_splits=num_splits, out_dtype=out_dtype,
    )  # fmt: skip


def _check(q, key_codes, value_codes, key_codebook, value_codebook, lengths, num_splits) -> None:
    if q.ndim != 3 or jnp.dtype(q.dtype).name not in _DTYPES:
        raise ValueError(f"vq_decode_attention: q must be [B, Hq, D] of {_DTYPES}, got {q.dtype}{q.shape}")
    batch, query_heads, dim = q.shape
    if key_codes.ndim != 4 or key_codes.shape[0] != batch or query_heads % max(1, key_codes.shape[1]):
        raise ValueError(
            f"vq_decode_attention: key_codes must be [{batch}, Hkv, S, bytes], Hkv dividing {query_heads}, "
            f"got {key_codes.shape}"
        )
    if value_codes.ndim != 4 or value_codes.shape[:3] != key_codes.shape[:3]:
        raise ValueError(
            f"vq_decode_attention: value_codes {value_codes.shape} and key_codes {key_codes.shape} must "
            "agree in [B, Hkv, S]"
        )
    _check_codes("key", key_codes, key_codebook, dim)
    _check_codes("value", value_codes, value_codebook, dim)
    if lengths.shape != (batch,) or lengths.dtype != jnp.int32:
        raise ValueError(
            f"vq_decode_attention: lengths must be int32[{batch}], got {lengths.dtype}{list(lengths.shape)}"
        )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"vq_decode_attention: num_splits must be at least 1 or None, got {num_splits}")


def _check_codes(name: str, codes, codebook, dim: int) -> None:
    heads = codes.shape[1]
    if codes.dtype != jnp.uint8:
        raise ValueError(f"vq_decode_attention: {name}_codes must be packed in uint8, got {codes.dtype}")
    if codebook.ndim != 3 or codebook.shape[0] not in (1, heads):
        raise ValueError(f"vq_decode_attention: {name}_codebook must be [{heads} or 1, K, d], got {codebook.shape}")
    entries, length = codebook.shape[1:]
    bits = entries.bit_length() - 1
    if entries != 2**bits or not 1 <= bits <= packing.MAX_BITS or length < 1 or dim % length:
        raise ValueError(
            f"vq_decode_attention: {name}_codebook {codebook.shape} needs K a power of two, 2 to 65536, and d "
            f"dividing the head dimension {dim}"
        )
    want = packing.num_bytes(dim // length, bits)
    if codes.shape[3] != want:
        raise ValueError(
            f"vq_decode_attention: {dim // length} codes of {bits} bits take {want} bytes a token, "
            f"got {name}_codes {codes.shape}"
        )

"""One decoding step of attention over 16-bit keys and values: what a coded cache is measured against."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch

_DTYPES = ("float32", "bfloat16", "float16")


def decode_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv S D"],
    values: Float[Array, "B Hkv S D"],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """softmax(scale * q K^T) V over the first lengths[b] tokens of each row.

    Query heads h * G to (h + 1) * G - 1 read KV head h.

    Args:
        q: queries.
        keys, values: of q's dtype.
        lengths: tokens that count in each row, 0 to S.
        scale: factor on the scores, usually 1/sqrt(D).
        out_dtype: of the output, which is rounded once.
        implementation: "mosaic_gpu" (16-bit, D 64 or 128, up to 16 query heads a KV head), "xla", or None for the best
            on the default device.
        interpret: choose what runs on a CPU.

    Returns:
        The normalised output in `out_dtype` and the natural-log log-sum-exp of the scaled scores in float32. Where no
        token counts they are 0 and `split_k.EMPTY`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NotImplementedError: the named implementation does not serve these arrays.
    """
    if q.ndim != 3 or jnp.dtype(q.dtype).name not in _DTYPES:
        raise ValueError(f"decode_attention: q must be [B, Hq, D] of {_DTYPES}, got {q.dtype}{q.shape}")
    batch, query_heads, dim = q.shape
    held = keys.ndim == 4 and keys.shape[0] == batch and keys.shape[1] > 0 and keys.shape[3] == dim
    if not held or query_heads % keys.shape[1] or keys.dtype != q.dtype:
        raise ValueError(
            f"decode_attention: keys must be {q.dtype}[{batch}, Hkv, S, {dim}], Hkv dividing {query_heads}, got "
            f"{keys.dtype}{keys.shape}"
        )
    if values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(
            f"decode_attention: values must be as the keys, {keys.dtype}{keys.shape}, got {values.dtype}{values.shape}"
        )
    if lengths.shape != (batch,) or lengths.dtype != jnp.int32:
        raise ValueError(f"decode_attention: lengths must be int32[{batch}], got {lengths.dtype}{list(lengths.shape)}")
    return dispatch.call(
        "decode_attention", implementation, interpret, q, keys, values, lengths,
        scale=float(scale), out_dtype=out_dtype,
    )  # fmt: skip

"""One decoding step of attention over non-uniformly quantised keys and values (KVQuant: arXiv 2401.18079)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Int32, UInt8, UInt32

from pallas_kernels import dispatch, nuq, packing
from pallas_kernels.exact import ExactTokens, check

_DTYPES = ("float32", "bfloat16", "float16")
_NAME = "nuq_decode_attention"


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
    inverse_frequencies: Sequence[float] | None = None,
    first_position: int | tuple[int, ...] = 0,
    tile_stride: int = 1,
    shard: Int32[Array, ""] | None = None,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    num_splits: int | None = None,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """softmax(scale * q K^T) V over the first lengths[b] tokens of each row, K and V read from their codes.

    Query heads h * G to (h + 1) * G - 1 read KV head h. Channel c of a key is read back as
    key_scale[c] * key_codebook[code] + key_zero[c], a value as s * value_codebook[code] + z with the token's s and z;
    outliers' differences are added; then keys are rotated to their positions (`pallas_kernels.nuq` says how all of it
    is stored).

    Args:
        q: queries after RoPE.
        key_codes, value_codes: a token's codes packed (`packing.pack`), keys' in the order `nuq.pair_order(D)` of
            channels, values' in their own. S is a multiple of `nuq.TILE`, D of 8 and at most `nuq.MAX_DIM`.
        key_scale, key_zero: of each channel.
        key_codebook, value_codebook: 2, 4, 8 or 16 ascending entries; values' count as rounded to bfloat16 for 16-bit
            queries.
        value_scale_zero: (s, z) of each token.
        key_outliers, value_outliers: pools, one a tile of a KV head, of 32-bit words: low half token_in_tile * D +
            channel, high half the float16 difference; 0: empty. No place stands twice. None: no outliers. Differences
            of keys are of keys before RoPE.
        lengths: tokens that count in each row, 0 to S.
        scale: factor on the scores, usually 1/sqrt(D).
        inverse_frequencies: float64 radians per token of each of the D/2 pairs (i, i + D/2), known when compiling;
            None: keys were coded after RoPE and are not rotated. Angles are formed in float64.
        first_position: of the token in slot 0; slot n holds position first_position + n.
        tile_stride, shard: for a cache that holds every `tile_stride`-th tile only: slot n holds the position of slot
            n // TILE * TILE * tile_stride + n % TILE of the whole. With `shard`, first_position[shard] is the first.
        exact: further tokens, attended to as they are in the same softmax (a residual window, sinks), keys after RoPE.
        exact_q: the queries for those; default q.
        num_splits: programs that share a row; None lets the kernel choose. Affects speed and rounding only.
        out_dtype: of the output, which is rounded once.
        implementation: "mosaic_gpu" (16-bit queries, D 64 or 128, 2 to 4 bits, up to 8 query heads a KV head),
            "triton", "xla", or None for the best on the default device.
        interpret: run the Pallas kernel in interpret mode (on a CPU, for tests).

    Returns:
        The normalised output in `out_dtype` and the natural-log log-sum-exp of the scaled scores in float32. Where no
        token counts they are 0 and `split_k.EMPTY`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NotImplementedError: the named implementation does not serve this format.
    """
    _check(q, key_codes, value_codes, lengths)
    batch, heads, tokens = key_codes.shape[:3]
    dim = q.shape[2]
    for name, codes, codebook in (("key", key_codes, key_codebook), ("value", value_codes, value_codebook)):
        _check_codes(name, codes, codebook, dim)
    for name, array in (("key_scale", key_scale), ("key_zero", key_zero)):
        if array.shape != (heads, dim):
            raise ValueError(f"{_NAME}: {name} must be [{heads}, {dim}], got {list(array.shape)}")
    if value_scale_zero.shape != (batch, tokens, 2) or value_scale_zero.dtype != jnp.float16:
        raise ValueError(
            f"{_NAME}: value_scale_zero must be float16[{batch}, {tokens}, 2], got "
            f"{value_scale_zero.dtype}{list(value_scale_zero.shape)}"
        )
    for name, pool in (("key_outliers", key_outliers), ("value_outliers", value_outliers)):
        want = (batch, heads, tokens // nuq.TILE)
        if pool is not None and (pool.ndim != 4 or pool.shape[:3] != want or pool.dtype != jnp.uint32):
            raise ValueError(f"{_NAME}: {name} must be uint32[{want}, slots], got {pool.dtype}{list(pool.shape)}")
    if inverse_frequencies is not None and len(inverse_frequencies) != dim // 2:
        raise ValueError(f"{_NAME}: {dim // 2} inverse_frequencies are wanted, got {len(inverse_frequencies)}")
    negative = min(np.ravel(first_position)) < 0 or tile_stride < 1
    if negative or isinstance(first_position, int) != (shard is None):
        raise ValueError(
            f"{_NAME}: first_position={first_position} (one, or with shard={shard} one for each) and "
            f"tile_stride={tile_stride} cannot be negative"
        )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"{_NAME}: num_splits must be at least 1 or None, got {num_splits}")
    exact_q = q if exact_q is None else exact_q
    check(_NAME, q, heads, exact, exact_q)
    return dispatch.call(
        _NAME, implementation, interpret,
        q, key_codes, value_codes, key_scale, key_zero, key_codebook, value_codebook, value_scale_zero,
        key_outliers, value_outliers, lengths,
        scale=float(scale),
        inverse_frequencies=None if inverse_frequencies is None else tuple(map(float, inverse_frequencies)),
        first_position=first_position, tile_stride=tile_stride, shard=shard, exact=tuple(exact), exact_q=exact_q,
        num_splits=num_splits, out_dtype=out_dtype,
    )  # fmt: skip


def _check(q, key_codes, value_codes, lengths) -> None:
    if q.ndim != 3 or jnp.dtype(q.dtype).name not in _DTYPES:
        raise ValueError(f"{_NAME}: q must be [B, Hq, D] of {_DTYPES}, got {q.dtype}{list(q.shape)}")
    batch, query_heads, dim = q.shape
    if dim % 8 or not 8 <= dim <= nuq.MAX_DIM:
        raise ValueError(f"{_NAME}: D must be a multiple of 8, 8 to {nuq.MAX_DIM}, got {dim}")
    held = key_codes.ndim == 4 and key_codes.shape[0] == batch
    if not held or query_heads % max(1, key_codes.shape[1]) or key_codes.shape[2] % nuq.TILE:
        raise ValueError(
            f"{_NAME}: key_codes must be [{batch}, Hkv, S, bytes], Hkv dividing {query_heads} and {nuq.TILE} dividing "
            f"S, got {list(key_codes.shape)}"
        )
    if value_codes.ndim != 4 or value_codes.shape[:3] != key_codes.shape[:3]:
        raise ValueError(
            f"{_NAME}: value_codes {list(value_codes.shape)} and key_codes {list(key_codes.shape)} must agree in "
            "[B, Hkv, S]"
        )
    if lengths.shape != (batch,) or lengths.dtype != jnp.int32:
        raise ValueError(f"{_NAME}: lengths must be int32[{batch}], got {lengths.dtype}{list(lengths.shape)}")


def _check_codes(name: str, codes, codebook, dim: int) -> None:
    if codes.dtype != jnp.uint8:
        raise ValueError(f"{_NAME}: {name}_codes must be packed in uint8, got {codes.dtype}")
    if codebook.ndim != 1 or codebook.shape[0] not in (2, 4, 8, 16):
        raise ValueError(f"{_NAME}: {name}_codebook must have 2, 4, 8 or 16 entries, got {list(codebook.shape)}")
    bits = codebook.shape[0].bit_length() - 1
    want = packing.num_bytes(dim, bits)
    if codes.shape[3] != want:
        raise ValueError(
            f"{_NAME}: {dim} codes of {bits} bits take {want} bytes a token, got {name}_codes {list(codes.shape)}"
        )

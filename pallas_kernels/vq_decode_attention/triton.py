"""Attention over coded keys and values as a Pallas kernel for NVIDIA GPUs (Triton lowering).

Split-K flash decoding. A program serves one KV head of one batch row and a share of its tokens, a tile of T
tokens at a time, for all query heads of the group (N = 8 or 16, the surplus masked):

- load the tile's codes, as 32-bit words (of 10 and 12 bits: the five or three words that hold 16 or 8 codes);
- look the centroids up, [T, M, d], straight from the codebook (it stays in L1), and view them as [T, D];
- score: keys [T, D] @ q^T [D, N], so that tokens fill the tensor core's wide side and 8 columns do for the
  heads;
- accumulate: online softmax over the tokens, then values^T [D, T] @ weights [T, N];
- store the normalised output and its log-sum-exp; `split_k.merge` joins the splits.

Programs are numbered so that those on one multiprocessor serve one head, as far as there are enough: then its L1 holds
one head's tables. The row's actual length is divided among the splits, so a long, mostly empty cache costs what its
tokens cost, and a split without tokens does nothing. What binds is L1: Triton moves every looked-up tile through shared
memory on its way to the tensor core. One warp a program and one buffering stage measured best on an H100;
benchmarks/kernels.py times the kernel beside cuDNN's attention over a bfloat16 cache.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import dispatch, split_k
from pallas_kernels.exact import ExactTokens, merge_exact, rounded
from pallas_kernels.vq_decode_attention.queries import transform_queries

_HEAD_DIMS = (32, 64, 128, 256)
_SUB_VECTORS = (2, 4, 8)
_MOST_HEADS = 16
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is shaped."""

    tokens: int  # tokens per tile
    heads: int  # query heads per program, padded
    splits: int  # programs that share a row
    columns: int  # programs that are started before a multiprocessor gets its second one
    num_warps: int
    num_stages: int


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
    config: Config | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.vq_decode_attention` for D from 32 to 256, sub-vectors of 2, 4 or 8, groups to 16."""
    batch, query_heads, dim = q.shape
    kv_heads, tokens = key_codes.shape[1:3]
    rows, group = batch * kv_heads, query_heads // max(1, kv_heads)
    _check_supported(dim, group, key_codes, key_codebook)
    _check_supported(dim, group, value_codes, value_codebook)
    q = transform_queries(q, query_scale, query_hadamard, query_map, interpret=interpret)
    if rows * group * tokens == 0:
        nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((batch, query_heads), split_k.EMPTY)
        return rounded(*merge_exact(*nothing, exact_q, exact, scale), out_dtype)

    config = config or choose_config(rows, tokens, dim, group, q.dtype, num_splits)
    waves = -(-rows * config.splits // config.columns)
    output, lse = pl.pallas_call(
        functools.partial(_kernel, kv_heads=kv_heads, tokens=tokens, scale=scale, waves=waves, config=config),
        grid=(waves * config.columns,),
        out_shape=[
            jax.ShapeDtypeStruct((rows, group, config.splits, dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, group, config.splits), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="vq_decode_attention",
    )(
        q.reshape(rows, group, dim),
        _words(key_codes.reshape(rows, tokens, -1), key_codebook, dim),
        _words(value_codes.reshape(rows, tokens, -1), value_codebook, dim),
        key_codebook.astype(q.dtype),
        value_codebook.astype(q.dtype),
        lengths,
    )
    output, lse = split_k.merge(output, lse)
    output, lse = merge_exact(output.reshape(q.shape), lse.reshape(batch, query_heads), exact_q, exact, scale)
    return rounded(output, lse, out_dtype)


def choose_config(rows: int, tokens: int, dim: int, group: int, dtype, num_splits: int | None) -> Config:
    """Tiles of 8,192 elements fill a warp's registers; float32 products, off the tensor cores, need more."""
    half = jnp.dtype(dtype).itemsize == 2
    tile = min(8192 // dim if half else 2048 // dim, max(16, pl.next_power_of_2(tokens)))
    wanted = split_k.num_splits(rows=rows, tokens=tokens, tile=tile, programs=16 * dispatch.multiprocessors())
    heads, splits = 8 if group <= 8 else 16, num_splits or wanted
    columns = min(dispatch.multiprocessors(), rows * splits)
    return Config(tokens=tile, heads=heads, splits=splits, columns=columns, num_warps=1 if half else 4, num_stages=1)


def _check_supported(dim: int, group: int, codes: Array, codebook: Array) -> None:
    _, entries, length = codebook.shape
    if dim not in _HEAD_DIMS or length not in _SUB_VECTORS or group > _MOST_HEADS:
        raise NotImplementedError(
            f"vq_decode_attention: the triton kernel serves D in {_HEAD_DIMS}, d in {_SUB_VECTORS} and up to "
            f"{_MOST_HEADS} query heads a KV head, not D={dim}, d={length}, {group} heads"
        )
    # Offsets inside a Triton kernel are int32 up to 2**32 bytes. Words never get there; packed bytes do.
    if _unit(entries, dim // length) is None and 2**31 < codes.size <= 2**32:
        raise NotImplementedError(f"vq_decode_attention: the triton kernel cannot address codes {codes.shape}")


def _unit(entries: int, count: int) -> tuple[int, int] | None:
    """How many codes fill how many 32-bit words exactly, where they divide the `count` codes of a token."""
    bits = entries.bit_length() - 1
    codes = 32 // math.gcd(32, bits)
    return None if count % codes else (codes, codes * bits // 32)


def _words(codes: UInt8[Array, "R S bytes"], codebook: Array, dim: int) -> Array:
    """Codes viewed as int32 words (no copy) where whole words hold whole codes; others stay bytes."""
    if _unit(codebook.shape[1], dim // codebook.shape[2]) is None:
        return codes
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:2], codes.shape[2] // 4, 4), jnp.int32)


def _kernel(
    q_ref,  # [R, G, D]
    key_codes_ref,  # int32[R, S, words] or uint8[R, S, bytes]
    value_codes_ref,
    key_codebook_ref,  # [Hk, Kk, dk], q's dtype
    value_codebook_ref,
    lengths_ref,  # int32[B]
    output_ref,  # float32[R, G, P, D]
    lse_ref,  # float32[R, G, P]
    *,
    kv_heads: int,
    tokens: int,
    scale: float,
    waves: int,
    config: Config,
):
    # Multiprocessor c has programs c, c + columns, ...: these are given consecutive ranks, and ranks go head by head.
    program, rows = pl.program_id(0), q_ref.shape[0]
    rank = program % config.columns * waves + program // config.columns
    batch = rows // kv_heads
    head, within = rank // (batch * config.splits), rank % (batch * config.splits)
    row, split = within % batch * kv_heads + head, within // batch

    @pl.when(rank < rows * config.splits)
    def _():
        refs = q_ref, key_codes_ref, value_codes_ref, key_codebook_ref, value_codebook_ref, lengths_ref
        _attend(*refs, output_ref, lse_ref, row, split, head, kv_heads, tokens, scale, config)


def _attend(
    q_ref,
    key_codes_ref,
    value_codes_ref,
    key_codebook_ref,
    value_codebook_ref,
    lengths_ref,
    output_ref,
    lse_ref,
    row,
    split,
    head,
    kv_heads: int,
    tokens: int,
    scale: float,
    config: Config,
):
    """One split of one row."""
    group, dim = q_ref.shape[1:]
    heads = jnp.arange(config.heads)
    length = jnp.clip(plt.load(lengths_ref.at[row // kv_heads]), 0, tokens)
    q = plt.load(q_ref.at[row, pl.ds(0, config.heads), :], mask=(heads < group)[:, None], other=0)
    first, last = share(length, split, config.tokens, config.splits)

    def visit(tile, carry):
        at = row, tile * config.tokens, length
        *softmax, output = carry
        codes = _load_codes(key_codes_ref, key_codebook_ref, dim, *at, config)
        scores = _score(look_up(codes, key_codebook_ref, head), q, scale, *at[1:])
        top, total, weights, shrink = _softmax(scores, *softmax)
        codes = _load_codes(value_codes_ref, value_codebook_ref, dim, *at, config)
        values = look_up(codes, value_codebook_ref, head)
        return top, total, output * shrink[None, :] + dot(values.T, weights.astype(values.dtype))

    start = (
        jnp.full((config.heads,), split_k.EMPTY, jnp.float32),
        jnp.zeros((config.heads,), jnp.float32),
        jnp.zeros((dim, config.heads), jnp.float32),
    )
    top, total, output = lax.fori_loop(first, last, visit, start)
    store(output_ref, lse_ref, row, split, top, total, output)


def share(length, split, tile: int, splits: int):
    """The tiles that a split reads: an equal share of those that hold tokens."""
    tiles = (length + tile - 1) // tile
    each = (tiles + splits - 1) // splits
    first = jnp.minimum(split * each, tiles)
    return first, jnp.minimum(first + each, tiles)


def _load_codes(codes_ref, codebook_ref, dim: int, row, start, length, config: Config) -> Array:
    """The codes of T tokens from `start`: int32[T, M]; 0 past `length`, where nothing is read."""
    _, entries, size = codebook_ref.shape
    count, bits = dim // size, entries.bit_length() - 1
    mask = (start + jnp.arange(config.tokens) < length)[:, None]
    unit = _unit(entries, count)
    if unit is None:
        return _unpack(codes_ref, row, start, mask, (config.tokens, count), bits)
    per_unit, words_per_unit = unit
    shape = config.tokens, count // per_unit
    token = jnp.broadcast_to((start + jnp.arange(shape[0]))[:, None], shape)
    first = jnp.broadcast_to((words_per_unit * jnp.arange(shape[1]))[None, :], shape)
    at = jnp.broadcast_to(row, shape), token
    words = [plt.load(codes_ref.at[(*at, first + i)], mask=mask, other=0) for i in range(words_per_unit)]
    if words_per_unit == 1:  # a shift of each element's own is a little faster where it is all
        wide = *shape, per_unit
        shift = jnp.broadcast_to((bits * jnp.arange(per_unit))[None, None, :], wide)
        spread = lax.shift_right_logical(jnp.broadcast_to(words[0][:, :, None], wide), shift)
        return (spread & (entries - 1)).reshape(config.tokens, count)
    codes = [_cut(words, i * bits, bits) for i in range(per_unit)]
    return _interleave(codes).reshape(config.tokens, count)


def _cut(words: list[Array], at: int, bits: int) -> Array:
    """`bits` bits, from bit `at` of the words on."""
    word, bit = divmod(at, 32)
    code = lax.shift_right_logical(words[word], jnp.full_like(words[word], bit)) if bit else words[word]
    if bit + bits > 32:
        code |= words[word + 1] << (32 - bit)
    return code & (2**bits - 1)


def _interleave(parts: list[Array]) -> Array:
    """2^k arrays as one of k more axes of 2, which the parts' index counts up, the last axis fastest."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack([_interleave(parts[::2]), _interleave(parts[1::2])], axis=-1)


def _unpack(codes_ref, row, start, mask, shape: tuple[int, int], bits: int) -> Array:
    """Codes of any width: each from the one to three bytes that it touches."""
    bit = jnp.broadcast_to(jnp.arange(shape[1])[None, :] * bits, shape)
    token = jnp.broadcast_to((start + jnp.arange(shape[0]))[:, None], shape)
    code = jnp.zeros(shape, jnp.int32)
    touched = max((j * bits % 8 + bits + 7) // 8 for j in range(8))
    for i in range(touched):
        byte = bit // 8 + i
        # A code's last byte may lie past the token's bytes when the code does not reach into it.
        exists = mask & (byte < codes_ref.shape[2])
        part = plt.load(codes_ref.at[jnp.broadcast_to(row, shape), token, byte], mask=exists, other=0)
        code |= part.astype(jnp.int32) << (8 * i)
    return (code >> (bit % 8)) & (2**bits - 1)


def look_up(index: Array, codebook_ref, head) -> Array:
    """The centroids of [T, M] codes, as [T, D]."""
    shared, _, size = codebook_ref.shape
    wide = (*index.shape, size)
    element = jnp.broadcast_to(jnp.arange(size)[None, None, :], wide)
    table = jnp.broadcast_to(head if shared > 1 else jnp.int32(0), wide)
    vectors = plt.load(codebook_ref.at[table, jnp.broadcast_to(index[:, :, None], wide), element])
    return vectors.reshape(index.shape[0], index.shape[1] * size)


def dot(a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _score(keys: Array, q: Array, scale: float, start, length) -> Float[Array, "T N"]:
    """Scores in units of log 2, `EMPTY` for tokens that do not count."""
    valid = start + jnp.arange(keys.shape[0]) < length
    return jnp.where(valid[:, None], dot(keys, q.T) * (scale * _LOG2_E), split_k.EMPTY)


def _softmax(scores: Array, top: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    """The online softmax: new maximum and sum, this tile's weights, and the factor on what was summed before.

    Tiles are visited only up to the length, so each holds a token that counts and the new maximum is a real
    score.
    """
    new = jnp.maximum(top, jnp.max(scores, axis=0))
    weights, shrink = jnp.exp2(scores - new[None, :]), jnp.exp2(top - new)
    return new, total * shrink + jnp.sum(weights, axis=0), weights, shrink


def store(output_ref, lse_ref, row, split, top, total, output):
    heads = jnp.arange(top.shape[0])
    exists, some = heads < output_ref.shape[1], total > 0
    safe = jnp.where(some, total, 1.0)
    at = row, pl.ds(0, top.shape[0]), split
    plt.store(output_ref.at[(*at, slice(None))], (output / safe[None, :]).T, mask=exists[:, None])
    lse = jnp.where(some, (top + jnp.log2(safe)) / _LOG2_E, split_k.EMPTY)
    plt.store(lse_ref.at[at], lse, mask=exists)

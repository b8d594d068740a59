"""Attention over non-uniformly quantised keys and values as a Pallas kernel for NVIDIA GPUs (Triton lowering).

Split-K flash decoding as in `pallas_kernels.vq_decode_attention.triton`: a program serves one KV head of one batch row
and a share of its tokens, a tile of T tokens at a time, for all query heads of the group (N = 8 or 16). T divides 64,
so that a tile has one pool of outliers. Tokens fill the tensor core's wide side. What is different:

- Look-ups are of 1, 2 or 4 neighbouring codes at once, in a table of all their combinations made from the codebook.
- RoPE without trigonometry: rotations compose, so the query is turned back by the tile's start and keys are turned by
  their place in the tile, which is the same table for all tiles. The low and the high partners of the pairs are two
  arrays [T, D/2]. The tiles' rotations are composed of a coarse and a fine one. Angles are float64 on the host.
- Values' scales go into the weights; their zeros are a sum of their own for each head.
- Outliers, `Config.slots` at a time, are scattered by products with one-hot matrices. It is the query heads'
  contributions that are scattered, for their columns are few: scores [T, N] += onehot(token) [T, slots] @ contributions
  [slots, N], output [D, N] += onehot(channel) [D, slots] @ (difference * (onehot(token)^T @ weights)) [slots, N].

For 16-bit queries all products are of float16, whatever the query's type: at 11 bits they are finer than bfloat16, and
nothing leaves float16's range unless keys do: queries are scaled to at most 1/2 and a tile's weights to at most 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float16, Float32, Int32, UInt8, UInt32

from pallas_kernels import dispatch, nuq, split_k
from pallas_kernels.exact import ExactTokens, merge_exact, rounded
from pallas_kernels.vq_decode_attention.triton import dot, look_up, share, store

_HEAD_DIMS = (32, 64, 128, 256)
_MOST_HEADS = 16
_LOG2_E = float(np.log2(np.e))
_LOG2_TILE = nuq.TILE.bit_length() - 1
# Fine rotations to a coarse one.
_LOG2_FINE = 6
_FINE = 2**_LOG2_FINE
# Chunks of slots that are written out; more are a loop.
_UNROLLED = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is shaped."""

    tokens: int  # tokens per tile, 16 to 64
    heads: int  # query heads per program, padded
    splits: int  # programs that share a row
    key_codes: int  # keys' codes looked up at once: 1, 2 or 4
    value_codes: int
    slots: int  # outliers scattered at once, at least 16
    num_warps: int
    num_stages: int


class _Turns(NamedTuple):
    """Rotations [..., D/2]: of tiles, `fine[tile % _FINE]` after `coarse[tile // _FINE]`; of places in 64 tokens."""

    coarse_cos: Any
    coarse_sin: Any
    fine_cos: Any
    fine_sin: Any
    cos: Any
    sin: Any


class _Refs(NamedTuple):
    """What the kernel reads; R = B * Hkv."""

    q: Any  # [R, G, D]
    key_codes: Any  # integers [R, S, words]
    value_codes: Any
    key_scale: Any  # float32[Hkv, D]
    key_zero: Any
    key_table: Any  # [1, K^n, n]
    value_table: Any
    value_scale_zero: Any  # float16[B, S, 2]
    key_outliers: Any  # int32[R, tiles, slots] or None
    value_outliers: Any
    lengths: Any  # int32[B]
    eye: Any  # [E, E], the rows of which are one-hot, or None
    turns: _Turns | None


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
    config: Config | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.nuq_decode_attention` for D of 32, 64, 128 or 256 and groups to 16."""
    batch, query_heads, dim = q.shape
    kv_heads, tokens = key_codes.shape[1:3]
    rows, group = batch * kv_heads, query_heads // max(1, kv_heads)
    _check_supported(dim, group)
    if rows * group * tokens == 0:
        nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((batch, query_heads), split_k.EMPTY)
        return rounded(*merge_exact(*nothing, exact_q, exact, scale), out_dtype)

    bits = nuq.bits_of(key_codebook), nuq.bits_of(value_codebook)
    config = config or choose_config(rows, tokens, dim, group, q.dtype, bits, num_splits)
    dtype = jnp.float32 if q.dtype == jnp.float32 else jnp.float16
    turns = None
    if inverse_frequencies is not None:
        turns = _turns(tokens, config.tokens, first_position, tile_stride, shard, inverse_frequencies, dtype)
    refs = _Refs(
        q.reshape(rows, group, dim),
        _words(key_codes),
        _words(value_codes),
        key_scale,
        key_zero,
        nuq.combinations(key_codebook, config.key_codes).astype(dtype),
        nuq.combinations(nuq.value_entries(value_codebook, q.dtype), config.value_codes).astype(dtype),
        value_scale_zero,
        _pools(key_outliers),
        _pools(value_outliers),
        lengths,
        None if key_outliers is value_outliers is None else jnp.eye(max(dim, nuq.TILE), dtype=dtype),
        turns,
    )
    output, lse = pl.pallas_call(
        functools.partial(_kernel, kv_heads=kv_heads, scale=scale, bits=bits, config=config),
        grid=(rows, config.splits),
        out_shape=[
            jax.ShapeDtypeStruct((rows, group, config.splits, dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, group, config.splits), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="nuq_decode_attention",
    )(refs)
    output, lse = split_k.merge(output, lse)
    output, lse = merge_exact(output.reshape(q.shape), lse.reshape(batch, query_heads), exact_q, exact, scale)
    return rounded(output, lse, out_dtype)


def choose_config(
    rows: int, tokens: int, dim: int, group: int, dtype, bits: tuple[int, int], num_splits: int | None
) -> Config:
    """Tiles of 8,192 elements; float32 products, off the tensor cores, need more registers."""
    half = jnp.dtype(dtype).itemsize == 2
    tile, warps = max(16, min(nuq.TILE, (8192 if half else 4096) // dim)), 4
    wanted = split_k.num_splits(rows=rows, tokens=tokens, tile=tile, programs=16 // warps * dispatch.multiprocessors())
    at_once = [4 if width <= 2 else 2 for width in bits]
    return Config(
        tokens=tile,
        heads=8 if group <= 8 else 16,
        splits=num_splits or wanted,
        key_codes=at_once[0],
        value_codes=at_once[1],
        slots=32,
        num_warps=warps,
        num_stages=1,
    )


def _check_supported(dim: int, group: int) -> None:
    if dim not in _HEAD_DIMS or group > _MOST_HEADS:
        raise NotImplementedError(
            f"nuq_decode_attention: the triton kernel serves D in {_HEAD_DIMS} and up to {_MOST_HEADS} query heads a "
            f"KV head, not D={dim}, {group} heads"
        )


def _unit(run: int, bits: int) -> int:
    """How many codes are cut from a word together, of a run of `run` codes: a word full, or three bytes full."""
    return min(run, 8 if bits == 3 else 32 // bits)


def _words(codes: UInt8[Array, "B Hkv S bytes"]) -> Int32[Array, "R S words"]:
    """Codes viewed as signed words (no copy)."""
    *_, tokens, size = codes.shape
    return lax.bitcast_convert_type(codes.reshape(-1, tokens, size // 4, 4), jnp.int32)


def _pools(words: UInt32[Array, "B Hkv tiles slots"] | None) -> Int32[Array, "R tiles slots"] | None:
    if words is None or words.shape[3] == 0:
        return None
    return lax.bitcast_convert_type(words.reshape(-1, *words.shape[2:]), jnp.int32)


def _turns(
    tokens: int,
    tile: int,
    first_position: int | tuple[int, ...],
    tile_stride: int,
    shard: Array | None,
    inverse_frequencies: tuple[float, ...],
    dtype,
) -> _Turns:
    tiles = -(-tokens // tile)
    coarse, fine = (
        nuq.positions_of(slots, tile_stride)
        for slots in (np.arange(-(-tiles // _FINE)) * _FINE * tile, np.arange(_FINE) * tile)
    )
    return _Turns(
        *nuq.turns_of_first(first_position, shard, coarse, inverse_frequencies),
        *(jnp.asarray(x) for x in nuq.angles(fine, inverse_frequencies)),
        *(jnp.asarray(x, dtype) for x in nuq.angles(np.arange(nuq.TILE), inverse_frequencies)),
    )


def _kernel(
    refs: _Refs,
    output_ref,  # float32[R, G, P, D]
    lse_ref,  # float32[R, G, P]
    *,
    kv_heads: int,
    scale: float,
    bits: tuple[int, int],
    config: Config,
):
    row, split = pl.program_id(0), pl.program_id(1)
    batch, head = row // kv_heads, row % kv_heads
    dim = refs.q.shape[2]
    dtype = refs.value_table.dtype
    length = jnp.clip(plt.load(refs.lengths.at[batch]), 0, refs.value_scale_zero.shape[1])
    query = _load_query(refs.q, row, config.heads)
    unscaled = query.size * (scale * _LOG2_E)
    half = [jnp.arange(dim // 2) + part for part in (0, dim // 2)]
    affine = [(load(refs.key_scale, head, c), load(refs.key_zero, head, c)) for c in half]

    def visit(tile, carry):
        top, total, zeros, output = carry
        start = tile * config.tokens
        token = start + jnp.arange(config.tokens)
        valid = token < length

        keys = [
            look_up(_key_codes(refs.key_codes, row, token, valid, part, dim, bits[0], config.key_codes),
                    refs.key_table, 0).astype(jnp.float32) * s[None, :] + z[None, :]
            for part, (s, z) in enumerate(affine)
        ]  # fmt: skip
        queries = [query.low, query.high]
        if refs.turns is not None:
            keys = _turn(keys, *_in_tile(refs.turns, config.tokens))
            cos, sin = _of_tile(refs.turns, tile)
            queries = _turn(queries, cos, -sin)
        low, high = (dot(k.astype(dtype), x.astype(dtype).T) for k, x in zip(keys, queries, strict=True))
        scores = low + high
        if refs.key_outliers is not None:
            scores = _each(
                refs.key_outliers, config.slots, scores,
                lambda slot, sums: sums + _key_outliers(refs, row, start, length, slot, query, dtype, config),
            )  # fmt: skip
        scores = jnp.where(valid[:, None], scores * unscaled[None, :], split_k.EMPTY)

        # The tile's weights are of its own maximum, so that the largest of them is 1.
        tile_top = jnp.max(scores, axis=0)
        weights = jnp.exp2(scores - tile_top[None, :])
        new = jnp.maximum(top, tile_top)
        shrink, grow = jnp.exp2(top - new), jnp.exp2(tile_top - new)
        s, z = (load(refs.value_scale_zero, batch, token, i, mask=valid).astype(jnp.float32) for i in (0, 1))
        codes = _value_codes(refs.value_codes, row, token, valid, dim, bits[1], config.value_codes)
        values = look_up(codes, refs.value_table, 0)
        part = dot(values.T, (weights * s[:, None]).astype(dtype))
        if refs.value_outliers is not None:
            thin = weights.astype(dtype)
            part = _each(
                refs.value_outliers, config.slots, part,
                lambda slot, sums: sums + _value_outliers(refs, row, start, length, slot, thin, config),
            )  # fmt: skip
        total = total * shrink + jnp.sum(weights, axis=0) * grow
        zeros = zeros * shrink + jnp.sum(weights * z[:, None], axis=0) * grow
        return new, total, zeros, output * shrink[None, :] + part * grow[None, :]

    nothing = jnp.zeros((config.heads,), jnp.float32)
    before = nothing + split_k.EMPTY, nothing, nothing, jnp.zeros((dim, config.heads), jnp.float32)
    first, last = share(length, split, config.tokens, config.splits)
    top, total, zeros, output = lax.fori_loop(first, last, visit, before)
    store(output_ref, lse_ref, row, split, top, total, output + zeros[None, :])


def load(ref, *index, mask=None) -> Array:
    """Elements at indices that broadcast against each other; 0 where masked."""
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in index))
    at = tuple(jnp.broadcast_to(jnp.int32(i), shape) for i in index)
    return plt.load(ref.at[at]) if mask is None else plt.load(ref.at[at], mask=mask, other=0)


class _Query(NamedTuple):
    """The query heads of a row, each divided by `size`, which leaves at most 1/2."""

    low: Float[Array, "N half"]
    high: Float[Array, "N half"]
    size: Float[Array, "N"]


def _load_query(q_ref, row, count: int) -> _Query:
    group, dim = q_ref.shape[1:]
    head, channel = jnp.arange(count)[:, None], jnp.arange(dim // 2)[None, :]
    low, high = (
        load(q_ref, row, head, channel + part, mask=head < group).astype(jnp.float32) for part in (0, dim // 2)
    )
    largest = jnp.maximum(jnp.max(jnp.abs(low), axis=1), jnp.max(jnp.abs(high), axis=1))
    size = jnp.where(largest > 0, 2 * largest, 1.0)
    return _Query(low / size[:, None], high / size[:, None], size)


def _in_tile(turns: _Turns, tokens: int) -> tuple[Array, Array]:
    """Rotations of the tokens of a tile by their place in it: the compiler keeps them from tile to tile."""
    token, pair = jnp.arange(tokens)[:, None], jnp.arange(turns.cos.shape[1])[None, :]
    return load(turns.cos, token, pair), load(turns.sin, token, pair)


def _of_tile(turns: _Turns, tile, pair: Array | None = None) -> tuple[Array, Array]:
    """The rotation of a tile's start, of all pairs or those named."""
    pair = jnp.arange(turns.cos.shape[1]) if pair is None else pair
    coarse = [load(ref, tile >> _LOG2_FINE, pair) for ref in (turns.coarse_cos, turns.coarse_sin)]
    fine = [load(ref, tile & (_FINE - 1), pair) for ref in (turns.fine_cos, turns.fine_sin)]
    return _compose(coarse, fine)


def _compose(a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, Array]:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _turn(halves: Sequence[Array], cos: Array, sin: Array) -> list[Array]:
    """Both partners of the pairs, rotated; cos and sin [T, D/2] or [D/2]."""
    low, high = halves
    return [low * cos - high * sin, high * cos + low * sin]


def _key_codes(ref, row, token: Array, valid: Array, part: int, dim: int, bits: int, at_once: int) -> Array:
    """Of the low (part 0) or high (1) partners: [T, D/2/n] indices of n codes each."""
    eighth = dim // 8
    unit = _unit(eighth, bits)
    in_pair_order = lambda channel: channel + (channel // eighth + part) * eighth  # noqa: E731
    return _codes(ref, row, token, valid, in_pair_order, dim // 2, unit, bits, at_once)


def _value_codes(ref, row, token: Array, valid: Array, dim: int, bits: int, at_once: int) -> Array:
    return _codes(ref, row, token, valid, lambda channel: channel, dim, _unit(dim, bits), bits, at_once)


def _codes(
    ref, row, token: Array, valid: Array, place: Callable[[Any], Any], count: int, unit: int, bits: int, at_once: int
) -> Array:
    """Indices of `at_once` codes each, of `count` codes that are stored in units, which start at `place`."""
    straddles = bool((place(np.arange(0, count, unit)) * bits % 32 + unit * bits > 32).any())
    start = place(jnp.arange(count // unit) * unit) * bits
    first, offset = start // 32, start % 32
    word = load(ref, row, token[:, None], first[None, :], mask=valid[:, None])
    shift = jnp.broadcast_to(offset[None, :], word.shape)
    if unit * bits < 32:
        cut = lax.shift_right_logical(word, shift)
        if straddles:  # units that end in the next word
            more = valid[:, None] & (offset + unit * bits > 32)[None, :]
            cut |= (load(ref, row, token[:, None], first[None, :] + 1, mask=more) << 1) << (31 - shift)
        word = cut
    wide = (*word.shape, unit // at_once)
    shift = jnp.broadcast_to((bits * at_once * jnp.arange(wide[2]))[None, None, :], wide)
    spread = lax.shift_right_logical(jnp.broadcast_to(word[:, :, None], wide), shift)
    return (spread & (2 ** (bits * at_once) - 1)).reshape(wide[0], wide[1] * wide[2])


def _each(pools, size: int, start: Array, add: Callable[[Any, Array], Array]) -> Array:
    """`add(first_slot, sums)` of all slots of a pool, `size` at a time."""
    chunks = -(-pools.shape[2] // size)
    if chunks > _UNROLLED:
        return lax.fori_loop(0, chunks, lambda i, sums: add(i * size, sums), start)
    for i in range(chunks):
        start = add(i * size, start)
    return start


def _load_outliers(ref, row, start, length, slot, dim: int, size: int) -> tuple[Array, Array, Array]:
    """Token in the tile's pool, channel and difference of some slots; a difference of 0 for what does not count."""
    index, pool = slot + jnp.arange(size), start >> _LOG2_TILE
    word = load(ref, row, pool, index, mask=index < ref.shape[2])
    place = word & 0xFFFF
    token, channel = place >> (dim.bit_length() - 1), place & (dim - 1)
    high = lax.shift_right_logical(word, jnp.full_like(word, 16)).astype(jnp.int16)
    difference = lax.bitcast_convert_type(high, jnp.float16).astype(jnp.float32)
    counts = (token < nuq.TILE) & (pool * nuq.TILE + token < length)
    return token & (nuq.TILE - 1), channel, jnp.where(counts, difference, 0.0)


def _one_hot(eye_ref, index: Array, start, count: int) -> Array:
    """[slots, count]: 1 where an index less `start` is the column's. Read, in long words, rather than compared."""
    return load(eye_ref, index[:, None], start + jnp.arange(count)[None, :])


def _within_pool(start, tokens: int):
    """A tile's start in its pool, in terms that tell the compiler what divides it."""
    return 0 if tokens == nuq.TILE else ((start & (nuq.TILE - 1)) // tokens) * tokens


def _key_outliers(refs: _Refs, row, start, length, slot, query: _Query, dtype, config: Config) -> Array:
    """What some outliers add to the scores [T, N] of the query as it is divided."""
    group, dim = refs.q.shape[1:]
    token, channel, difference = _load_outliers(refs.key_outliers, row, start, length, slot, dim, config.slots)
    head = jnp.arange(config.heads)[None, :]
    x = load(refs.q, row, head, channel[:, None], mask=head < group).astype(jnp.float32)
    if refs.turns is not None:
        # An element of a rotated key meets the query rotated back: the element's own channel and its partner's.
        pair = channel & (dim // 2 - 1)
        partner = load(refs.q, row, head, (channel ^ (dim // 2))[:, None], mask=head < group).astype(jnp.float32)
        within = [load(table, token, pair).astype(jnp.float32) for table in (refs.turns.cos, refs.turns.sin)]
        pool_start = (start >> _LOG2_TILE) * (nuq.TILE // config.tokens)
        cos, sin = _compose(_of_tile(refs.turns, pool_start, pair), within)
        x = x * cos[:, None] + partner * jnp.where(channel < dim // 2, sin, -sin)[:, None]
    contributions = x / query.size[None, :] * difference[:, None]
    one_hot = _one_hot(refs.eye, token, _within_pool(start, config.tokens), config.tokens)
    return dot(one_hot.T, contributions.astype(dtype))


def _value_outliers(refs: _Refs, row, start, length, slot, weights: Array, config: Config) -> Array:
    """What some outliers add to the output [D, N], from the weights [T, N]."""
    dim, dtype = refs.q.shape[2], weights.dtype
    token, channel, difference = _load_outliers(refs.value_outliers, row, start, length, slot, dim, config.slots)
    of_slot = dot(_one_hot(refs.eye, token, _within_pool(start, config.tokens), config.tokens), weights)
    weighted = (of_slot * difference[:, None]).astype(dtype)
    return dot(_one_hot(refs.eye, channel, 0, dim).T, weighted)

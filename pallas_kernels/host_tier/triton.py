"""The operations of `pallas_kernels.host_tier` as Pallas kernels for NVIDIA GPUs (Triton lowering).

A kernel reads pinned host memory over the bus like memory of its own: only what is asked for travels, and nothing is
copied twice. A few programs fill the bus. `fetch_channels` therefore starts few, so that on a stream of its own it
leaves the multiprocessors to what runs beside it.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import split_k
from pallas_kernels.exact import ExactTokens
from pallas_kernels.vq_decode_attention.triton import dot, store

_LOG2_E = float(np.log2(np.e))
_HEAD_DIMS = (16, 32, 64, 128, 256)
_MOST_HEADS = 16
# Bytes that a program has under way at a time, and programs: together what the bus's latency asks for, and some.
_FETCHED_BYTES, _FETCHING = 16384, 16
# Tokens whose scores a program makes; tokens that one looks at at a time in choosing; rows that one attends to.
_SCORED, _SEARCHED, _ATTENDED = 1024, 8192, 32
# Steps of the search for the threshold, each of which leaves a quarter of the range.
_MOST_STEPS = 12
# A Triton kernel's offsets are int32 up to this many bytes of an array.
_NARROW = 2**32


def fetch_channels(
    by_channel: Shaped[Array, "B Hkv N S"], channels: Int32[Array, "B Hkv c"], *, interpret: bool = False
) -> Shaped[Array, "B Hkv c S"]:
    """`pallas_kernels.fetch_channels`."""
    batch, kv_heads, held, tokens = by_channel.shape
    _check_addresses("fetch_channels", by_channel)
    rows, count = batch * kv_heads, channels.shape[2]
    block = min(_FETCHED_BYTES // by_channel.dtype.itemsize, pl.next_power_of_2(tokens))
    fetched = pl.pallas_call(
        functools.partial(_fetch, block=block),
        grid=(min(_FETCHING, rows * count * pl.cdiv(tokens, block)),),
        out_shape=jax.ShapeDtypeStruct((rows * count, tokens), by_channel.dtype),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="fetch_channels",
    )(by_channel.reshape(rows, held, tokens), channels.reshape(rows, count))
    return fetched.reshape(batch, kv_heads, count, tokens)


def _fetch(
    by_channel_ref,  # [R, N, S], on the host
    channels_ref,  # int32[R, c]
    fetched_ref,  # [R * c, S]
    *,
    block: int,
):
    count, tokens = channels_ref.shape[1], fetched_ref.shape[1]
    pieces = pl.cdiv(tokens, block)
    program, programs = pl.program_id(0), pl.num_programs(0)

    def copy(i, _):
        piece = program + i * programs
        line, start = piece // pieces, piece % pieces * block
        channel = plt.load(channels_ref.at[line // count, line % count])
        at = start + jnp.arange(block)
        there = at < tokens
        plt.store(
            fetched_ref.at[line, at], plt.load(by_channel_ref.at[line // count, channel, at], mask=there), mask=there
        )

    total = fetched_ref.shape[0] * pieces
    lax.fori_loop(0, (total - program + programs - 1) // programs, copy, None)


def select_tokens(
    q: Float[Array, "B Hq D"],
    fetched: Float[Array, "B Hkv c S"],
    channels: Int32[Array, "B Hkv c"],
    count: Int32[Array, "B"],
    *,
    tokens: int,
    interpret: bool = False,
) -> Int32[Array, "B Hkv k"]:
    """`pallas_kernels.select_tokens`; scores nearer than a millionth of their range may stand for each other."""
    batch, kv_heads, _, size = fetched.shape
    rows = batch * kv_heads
    mean = jnp.mean(q.astype(jnp.float32).reshape(batch, kv_heads, -1, q.shape[-1]), axis=2)
    critical = jnp.take_along_axis(mean, channels, axis=-1).reshape(rows, -1)
    scores = pl.pallas_call(
        _score,
        grid=(rows, pl.cdiv(size, _SCORED)),
        out_shape=jax.ShapeDtypeStruct((rows, size), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="score_tokens",
    )(critical, fetched.reshape(rows, -1, size))
    block = min(_SEARCHED, pl.next_power_of_2(size))
    chosen = pl.pallas_call(
        functools.partial(_choose, kv_heads=kv_heads, tokens=tokens, block=block),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=16 if block >= 4096 else 4, num_stages=1),
        interpret=interpret,
        name="choose_tokens",
    )(scores, count)
    return chosen.reshape(batch, kv_heads, tokens)


def _score(
    critical_ref,  # float32[R, c]
    fetched_ref,  # [R, c, S]
    scores_ref,  # float32[R, S]
):
    row = pl.program_id(0)
    at = pl.program_id(1) * _SCORED + jnp.arange(_SCORED)
    there = at < scores_ref.shape[1]
    scores = jnp.zeros((_SCORED,), jnp.float32)
    for i in range(critical_ref.shape[1]):
        channel = plt.load(fetched_ref.at[row, jnp.int32(i), at], mask=there, other=0).astype(jnp.float32)
        scores += plt.load(critical_ref.at[row, jnp.int32(i)]) * channel
    plt.store(scores_ref.at[row, at], scores, mask=there)


def _choose(
    scores_ref,  # float32[R, S]
    count_ref,  # int32[B]
    chosen_ref,  # int32[R, k]
    *,
    kv_heads: int,
    tokens: int,
    block: int,
):
    """The k largest of a row, by a search for a threshold that k scores reach."""
    row, size = pl.program_id(0), scores_ref.shape[1]
    count = jnp.clip(plt.load(count_ref.at[row // kv_heads]), 0, size)
    wanted = jnp.minimum(tokens, count)
    blocks = (count + block - 1) // block

    def part(i, other: float):
        at = i * block + jnp.arange(block)
        return at, plt.load(scores_ref.at[row, at], mask=at < count, other=other)

    def bounds(i, carry):
        low, high = carry
        return jnp.minimum(low, jnp.min(part(i, jnp.inf)[1])), jnp.maximum(high, jnp.max(part(i, -jnp.inf)[1]))

    low, high = lax.fori_loop(0, blocks, bounds, (jnp.float32(jnp.inf), jnp.float32(-jnp.inf)))

    # `low` is reached by at least `wanted` scores and `over` of them reach `sure`, less than `wanted`.
    def unsettled(carry):
        step, reach, *_ = carry
        return (step < _MOST_STEPS) & (reach > wanted)

    def narrow(carry):
        step, reach, over, low, high, sure = carry
        thresholds = [low + (high - low) * (j / 4) for j in (1, 2, 3)]

        def reaching(i, counts):
            scores = part(i, -jnp.inf)[1]
            return tuple(n + jnp.sum((scores >= t).astype(jnp.int32)) for n, t in zip(counts, thresholds, strict=True))

        counts = lax.fori_loop(0, blocks, reaching, (jnp.int32(0),) * 3)
        for n, t in zip(counts, thresholds, strict=True):
            enough = n >= wanted
            low, reach = jnp.where(enough, t, low), jnp.where(enough, n, reach)
        for n, t in zip(counts[::-1], thresholds[::-1], strict=True):
            few = n < wanted
            high, sure, over = jnp.where(few, t, high), jnp.where(few, t, sure), jnp.where(few, n, over)
        return step + 1, reach, over, low, high, sure

    start = jnp.int32(0), count, jnp.int32(0), low, high, jnp.float32(jnp.inf)
    _, _, over, low, _, sure = lax.while_loop(unsettled, narrow, start)

    # First those that reach `sure`, then of those that reach `low` as many as there is room for.
    def write(i, carry):
        surely, perhaps = carry
        at, scores = part(i, -jnp.inf)
        first = (scores >= sure) & (at < count)
        second = (scores >= low) & (at < count) & ~first
        place = jnp.where(first, surely + _before(first), over + perhaps + _before(second))
        written = (first | second) & (place < wanted)
        plt.store(chosen_ref.at[row, jnp.where(written, place, tokens)], at.astype(jnp.int32), mask=written)
        return surely + jnp.sum(first.astype(jnp.int32)), perhaps + jnp.sum(second.astype(jnp.int32))

    lax.fori_loop(0, blocks, write, (jnp.int32(0), jnp.int32(0)))
    place = jnp.arange(pl.next_power_of_2(tokens))
    nothing = jnp.full(place.shape, -1, jnp.int32)
    unused = (place >= wanted) & (place < tokens)
    plt.store(chosen_ref.at[row, pl.ds(0, place.size)], nothing, mask=unused)


def _before(flags: Array) -> Array:
    """How many flags stand before each place."""
    ones = flags.astype(jnp.int32)
    return jnp.cumsum(ones) - ones


def attend_rows(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv S D"],
    values: Float[Array, "B Hkv S D"],
    rows: Int32[Array, "B Hkv k"],
    exact: Sequence[ExactTokens],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float32[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """`pallas_kernels.attend_rows` for D from 16 to 256, a power of two, and groups to 16."""
    batch, query_heads, dim = q.shape
    kv_heads, tokens, count = keys.shape[1], keys.shape[2], rows.shape[2]
    group, flat = query_heads // kv_heads, batch * kv_heads
    if dim not in _HEAD_DIMS or group > _MOST_HEADS:
        raise NotImplementedError(
            f"attend_rows: the triton kernel serves D in {_HEAD_DIMS} and up to {_MOST_HEADS} query heads a KV head, "
            f"not D={dim}, {group} heads"
        )
    _check_addresses("attend_rows", keys)
    held = [tokens for tokens in exact if tokens.keys.shape[2]]
    sizes = [count, *(tokens.keys.shape[2] for tokens in held)]
    ends = np.cumsum([pl.cdiv(size, _ATTENDED) for size in sizes]).tolist()
    if not flat * group * ends[-1]:
        return jnp.zeros(q.shape, jnp.float32), jnp.full((batch, query_heads), split_k.EMPTY)
    windows = [
        (part.keys.reshape(flat, -1, dim), part.values.reshape(flat, -1, dim), part.valid.astype(jnp.int8))
        for part in held
    ]
    output, lse = pl.pallas_call(
        functools.partial(_attend, kv_heads=kv_heads, scale=scale, ends=ends),
        grid=(flat, ends[-1]),
        out_shape=[
            jax.ShapeDtypeStruct((flat, group, ends[-1], dim), jnp.float32),
            jax.ShapeDtypeStruct((flat, group, ends[-1]), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attend_rows",
    )(
        q.reshape(flat, group, dim),
        keys.reshape(flat, tokens, dim),
        values.reshape(flat, tokens, dim),
        rows.reshape(flat, count),
        windows,
    )
    output, lse = split_k.merge(output, lse)
    return output.reshape(q.shape), lse.reshape(batch, query_heads)


def _attend(
    q_ref,  # [R, G, D]
    keys_ref,  # [R, S, D], on the host
    values_ref,
    rows_ref,  # int32[R, k]
    windows,  # keys [R, W, D], values and int8[B, W], on the device; for each set of exact tokens
    output_ref,  # float32[R, G, P, D]
    lse_ref,  # float32[R, G, P]
    *,
    kv_heads: int,
    scale: float,
    ends: list[int],
):
    """One program has at most `_ATTENDED` tokens of one set: the chosen rows, or exact ones."""
    row, split = pl.program_id(0), pl.program_id(1)
    group, dim = q_ref.shape[1:]
    heads = jnp.arange(8 if group <= 8 else 16)
    q = plt.load(q_ref.at[row, pl.ds(0, heads.size), :], mask=(heads < group)[:, None], other=0)

    def attend(keys_ref, values_ref, at, there):
        place = jnp.broadcast_to(row, (_ATTENDED, dim)), *_grid(jnp.where(there, at, 0), dim)
        keys, values = (plt.load(ref.at[place], mask=there[:, None], other=0) for ref in (keys_ref, values_ref))
        scores = jnp.where(there[:, None], dot(keys.astype(q.dtype), q.T) * (scale * _LOG2_E), split_k.EMPTY)
        top = jnp.max(scores, axis=0)
        weights = jnp.where(there[:, None], jnp.exp2(scores - top[None, :]), 0.0)
        output = dot(values.T, weights.astype(values.dtype))
        store(output_ref, lse_ref, row, split, top, jnp.sum(weights, axis=0), output)

    @pl.when(split < ends[0])
    def _():
        place = split * _ATTENDED + jnp.arange(_ATTENDED)
        at = plt.load(rows_ref.at[row, place], mask=place < rows_ref.shape[1], other=-1)
        attend(keys_ref, values_ref, at, at >= 0)

    for (first, end), (window_keys, window_values, valid_ref) in zip(itertools.pairwise(ends), windows, strict=True):

        @pl.when((split >= first) & (split < end))
        def _(first=first, window_keys=window_keys, window_values=window_values, valid_ref=valid_ref):
            at = (split - first) * _ATTENDED + jnp.arange(_ATTENDED)
            valid = plt.load(valid_ref.at[row // kv_heads, at], mask=at < valid_ref.shape[1], other=0)
            attend(window_keys, window_values, at, valid != 0)


def _grid(at: Array, dim: int) -> tuple[Array, Array]:
    """Indices of whole rows of `dim` elements."""
    shape = at.shape[0], dim
    return jnp.broadcast_to(at[:, None], shape), jnp.broadcast_to(jnp.arange(dim)[None, :], shape)


def _check_addresses(operation: str, held: Array) -> None:
    if held.size > 2**31 and held.size * held.dtype.itemsize <= _NARROW:
        raise NotImplementedError(f"{operation}: the triton kernel cannot address {held.dtype}{list(held.shape)}")

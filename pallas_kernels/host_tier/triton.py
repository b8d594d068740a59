"""The operations of `pallas_kernels.host_tier` as Pallas kernels for NVIDIA GPUs (Triton lowering).

A kernel reads pinned host memory over the bus like memory of its own: only what is asked for travels, and nothing is
copied twice. A few programs fill the bus. `fetch_channels` therefore starts few: on a stream of its own it leaves the
multiprocessors to what runs beside it.
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
from pallas_kernels.host_tier.reference import critical_elements
from pallas_kernels.vq_decode_attention.triton import dot, store

_LOG2_E = float(np.log2(np.e))
_HEAD_DIMS = (16, 32, 64, 128, 256)
_MOST_HEADS = 16
# Bytes that a program has under way at a time, and all programs: what the bus's latency asks for, and some.
_FETCHED_BYTES, _UNDER_WAY = 2**14, 2**18
# Tokens whose scores a program makes; most that one chooses from; rows that one attends to.
_SCORED, _IN_REGISTERS, _ATTENDED = 1024, 32768, 32
# Steps of the search for the threshold, each of which leaves a third of the range.
_MOST_STEPS = 14
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
        grid=(min(_UNDER_WAY // (block * by_channel.dtype.itemsize), rows * count * pl.cdiv(tokens, block)),),
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


def channel_lse(
    q: Float[Array, "B Hq D"],
    fetched: Float[Array, "B Hkv c S"],
    channels: Int32[Array, "B Hkv c"],
    count: Int32[Array, "B"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float32[Array, "B Hq"]:
    """`pallas_kernels.channel_lse`: of each tile of tokens by a program, then of the tiles."""
    batch, kv_heads, _, size = fetched.shape
    rows, tiles = batch * kv_heads, pl.cdiv(size, _SCORED)
    critical = _critical(q, channels, scale)
    shape = jax.ShapeDtypeStruct((rows, critical.shape[1], tiles), jnp.float32)
    peaks, sums = pl.pallas_call(
        functools.partial(_tile_lse, kv_heads=kv_heads),
        grid=(rows, tiles),
        out_shape=[shape, shape],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="channel_lse",
    )(critical, fetched.reshape(rows, -1, size), count)
    peak = jnp.max(peaks, axis=-1)
    lse = (peak + jnp.log2(jnp.sum(sums * jnp.exp2(peaks - peak[..., None]), axis=-1))) / _LOG2_E
    # Tiles and rows without any token that counts have EMPTY for a peak, in powers of two.
    return jnp.where(peak > split_k.EMPTY, lse, split_k.EMPTY).reshape(q.shape[:2])


def _tile_lse(
    critical_ref,  # float32[R, G, c], in powers of two
    fetched_ref,  # [R, c, S]
    count_ref,  # int32[B]
    peaks_ref,  # float32[R, G, tiles]
    sums_ref,  # float32[R, G, tiles]
    *,
    kv_heads: int,
):
    row, tile = pl.program_id(0), pl.program_id(1)
    at = tile * _SCORED + jnp.arange(_SCORED)
    counts = at < plt.load(count_ref.at[row // kv_heads])
    for g, scores in enumerate(_head_scores(critical_ref, fetched_ref, row, at)):
        scores = jnp.where(counts & ~jnp.isnan(scores), scores, split_k.EMPTY)
        peak = jnp.max(scores)
        plt.store(peaks_ref.at[row, jnp.int32(g), tile], peak)
        plt.store(sums_ref.at[row, jnp.int32(g), tile], jnp.sum(jnp.exp2(scores - peak)))


def _head_scores(critical_ref, fetched_ref, row, at) -> list[Float32[Array, "tokens"]]:
    """Of the tokens `at`, for each query head."""
    _, heads, channels = critical_ref.shape
    scores = [jnp.zeros(at.shape, jnp.float32)] * heads
    for i in range(channels):
        channel = plt.load(fetched_ref.at[row, jnp.int32(i), at], mask=at < fetched_ref.shape[2], other=0)
        channel = channel.astype(jnp.float32)
        scores = [
            s + plt.load(critical_ref.at[row, jnp.int32(g), jnp.int32(i)]) * channel for g, s in enumerate(scores)
        ]
    return scores


def _critical(q: Float[Array, "B Hq D"], channels: Int32[Array, "B Hkv c"], scale: float) -> Float32[Array, "R G c"]:
    """These channels of each query head, so that their products are scores in powers of two."""
    critical = critical_elements(q, channels)
    if critical.shape[2] > _MOST_HEADS:
        raise NotImplementedError(f"the triton kernel serves up to {_MOST_HEADS} query heads a KV head")
    return (scale * _LOG2_E * critical).reshape(-1, *critical.shape[2:])


def select_tokens(
    q: Float[Array, "B Hq D"],
    fetched: Float[Array, "B Hkv c S"],
    channels: Int32[Array, "B Hkv c"],
    count: Int32[Array, "B"],
    *,
    tokens: int,
    scale: float | None = None,
    lse: Float32[Array, "B Hq"] | None = None,
    interpret: bool = False,
) -> Int32[Array, "B Hkv k"]:
    """`pallas_kernels.select_tokens`; scores nearer than a millionth of their range may stand for each other.

    The k best tokens lie in the k runs of tokens whose best is best. So first runs are chosen by their maxima, then
    tokens of those runs; both are few enough to stay in one program's registers.
    """
    batch, kv_heads, _, size = fetched.shape
    rows = batch * kv_heads
    run, runs = _runs(size, tokens)
    if scale is None or lse is None:
        mean = jnp.mean(critical_elements(q, channels), axis=2)
        critical, lses = mean.reshape(rows, 1, -1), jnp.zeros((rows, 1), jnp.float32)
    else:
        critical, lses = _critical(q, channels, scale), _LOG2_E * lse.reshape(rows, -1)
    scores, best = pl.pallas_call(
        functools.partial(_score, kv_heads=kv_heads, run=run),
        grid=(rows, pl.cdiv(size, _SCORED)),
        out_shape=[
            jax.ShapeDtypeStruct((rows, size), jnp.float32),
            jax.ShapeDtypeStruct((rows, runs), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="score_tokens",
    )(critical, lses, fetched.reshape(rows, -1, size), count)

    def choose(kernel, chosen: int, considered: int, *arrays):
        return pl.pallas_call(
            functools.partial(kernel, kv_heads=kv_heads, run=run),
            grid=(rows,),
            out_shape=jax.ShapeDtypeStruct((rows, chosen), jnp.int32),
            compiler_params=plt.CompilerParams(num_warps=_warps(considered), num_stages=1),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(*arrays, count)

    chosen_runs = choose(_choose_runs, min(tokens, runs), runs, best)
    chosen = choose(_choose_tokens, tokens, chosen_runs.shape[1] * run, chosen_runs, scores)
    return chosen.reshape(batch, kv_heads, tokens)


def _warps(considered: int) -> int:
    """Warps for a program that chooses from so many in registers: a power of two, as Triton asks."""
    return min(max(pl.next_power_of_2(considered) // 512, 4), 16)


def _runs(size: int, tokens: int) -> tuple[int, int]:
    """Tokens of a run, and runs: those and the tokens of k runs are at most `_IN_REGISTERS`."""
    run = 2
    while run < _SCORED and pl.cdiv(size, run) > min(_IN_REGISTERS, 4 * tokens * run):
        run *= 2
    runs = pl.cdiv(size, run)
    if max(runs, pl.next_power_of_2(min(tokens, runs)) * run) > _IN_REGISTERS:
        raise NotImplementedError(f"select_tokens: the triton kernel cannot choose {tokens} of {size} tokens")
    return run, runs


def _score(
    critical_ref,  # float32[R, G, c]; one query for the mean of all
    lse_ref,  # float32[R, G], in powers of two
    fetched_ref,  # [R, c, S]
    count_ref,  # int32[B]
    scores_ref,  # float32[R, S]
    best_ref,  # float32[R, runs]
    *,
    kv_heads: int,
    run: int,
):
    row, first = pl.program_id(0), pl.program_id(1) * _SCORED
    at = first + jnp.arange(_SCORED)
    there = at < scores_ref.shape[1]
    of_heads = _head_scores(critical_ref, fetched_ref, row, at)
    of_heads = [s - plt.load(lse_ref.at[row, jnp.int32(g)]) for g, s in enumerate(of_heads)]
    scores = of_heads[0]
    if len(of_heads) > 1:
        peak = functools.reduce(jnp.maximum, of_heads)
        scores = peak + jnp.log2(sum(jnp.exp2(s - peak) for s in of_heads))
    counts = (at < plt.load(count_ref.at[row // kv_heads])) & ~jnp.isnan(scores)
    scores = jnp.where(counts, scores, -jnp.inf)
    plt.store(scores_ref.at[row, at], scores, mask=there)
    best = jnp.max(scores.reshape(_SCORED // run, run), axis=1)
    place = first // run + jnp.arange(_SCORED // run)
    plt.store(best_ref.at[row, place], best, mask=place < best_ref.shape[1])


def _choose_runs(
    best_ref,  # float32[R, runs]
    count_ref,  # int32[B]
    chosen_ref,  # int32[R, k]
    *,
    kv_heads: int,
    run: int,
):
    row = pl.program_id(0)
    at = jnp.arange(pl.next_power_of_2(best_ref.shape[1]))
    best = plt.load(best_ref.at[row, at], mask=at < best_ref.shape[1], other=-jnp.inf)
    count = plt.load(count_ref.at[row // kv_heads])
    _choose(best, at, jnp.clip((count + run - 1) // run, 0, best_ref.shape[1]), chosen_ref, row)


def _choose_tokens(
    runs_ref,  # int32[R, runs]
    scores_ref,  # float32[R, S]
    count_ref,  # int32[B]
    chosen_ref,  # int32[R, k]
    *,
    kv_heads: int,
    run: int,
):
    row, (size, runs) = pl.program_id(0), (scores_ref.shape[1], runs_ref.shape[1])
    place = jnp.arange(pl.next_power_of_2(runs))
    chosen = plt.load(runs_ref.at[row, place], mask=place < runs, other=-1)
    shape = place.shape[0], run
    at = jnp.broadcast_to((chosen * run)[:, None], shape) + jnp.broadcast_to(jnp.arange(run)[None, :], shape)
    at = jnp.where(jnp.broadcast_to((chosen >= 0)[:, None], shape), at, size).reshape(shape[0] * run)
    scores = plt.load(scores_ref.at[row, jnp.minimum(at, size - 1)], mask=at < size, other=-jnp.inf)
    _choose(scores, at, jnp.clip(plt.load(count_ref.at[row // kv_heads]), 0, size), chosen_ref, row)


def _choose(scores: Float32[Array, "N"], names: Int32[Array, "N"], count, chosen_ref, row):
    """Writes the names of the k largest scores of those above -inf, of which there are `count` or at least k; then -1.

    A search for a threshold that k scores reach: each step counts those that reach two values within the range.
    """
    tokens = chosen_ref.shape[1]
    real = scores > -jnp.inf
    wanted = jnp.minimum(jnp.minimum(tokens, count), jnp.sum(real.astype(jnp.int32)))
    start_low = jnp.min(jnp.where(real, scores, jnp.inf))
    start_high = jnp.max(scores)

    def reaching(threshold):
        return jnp.sum((real & (scores >= threshold)).astype(jnp.int32))

    # At least `wanted` scores reach `low`; `over` of them, fewer than `wanted`, reach `sure`.
    def unsettled(carry):
        step, reach, *_ = carry
        return (step < _MOST_STEPS) & (reach > wanted)

    def narrow(carry):
        step, reach, over, low, high, sure = carry
        lower, upper = low + (high - low) * (1 / 3), low + (high - low) * (2 / 3)
        more, fewer = reaching(lower), reaching(upper)
        low, reach = jnp.where(more >= wanted, lower, low), jnp.where(more >= wanted, more, reach)
        low, reach = jnp.where(fewer >= wanted, upper, low), jnp.where(fewer >= wanted, fewer, reach)
        few = fewer < wanted
        high, sure, over = jnp.where(few, upper, high), jnp.where(few, upper, sure), jnp.where(few, fewer, over)
        few = more < wanted
        high, sure, over = jnp.where(few, lower, high), jnp.where(few, lower, sure), jnp.where(few, more, over)
        return step + 1, reach, over, low, high, sure

    start = jnp.int32(0), reaching(start_low), jnp.int32(0), start_low, start_high, jnp.float32(jnp.inf)
    _, _, over, low, _, sure = lax.while_loop(unsettled, narrow, start)

    # First those that reach `sure`, then of those that reach `low` as many as there is room for.
    first = real & (scores >= sure)
    second = real & (scores >= low) & ~first
    place = jnp.where(first, _before(first), over + _before(second))
    written = (first | second) & (place < wanted)
    plt.store(chosen_ref.at[row, jnp.where(written, place, tokens)], names, mask=written)
    place = jnp.arange(pl.next_power_of_2(tokens))
    nothing = jnp.full(place.shape, -1, jnp.int32)
    unused = (place >= wanted) & (place < tokens)
    plt.store(chosen_ref.at[row, pl.ds(0, place.shape[0])], nothing, mask=unused)


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

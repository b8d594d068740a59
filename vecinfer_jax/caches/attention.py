"""Attention over keys and values held as arrays: the exact part of every method, and the strict evaluation.

No S x S buffer: queries are taken in blocks, and what a chunk of prompt reads from a cache is taken in blocks of
slots, so what is in memory beside the cache does not grow with it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import ExactTokens, split_k
from pallas_kernels.exact import attend_exactly, product
from vecinfer_jax.caches import stripes
from vecinfer_jax.caches.base import NO_AXES, MeshAxes
from vecinfer_jax.caches.cudnn import cudnn_attention, cudnn_serves, partial_cudnn_attention

QUERY_BLOCK = 256
# Slots of a cache that a chunk of prompt reads at a time, fewer where one of these would be exceeded: elements of the
# block's keys [B, Hkv, slots, D], and of the scores [B, Hq, queries, slots].
KEY_BLOCK = 4096
BLOCK_ELEMENTS = 2**26
SCORE_ELEMENTS = 2**26
# Slots that it reads at a time where cuDNN serves.
LATER_BLOCK = 16384
# The same of a decoding step.
DECODE_ELEMENTS = 2**22
MASKED = -1e30


class Tokens(NamedTuple):
    """Keys (after RoPE) and values [B, Hkv, N, D] with the position each slot holds, int32[B, N]; -1: nothing."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array


def join_tokens(*parts: Tokens) -> Tokens:
    """All slots of several sets, side by side."""
    return Tokens(
        jnp.concatenate([p.keys for p in parts], axis=2),
        jnp.concatenate([p.values for p in parts], axis=2),
        jnp.concatenate([p.positions for p in parts], axis=1),
    )


def scores(q: Float[Array, "B T Hq D"], k: Float[Array, "B Hkv S D"], scale: float) -> Float[Array, "B Hkv G T S"]:
    """Scaled float32 scores, query heads grouped by their KV head."""
    b, t, hq, d = q.shape
    grouped = q.reshape(b, t, k.shape[1], hq // k.shape[1], d)
    return scale * product("bthgd,bhsd->bhgts", grouped, k)


def combine(p: Float[Array, "B Hkv G T S"], v: Float[Array, "B Hkv S D"]) -> Float[Array, "B T Hq D"]:
    """Weights times values, in float32."""
    out = product("bhgts,bhsd->bthgd", p.astype(v.dtype), v)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def partial_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B Hkv S D"],
    v: Float[Array, "B Hkv S D"],
    valid: Bool[Array, "B S"],
    scale: float,
) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
    """One query a sequence over the valid slots: normalised float32 output and log-sum-exp, ready to be merged.

    With no valid slot: output 0, log-sum-exp -1e30.
    """
    return attend_exactly(q, ExactTokens(k, v, valid), scale)


def causal_attention(
    q: Float[Array, "B N Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    lengths: Int[Array, "B"],
    scale: float,
    axes: MeshAxes = NO_AXES,
) -> Float[Array, "B N Hq D"]:
    """Exact attention of a prompt over itself; rows at and beyond `lengths` are padding (finite, meaningless).

    Where `axes` splits it, k and v are the whole prompt's and q this device's share (`stripes.prompt_share`).
    """
    pieces = stripes.prompt_pieces(axes)
    if cudnn_serves(q) and pieces > 1:
        firsts = stripes.prompt_share(jnp.arange(pieces)[None] * (k.shape[1] // pieces), axes)[0]
        parts = zip(jnp.split(q, 2, axis=1), firsts, strict=True)
        return jnp.concatenate([_cudnn_piece(part, k, v, lengths, first, scale) for part, first in parts], axis=1)
    if cudnn_serves(q):
        return cudnn_attention(q, k, v, lengths, scale, causal=True)
    positions = jnp.arange(k.shape[1])
    readable = positions[None, :] < lengths[:, None]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(rows: Int[Array, "1 R"], q_rows: jax.Array) -> jax.Array:
        mask = (positions[None, :] <= rows[0, :, None])[None] & readable[:, None, :]
        s = jnp.where(mask[:, None, None], scores(q_rows, k, scale), MASKED)
        return combine(jax.nn.softmax(s, axis=-1), v).astype(q.dtype)

    return by_query_blocks(block, stripes.prompt_share(positions[None], axes), q)


def _cudnn_piece(
    q: Float[Array, "B N Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    lengths: Int[Array, "B"],
    first: Int[Array, ""],
    scale: float,
) -> Float[Array, "B N Hq D"]:
    """Causal attention of the tokens first .. first + N - 1 of a prompt: over those before, and over themselves."""
    own_k, own_v = (jax.lax.dynamic_slice_in_dim(x, first, q.shape[1], axis=1) for x in (k, v))
    here = jnp.clip(lengths - first, 0, q.shape[1])
    before = partial_cudnn_attention(q, k, v, jnp.minimum(lengths, first), scale)
    own = partial_cudnn_attention(q, own_k, own_v, here, scale, causal=True)
    return _merged(before, own)[0].astype(q.dtype)


def _merged(*parts: tuple[jax.Array, jax.Array]) -> tuple[Float32[Array, "*rows Hq D"], Float32[Array, "*rows Hq"]]:
    """Outputs and log-sum-exps over different tokens, made one."""
    outputs, lses = zip(*parts, strict=True)
    return split_k.merge(jnp.stack(outputs, axis=-2), jnp.stack(lses, axis=-1))


class Coded(NamedTuple):
    """Tokens of a cache in the order of their slots, of which the first `there` of a row are there.

    read(start, size): keys (after RoPE) and values [B, size, Hkv, D] of the slots start .. start + size - 1; size is
    static, start a multiple of `multiple`.
    """

    read: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    slots: int
    there: Int[Array, "B"]
    multiple: int = 1


def later_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    lengths: Int[Array, "B"],
    exact: Tokens | None,
    coded: Coded,
    scale: float,
) -> Float[Array, "B T Hq D"]:
    """Exact attention of a later chunk of a prompt where cuDNN serves: over itself (k and v, `lengths` of them), over
    tokens before it that are held as arrays, and over those in the cache, a block of slots at a time."""
    part = _merged(partial_cudnn_attention(q, k, v, lengths, scale, causal=True))
    if exact is not None and exact.positions.shape[1]:
        keys, values, count = _front(exact)
        part = _merged(part, partial_cudnn_attention(q, keys.astype(q.dtype), values.astype(q.dtype), count, scale))
    b, heads, dim = k.shape[0], k.shape[2], k.shape[3]
    most = min(LATER_BLOCK, max(BLOCK_ELEMENTS // (b * heads * dim), 128))
    block = min(coded.slots, max(most // coded.multiple, 1) * coded.multiple)

    def step(i: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last block starts early where the slots are no multiple of it; what was read before goes to its end.
        start = jnp.minimum(i * block, coded.slots - block)
        keys, values = (jnp.roll(x.astype(q.dtype), start - i * block, axis=1) for x in coded.read(start, block))
        count = jnp.clip(coded.there - i * block, 0, block - (i * block - start))
        return _merged(part, partial_cudnn_attention(q, keys, values, count, scale))

    blocks = (jnp.minimum(jnp.max(coded.there), coded.slots) + block - 1) // block
    return jax.lax.fori_loop(0, blocks, step, part)[0].astype(q.dtype)


def _front(tokens: Tokens) -> tuple[Float[Array, "B W Hkv D"], Float[Array, "B W Hkv D"], Int[Array, "B"]]:
    """The tokens that are there, before slots without one, and how many they are; W is a multiple of 64."""
    width = tokens.positions.shape[1]
    there = jnp.pad(tokens.positions >= 0, ((0, 0), (0, -width % 64)))
    order = jnp.argsort(~there, axis=1)
    keys, values = (
        jnp.take_along_axis(x, jnp.minimum(order, width - 1)[:, None, :, None], axis=2).swapaxes(1, 2)
        for x in (tokens.keys, tokens.values)
    )
    return keys, values, jnp.sum(there, axis=1).astype(jnp.int32)


class Source(NamedTuple):
    """Tokens that queries read a block of slots at a time, so that memory does not grow with how many there are.

    read(start, size): the slots start .. start + size - 1; size is static, start a multiple of `multiple`.
    slots:    how many slots there are, a multiple of `multiple`.
    used:     int32[], no slot from here on holds anything; blocks beyond it are not read.
    sees(s, t, boundary): whether a query at position t reads position s from this source.
    shards:   how many devices' slots a read returns, side by side.
    """

    read: Callable[[jax.Array, int], Tokens]
    slots: int
    used: jax.Array
    sees: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    multiple: int = 1
    shards: int = 1

    def block(self, elements_per_slot: int) -> int:
        """Slots read at a time."""
        most = min(KEY_BLOCK, max(BLOCK_ELEMENTS // max(elements_per_slot, 1), 128)) // self.shards
        return min(self.slots, max(most // self.multiple, 1) * self.multiple)


def source_of(tokens: Tokens, sees: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> Source:
    """A source of tokens held as arrays."""
    slots = tokens.keys.shape[2]

    def read(start: jax.Array, size: int) -> Tokens:
        if size == slots:
            return tokens
        return Tokens(
            jax.lax.dynamic_slice_in_dim(tokens.keys, start, size, axis=2),
            jax.lax.dynamic_slice_in_dim(tokens.values, start, size, axis=2),
            jax.lax.dynamic_slice_in_dim(tokens.positions, start, size, axis=1),
        )

    return Source(read, slots, jnp.int32(slots), sees)


def blockwise_attention(
    q: Float[Array, "B T Hq D"],
    positions: Int[Array, "B T"],
    boundary: Int[Array, "B T"],
    sources: Sequence[Source],
    num_kv_heads: int,
    scale: float,
) -> Float[Array, "B T Hq D"]:
    """Many queries over several sources at once: an online softmax over blocks of slots, by blocks of queries.

    `boundary` is one more number a query, for the sources' `sees`. A query that reads nothing gets something finite.
    """
    b, t, hq, d = q.shape
    sources = [source for source in sources if source.slots]
    blocks = [source.block(b * num_kv_heads * d) for source in sources]
    widest = max(block * source.shards for block, source in zip(blocks, sources, strict=True))
    size = min(t, QUERY_BLOCK, max(SCORE_ELEMENTS // (b * hq * widest), 16))
    count = -(-t // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, count, size, *x.shape[2:]), 1, 0)

    queries = split(q), split(positions), split(boundary)
    state = (b, num_kv_heads, hq // num_kv_heads, size)
    # Per query: the largest score so far, the sum of exp(score - largest), and that of those times the values. The
    # largest array's zeros are made of the queries: XLA makes those of constants for all layers of a program at once.
    zeros = jnp.isnan(queries[0]).astype(jnp.float32).reshape(count, b, size, *state[1:3], d)
    carry = (
        jnp.full((count, *state), MASKED, jnp.float32),
        jnp.zeros((count, *state), jnp.float32),
        jnp.moveaxis(zeros, 2, 4),
    )

    def fold(tokens: Tokens, sees: Callable[..., jax.Array], carry: tuple) -> tuple:
        def fold_rows(args: tuple) -> tuple:
            (q_rows, t, first), (top, total, out) = args
            held = tokens.positions[:, None, :]
            see = (held >= 0) & (held <= t[:, :, None]) & sees(held, t[:, :, None], first[:, :, None])
            s = jnp.where(see[:, None, None], scores(q_rows, tokens.keys, scale), MASKED)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            # Before the first readable token this is exp(0) for every masked one; `fade` then forgets it all.
            p = jnp.exp(s - new_top[..., None])
            fade = jnp.exp(top - new_top)
            products = product("bhgts,bhsd->bhgtd", p.astype(tokens.values.dtype), tokens.values)
            return new_top, total * fade + jnp.sum(p, axis=-1), out * fade[..., None] + products

        if count == 1:
            one = fold_rows(jax.tree.map(lambda x: x[0], (queries, carry)))
            return jax.tree.map(lambda x: x[None], one)
        return jax.lax.map(fold_rows, (queries, carry))

    for source, block in zip(sources, blocks, strict=True):
        if block == source.slots:
            carry = fold(source.read(jnp.int32(0), block), source.sees, carry)
            continue

        def step(i: jax.Array, carry: tuple, source: Source = source, block: int = block) -> tuple:
            # The last block starts early where the slots are no multiple of it; what was read already is masked.
            start = jnp.minimum(i * block, source.slots - block)
            tokens = source.read(start, block)
            new = jnp.tile(start + jnp.arange(block) >= i * block, source.shards)
            return fold(tokens._replace(positions=jnp.where(new, tokens.positions, -1)), source.sees, carry)

        carry = jax.lax.fori_loop(0, (jnp.minimum(source.used, source.slots) + block - 1) // block, step, carry)

    _, total, out = carry
    out = (out / jnp.maximum(total, 1e-37)[..., None]).astype(q.dtype)  # [blocks, B, Hkv, G, size, D]
    return jnp.transpose(out, (1, 0, 4, 2, 3, 5)).reshape(b, count * size, hq, d)[:, :t]


def coded_attention(
    q: Float[Array, "B Hq D"],
    read: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
    slots: int,
    count: Int[Array, "B"],
    num_kv_heads: int,
    scale: float,
    multiple: int = 1,
) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
    """One query a sequence over the first `count` coded slots: float32 output and log-sum-exp, ready to be merged.

    read(start, size) gives keys and values [B, Hkv, size, D] of a block of slots; start and size are multiples of
    `multiple`. Only one block of them exists at a time, and those beyond the longest row are not read.
    """
    b, hq, d = q.shape
    most = max(DECODE_ELEMENTS // max(b * num_kv_heads * d, 1), 128)
    block = min(slots, max(most // multiple, 1) * multiple)

    def part(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(i * block, slots - block)
        at = start + jnp.arange(block)
        valid = (at >= i * block) & (at < count[:, None])
        return partial_attention(q, *read(start, block), valid, scale)

    if block == slots:
        return part(jnp.int32(0))

    def step(i: jax.Array, carry: tuple) -> tuple:
        return _merged(carry, part(i))

    start = jnp.zeros((b, hq, d), jnp.float32), jnp.full((b, hq), split_k.EMPTY, jnp.float32)
    return jax.lax.fori_loop(0, (jnp.minimum(jnp.max(count), slots) + block - 1) // block, step, start)


def by_query_blocks(
    block: Callable[..., jax.Array], *queries: jax.Array, size: int = QUERY_BLOCK
) -> Float[Array, "B T Hq D"]:
    """Runs `block` over blocks of `size` rows (axis 1 of every array of `queries`) and joins the outputs."""
    t = queries[0].shape[1]
    if t <= size:
        return block(*queries)
    padded = -(-t // size) * size

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padded - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda blocks: block(*blocks), tuple(split(x) for x in queries))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], padded, *out.shape[3:])[:, :t]

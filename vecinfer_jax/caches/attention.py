"""Attention over keys and values held as arrays: the exact part of every method, and the strict evaluation.

No S x S buffer: queries are taken in blocks, so memory grows with the context, not with its square.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK = 256
MASKED = -1e30


def _highest(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


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


def no_tokens(like: Float[Array, "B Hkv S D"]) -> Tokens:
    """A set without slots, to stand beside one like that."""
    nothing = like[:, :, :0]
    return Tokens(nothing, nothing, jnp.zeros((like.shape[0], 0), jnp.int32))


def scores(q: Float[Array, "B T Hq D"], k: Float[Array, "B Hkv S D"], scale: float) -> Float[Array, "B Hkv G T S"]:
    """Scaled float32 scores, query heads grouped by their KV head."""
    b, t, hq, d = q.shape
    grouped = q.reshape(b, t, k.shape[1], hq // k.shape[1], d)
    return scale * jnp.einsum(
        "bthgd,bhsd->bhgts", grouped, k, precision=_highest(q), preferred_element_type=jnp.float32
    )


def combine(p: Float[Array, "B Hkv G T S"], v: Float[Array, "B Hkv S D"]) -> Float[Array, "B T Hq D"]:
    """Weights times values, in float32."""
    out = jnp.einsum(
        "bhgts,bhsd->bthgd", p.astype(v.dtype), v, precision=_highest(v), preferred_element_type=jnp.float32
    )
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
    s = jnp.where(valid[:, None, None, None, :], scores(q[:, None], k, scale), MASKED)
    top = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.where(valid[:, None, None, None, :], jnp.exp(s - top), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-37)), MASKED)
    out = combine(p / jnp.maximum(total, 1e-37), v)[:, 0]
    return out, lse.reshape(q.shape[:2])


def cudnn_serves(q: Float[Array, "*batch D"]) -> bool:
    """Whether cuDNN's flash attention runs on this device for queries like these."""
    return jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    lengths: Int[Array, "B"],
    scale: float,
) -> Float[Array, "B T Hq D"]:
    """Exact attention of a prompt over itself; rows at and beyond `lengths` are padding (finite, meaningless)."""
    if cudnn_serves(q):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            key_value_seq_lengths=lengths.astype(jnp.int32),
            query_seq_lengths=lengths.astype(jnp.int32),
            implementation="cudnn",
        )
    positions = jnp.arange(q.shape[1])
    readable = positions[None, :] < lengths[:, None]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(rows: Int[Array, "1 R"], q_rows: jax.Array) -> jax.Array:
        mask = (positions[None, :] <= rows[0, :, None])[None] & readable[:, None, :]
        s = jnp.where(mask[:, None, None], scores(q_rows, k, scale), MASKED)
        return combine(jax.nn.softmax(s, axis=-1), v).astype(q.dtype)

    return by_query_blocks(block, positions[None], q)


def mixed_attention(
    q: Float[Array, "B T Hq D"],
    positions: Int[Array, "B T"],
    boundary: Int[Array, "B T"],
    exact: Tokens,
    coded: Tokens,
    *,
    sink: int,
    scale: float,
) -> Float[Array, "B T Hq D"]:
    """Many queries, each reading some tokens exactly and the others from their codes.

    The query at position t reads position s <= t from `exact` if s < sink or s >= boundary (of that query), else
    from `coded`. With boundary = t - residual + 1 this is what decoding at t would read.
    """
    in_exact, in_coded = exact.positions[:, None, :], coded.positions[:, None, :]
    num_exact = exact.keys.shape[2]

    def block(t: Int[Array, "B R"], first_exact: Int[Array, "B R"], q_rows: jax.Array) -> jax.Array:
        t, first_exact = t[:, :, None], first_exact[:, :, None]
        see_exact = (in_exact >= 0) & (in_exact <= t) & ((in_exact < sink) | (in_exact >= first_exact))
        see_coded = (in_coded >= sink) & (in_coded <= t) & (in_coded < first_exact)
        see = jnp.concatenate([see_exact, see_coded], axis=-1)[:, None, None]
        s = [scores(q_rows, exact.keys, scale), scores(q_rows, coded.keys, scale)]
        p = jax.nn.softmax(jnp.where(see, jnp.concatenate(s, axis=-1), MASKED), axis=-1)
        out = combine(p[..., :num_exact], exact.values) + combine(p[..., num_exact:], coded.values)
        return out.astype(q.dtype)

    return by_query_blocks(block, positions, boundary, q)


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

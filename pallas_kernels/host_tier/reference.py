"""The operations of `pallas_kernels.host_tier` in plain JAX.

XLA on a GPU refuses a gather whose operand lies in host memory: rows are gathered by the host's own processor
(`compute_on`) and come to the device in one copy.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import split_k
from pallas_kernels.exact import ExactTokens, attend_exactly, merge_exact, product

HOST = jax.memory.Space.Host
DEVICE = jax.memory.Space.Device


def fetch_channels(
    by_channel: Shaped[Array, "B Hkv N S"], channels: Int32[Array, "B Hkv c"], *, interpret: bool = False
) -> Shaped[Array, "B Hkv c S"]:
    """The meaning of `pallas_kernels.fetch_channels`."""
    return fetch_rows(by_channel, channels)


def channel_lse(
    q: Float[Array, "B Hq D"],
    fetched: Float[Array, "B Hkv c S"],
    channels: Int32[Array, "B Hkv c"],
    count: Int32[Array, "B"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float32[Array, "B Hq"]:
    """The meaning of `pallas_kernels.channel_lse`."""
    scores = scale * product("bhgc,bhcs->bhgs", critical_elements(q, channels), fetched.astype(jnp.float32))
    counts = (jnp.arange(scores.shape[-1]) < count[:, None, None, None]) & ~jnp.isnan(scores)
    lse = jax.nn.logsumexp(jnp.where(counts, scores, -jnp.inf), axis=-1)
    return jnp.maximum(lse, split_k.EMPTY).reshape(q.shape[:2])


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
    """The meaning of `pallas_kernels.select_tokens`; here the best come first."""
    return best_rows(token_scores(q, fetched, channels, scale, lse), count, tokens)


def token_scores(
    q: Float[Array, "B Hq D"],
    fetched: Float[Array, "B Hkv c S"],
    channels: Int32[Array, "B Hkv c"],
    scale: float | None = None,
    lse: Float32[Array, "B Hq"] | None = None,
) -> Float32[Array, "B Hkv S"]:
    """Those by which tokens are selected; scale and lse: both or neither."""
    critical, fetched = critical_elements(q, channels), fetched.astype(jnp.float32)
    if scale is None or lse is None:
        return product("bhc,bhcs->bhs", jnp.mean(critical, axis=2), fetched)
    weights = scale * product("bhgc,bhcs->bhgs", critical, fetched) - lse.reshape(*critical.shape[:3], 1)
    return jax.nn.logsumexp(weights, axis=2)


def critical_elements(q: Float[Array, "B Hq D"], channels: Int32[Array, "B Hkv c"]) -> Float32[Array, "B Hkv G c"]:
    """These channels of the query heads of each KV head."""
    batch, kv_heads = channels.shape[:2]
    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, -1, q.shape[-1])
    return jnp.take_along_axis(grouped, channels[:, :, None], axis=-1)


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
    """The meaning of `pallas_kernels.attend_rows`."""
    there = jnp.maximum(rows, 0)
    return attend_fetched(q, fetch_rows(keys, there), fetch_rows(values, there), rows, exact, scale)


def attend_fetched(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv k D"],
    values: Float[Array, "B Hkv k D"],
    rows: Int32[Array, "B Hkv k"],
    exact: Sequence[ExactTokens],
    scale: float,
) -> tuple[Float32[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """`attend_rows` once the rows are on the device. Every head has its own tokens, so heads stand as sequences."""
    batch, query_heads, dim = q.shape
    kv_heads = keys.shape[1]
    keys, values = (x.reshape(batch * kv_heads, 1, -1, dim) for x in (keys, values))
    alone = ExactTokens(keys, values, rows.reshape(batch * kv_heads, -1) >= 0)
    output, lse = attend_exactly(q.reshape(batch * kv_heads, -1, dim), alone, scale)
    return merge_exact(output.reshape(q.shape), lse.reshape(batch, query_heads), q, exact, scale)


def best_rows(scores: Float32[Array, "B Hkv S"], count: Int32[Array, "B"], tokens: int) -> Int32[Array, "B Hkv k"]:
    """The `tokens` of the first count[b] with the largest scores, best first; -1 where there are fewer."""
    counts = jnp.arange(scores.shape[-1]) < count[:, None, None]
    _, rows = jax.lax.top_k(jnp.where(counts, scores, -jnp.inf), tokens)
    there = jnp.arange(tokens) < count[:, None, None]
    return jnp.where(there, rows, -1).astype(jnp.int32)


def fetch_rows(held: Shaped[Array, "B Hkv N W"], rows: Int32[Array, "B Hkv n"]) -> Shaped[Array, "B Hkv n W"]:
    """held[b, h, rows[b, h, i]] on the device, wherever `held` lies; rows are from 0 to N - 1."""

    def gather(held: Array, rows: Array) -> Array:
        take = jax.vmap(jax.vmap(lambda table, index: table.at[index].get(mode="promise_in_bounds")))
        return take(held, rows)

    if jax.typeof(held).memory_space != HOST:
        return gather(held, rows)
    on_host = compute_on(gather, compute_type="device_host", out_memory_spaces=DEVICE)
    return on_host(held, jax.device_put(rows, HOST))

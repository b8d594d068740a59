"""A cache that lies in pinned host memory: fetch what says which tokens matter, choose them, attend to just those.

TailorKV (arXiv 2505.19586, section 3.3). Keys and values lie in host memory as [B, Hkv, S, D], a token's contiguous,
and the keys a second time as [B, Hkv, D, S], a channel's contiguous. A step fetches a few channels of all tokens
(`fetch_channels`, which waits for nothing but a predicted query and so may run beside the layer before), scores all
tokens by them (`select_tokens`), and fetches the whole keys and values of the best alone (`attend_rows`).

Arrays of the host tier are of memory kind `pinned_host` (`jax.memory.Space.Host` in a trace); all others, and all
results, are on the device. The same arrays on the device give the same results.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import dispatch
from pallas_kernels.exact import ExactTokens, check


def fetch_channels(
    by_channel: Shaped[Array, "B Hkv N S"],
    channels: Int32[Array, "B Hkv c"],
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Shaped[Array, "B Hkv c S"]:
    """The named channels of every token, from the host to the device; or any named rows of a table there.

    out[b, h, i] = by_channel[b, h, channels[b, h, i]].

    Args:
        by_channel: on the host, a channel's S elements contiguous (of any type: keys, or bytes of codes).
        channels: which to fetch, each from 0 to N - 1.
        implementation: "xla", or None for the best on the default device.
        interpret: choose what runs on a CPU.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    if channels.ndim != 3 or channels.shape[:2] != by_channel.shape[:2] or channels.dtype != jnp.int32:
        raise ValueError(
            f"fetch_channels: channels must be int32{[*by_channel.shape[:2], 'c']} for {by_channel.shape}, got "
            f"{channels.dtype}{list(channels.shape)}"
        )
    return dispatch.call("fetch_channels", implementation, interpret, by_channel, channels)


def channel_lse(
    q: Float[Array, "B Hq D"],
    fetched: Float[Array, "B Hkv c S"],
    channels: Int32[Array, "B Hkv c"],
    count: Int32[Array, "B"],
    *,
    scale: float,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float32[Array, "B Hq"]:
    """Of each query head, the natural-log log-sum-exp of its scores with all tokens over some channels.

    The score of token s for query head h * G + g is scale * sum over i of q[b, h * G + g, channels[b, h, i]] *
    fetched[b, h, i, s], in float32. With it `select_tokens` knows what weight each head would give a token.

    Args:
        scale: factor on the scores, usually 1/sqrt(D). The others are those of `select_tokens`.

    Returns:
        [B, Hq]; `split_k.EMPTY` where count[b] is 0.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    _check_scored("channel_lse", q, fetched, channels, count)
    return dispatch.call("channel_lse", implementation, interpret, q, fetched, channels, count, scale=float(scale))


def select_tokens(
    q: Float[Array, "B Hq D"],
    fetched: Float[Array, "B Hkv c S"],
    channels: Int32[Array, "B Hkv c"],
    count: Int32[Array, "B"],
    *,
    tokens: int,
    scale: float | None = None,
    lse: Float32[Array, "B Hq"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Int32[Array, "B Hkv k"]:
    """The tokens whose keys have the largest product with the query over some channels.

    Score of token s for KV head h: sum over i of mean_g(q[b, h * G + g, channels[b, h, i]]) * fetched[b, h, i, s], in
    float32, the mean over the G query heads that read the KV head. With `lse`, instead, the sum over these heads of
    exp(score - lse[b, h * G + g]), the scores being those of `channel_lse`: of the weights that they would give it.

    Args:
        q: queries, as the keys were rotated.
        fetched: what `fetch_channels` gave for `channels`.
        channels: distinct channels of each KV head, 0 to D - 1.
        count: tokens that count in each row, 0 to S.
        tokens: how many to choose for each KV head, 1 or more.
        scale, lse: both or neither; of each head's scores, as `channel_lse` takes and gives them; or, where tokens are
            spread over several devices, their log-sum-exp over all of them.
        implementation, interpret: as of `fetch_channels`.

    Returns:
        [B, Hkv, k], k = min(tokens, S): distinct rows 0 to count[b] - 1 of each KV head, in any order, and after them
        -1 in the places for which there are no tokens (count[b] < k). Of equal scores any may be chosen.

    Raises:
        ValueError: shapes or dtypes that do not belong together; tokens below 1.
    """
    _check_scored("select_tokens", q, fetched, channels, count)
    if (lse is None) != (scale is None):
        raise ValueError("select_tokens: give scale and lse together, as channel_lse takes and gives them")
    if lse is not None and (lse.shape != q.shape[:2] or lse.dtype != jnp.float32):
        raise ValueError(f"select_tokens: lse must be float32{list(q.shape[:2])}, got {lse.dtype}{list(lse.shape)}")
    if tokens < 1:
        raise ValueError(f"select_tokens: tokens={tokens} must be 1 or more")
    asked = q, fetched, channels, count
    most = min(tokens, fetched.shape[3])
    scale = None if scale is None else float(scale)
    return dispatch.call("select_tokens", implementation, interpret, *asked, tokens=most, scale=scale, lse=lse)


def _check_scored(
    name: str,
    q: Float[Array, "B Hq D"],
    fetched: Float[Array, "B Hkv c S"],
    channels: Int32[Array, "B Hkv c"],
    count: Int32[Array, "B"],
) -> None:
    """Raises ValueError where these do not belong together."""
    batch, kv_heads = fetched.shape[:2]
    if q.ndim != 3 or q.shape[0] != batch or q.shape[1] % kv_heads:
        raise ValueError(f"{name}: q must be [{batch}, G * {kv_heads}, D] for {fetched.shape}, got {q.shape}")
    for argument, x, want in (("channels", channels, fetched.shape[:3]), ("count", count, (batch,))):
        if x.shape != want or x.dtype != jnp.int32:
            raise ValueError(f"{name}: {argument} must be int32{list(want)}, got {x.dtype}{list(x.shape)}")


def attend_rows(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv S D"],
    values: Float[Array, "B Hkv S D"],
    rows: Int32[Array, "B Hkv k"],
    exact: Sequence[ExactTokens] = (),
    *,
    scale: float,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float32[Array, "B Hq D"], Float32[Array, "B Hq"]]:
    """softmax(scale * q K^T) V over some tokens of the host tier, each KV head its own, and exact tokens on the device.

    Query heads h * G to (h + 1) * G - 1 read KV head h. Nothing but the named rows is fetched.

    Args:
        q: queries.
        keys, values: on the host, of one dtype.
        rows: distinct tokens of each KV head, 0 to S - 1; -1: none.
        exact: tokens on the device that all heads attend to beside them (sinks, recent ones).
        scale: factor on the scores, usually 1/sqrt(D).
        implementation, interpret: as of `fetch_channels`.

    Returns:
        The normalised output and the natural-log log-sum-exp of the scaled scores over all tokens. Where no token
        counts they are 0 and `split_k.EMPTY`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    if q.ndim != 3 or keys.ndim != 4 or q.shape[0] != keys.shape[0] or q.shape[1] % keys.shape[1]:
        raise ValueError(f"attend_rows: q {q.shape} and keys {keys.shape} must be [B, Hq, D] and [B, Hkv, S, D]")
    if q.shape[2] != keys.shape[3] or values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(
            f"attend_rows: values must be as the keys, {keys.dtype}{keys.shape}, with D as in q {q.shape}, got "
            f"{values.dtype}{values.shape}"
        )
    if rows.ndim != 3 or rows.shape[:2] != keys.shape[:2] or rows.dtype != jnp.int32:
        raise ValueError(f"attend_rows: rows must be int32{[*keys.shape[:2], 'k']}, got {rows.dtype}{list(rows.shape)}")
    check("attend_rows", q, keys.shape[1], exact, q)
    return dispatch.call(
        "attend_rows", implementation, interpret, q, keys, values, rows, tuple(exact), scale=float(scale)
    )

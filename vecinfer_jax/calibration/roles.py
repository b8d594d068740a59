"""Which layers look everywhere and which at few tokens (TailorKV, arXiv 2505.19586, section 3.1).

For the last queries of a prompt, A = softmax(q K^T / sqrt(D)). A layer's *dense preference* P is the mean over queries
and heads of 1 - (the sum of the largest 5% of A): large where attention is spread over many tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from vecinfer_jax.caches.attention import MASKED, scores

# Queries at a prompt's end that are looked at.
LAST_QUERIES = 32
# Shares of the most attended tokens are known in so many steps, from 1 / SHARES to 1.
SHARES = 100


def attention_shares(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B T Hkv D"], lengths: Int[Array, "B"], scale: float
) -> tuple[Float32[Array, "shares"], Int[Array, ""]]:
    """Attention that goes to the most attended i + 1 percent of a query's tokens (rounded down, but one at least).

    Sums over the last `LAST_QUERIES` queries (after RoPE, as the keys are) of each row's first lengths[b] tokens and
    over heads, and how many queries and heads those are. One KV head's scores of one row exist at a time.
    """
    tokens, heads = k.shape[1:3]
    at = lengths[:, None] - LAST_QUERIES + jnp.arange(LAST_QUERIES)[None, :]
    last = jnp.take_along_axis(q, jnp.maximum(at, 0)[:, :, None, None], axis=1)
    by_head = last.reshape(*last.shape[:2], heads, -1, last.shape[-1]).swapaxes(1, 2)

    def of_head(head: tuple[Array, Array, Array]) -> Array:
        queries, keys, at = head
        s = scores(queries[None], keys[None, None], scale)[0, 0]
        sees = jnp.arange(tokens)[None, :] <= at[:, None]
        attention = jnp.where(sees, jax.nn.softmax(jnp.where(sees, s, MASKED), axis=-1), 0.0)
        total = jnp.cumsum(jnp.sort(attention, axis=-1, descending=True), axis=-1)
        most = jnp.maximum((at[:, None] + 1) * (jnp.arange(SHARES)[None, :] + 1) // SHARES, 1) - 1
        share = jnp.take_along_axis(total, jnp.broadcast_to(most, (total.shape[0], *most.shape)), axis=-1)
        return jnp.sum(jnp.where((at >= 0)[:, None], share, 0.0), axis=(0, 1))

    flat = by_head.reshape(-1, *by_head.shape[2:]), k.swapaxes(1, 2).reshape(-1, tokens, k.shape[-1])
    shares = jnp.sum(jax.lax.map(of_head, (*flat, jnp.repeat(at, heads, axis=0))), axis=0)
    return shares, jnp.sum(at >= 0) * q.shape[2]


def dense_preference(shares: Float[np.ndarray, "shares"], queries: int, top: float) -> float:
    """P from the sums that `attention_shares` gives; between two whole percents, interpolated."""
    known = np.concatenate([[0.0], np.asarray(shares, np.float64) / max(int(queries), 1)])
    return float(1 - np.interp(top, np.arange(SHARES + 1) / SHARES, known))

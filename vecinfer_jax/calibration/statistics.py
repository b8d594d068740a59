"""Activation statistics, collected by a cache method that keeps statistics where others keep keys and values.

Running the model over calibration text with `Statistics` as its method leaves, per layer, what every method's
calibration needs. All of it is updated in place of a cache, so memory does not grow with the text.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import hadamard
from vecinfer_jax.caches.attention import MASKED, QUERY_BLOCK, causal_attention, combine, scores
from vecinfer_jax.caches.base import (
    CacheMethod,
    Chunk,
    LayerCalibration,
    LayerShape,
    array_field,
    every_row,
    total,
)
from vecinfer_jax.calibration.roles import SHARES, attention_shares
from vecinfer_jax.rope import apply_rope

# Queries of a passage that are kept with it.
WINDOW_QUERIES = 128


@struct.dataclass
class Windows:
    """Whole passages of a layer, W of them of up to T tokens, with some queries each; keys and queries after RoPE.

    queries:       [W, n, Hq, D], at random positions.
    at:            int32[W, n], which; -1: none.
    keys, values:  [W, T, Hkv, D], zeros after a passage's end.
    """

    queries: Float[Array, "W n Hq D"] = array_field("state")
    at: Int[Array, "W n"] = array_field("state")
    keys: Float[Array, "W T Hkv D"] = array_field("state")
    values: Float[Array, "W T Hkv D"] = array_field("state")


@struct.dataclass
class LayerStatistics:
    """Of one layer; keys are after RoPE. n is the number of tokens sampled.

    count:                 tokens seen.
    key_abs_max:           [Hkv, D], largest |k_i| over all tokens.
    rotated_key_abs_max:   [Hkv, D], the same of the Hadamard-rotated keys (zeros if D is no power of two).
    key_sum:               [Hkv, D], sum of the keys.
    query_moment:          [Hkv, D, D], sum over tokens and the group's query heads of q q^T.
    keys, values:          [n, Hkv, D], a uniform random sample of the tokens.
    positions:             int32[n], where in their passage the sampled tokens stood; -1: slot not filled.
    priority:              [n], the random numbers by which the sample is kept (the n smallest of all tokens').
    draws:                 how many chunks have been drawn from: the state of the random numbers.
    key_gradients, value_gradients: bfloat16[n, Hkv, D], gradients of the sampled tokens' passages' loss with respect
        to their keys before RoPE and their values, where they were asked for (`vecinfer_jax.calibration.fisher`).
    key_weights:           [n, Hkv], how much the sampled keys' errors count (`attention_received`), if collected.
    value_weights:         [n, Hkv], the same of the values.
    windows:               the first passages as a whole, if collected.
    attention_shares:      [100], attention to the most attended i + 1 percent of tokens, summed over `share_queries`
        queries and heads at passages' ends (`vecinfer_jax.calibration.roles`), if collected.
    """

    count: Int[Array, ""] = array_field("state")
    key_abs_max: Float32[Array, "Hkv D"] = array_field("state")
    rotated_key_abs_max: Float32[Array, "Hkv D"] = array_field("state")
    key_sum: Float32[Array, "Hkv D"] = array_field("state")
    query_moment: Float32[Array, "Hkv D D"] = array_field("state")
    keys: Float[Array, "n Hkv D"] = array_field("state")
    values: Float[Array, "n Hkv D"] = array_field("state")
    positions: Int[Array, "n"] = array_field("state")
    priority: Float32[Array, "n"] = array_field("state")
    draws: Int[Array, ""] = array_field("state")
    key_gradients: Float[Array, "n Hkv D"] | None = array_field("state", default=None)
    value_gradients: Float[Array, "n Hkv D"] | None = array_field("state", default=None)
    key_weights: Float32[Array, "n Hkv"] | None = array_field("state", default=None)
    value_weights: Float32[Array, "n Hkv"] | None = array_field("state", default=None)
    windows: Windows | None = array_field("state", default=None)
    attention_shares: Float32[Array, "shares"] | None = array_field("state", default=None)
    share_queries: Int[Array, ""] | None = array_field("state", default=None)


@dataclasses.dataclass(frozen=True)
class Statistics(CacheMethod):
    """samples: tokens kept per layer; seed: of which ones (the same tokens in every layer).

    weights: also keep how much attention the sampled tokens receive; windows: also keep so many whole passages of up to
    `length` tokens; shares: also keep how much attention goes to the most attended tokens.
    """

    samples: int
    seed: int
    weights: bool = False
    windows: int = 0
    length: int = 0
    shares: bool = False
    name: ClassVar[str] = "statistics"
    splits_tokens: ClassVar[bool] = False

    def init(
        self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None
    ) -> LayerStatistics:
        h, d, n = layer.num_kv_heads, layer.head_dim, self.samples
        weights = jnp.zeros((n, h), jnp.float32) if self.weights else None
        windows = None
        if self.windows:
            whole = jnp.zeros((self.windows, self.length, h, d), layer.dtype)
            queries = min(WINDOW_QUERIES, self.length)
            windows = Windows(
                queries=jnp.zeros((self.windows, queries, layer.num_query_heads, d), layer.dtype),
                at=jnp.full((self.windows, queries), -1, jnp.int32),
                keys=whole,
                values=whole + 0,  # not the same buffer: both are given away when they are updated
            )
        return LayerStatistics(
            count=jnp.int32(0),
            key_abs_max=jnp.zeros((h, d), jnp.float32),
            rotated_key_abs_max=jnp.zeros((h, d), jnp.float32),
            key_sum=jnp.zeros((h, d), jnp.float32),
            query_moment=jnp.zeros((h, d, d), jnp.float32),
            keys=jnp.zeros((n, h, d), layer.dtype),
            values=jnp.zeros((n, h, d), layer.dtype),
            positions=jnp.full((n,), -1, jnp.int32),
            priority=jnp.full((n,), jnp.inf, jnp.float32),
            draws=jnp.int32(0),
            key_weights=weights,
            value_weights=None if weights is None else weights + 0,
            windows=windows,
            attention_shares=jnp.zeros((SHARES,), jnp.float32) if self.shares else None,
            share_queries=jnp.int32(0) if self.shares else None,
        )

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: LayerStatistics,
    ) -> tuple[Float[Array, "B T Hq D"], LayerStatistics]:
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        out = causal_attention(q, k, v, chunk.lengths, chunk.layer.scale)
        axes = chunk.layer.axes  # of all rows every device keeps statistics of its own heads
        q, k, v, lengths, positions = (every_row(x, axes) for x in (q, k, v, chunk.lengths, chunk.positions))
        b, t, heads, d = k.shape
        counts = (jnp.arange(t)[None, :] < lengths[:, None]).reshape(-1)
        keys = jnp.where(counts[:, None, None], k.astype(jnp.float32).reshape(-1, heads, d), 0.0)
        queries = jnp.where(counts[:, None, None], q.astype(jnp.float32).reshape(b * t, -1, d), 0.0)
        queries = queries.reshape(b * t, heads, -1, d)
        moment = jnp.einsum("nhgd,nhge->hde", queries, queries, precision=jax.lax.Precision.HIGHEST)
        rotated = cache.rotated_key_abs_max
        if d & (d - 1) == 0:
            rotated = jnp.maximum(rotated, jnp.max(jnp.abs(hadamard(keys)), axis=0))

        priority, keep = draw(self.seed, cache.draws, counts, cache.priority)

        def sample(old: Array, new: Array) -> Array:
            return jnp.concatenate([old, new.astype(old.dtype)])[keep]

        key_weights, value_weights = cache.key_weights, cache.value_weights
        if key_weights is not None and value_weights is not None:
            of_keys, of_values = attention_received(q, k, v, lengths, chunk.layer.scale)
            key_weights = sample(key_weights, of_keys.reshape(-1, heads))
            value_weights = sample(value_weights, of_values.reshape(-1, heads))
        windows = cache.windows
        if windows is not None:
            windows = self._kept(windows, q, k, v, lengths, cache.draws)
        shares, share_queries = cache.attention_shares, cache.share_queries
        if shares is not None and share_queries is not None:
            here, queries = (total(x, axes.model) for x in attention_shares(q, k, lengths, chunk.layer.scale))
            shares, share_queries = shares + here, share_queries + queries

        return out, LayerStatistics(
            count=cache.count + jnp.sum(counts),
            key_abs_max=jnp.maximum(cache.key_abs_max, jnp.max(jnp.abs(keys), axis=0)),
            rotated_key_abs_max=rotated,
            key_sum=cache.key_sum + jnp.sum(keys, axis=0),
            query_moment=cache.query_moment + moment,
            keys=sample(cache.keys, keys),
            values=sample(cache.values, v.reshape(-1, heads, d)),
            positions=jnp.where(jnp.isinf(priority[keep]), -1, sample(cache.positions, positions.reshape(-1))),
            priority=priority[keep],
            draws=cache.draws + 1,
            key_weights=key_weights,
            value_weights=value_weights,
            windows=windows,
            attention_shares=shares,
            share_queries=share_queries,
        )

    def _kept(
        self,
        windows: Windows,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        lengths: Int[Array, "B"],
        draws: Int[Array, ""],
    ) -> Windows:
        """The windows with this batch's passages in the next free ones; those that find none are dropped."""
        b, t = k.shape[:2]
        place = draws * b + jnp.arange(b)
        place = jnp.where(lengths > 0, place, self.windows)
        draw = jax.random.fold_in(jax.random.key(self.seed + 1), draws)
        at = jax.random.randint(draw, (b, windows.at.shape[1]), 0, jnp.maximum(lengths, 1)[:, None])
        real = (jnp.arange(t) < lengths[:, None])[..., None, None]
        width = min(t, self.length)

        def whole(old: Array, new: Array) -> Array:
            return old.at[place, :width].set(jnp.where(real, new, 0)[:, :width].astype(old.dtype), mode="drop")

        chosen = jnp.take_along_axis(q, at[..., None, None], axis=1).astype(windows.queries.dtype)
        return Windows(
            queries=windows.queries.at[place].set(chosen, mode="drop"),
            at=windows.at.at[place].set(at, mode="drop"),
            keys=whole(windows.keys, k),
            values=whole(windows.values, v),
        )

    def decode(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        raise NotImplementedError("activation statistics are collected over passages, not while decoding")

    def bits_per_element(self, layer: LayerShape) -> float:
        return 0.0


def draw(
    seed: int, draws: Int[Array, ""], counts: Bool[Array, "tokens"], held: Float32[Array, "n"]
) -> tuple[Float32[Array, "both"], Int[Array, "n"]]:
    """Priorities of the n tokens held and of a chunk's after them, and which n of these are held from now on."""
    key = jax.random.fold_in(jax.random.key(seed), draws)
    priority = jnp.where(counts, jax.random.uniform(key, counts.shape), jnp.inf)
    priority = jnp.concatenate([held, priority])
    return priority, jax.lax.top_k(-priority, held.shape[0])[1]


def attention_received(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    lengths: Int[Array, "B"],
    scale: float,
) -> tuple[Float32[Array, "B T Hkv"], Float32[Array, "B T Hkv"]]:
    """How much an error of each token's key and value counts in what attention over a passage gives.

    With p_ij the attention of query i to token j and o_i its output, errors e_j of the keys change o_i by
    sum_j p_ij (q_i . e_j) (v_j - o_i) to first order: an error's expected square counts as w_j = sum_i p_ij^2
    |v_j - o_i|^2 |q_i|^2. Errors of values count as sum_i p_ij^2. Sums over the group's queries.
    """
    b, t, heads, dim = k.shape
    wide = k.astype(jnp.float32).swapaxes(1, 2), v.astype(jnp.float32).swapaxes(1, 2)
    positions = jnp.arange(t)
    pad = -t % QUERY_BLOCK
    blocks = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, pad), (0, 0), (0, 0)))
    blocks = blocks.reshape(b, -1, QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)

    def add(carry: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        rows, queries = block
        mask = (positions <= rows[:, None])[None] & (rows[None, :, None] < lengths[:, None, None])
        mask = mask[:, None, None]
        p = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores(queries, wide[0], scale), MASKED), axis=-1), 0.0)
        out = combine(p, wide[1]).reshape(b, QUERY_BLOCK, heads, -1, dim).transpose(0, 2, 3, 1, 4)
        across = jnp.einsum("bhgtd,bhsd->bhgts", out, wide[1], precision=jax.lax.Precision.HIGHEST)
        apart = jnp.sum(wide[1] ** 2, -1)[:, :, None, None] + jnp.sum(out**2, -1)[..., None] - 2 * across
        size = jnp.sum(queries.reshape(b, QUERY_BLOCK, heads, -1, dim) ** 2, -1).transpose(0, 2, 3, 1)
        square = p**2
        key = jnp.sum(square * jnp.maximum(apart, 0.0) * size[..., None], axis=(2, 3))
        return (carry[0] + key, carry[1] + jnp.sum(square, axis=(2, 3))), None

    rows = jnp.arange(t + pad).reshape(-1, QUERY_BLOCK)
    (key, value), _ = jax.lax.scan(add, (jnp.zeros((b, heads, t)),) * 2, (rows, blocks))
    return key.swapaxes(1, 2), value.swapaxes(1, 2)

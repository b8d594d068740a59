"""Layers whose keys and values lie in the host's memory, and of which a query reads the tokens that matter to it.

TailorKV (arXiv 2505.19586, section 3.3), layers that look at few tokens. Sinks and recent tokens are on the device; all
others in pinned host memory, keys a second time with a channel's elements contiguous. A step

1. predicts the query from the previous layer's normed input (`prefetch`),
2. takes its mean over the query heads of a KV head and scores channels by |q_i| max |k_i|,
3. fetches the best channels of all tokens from the host,
4. scores tokens by the true query (mean over the same heads) in those channels and takes the best,
5. fetches their whole keys and values,
6. attends exactly over them, the sinks and the recent tokens.

Steps 1 to 3 wait for nothing that the layer before computes after its norm, so they may run beside it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from pallas_kernels import attend_rows, dispatch, fetch_channels, select_tokens
from pallas_kernels.host_tier.reference import best_rows
from vecinfer_jax.caches.attention import (
    MASKED,
    QUERY_BLOCK,
    SCORE_ELEMENTS,
    Tokens,
    by_query_blocks,
    combine,
    join_tokens,
    scores,
)
from vecinfer_jax.caches.base import Chunk, LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.rows import read_slots
from vecinfer_jax.caches.windowed import WindowedCache, WindowedMethod
from vecinfer_jax.errors import InputError
from vecinfer_jax.rope import apply_rope

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@struct.dataclass
class HostStore:
    """Tokens that have left the window; slot n holds position sink + n.

    keys, values:     [B, Hkv, S, D] on the host, keys after RoPE.
    keys_by_channel:  [B, Hkv, D, S] on the host, the same keys.
    key_abs_max:      float32[B, Hkv, D], largest |k_i| of them.
    predicted:        [B, T, Hq, D], queries as `prefetch` expects them, from there to the layer's attention; else None.
    """

    keys: Float[Array, "B Hkv S D"] = array_field("host")
    values: Float[Array, "B Hkv S D"] = array_field("host")
    keys_by_channel: Float[Array, "B Hkv D S"] = array_field("host")
    key_abs_max: Float32[Array, "B Hkv D"] = array_field("state")
    predicted: Float[Array, "B T Hq D"] | None = array_field("state", default=None)


@dataclasses.dataclass(frozen=True)
class SparseLayer(WindowedMethod):
    """A layer in the host's memory.

    tokens:   read from there by each query, as many for every KV head (the top-k).
    channels: of the keys, by which they are chosen.
    block:    tokens that move to the host at one time: residual to residual + block - 1 recent ones are on the device.
    residual: recent tokens on the device, 1 or more; sink: first tokens on the device.
    implementation: of the operations on the host's memory (`pallas_kernels.host_tier`); None: the best for the device.
    """

    tokens: int = 128
    channels: int = 8
    block: int = 64
    implementation: str | None = None
    interpret: bool = False

    name: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "channels", "block", "residual"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r} must be a whole number, 1 or more")
        known = dispatch.TABLE["attend_rows"]
        if self.implementation is not None and self.implementation not in known:
            raise InputError(f"implementation={self.implementation!r} is unknown; choose from {', '.join(known)}")

    @property
    def token_group(self) -> int:
        return self.block

    def validate(self, layer: LayerShape) -> None:
        if self.channels > layer.head_dim:
            raise InputError(f"channels={self.channels}: this model's heads have {layer.head_dim}")

    def bits_per_element(self, layer: LayerShape) -> float:
        """Of the host's memory: keys lie there twice."""
        return 1.5 * 8 * jnp.dtype(layer.dtype).itemsize

    def _how(self, operation: str) -> dict[str, Any]:
        return {"implementation": dispatch.named(operation, self.implementation), "interpret": self.interpret}

    # -- the store

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> HostStore:
        heads, dim = layer.num_kv_heads, layer.head_dim
        return HostStore(
            keys=on_host(jnp.zeros((batch, heads, slots, dim), layer.dtype)),
            values=on_host(jnp.zeros((batch, heads, slots, dim), layer.dtype)),
            keys_by_channel=on_host(jnp.zeros((batch, heads, dim, slots), layer.dtype)),
            key_abs_max=jnp.zeros((batch, heads, dim), jnp.float32),
        )

    def append(
        self,
        store: HostStore,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> HostStore:
        """Moves tokens to the host; those of a row that are moved come first and their slots are consecutive."""
        moved = slots >= 0
        start, count = jnp.maximum(slots[:, 0], 0), jnp.sum(moved, axis=1)

        def move(store: HostStore) -> HostStore:
            by_head = k.swapaxes(1, 2)
            peak = jnp.where(moved[:, :, None, None], jnp.abs(k.astype(jnp.float32)), 0.0).max(axis=1)
            return dataclasses.replace(
                store,
                keys=write_slots(store.keys, by_head, start, count, axis=2),
                values=write_slots(store.values, v.swapaxes(1, 2), start, count, axis=2),
                keys_by_channel=write_slots(store.keys_by_channel, by_head.swapaxes(2, 3), start, count, axis=3),
                key_abs_max=jnp.maximum(store.key_abs_max, peak),
            )

        return jax.lax.cond(jnp.any(moved), move, lambda store: store, store)

    def read(
        self, store: HostStore, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        return on_device(read_slots(store.keys, start, size)), on_device(read_slots(store.values, start, size))

    # -- the protocol

    def prefetch(
        self,
        hidden: Float[Array, "B T hidden"],
        project_query: Callable[[jax.Array], jax.Array],
        chunk: Chunk,
        cache: WindowedCache,
    ) -> WindowedCache:
        """Keeps the predicted queries: all that steps 2 and 3 need.

        The first layer has no layer before it; there they use the true query.
        """
        if chunk.read == "exact" and hidden.shape[1] > 1:  # a prompt that is not read through them
            return cache
        return _predicting(cache, apply_rope(project_query(hidden), chunk.cos, chunk.sin))

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: WindowedCache,
    ) -> tuple[Float[Array, "B T Hq D"], WindowedCache]:
        if chunk.read == "exact":
            return super().prefill(q, k, v, chunk, _predicting(cache, None))
        out, cache = self.prefill_as_decoding(q, k, v, chunk, cache, self._attend_block)
        return out.astype(q.dtype), cache

    def decode(
        self,
        q: Float[Array, "B Hq D"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        chunk: Chunk,
        cache: WindowedCache,
    ) -> tuple[Float[Array, "B Hq D"], WindowedCache]:
        out, cache = super().decode(q, k, v, chunk, cache)
        return out, _predicting(cache, None)

    def attend_cache(
        self, q: Float[Array, "B Hq D"], cache: WindowedCache, layer: LayerShape
    ) -> Float[Array, "B Hq D"]:
        store = cache.store
        predicted = q if store.predicted is None else store.predicted[:, 0]
        count = self.coded_count(cache.lengths).astype(jnp.int32)
        channels = self.critical_channels(_group_mean(predicted, layer), store.key_abs_max)
        fetched = fetch_channels(store.keys_by_channel, channels, **self._how("fetch_channels"))
        rows = select_tokens(q, fetched, channels, count, tokens=self.tokens, **self._how("select_tokens"))
        exact = self.exact_tokens(cache)
        how = self._how("attend_rows")
        return attend_rows(q, store.keys, store.values, rows, exact, scale=layer.scale, **how)[0]

    def critical_channels(
        self, mean: Float[Array, "*rows Hkv D"], key_abs_max: Float[Array, "*rows Hkv D"]
    ) -> Int[Array, "*rows Hkv c"]:
        """The channels with the largest |q_i| max |k_i| (section 3.3)."""
        return jax.lax.top_k(jnp.abs(mean) * key_abs_max, self.channels)[1].astype(jnp.int32)

    # -- the strict evaluation: every query of a prompt as decoding would answer it

    def prefill_as_decoding(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: WindowedCache,
        answer: Callable[..., jax.Array],
    ) -> tuple[Float[Array, "B T Hq W"], WindowedCache]:
        """A chunk of prompt into the cache, and what `answer` makes of each query and the tokens that it reads.

        answer(q, tokens, near, there, chosen, layer) -> [B, rows, Hq, W] is called for blocks of queries. `tokens` are
        all that the host holds, and after them those of the window, the sinks and the chunk; bool[B, Hkv or 1, rows, N]
        say which of them a query reads in full (`near`), which the host holds for it (`there`) and which of these it
        chooses (`chosen`). One layer's tokens are on the device at a time.
        """
        predicted, cache = cache.store.predicted, _predicting(cache, None)
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        updated, layer = self._append_chunk(k, v, chunk, cache), chunk.layer
        t = jnp.arange(k.shape[1])[None, :]
        exact = Tokens(k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.where(t < chunk.lengths[:, None], chunk.positions, -1))
        if not chunk.first:
            exact = join_tokens(self._joined_exact_tokens(cache), exact)
        slots = updated.slots
        keys, values = self.read(updated.store, jnp.int32(0), slots, layer)
        b, heads, _, dim = keys.shape
        host = Tokens(keys, values, jnp.broadcast_to(self.sink + jnp.arange(slots), (b, slots)))
        tokens = join_tokens(host, exact)
        is_host = jnp.arange(tokens.positions.shape[1]) < slots
        # Largest |k_i| of the first 0, 1, 2, ... blocks.
        peaks = jnp.abs(keys.astype(jnp.float32)).reshape(b, heads, -1, self.block, dim).max(axis=3)
        peaks = jnp.pad(jax.lax.cummax(peaks, axis=2), ((0, 0), (0, 0), (1, 0), (0, 0)))

        def block(q: jax.Array, predicted: jax.Array, t: jax.Array) -> jax.Array:
            held = self.coded_count(t + 1)
            chosen = self._choose(q, predicted, held, keys, peaks, layer)
            chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, exact.positions.shape[1])))
            s, boundary = tokens.positions[:, None], (self.sink + held)[:, :, None]
            there = is_host & (s < boundary)
            near = ~is_host & (s >= 0) & (s <= t[:, :, None]) & ((s < self.sink) | (s >= boundary))
            return answer(q, tokens, near[:, None], there[:, None], chosen, layer)

        size = min(QUERY_BLOCK, max(SCORE_ELEMENTS // (b * q.shape[2] * tokens.positions.shape[1]), 16))
        guesses = q if predicted is None else predicted
        return by_query_blocks(block, q, guesses, chunk.positions, size=size), updated

    def _choose(
        self,
        q: Float[Array, "B T Hq D"],
        predicted: Float[Array, "B T Hq D"],
        held: Int[Array, "B T"],
        keys: Float[Array, "B Hkv S D"],
        peaks: Float[Array, "B Hkv P D"],
        layer: LayerShape,
    ) -> Bool[Array, "B Hkv T S"]:
        """Which of the first held[b, t] tokens on the host each query reads (steps 2 and 4)."""
        b, t = held.shape
        peak = jnp.take_along_axis(peaks, (held // self.block)[:, None, :, None], axis=2).swapaxes(1, 2)
        channels = self.critical_channels(_group_mean(predicted, layer), peak)
        critical = _marked(channels, layer.head_dim)
        mean = jnp.where(critical, _group_mean(q, layer), 0.0)
        products = scores(mean.astype(jnp.float32), keys.astype(jnp.float32), 1.0)[:, :, 0].swapaxes(1, 2)
        flat = products.reshape(b * t, *products.shape[2:])
        rows = best_rows(flat, held.reshape(-1), min(self.tokens, keys.shape[2]))
        return _marked(rows, keys.shape[2]).reshape(b, t, -1, keys.shape[2]).swapaxes(1, 2)

    @staticmethod
    def _attend_block(
        q: Any, tokens: Tokens, near: Any, there: Any, chosen: Any, layer: LayerShape
    ) -> Float[Array, "B T Hq D"]:
        s = jnp.where((near | chosen)[:, :, None], scores(q, tokens.keys, layer.scale), MASKED)
        return combine(jax.nn.softmax(s, axis=-1), tokens.values)


def on_host(x: jax.Array) -> jax.Array:
    """x in pinned host memory."""
    return jax.device_put(x, HOST)


def on_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, DEVICE)


def write_slots(
    held: Shaped[Array, "B H *rest"],
    new: Shaped[Array, "B H *new"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
    *,
    axis: int,
) -> Shaped[Array, "B H *rest"]:
    """The first count[b] of new[b] in slots start[b] ... of held[b], along `axis`; held stays in its memory.

    Whole slices are written, in place where `held` is donated. Where each row's slice is inside `held`, what is written
    beyond count[b] is not to be read before it is written again; where not, or where a row has nothing to write, slices
    are first completed with what is there.
    """
    batch, slots, width = held.shape[0], held.shape[axis], new.shape[axis]
    size = min(width, slots)
    space = jax.typeof(held).memory_space

    def cut(x: jax.Array, row: jax.Array, at: jax.Array, size: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(jax.lax.dynamic_slice_in_dim(x, row, 1, 0), at, size, axis)

    def write(held: jax.Array, piece: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
        index = [jnp.int32(0)] * held.ndim
        index[0], index[axis] = row, at
        return jax.lax.dynamic_update_slice(held, jax.device_put(piece.astype(held.dtype), space), index)

    def whole(row: jax.Array, held: jax.Array) -> jax.Array:
        return write(held, cut(new, row, jnp.int32(0), size), row, start[row])

    def completed(row: jax.Array, held: jax.Array) -> jax.Array:
        at = jnp.clip(start[row], 0, slots - size)
        source = jnp.arange(size) + at - start[row]
        piece = jnp.take(cut(new, row, jnp.int32(0), width), jnp.clip(source, 0, width - 1), axis=axis)
        counts = ((source >= 0) & (source < count[row])).reshape([-1] + [1] * (held.ndim - axis - 1))
        return write(held, jnp.where(counts, piece, on_device(cut(held, row, at, size))), row, at)

    def all_rows(one: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return lambda held: jax.lax.fori_loop(0, batch, one, held)

    inside = jnp.all((count > 0) & (start + width <= slots))
    return jax.lax.cond(inside, all_rows(whole), all_rows(completed), held)


def _predicting(cache: WindowedCache, predicted: jax.Array | None) -> WindowedCache:
    return dataclasses.replace(cache, store=dataclasses.replace(cache.store, predicted=predicted))


def _group_mean(q: Float[Array, "*rows Hq D"], layer: LayerShape) -> Float32[Array, "*rows Hkv D"]:
    """Mean over the query heads of each KV head."""
    return jnp.mean(q.astype(jnp.float32).reshape(*q.shape[:-2], layer.num_kv_heads, -1, q.shape[-1]), axis=-2)


def _marked(index: Int[Array, "*rows n"], size: int) -> Bool[Array, "*rows size"]:
    """Which of `size` places are named in `index`; -1 names none."""
    flat = index.reshape(-1, index.shape[-1])
    marks = jnp.zeros((flat.shape[0], size), bool)
    marks = marks.at[jnp.arange(flat.shape[0])[:, None], jnp.where(flat < 0, size, flat)].set(True, mode="drop")
    return marks.reshape(*index.shape[:-1], size)

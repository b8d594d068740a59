"""Layers whose keys and values lie in the host's memory, and of which a query reads the tokens that matter to it.

TailorKV (arXiv 2505.19586, section 3.3), layers that look at few tokens. Sinks and recent tokens are on the device; all
others in pinned host memory, keys a second time with a channel's elements contiguous. A step

1. predicts the query from the previous layer's normed input (`prefetch`),
2. takes its mean over the query heads of a KV head and scores channels by |q_i| max |k_i|,
3. fetches the best channels of all tokens from the host,
4. scores tokens by the true query (mean over the same heads) in those channels and takes the best,
5. fetches their whole keys and values,
6. attends exactly over them, the sinks and the recent tokens.

With heads="each" (ours) |q_i| in step 2 is the root of the heads' mean square, and step 4 takes the tokens with the
largest sum over the heads of exp(score) / sum of exp(scores of all tokens on the host), the scores being each head's
own in those channels: a token that one head needs is not outvoted by heads that look elsewhere, and a head with large
scores does not outvote the rest.

Steps 1 to 3 wait for nothing that the layer before computes after its norm: on a GPU the fetch runs beside it, on a
stream of its own. What leaves the window in a step is moved to the host before, so that it can be chosen at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from pallas_kernels import attend_rows, channel_lse, dispatch, fetch_channels, select_tokens
from pallas_kernels.exact import rounded
from pallas_kernels.host_tier.reference import attend_fetched, best_rows, token_scores
from pallas_kernels.vq_decode_attention.reference import dequantise
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
from vecinfer_jax.caches.stripes import whole_prompt
from vecinfer_jax.caches.vecinfer import CENTRED_TEXT, VecInfer, centred_maps
from vecinfer_jax.caches.windowed import WindowedCache, WindowedMethod
from vecinfer_jax.errors import InputError
from vecinfer_jax.rope import apply_rope

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
BASES = ("channels", "principal")
HEADS = ("mean", "each")


@struct.dataclass
class PrincipalBasis:
    """k' = (k - mean) key_map and q' = q query_map, so that q' . k' = q . (k - mean); a few elements of k' come closer
    to a score than as many of k do."""

    mean: Float32[Array, "Hkv D"] = array_field("codebooks")
    key_map: Float32[Array, "Hkv D D"] = array_field("codebooks")
    query_map: Float32[Array, "Hkv D D"] = array_field("codebooks")


@struct.dataclass
class HostStore:
    """Tokens that have left the window; slot n holds position sink + n.

    keys, values:     [B, Hkv, S, W] on the host, keys after RoPE; elements, or a byte of code for every two of them.
    keys_by_channel:  [B, Hkv, W, S] on the host, the same keys, in the basis if there is one.
    key_abs_max:      float32[B, Hkv, D], largest |k_i| of them, in the space in which channels are chosen.
    predicted:        [B, T, Hq, D], queries as `prefetch` expects them, from there to the layer's attention; else None.
    ahead:            what has been fetched for it: int32[B, Hkv, c] channels and [B, Hkv, c, S] keys; else None.
    codebooks:        a `VecInferStore` without codes that reads them, where the host holds codes.
    basis:            of `keys_by_channel`, where the host holds exact keys and the basis is not the model's own.
    """

    keys: Shaped[Array, "B Hkv S W"] = array_field("host")
    values: Shaped[Array, "B Hkv S W"] = array_field("host")
    keys_by_channel: Shaped[Array, "B Hkv W S"] = array_field("host")
    key_abs_max: Float32[Array, "B Hkv D"] = array_field("state")
    predicted: Float[Array, "B T Hq D"] | None = array_field("state", default=None)
    ahead: tuple[jax.Array, jax.Array] | None = array_field("state", default=None)
    codebooks: Any = None
    basis: PrincipalBasis | None = None


@dataclasses.dataclass(frozen=True)
class SparseLayer(WindowedMethod):
    """A layer in the host's memory.

    tokens:   read from there by each query, as many for every KV head (the top-k).
    channels: of the keys, by which they are chosen.
    block:    tokens that move to the host at one time: residual to residual + block - 1 recent ones are on the device.
    residual: recent tokens on the device, 1 or more; sink: first tokens on the device.
    basis:    whose channels those are: the model's own ("channels", the paper), or "principal", ours: the directions of
        VecInfer's metric transform, in which the calibration's keys are uncorrelated, weighted by its queries.
    heads:    how the query heads of a KV head choose together: by their mean query ("mean", the paper), or "each",
        ours: channels by the root of their mean square, tokens by the sum of the weights that each head gives them
        among the host's.
    implementation: of the operations on the host's memory (`pallas_kernels.host_tier`); None: the best for the device.
    """

    tokens: int = 128
    channels: int = 8
    block: int = 64
    basis: str = "channels"
    heads: str = "mean"
    implementation: str | None = None
    interpret: bool = False

    name: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "channels", "block", "residual"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r} must be a whole number, 1 or more")
        for name, choices in (("basis", BASES), ("heads", HEADS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(choices)}")
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

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Kernels of a step in one graph wait for what they read alone, so that fetches run beside the rest."""
        return {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}

    def reading(self) -> str:
        return f"{self.name} tokens={self.tokens} channels={self.channels}"

    def _how(self, operation: str) -> dict[str, Any]:
        return {"implementation": dispatch.named(operation, self.implementation), "interpret": self.interpret}

    # -- calibration, of the basis

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return self.basis == "principal"

    @property
    def bound_to_positions(self) -> bool:
        return self.needs_calibration

    @property
    def calibration_text(self) -> tuple[int, int] | None:
        return CENTRED_TEXT if self.needs_calibration else None

    def calibration_key(self) -> dict[str, Any]:
        return {"method": self.name, "basis": self.basis}

    def calibrate_layer(
        self, layer: LayerShape, statistics: Any, seed: int, shared: Any = None
    ) -> dict[str, np.ndarray]:
        return centred_maps(statistics, 1) if self.needs_calibration else {}

    # -- the store

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> HostStore:
        store = self._empty(layer, batch, slots, layer.head_dim, layer.dtype)
        if not self.needs_calibration:
            return store
        assert calibration is not None
        maps = {name: jnp.asarray(calibration[name], jnp.float32) for name in ("mean", "key_map", "query_map")}
        return dataclasses.replace(store, basis=PrincipalBasis(**maps))

    @staticmethod
    def _empty(layer: LayerShape, batch: int, slots: int, width: int, dtype: Any) -> HostStore:
        heads = batch, layer.num_kv_heads
        return HostStore(
            keys=on_host(jnp.zeros((*heads, slots, width), dtype)),
            values=on_host(jnp.zeros((*heads, slots, width), dtype)),
            keys_by_channel=on_host(jnp.zeros((*heads, width, slots), dtype)),
            key_abs_max=jnp.zeros((*heads, layer.head_dim), jnp.float32),
        )

    def held_form(
        self, store: HostStore, k: Float[Array, "B T Hkv D"], v: Float[Array, "B T Hkv D"], layer: LayerShape
    ) -> tuple[Shaped[Array, "B Hkv T W"], Shaped[Array, "B Hkv T W"], Shaped[Array, "B Hkv T W"], Array]:
        """Keys and values as the host holds them, keys as it holds them by channel, and [B, Hkv, T, D] keys in the
        space in which channels are chosen."""
        keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
        index = self.index_keys(store, keys, layer)
        return keys, values, index, index

    def index_query(self, q: Float[Array, "*rows Hq D"], store: HostStore) -> Float[Array, "*rows Hq D"]:
        """Queries in the space in which channels are chosen."""
        return q if store.basis is None else _mapped(q, store.basis.query_map)

    def index_keys(
        self, store: HostStore, keys: Float[Array, "B Hkv S D"], layer: LayerShape
    ) -> Float[Array, "B Hkv S D"]:
        """Keys of a store on the device in that space, `keys` being what `read` gives."""
        del layer
        if store.basis is None:
            return keys
        centred = keys.swapaxes(1, 2).astype(jnp.float32) - store.basis.mean
        return _mapped(centred, store.basis.key_map).swapaxes(1, 2).astype(keys.dtype)

    def append(
        self,
        store: HostStore,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> HostStore:
        """Moves tokens to the host; those of a row that are moved come first and their slots are consecutive.

        Whatever calls this on some devices of a context axis does so on all of them.
        """
        moved = slots >= 0
        start, count = jnp.maximum(slots[:, 0], 0), jnp.sum(moved, axis=1)

        def move(store: HostStore) -> HostStore:
            keys, values, by_channel, index = self.held_form(store, k, v, layer)
            peak = jnp.where(moved[:, None, :, None], jnp.abs(index.astype(jnp.float32)), 0.0).max(axis=2)
            return dataclasses.replace(
                store,
                keys=write_slots(store.keys, keys, start, count, axis=2),
                values=write_slots(store.values, values, start, count, axis=2),
                keys_by_channel=write_slots(store.keys_by_channel, by_channel.swapaxes(2, 3), start, count, axis=3),
                key_abs_max=jnp.maximum(store.key_abs_max, peak),
            )

        store = jax.lax.cond(jnp.any(moved), move, lambda store: store, store)
        return dataclasses.replace(store, key_abs_max=self.stripes(layer).largest(store.key_abs_max))

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
        """Steps 1 to 3 of a decoded token; of prompts, the predicted queries are kept.

        The first layer has no layer before it; there the true query takes the predicted one's place.
        """
        if chunk.read == "exact" and hidden.shape[1] > 1:  # a prompt that is not read through them
            return cache

        def predict(hidden: jax.Array) -> jax.Array:
            return apply_rope(project_query(hidden), chunk.cos, chunk.sin)

        if hidden.shape[1] > 1:
            return _predicting(cache, predict(hidden))
        layer, store = chunk.layer, cache.store

        def ahead(hidden: jax.Array) -> tuple[jax.Array, ...]:
            predicted = predict(hidden)
            return predicted, *self.fetched(store, predicted[:, 0], layer)

        predicted, *fetched = (_beside(ahead) if self._kernels_serve(store) else ahead)(hidden)
        return dataclasses.replace(cache, store=dataclasses.replace(store, predicted=predicted, ahead=tuple(fetched)))

    def _kernels_serve(self, store: HostStore) -> bool:
        """Whether what is fetched is read by a kernel on the device, and not gathered by the host's processor."""
        names = dispatch.candidates("fetch_channels", self.implementation, self.interpret)
        return jax.default_backend() == "gpu" and names[0] != "xla" and store.keys.size <= 2**31

    def overdue(self, cache: WindowedCache, at: Int[Array, "B"]) -> Bool[Array, ""]:
        return jnp.any(self.coded_count(at + 1) > self.coded_count(cache.lengths))

    def settle(self, cache: WindowedCache, at: Int[Array, "B"], layer: LayerShape) -> WindowedCache:
        """Moves what leaves the window to the host, before the step chooses from there."""
        store = self.append(cache.store, *self.leaving(cache, None, None, at, layer), layer)
        return dataclasses.replace(cache, store=store, lengths=jnp.maximum(cache.lengths, at + 1))

    def push_token(
        self,
        cache: WindowedCache,
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        at: Int[Array, "B"],
        layer: LayerShape,
    ) -> WindowedCache:
        if cache.store.ahead is None:
            cache = jax.lax.cond(
                self.overdue(cache, at), lambda cache: self.settle(cache, at, layer), lambda cache: cache, cache
            )
        return self.take_in(cache, k, v, at)

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
        self, q: Float[Array, "B Hq D"], cache: WindowedCache, layer: LayerShape, dtype: Any
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        store, dealt = cache.store, self.stripes(layer)
        channels, fetched = store.ahead or self.fetched(store, q, layer)
        mine, held = self.index_query(q, store), self.held(cache, layer)
        scale = lse = None
        if self._each_chooses(layer):
            scale = layer.scale
            of_device = channel_lse(mine, fetched, channels, held, scale=scale, **self._how("channel_lse"))
            lse = dealt.logsumexp(of_device)
        how = self._how("select_tokens")
        rows = select_tokens(mine, fetched, channels, held, tokens=self.tokens, scale=scale, lse=lse, **how)
        if dealt.axis is not None:
            found = jnp.take_along_axis(fetched, jnp.maximum(rows, 0)[:, :, None], axis=3)
            rows = dealt.best(rows, token_scores(mine, found, channels, scale, lse), self.tokens)
        return rounded(*self.attend_chosen(q, rows, cache, layer), dtype)

    def fetched(
        self, store: HostStore, predicted: Float[Array, "B Hq D"], layer: LayerShape
    ) -> tuple[Int[Array, "B Hkv c"], Float[Array, "B Hkv c S"]]:
        """The critical channels of a query, and these of all keys (steps 2 and 3)."""
        size = self.query_size(self.index_query(predicted, store), layer)
        channels = self.critical_channels(size, store.key_abs_max)
        return channels, self.fetch(store, channels)

    def _each_chooses(self, layer: LayerShape) -> bool:
        """Whether heads choose otherwise than by their mean."""
        return self.heads == "each" and layer.num_query_heads > layer.num_kv_heads

    def query_size(self, q: Float[Array, "*rows Hq D"], layer: LayerShape) -> Float32[Array, "*rows Hkv D"]:
        """|q_i| of the query heads of each KV head, taken together, by which channels are chosen."""
        grouped = _grouped(q, layer)
        if self.heads == "mean":
            return jnp.abs(jnp.mean(grouped, axis=-2))
        return jnp.sqrt(jnp.mean(jnp.square(grouped), axis=-2))

    def fetch(self, store: HostStore, channels: Int[Array, "B Hkv c"]) -> Float[Array, "B Hkv c S"]:
        """Those channels of all keys."""
        return fetch_channels(store.keys_by_channel, channels, **self._how("fetch_channels"))

    def attend_chosen(
        self, q: Float[Array, "B Hq D"], rows: Int[Array, "B Hkv k"], cache: WindowedCache, layer: LayerShape
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        """Attention over rows of the host and the exact tokens: output and log-sum-exp."""
        held = cache.store.keys, cache.store.values
        how = self._how("attend_rows")
        return attend_rows(q, *held, rows, self.exact_tokens(cache, layer), scale=layer.scale, **how)

    def critical_channels(
        self, size: Float[Array, "*rows Hkv D"], key_abs_max: Float[Array, "*rows Hkv D"]
    ) -> Int[Array, "*rows Hkv c"]:
        """The channels with the largest |q_i| max |k_i| (section 3.3)."""
        return jax.lax.top_k(size * key_abs_max, self.channels)[1].astype(jnp.int32)

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
        k = self.centred(k, cache.store)
        layer, dealt = chunk.layer, self.stripes(chunk.layer)
        k, v, positions = (whole_prompt(x, layer.axes) for x in (k, v, chunk.positions))
        updated = self._append_chunk(k, v, chunk, cache)
        t = jnp.arange(k.shape[1])[None, :]
        exact = Tokens(k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.where(t < chunk.lengths[:, None], positions, -1))
        if not chunk.first:
            exact = join_tokens(self._joined_exact_tokens(cache), exact)
        slots = updated.slots
        held_keys, held_values = (dealt.in_order(on_device(x), 2) for x in (updated.store.keys, updated.store.values))
        store = dataclasses.replace(updated.store, keys=held_keys, values=held_values)
        keys, values = self.read(store, jnp.int32(0), slots, layer)
        b, heads, _, dim = keys.shape
        host = Tokens(keys, values, jnp.broadcast_to(self.sink + jnp.arange(slots), (b, slots)))
        tokens = join_tokens(host, exact)
        is_host = jnp.arange(tokens.positions.shape[1]) < slots
        index = self.index_keys(store, keys, layer)
        # Largest |k_i| of the first 0, 1, 2, ... blocks.
        peaks = jnp.abs(index.astype(jnp.float32)).reshape(b, heads, -1, self.block, dim).max(axis=3)
        peaks = jnp.pad(jax.lax.cummax(peaks, axis=2), ((0, 0), (0, 0), (1, 0), (0, 0)))

        def block(q: jax.Array, predicted: jax.Array, t: jax.Array) -> jax.Array:
            held = self.coded_count(t + 1)
            mine, guess = (self.index_query(x, store) for x in (q, predicted))
            chosen = self._choose(mine, guess, held, index, peaks, layer)
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
        critical = _marked(self.critical_channels(self.query_size(predicted, layer), peak), layer.head_dim)
        grouped = jnp.where(critical[..., None, :], _grouped(q, layer), 0.0)
        each = self._each_chooses(layer)
        grouped = grouped if each else jnp.mean(grouped, axis=-2, keepdims=True)
        by_head = scores(grouped.reshape(b, t, -1, layer.head_dim), keys.astype(jnp.float32), 1.0)
        if each:
            counts = jnp.arange(keys.shape[2]) < held[:, None, None, :, None]
            weights = jax.nn.log_softmax(jnp.where(counts, layer.scale * by_head, MASKED), axis=-1)
            products = jax.nn.logsumexp(weights, axis=2).swapaxes(1, 2)
        else:
            products = by_head[:, :, 0].swapaxes(1, 2)
        flat = products.reshape(b * t, *products.shape[2:])
        rows = best_rows(flat, held.reshape(-1), min(self.tokens, keys.shape[2]))
        return _marked(rows, keys.shape[2]).reshape(b, t, -1, keys.shape[2]).swapaxes(1, 2)

    @staticmethod
    def _attend_block(
        q: Any, tokens: Tokens, near: Any, there: Any, chosen: Any, layer: LayerShape
    ) -> Float[Array, "B T Hq D"]:
        s = jnp.where((near | chosen)[:, :, None], scores(q, tokens.keys, layer.scale), MASKED)
        return combine(jax.nn.softmax(s, axis=-1), tokens.values)


@dataclasses.dataclass(frozen=True)
class CodedSparseLayer(SparseLayer):
    """A layer in the host's memory as VecInfer's 4-bit codes, a byte for every two elements: a quarter of bfloat16.

    Channels go in pairs, as codes do: the `channels` pairs with the largest sum of |q_i| max |k_i|, with queries and
    keys smoothed as VecInfer smooths them, but not rotated: a Hadamard matrix spreads what makes channels critical.
    With basis="principal" the codes are those of transform="metric", whose pairs have one of the directions with the
    largest variance each, and one of the smallest.
    """

    name: ClassVar[str] = "sparse-coded"

    @property
    def codes(self) -> VecInfer:
        """The method whose codes these are."""
        how: dict[str, Any] = {"implementation": self.implementation, "interpret": self.interpret}
        # Not mixed: pairs would all have the same variance, and none of them would be one to choose by.
        transform = "metric" if self.basis == "principal" else "smooth"
        return VecInfer(bits=4, transform=transform, mixed="none", residual=self.residual, sink=self.sink, **how)

    def centred(self, k: Float[Array, "*B Hkv D"], store: HostStore) -> Float[Array, "*B Hkv D"]:
        return self.codes.centred(k, store.codebooks)

    def validate(self, layer: LayerShape) -> None:
        self.codes.validate(layer)
        if 2 * self.channels > layer.head_dim:
            raise InputError(f"channels={self.channels}: this model's heads have {layer.head_dim // 2} pairs of them")

    def bits_per_element(self, layer: LayerShape) -> float:
        return 1.5 * self.codes.bits_per_element(layer)

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return True

    @property
    def bound_to_positions(self) -> bool:
        return self.codes.bound_to_positions

    @property
    def calibration_text(self) -> tuple[int, int] | None:
        return self.codes.calibration_text

    def calibration_key(self) -> dict[str, Any]:
        return self.codes.calibration_key()

    def calibrate_layer(
        self, layer: LayerShape, statistics: Any, seed: int, shared: Any = None
    ) -> dict[str, np.ndarray]:
        return self.codes.calibrate_layer(layer, statistics, seed, shared)

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> HostStore:
        books = self.codes.init_store(layer, batch, 0, calibration)
        store = self._empty(layer, batch, slots, layer.head_dim // 2, jnp.uint8)
        return dataclasses.replace(store, codebooks=books)

    def held_form(
        self, store: HostStore, k: Float[Array, "B T Hkv D"], v: Float[Array, "B T Hkv D"], layer: LayerShape
    ) -> tuple[Shaped[Array, "B Hkv T W"], Shaped[Array, "B Hkv T W"], Shaped[Array, "B Hkv T W"], Array]:
        keys, values = self.codes.encode(store.codebooks, k, v)
        return keys, values, keys, dequantise(keys, store.codebooks.key_codebook, layer.head_dim, layer.dtype)

    def index_query(self, q: Float[Array, "*rows Hq D"], store: HostStore) -> Float[Array, "*rows Hq D"]:
        if store.codebooks.query_map is not None:
            return _mapped(q, store.codebooks.query_map)
        return self.codes.transform_query(q, store.codebooks)

    def index_keys(
        self, store: HostStore, keys: Float[Array, "B Hkv S D"], layer: LayerShape
    ) -> Float[Array, "B Hkv S D"]:
        return dequantise(store.keys, store.codebooks.key_codebook, layer.head_dim, layer.dtype)

    def critical_channels(
        self, size: Float[Array, "*rows Hkv D"], key_abs_max: Float[Array, "*rows Hkv D"]
    ) -> Int[Array, "*rows Hkv c"]:
        weight = size * key_abs_max
        pairs = jax.lax.top_k(weight.reshape(*weight.shape[:-1], -1, 2).sum(-1), self.channels)[1].astype(jnp.int32)
        return (2 * pairs[..., None] + jnp.arange(2, dtype=jnp.int32)).reshape(*pairs.shape[:-1], -1)

    def fetch(self, store: HostStore, channels: Int[Array, "B Hkv c"]) -> Float[Array, "B Hkv c S"]:
        codes = super().fetch(store, jax.lax.shift_right_logical(channels[..., ::2], 1))
        book = store.codebooks.key_codebook
        return dequantise(codes.swapaxes(2, 3), book, channels.shape[-1], book.dtype).swapaxes(2, 3)

    def attend_chosen(
        self, q: Float[Array, "B Hq D"], rows: Int[Array, "B Hkv k"], cache: WindowedCache, layer: LayerShape
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        """The codes come to the device, and VecInfer's attention reads them there."""
        store, how, exact = cache.store, self._how("fetch_channels"), self.exact_tokens(cache, layer)
        key_codes, value_codes = (fetch_channels(x, jnp.maximum(rows, 0), **how) for x in (store.keys, store.values))
        codes = dataclasses.replace(store.codebooks, key_codes=key_codes, value_codes=value_codes)
        if layer.axes.context is not None:  # heads have different numbers of rows here
            keys, values = self.codes.read(codes, jnp.int32(0), rows.shape[2], layer)
            return attend_fetched(q, keys, values, rows, exact, layer.scale)
        there = jnp.sum(rows[:, 0] >= 0, axis=-1)  # as many in every head, and they come first
        return self.codes.attend_codes(q, codes, there, exact, layer, layer.dtype)

    def read(
        self, store: HostStore, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        key_codes, value_codes = super().read(store, start, size, layer)
        codes = dataclasses.replace(store.codebooks, key_codes=key_codes, value_codes=value_codes)
        return self.codes.read(codes, jnp.int32(0), size, layer)


def _beside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on a second stream of the GPU. Products in it are not merged with the layer's own, for which they
    would wait."""
    return compute_on(function, compute_type="gpu_stream:1", out_memory_spaces=DEVICE)


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

    def index(row: jax.Array, at: jax.Array) -> list[jax.Array]:
        return [row, *(at if i == axis else jnp.int32(0) for i in range(1, held.ndim))]

    def cut(x: jax.Array, row: jax.Array, at: jax.Array, size: int) -> jax.Array:
        sizes = [1, *(size if i == axis else x.shape[i] for i in range(1, x.ndim))]
        return jax.lax.dynamic_slice(x, index(row, at), sizes)

    def write(held: jax.Array, piece: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(held, jax.device_put(piece.astype(held.dtype), space), index(row, at))

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
    return dataclasses.replace(cache, store=dataclasses.replace(cache.store, predicted=predicted, ahead=None))


def _mapped(x: Float[Array, "*rows n D"], matrix: Float32[Array, "Hkv D D"]) -> Float[Array, "*rows n D"]:
    """Every head's vectors by the matrix of its KV head, in float32, rounded to x's dtype; without a call, for a second
    stream (`_beside`)."""
    heads, dim, _ = matrix.shape
    grouped = x.astype(jnp.float32).reshape(-1, heads, x.shape[-2] // heads, dim)
    how = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    out = jax.lax.dot_general(grouped, matrix, (((3,), (1,)), ((1,), (0,))), **how)
    return out.transpose(1, 0, 2, 3).reshape(x.shape).astype(x.dtype)


def _grouped(q: Float[Array, "*rows Hq D"], layer: LayerShape) -> Float32[Array, "*rows Hkv G D"]:
    """The query heads of each KV head."""
    return q.astype(jnp.float32).reshape(*q.shape[:-2], layer.num_kv_heads, -1, q.shape[-1])


def _marked(index: Int[Array, "*rows n"], size: int) -> Bool[Array, "*rows size"]:
    """Which of `size` places are named in `index`; -1 names none."""
    flat = index.reshape(-1, index.shape[-1])
    marks = jnp.zeros((flat.shape[0], size), bool)
    marks = marks.at[jnp.arange(flat.shape[0])[:, None], jnp.where(flat < 0, size, flat)].set(True, mode="drop")
    return marks.reshape(*index.shape[:-1], size)

"""What every coded cache shares: the residual window, the sinks, and who reads what.

A token lives in a ring of the last `residual` tokens and is encoded when it leaves it; the first `sink` tokens
stay exact for ever. Methods that encode tokens in groups of g wait until a whole group has left the window, so their
exact tail is residual to residual + g - 1 tokens. Shapes are static, so nothing recompiles whatever the window. A
subclass says only how tokens are encoded, decoded and attended to from their codes.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels import ExactTokens
from pallas_kernels.exact import merge_exact, rounded
from vecinfer_jax.caches.attention import (
    Coded,
    Source,
    Tokens,
    blockwise_attention,
    causal_attention,
    coded_attention,
    join_tokens,
    later_attention,
    source_of,
)
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.cudnn import cudnn_serves
from vecinfer_jax.caches.rows import read_ring, write_chunk, write_token
from vecinfer_jax.caches.stripes import Stripes, merged, part_dtype, stripes, whole_prompt
from vecinfer_jax.errors import InputError
from vecinfer_jax.rope import apply_rope

Store = Any


@struct.dataclass
class WindowedCache:
    """Codes beside a ring of exact recent tokens and the exact sinks.

    store:        the method's codes and codebooks; coded slot n holds position sink + n.
    slots:        static, how many coded slots there are, on all devices of a context axis together; each of them holds
                  its own (`vecinfer_jax.caches.stripes`), and the window and the sinks whole.
    ring_*:       [B, Hkv, W, D], W = residual + group - 1, position p in slot p % W; keys after RoPE.
    sink_*:       [B, Hkv, sink, D], position p in slot p.
    lengths:      int32[B], tokens seen.
    """

    store: Store
    slots: int = struct.field(pytree_node=False)
    ring_keys: Float[Array, "B Hkv W D"] = array_field("window")
    ring_values: Float[Array, "B Hkv W D"] = array_field("window")
    sink_keys: Float[Array, "B Hkv sink D"] = array_field("window")
    sink_values: Float[Array, "B Hkv sink D"] = array_field("window")
    lengths: Int[Array, "B"] = array_field("state")


@dataclasses.dataclass(frozen=True)
class WindowedMethod(CacheMethod):
    """Base of the methods that encode a token when it leaves the residual window.

    residual: tokens kept exact at the recent end (0 is allowed: then a token is coded at once).
    sink:     tokens kept exact at the start.
    """

    residual: int = dataclasses.field(default=128, kw_only=True)
    sink: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("residual", "sink"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise InputError(f"{name}={value!r} must be a whole number of tokens, 0 or more")

    @property
    def token_group(self) -> int:
        """Tokens that are encoded together."""
        return 1

    @property
    def ring(self) -> int:
        """Tokens the ring holds: the window, and those that wait for their group to be whole."""
        return self.residual + self.token_group - 1

    # -- what a subclass defines

    @abc.abstractmethod
    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> Store:
        """Empty codes for `slots` tokens, and the codebooks to read them with."""

    def centred(self, k: Float[Array, "*B Hkv D"], store: Store) -> Float[Array, "*B Hkv D"]:
        """Keys after RoPE as everything here holds them: a method may take one constant off every key of a head, exact
        and coded alike, which the softmax over them cannot see."""
        del store
        return k

    @abc.abstractmethod
    def append(
        self,
        store: Store,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> Store:
        """Encodes tokens (keys after RoPE) into the given coded slots; slots outside the store are dropped.

        T is a multiple of `token_group`, and each group's slots are consecutive from a multiple of it, or all -1. On
        a device that holds some of the slots, these are places of its own: `self.stripes(layer).slot` knows which.
        """

    @abc.abstractmethod
    def read(
        self, store: Store, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        """Coded slots (places) start .. start + size - 1 as keys (after RoPE) and values; whole groups."""

    def attend(
        self, q: Float[Array, "B Hq D"], store: Store, count: Int[Array, "B"], slots: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        """One query (after RoPE) a sequence over the first `count` of `slots` coded slots: output and log-sum-exp.

        The default decodes a block of slots at a time; a fused kernel may stand in its place.
        """

        def read(start: Int[Array, ""], size: int) -> tuple[Float[Array, "B Hkv S D"], Float[Array, "B Hkv S D"]]:
            return self.read(store, start, size, layer)

        return coded_attention(q, read, slots, count, layer.num_kv_heads, layer.scale, self.token_group)

    def outliers_held(self, store: Store) -> Int[Array, "2"]:
        """Elements that the store keeps beside the codes, and those for which it had no room."""
        del store
        return jnp.zeros((2,), jnp.int32)

    # -- the protocol

    def stripes(self, layer: LayerShape) -> Stripes:
        """How coded slots are dealt over the devices of a context axis."""
        return stripes(layer.axes, self.token_group)

    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None) -> WindowedCache:
        self.validate(layer)

        def exact(tokens: int) -> Float[Array, "B Hkv R D"]:
            return jnp.zeros((batch, layer.num_kv_heads, tokens, layer.head_dim), layer.dtype)

        slots = self.stripes(layer).whole_turns(self.coded_slots(capacity))
        return WindowedCache(
            self.init_store(layer, batch, slots, calibration),
            slots,
            exact(self.ring),
            exact(self.ring),
            exact(self.sink),
            exact(self.sink),
            jnp.zeros((batch,), jnp.int32),
        )

    def coded_count(self, lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """Tokens held as codes when `lengths` tokens have been seen."""
        return jnp.maximum(lengths - self.residual - self.sink, 0) // self.token_group * self.token_group

    def coded_slots(self, capacity: int) -> int:
        """Coded slots of a cache for `capacity` tokens: whole groups, at least one."""
        return max((capacity - self.residual - self.sink) // self.token_group, 1) * self.token_group

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: WindowedCache,
    ) -> tuple[Float[Array, "B T Hq D"], WindowedCache]:
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        k = self.centred(k, cache.store)
        layer, dealt = chunk.layer, self.stripes(chunk.layer)
        k, v, positions = (whole_prompt(x, layer.axes) for x in (k, v, chunk.positions))
        updated = self._append_chunk(k, v, chunk, cache)
        if chunk.first and chunk.read == "exact":
            return causal_attention(q, k, v, chunk.lengths, layer.scale, layer.axes), updated

        t = jnp.arange(k.shape[1])[None, :]
        here = Tokens(k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.where(t < chunk.lengths[:, None], positions, -1))
        exact = here if chunk.first else join_tokens(self._joined_exact_tokens(cache), here)
        if chunk.read == "coded":
            boundary, held = self.sink + self.coded_count(chunk.positions + 1), self.coded_count(updated.lengths)
        else:  # what was coded before this chunk is read from codes, all else exactly
            held = self.coded_count(cache.lengths)
            if cudnn_serves(q) and dealt.shards == 1:

                def in_order(start: Int[Array, ""], size: int) -> tuple[jax.Array, jax.Array]:
                    keys, values = self.read(updated.store, start, size, layer)
                    return keys.swapaxes(1, 2), values.swapaxes(1, 2)

                before = Coded(in_order, updated.slots, held, self.token_group)
                window = self._joined_exact_tokens(cache)
                return later_attention(q, k, v, chunk.lengths, window, before, layer.scale), updated
            boundary = jnp.broadcast_to((self.sink + held)[:, None], chunk.positions.shape)

        def read(start: Int[Array, ""], size: int) -> Tokens:
            slots = dealt.slot(start + jnp.arange(size))[None, :]
            keys, values = self.read(updated.store, start, size, layer)
            held_at = jnp.where(slots < held[:, None], slots + self.sink, -1)
            return Tokens(dealt.gathered(keys, 2), dealt.gathered(values, 2), dealt.gathered(held_at, 1))

        used = jnp.max(dealt.most_held(held))
        sources = [
            source_of(exact, lambda s, t, boundary: (s < self.sink) | (s >= boundary)),
            Source(
                read,
                updated.slots // dealt.shards,
                used,
                lambda s, t, boundary: s < boundary,
                self.token_group,
                dealt.shards,
            ),
        ]
        return blockwise_attention(q, chunk.positions, boundary, sources, layer.num_kv_heads, layer.scale), updated

    def decode(
        self,
        q: Float[Array, "B Hq D"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        chunk: Chunk,
        cache: WindowedCache,
    ) -> tuple[Float[Array, "B Hq D"], WindowedCache]:
        layer, at = chunk.layer, chunk.positions[:, 0]
        cos, sin = chunk.cos[:, 0], chunk.sin[:, 0]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k = self.centred(k, cache.store)
        cache = self._append_token(k, v, at, layer, cache)
        part = self.attend_cache(q, cache, layer, part_dtype(q.dtype, layer.axes))
        return merged(*part, layer.axes).astype(q.dtype), cache

    def attend_cache(
        self, q: Float[Array, "B Hq D"], cache: WindowedCache, layer: LayerShape, dtype: Any
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        """One query (after RoPE) a sequence over all that this device's part of the cache holds: output in `dtype`, and
        log-sum-exp. A fused kernel may stand in its place."""
        coded = self.attend(q, cache.store, self.held(cache, layer), cache.slots // self.stripes(layer).shards, layer)
        return rounded(*merge_exact(*coded, q, self.exact_tokens(cache, layer), layer.scale), dtype)

    def held(self, cache: WindowedCache, layer: LayerShape) -> Int[Array, "B"]:
        """Coded tokens on this device."""
        return self.stripes(layer).held(self.coded_count(cache.lengths)).astype(jnp.int32)

    def exact_tokens(self, cache: WindowedCache, layer: LayerShape) -> list[ExactTokens]:
        """Sinks and ring, those of them that there are, with the slots that hold a token to be read exactly.

        All devices of a context axis hold them, and the first reads them.
        """
        reads = self.stripes(layer).index == 0
        parts = [cache.sink_keys, cache.ring_keys], [cache.sink_values, cache.ring_values], self._positions(cache)
        return [ExactTokens(k, v, (p >= 0) & reads) for k, v, p in zip(*parts, strict=True) if p.shape[1]]

    # -- window bookkeeping

    def _joined_exact_tokens(self, cache: WindowedCache) -> Tokens:
        """Sinks and ring with the positions they hold; a sink that is still in the ring counts once."""
        sinks, ring = self._positions(cache)
        return join_tokens(
            Tokens(cache.sink_keys, cache.sink_values, sinks), Tokens(cache.ring_keys, cache.ring_values, ring)
        )

    def _positions(self, cache: WindowedCache) -> list[Int[Array, "B W"]]:
        """Which position each slot of the sinks and of the ring holds, -1 where none is to be read there."""
        ring = read_ring(self.ring, cache.lengths)
        ring = jnp.where(ring >= self.sink + self.coded_count(cache.lengths)[:, None], ring, -1)
        sinks = jnp.arange(self.sink)[None, :]
        return [jnp.where(sinks < cache.lengths[:, None], sinks, -1), ring]

    def _append_token(
        self,
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        at: Int[Array, "B"],
        layer: LayerShape,
        cache: WindowedCache,
    ) -> WindowedCache:
        cache = self.push_token(cache, k, v, at, layer)
        return dataclasses.replace(cache, lengths=at + 1)

    def push_token(
        self,
        cache: WindowedCache,
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        at: Int[Array, "B"],
        layer: LayerShape,
    ) -> WindowedCache:
        """The cache with a token a sequence, of position at[b], in its ring or sinks, and what that pushes out as
        codes."""
        store = self.append(cache.store, *self.leaving(cache, k, v, at, layer), layer)
        return self.take_in(dataclasses.replace(cache, store=store), k, v, at)

    def leaving(
        self,
        cache: WindowedCache,
        k: Float[Array, "B Hkv D"] | None,
        v: Float[Array, "B Hkv D"] | None,
        at: Int[Array, "B"],
        layer: LayerShape,
    ) -> tuple[Float[Array, "B g Hkv D"], Float[Array, "B g Hkv D"], Int[Array, "B g"]]:
        """The group that a token of position at[b] pushes out of the window, and its places; most tokens complete none,
        and all places are -1 then. The token itself (k, v) belongs to it only where nothing is kept exact."""
        # In the ring the oldest token of a complete group stands where the new one goes.
        group = self.token_group
        coded = self.coded_count(at + 1)
        slots = (coded - group)[:, None] + jnp.arange(group)[None, :]
        position = slots + self.sink
        complete = (coded > self.coded_count(at))[:, None]
        places = self.stripes(layer).place(jnp.where(complete, slots, -1))

        def of(ring: Float[Array, "B Hkv W D"], new: Float[Array, "B Hkv D"] | None) -> Float[Array, "B g Hkv D"]:
            if not self.ring:
                assert new is not None
                return new[:, None]
            old = jnp.take_along_axis(ring, (position % self.ring)[:, None, :, None], axis=2).swapaxes(1, 2)
            if self.residual:
                return old
            assert new is not None
            return jnp.where((position == at[:, None])[:, :, None, None], new[:, None].astype(ring.dtype), old)

        return of(cache.ring_keys, k), of(cache.ring_values, v), places

    def take_in(
        self, cache: WindowedCache, k: Float[Array, "B Hkv D"], v: Float[Array, "B Hkv D"], at: Int[Array, "B"]
    ) -> WindowedCache:
        """The cache with a token a sequence, of position at[b], in its ring or sinks."""
        new: dict[str, Any] = {}
        if self.ring:
            slot = at % self.ring
            new |= {"ring_keys": write_token(cache.ring_keys, k, slot)}
            new |= {"ring_values": write_token(cache.ring_values, v, slot)}
        if self.sink:
            new |= {"sink_keys": write_token(cache.sink_keys, k, at)}
            new |= {"sink_values": write_token(cache.sink_values, v, at)}
        return dataclasses.replace(cache, **new)

    def _append_chunk(
        self,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: WindowedCache,
    ) -> WindowedCache:
        start, lengths, tokens = cache.lengths, cache.lengths + chunk.lengths, k.shape[1]
        store = cache.store
        before, after = self.coded_count(start), self.coded_count(lengths)
        if chunk.first:  # nothing is in the ring: what leaves the window is a slice of the chunk
            leaving = max(tokens - self.residual - self.sink, 0) // self.token_group * self.token_group
            leaving_k, leaving_v = (x[:, self.sink : self.sink + leaving] for x in (k, v))
        else:  # the groups that are whole now start in the ring and go on in the chunk
            leaving = (tokens + self.token_group - 1) // self.token_group * self.token_group
            position = self.sink + before[:, None] + jnp.arange(leaving)[None, :]
            offset = position - start[:, None]
            index = jnp.where(offset < 0, position % max(self.ring, 1), self.ring + jnp.minimum(offset, tokens - 1))
            leaving_k, leaving_v = (
                jnp.take_along_axis(jnp.concatenate([ring.swapaxes(1, 2), x], 1), index[:, :, None, None], axis=1)
                for ring, x in ((cache.ring_keys, k), (cache.ring_values, v))
            )
        if leaving:
            slots = before[:, None] + jnp.arange(leaving)[None, :]
            slots = jnp.where(slots < after[:, None], slots, -1)
            places, leaving_k, leaving_v = self.stripes(chunk.layer).own(before, slots, leaving_k, leaving_v)
            store = self.append(store, leaving_k, leaving_v, places, chunk.layer)
        position = start[:, None] + jnp.arange(tokens)[None, :]
        counts = position < lengths[:, None]
        ring_keys, ring_values = cache.ring_keys, cache.ring_values
        if self.ring:
            slot = jnp.where(counts & (position >= (lengths - self.ring)[:, None]), position % self.ring, -1)
            ring_keys, ring_values = write_chunk(ring_keys, k, slot), write_chunk(ring_values, v, slot)
        sink_keys, sink_values = cache.sink_keys, cache.sink_values
        if self.sink:
            slot = jnp.where(counts, position, -1)
            sink_keys, sink_values = write_chunk(sink_keys, k, slot), write_chunk(sink_values, v, slot)
        return WindowedCache(store, cache.slots, ring_keys, ring_values, sink_keys, sink_values, lengths)

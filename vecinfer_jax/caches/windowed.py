"""What every coded cache shares: the residual window, the sinks, and who reads what.

A token lives in a ring of the last `residual` tokens and is encoded when it leaves it; the first `sink` tokens
stay exact for ever. Shapes are static, so nothing recompiles whatever the window. A subclass says only how
tokens are encoded, decoded and attended to from their codes.
"""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import split_k
from vecinfer_jax.caches.attention import (
    Tokens,
    causal_attention,
    join_tokens,
    mixed_attention,
    partial_attention,
)
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.rows import read_ring, write_chunk, write_token
from vecinfer_jax.errors import InputError
from vecinfer_jax.rope import apply_rope

Store = Any


@struct.dataclass
class WindowedCache:
    """Codes beside a ring of exact recent tokens and the exact sinks.

    store:        the method's codes and codebooks; coded slot n holds position sink + n.
    ring_*:       [B, Hkv, residual, D], position p in slot p % residual; keys after RoPE.
    sink_*:       [B, Hkv, sink, D], position p in slot p.
    lengths:      int32[B], tokens seen.
    """

    store: Store
    ring_keys: Float[Array, "B Hkv R D"] = array_field("window")
    ring_values: Float[Array, "B Hkv R D"] = array_field("window")
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

    # -- what a subclass defines

    @abc.abstractmethod
    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> Store:
        """Empty codes for `slots` tokens, and the codebooks to read them with."""

    @abc.abstractmethod
    def append(
        self,
        store: Store,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> Store:
        """Encodes tokens (keys after RoPE) into the given coded slots; slots outside the store are dropped."""

    @abc.abstractmethod
    def read(self, store: Store, layer: LayerShape) -> tuple[Float[Array, "B Hkv S D"], Float[Array, "B Hkv S D"]]:
        """Every coded slot as a key (after RoPE) and a value."""

    @abc.abstractmethod
    def attend(
        self, q: Float[Array, "B Hq D"], store: Store, count: Int[Array, "B"], layer: LayerShape
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        """One query (after RoPE) a sequence over the first `count` coded slots: output and log-sum-exp."""

    # -- the protocol

    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None) -> WindowedCache:
        self.validate(layer)

        def exact(tokens: int) -> Float[Array, "B Hkv R D"]:
            return jnp.zeros((batch, layer.num_kv_heads, tokens, layer.head_dim), layer.dtype)

        slots = max(capacity - self.residual - self.sink, 1)
        return WindowedCache(
            self.init_store(layer, batch, slots, calibration),
            exact(self.residual),
            exact(self.residual),
            exact(self.sink),
            exact(self.sink),
            jnp.zeros((batch,), jnp.int32),
        )

    def coded_count(self, lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """Tokens held as codes when `lengths` tokens have been seen."""
        return jnp.maximum(lengths - self.residual - self.sink, 0)

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: WindowedCache,
    ) -> tuple[Float[Array, "B T Hq D"], WindowedCache]:
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        updated = self._append_chunk(k, v, chunk, cache)
        if chunk.first and chunk.read == "exact":
            return causal_attention(q, k, v, chunk.lengths, chunk.layer.scale), updated

        t = jnp.arange(k.shape[1])[None, :]
        here = Tokens(k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.where(t < chunk.lengths[:, None], chunk.positions, -1))
        exact = here if chunk.first else join_tokens(self._exact_tokens(cache), here)
        if chunk.read == "coded":
            boundary = chunk.positions - self.residual + 1
        else:  # what was coded before this chunk is read from codes, all else exactly
            boundary = jnp.broadcast_to((cache.lengths - self.residual)[:, None], chunk.positions.shape)
        coded_keys, coded_values = self.read(updated.store, chunk.layer)
        slots = jnp.arange(coded_keys.shape[2])[None, :]
        held = slots < self.coded_count(updated.lengths)[:, None]
        coded = Tokens(coded_keys, coded_values, jnp.where(held, slots + self.sink, -1))
        out = mixed_attention(q, chunk.positions, boundary, exact, coded, sink=self.sink, scale=chunk.layer.scale)
        return out, updated

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
        cache = self._append_token(k, v, at, layer, cache)
        coded = self.attend(q, cache.store, self.coded_count(cache.lengths), layer)
        if self.residual + self.sink == 0:
            return coded[0].astype(q.dtype), cache
        exact = self._exact_tokens(cache)
        recent = partial_attention(q, exact.keys, exact.values, exact.positions >= 0, layer.scale)
        outputs = jnp.stack([coded[0], recent[0]], axis=-2)
        out, _ = split_k.merge(outputs, jnp.stack([coded[1], recent[1]], axis=-1))
        return out.astype(q.dtype), cache

    # -- window bookkeeping

    def _exact_tokens(self, cache: WindowedCache) -> Tokens:
        """Sinks and ring with the positions they hold; a sink that is still in the ring counts once."""
        ring = read_ring(self.residual, cache.lengths)
        ring = jnp.where(ring >= self.sink, ring, -1)
        sinks = jnp.arange(self.sink)[None, :]
        sinks = jnp.where(sinks < cache.lengths[:, None], sinks, -1)
        return join_tokens(
            Tokens(cache.sink_keys, cache.sink_values, sinks), Tokens(cache.ring_keys, cache.ring_values, ring)
        )

    def _append_token(
        self,
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        at: Int[Array, "B"],
        layer: LayerShape,
        cache: WindowedCache,
    ) -> WindowedCache:
        leaving = at - self.residual
        ring_keys, ring_values = cache.ring_keys, cache.ring_values
        if self.residual:
            slot = at % self.residual
            index = slot[:, None, None, None]
            old_k = jnp.take_along_axis(ring_keys, index, axis=2)[:, :, 0]
            old_v = jnp.take_along_axis(ring_values, index, axis=2)[:, :, 0]
            ring_keys, ring_values = write_token(ring_keys, k, slot), write_token(ring_values, v, slot)
        else:
            old_k, old_v = k, v
        store = self.append(cache.store, old_k[:, None], old_v[:, None], (leaving - self.sink)[:, None], layer)
        sink_keys, sink_values = cache.sink_keys, cache.sink_values
        if self.sink:
            sink_keys, sink_values = write_token(sink_keys, k, at), write_token(sink_values, v, at)
        return WindowedCache(store, ring_keys, ring_values, sink_keys, sink_values, at + 1)

    def _append_chunk(
        self,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: WindowedCache,
    ) -> WindowedCache:
        start, lengths = cache.lengths, cache.lengths + chunk.lengths
        leaves_before = (lengths - self.residual)[:, None]
        store = cache.store
        if not chunk.first and self.residual:  # the chunk pushes older tokens out of the ring
            held = read_ring(self.residual, start)
            store = self.append(
                store,
                cache.ring_keys.swapaxes(1, 2),
                cache.ring_values.swapaxes(1, 2),
                self._slots(held, (held >= 0) & (held < leaves_before)),
                chunk.layer,
            )
        position = start[:, None] + jnp.arange(k.shape[1])[None, :]
        counts = position < lengths[:, None]
        if not chunk.first or k.shape[1] > self.residual + self.sink:  # else the window holds them all
            leaving = self._slots(position, counts & (position < leaves_before))
            store = self.append(store, k, v, leaving, chunk.layer)
        ring_keys, ring_values = cache.ring_keys, cache.ring_values
        if self.residual:
            slot = jnp.where(counts & (position >= leaves_before), position % self.residual, -1)
            ring_keys, ring_values = write_chunk(ring_keys, k, slot), write_chunk(ring_values, v, slot)
        sink_keys, sink_values = cache.sink_keys, cache.sink_values
        if self.sink:
            slot = jnp.where(counts, position, -1)
            sink_keys, sink_values = write_chunk(sink_keys, k, slot), write_chunk(sink_values, v, slot)
        return WindowedCache(store, ring_keys, ring_values, sink_keys, sink_values, lengths)

    def _slots(self, position: Int[Array, "B T"], leaving: Bool[Array, "B T"]) -> Int[Array, "B T"]:
        """Coded slot of each token that leaves the window; -1 for those that do not (and for sinks)."""
        return jnp.where(leaving & (position >= self.sink), position - self.sink, -1)

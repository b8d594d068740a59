"""A cache whose tokens are split over the devices of a mesh axis: which device keeps which, and attention over all.

Slots are dealt to the devices block by block in turn, so that the shares differ by one block at most however long the
cache has grown. A prompt is dealt otherwise: each device runs two pieces of it, one as far from the start as the other
is from the end, so that all see as many earlier tokens. Everything here is called inside `shard_map`, but for
`Stripes.whole_turns`; where nothing is split, every function gives back what it was given.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Shaped

from pallas_kernels import nuq, split_k
from vecinfer_jax.caches.base import MeshAxes

# Slots dealt at a time: as many as share a pool of outliers.
BLOCK = nuq.TILE


@dataclasses.dataclass(frozen=True)
class Stripes:
    """How the slots of a cache are dealt over the mesh axis `axis` of `shards` devices, `block` slots at a time.

    A *slot* counts over the whole cache, a *place* over the device's own share.
    """

    axis: str | None = None
    shards: int = 1
    block: int = BLOCK

    @property
    def index(self) -> Int[Array, ""]:
        """Which of the devices this is."""
        return jnp.int32(0) if self.axis is None else lax.axis_index(self.axis)

    def whole_turns(self, slots: int) -> int:
        """Slots to allocate for `slots` of them, the same for every device."""
        return slots if self.axis is None else math.ceil(slots / self._turn) * self._turn

    def place(self, slots: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Where slots are here; -1 for those of other devices and for slots below 0."""
        if self.axis is None:
            return slots
        here = (slots >= 0) & (slots // self.block % self.shards == self.index)
        return jnp.where(here, slots // self._turn * self.block + slots % self.block, -1)

    def slot(self, places: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Which slots this device's places are."""
        if self.axis is None:
            return places
        return (places // self.block * self.shards + self.index) * self.block + places % self.block

    def held(self, count: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """How many of the first `count` slots are here: they are the first places."""
        return count if self.axis is None else self._held_by(self.index, count)

    def most_held(self, count: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """The same of the device that has most of them."""
        return count if self.axis is None else self._held_by(0, count)

    def own(
        self, first: Int[Array, "B"], slots: Int[Array, "B T"], *tokens: Shaped[Array, "B T ..."]
    ) -> tuple[Array, ...]:
        """Of tokens for the slots first .. first + T - 1 of each row (-1: none), those of this device.

        Returns their places [B, N], -1 where there is none, and what was given of them [B, N, ...].
        """
        if self.axis is None:
            return slots, *tokens
        count = slots.shape[1]
        most = count // self._turn * self.block + min(count % self._turn, self.block)
        places = self.held(first)[:, None] + jnp.arange(most)[None, :]
        index = self.slot(places) - first[:, None]
        inside = jnp.minimum(index, count - 1)
        there = (index < count) & (jnp.take_along_axis(slots, inside, axis=1) >= 0)

        def of_device(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B N ..."]:
            return jnp.take_along_axis(x, inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), axis=1)

        return jnp.where(there, places, -1), *map(of_device, tokens)

    def gathered(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """What all devices hold, side by side along `axis`."""
        return x if self.axis is None else lax.all_gather(x, self.axis, axis=axis, tiled=True)

    def in_order(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """What all devices hold along `axis` at all places, in the order of slots."""
        if self.axis is None:
            return x
        shape = [*x.shape[:axis], self.shards, -1, self.block, *x.shape[axis + 1 :]]
        dealt = jnp.swapaxes(self.gathered(x, axis).reshape(shape), axis, axis + 1)
        return dealt.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def largest(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Of each element, the largest that any device has."""
        return x if self.axis is None else lax.pmax(x, self.axis)

    def logsumexp(self, x: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """Of each element, the log-sum-exp over the devices."""
        if self.axis is None:
            return x
        peak = lax.pmax(x, self.axis)
        return peak + jnp.log(lax.psum(jnp.exp(x - peak), self.axis))

    def best(
        self, places: Int[Array, "*rows k"], scores: Float32[Array, "*rows k"], wanted: int
    ) -> Int[Array, "*rows k"]:
        """Those of this device's places that have one of the `wanted` largest scores of all devices; -1 for the others.

        Places of -1 are none. Of equal scores the lower slot's is larger, and one that is no number is the smallest.
        """
        if self.axis is None:
            return places
        there = places >= 0
        costs = jnp.where(there & ~jnp.isnan(scores), -scores, jnp.inf)
        slots = jnp.where(there, self.slot(places), jnp.iinfo(jnp.int32).max)
        mine = jnp.stack([lax.bitcast_convert_type(costs, jnp.int32), slots], axis=-2)
        words, all_slots = jnp.moveaxis(self.gathered(mine, mine.ndim - 1), -2, 0)
        sorted_costs, sorted_slots = lax.sort((lax.bitcast_convert_type(words, jnp.float32), all_slots), num_keys=2)
        last = min(wanted, sorted_costs.shape[-1]) - 1
        cost, slot = sorted_costs[..., last, None], sorted_slots[..., last, None]
        return jnp.where(there & ((costs < cost) | (costs == cost) & (slots <= slot)), places, -1)

    @property
    def _turn(self) -> int:
        return self.block * self.shards

    def _held_by(self, index: Int[Array, ""] | int, count: Int[Array, "*n"]) -> Int[Array, "*n"]:
        rest = jnp.clip(count % self._turn - index * self.block, 0, self.block)
        return count // self._turn * self.block + rest


def stripes(axes: MeshAxes, group: int = 1) -> Stripes:
    """How a cache that encodes `group` tokens together is dealt; whole groups lie on one device."""
    if axes.context is None:
        return Stripes()
    return Stripes(axes.context, axes.shards, math.lcm(BLOCK, group))


# -- attention over the shares of all devices


def part_dtype(dtype: Any, axes: MeshAxes) -> Any:
    """In which a device's part of an attention is to be handed to `merged`, that is to give `dtype`."""
    return dtype if axes.context is None else jnp.float32


def merged(output: Float[Array, "B Hq D"], lse: Float[Array, "B Hq"] | None, axes: MeshAxes) -> Float[Array, "B Hq D"]:
    """The output of attention over all devices' tokens, from this device's: normalised output and log-sum-exp.

    `axes.merge` says by which collective: see `MERGES`. All are exact but for the rounding of what they send.
    """
    return output if axes.context is None or lse is None else MERGES[axes.merge](output, lse, axes.context, axes.shards)


def _pack(output: Float[Array, "B Hq D"], lse: Float[Array, "B Hq"]) -> Float[Array, "B Hq W"]:
    return jnp.concatenate([output.astype(jnp.float32), lse[..., None]], axis=-1)


def _merge_packed(parts: Float[Array, "P B Hq W"]) -> Float[Array, "B Hq D"]:
    parts = jnp.moveaxis(parts, 0, -2)
    return split_k.merge(parts[..., :-1], parts[..., -1])[0]


def _gather(output: Float[Array, "B Hq D"], lse: Float[Array, "B Hq"], axis: str, shards: int) -> Array:
    return _merge_packed(lax.all_gather(_pack(output, lse), axis))


def _gather_16(output: Float[Array, "B Hq D"], lse: Float[Array, "B Hq"], axis: str, shards: int) -> Array:
    words = [lax.bitcast_convert_type(x, jnp.uint16) for x in (output.astype(jnp.bfloat16), lse)]
    parts = jnp.moveaxis(lax.all_gather(jnp.concatenate(words, axis=-1), axis), 0, -2)
    outputs = lax.bitcast_convert_type(parts[..., :-2], jnp.bfloat16)
    return split_k.merge(outputs, lax.bitcast_convert_type(parts[..., -2:], jnp.float32))[0]


def _sum(output: Float[Array, "B Hq D"], lse: Float[Array, "B Hq"], axis: str, shards: int) -> Array:
    part = _pack(jnp.where((lse > split_k.EMPTY)[..., None], output, 0.0), lse)
    rows = jnp.arange(shards).reshape(-1, 1, 1, 1)
    return _merge_packed(lax.psum(jnp.where(rows == lax.axis_index(axis), part[None], 0.0), axis))


def _max_sum(output: Float[Array, "B Hq D"], lse: Float[Array, "B Hq"], axis: str, shards: int) -> Array:
    some = lse > split_k.EMPTY
    weight = jnp.where(some, jnp.exp(lse - lax.pmax(lse, axis)), 0.0)[..., None]
    weighted = jnp.where(some[..., None], output * weight, 0.0)
    total = lax.psum(jnp.concatenate([weighted, weight], axis=-1), axis)
    return total[..., :-1] / jnp.maximum(total[..., -1:], jnp.finfo(jnp.float32).tiny)


def _permute(output: Float[Array, "B Hq D"], lse: Float[Array, "B Hq"], axis: str, shards: int) -> Array:
    part = _pack(output, lse)
    parts = [part]
    for _ in range(shards - 1):
        part = lax.ppermute(part, axis, [(i, (i + 1) % shards) for i in range(shards)])
        parts.append(part)
    # In one order on all devices, so that all have the same bits.
    order = (lax.axis_index(axis) - jnp.arange(shards)) % shards
    return _merge_packed(jnp.zeros_like(jnp.stack(parts)).at[order].set(jnp.stack(parts)))


# One packed all-gather, in float32 or with outputs in bfloat16; the same as one all-reduce of a row a device; a maximum
# and then a sum; a ring of permutations.
MERGES: dict[str, Callable[..., Any]] = {
    "gather": _gather,
    "gather-16": _gather_16,
    "sum": _sum,
    "max-sum": _max_sum,
    "permute": _permute,
}


# -- a prompt


def prompt_pieces(axes: MeshAxes) -> int:
    """A chunk of prompt is cut into this many pieces of equal length."""
    return 1 if axes.context is None else 2 * axes.shards


def prompt_share(x: Shaped[Array, "B T ..."], axes: MeshAxes) -> Shaped[Array, "B N ..."]:
    """This device's tokens of a chunk that all have: pieces i and 2 * shards - 1 - i."""
    if axes.context is None:
        return x
    pieces, index = prompt_pieces(axes), lax.axis_index(axes.context)
    size = x.shape[1] // pieces
    near, far = (lax.dynamic_slice_in_dim(x, i * size, size, axis=1) for i in (index, pieces - 1 - index))
    return jnp.concatenate([near, far], axis=1)


def whole_prompt(x: Shaped[Array, "B N ..."], axes: MeshAxes) -> Shaped[Array, "B T ..."]:
    """The chunk, from every device's tokens of it: undoes `prompt_share`."""
    if axes.context is None:
        return x
    parts = lax.all_gather(x, axes.context)
    halves = parts.reshape(*parts.shape[:2], 2, -1, *x.shape[2:])
    inorder = jnp.concatenate([halves[:, :, 0], halves[::-1, :, 1]])
    return jnp.moveaxis(inorder, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])


def of_prompt(x: jax.Array, offsets: Int[Array, "N"], wanted: Int[Array, "B"], axes: MeshAxes) -> jax.Array:
    """Token wanted[b] of each row of a chunk, [B, ...], of which this device has those at `offsets` [B, N, ...]."""
    here = (offsets[None, :] == wanted[:, None]).reshape(x.shape[0], -1, *[1] * (x.ndim - 2))
    found = jnp.sum(jnp.where(here, x, 0), axis=1)
    return found if axes.context is None else lax.psum(found, axes.context)

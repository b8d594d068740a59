"""Keys and values as integers that share scales and zeros: of keys, some tokens of a channel; of values, some channels
of a token (KIVI: arXiv 2402.02750, section 3.2; TailorKV: arXiv 2505.19586, section 3.2).

x is read back as zero + code * scale, with code in 0 .. 2^bits - 1. Scale and zero take 16 bits each, as float16
whatever the model's dtype is: bfloat16 would keep 8 bits of a zero that may be many steps large. Where keys or values
exceed float16's range (65,504), scale and zero stay at its end and what is read back is wrong but finite.

Tokens are stored in tiles: groups of tokens leave a residual window whole, so no smaller part is ever written.
`Layout` says in which order a tile's codes, scales and zeros lie: that in which the lanes of a warp want them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, Float32, Int, UInt8

from pallas_kernels import packing

LARGEST = 65504.0
# Tokens of a tile whose order is the kernels'.
TILE = 32
_LANES = 32
# Axes of a flat array and the order in which they are stored.
_Order = tuple[tuple[int, ...], tuple[int, ...]]


class Scaling(NamedTuple):
    """How codes are read back; both float16, of shapes that broadcast against the codes. No scale is negative."""

    scale: Float16[Array, "..."]
    zero: Float16[Array, "..."]


def fit(x: Float[Array, "..."], axis: int, bits: int) -> Scaling:
    """The range of x along an axis (kept, with length 1) in 2^bits - 1 steps. Where all x are equal, scale is 0."""
    x = x.astype(jnp.float32)
    zero = _as_held(jnp.clip(jnp.min(x, axis=axis, keepdims=True), -LARGEST, LARGEST), jnp.float16)
    # A product, as compilers make of a quotient by a constant: scales are the same however this is run.
    step = (jnp.max(x, axis=axis, keepdims=True) - zero) * (1 / (2**bits - 1))
    scale = _as_held(jnp.clip(step, 0.0, LARGEST), jnp.float16)
    return Scaling(scale.astype(jnp.float16), zero.astype(jnp.float16))


def quantise(x: Float[Array, "*shape"], scaling: Scaling, bits: int) -> Int[Array, "*shape"]:
    """Codes nearest to what they are read back as."""
    scale, zero = (part.astype(jnp.float32) for part in scaling)
    # Not a quotient, of which compilers make this product or do not: half-way between two codes it would matter.
    steps = (x.astype(jnp.float32) - zero) * (1.0 / jnp.where(scale > 0, scale, 1.0))
    return jnp.clip(jnp.round(steps), 0, 2**bits - 1).astype(jnp.int32)


def dequantise(codes: Int[Array, "*shape"], scaling: Scaling) -> Float32[Array, "*shape"]:
    """What `quantise` coded."""
    scale, zero = (part.astype(jnp.float32) for part in scaling)
    return zero + codes.astype(jnp.float32) * scale


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the coded tokens of a head are stored, in rows [..., S, D] of S tokens, whole groups of them.

    dim:           D, elements of a token.
    bits:          of a code.
    token_group:   tokens of a key's channel that share a scale and a zero.
    channel_group: channels of a token's value that do; the last group is shorter where it does not divide D.

    Arrays of keys, and of values:
    codes       uint8[..., S / tile, bytes]: a tile's codes, packed.
    scale_zero  float16[..., S / token_group, 2 D]: the scales of a group's channels, then their zeros; of values
                float16[..., S / tile, 2 tile parts]: a scale and a zero of each token and group of channels.

    A tile is a group of tokens, or 32 tokens of one that is a multiple of that. *Its order* is then, where the kernels
    serve D and bits, that of a warp whose lane 4 r + j multiplies keys or values 8 g + t of the tile on tensor cores
    (`pallas_kernels.mosaic_gpu.decode_attention`): of keys, quarter j of token t = r / 2 + 4 (r % 2); of values,
    channels 32 i + 4 r ... 32 i + 4 r + 3 of tokens t = j and j + 4. Its pairs of neighbouring codes follow each other,
    the first of a pair in the low and the second in the high half of a 32-bit word; it reads 16 bytes (8 of 1-bit
    codes of 64 channels) beside those of the next lane. A value's scale and zero stand side by side, for each group of
    channels the tokens of r = 0, 1, ... one after the other; keys' scales so that those which meet the queries of a
    lane do. Elsewhere tokens and channels stand in their own order.
    """

    dim: int
    bits: int
    token_group: int
    channel_group: int

    @property
    def tile(self) -> int:
        """Tokens whose codes are stored together."""
        return TILE if self.token_group % TILE == 0 else self.token_group

    @property
    def parts(self) -> int:
        """Groups of channels of a value."""
        return -(-self.dim // self.channel_group)

    @property
    def for_lanes(self) -> bool:
        """Whether a tile has the order of a warp's lanes."""
        return self.tile == TILE and self.dim in (64, 128) and self.bits in (1, 2, 4) and self.channel_group % 32 == 0

    @property
    def tile_bytes(self) -> int:
        """Of a tile's codes, keys' or values'."""
        return packing.num_bytes(self.tile * self.dim, self.bits)

    def key_shapes(self, tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The last axes of the keys' codes, and of their scales and zeros."""
        return (tokens // self.tile, self.tile_bytes), (tokens // self.token_group, 2 * self.dim)

    def value_shapes(self, tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The same of values."""
        return (tokens // self.tile, self.tile_bytes), (tokens // self.tile, 2 * self.tile * self.parts)

    # -- encoding and decoding

    def encode_keys(
        self, keys: Float[Array, "*rows S D"]
    ) -> tuple[UInt8[Array, "*rows tiles bytes"], Float16[Array, "*rows groups scales"]]:
        """Codes, scales and zeros of whole groups of tokens."""
        keys = _as_held(keys, keys.dtype)
        *rows, tokens, _ = keys.shape
        grouped = keys.reshape(*rows, tokens // self.token_group, self.token_group, self.dim)
        scaling = fit(grouped, -2, self.bits)
        codes = quantise(grouped, scaling, self.bits).reshape(keys.shape)
        scale, zero = (x[..., 0, :] for x in scaling)
        return self.pack_keys(codes), jnp.concatenate([_arranged(scale, self._scale_order), zero], axis=-1)

    def encode_values(
        self, values: Float[Array, "*rows S D"]
    ) -> tuple[UInt8[Array, "*rows tiles bytes"], Float16[Array, "*rows tiles scales"]]:
        """Codes, scales and zeros."""
        values = _as_held(values, values.dtype)
        *rows, tokens, _ = values.shape
        # The last channel again fills up the last group: neither minimum nor maximum changes.
        room = [(0, 0)] * (len(rows) + 1) + [(0, self.parts * self.channel_group - self.dim)]
        padded = jnp.pad(values, room, mode="edge").reshape(*rows, tokens, self.parts, self.channel_group)
        scaling = Scaling(*(x[..., 0] for x in fit(padded, -1, self.bits)))
        codes = quantise(values, self._of_channels(scaling), self.bits)
        flat = jnp.stack(scaling, axis=-1).reshape(*rows, *self.value_shapes(tokens)[1])
        return self.pack_values(codes), _arranged(flat, self._factor_order)

    def decode_keys(
        self, codes: UInt8[Array, "*rows tiles bytes"], scale_zero: Float16[Array, "*rows groups scales"]
    ) -> Float32[Array, "*rows S D"]:
        """What `encode_keys` coded."""
        index, scaling = self.unpack_keys(codes), self.scaling_of_keys(scale_zero)
        *rows, tokens, _ = index.shape
        grouped = index.reshape(*rows, tokens // self.token_group, self.token_group, self.dim)
        return dequantise(grouped, Scaling(*(x[..., None, :] for x in scaling))).reshape(index.shape)

    def decode_values(
        self, codes: UInt8[Array, "*rows tiles bytes"], scale_zero: Float16[Array, "*rows tiles scales"]
    ) -> Float32[Array, "*rows S D"]:
        """What `encode_values` coded."""
        return dequantise(self.unpack_values(codes), self._of_channels(self.scaling_of_values(scale_zero)))

    def scaling_of_keys(self, scale_zero: Float16[Array, "*rows groups scales"]) -> Scaling:
        """Of each group of tokens and channel, [..., groups, D]."""
        scale, zero = jnp.split(scale_zero, 2, axis=-1)
        return Scaling(_restored(scale, self._scale_order), zero)

    def scaling_of_values(self, scale_zero: Float16[Array, "*rows tiles scales"]) -> Scaling:
        """Of each token and group of channels, [..., S, parts]."""
        *rows, tiles, _ = scale_zero.shape
        pairs = _restored(scale_zero, self._factor_order).reshape(*rows, tiles * self.tile, self.parts, 2)
        return Scaling(pairs[..., 0], pairs[..., 1])

    def _of_channels(self, scaling: Scaling) -> Scaling:
        """[..., parts] -> [..., D]."""
        return Scaling(*(jnp.repeat(x, self.channel_group, axis=-1)[..., : self.dim] for x in scaling))

    # -- the order within a tile

    def pack_keys(self, codes: Int[Array, "*rows S D"]) -> UInt8[Array, "*rows tiles bytes"]:
        """Keys' codes, as they are stored."""
        return self._pack(codes, self._key_order)

    def pack_values(self, codes: Int[Array, "*rows S D"]) -> UInt8[Array, "*rows tiles bytes"]:
        """Values' codes, as they are stored."""
        return self._pack(codes, self._value_order)

    def unpack_keys(self, codes: UInt8[Array, "*rows tiles bytes"]) -> Int[Array, "*rows S D"]:
        """What `pack_keys` packed."""
        return self._unpack(codes, self._key_order)

    def unpack_values(self, codes: UInt8[Array, "*rows tiles bytes"]) -> Int[Array, "*rows S D"]:
        """What `pack_values` packed."""
        return self._unpack(codes, self._value_order)

    def _pack(self, codes: Array, order: Sequence[_Order]) -> Array:
        *rows, tokens, _ = codes.shape
        flat = codes.reshape(*rows, tokens // self.tile, self.tile * self.dim)
        return packing.pack(_arranged(flat, order), self.bits)

    def _unpack(self, codes: Array, order: Sequence[_Order]) -> Array:
        *rows, tiles, _ = codes.shape
        flat = packing.unpack(codes, self.bits, self.tile * self.dim)
        return _restored(flat, order).reshape(*rows, tiles * self.tile, self.dim)

    @property
    def _key_order(self) -> list[_Order]:
        # Token 8 g + 4 odd + half, channel of quarter j, pair, one of the two -> lane 4 (2 half + odd) + j.
        return [((4, 2, 4, 4, self.dim // 8, 2), (2, 1, 3, 0, 4, 5)), self._lanes] if self.for_lanes else []

    @property
    def _value_order(self) -> list[_Order]:
        # Token 8 g + 4 far + j, channel 32 i + 4 r + 2 pair + one of the two -> lane 4 r + j.
        return [((4, 2, 4, self.dim // 32, 8, 2, 2), (4, 2, 0, 1, 3, 5, 6)), self._lanes] if self.for_lanes else []

    @property
    def _lanes(self) -> _Order:
        """Pairs of each lane -> words that the lanes read at a time, side by side; in a word, halves of the pairs."""
        words = self.dim * self.bits // 32
        at_once = min(words, 4)
        return (_LANES, words // at_once, at_once, 16 // self.bits, 2), (1, 0, 2, 4, 3)

    @property
    def _scale_order(self) -> list[_Order]:
        # A query's column of the tensor cores has every other pair of a quarter.
        return [((4, self.dim // 16, 2, 2), (0, 2, 1, 3))] if self.for_lanes else []

    @property
    def _factor_order(self) -> list[_Order]:
        return [((4, 2, 4, self.parts, 2), (3, 2, 1, 0, 4))] if self.for_lanes else []


def _as_held(x: Float[Array, "*shape"], dtype: Any) -> Float32[Array, "*shape"]:
    """x as a dtype holds it. Compilers may leave out a conversion there and back, so that codes were not of the scale
    that they are read back with, or a prompt's not those of the same tokens from a window."""
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)


def _arranged(x: Array, orders: Sequence[_Order]) -> Array:
    """The last axis in a stored order."""
    rows = x.shape[:-1]
    for shape, order in orders:
        x = x.reshape(*rows, *shape).transpose(*range(len(rows)), *(len(rows) + i for i in order))
    return x.reshape(*rows, math.prod(orders[0][0])) if orders else x


def _restored(x: Array, orders: Sequence[_Order]) -> Array:
    """What `_arranged` arranged."""
    rows = x.shape[:-1]
    for shape, order in reversed(orders):
        back = np.argsort(order)
        x = x.reshape(*rows, *(shape[i] for i in order)).transpose(*range(len(rows)), *(len(rows) + i for i in back))
    return x.reshape(*rows, math.prod(orders[0][0])) if orders else x

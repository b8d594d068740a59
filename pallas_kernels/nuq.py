"""The stored form of non-uniformly quantised keys and values (KVQuant, arXiv 2401.18079): codes and outliers.

An element is read back as s * c[code] + z, with a codebook c of 2^bits entries on [-1, 1], and where it is an outlier a
difference is added. Keys have a scale and a zero for every channel and are kept in an order of channels in which both
partners of a rotary pair, c and c + D/2, lie in the same quarter (`pair_order`). A token has one scale and one zero
for the values of all its KV heads.

Outliers lie in pools of a fixed number of slots, one pool for every tile of 64 tokens of a KV head. A slot is a word:
its low 16 bits say where, token_in_tile * D + channel, and its high 16 bits hold the float16 difference. An empty slot
is 0, which adds 0 to the tile's first element.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, UInt8, UInt32

from pallas_kernels import packing

# Tokens whose outliers share a pool.
TILE = 64
# Elements of a tile that 16 bits can name.
MAX_DIM = 2**16 // TILE
# The largest float16.
LARGEST = 65504.0


@functools.lru_cache(maxsize=16)
def pair_order(dim: int) -> np.ndarray:
    """Which channel stands at each place of a coded key: quarter j has channels j*D/8 ... (j+1)*D/8 - 1 and then their
    rotary partners, D/2 further on."""
    eighth = dim // 8
    quarters = [np.arange(j * eighth, (j + 1) * eighth) for j in range(4)]
    return np.concatenate([half for low in quarters for half in (low, low + dim // 2)])


def nearest(x: Float[Array, "*shape"], codebook: Float32[Array, "K"]) -> Int[Array, "*shape"]:
    """The index of the nearest entry of an ascending codebook; half-way between two, the lower."""
    middles = (codebook[1:] + codebook[:-1]) / 2
    return jnp.sum(x[..., None] > middles, axis=-1, dtype=jnp.int32)


def looked_up(index: Int[Array, "*shape"], codebook: Float32[Array, "K"]) -> Float32[Array, "*shape"]:
    """The entries that codes stand for."""
    return codebook.at[index].get(mode="promise_in_bounds")


def pack_keys(index: Int[Array, "*rows D"], bits: int) -> UInt8[Array, "*rows bytes"]:
    """Codes of keys, given channel by channel, packed in `pair_order`."""
    return packing.pack(index[..., pair_order(index.shape[-1])], bits)


def unpack_keys(codes: UInt8[Array, "*rows bytes"], bits: int, dim: int) -> Int[Array, "*rows D"]:
    """What `pack_keys` packed, channel by channel."""
    return packing.unpack(codes, bits, dim)[..., np.argsort(pair_order(dim))]


def dense_keys(
    codes: UInt8[Array, "B Hkv S bytes"],
    scale: Float32[Array, "Hkv D"],
    zero: Float32[Array, "Hkv D"],
    codebook: Float32[Array, "K"],
) -> Float32[Array, "B Hkv S D"]:
    """Keys without their outliers, channel by channel."""
    index = unpack_keys(codes, bits_of(codebook), scale.shape[-1])
    return looked_up(index, codebook) * scale[:, None] + zero[:, None]


def dense_tokens(
    index: Int[Array, "B Hkv S D"], scale_zero: Float[Array, "B S 2"], codebook: Float32[Array, "K"]
) -> Float32[Array, "B Hkv S D"]:
    """What codes with a scale and a zero for each token stand for, without outliers."""
    scale, zero = (scale_zero[:, None, :, i, None].astype(jnp.float32) for i in range(2))
    return looked_up(index, codebook) * scale + zero


def dense_values(
    codes: UInt8[Array, "B Hkv S bytes"],
    scale_zero: Float[Array, "B S 2"],
    codebook: Float32[Array, "K"],
    dim: int,
) -> Float32[Array, "B Hkv S D"]:
    """Values without their outliers."""
    return dense_tokens(packing.unpack(codes, bits_of(codebook), dim), scale_zero, codebook)


def value_entries(codebook: Float32[Array, "K"], dtype: Any) -> Float32[Array, "K"]:
    """A codebook of values as it is read beside queries of `dtype`: 16-bit ones mean entries of bfloat16, as tensor
    cores multiply them with weights that bfloat16 alone is wide enough for."""
    return codebook.astype(jnp.bfloat16).astype(jnp.float32) if jnp.dtype(dtype).itemsize == 2 else codebook


def combinations(codebook: Float32[Array, "K"], count: int) -> Float32[Array, "1 Kn n"]:
    """What `count` neighbouring codes stand for, the first code in the lowest bits."""
    bits = bits_of(codebook)
    index = np.arange(2 ** (bits * count))[:, None] >> (bits * np.arange(count))
    return codebook[index & (2**bits - 1)][None]


def bits_of(codebook: Array) -> int:
    """Of a code."""
    return codebook.shape[0].bit_length() - 1


def outlier_words(place: Int[Array, "*shape"], difference: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Words of a pool: `place` is token_in_tile * D + channel; differences are float16."""
    bits = lax.bitcast_convert_type(difference.astype(jnp.float16), jnp.uint16)
    return place.astype(jnp.uint32) | (bits.astype(jnp.uint32) << 16)


def outliers_of(words: UInt32[Array, "B Hkv tiles slots"], dim: int) -> Float32[Array, "B Hkv tokens D"]:
    """The differences of whole tiles as an array, 0 where there is no outlier; places outside a tile are ignored."""
    batch, heads, tiles, slots = words.shape
    place = (words & 0xFFFF).astype(jnp.int32).reshape(-1, slots)
    difference = lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    rows = jnp.arange(place.shape[0])[:, None]
    dense = jnp.zeros((place.shape[0], TILE * dim), jnp.float32)
    dense = dense.at[rows, place].add(difference.reshape(-1, slots), mode="drop")
    return dense.reshape(batch, heads, tiles * TILE, dim)


def read_outliers(
    words: UInt32[Array, "B Hkv tiles slots"], start: Int[Array, ""], size: int, dim: int
) -> Float32[Array, "B Hkv size D"]:
    """`outliers_of` tokens start ... start + size - 1, which need not be whole tiles."""
    tiles = words.shape[2]
    count = min(tiles, -(-size // TILE) + 1)
    first = jnp.minimum(start // TILE, tiles - count)
    dense = outliers_of(lax.dynamic_slice_in_dim(words, first, count, axis=2), dim)
    return lax.dynamic_slice_in_dim(dense, start - first * TILE, size, axis=2)


def rotate(x: Float[Array, "*batch D"], cos: Float[Array, "..."], sin: Float[Array, "..."]) -> Float32[Array, "..."]:
    """Turns the pairs (i, i + D/2) in float32; cos and sin [..., D/2] broadcast against x."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def angles(
    positions: np.ndarray, inverse_frequencies: tuple[float, ...]
) -> tuple[Float32[np.ndarray, "..."], Float32[np.ndarray, "..."]]:
    """cos and sin [..., D/2] at positions that are known on the host, the angles in float64."""
    angle = np.asarray(positions, np.float64)[..., None] * np.asarray(inverse_frequencies, np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def turns_of_first(
    first_position: int | tuple[int, ...],
    shard: Int[Array, ""] | None,
    offsets: np.ndarray,
    inverse_frequencies: tuple[float, ...],
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """`angles` at first_position + offsets; of the shard's first position, where there is one for each."""
    first = np.asarray(first_position)
    found = angles(first[..., None] + offsets, inverse_frequencies)
    cos, sin = (jnp.asarray(x) if shard is None else jnp.asarray(x)[shard] for x in found)
    return cos, sin


def positions_of(slots: np.ndarray, tile_stride: int) -> np.ndarray:
    """Positions of slots after the first, where every `tile_stride`-th tile is held."""
    return slots // TILE * (TILE * tile_stride) + slots % TILE


def whole_tiles(tokens: int) -> int:
    """Tokens rounded up to whole tiles."""
    return math.ceil(tokens / TILE) * TILE

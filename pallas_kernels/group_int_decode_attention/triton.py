"""Attention over integer codes as a Pallas kernel for NVIDIA GPUs (Triton lowering).

Split-K flash decoding as in `pallas_kernels.vq_decode_attention.triton`: a program serves one KV head of one batch row
and a share of its tokens, a tile of one group's at a time, for all query heads of the group (N = 8 or 16). A tile's
codes are cut out of their words as they lie, so that channels come in a stored order (`_Cells`), to which the query's
are brought when it is loaded, and the output's afterwards. A tile's keys are multiplied as integers, with the query
times their scales; zeros add one number a head. Values' scales go into the weights, for each group of channels; their
zeros are sums of their own.

For 16-bit queries all products are of float16, whatever the query's type: at 11 bits they are finer than bfloat16, and
nothing leaves float16's range: queries are scaled to at most 1/2 and a tile's weights to at most 1.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float16, Int, Int32, UInt8

from pallas_kernels import dispatch, split_k
from pallas_kernels.exact import ExactTokens, merge_exact, rounded
from pallas_kernels.group_int import TILE, Layout
from pallas_kernels.nuq_decode_attention.triton import load
from pallas_kernels.vq_decode_attention.triton import dot, share, store

_MOST_HEADS = 16
_LOG2_E = math.log2(math.e)
_NAME = "group_int_decode_attention"


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is shaped."""

    tokens: int  # tokens per tile, 32 or 64, of one group
    heads: int  # query heads per program, padded
    splits: int  # programs that share a row
    num_warps: int
    num_stages: int


class _Refs(NamedTuple):
    """What the kernel reads; R = B * Hkv."""

    q: Any  # [R, G, D]
    key_codes: Any  # int32[R, tiles, words]
    key_scale_zero: Any  # float16[R, groups, 2 D]
    value_codes: Any  # int32[R, tiles, words]
    value_scale_zero: Any  # float16[R, tiles, 64 parts]
    lengths: Any  # int32[B]


def group_int_decode_attention(
    q: Float[Array, "B Hq D"],
    key_codes: UInt8[Array, "B Hkv tiles bytes"],
    key_scale_zero: Float16[Array, "B Hkv groups kscales"],
    value_codes: UInt8[Array, "B Hkv tiles bytes"],
    value_scale_zero: Float16[Array, "B Hkv tiles vscales"],
    lengths: Int32[Array, "B"],
    *,
    layout: Layout,
    scale: float,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    num_splits: int | None = None,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.group_int_decode_attention` for layouts in the order of lanes and groups to 16."""
    batch, query_heads, dim = q.shape
    kv_heads, tiles = key_codes.shape[1:3]
    rows, group = batch * kv_heads, query_heads // max(1, kv_heads)
    if not layout.for_lanes or group > _MOST_HEADS:
        raise NotImplementedError(
            f"{_NAME}: the triton kernel serves D of 64 or 128, 1, 2 or 4 bits, groups of whole 32 tokens and channels "
            f"and up to {_MOST_HEADS} query heads a KV head, not {layout}, {group} heads"
        )
    if rows * group * tiles == 0:
        nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((batch, query_heads), split_k.EMPTY)
        return rounded(*merge_exact(*nothing, exact_q, exact, scale), out_dtype)

    def of_rows(array: Array) -> Array:
        return array.reshape(rows, *array.shape[2:])

    def words(codes: UInt8[Array, "B Hkv tiles bytes"]) -> Int32[Array, "R tiles words"]:
        return lax.bitcast_convert_type(of_rows(codes).reshape(rows, tiles, -1, 4), jnp.int32)

    config = config or choose_config(rows, tiles * TILE, group, layout, q.dtype, num_splits)
    refs = _Refs(
        q.reshape(rows, group, dim),
        words(key_codes),
        of_rows(key_scale_zero),
        words(value_codes),
        of_rows(value_scale_zero),
        lengths,
    )
    output, lse = pl.pallas_call(
        functools.partial(_kernel, kv_heads=kv_heads, scale=scale, layout=layout, config=config),
        grid=(rows, config.splits),
        out_shape=[
            jax.ShapeDtypeStruct((rows, group, config.splits, dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, group, config.splits), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=_NAME,
    )(refs)
    output, lse = split_k.merge(output, lse)
    output = output[..., np.argsort(_value_cells(layout).channel(np.arange(dim)))]
    output, lse = merge_exact(output.reshape(q.shape), lse.reshape(batch, query_heads), exact_q, exact, scale)
    return rounded(output, lse, out_dtype)


def choose_config(rows: int, tokens: int, group: int, layout: Layout, dtype, num_splits: int | None) -> Config:
    """Tiles of 8,192 elements, half as many for float32 products, which are off the tensor cores."""
    most = (8192 if jnp.dtype(dtype).itemsize == 2 else 4096) // layout.dim
    tile = 2 * TILE if most >= 2 * TILE and layout.token_group % (2 * TILE) == 0 else TILE
    warps = 4
    wanted = split_k.num_splits(rows=rows, tokens=tokens, tile=tile, programs=16 // warps * dispatch.multiprocessors())
    return Config(tile, 8 if group <= 8 else 16, num_splits or wanted, num_warps=warps, num_stages=1)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """A token's codes, cut out of the words of its tile in cells: neighbouring pairs of one lane that lie in one word.

    lanes: that share a token, 4 for a key and 8 for a value; pairs: of codes that each has of it.
    """

    layout: Layout
    lanes: int
    pairs: int

    @property
    def size(self) -> int:
        """Pairs of a cell."""
        return min(16 // self.layout.bits, self.pairs)

    @property
    def count(self) -> int:
        """Cells of a token."""
        return self.lanes * self.pairs // self.size

    def codes(self, ref, row, token: Array, valid: Array, lane: Array, run: Array) -> Int[Array, "T D"]:
        """Of tokens [T], whose cells `lane` [T, cells] has, behind `run` other tokens; 0 where not valid."""
        layout = self.layout
        fields, words = 16 // layout.bits, layout.dim * layout.bits // 32
        at_once = min(words, 4)
        cell = jnp.arange(self.count)[None, :]
        first = run[:, None] * self.pairs + cell % (self.pairs // self.size) * self.size
        word, base = first // fields, first % fields * layout.bits
        place = word // at_once * (32 * at_once) + lane * at_once + word % at_once
        held = load(ref, row, (token // TILE)[:, None], place, mask=valid[:, None])
        wide = (*held.shape, 2 * self.size)
        index = jnp.arange(2 * self.size)
        shift = base[:, :, None] + (index // self.size * 16 + index % self.size * layout.bits)[None, None, :]
        spread = lax.shift_right_logical(jnp.broadcast_to(held[:, :, None], wide), jnp.broadcast_to(shift, wide))
        return (spread & (2**layout.bits - 1)).reshape(wide[0], wide[1] * wide[2])

    @property
    def part(self) -> Int[Array, "1 cells"]:
        """Which of a token's lanes has a cell."""
        return (jnp.arange(self.count) // (self.pairs // self.size))[None, :]

    def channel(self, place: Any) -> Any:
        """Which channel stands at a place of `codes`."""
        cell, index = place // (2 * self.size), place % (2 * self.size)
        lane, pair = cell // (self.pairs // self.size), cell % (self.pairs // self.size) * self.size + index % self.size
        element = index // self.size
        if self.lanes == 4:  # quarters of a key
            return lane * (self.layout.dim // 4) + pair * 2 + element
        return pair // 2 * 32 + lane * 4 + pair % 2 * 2 + element


def _key_cells(layout: Layout) -> _Cells:
    return _Cells(layout, 4, layout.dim // 8)


def _value_cells(layout: Layout) -> _Cells:
    return _Cells(layout, 8, layout.dim // 16)


def _kernel(
    refs: _Refs,
    output_ref,  # float32[R, G, P, D]
    lse_ref,  # float32[R, G, P]
    *,
    kv_heads: int,
    scale: float,
    layout: Layout,
    config: Config,
):
    row, split = pl.program_id(0), pl.program_id(1)
    group, dim = refs.q.shape[1:]
    dtype = jnp.float32 if refs.q.dtype == jnp.float32 else jnp.float16
    length = jnp.clip(plt.load(refs.lengths.at[row // kv_heads]), 0, refs.key_codes.shape[1] * TILE)
    place, head = jnp.arange(dim), jnp.arange(config.heads)
    keys, values = _key_cells(layout), _value_cells(layout)
    channel, part_of = keys.channel(place), values.channel(place) // layout.channel_group
    query = load(refs.q, row, head[:, None], channel[None, :], mask=(head < group)[:, None]).astype(jnp.float32)
    largest = jnp.max(jnp.abs(query), axis=1)
    size = jnp.where(largest > 0, 2 * largest, 1.0)
    query = query / size[:, None]
    unscaled = size * (scale * _LOG2_E)

    def visit(tile, carry):
        top, total, zeros, output = carry
        start = tile * config.tokens
        token = start + jnp.arange(config.tokens)
        valid = token < length
        # Token 8 g + t of a tile of codes, t = 4 far + within.
        g, far, within = token % TILE // 8, token % 8 // 4, token % 4

        of_group = start // layout.token_group
        s = load(refs.key_scale_zero, row, of_group, _scale_place(channel, dim)).astype(jnp.float32)
        z = load(refs.key_scale_zero, row, of_group, dim + channel).astype(jnp.float32)
        lane = (within * 2 + far)[:, None] * 4 + keys.part
        index = keys.codes(refs.key_codes, row, token, valid, lane, g)
        scores = (
            dot(index.astype(dtype), (query * s[None, :]).astype(dtype).T) + jnp.sum(query * z[None, :], 1)[None, :]
        )
        scores = jnp.where(valid[:, None], scores * unscaled[None, :], split_k.EMPTY)

        # The tile's weights are of its own maximum, so that the largest of them is 1.
        tile_top = jnp.max(scores, axis=0)
        weights = jnp.exp2(scores - tile_top[None, :])
        new = jnp.maximum(top, tile_top)
        shrink, grow = jnp.exp2(top - new), jnp.exp2(tile_top - new)
        lane = values.part * 4 + within[:, None]
        codes = values.codes(refs.value_codes, row, token, valid, lane, g * 2 + far).astype(dtype).T
        of_token = (within * 2 + far) * 4 + g
        part, of_zeros = jnp.zeros_like(output), []
        for i in range(layout.parts):
            at = (i * TILE + of_token) * 2
            s, z = (
                load(refs.value_scale_zero, row, token // TILE, at + k, mask=valid).astype(jnp.float32) for k in (0, 1)
            )
            product = dot(codes, (weights * s[:, None]).astype(dtype))
            part = product if layout.parts == 1 else jnp.where((part_of == i)[:, None], product, part)
            of_zeros.append(zeros[i] * shrink + jnp.sum(weights * z[:, None], axis=0) * grow)
        total = total * shrink + jnp.sum(weights, axis=0) * grow
        return new, total, of_zeros, output * shrink[None, :] + part * grow[None, :]

    nothing = jnp.zeros((config.heads,), jnp.float32)
    before = nothing + split_k.EMPTY, nothing, [nothing] * layout.parts, jnp.zeros((dim, config.heads), jnp.float32)
    first, last = share(length, split, config.tokens, config.splits)
    top, total, zeros, output = lax.fori_loop(first, last, visit, before)
    for i, zero in enumerate(zeros):
        output = output + jnp.where((part_of == i)[:, None], zero[None, :], 0.0)
    store(output_ref, lse_ref, row, split, top, total, output)


def _scale_place(channel: Array, dim: int) -> Array:
    """Where the scale of a key's channel lies among those of its group."""
    quarter, within = channel // (dim // 4), channel % (dim // 4)
    return quarter * (dim // 4) + within % 4 // 2 * (dim // 8) + within // 4 * 2 + within % 2

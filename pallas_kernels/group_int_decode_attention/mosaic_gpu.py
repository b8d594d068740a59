"""`group_int_decode_attention` in Mosaic GPU: `pallas_kernels.mosaic_gpu.decode_attention` with a walk of its own.

*Codes* need no look-up and no arithmetic: a code among the ten bits of a float16's mantissa, all else 0, is the number
code x 2^k x 2^-24 (subnormal), which the tensor cores multiply as any other. One AND makes a pair of elements; 2^k
depends on the channel only and goes, as 2^-k, into the query, or is taken off the output.

*Keys.* score = sum_d (q_d s_d) code_d + sum_d q_d z_d. Both q s and the second sum are made once a tile, which is of
one group of tokens; the sum by the tensor cores, too, of zeros as they lie in memory. Queries are divided by a power of
two above their largest element, so that no product with a scale leaves float16.

*Values.* A token's scale multiplies its weight. As a float16 that would lose far tokens, so a tile's weights are
divided by a power of two near the largest of them, and the tile's outputs, multiplied by it, are added to the outputs
in float32: they keep eleven bits, where a bfloat16 has eight. Zeros are sums of their own, one for every group of
channels. A lane has four of every 32 channels ("strided"), so that each operation of the tensor cores is of one group.

Memory binds: a warp loads the next tile, whole words of codes side by side, before it works on one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int32, UInt8

from pallas_kernels import dispatch, split_k
from pallas_kernels.exact import ExactTokens
from pallas_kernels.group_int import TILE, Layout
from pallas_kernels.mosaic_gpu import decode_attention as skeleton
from pallas_kernels.mosaic_gpu import lanes
from pallas_kernels.mosaic_gpu.decode_attention import BLOCK, HEADS, MOST_HEADS, Config, Problem, Row
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, f32, u32

_WARPGROUPS, _MANY_WARPGROUPS = 1, 3  # of a block
_GROUPS = TILE // BLOCK
_EXPONENT = 0x7F800000  # of a float32
_SUBNORMAL = 2.0**24  # one over the smallest float16
_NAME = "group_int_decode_attention"


@dataclasses.dataclass(frozen=True)
class Codes:
    """Keys or values, coded; their scales and zeros beside them."""

    layout: Layout

    operand, extras, shared_end = "f16", 1, 0

    @property
    def pitch(self) -> int:
        return self.layout.tile_bytes // TILE

    def fill(self, shared: Pointer, threads: int, head: Reg, *extras: Pointer) -> None:
        """Heads share nothing."""


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
    """`pallas_kernels.group_int_decode_attention` for 16-bit queries, layouts in the order of lanes, groups to 16."""
    batch, query_heads, _ = q.shape
    kv_heads, tokens = key_codes.shape[1], key_codes.shape[2] * layout.tile
    rows, group = batch * kv_heads, query_heads // max(1, kv_heads)
    if interpret:
        raise NotImplementedError(f"{_NAME}: mosaic_gpu has no interpret mode")
    if not layout.for_lanes or group > MOST_HEADS or jnp.dtype(q.dtype).itemsize != 2 or scale == 0:
        raise NotImplementedError(
            f"{_NAME}: the mosaic_gpu kernel serves 16-bit queries, D in {skeleton.HEAD_DIMS}, 1, 2 or 4 bits, groups "
            f"of whole 32 tokens and channels and up to {MOST_HEADS} query heads a KV head, not {q.dtype}, {layout}, "
            f"{group} heads"
        )
    exact = [held for held in exact if held.keys.shape[2]]
    if rows * group == 0 or (tokens == 0 and not exact):
        return jnp.zeros(q.shape, out_dtype), jnp.full((batch, query_heads), split_k.EMPTY)
    coded = [key_codes, key_scale_zero, value_codes, value_scale_zero]
    if tokens == 0:  # a window alone: one group of which no token counts
        tokens, lengths = layout.token_group, jnp.zeros_like(lengths)
        shapes = *layout.key_shapes(tokens), *layout.value_shapes(tokens)
        coded = [jnp.zeros((batch, kv_heads, *s), x.dtype) for x, s in zip(coded, shapes, strict=True)]
    source = Codes(layout)
    key_tokens, value_tokens = (x.reshape(batch, kv_heads, tokens, source.pitch) for x in coded[::2])
    return skeleton.attend(
        _NAME,
        q,
        (source, key_tokens, [coded[1]]),
        (source, value_tokens, [coded[3]]),
        lengths,
        scale=scale,
        config=config or choose_config(rows, tokens, group, layout, num_splits),
        exact=exact,
        exact_q=exact_q,
        out_dtype=out_dtype,
        walk=_walk,
        strided=True,
        settings=layout,
    )


def choose_config(rows: int, tokens: int, group: int, layout: Layout, num_splits: int | None) -> Config:
    """Every multiprocessor takes its share of the tiles, as two blocks: then one begins or ends a row while the other
    goes on. A tile is as large as a lane's registers allow, and of one group of tokens; heads of 64 leave registers to
    half as many warps again, in one block."""
    large = layout.token_group % (2 * TILE) == 0 and layout.dim * layout.bits <= 256 and group <= HEADS
    groups = 2 * _GROUPS if large else _GROUPS
    narrow = layout.dim == 64
    blocks = rows * num_splits if num_splits else dispatch.multiprocessors() * (1 if narrow else 2)
    return Config(
        groups, _MANY_WARPGROUPS if narrow else _WARPGROUPS, max(1, min(blocks, rows * -(-tokens // (BLOCK * groups))))
    )


class _Tile(NamedTuple):
    """What a lane reads of a tile."""

    keys: list[list[Reg]]  # words of codes, of each 32 tokens
    values: list[list[Reg]]
    scales: list[Reg]  # of keys' channels, two a word: those that meet this lane's elements of the queries
    zeros: list[Reg]  # those of its quarter
    factors: list[list[Reg]]  # scale and zero of its own token of every eight, for each group of channels


class _Tiles:
    """How a lane gets at the tiles of a row."""

    def __init__(self, p: Problem, layout: Layout, row: Row, place: skeleton.Place):
        self.p, self.layout, self.last = p, layout, row.high.maximum(1) - 1
        self.words = layout.dim * layout.bits // 32
        self.at_once = min(self.words, 4)
        start = lanes.wide_product(row.row, p.tokens * p.key.pitch)
        self.keys, self.values = (at(x[0], start, place.lane * (4 * self.at_once)) for x in (row.key, row.value))
        of_groups = at(row.key[1], lanes.wide_product(row.row, p.tokens // layout.token_group * 4 * layout.dim))
        quarter = place.j * (layout.dim // 2)
        self.scales = at(of_groups, quarter + (place.r & 1) * (layout.dim // 4))
        self.zeros = at(of_groups, 2 * layout.dim, quarter)
        self.factors = at(row.value[1], lanes.wide_product(row.row, p.tokens * 4 * layout.parts), place.r << 4)

    def read(self, tile: Reg) -> _Tile:
        """A tile, or the last one if there is no such tile."""
        p, layout, tile = self.p, self.layout, tile.minimum(self.last)
        of_group = tile * p.tile // layout.token_group * (4 * layout.dim)
        factors = at(self.factors, tile * (p.tile * 4 * layout.parts))
        halves = range(p.tile // TILE)
        return _Tile(
            [self._codes(at(self.keys, tile * (p.tile * p.key.pitch)), i) for i in halves],
            [self._codes(at(self.values, tile * (p.tile * p.key.pitch)), i) for i in halves],
            _stream(at(self.scales, of_group), layout.dim // 16),
            _stream(at(self.zeros, of_group), layout.dim // 8),
            [
                [word for i in halves for word in lanes.load_stream(factors, (i * layout.parts + part) * 4 * TILE, 4)]
                for part in range(layout.parts)
            ],
        )

    def _codes(self, start: Pointer, half: int) -> list[Reg]:
        """This lane's words of the keys or values of 32 tokens."""
        offset, stride = half * self.layout.tile_bytes, 32 * 4 * self.at_once
        parts = range(self.words // self.at_once)
        return [word for i in parts for word in lanes.load_stream(start, offset + i * stride, self.at_once)]


def _stream(pointer: Pointer, count: int) -> list[Reg]:
    return [word for i in range(0, count, 4) for word in lanes.load_stream(pointer, 4 * i, 4)]


def _period(layout: Layout, pairs: int) -> int:
    """Pairs of codes after which the powers of two that elements of a token are made with begin anew."""
    return min(8 // layout.bits, pairs)


def _elements(layout: Layout, words: list[Reg], first: int, count: int) -> list[Reg]:
    """`count` pairs of a token's elements as float16, in units of 2^-24; pair i is 2^(bits (i % period)) too large."""
    fields, period = 16 // layout.bits, _period(layout, count)
    mask = (2**layout.bits - 1) * 0x10001
    out = []
    for pair in range(first, first + count):
        word, field = divmod(pair, fields)
        run, place = divmod(field, period)
        shifted = words[word] >> (run * period * layout.bits) if run else words[word]
        out.append(shifted & (mask << (place * layout.bits)))
    return out


def _power_above(x: Reg) -> tuple[Reg, Reg]:
    """A power of two above x, at most twice as large, and one over it; x from 2^-100 on."""
    bits = (x.maximum(2.0**-100).as_bits() & _EXPONENT) + 0x00800000
    return bits.as_float(), (u32(0x7F000000) - bits).as_float()


class _Queries:
    """This lane's elements of the group's queries, of head r / 2 of every four, divided by `unit`."""

    def __init__(self, p: Problem, layout: Layout, q: Pointer, place: skeleton.Place):
        self.layout = layout
        given = [skeleton.load_queries(p, q, block, place.r, place.j) for block in range(p.head_blocks)]
        wide = [[lanes.widen(word, "f16") for step in of_block for word in step] for of_block in given]
        sizes = [x.maximum(f32(0.0) - x) for of_block in wide for pair in of_block for x in pair]
        largest = lanes.largest(lanes.reduce(Reg.maximum, sizes).as_bits()).as_float()
        self.unit, inverse = _power_above(largest)
        divided = [[[x * inverse for x in pair] for pair in of_block] for of_block in wide]
        self.plain = [_steps([lanes.pack_pair(a, b, "f16") for a, b in of_block]) for of_block in divided]
        # Of a quarter's pairs of channels, this lane has every other one.
        period = _period(layout, layout.dim // 8)
        odd = (place.r & 1).differs(0).where(f32(2.0**-layout.bits), f32(1.0))
        powers = [odd * 2.0 ** -(layout.bits * (2 * i % period)) for i in range(layout.dim // 16)]
        self.shifted = [
            [[x * power for x in pair] for pair, power in zip(of_block, powers, strict=True)] for of_block in divided
        ]

    def scores(self, tile: _Tile) -> list[list[Reg]]:
        """q . k of a tile's tokens, of every eight and every four heads."""
        layout, pairs = self.layout, self.layout.dim // 8
        scales = [lanes.widen(word, "f16") for word in tile.scales]
        scaled = [
            _steps([lanes.pack_pair(a * s, b * t, "f16") for (a, b), (s, t) in zip(of_block, scales, strict=True)])
            for of_block in self.shifted
        ]
        zeros = [x * self.unit for x in skeleton.products(tile.zeros, self.plain, "f16")]
        unit = self.unit * _SUBNORMAL
        out = []
        for words in tile.keys:
            for g in range(_GROUPS):
                sums = skeleton.products(_elements(layout, words, g * pairs, pairs), scaled, "f16")
                out.append([lanes.multiply_add(x, unit, zero) for x, zero in zip(sums, zeros, strict=True)])
        return out


def _steps(words: list[Reg]) -> list[tuple[Reg, Reg]]:
    """B of each step of the scores."""
    return list(zip(words[::2], words[1::2], strict=True))


def _walk(p: Problem, row: Row) -> list:
    """One warp's tiles of a row -> for every four heads: maximum, sum, outputs."""
    layout: Layout = p.settings
    place = skeleton.Place()
    tiles = _Tiles(p, layout, row, place)
    first = row.low + place.warp
    words = tiles.read(first)
    queries = _Queries(p, layout, row.queries(), place)
    state = row.before(skeleton.empty(p))
    row.fill()
    selectors = skeleton.selectors_of(place.r)
    # Behind the outputs: of each group of channels, the sum of weights times zeros.
    state = [(m, total, [*outputs, [f32(0.0)] * layout.parts]) for m, total, outputs in state]

    def visit(tile: Reg, carry):
        state, words = carry
        following = tiles.read(tile + p.warps)
        scores = queries.scores(words)
        start = tile * p.tile
        scores = lanes.when(
            row.length < start + p.tile,
            scores,
            lambda scores: skeleton.without_the_rest(row, place, start, start, scores),
        )
        return _add_values(p, layout, words, scores, skeleton.make_room(p, scores, state), selectors), following

    state = lanes.loop(first, row.high, p.warps, (state, words), visit)[0]
    out = []
    for m, total, (*outputs, zeros) in state:
        for distance in (4, 8, 16):
            zeros = [x + lanes.exchange(x, distance) for x in zeros]
        parts = [zeros[32 * i // layout.channel_group] for i in range(len(outputs))]
        out.append((m, total, [[x + zero for x in of_part] for of_part, zero in zip(outputs, parts, strict=True)]))
    return out


def _add_values(
    p: Problem, layout: Layout, tile: _Tile, scores: list[list[Reg]], state: list, selectors: list[Reg]
) -> list:
    """The state with a tile's tokens: their weights, and V^T p."""
    factors = [[lanes.widen(word, "f16") for word in of_part] for of_part in tile.factors]
    totals, zeros, weights, units = [], [], [], []
    for block, (m, total, (*_, of_zeros)) in enumerate(state):
        plain = [skeleton.weigh(p, of_group[block], m) for of_group in scores]
        totals.append(lanes.reduce(Reg.__add__, [total, *plain]))
        scaled = [[w * s for w, (s, _) in zip(plain, of_part, strict=True)] for of_part in factors]
        powers = [_power_above(_of_head(lanes.reduce(Reg.maximum, of_part))) for of_part in scaled]
        units.append([unit * _SUBNORMAL for unit, _ in powers])
        weights.append([[w * inverse for w in of_part] for of_part, (_, inverse) in zip(scaled, powers, strict=True)])
        sums = []
        for x, of_part in zip(of_zeros, factors, strict=True):
            for w, (_, zero) in zip(plain, of_part, strict=True):
                x = lanes.multiply_add(w, zero, x)
            sums.append(x)
        zeros.append(sums)

    count = layout.dim // 32
    parts = [32 * i // layout.channel_group for i in range(count)]  # groups of channels
    products = [[[f32(0.0)] * 4 for _ in range(count)] for _ in state]
    pairs = layout.dim // 16
    for g in range(p.config.groups):
        words = tile.values[g // _GROUPS]
        near, far = (_elements(layout, words, (g % _GROUPS * 2 + t) * pairs, pairs) for t in (0, 1))
        for block in range(p.head_blocks):
            for part in range(layout.parts):
                own = slice(parts.index(part), parts.index(part) + parts.count(part))
                two = slice(2 * own.start, 2 * own.stop)
                products[block][own] = skeleton.add_values(
                    products[block][own], "f16", near[two], far[two], weights[block][part][g], selectors
                )

    period = _period(layout, pairs)
    out = []
    for block, (m, _, (*outputs, _)) in enumerate(state):
        added = []
        for i, (old, new) in enumerate(zip(outputs, products[block], strict=True)):
            unit = units[block][parts[i]]
            both = [unit * 2.0 ** -(layout.bits * ((2 * i + pair) % period)) for pair in (0, 1)]
            added.append(
                [lanes.multiply_add(x, both[c // 2], y) for c, (x, y) in enumerate(zip(new, old, strict=True))]
            )
        out.append((m, totals[block], [*added, zeros[block]]))
    return out


def _of_head(x: Reg) -> Reg:
    """The largest of the lanes that have the same head of every four."""
    for distance in (4, 8, 16):
        x = x.maximum(lanes.exchange(x, distance))
    return x

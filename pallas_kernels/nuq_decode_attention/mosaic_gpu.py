"""`nuq_decode_attention` in Mosaic GPU: `pallas_kernels.mosaic_gpu.decode_attention` with a walk of its own.

*Codes.* A codebook of single numbers is one of short vectors: two 4-bit or 3-bit codes, or four 2-bit ones, are looked
up at once in the table of all their combinations, as `vq_decode_attention` does it.

*RoPE without angles.* score(s) = q . R(s) k, q after RoPE; with s = s0 + i, i the token's place among eight, that is
(R(-s0) q) . (R(i) k). A lane reads keys of one place i only, so R(i) with the channels' scale and zero point is a few
constants in its registers: k' = R(i)(s Q + z) costs one multiply-add an element. The query goes from eight tokens to
the next by the constant rotation R(-8), in float32, from a start that comes from tables made in float64.

*A value's* scale goes into its weight, and its zero point is one number a token that is summed beside the outputs.

*Outliers*, tile by tile of 64 tokens, a slot a lane: what they add to scores and to outputs is summed in shared memory,
where lanes meet, by integers: atomic additions of float32 are a loop there, and their order is not given. A unit fits
what a tile can add at most, so that a sum is exact to some 2^-22 of the largest part.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int32, UInt8, UInt32

from pallas_kernels import dispatch, nuq, split_k
from pallas_kernels.exact import ExactTokens
from pallas_kernels.mosaic_gpu import decode_attention as skeleton
from pallas_kernels.mosaic_gpu import lanes
from pallas_kernels.mosaic_gpu.decode_attention import BLOCK, HEADS, Config, Problem, Row
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, f32, u32
from pallas_kernels.vq_decode_attention import mosaic_gpu as vq

TILE = nuq.TILE  # tokens whose outliers lie together
_COARSE = 64  # tiles between two coarse rotations
_GROUPS = TILE // BLOCK
_WARPGROUPS = 2  # of a multiprocessor: more would have too few registers
# Elements that are looked up at once, by bits a code.
_AT_ONCE = {2: 4, 3: 2, 4: 2}
_MOST_HEADS = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Slots of outliers a tile, 0 for none."""

    key_slots: int
    value_slots: int


@dataclasses.dataclass(frozen=True)
class Keys(vq.Table):
    """Coded keys: their table, and cos and sin of the places of a tile, where outliers ask for them."""

    rotations: int  # where they lie in shared memory; -1 for nowhere

    # The combinations of codes; rotations within a tile, of tiles (fine, coarse) and from group to group; scale, zero;
    # outliers.
    extras = 8

    @property
    def shared_end(self) -> int:
        end = self.rotations + TILE * self.format.dim * 4 if self.rotations >= 0 else 0
        return max(super().shared_end, end)

    def fill(self, shared: Pointer, threads: int, head: Reg, *extras: Pointer) -> None:
        super().fill(shared, threads, head, *extras)
        if self.rotations >= 0:
            chunks = TILE * self.format.dim // 4
            for i in range(-(-chunks // threads)):
                chunk = (lanes.thread() + i * threads).minimum(chunks - 1)
                lanes.store(at(shared, self.rotations, chunk << 4), lanes.load(at(extras[1], chunk << 4), 4))


@dataclasses.dataclass(frozen=True)
class Values(vq.Table):
    """Coded values."""

    extras = 3  # the combinations of codes, scales and zeros of tokens, outliers


def nuq_decode_attention(
    q: Float[Array, "B Hq D"],
    key_codes: UInt8[Array, "B Hkv S kbytes"],
    value_codes: UInt8[Array, "B Hkv S vbytes"],
    key_scale: Float[Array, "Hkv D"],
    key_zero: Float[Array, "Hkv D"],
    key_codebook: Float[Array, "Kk"],
    value_codebook: Float[Array, "Kv"],
    value_scale_zero: Float16[Array, "B S 2"],
    key_outliers: UInt32[Array, "B Hkv tiles kslots"] | None,
    value_outliers: UInt32[Array, "B Hkv tiles vslots"] | None,
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    inverse_frequencies: tuple[float, ...] | None = None,
    first_position: int | tuple[int, ...] = 0,
    tile_stride: int = 1,
    shard: Array | None = None,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    num_splits: int | None = None,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.nuq_decode_attention` for 16-bit queries, D 64 or 128, up to 8 query heads a KV head."""
    batch, query_heads, dim = q.shape
    kv_heads, tokens = key_codes.shape[1:3]
    group = query_heads // max(1, kv_heads)
    bits = [nuq.bits_of(book) for book in (key_codebook, value_codebook)]
    if interpret:
        raise NotImplementedError("nuq_decode_attention: mosaic_gpu has no interpret mode")
    served = dim in skeleton.HEAD_DIMS and _AT_ONCE.keys() >= {*bits} and group <= _MOST_HEADS and scale != 0
    if not served or jnp.dtype(q.dtype).itemsize != 2:
        raise NotImplementedError(
            f"nuq_decode_attention: the mosaic_gpu kernel serves 16-bit queries, D in {skeleton.HEAD_DIMS}, codebooks "
            f"of {sorted(_AT_ONCE)} bits and up to {_MOST_HEADS} query heads a KV head, not {q.dtype}, D={dim}, "
            f"codebooks {key_codebook.shape} and {value_codebook.shape}, {group} heads"
        )
    exact = [held for held in exact if held.keys.shape[2]]
    if batch * kv_heads * group == 0 or (tokens == 0 and not exact):
        return jnp.zeros(q.shape, out_dtype), jnp.full((batch, query_heads), split_k.EMPTY)
    if tokens == 0:  # a window alone: one tile of which no token counts
        room = batch, kv_heads, TILE
        key_codes, value_codes = (jnp.zeros((*room, x.shape[3]), jnp.uint8) for x in (key_codes, value_codes))
        value_scale_zero = jnp.zeros((batch, TILE, 2), jnp.float16)
        key_outliers = value_outliers = None
        tokens, lengths = TILE, jnp.zeros_like(lengths)
    key_slots, value_slots = (0 if slots is None else slots.shape[3] for slots in (key_outliers, value_outliers))
    config = config or choose_config(batch * kv_heads, tokens, bool(key_slots or value_slots), num_splits)

    # Keys are multiplied in float16, whose range holds their scale and whose ten bits their rotations; weights of
    # values, far apart, in bfloat16.
    key_format, value_format = (
        vq.Format(dim, _AT_ONCE[width], _AT_ONCE[width] * width, element)
        for width, element in zip(bits, ("f16", "bf16"), strict=True)
    )
    key_table, value_table = vq.side_by_side(key_format, value_format, (True, True))
    end = -(-max(key_table.shared_end, value_table.shared_end) // 16) * 16
    keys = Keys(**vars(key_table), rotations=end if key_slots else -1)
    frequencies = inverse_frequencies or (0.0,) * (dim // 2)
    tables = _rotations(frequencies, tokens // TILE, first_position, tile_stride, shard, config.warpgroups * 4)
    nothing = jnp.zeros((1,), jnp.uint32)
    books = [
        vq.words_of(nuq.combinations(book, form.length), form)
        for book, form in ((key_codebook, key_format), (value_codebook, value_format))
    ]
    of_channels = [array.astype(jnp.float32) for array in (key_scale, key_zero)]
    settings = Settings(key_slots, value_slots)
    return skeleton.attend(
        "nuq_decode_attention",
        q,
        (keys, key_codes, [books[0], *tables, *of_channels, nothing if key_outliers is None else key_outliers]),
        (
            Values(**vars(value_table)),
            value_codes,
            [books[1], value_scale_zero, nothing if value_outliers is None else value_outliers],
        ),
        lengths,
        scale=scale,
        config=config,
        exact=exact,
        exact_q=exact_q,
        out_dtype=out_dtype,
        walk=_walk,
        settings=settings,
        scratch_bytes=config.warpgroups * 4 * _Scratch.size(dim, group, settings),
    )


def choose_config(rows: int, tokens: int, sparse: bool, num_splits: int | None) -> Config:
    """Every multiprocessor takes its share of the tiles, as two blocks where the shared memory of both fits: then one
    begins or ends a row while the other goes on."""
    warpgroups = _WARPGROUPS if sparse else 1
    blocks = rows * num_splits if num_splits else dispatch.multiprocessors() * (_WARPGROUPS // warpgroups)
    return Config(_GROUPS, warpgroups, max(1, min(blocks, rows * -(-tokens // TILE))))


def _rotations(
    frequencies: tuple[float, ...],
    tiles: int,
    first: int | tuple[int, ...],
    stride: int,
    shard: Array | None,
    warps: int,
) -> list[Array]:
    """cos and sin, float32[n, D / 2, 2]: of the places in a tile; of 64 tiles from the first position on; of every 64th
    tile; of eight tokens, and from a warp's tile's last group to its next tile."""

    def table(positions: Any) -> Array:
        return jnp.asarray(np.stack(nuq.angles(np.asarray(positions), frequencies), axis=-1))

    step = TILE * stride
    return [
        table(np.arange(TILE)),
        jnp.stack(nuq.turns_of_first(first, shard, np.arange(_COARSE) * step, frequencies), axis=-1),
        table(np.arange(-(-tiles // _COARSE)) * (_COARSE * step)),
        table([BLOCK, step * warps - (TILE - BLOCK)]),
    ]


class _Scratch:
    """A warp's shared memory, for every four heads: the query of a tile's start [D, 4], float32; what outliers add to
    scores, integers, then the weights, float32 [4, 64]; what they add to outputs, integers [4, D]. Laid out so that
    lanes seldom wait for one bank: every quarter of the channels is followed by a gap, and every head's row."""

    _GAP = 8  # words behind a head's row

    def __init__(self, p: Problem, scratch: Pointer, warp: Reg):
        self.dim = p.dim
        self.mine = at(scratch, warp * self.size(p.dim, p.group, p.settings))

    @classmethod
    def size(cls, dim: int, group: int, settings: Settings) -> int:
        """Bytes."""
        if not settings.key_slots and not settings.value_slots:
            return 0
        return -(-group // HEADS) * cls._of_block(dim)

    @classmethod
    def _of_block(cls, dim: int) -> int:
        return 4 * HEADS * ((dim + 8) + (TILE + cls._GAP) + (dim + cls._GAP))

    def query(self, block: int, channel: Reg, far: bool) -> Pointer:
        """Four heads' elements of a channel of the first half, or of its partner."""
        gaps = channel // (self.dim // 8)
        start = block * self._of_block(self.dim) + (self.dim // 2 + 4) * 4 * HEADS * far
        return at(self.mine, start, (channel + gaps) << 4)

    def token(self, block: int, head: int | Reg, token: Reg) -> Pointer:
        start = block * self._of_block(self.dim) + (self.dim + 8) * 4 * HEADS
        return at(self.mine, start, head * ((TILE + self._GAP) * 4), token << 2)

    def output(self, block: int, head: int | Reg, channel: Reg) -> Pointer:
        start = block * self._of_block(self.dim) + (self.dim + 8 + TILE + self._GAP) * 4 * HEADS
        return at(self.mine, start, head * ((self.dim + self._GAP) * 4), channel << 2)


class _Queries:
    """This lane's elements of the group's queries: of head r / 2 of every four, channels c and c + D / 2 for some c of
    the lane's quarter, turned back to where the next eight keys begin."""

    def __init__(self, p: Problem, q: Pointer, place: skeleton.Place):
        self.p = p
        self.half, self.count = p.dim // 2, p.dim // 32  # words of each half
        # Words of the quarter (pairs of channels) alternate between the rows of A, so between columns 2h and 2h + 1.
        self.channel = place.j * (p.dim // 8) + ((place.r & 1) << 1)
        self.head = place.r >> 1
        self.low: list[list[Reg]] = []
        self.high: list[list[Reg]] = []
        for block in range(p.head_blocks):
            head = self.head + HEADS * block
            exists = head < p.group
            mine = at(q, exists.where(head, u32(0)) * (p.dim * 2) + (self.channel << 1))
            for half, values in ((0, self.low), (1, self.high)):
                words = [lanes.load(at(mine, half * p.dim + 8 * i), 1)[0] for i in range(self.count)]
                words = [exists.where(word, u32(0)) for word in words]
                values.append([x for word in words for x in lanes.widen(word, p.key.operand)])

    def factors(self, table: Pointer) -> list[Reg]:
        """cos and sin of this lane's channels, alternating, of a row of a table."""
        mine = at(table, self.channel << 3)
        return [x.as_float() for i in range(self.count) for x in lanes.load(at(mine, 32 * i), 4)]

    def turn(self, low: list, high: list, factors: list[Reg]) -> tuple[list, list]:
        """R(-s) of every query, from cos and sin."""
        cosines, sines, minus = factors[::2], factors[1::2], [f32(0.0) - x for x in factors[1::2]]
        lows, highs = [], []
        for of_low, of_high in zip(low, high, strict=True):
            quads = list(zip(of_low, of_high, cosines, sines, minus, strict=True))
            lows.append([lanes.multiply_add(h, s, a * c) for a, h, c, s, _ in quads])
            highs.append([lanes.multiply_add(a, m, h * c) for a, h, c, _, m in quads])
        return lows, highs

    def operands(self, low: list, high: list) -> list[list[tuple[Reg, Reg]]]:
        """B of each step of the scores."""
        out = []
        for values in (a + b for a, b in zip(low, high, strict=True)):
            words = [lanes.pack_pair(values[i], values[i + 1], self.p.key.operand) for i in range(0, len(values), 2)]
            out.append(list(zip(words[::2], words[1::2], strict=True)))
        return out

    def keep(self, low: list, high: list, scratch: _Scratch) -> None:
        """The queries in shared memory, channel by channel."""
        for block, (of_low, of_high) in enumerate(zip(low, high, strict=True)):
            near, far = (at(scratch.query(block, self.channel, half), self.head << 2) for half in (False, True))
            for i, (a, b) in enumerate(zip(of_low, of_high, strict=True)):
                place = i // 2 * 64 + i % 2 * 16  # every other pair of channels is this lane's
                lanes.store(at(near, place), [a])
                lanes.store(at(far, place), [b])


class _KeyMap:
    """k' = R(i)(s Q + z) for the elements of this lane's quarter of a key: packed pairs, constant."""

    def __init__(self, p: Problem, place: skeleton.Place, rotations: Pointer, scale: Pointer, zero: Pointer, head: Reg):
        half = p.dim // 2
        channel = place.j * (p.dim // 8)
        turned = at(rotations, place.own * (half * 8), channel << 3)
        of_head = lanes.wide_product(head, p.dim * 4)
        scale, zero = (at(x, of_head, channel << 2) for x in (scale, zero))
        self.words = []
        for i in range(p.dim // 16):
            cos0, sin0, cos1, sin1 = (x.as_float() for x in lanes.load(at(turned, 16 * i), 4))
            s, s_far, z, z_far = (
                [word.as_float() for word in lanes.load(at(array, far * half * 4 + 8 * i), 2)]
                for array in (scale, zero)
                for far in (0, 1)
            )
            cos, sin = (cos0, cos1), (sin0, sin1)
            pairs = [
                [s[e] * cos[e] for e in (0, 1)],
                [f32(0.0) - s_far[e] * sin[e] for e in (0, 1)],
                [z[e] * cos[e] - z_far[e] * sin[e] for e in (0, 1)],
                [s_far[e] * cos[e] for e in (0, 1)],
                [s[e] * sin[e] for e in (0, 1)],
                [z_far[e] * cos[e] + z[e] * sin[e] for e in (0, 1)],
            ]
            self.words.append([lanes.pack_pair(first, second, p.key.operand) for first, second in pairs])
        self.operand = p.key.operand

    def __call__(self, key: list[Reg]) -> list[Reg]:
        half = len(key) // 2
        low, high = [], []
        for a, b, (a_cos, b_sin, zero, b_cos, a_sin, far_zero) in zip(key[:half], key[half:], self.words, strict=True):
            low.append(
                lanes.multiply_add_pair(a, a_cos, lanes.multiply_add_pair(b, b_sin, zero, self.operand), self.operand)
            )
            high.append(
                lanes.multiply_add_pair(
                    b, b_cos, lanes.multiply_add_pair(a, a_sin, far_zero, self.operand), self.operand
                )
            )
        return low + high


class _Outliers:
    """A tile's slots of keys or values, some a lane."""

    def __init__(self, p: Problem, pointer: Pointer, slots: int, row: Reg, lane: Reg):
        self.p, self.slots = p, slots
        self.rounds = -(-slots // 32)
        self.lane = lane
        self.row = at(pointer, lanes.wide_product(row, p.tokens // TILE * slots * 4))

    def load(self, tile: Reg) -> list[Reg]:
        """Words of a tile; 0 past the last slot."""
        of_tile = at(self.row, lanes.wide_product(tile, self.slots * 4))
        out = []
        for i in range(self.rounds):
            slot = self.lane + 32 * i
            word = lanes.load_stream(at(of_tile, slot.minimum(self.slots - 1) << 2), 0, 1)[0]
            out.append((slot < self.slots).where(word, u32(0)))
        return out

    def parts(self, word: Reg) -> tuple[Reg, Reg, Reg]:
        """Token of the tile, channel, difference."""
        return (word & 0xFFFF) // self.p.dim, word & (self.p.dim - 1), lanes.widen(word, "f16")[1]

    def each(self, words: list[Reg], do: Callable[[Reg], None]) -> None:
        """do(word) in the lanes that have one, 32 slots at a time; pools are filled from the front."""
        for word in words:
            with lanes.do_when(word.differs(0)):
                do(word)

    def largest(self, words: list[Reg]) -> Reg:
        """The largest difference's size, in all lanes."""
        sizes = [(word >> 16) & 0x7FFF for word in words]
        return lanes.widen(lanes.largest(lanes.reduce(Reg.maximum, sizes)), "f16")[0]


def _unit(largest: Reg, most: int) -> tuple[Reg, Reg]:
    """How many units a part is multiplied with, and one unit, so that `most` parts of that size fit 31 bits."""
    largest = largest.maximum(2.0**-40)
    return f32(2.0**30 / most) / largest, largest * (most / 2.0**30)


def _walk(p: Problem, row: Row) -> list:
    """One warp's tiles of a row -> for every four heads: maximum, sum, outputs."""
    settings: Settings = p.settings
    assert isinstance(p.key, Keys)
    rotations = p.key.rotations
    sparse = bool(settings.key_slots or settings.value_slots)
    place = skeleton.Place()
    lane, r, j, own = place.lane, place.r, place.j, place.own
    _, _, in_tile, fine, coarse, steps, scale, zero, key_pool = row.key
    _, _, of_tokens, value_pool = row.value
    (keys, key_row), (values, value_row) = skeleton.readers(p, row, place)
    factor_row = at(of_tokens, lanes.wide_product(row.batch, p.tokens * 4), own << 2)
    scratch = _Scratch(p, row.scratch, place.warp)
    key_outliers = _Outliers(p, key_pool, settings.key_slots, row.row, lane) if settings.key_slots else None
    value_outliers = _Outliers(p, value_pool, settings.value_slots, row.row, lane) if settings.value_slots else None
    groups = range(_GROUPS)

    def within(tile: Reg) -> Reg:
        return tile.minimum(row.high.maximum(1) - 1)

    def read_keys(tile: Reg) -> tuple:
        tile = within(tile)
        start = at(key_row, tile * (TILE * p.key.pitch))
        words = [keys.load(start, g * BLOCK * p.key.pitch) for g in groups]
        return words, key_outliers.load(tile) if key_outliers else []

    def read_values(tile: Reg) -> tuple:
        start = at(value_row, tile * (TILE * p.value.pitch))
        words = [[values.load(start, (g * BLOCK + t) * p.value.pitch) for t in (0, 4)] for g in groups]
        factors = [lanes.load_stream(at(factor_row, tile * (TILE * 4)), g * BLOCK * 4, 1)[0] for g in groups]
        return words, factors, value_outliers.load(tile) if value_outliers else []

    first = row.low + place.warp
    key_words = read_keys(first)  # on their way while shared memory is filled
    queries = _Queries(p, row.queries(), place)
    state = row.before(skeleton.empty(p))
    row.fill()
    key_map = _KeyMap(p, place, in_tile, scale, zero, row.head)
    low, high = queries.low, queries.high
    start = within(first)
    for table, index in ((fine, start % _COARSE), (coarse, start // _COARSE)):
        low, high = queries.turn(low, high, queries.factors(at(table, index * (p.dim * 4))))
    step = queries.factors(steps)
    selectors = skeleton.selectors_of(r)
    # More parts of the outputs: sums of outliers, of channels r, r + 8, ... of head j of each four, and of zero points.
    sparse_part = [[f32(0.0)] * (p.dim // 8)] if value_outliers else []
    state = [(m, total, [*parts, *sparse_part, [f32(0.0)]]) for m, total, parts in state]
    dense = p.dim // 32
    if value_outliers:
        for block in range(p.head_blocks):
            for i in range(p.dim // 8):
                lanes.store(scratch.output(block, j, r + 8 * i), [u32(0)])
    # No turn makes an element larger than both of a pair together.
    largest_query = lanes.reduce(Reg.maximum, [_size(x) for of_head in low + high for x in of_head])
    largest_query = lanes.largest(largest_query.as_bits()).as_float() * 2.0

    def visit(tile: Reg, carry):
        state, (low, high), (key_words, key_slots), value_unit = carry
        value_words, factors, value_slots = read_values(tile)
        if sparse:
            lanes.sync_warp()
        if key_outliers:
            queries.keep(low, high, scratch)
            # Each of a token's channels at most, by two elements of a query.
            units, unit = _unit(key_outliers.largest(key_slots) * largest_query, 2 * p.dim)
            _add_keys(p, key_outliers, key_slots, scratch, at(row.shared, rotations), place, units)
        scores = []
        for g, words in enumerate(key_words):
            scores.append(skeleton.products(key_map(keys.pairs(words)), queries.operands(low, high), p.key.operand))
            if g < _GROUPS - 1:
                low, high = queries.turn(low, high, step)
        if key_outliers:
            lanes.sync_warp()
            for g, of_group in enumerate(scores):
                added = [lanes.load(scratch.token(block, j, own + g * BLOCK), 1)[0] for block in range(p.head_blocks)]
                pairs = zip(added, of_group, strict=True)
                scores[g] = [lanes.multiply_add(lanes.from_integer(x), unit, score) for x, score in pairs]
        following = read_keys(tile + p.warps)
        low, high = queries.turn(low, high, queries.factors(at(steps, p.dim * 4)))
        begin = tile * TILE
        mask = functools.partial(skeleton.without_the_rest, row, place, begin, begin)
        scores = lanes.when(row.length < begin + TILE, scores, mask)
        if value_outliers:  # those of the tile before, which have had time to arrive
            state = _take_sums(p, scratch, state, value_unit, place)
        state = skeleton.make_room(p, scores, state)
        largest_weight = f32(0.0)
        for g in groups:
            near, far = map(values.pairs, value_words[g])
            factor, zero_point = lanes.widen(factors[g], "f16")
            out = []
            for block, (score, (m, total, parts)) in enumerate(zip(scores[g], state, strict=True)):
                weight = skeleton.weigh(p, score, m)
                if value_outliers:
                    lanes.store(scratch.token(block, j, own + g * BLOCK), [weight])
                    largest_weight = largest_weight.maximum(weight)
                scaled = skeleton.add_values(parts[:dense], p.value.operand, near, far, weight * factor, selectors)
                zeros = [lanes.multiply_add(weight, zero_point, parts[-1][0])]
                out.append((m, total + weight, [*scaled, *parts[dense:-1], zeros]))
            state = out
        if value_outliers:
            largest_weight = lanes.largest(largest_weight.as_bits()).as_float()
            units, value_unit = _unit(value_outliers.largest(value_slots) * largest_weight, TILE)
            _add_values(p, value_outliers, value_slots, scratch, units)
        return state, (low, high), following, value_unit

    carry = state, (low, high), key_words, f32(0.0)
    state, _, _, value_unit = lanes.loop(first, row.high, p.warps, carry, visit)
    if value_outliers:
        lanes.sync_warp()
        state = _take_sums(p, scratch, state, value_unit, place)
    out = []
    for block, (m, total, parts) in enumerate(state):
        (zeros,) = parts.pop()
        for distance in (4, 8, 16):
            zeros = zeros + lanes.exchange(zeros, distance)
        added = [zeros] * (p.dim // 8)
        if value_outliers:
            (of_outliers,) = parts[dense:]
            for i, x in enumerate(of_outliers):
                lanes.store(scratch.output(block, j, r + 8 * i), [x])
            lanes.sync_warp()
            mine = scratch.output(block, j, r * (p.dim // 8))
            added = [zeros + lanes.load(at(mine, 4 * i), 1)[0].as_float() for i in range(p.dim // 8)]
            lanes.sync_warp()
        pairs = zip(parts[:dense], itertools.batched(added, 4), strict=True)
        out.append((m, total, [[x + y for x, y in zip(part, more, strict=True)] for part, more in pairs]))
    return out


def _size(x: Reg) -> Reg:
    return x.maximum(f32(0.0) - x)


def _add_keys(
    p: Problem,
    outliers: _Outliers,
    slots: list[Reg],
    scratch: _Scratch,
    rotations: Pointer,
    place: skeleton.Place,
    units: Reg,
) -> None:
    """What a tile's outliers add to its scores, in units, into `scratch.token`; `sync_warp` is to follow."""
    half = p.dim // 2
    for block in range(p.head_blocks):
        for g in range(_GROUPS):
            lanes.store(scratch.token(block, place.j, place.r + g * BLOCK), [u32(0)])
    lanes.sync_warp()

    def add(word: Reg) -> None:
        token, channel, difference = outliers.parts(word)
        difference = difference * units
        pair = channel & (half - 1)
        far = u32(half - 1) < channel
        cos, sin = (x.as_float() for x in lanes.load(at(rotations, (token * half + pair) << 3), 2))
        of_low = far.where(f32(0.0) - sin, cos) * difference
        of_high = far.where(cos, sin) * difference
        for block in range(p.head_blocks):
            lows, highs = (lanes.load(scratch.query(block, pair, high), 4) for high in (False, True))
            for h in range(min(HEADS, p.group - HEADS * block)):
                added = lanes.multiply_add(lows[h].as_float(), of_low, highs[h].as_float() * of_high)
                lanes.add_shared(scratch.token(block, h, token), lanes.to_integer(added))

    outliers.each(slots, add)


def _add_values(p: Problem, outliers: _Outliers, slots: list[Reg], scratch: _Scratch, units: Reg) -> None:
    """What a tile's outliers add to outputs by the weights in `scratch.token`, in units, into `scratch.output`;
    `sync_warp` is to follow."""
    lanes.sync_warp()

    def add(word: Reg) -> None:
        token, channel, difference = outliers.parts(word)
        difference = difference * units
        for block in range(p.head_blocks):
            for h in range(min(HEADS, p.group - HEADS * block)):
                weight = lanes.load(scratch.token(block, h, token), 1)[0].as_float()
                lanes.add_shared(scratch.output(block, h, channel), lanes.to_integer(weight * difference))

    outliers.each(slots, add)


def _take_sums(p: Problem, scratch: _Scratch, state: list, unit: Reg, place: skeleton.Place) -> list:
    """The state with the sums of `scratch.output`, which are 0 again: lane (r, j) takes channels r + 8 i of head j."""
    out = []
    for block, (m, total, parts) in enumerate(state):
        *dense, of_outliers, zeros = parts
        taken = []
        for i, x in enumerate(of_outliers):
            mine = scratch.output(block, place.j, place.r + 8 * i)
            taken.append(lanes.multiply_add(lanes.from_integer(lanes.load(mine, 1)[0]), unit, x))
            lanes.store(mine, [u32(0)])
        out.append((m, total, [*dense, taken, zeros]))
    return out

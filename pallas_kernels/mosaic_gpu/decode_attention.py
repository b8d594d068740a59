"""Attention of one decoded token over keys and values held in any form, as Mosaic GPU kernels for Hopper.

Two kernels, written lane by lane: one reads the keys and values and leaves partial results, the other joins those of
each row. How keys and values are held is a `Source`: it turns what a lane has read of a token into pairs of 16-bit
elements.

*Scores*, a warp and 8 tokens at a time, by `mma` 16 x 16 x 8. The order in which a product is summed is free, and so is
which rows stand for what: row r is one half of token r's elements (0, 1 of every 4), row r + 8 the other half (2, 3),
so that a lane's four words of A are four consecutive words, 8 elements of one token's key. Columns 2h and
2h + 1 are head h's query at those halves. C[r, 2h] + C[r + 8, 2h + 1] is the score, and lane (r, h) holds both.

*Output* = V^T P likewise: rows r and r + 8 are two words (pairs of elements) of V, the summed index is (token, element
of the pair), and B[(t, e), (h, e')] is p[t, h] where e = e' and 0 elsewhere. A's words are again words of V as it is.

*Softmax*: the running maximum moves only when a score exceeds it by 2^8, which is rare; all lanes vote on it.

*Work*: the tiles of all rows, head by head, form one list by actual lengths; block i takes the i-th of `blocks` equal
shares, whatever rows those belong to, and writes one partial result a row that it touches. Exact tokens (a residual
window) are read by the block that has the row's last tile, before it needs what its head shares: they cost no pass of
their own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import split_k
from pallas_kernels.exact import ExactTokens
from pallas_kernels.mosaic_gpu import butterfly, lanes
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, f32, u32

HEAD_DIMS = (64, 128)
MOST_HEADS = 16
# Shared memory that a block may have on an H100 or H200, less what Mosaic takes.
SHARED_BYTES = 226 * 1024
BLOCK = 8  # tokens of one tensor core operation
HEADS = 4  # query heads of one tensor core operation
_WARP, _WARPS = 32, 4  # lanes a warp, warps a warpgroup
_SLACK = 8.0  # how far, in powers of two, a score may exceed the running maximum
_LOG2_E = math.log2(math.e)


@runtime_checkable
class Reader(Protocol):
    """How one lane reads its elements of a token: those of one of several equal parts of a head."""

    word_offset: Reg  # bytes from where a token begins

    def load(self, pointer: Pointer, offset: int) -> list[Reg]:
        """What is read of the token at pointer + offset; `pointer` includes `word_offset`."""

    def pairs(self, words: list[Reg]) -> list[Reg]:
        """The elements that it stands for, two a word."""


@runtime_checkable
class Source(Protocol):
    """How keys or values are held; hashable."""

    @property
    def operand(self) -> str:
        """What the tensor cores multiply: "bf16" or "f16"."""

    @property
    def pitch(self) -> int:
        """Bytes of a head's token."""

    @property
    def shared_end(self) -> int:
        """Where what it keeps in shared memory ends."""

    @property
    def extras(self) -> int:
        """How many arrays it has beside that of the tokens."""

    def fill(self, shared: Pointer, threads: int, head: Reg, *extras: Pointer) -> None:
        """Brings what one head's tokens share into shared memory; all of the block's threads do it together."""


@runtime_checkable
class TokenSource(Source, Protocol):
    """One in which a token's elements stand together."""

    def reader(self, shared: Pointer, part: Reg, parts: int, lane: Reg) -> Reader: ...


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is shaped."""

    groups: int  # of 8 tokens: what a warp handles at a time
    warpgroups: int
    blocks: int

    @property
    def tile(self) -> int:
        """Tokens that a warp handles at a time."""
        return BLOCK * self.groups


@dataclasses.dataclass(frozen=True)
class Exact:
    """Tokens held as they are, of elements that the tensor cores multiply."""

    tokens: int
    operand: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static."""

    name: str  # of the kernels
    key: Source
    value: Source
    dim: int
    batch: int
    kv_heads: int
    group: int
    tokens: int
    queries: str
    query_scale: bool
    query_hadamard: bool
    query_map: bool
    exact: tuple[Exact, ...]
    scale: float
    output: str  # "f32", or as `Exact.operand`
    config: Config
    walk: "Walk"
    strided: bool  # whether a lane has four of every 32 elements of a value, and not D / 8 neighbours
    settings: Any  # of the walk
    scratch_bytes: int  # shared memory of the walk

    @property
    def transforms(self) -> bool:
        """Whether the kernel brings queries into the keys' basis."""
        return self.query_scale or self.query_hadamard or self.query_map

    @property
    def tile(self) -> int:
        return self.config.tile

    @property
    def warps(self) -> int:
        return _WARPS * self.config.warpgroups

    @property
    def threads(self) -> int:
        return _WARP * self.warps

    @property
    def head_blocks(self) -> int:
        return -(-self.group // HEADS)

    @property
    def sources_bytes(self) -> int:
        return -(-max(self.key.shared_end, self.value.shared_end) // 16) * 16

    @property
    def shared_bytes(self) -> int:
        own = self.sources_bytes + merge_bytes(self.dim, self.group, self.config) + Schedule.shared_bytes(self.batch)
        return own + self.scratch_bytes

    @property
    def slots(self) -> int:
        """Partial results: block and row only ever grow, so their sum names a pair."""
        return self.config.blocks + self.batch * self.kv_heads


def attend(
    name: str,
    q: Float[Array, "B Hq D"],
    keys: tuple[Source, Array, Sequence[Array]],
    values: tuple[Source, Array, Sequence[Array]],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    config: Config,
    query_scale: Float[Array, "Hkv D"] | None = None,
    query_hadamard: bool = False,
    query_map: Float[Array, "Hkv D D"] | None = None,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    out_dtype: Any = jnp.float32,
    walk: "Walk | None" = None,
    strided: bool = False,
    settings: Any = None,
    scratch_bytes: int = 0,
) -> tuple[Array, Array]:
    """softmax(scale q K^T) V -> output [B, Hq, D] in `out_dtype`, log-sum-exp [B, Hq].

    keys, values: how they are held, the array [B, Hkv, S, ...] of their tokens, and further ones that their source
    reads. walk: what a warp does with a row's tiles, `walk_tiles` if not given; strided: whether its outputs are, in
    lane (r, j), part i, elements 32 i + 4 r ... of head j rather than r D / 8 + 4 i ...; settings: its own, hashable;
    scratch_bytes: its shared memory. The other arguments are those of `pallas_kernels.vq_decode_attention`.

    Raises NotImplementedError for what these kernels do not serve.
    """
    (key, key_tokens, key_extras), (value, value_tokens, value_extras) = keys, values
    batch, query_heads, dim = q.shape
    kv_heads, tokens = key_tokens.shape[1:3]
    rows = batch * kv_heads
    operands = [_exact_operand(name, each) for each in exact]
    problem = Problem(
        name=name,
        key=key,
        value=value,
        dim=dim,
        batch=batch,
        kv_heads=kv_heads,
        group=query_heads // kv_heads,
        tokens=max(tokens, config.tile),
        queries=operand_of(q.dtype),
        query_scale=query_scale is not None,
        query_hadamard=query_hadamard,
        query_map=query_map is not None,
        exact=tuple(Exact(each.keys.shape[2], operand) for each, operand in zip(exact, operands, strict=True)),
        scale=abs(scale) * _LOG2_E,
        output=_output_kind(name, out_dtype),
        config=config,
        walk=walk or walk_tiles,
        strided=strided,
        settings=settings,
        scratch_bytes=scratch_bytes,
    )
    if problem.shared_bytes > SHARED_BYTES:
        raise NotImplementedError(f"{name}: {batch} rows leave no shared memory to the mosaic_gpu kernel")
    most = max(rows * -(-tokens // config.tile) * config.blocks, tokens * max(key.pitch, value.pitch))
    if most >= 2**32:
        raise NotImplementedError(f"{name}: the mosaic_gpu kernel cannot address tokens {key_tokens.shape}")
    if tokens < config.tile:  # and where there is no token at all
        room = ((0, 0), (0, 0), (0, config.tile - tokens), *((0, 0),) * (key_tokens.ndim - 3))
        key_tokens, value_tokens = jnp.pad(key_tokens, room), jnp.pad(value_tokens, room)
        lengths = lengths.clip(0, tokens)
    # Queries that the kernel transforms stay in their own dtype until it has: an fp8 table's is float16.
    given = problem.queries if problem.transforms else key.operand
    arrays = [_queries(q, scale, kv_heads, given), key_tokens, *key_extras, value_tokens, *value_extras, lengths]
    arrays += [array.astype(jnp.float32) for array in (query_scale, query_map) if array is not None]
    for each, operand in zip(exact, operands, strict=True):
        assert exact_q is not None
        held = [array.reshape(rows, -1, dim) for array in (each.keys, each.values)]
        arrays += [_queries(exact_q, scale, kv_heads, operand), *held, each.valid.astype(jnp.int32)]
    output, lse = _join(problem, *_partials(problem, *arrays), lengths)
    return output.reshape(batch, query_heads, dim), lse.reshape(batch, query_heads)


def operand_of(dtype: Any) -> str:
    """bf16 and f16 by those names, others by their own."""
    return {"bfloat16": "bf16", "float16": "f16"}.get(jnp.dtype(dtype).name, str(dtype))


def _output_kind(name: str, dtype: Any) -> str:
    kind = {"float32": "f32"}.get(jnp.dtype(dtype).name, operand_of(dtype))
    if kind not in ("f32", "bf16", "f16"):
        raise NotImplementedError(f"{name}: the mosaic_gpu kernel does not write {dtype}")
    return kind


def _exact_operand(name: str, tokens: ExactTokens) -> str:
    operands = {operand_of(array.dtype) for array in (tokens.keys, tokens.values)}
    if operands not in ({"bf16"}, {"f16"}):
        raise NotImplementedError(
            f"{name}: the mosaic_gpu kernel reads exact keys and values of one 16-bit type, not "
            f"{tokens.keys.dtype} and {tokens.values.dtype}"
        )
    return operands.pop()


def _queries(q: Float[Array, "B Hq D"], scale: float, kv_heads: int, operand: str) -> Array:
    """[B Hkv, G, D]; a negative scale turns them round."""
    grouped = (q if scale > 0 else -q).reshape(q.shape[0] * kv_heads, -1, q.shape[-1])
    return grouped.astype(dtype_of(operand))


def dtype_of(operand: str) -> Any:
    return {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}[operand]


def merge_bytes(dim: int, group: int, config: Config) -> int:
    """Shared memory in which a block's warps join."""
    heads = -(-group // HEADS) * HEADS
    return _WARPS * config.warpgroups * heads * 4 * (dim + 2)


def room(dim: int, group: int, batch: int, config: Config) -> int:
    """Bytes of shared memory that are left to the sources."""
    return SHARED_BYTES - merge_bytes(dim, group, config) - Schedule.shared_bytes(batch)


# -- the two launches


def _partials(problem: Problem, *arrays: Array) -> list[Array]:
    """-> unnormalised outputs [slots, G, D], maxima and sums [slots, G, 2]; `_join` knows which were written."""
    p, shape = problem, jax.ShapeDtypeStruct
    return lanes.launch(
        functools.partial(_attend_block, p),
        arrays,
        [shape((p.slots, p.group, p.dim), jnp.float32), shape((p.slots, p.group, 2), jnp.float32)],
        blocks=p.config.blocks,
        warpgroups=p.config.warpgroups,
        shared_bytes=p.shared_bytes,
        name=p.name,
    )


def _join(problem: Problem, *arrays: Array) -> list[Array]:
    """The partial results of each row, merged -> output [R, G, D], natural-log log-sum-exp [R, G]."""
    p, shape = problem, jax.ShapeDtypeStruct
    rows = p.batch * p.kv_heads
    return lanes.launch(
        functools.partial(_join_row, p),
        arrays,
        [shape((rows, p.group, p.dim), dtype_of(p.output)), shape((rows, p.group), jnp.float32)],
        blocks=rows,
        warpgroups=-(-p.group * p.dim // 4 // (_WARP * _WARPS)),
        shared_bytes=Schedule.shared_bytes(p.batch),
        name=f"{p.name}_join",
    )


# -- whose tiles are whose


@dataclasses.dataclass
class Row:
    """A row's share of one block, as a walk over its tiles gets it.

    low, high: tiles of the row that are the block's; length: tokens that count; key, value: where all tokens begin and
    what else their sources have; shared: the sources' shared memory; scratch: the walk's. `queries()` says where the
    group's queries are. state = before(state) and fill() are to be run by all threads, once the first tokens are on
    their way and before any is used.
    """

    row: Reg
    head: Reg
    batch: Reg
    low: Reg
    high: Reg
    length: Reg
    key: list[Pointer]
    value: list[Pointer]
    shared: Pointer
    scratch: Pointer
    queries: Callable[[], Pointer]
    before: Callable[[list], list]
    fill: Callable[[], None]


class Schedule:
    """The list of all rows' tiles: head by head, within a head batch row by batch row. Every thread makes one."""

    def __init__(self, p: Problem, lengths: Pointer, shared: Pointer):
        """Sums up the tiles of the batch rows, 32 at a time, and leaves the sums in shared memory for all to see."""
        self.problem, self.lengths, self.sums = p, lengths, shared
        lane, one = lanes.thread() & (_WARP - 1), u32(1 if p.exact else 0)
        self.lane, self.ends = lane, []
        before = u32(0)
        for first in range(0, p.batch, _WARP):
            exists = lane + first < p.batch
            tiles = self.coded_tiles((lane + first).minimum(p.batch - 1)).maximum(one)  # a tile for a window alone
            end = exists.where(tiles, u32(0))
            for distance in (1, 2, 4, 8, 16):
                end = end + (u32(distance - 1) < lane).where(lanes.from_below(end, distance), u32(0))
            end = end + before
            before = lanes.of_lane(end, _WARP - 1)
            with lanes.do_when(exists & (lanes.thread() < _WARP)):
                lanes.store(at(shared, (lane + first) << 2), [end])
            self.ends.append(end)
        lanes.barrier()
        self.total = before * p.kv_heads
        self.of_head = before.maximum(1)  # without any tile, as if there were one a head: nothing to divide by 0
        self.shared = self.of_head * p.kv_heads
        # Blocks that share the tiles: each has one, unless there is none at all.
        self.blocks = self.shared.minimum(p.config.blocks)

    @staticmethod
    def shared_bytes(batch: int) -> int:
        return -(-4 * batch // 16) * 16

    def length(self, batch: Reg) -> Reg:
        """Coded tokens of a batch row, which no caller can make more than there are, or less than none."""
        length = lanes.load(at(self.lengths, batch << 2), 1)[0]
        return (length <= 2**31 - 1).where(length.minimum(self.problem.tokens), u32(0))

    def coded_tiles(self, batch: Reg) -> Reg:
        return (self.length(batch) + (self.problem.tile - 1)) // self.problem.tile

    def end(self, batch: Reg) -> Reg:
        """Tiles of one head's batch rows 0 .. batch."""
        return lanes.load(at(self.sums, batch << 2), 1)[0]

    def span(self, head: Reg, batch: Reg) -> tuple[Reg, Reg]:
        """The first tile of a row, and the one after its last."""
        start = lanes.when(batch.differs(0), u32(0), lambda _: self.end(batch - 1))
        return head * self.of_head + start, head * self.of_head + self.end(batch)

    def row_of(self, tile: Reg) -> Reg:
        """Which row, counted head by head, holds a tile of the list."""
        head, within = tile // self.of_head, tile % self.of_head
        passed = [
            lanes.count_lanes((self.lane + _WARP * i < self.problem.batch) & (end <= within))
            for i, end in enumerate(self.ends)
        ]
        return head * self.problem.batch + lanes.reduce(Reg.__add__, passed)

    def share(self, block: Reg) -> Reg:
        """The first tile of a block; past the last one for a block that has none."""
        return (block * self.shared // self.blocks).minimum(self.total)

    def block_of(self, tile: Reg) -> Reg:
        return ((tile + 1) * self.blocks - 1) // self.shared


def _attend_block(p: Problem, q, *rest: Any) -> None:
    """Block `block` attends to its share of the tiles, row after row."""
    given = iter(rest[:-4])
    outputs, sums, shared, block = rest[-4:]
    key, value = ([next(given) for _ in range(1 + source.extras)] for source in (p.key, p.value))
    lengths = next(given)
    factors = next(given) if p.query_scale or p.query_map else None
    exact = list(given)
    merge = at(shared, p.sources_bytes)
    sums_of_lengths = at(merge, merge_bytes(p.dim, p.group, p.config))
    scratch = at(sums_of_lengths, Schedule.shared_bytes(p.batch))
    schedule = Schedule(p, lengths, sums_of_lengths)
    first, last = schedule.share(block), schedule.share(block + 1)

    def visit(index: Reg, filled: Reg) -> Reg:
        head, batch = index // p.batch, index % p.batch
        start, end = schedule.span(head, batch)
        low, high = first.maximum(start), last.minimum(end)
        row = batch * p.kv_heads + head

        def attend(filled: Reg) -> Reg:
            def fill() -> None:
                with lanes.do_when(head.differs(filled)):
                    p.key.fill(shared, p.threads, head, *key[1:])
                    p.value.fill(shared, p.threads, head, *value[1:])
                lanes.barrier()  # what the head shares is there, and the queries have been read

            def before(state: list) -> list:
                for i, source in enumerate(p.exact):
                    see = functools.partial(_attend_exactly, p, source, exact[4 * i : 4 * i + 4], row, batch)
                    state = lanes.when(high.equals(end), state, see)
                return state

            def queries() -> Pointer:
                of_row = _queries_of(p, q, row)
                if p.query_map:
                    return _map_queries(p, of_row, at(factors, lanes.wide_product(head, p.dim * p.dim * 4)), merge)
                return _transform_queries(p, of_row, factors, head, merge) if p.transforms else of_row

            state = p.walk(
                p,
                Row(
                    row=row,
                    head=head,
                    batch=batch,
                    low=low - start,
                    high=(high - start).minimum(schedule.coded_tiles(batch)),
                    length=schedule.length(batch),
                    key=key,
                    value=value,
                    shared=shared,
                    scratch=scratch,
                    queries=queries,
                    before=before,
                    fill=fill,
                ),
            )
            _merge(p, state, merge, outputs, sums, block + index)
            lanes.barrier()  # the merge has been read
            return head

        return lanes.when(low < high, filled, attend)

    with lanes.do_when(first < last):
        lanes.loop(schedule.row_of(first), schedule.row_of(last - 1) + 1, 1, u32(p.kv_heads), visit)


class Place:
    """Which lane of its warp this is, and which of eight tokens' keys it reads."""

    def __init__(self) -> None:
        self.lane, self.warp = lanes.thread() & (_WARP - 1), lanes.warp()
        self.r, self.j, odd = self.lane >> 2, self.lane & 3, (self.lane >> 2) & 1
        # Row r of a score tile is token r / 2 + 4 (r % 2): then a warp's load of values is contiguous, and after
        # the transposition of p a lane holds the weights of tokens j and j + 4.
        self.own = (self.r >> 1) + (odd << 2)


def walk_tiles(p: Problem, row: Row) -> list:
    """One warp's tiles of a row -> for every four heads: maximum, sum, outputs."""
    place = Place()
    (keys, key_row), (values, value_row) = readers(p, row, place)
    key_pitch, value_pitch = p.key.pitch, p.value.pitch

    def start_of(tile: Reg) -> Reg:
        start = tile * p.tile
        return start if p.tokens % p.tile == 0 else start.minimum(p.tokens - p.tile)

    def read(tile: Reg) -> list:
        start = start_of(tile.minimum(row.high.maximum(1) - 1))
        key_at, value_at = at(key_row, start * key_pitch), at(value_row, start * value_pitch)
        return [
            (
                keys.load(key_at, g * BLOCK * key_pitch),
                [values.load(value_at, (g * BLOCK + t) * value_pitch) for t in (0, 4)],
            )
            for g in range(p.config.groups)
        ]

    first = row.low + place.warp
    words = read(first)  # on their way while shared memory is filled
    of_row = row.queries()
    queries = [load_queries(p, of_row, block, place.r, place.j) for block in range(p.head_blocks)]
    state = row.before(empty(p))
    row.fill()
    selectors = selectors_of(place.r)

    def visit(tile: Reg, carry):
        state, words = carry
        following = read(tile + p.warps)
        scores = [products(keys.pairs(of_keys), queries, p.key.operand) for of_keys, _ in words]
        start = tile * p.tile
        mask = functools.partial(without_the_rest, row, place, start, start_of(tile))
        scores = lanes.when(row.length < start + p.tile, scores, mask)
        state = make_room(p, scores, state)
        for of_group, (_, of_values) in zip(scores, words, strict=True):
            near, far = map(values.pairs, of_values)
            state = accumulate(p, p.value.operand, near, far, of_group, state, selectors)
        return state, following

    return lanes.loop(first, row.high, p.warps, (state, words), visit)[0]


def readers(p: Problem, row: Row, place: Place) -> tuple[tuple[Reader, Pointer], tuple[Reader, Pointer]]:
    """How this lane reads keys and values, and from where: of the row's first eight tokens, its own key and, four
    tokens apart, two values."""

    def one(source: Source, tokens: Pointer, part: Reg, parts: int, token: Reg) -> tuple[Reader, Pointer]:
        assert isinstance(source, TokenSource)
        reader = source.reader(row.shared, part, parts, place.lane)
        of_row = at(tokens, lanes.wide_product(row.row, p.tokens * source.pitch))
        return reader, at(of_row, token * source.pitch + reader.word_offset)

    return one(p.key, row.key[0], place.j, 4, place.own), one(p.value, row.value[0], place.r, 8, place.j)


def without_the_rest(row: Row, place: Place, start: Reg, read_from: Reg, scores: list) -> list:
    """Scores of a tile without the tokens past the length, and those before `start` where it is read from earlier."""
    out = []
    for g, of_group in enumerate(scores):
        token = read_from + place.own + g * BLOCK
        counts = (token < row.length) & (start <= token)
        out.append([counts.where(s, f32(split_k.EMPTY)) for s in of_group])
    return out


Walk = Callable[[Problem, Row], list]


def _attend_exactly(p: Problem, source: Exact, arrays: Sequence[Pointer], row: Reg, batch: Reg, state: list) -> list:
    """One warp's share of a row's exact tokens, eight at a time, after what `state` has seen."""
    q, keys, values, valid = arrays
    lane = lanes.thread() & (_WARP - 1)
    r, j = lane >> 2, lane & 3
    own = (r >> 1) + ((r & 1) << 2)
    queries = [load_queries(p, _queries_of(p, q, row), block, r, j) for block in range(p.head_blocks)]
    key_row, value_row = (at(x, lanes.wide_product(row, source.tokens * p.dim * 2)) for x in (keys, values))
    valid_row = at(valid, lanes.wide_product(batch, source.tokens * 4))
    last = source.tokens - 1

    def visit(group: Reg, state: list) -> list:
        first = group * BLOCK
        token = (first + own).minimum(last)
        counts = (first + own < source.tokens) & lanes.load(at(valid_row, token << 2), 1)[0].differs(0)

        def see(state: list) -> list:
            key = _row_words(at(key_row, token * (p.dim * 2), j * (p.dim // 2)), p.dim // 8)
            near, far = (_value_words(p, at(value_row, (first + j + t).minimum(last) * (p.dim * 2)), r) for t in (0, 4))
            scores = [counts.where(s, f32(split_k.EMPTY)) for s in products(key, queries, source.operand)]
            state = make_room(p, [scores], state)
            return accumulate(p, source.operand, near, far, scores, state, selectors_of(r))

        return lanes.when(lanes.any_lane(counts), state, see)

    return lanes.loop(lanes.warp(), u32(-(-source.tokens // BLOCK)), p.warps, state, visit)


def _row_words(pointer: Pointer, count: int) -> list[Reg]:
    return [word for i in range(0, count, 4) for word in lanes.load(at(pointer, 4 * i), 4)]


def _value_words(p: Problem, pointer: Pointer, r: Reg) -> list[Reg]:
    """Part r of a value held as it is."""
    if p.strided:
        return [word for i in range(p.dim // 32) for word in lanes.load(at(pointer, 64 * i, r << 3), 2)]
    return _row_words(at(pointer, r * (p.dim // 4)), p.dim // 16)


def empty(p: Problem) -> list:
    """Nothing seen."""
    parts = p.dim // 32
    return [(f32(split_k.EMPTY), f32(0.0), [[f32(0.0)] * 4 for _ in range(parts)]) for _ in range(p.head_blocks)]


def selectors_of(r: Reg) -> list[Reg]:
    """For `accumulate`: where B has a weight and where a 0."""
    even = (r & 1).equals(0)
    return [even.where(u32(a), u32(b)) for a, b in ((0x4410, 0x1044), (0x4432, 0x3244))]


def _queries_of(p: Problem, q: Pointer, row: Reg) -> Pointer:
    return at(q, lanes.wide_product(row, p.group * p.dim * 2))


def _transform_queries(p: Problem, q: Pointer, scale: Pointer | None, head: Reg, scratch: Pointer) -> Pointer:
    """The group's queries times `scale` and H, in shared memory, as the tensor cores take them."""
    pairs = p.dim // 2
    wide, out = scratch, at(scratch, p.group * p.dim * 4)
    chunks = range(-(-p.group * pairs // p.threads))
    for i in chunks:
        pair = lanes.thread() + i * p.threads
        with lanes.do_when(pair < p.group * pairs):  # whole warps
            values = lanes.widen(lanes.load(at(q, pair << 2), 1)[0], p.queries)
            if scale is not None:
                of_head = at(scale, lanes.wide_product(head, p.dim * 4))
                of_pair = lanes.load(at(of_head, (pair % pairs) << 3), 2)
                values = [v * f.as_float() for v, f in zip(values, of_pair, strict=True)]
            if p.query_hadamard:
                values = butterfly.within_warp(values)
            lanes.store(at(wide, pair << 3), values)
    lanes.barrier()
    for i in chunks:
        pair = lanes.thread() + i * p.threads
        with lanes.do_when(pair < p.group * pairs):
            if p.query_hadamard:
                values = butterfly.across_warps(at(wide, pair // pairs * (p.dim * 4)), pair % pairs, p.dim)
            else:
                values = [word.as_float() for word in lanes.load(at(wide, pair << 3), 2)]
            lanes.store(at(out, pair << 2), [_query_word(p, *values)])
    lanes.barrier()
    return out


def _query_word(p: Problem, low: Reg, high: Reg) -> Reg:
    """Two elements of a query as the tensor cores take them, rounded to the queries' dtype first, as ever."""
    if p.queries != p.key.operand:
        low, high = lanes.widen(lanes.pack_pair(low, high, p.queries), p.queries)
    return lanes.pack_pair(low, high, p.key.operand)


def _map_queries(p: Problem, q: Pointer, matrix: Pointer, scratch: Pointer) -> Pointer:
    """The group's queries times a matrix [D, D], in shared memory, as the tensor cores take them.

    A thread sums one column over its part of the rows.
    """
    parts, of_group = p.threads // p.dim, p.group * p.dim * 4
    rows = p.dim // parts
    column, part = lanes.thread() % p.dim, lanes.thread() // p.dim
    out = at(scratch, parts * of_group)

    def some(row: Reg, sums: list[Reg]) -> list[Reg]:
        first = part * rows + row
        mine = at(matrix, first * (p.dim * 4) + (column << 2))
        column_of = [lanes.load(at(mine, i * p.dim * 4), 1)[0].as_float() for i in range(at_once)]
        for head in range(p.group):
            words = _row_words(at(q, head * p.dim * 2, first << 1), at_once // 2)
            elements = [x for word in words for x in lanes.widen(word, p.queries)]
            for x, factor in zip(elements, column_of, strict=True):
                sums = [*sums[:head], lanes.multiply_add(x, factor, sums[head]), *sums[head + 1 :]]
        return sums

    at_once = min(rows, 32)
    sums = lanes.loop(u32(0), u32(rows), at_once, [f32(0.0)] * p.group, some)
    for head, total in enumerate(sums):
        lanes.store(at(scratch, part * of_group + head * (p.dim * 4) + (column << 2)), [total])
    lanes.barrier()
    pairs = p.group * p.dim // 2
    for i in range(-(-pairs // p.threads)):
        pair = lanes.thread() + i * p.threads
        with lanes.do_when(pair < pairs):
            held = [lanes.load(at(scratch, part * of_group, pair << 3), 2) for part in range(parts)]
            low, high = (lanes.reduce(Reg.__add__, [x.as_float() for x in each]) for each in zip(*held, strict=True))
            lanes.store(at(out, pair << 2), [_query_word(p, low, high)])
    lanes.barrier()
    return out


def load_queries(p: Problem, q: Pointer, block: int, r: Reg, j: Reg) -> list[tuple[Reg, Reg]]:
    """B of each step of the scores: column r is half r % 2 of every 4 elements of head r / 2."""
    head = (r >> 1) + HEADS * block
    exists = head < p.group
    mine = at(q, exists.where(head, u32(0)) * (p.dim * 2) + j * (p.dim // 2) + (r & 1) * 4)
    words = [exists.where(lanes.load(at(mine, 8 * i), 1)[0], u32(0)) for i in range(p.dim // 16)]
    return list(zip(words[::2], words[1::2], strict=True))


def products(key: list[Reg], queries: list, operand: str) -> list[Reg]:
    """q . k of 8 tokens: in lane (r, j) of row r with head j of each four heads."""
    sums = [[f32(0.0)] * 4 for _ in queries]
    for step in range(len(key) // 4):
        a = key[4 * step : 4 * step + 4]
        sums = [lanes.mma(c, a, b[step], operand) for c, b in zip(sums, queries, strict=True)]
    return [c[0] + c[3] for c in sums]


def make_room(p: Problem, scores: list[list[Reg]], state: list) -> list:
    """Moves the running maxima where one of the scores (of groups of tokens, of four heads each) is far above."""
    peaks = [lanes.reduce(Reg.maximum, list(of_heads)) for of_heads in zip(*scores, strict=True)]
    above = [peak * p.scale - m > _SLACK for peak, (m, _, _) in zip(peaks, state, strict=True)]

    def raised(state: list) -> list:
        out = []
        for peak, (m, total, outputs) in zip(peaks, state, strict=True):
            for distance in (4, 8, 16):
                peak = peak.maximum(lanes.exchange(peak, distance))
            new = m.maximum(peak * p.scale)
            shrink = lanes.exp2(m - new)
            out.append((new, total * shrink, [[x * shrink for x in part] for part in outputs]))
        return out

    return lanes.when(lanes.any_lane(lanes.reduce(Reg.__or__, above)), state, raised)


def accumulate(
    p: Problem, operand: str, near: list[Reg], far: list[Reg], scores: list[Reg], state: list, selectors: list[Reg]
) -> list:
    """The state with 8 more tokens: their weights, and V^T p."""
    out = []
    for score, (m, total, parts) in zip(scores, state, strict=True):
        weight = weigh(p, score, m)
        out.append((m, total + weight, add_values(parts, operand, near, far, weight, selectors)))
    return out


def weigh(p: Problem, score: Reg, m: Reg) -> Reg:
    """exp(score), relative to the running maximum."""
    return lanes.exp2(lanes.multiply_add(score, p.scale, f32(0.0) - m))


def add_values(
    parts: list, operand: str, near: list[Reg], far: list[Reg], weight: Reg, selectors: list[Reg]
) -> list[list[Reg]]:
    """The outputs of four heads with V^T p of 8 more tokens.

    near, far: this lane's words of the values of tokens j and j + 4. weight: in lane (r, j) of row r with head j.
    Outputs: in lane (r, j) elements r D / 8 .. of head j, four a part.
    """
    pair = lanes.transpose_8x8(lanes.pack_pair(weight, weight, operand))
    b = [lanes.bytes_of(pair, u32(0), selector) for selector in selectors]
    return [
        lanes.mma(part, [*near[2 * i : 2 * i + 2], *far[2 * i : 2 * i + 2]], b, operand) for i, part in enumerate(parts)
    ]


# -- joining


def _merge(p: Problem, state: list, merge: Pointer, outputs: Pointer, sums: Pointer, slot: Reg) -> None:
    """The block's warps join through shared memory; one partial result is written."""
    thread, warp = lanes.thread(), lanes.warp()
    r, j = (thread & (_WARP - 1)) >> 2, thread & 3
    heads = p.head_blocks * HEADS
    row_bytes = p.dim * 4
    sums_at = at(merge, p.warps * heads * row_bytes)
    for block, (m, total, parts) in enumerate(state):
        for distance in (4, 8, 16):
            total = total + lanes.exchange(total, distance)
        row = warp * heads + block * HEADS + j
        for i, part in enumerate(parts):
            place = (r << 4) + i * 128 if p.strided else r * (row_bytes // 8) + i * 16
            lanes.store(at(merge, row * row_bytes + place), part)
        lanes.store(at(sums_at, row * 8), [m, total])
    lanes.barrier()
    quads = p.dim // 4
    slot_at = at(outputs, lanes.wide_product(slot, p.group * row_bytes))
    for i in range(-(-p.group * quads // p.threads)):
        quad = thread + i * p.threads
        with lanes.do_when(quad < p.group * quads):
            head, place = quad // quads, (quad % quads) * 16
            rows = [head + w * heads for w in range(p.warps)]
            parts = [[x.as_float() for x in lanes.load(at(sums_at, row * 8), 2)] for row in rows]
            top = lanes.reduce(Reg.maximum, [m for m, _ in parts])
            sum_of_all, out = f32(0.0), [f32(0.0)] * 4
            for row, (m, total) in zip(rows, parts, strict=True):
                weight = lanes.exp2(m - top)
                sum_of_all = sum_of_all + total * weight
                words = lanes.load(at(merge, row * row_bytes + place), 4)
                out = [o + word.as_float() * weight for o, word in zip(out, words, strict=True)]
            lanes.store(at(slot_at, quad * 16), out)
            with lanes.do_when((quad % quads).equals(0)):
                lanes.store(at(sums, lanes.wide_product(slot * p.group + head, 8)), [top, sum_of_all])


def _join_row(p: Problem, outputs, sums, lengths, joined, lse, shared, row: Reg) -> None:
    """A row's partial results, eight at a time so that their loads overlap, normalised."""
    schedule = Schedule(p, lengths, shared)
    quads = p.dim // 4
    quad = lanes.thread()
    head_of_row, batch = row % p.kv_heads, row // p.kv_heads
    index = head_of_row * p.batch + batch
    start, end = schedule.span(head_of_row, batch)
    first = schedule.block_of(start)
    last = lanes.when(start < end, first, lambda _: schedule.block_of(end - 1) + 1)

    with lanes.do_when(quad < p.group * quads):
        head, place = quad // quads, quad * 16
        at_once = 8

        def some(block: Reg, carry):
            m, total, out = carry
            blocks = [(block + i).minimum(last - 1) for i in range(at_once)]
            slots = [b + index for b in blocks]
            parts = [lanes.load(at(sums, lanes.wide_product(s * p.group + head, 8)), 2) for s in slots]
            words = [lanes.load(at(outputs, lanes.wide_product(s, p.group * p.dim * 4), place), 4) for s in slots]
            new = lanes.reduce(Reg.maximum, [m, *(part[0].as_float() for part in parts)])
            shrink = lanes.exp2(m - new)
            total, out = total * shrink, [o * shrink for o in out]
            for i, (part, word) in enumerate(zip(parts, words, strict=True)):
                counts = block + i < last
                weight = counts.where(lanes.exp2(part[0].as_float() - new), f32(0.0))
                total = total + part[1].as_float() * weight
                out = [o + w.as_float() * weight for o, w in zip(out, word, strict=True)]
            return new, total, out

        m, total, out = lanes.loop(first, last, at_once, (f32(split_k.EMPTY), f32(0.0), [f32(0.0)] * 4), some)
        full = total > 0.0
        inverse = f32(1.0) / full.where(total, f32(1.0))
        out = [o * inverse for o in out]
        if p.output == "f32":
            lanes.store(at(joined, lanes.wide_product(row, p.group * p.dim * 4), place), out)
        else:
            pairs = [lanes.pack_pair(a, b, p.output) for a, b in (out[:2], out[2:])]
            lanes.store(at(joined, lanes.wide_product(row, p.group * p.dim * 2), place >> 1), pairs)
        with lanes.do_when((quad % quads).equals(0)):
            value = (m + lanes.log2(full.where(total, f32(1.0)))) * (1 / _LOG2_E)
            value = full.where(value, f32(split_k.EMPTY))
            lanes.store(at(lse, (row * p.group + head) << 2), [value])

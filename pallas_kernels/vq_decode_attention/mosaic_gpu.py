"""Attention over coded keys and values as Mosaic GPU kernels, written lane by lane, for Hopper.

Two kernels: one reads the codes and leaves partial results, the other joins those of each row.

*The table.* A block keeps the centroids of one head's keys and values in shared memory, in as many copies as there is
room for, entry by entry; with 8-bit codes the copies fill the 128 bytes that a warp reads at once, so that no two
lanes ever wait for one bank. Shared memory is what binds: every looked-up byte passes through it once, and none twice,
because looked-up words go to the tensor cores as they are.

*Scores*, a warp and 8 tokens at a time, by `mma` 16 x 16 x 8. The order in which a product is summed is free, and so is
which rows stand for what: row r is one half of token r's elements (0, 1 of every 4), row r + 8 the other half (2, 3),
so that a lane's four words of A are four consecutive looked-up words, 8 elements of one token's key. Columns 2h and
2h + 1 are head h's query at those halves. C[r, 2h] + C[r + 8, 2h + 1] is the score, and lane (r, h) holds both.

*Output* = V^T P likewise: rows r and r + 8 are two words (pairs of elements) of V, the summed index is (token, element
of the pair), and B[(t, e), (h, e')] is p[t, h] where e = e' and 0 elsewhere. A's words are again looked-up words.

*Softmax*: the running maximum moves only when a score exceeds it by 2^8, which is rare; all lanes vote on it.

*Work*: the tiles of all rows, head by head, form one list by actual lengths; block i takes the i-th of `blocks` equal
shares, whatever rows those belong to, and writes one partial result a row that it touches. Exact tokens (a residual
window) are read by the block that has the row's last tile, before it needs the tables: they cost no pass of their own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import dispatch, packing, split_k
from pallas_kernels.mosaic_gpu import butterfly, lanes
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, f32, u32
from pallas_kernels.vq_decode_attention.exact import ExactTokens

_HEAD_DIMS = (64, 128)
_SUB_VECTORS = (2, 4, 8)
_CODE_BITS = (8, 10, 12)
_MOST_HEADS = 16
_FP8 = jnp.dtype(jnp.float8_e4m3fn)
# Shared memory that a block may have on an H100 or H200, less what Mosaic takes.
_SHARED_BYTES = 226 * 1024
_LINE = 128  # bytes of shared memory that are read at once
_PAIRED = 2 * _LINE  # from entry to entry of two 8-bit tables side by side
_WARP, _WARPS = 32, 4  # lanes a warp, warps a warpgroup
_WARPGROUPS, _FEW_WARPGROUPS = 4, 2  # of a block
_BLOCK = 8  # tokens of one tensor core operation
_HEADS = 4  # query heads of one tensor core operation
_SLACK = 8.0  # how far, in powers of two, a score may exceed the running maximum
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is shaped."""

    groups: int  # of 8 tokens: what a warp handles at a time
    warpgroups: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Format:
    """Codes of a head: sub-vectors of `length` elements, `bits` a code, centroids of "bf16", "f16" or "fp8"."""

    dim: int
    length: int
    bits: int
    element: str

    @property
    def entries(self) -> int:
        return 2**self.bits

    @property
    def pitch(self) -> int:
        """Bytes of a token's codes."""
        return packing.num_bytes(self.dim // self.length, self.bits)

    @property
    def size(self) -> int:
        """Bytes of a centroid."""
        return self.length * (1 if self.element == "fp8" else 2)

    @property
    def operand(self) -> str:
        """What the tensor cores multiply."""
        return "f16" if self.element == "fp8" else self.element


@dataclasses.dataclass(frozen=True)
class Table:
    """Where a format's centroids lie in shared memory: entry e's copies fill `run` bytes from offset + e * stride."""

    format: Format
    offset: int
    stride: int
    run: int


@dataclasses.dataclass(frozen=True)
class Exact:
    """Tokens held as they are, of elements that the tensor cores multiply."""

    tokens: int
    operand: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static."""

    key: Table
    value: Table
    batch: int
    kv_heads: int
    group: int
    tokens: int
    shared_books: tuple[bool, bool]
    queries: str
    query_scale: bool
    query_hadamard: bool
    exact: tuple["Exact", ...]
    scale: float
    output: str  # "f32", or as `Exact.operand`
    config: Config

    @property
    def dim(self) -> int:
        return self.key.format.dim

    @property
    def tile(self) -> int:
        return _BLOCK * self.config.groups

    @property
    def warps(self) -> int:
        return _WARPS * self.config.warpgroups

    @property
    def threads(self) -> int:
        return _WARP * self.warps

    @property
    def head_blocks(self) -> int:
        return -(-self.group // _HEADS)

    @property
    def tables_bytes(self) -> int:
        ends = (t.offset + (t.format.entries - 1) * t.stride + t.run for t in (self.key, self.value))
        return -(-max(ends) // 16) * 16

    @property
    def shared_bytes(self) -> int:
        return self.tables_bytes + _merge_bytes(self.dim, self.group, self.config) + Schedule.shared_bytes(self.batch)

    @property
    def slots(self) -> int:
        """Partial results: block and row only ever grow, so their sum names a pair."""
        return self.config.blocks + self.batch * self.kv_heads


def vq_decode_attention(
    q: Float[Array, "B Hq D"],
    key_codes: UInt8[Array, "B Hkv S kbytes"],
    value_codes: UInt8[Array, "B Hkv S vbytes"],
    key_codebook: Float[Array, "Hk Kk dk"],
    value_codebook: Float[Array, "Hv Kv dv"],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    query_scale: Float[Array, "Hkv D"] | None = None,
    query_hadamard: bool = False,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    num_splits: int | None = None,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.vq_decode_attention` for 16-bit queries, D 64 or 128, codes of 8, 10 or 12 bits, groups to 16."""
    batch, query_heads, dim = q.shape
    kv_heads, tokens = key_codes.shape[1:3]
    rows, group = batch * kv_heads, query_heads // max(1, kv_heads)
    if interpret:
        raise NotImplementedError("vq_decode_attention: mosaic_gpu has no interpret mode")
    formats = [_format(q, codebook) for codebook in (key_codebook, value_codebook)]
    exact = [tokens for tokens in exact if tokens.keys.shape[2]]
    _check_supported(q, group, scale, formats)
    operands = [_exact_operand(tokens) for tokens in exact]
    output_kind = {"float32": "f32"}.get(jnp.dtype(out_dtype).name, _operand(out_dtype))
    if output_kind not in ("f32", "bf16", "f16"):
        raise NotImplementedError(f"vq_decode_attention: the mosaic_gpu kernel does not write {out_dtype}")
    if rows * group == 0 or (tokens == 0 and not exact):
        return jnp.zeros(q.shape, out_dtype), jnp.full((batch, query_heads), split_k.EMPTY)

    config = config or choose_config(rows, tokens, group, formats, num_splits)
    tile = _BLOCK * config.groups
    if tokens < tile:  # and where there are no codes at all
        room = ((0, 0), (0, 0), (0, tile - tokens), (0, 0))
        key_codes, value_codes, lengths = jnp.pad(key_codes, room), jnp.pad(value_codes, room), lengths.clip(0, tokens)
        tokens = tile
    key, value = _tables(formats, group, batch, config)
    problem = Problem(
        key=key,
        value=value,
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        tokens=tokens,
        shared_books=(key_codebook.shape[0] == 1, value_codebook.shape[0] == 1),
        queries=_operand(q.dtype),
        query_scale=query_scale is not None,
        query_hadamard=query_hadamard,
        exact=tuple(Exact(t.keys.shape[2], operand) for t, operand in zip(exact, operands, strict=True)),
        scale=abs(scale) * _LOG2_E,
        output=output_kind,
        config=config,
    )
    if problem.shared_bytes > _SHARED_BYTES:
        raise NotImplementedError(f"vq_decode_attention: {batch} rows leave no shared memory to the mosaic_gpu kernel")
    if rows * -(-tokens // tile) * config.blocks >= 2**32 or tokens * max(f.pitch for f in formats) >= 2**32:
        raise NotImplementedError(f"vq_decode_attention: the mosaic_gpu kernel cannot address codes {key_codes.shape}")
    books = [_words(book, form) for book, form in zip((key_codebook, value_codebook), formats, strict=True)]
    codes = [codes.reshape(rows, tokens, -1) for codes in (key_codes, value_codes)]
    # Queries that the kernel transforms stay in their own dtype until it has: an fp8 table's is float16.
    given = _operand(q.dtype) if query_scale is not None or query_hadamard else formats[0].operand
    arrays = [_queries(q, scale, kv_heads, given), *books, *codes, lengths]
    if query_scale is not None:
        arrays.append(query_scale.astype(jnp.float32))
    for each, operand in zip(exact, operands, strict=True):
        assert exact_q is not None
        held = [array.reshape(rows, -1, dim) for array in (each.keys, each.values)]
        arrays += [_queries(exact_q, scale, kv_heads, operand), *held, each.valid.astype(jnp.int32)]
    output, lse = _join(problem, *_partials(problem, *arrays), lengths)
    return output.reshape(batch, query_heads, dim), lse.reshape(batch, query_heads)


def choose_config(rows: int, tokens: int, group: int, formats: Sequence[Format], num_splits: int | None) -> Config:
    """Tiles of about 2 KiB of codes a warp keep enough of them on their way. Blocks that divide rows evenly save a
    merge, but where they would leave a tenth of the device idle, or each takes long over its look-ups, every
    multiprocessor takes its share of the list."""
    head_blocks = -(-group // _HEADS)
    waits = any(form.bits > 10 for form in formats)  # for banks
    bytes_of_block = _BLOCK * sum(form.pitch for form in formats)
    groups = 4 if bytes_of_block <= 512 or (waits and head_blocks == 1) else 2
    # Fewer warps where many registers a lane, or waiting, is what limits them.
    warpgroups = _FEW_WARPGROUPS if head_blocks > 2 or waits else _WARPGROUPS
    most = dispatch.multiprocessors()
    even = rows * (num_splits or most // rows)
    blocks = even if num_splits or (even >= 0.9 * most and not waits) else most
    return Config(groups, warpgroups, max(1, min(blocks, rows * -(-tokens // (_BLOCK * groups)))))


def _format(q: Array, codebook: Array) -> Format:
    _, entries, length = codebook.shape
    sixteen = "f16" if q.dtype == jnp.float16 else "bf16"
    return Format(q.shape[-1], length, entries.bit_length() - 1, "fp8" if codebook.dtype == _FP8 else sixteen)


def _check_supported(q: Array, group: int, scale: float, formats: Sequence[Format]) -> None:
    for form in formats:
        served = form.dim in _HEAD_DIMS and form.length in _SUB_VECTORS and form.bits in _CODE_BITS
        served &= form.pitch % 4 == 0 and form.size >= 4
        if not served or group > _MOST_HEADS or jnp.dtype(q.dtype).itemsize != 2 or scale == 0:
            raise NotImplementedError(
                f"vq_decode_attention: the mosaic_gpu kernel serves 16-bit queries, D in {_HEAD_DIMS}, d in "
                f"{_SUB_VECTORS}, {_CODE_BITS} bits, codes of whole 32-bit words a token, centroids of 4 bytes or more "
                f"and up to {_MOST_HEADS} query heads a KV head, not {q.dtype}, D={form.dim}, "
                f"d{form.length}b{form.bits}, {group} heads"
            )


def _operand(dtype: Any) -> str:
    return {"bfloat16": "bf16", "float16": "f16"}.get(jnp.dtype(dtype).name, str(dtype))


def _exact_operand(tokens: ExactTokens) -> str:
    operands = {_operand(array.dtype) for array in (tokens.keys, tokens.values)}
    if operands not in ({"bf16"}, {"f16"}):
        raise NotImplementedError(
            "vq_decode_attention: the mosaic_gpu kernel reads exact keys and values of one 16-bit type, not "
            f"{tokens.keys.dtype} and {tokens.values.dtype}"
        )
    return operands.pop()


def _queries(q: Float[Array, "B Hq D"], scale: float, kv_heads: int, operand: str) -> Array:
    """[B Hkv, G, D]; a negative scale turns them round."""
    grouped = (q if scale > 0 else -q).reshape(q.shape[0] * kv_heads, -1, q.shape[-1])
    return grouped.astype(_dtype(operand))


def _dtype(operand: str) -> Any:
    return {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}[operand]


def _words(codebook: Array, form: Format) -> Array:
    """A codebook as it lies in memory, four bytes at a time."""
    stored = codebook if form.element == "fp8" else codebook.astype(_dtype(form.element))
    flat = stored.reshape(stored.shape[0], form.entries * form.size // 4, -1)
    return lax.bitcast_convert_type(flat, jnp.uint32)


def _tables(formats: Sequence[Format], group: int, batch: int, config: Config) -> tuple[Table, Table]:
    """Both tables with as many copies of the entries as fit: of 8-bit codes, all that a line holds."""
    key, value = formats
    if key.bits == value.bits == 8:
        return Table(key, 0, _PAIRED, _LINE), Table(value, _LINE, _PAIRED, _LINE)
    room = _SHARED_BYTES - _merge_bytes(key.dim, group, config) - Schedule.shared_bytes(batch)
    runs = [_LINE, _LINE]
    while sum(form.entries * run for form, run in zip(formats, runs, strict=True)) > room:
        # Entries are stored 16 bytes at a time.
        sizes = [form.entries * run if run > 16 else 0 for form, run in zip(formats, runs, strict=True)]
        if not any(sizes):
            raise NotImplementedError("vq_decode_attention: these codebooks do not fit into shared memory")
        runs[sizes.index(max(sizes))] //= 2
    return Table(key, 0, runs[0], runs[0]), Table(value, key.entries * runs[0], runs[1], runs[1])


def _merge_bytes(dim: int, group: int, config: Config) -> int:
    heads = -(-group // _HEADS) * _HEADS
    return _WARPS * config.warpgroups * heads * 4 * (dim + 2)


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
        name="vq_decode_attention",
    )


def _join(problem: Problem, *arrays: Array) -> list[Array]:
    """The partial results of each row, merged -> output [R, G, D], natural-log log-sum-exp [R, G]."""
    p, shape = problem, jax.ShapeDtypeStruct
    rows = p.batch * p.kv_heads
    return lanes.launch(
        functools.partial(_join_row, p),
        arrays,
        [shape((rows, p.group, p.dim), _dtype(p.output)), shape((rows, p.group), jnp.float32)],
        blocks=rows,
        warpgroups=-(-p.group * p.dim // 4 // (_WARP * _WARPS)),
        shared_bytes=Schedule.shared_bytes(p.batch),
        name="vq_decode_attention_join",
    )


# -- whose tiles are whose


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


def _attend_block(p: Problem, q, key_book, value_book, key_codes, value_codes, lengths, *rest: Any) -> None:
    """Block `block` attends to its share of the tiles, row after row."""
    *exact, outputs, sums, tables, block = rest
    query_scale = exact.pop(0) if p.query_scale else None
    merge = at(tables, p.tables_bytes)
    schedule = Schedule(p, lengths, at(merge, _merge_bytes(p.dim, p.group, p.config)))
    first, last = schedule.share(block), schedule.share(block + 1)

    def visit(index: Reg, filled: Reg) -> Reg:
        head, batch = index // p.batch, index % p.batch
        start, end = schedule.span(head, batch)
        low, high = first.maximum(start), last.minimum(end)
        row = batch * p.kv_heads + head

        def attend(filled: Reg) -> Reg:
            def fill() -> None:
                with lanes.do_when(head.differs(filled)):
                    _fill(p, p.key, tables, key_book, head, p.shared_books[0])
                    _fill(p, p.value, tables, value_book, head, p.shared_books[1])
                lanes.barrier()  # the tables are there, and the queries have been read

            def before(state: list) -> list:
                for i, source in enumerate(p.exact):
                    see = functools.partial(_attend_exactly, p, source, exact[4 * i : 4 * i + 4], row, batch)
                    state = lanes.when(high.equals(end), state, see)
                return state

            def queries() -> Pointer:
                if query_scale is None and not p.query_hadamard:
                    return _queries_of(p, q, row)
                return _transform_queries(p, _queries_of(p, q, row), query_scale, head, merge)

            memory = queries, key_codes, value_codes, tables
            length = schedule.length(batch)
            high_coded = (high - start).minimum(schedule.coded_tiles(batch))
            state = _attend(p, *memory, row, low - start, high_coded, length, before, fill)
            _merge(p, state, merge, outputs, sums, block + index)
            lanes.barrier()  # the merge has been read
            return head

        return lanes.when(low < high, filled, attend)

    with lanes.do_when(first < last):
        lanes.loop(schedule.row_of(first), schedule.row_of(last - 1) + 1, 1, u32(p.kv_heads), visit)


def _fill(p: Problem, table: Table, shared: Pointer, codebook: Pointer, head: Reg, shared_book: bool) -> None:
    """The copies of every entry, 16 bytes a thread at a time."""
    form, thread = table.format, lanes.thread()
    book = codebook if shared_book else at(codebook, lanes.wide_product(head, form.entries * form.size))
    words = min(form.size, 16) // 4
    chunks = form.entries * table.run // 16
    for i in range(-(-chunks // p.threads)):
        chunk = (thread + i * p.threads).minimum(chunks - 1)  # the last ones may be stored twice
        each = table.run // 16
        entry, copy = chunk // each, chunk % each
        centroid = lanes.load(at(book, entry * form.size), words)
        lanes.store(at(shared, table.offset, entry * table.stride + copy * 16), centroid * (4 // words))


# -- codes and what they stand for


class LaneCodes:
    """Some consecutive codes of a token, those of position `position` of `positions`, and how a lane gets at them."""

    def __init__(self, table: Table, shared: Pointer, position: Reg, positions: int, lane: Reg):
        form = self.form = table.format
        self.table, self.shared = table, shared
        self.count = form.dim // form.length // positions
        span = self.count * form.bits
        starts = [i * span for i in range(positions)]
        self.words = max(-(-(start % 32 + span) // 32) for start in starts)
        self.outputs = -(-span // 32)
        last_word = form.pitch // 4 - self.words
        self.overlaps = any(start // 32 > last_word for start in starts)
        self.shifted = any(start % 32 for start in starts)
        start = position * span
        word = (start >> 5).minimum(last_word)
        self.word_offset = word << 2
        self.shift = start - (word << 5)
        self.aligned = math.gcd(16, form.pitch, *(start // 32 * 4 for start in starts)) if not self.overlaps else 4
        copies = table.run // form.size
        self.slot = (lane & (copies - 1)) * form.size
        self.paired = table.stride == _PAIRED

    def load(self, pointer: Pointer, offset: int) -> list[Reg]:
        """The words that hold this lane's codes, of the token at pointer + offset."""
        at_once = next(n for n in (4, 2, 1) if 4 * n <= self.aligned and self.words % n == 0)
        parts = (lanes.load_stream(pointer, offset + 4 * i, at_once) for i in range(0, self.words, at_once))
        return [word for part in parts for word in part]

    def _straight(self, words: list[Reg]) -> list[Reg]:
        """The words shifted so that the first code begins at bit 0."""
        if not self.shifted:
            return words
        words, shift = [*words, u32(0)], self.shift
        if self.overlaps:  # the shift may pass a word
            far = u32(31) < shift
            words = [far.where(high, low) for low, high in zip(words, [*words[1:], u32(0)], strict=True)]
        return [lanes.funnel_right(words[i], words[i + 1], shift & 31) for i in range(self.outputs)]

    def centroids(self, words: list[Reg]) -> list[Reg]:
        """Pairs of 16-bit elements, one after the other: what the lane's codes stand for."""
        words = self._straight(words)
        out = []
        for i in range(self.count):
            entry = lanes.load(at(self.shared, self._address(words, i), self.table.offset), self.form.size // 4)
            out += [w for word in entry for w in lanes.widen_fp8(word)] if self.form.element == "fp8" else entry
        return out

    def _address(self, words: list[Reg], i: int) -> Reg:
        """Of code i's entry, in the copy that this lane reads."""
        word, bit = divmod(i * self.form.bits, 32)
        if self.paired:  # byte 1 of the address is the code, byte 0 the slot
            return lanes.bytes_of(words[word], self.slot, 0x7604 | (bit // 8) << 4)
        scale = self.table.stride.bit_length() - 1
        if bit + self.form.bits > 32:
            placed = lanes.funnel_right(words[word], words[word + 1], bit - scale)
        else:
            placed = words[word] >> (bit - scale) if bit >= scale else words[word] << (scale - bit)
        return (placed & ((self.form.entries - 1) << scale)) | self.slot


def _attend(
    p: Problem,
    queries_of: Callable[[], Pointer],
    key_codes,
    value_codes,
    tables,
    row: Reg,
    low: Reg,
    high: Reg,
    length: Reg,
    before: Callable,
    fill: Callable,
) -> list:
    """One warp's tiles of a row's tiles low .. high - 1 -> for every four heads: maximum, sum, outputs.

    state = before(state) and fill() are run when the first codes are on their way, before any is looked up.
    """
    lane, warp = lanes.thread() & (_WARP - 1), lanes.warp()
    r, j, odd = lane >> 2, lane & 3, (lane >> 2) & 1
    keys = LaneCodes(p.key, tables, j, 4, lane)
    values = LaneCodes(p.value, tables, r, 8, lane)
    # Row r of a score tile is token r / 2 + 4 (r % 2): then a warp's load of values' codes is contiguous, and after
    # the transposition of p a lane holds the weights of tokens j and j + 4.
    own = (r >> 1) + (odd << 2)
    key_row = at(key_codes, lanes.wide_product(row, p.tokens * keys.form.pitch))
    value_row = at(value_codes, lanes.wide_product(row, p.tokens * values.form.pitch))
    key_row = at(key_row, own * keys.form.pitch + keys.word_offset)
    value_row = at(value_row, j * values.form.pitch + values.word_offset)

    def start_of(tile: Reg) -> Reg:
        start = tile * p.tile
        return start if p.tokens % p.tile == 0 else start.minimum(p.tokens - p.tile)

    def codes_of(tile: Reg) -> list:
        start = start_of(tile.minimum(high.maximum(1) - 1))
        key_at, value_at = at(key_row, start * keys.form.pitch), at(value_row, start * values.form.pitch)
        return [
            (
                keys.load(key_at, g * _BLOCK * keys.form.pitch),
                [values.load(value_at, (g * _BLOCK + t) * values.form.pitch) for t in (0, 4)],
            )
            for g in range(p.config.groups)
        ]

    first = low + warp
    codes = codes_of(first)  # on their way while the tables are filled
    of_row = queries_of()
    queries = [_load_queries(p, of_row, block, r, j) for block in range(p.head_blocks)]
    state = before(_empty(p))
    fill()
    selectors = _selectors(r)

    def visit(tile: Reg, carry):
        state, codes = carry
        following = codes_of(tile + p.warps)
        scores = [_scores(keys, key_words, queries) for key_words, _ in codes]
        start = tile * p.tile
        scores = lanes.when(length < start + p.tile, scores, functools.partial(mask, start, start_of(tile)))
        state = _make_room(p, scores, state)
        for of_group, (_, value_words) in zip(scores, codes, strict=True):
            near, far = (values.centroids(words) for words in value_words)
            state = _accumulate(p, values.form.operand, near, far, of_group, state, selectors)
        return state, following

    def mask(start: Reg, read_from: Reg, scores: list) -> list:
        """Without the tokens past the length, and those before the tile where the last one had to begin early."""
        out = []
        for g, of_group in enumerate(scores):
            token = read_from + own + g * _BLOCK
            counts = (token < length) & (start <= token)
            out.append([counts.where(s, f32(split_k.EMPTY)) for s in of_group])
        return out

    return lanes.loop(first, high, p.warps, (state, codes), visit)[0]


def _attend_exactly(p: Problem, source: Exact, arrays: Sequence[Pointer], row: Reg, batch: Reg, state: list) -> list:
    """One warp's share of a row's exact tokens, eight at a time, after what `state` has seen."""
    q, keys, values, valid = arrays
    lane = lanes.thread() & (_WARP - 1)
    r, j = lane >> 2, lane & 3
    own = (r >> 1) + ((r & 1) << 2)
    queries = [_load_queries(p, _queries_of(p, q, row), block, r, j) for block in range(p.head_blocks)]
    key_row, value_row = (at(x, lanes.wide_product(row, source.tokens * p.dim * 2)) for x in (keys, values))
    valid_row = at(valid, lanes.wide_product(batch, source.tokens * 4))
    last = source.tokens - 1

    def visit(group: Reg, state: list) -> list:
        first = group * _BLOCK
        token = (first + own).minimum(last)
        counts = (first + own < source.tokens) & lanes.load(at(valid_row, token << 2), 1)[0].differs(0)

        def see(state: list) -> list:
            key = _row_words(at(key_row, token * (p.dim * 2), j * (p.dim // 2)), p.dim // 8)
            near, far = (
                _row_words(at(value_row, (first + j + t).minimum(last) * (p.dim * 2), r * (p.dim // 4)), p.dim // 16)
                for t in (0, 4)
            )
            scores = [counts.where(s, f32(split_k.EMPTY)) for s in _products(key, queries, source.operand)]
            state = _make_room(p, [scores], state)
            return _accumulate(p, source.operand, near, far, scores, state, _selectors(r))

        return lanes.when(lanes.any_lane(counts), state, see)

    return lanes.loop(lanes.warp(), u32(-(-source.tokens // _BLOCK)), p.warps, state, visit)


def _row_words(pointer: Pointer, count: int) -> list[Reg]:
    return [word for i in range(0, count, 4) for word in lanes.load(at(pointer, 4 * i), 4)]


def _empty(p: Problem) -> list:
    """Nothing seen."""
    parts = p.dim // 32
    return [(f32(split_k.EMPTY), f32(0.0), [[f32(0.0)] * 4 for _ in range(parts)]) for _ in range(p.head_blocks)]


def _selectors(r: Reg) -> list[Reg]:
    """For `_accumulate`: where B has a weight and where a 0."""
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
                factors = lanes.load(at(of_head, (pair % pairs) << 3), 2)
                values = [v * f.as_float() for v, f in zip(values, factors, strict=True)]
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
            low, high = values
            if p.queries != p.key.format.operand:  # rounded to the queries' dtype first, as ever
                low, high = lanes.widen(lanes.pack_pair(low, high, p.queries), p.queries)
            lanes.store(at(out, pair << 2), [lanes.pack_pair(low, high, p.key.format.operand)])
    lanes.barrier()
    return out


def _load_queries(p: Problem, q: Pointer, block: int, r: Reg, j: Reg) -> list[tuple[Reg, Reg]]:
    """B of each step of the scores: column r is half r % 2 of every 4 elements of head r / 2."""
    head = (r >> 1) + _HEADS * block
    exists = head < p.group
    mine = at(q, exists.where(head, u32(0)) * (p.dim * 2) + j * (p.dim // 2) + (r & 1) * 4)
    words = [exists.where(lanes.load(at(mine, 8 * i), 1)[0], u32(0)) for i in range(p.dim // 16)]
    return list(zip(words[::2], words[1::2], strict=True))


def _scores(keys: LaneCodes, words: list[Reg], queries: list) -> list[Reg]:
    return _products(keys.centroids(words), queries, keys.form.operand)


def _products(key: list[Reg], queries: list, operand: str) -> list[Reg]:
    """q . k of 8 tokens: in lane (r, j) of row r with head j of each four heads."""
    sums = [[f32(0.0)] * 4 for _ in queries]
    for step in range(len(key) // 4):
        a = key[4 * step : 4 * step + 4]
        sums = [lanes.mma(c, a, b[step], operand) for c, b in zip(sums, queries, strict=True)]
    return [c[0] + c[3] for c in sums]


def _make_room(p: Problem, scores: list[list[Reg]], state: list) -> list:
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


def _accumulate(
    p: Problem, operand: str, near: list[Reg], far: list[Reg], scores: list[Reg], state: list, selectors: list[Reg]
) -> list:
    """The state with 8 more tokens: their weights, and V^T p.

    near, far: this lane's words of the values of tokens j and j + 4. Outputs: in lane (r, j) elements r D / 8 .. of
    head j of each four heads, four a part.
    """
    out = []
    for score, (m, total, parts) in zip(scores, state, strict=True):
        weight = lanes.exp2(lanes.multiply_add(score, p.scale, f32(0.0) - m))
        pair = lanes.transpose_8x8(lanes.pack_pair(weight, weight, operand))
        b = [lanes.bytes_of(pair, u32(0), selector) for selector in selectors]
        parts = [
            lanes.mma(part, [*near[2 * i : 2 * i + 2], *far[2 * i : 2 * i + 2]], b, operand)
            for i, part in enumerate(parts)
        ]
        out.append((m, total + weight, parts))
    return out


# -- joining


def _merge(p: Problem, state: list, merge: Pointer, outputs: Pointer, sums: Pointer, slot: Reg) -> None:
    """The block's warps join through shared memory; one partial result is written."""
    thread, warp = lanes.thread(), lanes.warp()
    r, j = (thread & (_WARP - 1)) >> 2, thread & 3
    heads = p.head_blocks * _HEADS
    row_bytes = p.dim * 4
    sums_at = at(merge, p.warps * heads * row_bytes)
    for block, (m, total, parts) in enumerate(state):
        for distance in (4, 8, 16):
            total = total + lanes.exchange(total, distance)
        row = warp * heads + block * _HEADS + j
        for i, part in enumerate(parts):
            lanes.store(at(merge, row * row_bytes + r * (row_bytes // 8) + i * 16), part)
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

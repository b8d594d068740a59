"""`vq_decode_attention` in Mosaic GPU: `pallas_kernels.mosaic_gpu.decode_attention` over codes.

A block keeps the centroids of one head's keys and values in shared memory, in as many copies as there is room for,
entry by entry; with 8-bit codes the copies fill the 128 bytes that a warp reads at once, so that no two lanes ever
wait for one bank. Shared memory is what binds: every looked-up byte passes through it once, and none twice, because
looked-up words go to the tensor cores as they are.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import dispatch, packing, split_k
from pallas_kernels.exact import ExactTokens
from pallas_kernels.mosaic_gpu import decode_attention, lanes
from pallas_kernels.mosaic_gpu.decode_attention import BLOCK, HEAD_DIMS, HEADS, MOST_HEADS, Config
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, u32

_SUB_VECTORS = (2, 4, 8)
_CODE_BITS = (8, 10, 12)
_FP8 = jnp.dtype(jnp.float8_e4m3fn)
_LINE = 128  # bytes of shared memory that are read at once
_PAIRED = 2 * _LINE  # from entry to entry of two 8-bit tables side by side
_WARPGROUPS, _FEW_WARPGROUPS = 4, 2  # of a block


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
    """A format's centroids in shared memory: entry e's copies fill `run` bytes from offset + e * stride."""

    format: Format
    offset: int
    stride: int
    run: int
    one_book: bool  # for all heads

    extras = 1  # the codebooks

    @property
    def operand(self) -> str:
        return self.format.operand

    @property
    def pitch(self) -> int:
        return self.format.pitch

    @property
    def shared_end(self) -> int:
        return self.offset + (self.format.entries - 1) * self.stride + self.run

    def fill(self, shared: Pointer, threads: int, head: Reg, codebook: Pointer, *_: Pointer) -> None:
        """The copies of every entry, 16 bytes a thread at a time."""
        form, thread = self.format, lanes.thread()
        book = codebook if self.one_book else at(codebook, lanes.wide_product(head, form.entries * form.size))
        words = min(form.size, 16) // 4
        chunks = form.entries * self.run // 16
        for i in range(-(-chunks // threads)):
            chunk = (thread + i * threads).minimum(chunks - 1)  # the last ones may be stored twice
            each = self.run // 16
            entry, copy = chunk // each, chunk % each
            centroid = lanes.load(at(book, entry * form.size), words)
            lanes.store(at(shared, self.offset, entry * self.stride + copy * 16), centroid * (4 // words))

    def reader(self, shared: Pointer, part: Reg, parts: int, lane: Reg) -> "LaneCodes":
        return LaneCodes(self, shared, part, parts, lane)


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
    query_map: Float[Array, "Hkv D D"] | None = None,
    exact: Sequence[ExactTokens] = (),
    exact_q: Float[Array, "B Hq D"] | None = None,
    num_splits: int | None = None,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.vq_decode_attention` for 16-bit queries, D 64 or 128, codes of 8, 10 or 12 bits, groups to 16."""
    batch, query_heads, _ = q.shape
    kv_heads, tokens = key_codes.shape[1:3]
    rows, group = batch * kv_heads, query_heads // max(1, kv_heads)
    if interpret:
        raise NotImplementedError("vq_decode_attention: mosaic_gpu has no interpret mode")
    formats = [_format(q, codebook) for codebook in (key_codebook, value_codebook)]
    exact = [tokens for tokens in exact if tokens.keys.shape[2]]
    _check_supported(q, group, scale, formats)
    if rows * group == 0 or (tokens == 0 and not exact):
        return jnp.zeros(q.shape, out_dtype), jnp.full((batch, query_heads), split_k.EMPTY)
    config = config or choose_config(rows, tokens, group, formats, num_splits)
    books = key_codebook, value_codebook
    sources = _tables(formats, [book.shape[0] == 1 for book in books], group, batch, config)
    words = [words_of(book, form) for book, form in zip(books, formats, strict=True)]
    return decode_attention.attend(
        "vq_decode_attention",
        q,
        (sources[0], key_codes, words[:1]),
        (sources[1], value_codes, words[1:]),
        lengths,
        scale=scale,
        config=config,
        query_scale=query_scale,
        query_hadamard=query_hadamard,
        query_map=query_map,
        exact=exact,
        exact_q=exact_q,
        out_dtype=out_dtype,
    )


def choose_config(rows: int, tokens: int, group: int, formats: Sequence[Format], num_splits: int | None) -> Config:
    """Tiles of about 2 KiB of codes a warp keep enough of them on their way. Blocks that divide rows evenly save a
    merge, but where they would leave a tenth of the device idle, or each takes long over its look-ups, every
    multiprocessor takes its share of the list."""
    head_blocks = -(-group // HEADS)
    waits = any(form.bits > 10 for form in formats)  # for banks
    bytes_of_block = BLOCK * sum(form.pitch for form in formats)
    groups = 4 if bytes_of_block <= 512 or (waits and head_blocks == 1) else 2
    # Fewer warps where many registers a lane, or waiting, is what limits them.
    warpgroups = _FEW_WARPGROUPS if head_blocks > 2 or waits else _WARPGROUPS
    most = dispatch.multiprocessors()
    even = rows * (num_splits or most // rows)
    blocks = even if num_splits or (even >= 0.9 * most and not waits) else most
    return Config(groups, warpgroups, max(1, min(blocks, rows * -(-tokens // (BLOCK * groups)))))


def _format(q: Array, codebook: Array) -> Format:
    _, entries, length = codebook.shape
    sixteen = "f16" if q.dtype == jnp.float16 else "bf16"
    return Format(q.shape[-1], length, entries.bit_length() - 1, "fp8" if codebook.dtype == _FP8 else sixteen)


def _check_supported(q: Array, group: int, scale: float, formats: Sequence[Format]) -> None:
    for form in formats:
        served = form.dim in HEAD_DIMS and form.length in _SUB_VECTORS and form.bits in _CODE_BITS
        served &= form.pitch % 4 == 0 and form.size >= 4
        if not served or group > MOST_HEADS or jnp.dtype(q.dtype).itemsize != 2 or scale == 0:
            raise NotImplementedError(
                f"vq_decode_attention: the mosaic_gpu kernel serves 16-bit queries, D in {HEAD_DIMS}, d in "
                f"{_SUB_VECTORS}, {_CODE_BITS} bits, codes of whole 32-bit words a token, centroids of 4 bytes or more "
                f"and up to {MOST_HEADS} query heads a KV head, not {q.dtype}, D={form.dim}, "
                f"d{form.length}b{form.bits}, {group} heads"
            )


def words_of(codebook: Array, form: Format) -> Array:
    """A codebook as it lies in memory, four bytes at a time."""
    stored = codebook if form.element == "fp8" else codebook.astype(decode_attention.dtype_of(form.element))
    flat = stored.reshape(stored.shape[0], form.entries * form.size // 4, -1)
    return lax.bitcast_convert_type(flat, jnp.uint32)


def _tables(
    formats: Sequence[Format], one_book: Sequence[bool], group: int, batch: int, config: Config
) -> tuple[Table, Table]:
    """Both tables with as many copies of the entries as fit: of 8-bit codes, all that a line holds."""
    key, value = formats
    if key.bits == value.bits == 8:
        return side_by_side(key, value, one_book)
    room = decode_attention.room(key.dim, group, batch, config)
    runs = [_LINE, _LINE]
    while sum(form.entries * run for form, run in zip(formats, runs, strict=True)) > room:
        # Entries are stored 16 bytes at a time.
        sizes = [form.entries * run if run > 16 else 0 for form, run in zip(formats, runs, strict=True)]
        if not any(sizes):
            raise NotImplementedError("vq_decode_attention: these codebooks do not fit into shared memory")
        runs[sizes.index(max(sizes))] //= 2
    return (
        Table(key, 0, runs[0], runs[0], one_book[0]),
        Table(value, key.entries * runs[0], runs[1], runs[1], one_book[1]),
    )


def side_by_side(key: Format, value: Format, one_book: Sequence[bool]) -> tuple[Table, Table]:
    """Tables of up to 8 bits, their entries copied over all that is read at once."""
    if key.bits == value.bits == 8:
        return Table(key, 0, _PAIRED, _LINE, one_book[0]), Table(value, _LINE, _PAIRED, _LINE, one_book[1])
    return Table(key, 0, _LINE, _LINE, one_book[0]), Table(value, key.entries * _LINE, _LINE, _LINE, one_book[1])


class LaneCodes:
    """Some consecutive codes of a token, those of part `part` of `parts`, and how a lane gets at them."""

    def __init__(self, table: Table, shared: Pointer, part: Reg, parts: int, lane: Reg):
        form = self.form = table.format
        self.table, self.shared = table, shared
        self.count = form.dim // form.length // parts
        span = self.count * form.bits
        starts = [i * span for i in range(parts)]
        self.words = max(-(-(start % 32 + span) // 32) for start in starts)
        self.outputs = -(-span // 32)
        last_word = form.pitch // 4 - self.words
        self.overlaps = any(start // 32 > last_word for start in starts)
        self.shifted = any(start % 32 for start in starts)
        start = part * span
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

    def pairs(self, words: list[Reg]) -> list[Reg]:
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

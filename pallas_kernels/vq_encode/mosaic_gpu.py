"""Rotating, transforming and quantising a few tokens (a decoding step's) as one Mosaic GPU kernel.

A block takes one token's head. What a step waits for here is not arithmetic but latency, so everything is spread over
as many threads as the work has: the row is transformed by a thread a pair of elements; then a lane takes a sub-vector
(or a share of its centroids, where there are fewer sub-vectors than lanes) and a warp a share of the centroids, which
all its lanes read at once. Distances are sums of squared differences in float32, compared in ascending order, so that
ties go to the lowest index.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels import packing
from pallas_kernels.mosaic_gpu import butterfly, lanes
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, f32, u32

_HEAD_DIMS = (64, 128, 256)
_SUB_VECTORS = (2, 4, 8)
# Beyond so many tokens the Triton kernel's tensor cores win over its start.
_MOST_TOKENS = 512
_WARP, _WARPS = 32, 4
_WARPGROUPS, _MANY_WARPGROUPS = 2, 4  # of a block
_AHEAD = 4  # centroids that a lane loads before it compares


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static."""

    dim: int
    length: int
    entries: int
    shared_book: bool
    kind: str  # of x: "bf16", "f16" or "f32"
    book_kind: str
    mean: bool
    scale: bool
    matrix: bool
    hadamard: bool
    least_warpgroups: int = 1

    @property
    def count(self) -> int:
        """Sub-vectors."""
        return self.dim // self.length

    @property
    def bits(self) -> int:
        return self.entries.bit_length() - 1

    @property
    def warpgroups(self) -> int:
        """More for large codebooks; at least a thread for every pair of elements."""
        return max(self.least_warpgroups, _MANY_WARPGROUPS if self.entries > 512 else _WARPGROUPS)

    @property
    def warps(self) -> int:
        return _WARPS * self.warpgroups

    @property
    def threads(self) -> int:
        return _WARP * self.warps

    @property
    def row_bytes(self) -> int:
        return self.dim * (4 if self.kind == "f32" else 2)

    @property
    def shared_bytes(self) -> int:
        found = (2 * self.warps * self.parts + 1) * self.count
        return 4 * (2 * self.dim + max(found, 2 * self.threads if self.matrix else 0))

    @property
    def vectors(self) -> int:
        """Sub-vectors of a lane."""
        return max(1, self.count // _WARP)

    @property
    def parts(self) -> int:
        """Lanes that share a sub-vector's centroids."""
        return max(1, _WARP // self.count)


def vq_encode(
    x: Float[Array, "B S H D"],
    codebook: Float[Array, "Hc K d"],
    *,
    rope: tuple[Array, Array] | None = None,
    mean: Float[Array, "H D"] | None = None,
    scale: Float[Array, "H D"] | None = None,
    matrix: Float[Array, "H D D"] | None = None,
    hadamard: bool = False,
    interpret: bool = False,
) -> UInt8[Array, "B H S bytes"]:
    """`pallas_kernels.vq_encode` for few tokens, D of 64, 128 or 256, d of 2, 4 or 8, and whole words of codes."""
    batch, tokens, heads, dim = x.shape
    _, entries, length = codebook.shape
    bits = entries.bit_length() - 1
    pitch = packing.num_bytes(dim // length, bits)
    if interpret:
        raise NotImplementedError("vq_encode: mosaic_gpu has no interpret mode")
    if not serves(dim, codebook) or rope is not None or batch * tokens > _MOST_TOKENS:
        raise NotImplementedError(
            f"vq_encode: the mosaic_gpu kernel serves up to {_MOST_TOKENS} tokens without rope, D in {_HEAD_DIMS}, d "
            f"in {_SUB_VECTORS}, K of 128 or more, codes of whole 32-bit words a token, not {batch * tokens} tokens, "
            f"rope={rope is not None}, D={dim}, d={length}, K={entries}"
        )
    if batch * tokens * heads == 0:
        return jnp.zeros((batch, heads, tokens, pitch), jnp.uint8)
    problem, arrays = prepare(x.dtype, codebook, mean, scale, matrix, hadamard, dim)
    (words,) = lanes.launch(
        functools.partial(_encode_row, problem, heads),
        [x.reshape(batch * tokens, heads, dim), *arrays],
        [jax.ShapeDtypeStruct((batch * tokens, heads, pitch // 4), jnp.uint32)],
        blocks=batch * tokens * heads,
        warpgroups=problem.warpgroups,
        shared_bytes=problem.shared_bytes,
        name="vq_encode_token",
    )
    codes = lax.bitcast_convert_type(words, jnp.uint8).reshape(batch, tokens, heads, pitch)
    return jnp.swapaxes(codes, 1, 2)


def serves(dim: int, codebook: Float[Array, "Hc K d"]) -> bool:
    """Whether `encode` serves a format: centroids enough for every lane, and whole words of codes."""
    _, entries, length = codebook.shape
    bits = entries.bit_length() - 1
    whole = packing.num_bytes(dim // length, bits) % 4 == 0
    return dim in _HEAD_DIMS and length in _SUB_VECTORS and bits >= 7 and whole


def prepare(
    dtype: Any,
    codebook: Float[Array, "Hc K d"],
    mean: Float[Array, "H D"] | None,
    scale: Float[Array, "H D"] | None,
    matrix: Float[Array, "H D D"] | None,
    hadamard: bool,
    dim: int,
) -> tuple[Problem, list[Array]]:
    """What `encode` needs to know about rows of `dtype`, and the arrays that it reads."""
    book = codebook if codebook.dtype == jnp.bfloat16 else codebook.astype(jnp.float32)
    tables, entries, length = codebook.shape
    problem = Problem(
        dim=dim,
        length=length,
        entries=entries,
        shared_book=tables == 1,
        kind=_kind(dtype),
        book_kind=_kind(book.dtype),
        mean=mean is not None,
        scale=scale is not None,
        matrix=matrix is not None,
        hadamard=hadamard,
    )
    return problem, [book, *(array.astype(jnp.float32) for array in (mean, scale, matrix) if array is not None)]


def _kind(dtype: Any) -> str:
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[jnp.dtype(dtype).name]


def _encode_row(p: Problem, heads: int, x: Pointer, *rest: Any) -> None:
    """Block `row` encodes head row % heads of token row / heads."""
    *arrays, codes, shared, row = rest
    encode(p, at(x, lanes.wide_product(row, p.row_bytes)), arrays, row % heads, shared, at_words(p, codes, row))


def with_warpgroups(p: Problem, warpgroups: int) -> Problem:
    """The same for blocks of more threads."""
    return dataclasses.replace(p, least_warpgroups=warpgroups)


def at_words(p: Problem, codes: Pointer, row: Reg) -> Pointer:
    """Where the codes of row `row` stand in an array of rows."""
    return at(codes, lanes.wide_product(row, p.count * p.bits // 8))


def encode(p: Problem, x: Pointer, arrays: Sequence[Pointer], head: Reg, shared: Pointer, codes: Pointer) -> None:
    """All threads of a block encode the row at x, of head `head`, to `codes`. No barrier follows."""
    book, *maps = arrays
    y, spare, found = shared, at(shared, 4 * p.dim), at(shared, 8 * p.dim)
    _transform(p, x, maps, head, y, spare, found)
    distances, indices, chosen = (at(found, 4 * n * p.count) for n in (0, p.warps * p.parts, 2 * p.warps * p.parts))
    _search(p, book if p.shared_book else at(book, lanes.wide_product(head, _book_bytes(p))), y, distances, indices)
    lanes.barrier()
    thread = lanes.thread()
    with lanes.do_when(thread < p.count):
        lanes.store(at(chosen, thread << 2), [_nearest(p, thread, distances, indices)])
    lanes.barrier()
    with lanes.do_when(thread < p.count * p.bits // 32):
        lanes.store(at(codes, thread << 2), [_packed(p, chosen, thread)])


def _book_bytes(p: Problem) -> int:
    return p.entries * p.length * (4 if p.book_kind == "f32" else 2)


def load_pair(pointer: Pointer, pair: Reg, kind: str) -> list[Reg]:
    """Elements 2 pair and 2 pair + 1, as float32."""
    if kind == "f32":
        return [word.as_float() for word in lanes.load(at(pointer, pair << 3), 2)]
    return lanes.widen(lanes.load(at(pointer, pair << 2), 1)[0], kind)


def _transform(p: Problem, x, maps: Sequence[Pointer], head: Reg, y: Pointer, spare: Pointer, sums: Pointer) -> None:
    """((x - mean) * scale) @ (matrix or H), into shared memory; two numbers a thread fit at `sums`."""
    thread, pairs = lanes.thread(), p.dim // 2
    pair = thread.minimum(pairs - 1)
    of_head = dict(zip([name for name in ("mean", "scale", "matrix") if getattr(p, name)], maps, strict=True))
    values = load_pair(x, pair, p.kind)
    for name, combine in (("mean", Reg.__sub__), ("scale", Reg.__mul__)):
        if name in of_head:
            factors = load_pair(at(of_head[name], lanes.wide_product(head, p.dim * 4)), pair, "f32")
            values = [combine(v, f) for v, f in zip(values, factors, strict=True)]
    if p.hadamard:
        values = butterfly.within_warp(values)
    first = spare if p.hadamard or p.matrix else y
    with lanes.do_when(thread < pairs):
        lanes.store(at(first, pair << 3), values)
    lanes.barrier()
    if p.hadamard:
        values = butterfly.across_warps(spare, pair, p.dim)
    elif p.matrix:
        matrix = at(of_head["matrix"], lanes.wide_product(head, p.dim * p.dim * 4))
        values = _times(p, spare, matrix, sums)
    if p.hadamard or p.matrix:
        with lanes.do_when(thread < pairs):
            lanes.store(at(y, pair << 3), values)
        lanes.barrier()


def _times(p: Problem, x: Pointer, matrix: Pointer, sums: Pointer) -> list[Reg]:
    """This thread's pair of elements of x [D] times a matrix [D, D]. Every thread sums some rows of a pair of columns,
    all at once: what takes long is the way to memory."""
    pairs = p.dim // 2
    parts = p.threads // pairs
    each = p.dim // parts
    thread = lanes.thread()
    pair, part = thread % pairs, thread // pairs
    first = part * each
    columns = at(matrix, first * (p.dim * 4) + (pair << 3))
    out = [f32(0.0), f32(0.0)]
    rows = [lanes.load(at(columns, i * p.dim * 4), 2) for i in range(each)]
    for i in range(0, each, 4):
        inputs = [word.as_float() for word in lanes.load(at(x, (first + i) << 2), 4)]
        for value, weights in zip(inputs, rows[i : i + 4], strict=True):
            out = [lanes.multiply_add(w.as_float(), value, o) for w, o in zip(weights, out, strict=True)]
    lanes.store(at(sums, thread << 3), out)
    lanes.barrier()
    held = [lanes.load(at(sums, (pair + i * pairs) << 3), 2) for i in range(parts)]
    return [lanes.reduce(Reg.__add__, [word.as_float() for word in words]) for words in zip(*held, strict=True)]


def _search(p: Problem, book: Pointer, y: Pointer, distances: Pointer, indices: Pointer) -> None:
    """Each lane's nearest centroid of its share, for each of its sub-vectors."""
    thread, warp = lanes.thread(), lanes.warp()
    lane = thread & (_WARP - 1)
    vector, part = lane & (min(p.count, _WARP) - 1), lane // min(p.count, _WARP)
    mine = [
        [word.as_float() for word in _words(at(y, (vector + _WARP * i) * (4 * p.length)), p.length)]
        for i in range(p.vectors)
    ]
    shares = p.warps * p.parts
    share = warp * p.parts + part
    each = p.entries // shares
    at_once = min(_AHEAD, each)
    entry_bytes = _book_bytes(p) // p.entries
    book = at(book, share * (each * entry_bytes))

    def visit(i: Reg, best: list) -> list:
        centroids = [_load_centroid(p, at(book, (i + k) * entry_bytes)) for k in range(at_once)]
        for k, centroid in enumerate(centroids):
            for n, vector in enumerate(mine):
                distance = None
                for a, b in zip(vector, centroid, strict=True):
                    difference = a - b
                    square = difference * difference
                    distance = square if distance is None else lanes.multiply_add(difference, difference, distance)
                near, index = best[n]
                closer = distance < near
                best[n] = closer.where(distance, near), closer.where(i + k, index)
        return best

    start = [(f32(math.inf), u32(0)) for _ in mine]
    best = lanes.loop(u32(0), u32(each), at_once, start, visit)
    for n, (near, index) in enumerate(best):
        place = (share * p.count + vector + _WARP * n) << 2
        lanes.store(at(distances, place), [near])
        lanes.store(at(indices, place), [index + share * each])


def _words(pointer: Pointer, count: int) -> list[Reg]:
    at_once = min(count, 4)
    return [word for i in range(0, count, at_once) for word in lanes.load(at(pointer, 4 * i), at_once)]


def _load_centroid(p: Problem, pointer: Pointer) -> list[Reg]:
    if p.book_kind == "f32":
        return [word.as_float() for word in _words(pointer, p.length)]
    return [element for word in _words(pointer, p.length // 2) for element in lanes.widen(word, p.book_kind)]


def _nearest(p: Problem, vector: Reg, distances: Pointer, indices: Pointer) -> Reg:
    """The best of all shares, which stand in ascending order of their centroids."""
    best, index = f32(math.inf), u32(0)
    for share in range(p.warps * p.parts):
        place = (vector + share * p.count) << 2
        distance, at_share = (lanes.load(at(x, place), 1)[0] for x in (distances, indices))
        closer = distance.as_float() < best
        best, index = closer.where(distance.as_float(), best), closer.where(at_share, index)
    return index


def _packed(p: Problem, chosen: Pointer, word: Reg) -> Reg:
    """Word `word` of the string of codes, lowest bits first."""
    first = (word << 5) // p.bits
    out = u32(0)
    for k in range(-(-31 // p.bits) + 1):
        index = first + k
        code = lanes.load(at(chosen, index.minimum(p.count - 1) << 2), 1)[0]
        # Where the code starts, seen from this word's first bit, plus 32 to stay above 0.
        start = index * p.bits + 32 - (word << 5)
        shifted = (start <= 31).where(code >> (u32(32) - start).minimum(31), code << (start - 32).minimum(31))
        counts = (index < p.count) & (start < 64)
        out = out | counts.where(shifted, u32(0))
    return out

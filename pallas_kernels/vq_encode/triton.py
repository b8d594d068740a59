"""Rotate, transform and quantise as one Pallas kernel for NVIDIA GPUs (Triton lowering).

A program takes a tile of T tokens of one head. The sub-vectors are held by element: y[r] is [T, M], element r
of each of the M = D/d sub-vectors, so that nothing is ever reshaped:

- load: without a map, x[:, r::d] directly (the row viewed as [M, d]); with one, whole rows; where there is
  RoPE, the two halves that it pairs;
- transform: rotate and round, subtract and scale in float32, then y[r] = z @ A[:, r::d]. Products run on
  tensor cores over bfloat16 digits, three of z and (the dense map) of A, which is float32 accuracy; tf32
  would be too coarse to choose codes by. The Walsh-Hadamard matrix is +-1: one exact digit;
- search: walk over the K centroids, whose elements are scalars every thread shares, with each sub-vector's
  least distance and its index in registers. Distances are sums of squared differences (see reference.py for
  why). The strict comparison leaves ties to the lowest index;
- store: one byte a code, or 16-bit codes that XLA packs afterwards.

The search is what it costs, 2d + 3 instructions per sub-vector and centroid: subtract, multiply-add, compare,
select twice. The compiler leaves products and sums apart, so the multiply-add is asked for by name. The
rotation is better apart: it rounds as it would elsewhere.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, UInt8

from pallas_kernels import packing
from pallas_kernels.hadamard.triton import digits, dot, signs

_HEAD_DIMS = (32, 64, 128, 256)
_SUB_VECTORS = (2, 4, 8)
_SMALLEST_MAP = 8  # sub-vectors a tensor-core product needs
_UNROLL = 8  # centroids per loop step


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is shaped."""

    tokens: int  # tokens per program
    num_warps: int


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
    """`pallas_kernels.vq_encode` for D from 32 to 256, sub-vectors of 2, 4 or 8, and 16 or more centroids."""
    batch, tokens, heads, dim = x.shape
    _, entries, length = codebook.shape
    count = dim // length
    _check_supported(dim, length, entries, hadamard or matrix is not None)
    bits = entries.bit_length() - 1
    out_dtype = jnp.uint8 if bits == 8 else jnp.uint16
    shape = (batch, heads, tokens, count)
    # Offsets inside a Triton kernel are int32 up to 2**32 bytes.
    if 2**31 < math.prod(shape) <= 2**32:
        raise NotImplementedError(f"vq_encode: the triton kernel cannot address codes {shape}; split them")
    rows = batch * tokens
    if rows * heads == 0:
        return jnp.zeros((batch, heads, tokens, packing.num_bytes(count, bits)), jnp.uint8)

    mapped = hadamard or matrix is not None
    inner = (dim,) if mapped else (count, length)  # how the kernel indexes a head's row
    half = (dim // 2,) if mapped else (count // 2, length)
    inputs = {
        "x": x.reshape(rows, heads, *inner),
        "codebook": codebook.astype(jnp.float32),
        "cos": None if rope is None else rope[0].astype(jnp.float32).reshape(rows, *half),
        "sin": None if rope is None else rope[1].astype(jnp.float32).reshape(rows, *half),
        "mean": None if mean is None else mean.astype(jnp.float32).reshape(heads, *inner),
        "scale": None if scale is None else scale.astype(jnp.float32).reshape(heads, *inner),
        "matrix": None if matrix is None else matrix.astype(jnp.float32).reshape(heads, dim, count, length),
    }
    names = [name for name, array in inputs.items() if array is not None]
    config = choose_config(rows, heads, count, mapped)
    add_square = _add_square if interpret else _add_square_fused

    def kernel(*refs):
        inputs, codes = dict(zip(names, refs[:-1], strict=True)), refs[-1]
        _kernel(inputs, codes, hadamard=hadamard, config=config, add_square=add_square)

    codes = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, config.tokens), heads),
        out_shape=jax.ShapeDtypeStruct(shape, out_dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="vq_encode",
    )(*(inputs[name] for name in names))
    return codes if bits == 8 else packing.pack(codes, bits)


def choose_config(rows: int, heads: int, count: int, mapped: bool) -> Config:
    """Small tiles for a decoding step. For a prompt, 8 (token, sub-vector) pairs a thread, or 16 with a map,
    whose tensor-core products want tall tiles."""
    if rows * heads <= 512:
        return Config(tokens=16, num_warps=8)
    if mapped:
        return Config(tokens=max(16, min(128, 4096 // count)), num_warps=8)
    return Config(tokens=max(16, min(64, 1024 // count)), num_warps=4)


def _check_supported(dim: int, length: int, entries: int, mapped: bool) -> None:
    if dim not in _HEAD_DIMS or length not in _SUB_VECTORS or entries < 2 * _UNROLL:
        raise NotImplementedError(
            f"vq_encode: the triton kernel serves D in {_HEAD_DIMS}, d in {_SUB_VECTORS} and K of at least "
            f"{2 * _UNROLL}, not D={dim}, d={length}, K={entries}"
        )
    if mapped and dim // length < _SMALLEST_MAP:
        raise NotImplementedError(f"vq_encode: the triton kernel maps to {_SMALLEST_MAP} sub-vectors or more")


def _kernel(refs: dict, codes_ref, *, hadamard: bool, config: Config, add_square: Callable):
    head, (rows, *_) = pl.program_id(1), refs["x"].shape
    first_row = pl.program_id(0) * config.tokens
    row = first_row + jnp.arange(config.tokens)
    tile = Tile(refs, head, pl.ds(first_row, config.tokens), (row < rows)[:, None])
    groups = _mapped(tile, hadamard) if hadamard or "matrix" in refs else _unmapped(tile)
    for first, elements in groups:
        table = head if refs["codebook"].shape[0] > 1 else jnp.int32(0)
        index = _search(elements, refs["codebook"], table, add_square)
        _store(codes_ref, index, first, head, row, rows)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some tokens of one head. `mask` says which of `tokens` exist; a part of a row is a tuple of indices."""

    refs: dict
    head: Array
    tokens: Any  # a slice of T rows
    mask: Array  # bool[T, 1]

    @property
    def has_rope(self) -> bool:
        return "cos" in self.refs

    def rows(self, name: str, part: tuple) -> Array:
        """x at one part of each row."""
        return plt.load(self.refs[name].at[self.tokens, self.head, *part], mask=self.mask, other=0)

    def angles(self, name: str, part: tuple) -> Array:
        """cos or sin, which all heads share."""
        return plt.load(self.refs[name].at[self.tokens, *part], mask=self.mask, other=0)

    def channels(self, name: str, part: tuple) -> Array:
        """mean or scale, which all tokens share."""
        return plt.load(self.refs[name].at[self.head, *part])[None, :]


# Load and transform.


def _load(tile: Tile, parts: list[tuple]) -> list[Array]:
    """The given parts of the rows, rotated (two parts, half a head apart), centred and scaled."""
    values = [tile.rows("x", part) for part in parts]
    if tile.has_rope:
        values = _rotate(tile, parts[0], *values)
    return [_centre(tile, part, value) for part, value in zip(parts, values, strict=True)]


def _rotate(tile: Tile, part: tuple, low: Array, high: Array) -> list[Array]:
    cos, sin = tile.angles("cos", part), tile.angles("sin", part)
    a, b = low.astype(jnp.float32), high.astype(jnp.float32)
    return [(a * cos - b * sin).astype(low.dtype), (b * cos + a * sin).astype(low.dtype)]


def _centre(tile: Tile, part: tuple, x: Array) -> Array:
    """(x - mean) * scale in float32; x as it is where there is neither."""
    if "mean" in tile.refs:
        x = x.astype(jnp.float32) - tile.channels("mean", part)
    if "scale" in tile.refs:
        x = x.astype(jnp.float32) * tile.channels("scale", part)
    return x


def _mapped(tile: Tile, hadamard: bool) -> list[tuple[int, list[Array]]]:
    """All sub-vectors, (0, [y[r] for each r]), after the dense map."""
    dim = tile.refs["x"].shape[2]
    length = tile.refs["codebook"].shape[2]
    count, pieces = dim // length, 2 if tile.has_rope else 1
    size = dim // pieces
    starts = [i * size for i in range(pieces)]
    inputs = [digits(z) for z in _load(tile, [(pl.ds(start, size),) for start in starts])]

    def weights(start: int, r: int) -> list[Array]:
        """Rows start to start + size and columns r, r + d, ... of the map."""
        if hadamard:
            return [signs(start + jnp.arange(size), jnp.arange(count) * length + r)]
        return digits(plt.load(tile.refs["matrix"].at[tile.head, pl.ds(start, size), :, jnp.int32(r)]))

    def element(r: int) -> Array:
        terms = [_product(z, weights(start, r)) for start, z in zip(starts, inputs, strict=True)]
        total = functools.reduce(jnp.add, terms)
        return total * (1 / math.sqrt(dim)) if hadamard else total

    return [(0, [element(r) for r in range(length)])]


def _product(a: list[Array], b: list[Array]) -> Array:
    """The product of two sums of bfloat16 digits, smallest terms first, down to float32's precision."""
    terms = sorted(((i, j) for i in range(len(a)) for j in range(len(b)) if i + j < 3), key=sum, reverse=True)
    return functools.reduce(jnp.add, [dot(a[i], b[j]) for i, j in terms])


def _unmapped(tile: Tile) -> list[tuple[int, list[Array]]]:
    """(first sub-vector, [y[r] for each r]) for both halves of the head where RoPE pairs them, else once."""
    _, _, count, length = tile.refs["x"].shape
    pieces = 2 if tile.has_rope else 1
    firsts = [i * count // pieces for i in range(pieces)]
    elements = [_load(tile, [(pl.ds(first, count // pieces), jnp.int32(r)) for first in firsts]) for r in range(length)]
    return [(first, [y[i].astype(jnp.float32) for y in elements]) for i, first in enumerate(firsts)]


# Search and store.


def _add_square(x: Array, total: Array) -> Array:
    return x * x + total


def _add_square_fused(x: Array, total: Array) -> Array:
    """x * x + total in one instruction, rounded once."""
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    [out] = plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $1, $2;", args=[x, total], constraints="=f,f,f", pack=1, result_shape_dtypes=[shape]
    )
    return out


def _search(elements: list[Array], codebook_ref, table, add_square: Callable) -> Array:
    """The index of the centroid nearest to each sub-vector: int32[T, M]."""
    entries = codebook_ref.shape[1]

    def visit(i, carry):
        best, index = carry
        for k in range(_UNROLL):
            centroid = i * _UNROLL + k
            differences = [
                element - plt.load(codebook_ref.at[table, centroid, jnp.int32(r)]) for r, element in enumerate(elements)
            ]
            distance = differences[0] * differences[0]
            for difference in differences[1:]:
                distance = add_square(difference, distance)
            closer = distance < best
            best, index = jnp.where(closer, distance, best), jnp.where(closer, centroid, index)
        return best, index

    shape = elements[0].shape
    start = jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    return lax.fori_loop(0, entries // _UNROLL, visit, start)[1]


def _store(codes_ref, index, first: int, head, row, rows: int):
    """Write the codes of sub-vectors first, first + 1, ... of rows b * S + s to codes[b, head, s]."""
    tokens = codes_ref.shape[2]
    shape = index.shape
    wide = lambda a: jnp.broadcast_to(a, shape)  # noqa: E731
    at = (
        wide((row // tokens)[:, None]),
        wide(head),
        wide((row % tokens)[:, None]),
        wide(first + jnp.arange(shape[1])[None, :]),
    )
    plt.store(codes_ref.at[at], index.astype(codes_ref.dtype), mask=wide((row < rows)[:, None]))

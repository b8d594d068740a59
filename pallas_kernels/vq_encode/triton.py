"""Rotate, transform and quantise as two Pallas kernels for NVIDIA GPUs (Triton lowering).

The first rotates and transforms whole rows into float32, on tensor cores over bfloat16 digits: three of the input
and, for a dense map, of the matrix, which is float32 accuracy; tf32 would be too coarse to choose codes by. The
Walsh-Hadamard matrix is +-1: one exact digit. Where there is nothing to transform it does not run.

The second finds the nearest centroid of each sub-vector y in two steps.

*Select.* With y and the centroids c counted from the codebook's mean, in units that bring every |c_i| below 8, all
scores |y - c|^2 / 2 of a block come from one tensor-core product per 64 centroids. y and c are two float16 digits
each, and the products that matter lie side by side in the contraction axis (`_operand`, `_tables`): for each element

    y0 c0 + y0 c1 + y1 c0 + {1 n0, 1 n1, u 1, 0 by element},

n0 + n1 = |c|^2 / 2 and u a little above |y|^2 / 2, so that scores are positive and compare as integers, for which
the hardware has a minimum of three. Only the minimum of each group of K / 32 consecutive centroids is kept. The
centroids' order in the product gives each thread whole groups: the reduction moves nothing between threads.

*Decide.* Every group whose minimum is within a tolerance of the least one is walked: sums of squared differences in
float32, as in reference.py, strict comparisons in ascending order, so ties go to the lowest index. One group is the
rule; a bit mask per sub-vector says which are left, and the block repeats while there are any.

Why the bound holds. Let e be the error of a score. The best centroid's score is at most the least one + 2e, so its
group is walked if the tolerance is 2e or more. Let q = |y|^2 + (least score). A centroid near enough to matter has
|c| <= |y| + |y - c|, so all its terms together are at most 8q. The digits leave out less than 2^-21 of them, plus
2^-25 where digits are subnormal; float32 sums of 16 or 32 exact products, cut off at 2^-23, lose less than 2^-19 of
the largest, at worst. In those units the tolerance is 2^-17 q + 2^-21, 8 times the largest 2e found on an H100 among
8,192 or more random vectors of each format, and the choices of 10^6 are checked there. Rows too far out for float16
(45 times the codebook's radius) walk all groups.

What it costs: per sub-vector and centroid half an instruction for the minimum, 2d / 32 for the walk, and the
tensor cores' 4d products. A walk over all centroids would be 2d + 3 instructions, and took, on an H100 for 8,192
tokens of 8 heads of 128 in bfloat16: values d4b8 293 us, now 138; d8b8 269, 117; d2b8 358, 249; d8b12 3272, 1164.
Tried and slower for d4b8: float minima (8%), one or 8 warps, 32 or 128 centroids a product. Half the registers and
twice the programs in flight gained 5%. A block has 13 barriers, most of them where layouts change between the steps.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import packing
from pallas_kernels.hadamard.triton import dot, signs

_HEAD_DIMS = (32, 64, 128, 256)
_SUB_VECTORS = (2, 4, 8)
_SMALLEST_CODEBOOK = 16
_GROUPS = 32  # groups of centroids, at most: one bit each
_SLOTS = 8  # groups that one product gives minima of
_TOLERANCE, _FLOOR = 2.0**-17, 2.0**-21
_LARGEST = 65000.0  # of float16
_TRANSFORM_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """How the search is launched."""

    tokens: int  # a program's tokens
    vectors: int  # sub-vectors of a token in a block
    columns: int  # centroids in a product
    num_warps: int = 4
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How K centroids divide: into runs of _SLOTS groups each, a run into products, a product into columns."""

    entries: int
    columns: int

    @property
    def products(self) -> int:
        return max(1, self.entries // (self.columns * _GROUPS // _SLOTS))

    @property
    def runs(self) -> int:
        return self.entries // (self.columns * self.products)

    @property
    def group(self) -> int:
        """Centroids in a group."""
        return self.columns * self.products // _SLOTS


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
    tables, entries, length = codebook.shape
    if dim not in _HEAD_DIMS or length not in _SUB_VECTORS or entries < _SMALLEST_CODEBOOK:
        raise NotImplementedError(
            f"vq_encode: the triton kernel serves D in {_HEAD_DIMS}, d in {_SUB_VECTORS} and K of at least "
            f"{_SMALLEST_CODEBOOK}, not D={dim}, d={length}, K={entries}"
        )
    bits, count, rows = entries.bit_length() - 1, dim // length, batch * tokens
    shape = (batch, heads, tokens, count)
    # Offsets inside a Triton kernel are int32 up to 2**32 bytes.
    if 2**31 < math.prod(shape) <= 2**32:
        raise NotImplementedError(f"vq_encode: the triton kernel cannot address codes {shape}; split them")
    if rows * heads == 0:
        return jnp.zeros((batch, heads, tokens, packing.num_bytes(count, bits)), jnp.uint8)

    y = x.reshape(rows, heads, dim)
    if rope is not None:
        rope = rope[0].reshape(rows, dim // 2), rope[1].reshape(rows, dim // 2)
    if hadamard or any(step is not None for step in (rope, mean, scale, matrix)):
        y = _transform(y, rope, mean, scale, matrix, hadamard, interpret)
    config = choose_config(length, entries)
    codebook = codebook.astype(jnp.float32)
    plan = Plan(entries, min(config.columns, entries))
    codes = pl.pallas_call(
        functools.partial(_search_kernel, config=config, plan=plan),
        grid=(pl.cdiv(rows, config.tokens), heads),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.uint8 if bits == 8 else jnp.uint16),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="vq_encode",
    )(y, codebook.reshape(tables, entries * length), *_tables(codebook, plan, min(config.vectors, count)))
    return codes if bits == 8 else packing.pack(codes, bits)


def choose_config(length: int, entries: int) -> Config:
    """Small blocks, so that many are in flight; larger ones where the centroids do not stay in shared memory."""
    if entries > 512:
        return Config(tokens=64, vectors=4, columns=128 if length < 8 else 64, num_stages=3)
    return Config(tokens=16, vectors=8 if length == 2 else 4, columns=64)


# Digits.


def _digits(x: Array, dtype: DTypeLike, count: int) -> list[Array]:
    """`count` arrays of dtype whose sum is nearly x. Rounded by bit operations: a compiler may take a pair of
    conversions for none at all."""
    dropped = {"float16": 13, "bfloat16": 16}[jnp.dtype(dtype).name]
    rest, parts = x.astype(jnp.float32), []
    for _ in range(count):
        raw = lax.bitcast_convert_type(rest, jnp.int32) + (1 << (dropped - 1))
        top = lax.bitcast_convert_type(raw & jnp.int32(-(1 << dropped)), jnp.float32)
        parts.append(top.astype(dtype))
        rest = rest - top
    return parts


# Transform.


def _transform(
    x: Float[Array, "N H D"],
    rope: tuple[Float[Array, "N half"], Float[Array, "N half"]] | None,
    mean: Float[Array, "H D"] | None,
    scale: Float[Array, "H D"] | None,
    matrix: Float[Array, "H D D"] | None,
    hadamard: bool,
    interpret: bool,
) -> Float[Array, "N H D"]:
    """Steps 1 and 2 of `pallas_kernels.vq_encode`, in float32."""
    rows, heads, dim = x.shape
    inputs = {"x": x, "mean": mean, "scale": scale}
    if rope is not None:
        inputs |= {"cos": rope[0], "sin": rope[1]}
    inputs = {name: a if name == "x" else a.astype(jnp.float32) for name, a in inputs.items() if a is not None}
    if hadamard:
        inputs["maps"] = signs(jnp.arange(dim), jnp.arange(dim))[None, None]
    elif matrix is not None:
        inputs["maps"] = jnp.stack(_digits(matrix, jnp.bfloat16, 3))

    def kernel(*refs):
        _transform_kernel(dict(zip(inputs, refs[:-1], strict=True)), refs[-1], 1 / math.sqrt(dim) if hadamard else 1.0)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, _TRANSFORM_TOKENS), heads),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4 if dim <= 128 else 8, num_stages=1),
        interpret=interpret,
        name="vq_encode_transform",
    )(*inputs.values())


def _transform_kernel(refs: dict, y_ref, factor: float):
    """y = (((rotated x) - mean) * scale) @ map * factor, for a tile of tokens of one head."""
    rows, _, dim = y_ref.shape
    head = pl.program_id(1)
    first = pl.program_id(0) * _TRANSFORM_TOKENS
    tokens = pl.ds(first, _TRANSFORM_TOKENS)
    mask = (first + jnp.arange(_TRANSFORM_TOKENS) < rows)[:, None]
    # Where RoPE pairs the halves of a row, each half is an array of its own.
    size = dim // 2 if "cos" in refs else dim
    cuts = [pl.ds(start, size) for start in range(0, dim, size)]
    parts = [plt.load(refs["x"].at[tokens, head, cut], mask=mask, other=0) for cut in cuts]
    if "cos" in refs:
        cos, sin = (plt.load(refs[name].at[tokens, :], mask=mask, other=0) for name in ("cos", "sin"))
        low, high = (part.astype(jnp.float32) for part in parts)
        parts = [part.astype(parts[0].dtype) for part in (low * cos - high * sin, high * cos + low * sin)]
    for i, cut in enumerate(cuts):
        if "mean" in refs:
            parts[i] = parts[i].astype(jnp.float32) - refs["mean"][head, cut][None, :]
        if "scale" in refs:
            parts[i] = parts[i].astype(jnp.float32) * refs["scale"][head, cut][None, :]
        if "maps" not in refs:
            plt.store(y_ref.at[tokens, head, cut], parts[i].astype(jnp.float32), mask=mask)
    if "maps" in refs:
        digits = [[part] if part.dtype == jnp.bfloat16 else _digits(part, jnp.bfloat16, 3) for part in parts]
        columns = min(dim, 2**14 // dim)  # a block of the map that fits into shared memory
        for start in range(0, dim, columns):
            y = _product(digits, cuts, refs["maps"], head, pl.ds(start, columns))
            plt.store(y_ref.at[tokens, head, pl.ds(start, columns)], y * factor, mask=mask)


def _product(digits: list[list[Array]], cuts: list, maps_ref, head, columns) -> Array:
    """Rows of digits times columns of the map, smallest terms first, down to float32's precision."""
    count, heads = maps_ref.shape[:2]
    table = head if heads > 1 else jnp.int32(0)
    terms = []
    for parts, cut in zip(digits, cuts, strict=True):
        weights = [maps_ref[i, table, cut, columns] for i in range(count)]
        terms += [(i + j, a, w) for i, w in enumerate(weights) for j, a in enumerate(parts) if i + j < 3]
    terms.sort(key=lambda term: -term[0])
    return functools.reduce(jnp.add, [dot(a, w) for _, a, w in terms])


# Search.


def _tables(
    codebook: Float[Array, "Hc K d"], plan: Plan, vectors: int
) -> tuple[Float[Array, "Hc width"], Float[Array, "Hc"], Float[Array, "Hc features K"]]:
    """Each codebook's mean, repeated for the sub-vectors of a block; the factor to its units; the right operand."""
    tables, entries, length = codebook.shape
    mean = jnp.mean(codebook, axis=1)
    centred = codebook - mean[:, None]
    radius = jnp.max(jnp.abs(centred), axis=(1, 2))
    _, exponent = jnp.frexp(jnp.where(radius > 0, radius, 1.0))
    unit = jnp.ldexp(jnp.ones_like(radius), 3 - exponent)
    centred = centred * unit[:, None, None]
    c0, c1 = _digits(-centred, jnp.float16, 2)
    n0, n1 = _digits(jnp.sum(centred**2, axis=-1) / 2, jnp.float16, 2)
    zero, one = jnp.zeros_like(n0), jnp.ones_like(n0)
    if length == 2:  # eight products an element, see `_operand`
        zeros = jnp.zeros_like(c0)
        last = [jnp.stack([n0, n1], -1), jnp.stack([one, zero], -1)]
        features = jnp.stack([c0, zeros, c1, zeros, c0, c1, *last], axis=-1)
    else:
        last = [jnp.stack([n0, n1, one, *[zero] * (length - 3)], -1)]
        features = jnp.stack([c0, c1, c0, *last], axis=-1)
    # Entry k is, from the highest part of k: run, slot, product, place. Slots become the fastest, and so a thread's.
    ordered = features.reshape(tables, plan.runs, _SLOTS, plan.products, plan.columns // _SLOTS, -1)
    right = ordered.transpose(0, 5, 1, 3, 4, 2).reshape(tables, -1, entries)
    return jnp.tile(mean, (1, vectors)), unit, right


def _search_kernel(y_ref, codebook_ref, mean_ref, unit_ref, right_ref, codes_ref, *, config: Config, plan: Plan):
    rows, _, dim = y_ref.shape
    tables, width = mean_ref.shape
    length = codebook_ref.shape[1] // plan.entries
    head = pl.program_id(1)
    table = head if tables > 1 else jnp.int32(0)
    first = pl.program_id(0) * config.tokens
    row = first + jnp.arange(config.tokens)
    mask = (row < rows)[:, None]
    mean, unit = mean_ref[table, :][None, :], unit_ref[table]

    def right(product):
        return right_ref[table, :, pl.ds(product * plan.columns, plan.columns)]

    if plan.entries <= 512:  # few enough to load once and hold
        held = [right(i) for i in range(plan.runs * plan.products)]
        right = held.__getitem__

    def load(block):
        at = y_ref.at[pl.ds(first, config.tokens), head, pl.ds(block * width, width)]
        return plt.load(at, mask=mask & (block * width < dim), other=0).astype(jnp.float32)

    def encode(block, y):
        ahead = load(block + 1)
        limit, least = _select((y - mean) * unit, length, plan, right)
        index = _decide(y, _candidates(least, limit), codebook_ref, table, plan)
        _store(codes_ref, index.reshape(config.tokens, width // length), block, head, row, rows)
        return ahead

    lax.fori_loop(0, dim // width, encode, load(0))


def _operand(z: Float[Array, "T width"], square: Float[Array, "R"]) -> Array:
    """The left operand: float16[R, features], 4 (8 for d = 2) products an element."""
    tokens, width = z.shape
    length = tokens * width // square.shape[0]
    z0, z1 = _digits(jnp.clip(z, -_LARGEST / 2, _LARGEST / 2), jnp.float16, 2)
    above = jnp.minimum(square * (0.5 + 2.0**-9) + 2.0**-20, _LARGEST).astype(jnp.float16)
    shape = (tokens, width // length, length)
    above = jnp.broadcast_to(above.reshape(*shape[:2], 1), shape).reshape(tokens, width)
    one = jnp.ones_like(z0)

    def pair(a, b):
        return jnp.stack([a, b], axis=-1)

    if length == 2:
        left = pair(pair(pair(z0, z1), pair(z0, one)), pair(pair(z0, z1), pair(z0, above)))
    else:
        third = (jnp.arange(width) % length == 2)[None, :]
        left = pair(pair(z0, z1), pair(z0, jnp.where(third, above, one)))
    return left.reshape(square.shape[0], -1)


def _select(
    z: Float[Array, "T width"], length: int, plan: Plan, right: Callable
) -> tuple[Int[Array, "R"], list[Int[Array, "R slots"]]]:
    """The score up to which a group is a candidate, and each run's least scores by group; bits of positive floats,
    which compare as the floats do."""
    tokens, width = z.shape
    count = tokens * width // length
    square = jnp.sum((z * z).reshape(count, length), axis=1)
    left = _operand(z, square)

    def least(product):
        scores = lax.bitcast_convert_type(dot(left, right(product)), jnp.int32)
        return jnp.min(scores.reshape(count, plan.columns // _SLOTS, _SLOTS), axis=1)

    def of_run(run):
        start = run * plan.products
        if plan.entries <= 512:
            return functools.reduce(jnp.minimum, [least(start + i) for i in range(plan.products)])
        most = jnp.full((count, _SLOTS), jnp.iinfo(jnp.int32).max, jnp.int32)
        return lax.fori_loop(0, plan.products, lambda i, low: jnp.minimum(low, least(start + i)), most)

    runs = [of_run(run) for run in range(plan.runs)]
    low = lax.bitcast_convert_type(jnp.min(functools.reduce(jnp.minimum, runs), axis=1), jnp.float32)
    limit = low + (square + jnp.abs(low)) * _TOLERANCE + _FLOOR
    limit = jnp.where(square < 2 * _LARGEST * 0.99, limit, jnp.inf)
    return lax.bitcast_convert_type(limit, jnp.int32), runs


def _candidates(least: list[Int[Array, "R slots"]], limit: Int[Array, "R"]) -> Int[Array, "R"]:
    """Bit g says whether group g may hold the nearest centroid."""
    slot = jnp.arange(_SLOTS)[None, :]
    bits = [
        jnp.where(low <= limit[:, None], jnp.left_shift(jnp.int32(1 << (_SLOTS * run)), slot), 0)
        for run, low in enumerate(least)
    ]
    return jnp.sum(functools.reduce(jnp.bitwise_or, bits), axis=1)


def _decide(
    y: Float[Array, "T width"], candidates: Int[Array, "R"], codebook_ref, table, plan: Plan
) -> Int[Array, "R"]:
    """The nearest centroid of the groups named, ties to the lowest index."""
    count = candidates.shape[0]
    length = codebook_ref.shape[1] // plan.entries
    step = min(plan.group, max(1, 16 // length))  # centroids at a time: 64 bytes
    shape = (count, step * length)
    wide = jnp.broadcast_to(y.reshape(count, 1, length), (count, step, length)).reshape(shape)
    element, member = jnp.arange(step * length)[None, :], jnp.arange(step)[None, :]

    def walk(state):
        left, best, index, _ = state
        # The lowest group left. A sub-vector that has none repeats the last, which changes nothing for the worse.
        group = jnp.minimum(lax.population_count((left & -left) - 1), plan.entries // plan.group - 1)
        left = left & (left - 1)
        base = group * plan.group

        def visit(i, carry):
            near, at = carry
            place = (base * length)[:, None] + (i * step * length + element)
            difference = wide - plt.load(codebook_ref.at[jnp.broadcast_to(table, shape), place])
            distance = jnp.sum((difference * difference).reshape(count, step, length), axis=2)
            closer = distance < near
            return jnp.where(closer, distance, near), jnp.where(closer, i * step, at)

        carry = jnp.full((count, step), jnp.inf, jnp.float32), jnp.zeros((count, step), jnp.int32)
        steps = plan.group // step
        if steps <= 4:
            for i in range(steps):
                carry = visit(i, carry)
        else:
            carry = lax.fori_loop(0, steps, visit, carry)
        near, at = carry
        distance = jnp.min(near, axis=1)
        place = jnp.where(near == distance[:, None], base[:, None] + at + member, plan.entries)
        closer = distance < best
        best, index = jnp.where(closer, distance, best), jnp.where(closer, jnp.min(place, axis=1), index)
        return left, best, index, jnp.max((left != 0).astype(jnp.int32))

    start = (candidates, jnp.full((count,), jnp.inf, jnp.float32), jnp.zeros((count,), jnp.int32), jnp.int32(1))
    return lax.while_loop(lambda state: state[3] > 0, walk, start)[2]


def _store(codes_ref, index: Int[Array, "T vectors"], block, head, row: Int[Array, "T"], rows: int):
    """Write the codes of a block's sub-vectors, of rows b * S + s, to codes[b, head, s]."""
    tokens, shape = codes_ref.shape[2], index.shape

    def wide(a):
        return jnp.broadcast_to(a, shape)

    column = block * shape[1] + jnp.arange(shape[1])[None, :]
    at = (wide((row // tokens)[:, None]), wide(head), wide((row % tokens)[:, None]), wide(column))
    plt.store(codes_ref.at[at], index.astype(codes_ref.dtype), mask=wide((row < rows)[:, None]))

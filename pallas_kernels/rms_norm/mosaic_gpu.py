"""`rms_norm` of few rows as one Mosaic GPU kernel: a block a row, everything in registers between two passes of it.

XLA starts three kernels for it (the addition, the sum of squares, the product), and in a decoding step each of them
takes longer to start than to run.
"""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import lanes
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, f32
from pallas_kernels.rms_norm import reference

_MOST_ROWS = 512
_MOST_WIDTH = 32768
_WARPGROUPS = 2
_WARP, _WARPS = 32, 4  # lanes a warp, warps a warpgroup
_CHUNK = 8  # elements that a thread takes at once, 16 bytes


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static; `operand` is "bf16" or "f16"."""

    width: int
    epsilon: float
    adds: bool
    operand: str

    @property
    def warps(self) -> int:
        return _WARPS * _WARPGROUPS

    @property
    def threads(self) -> int:
        return _WARP * self.warps


def rms_norm(
    x: Float[Array, "*rows W"],
    weight: Float[Array, "W"],
    *,
    epsilon: float,
    delta: Float[Array, "*rows W"] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """`pallas_kernels.rms_norm` for up to 512 rows of 16-bit elements, a multiple of 8 of them."""
    width = x.shape[-1]
    rows = x.size // max(1, width)
    operand = {"bfloat16": "bf16", "float16": "f16"}.get(x.dtype.name)
    if interpret or operand is None or width % _CHUNK or not 0 < width <= _MOST_WIDTH or not 0 < rows <= _MOST_ROWS:
        raise NotImplementedError(
            f"rms_norm: the mosaic_gpu kernel serves 1 to {_MOST_ROWS} rows of 16-bit elements, a multiple of "
            f"{_CHUNK} up to {_MOST_WIDTH}, not interpreted; got {x.dtype}{list(x.shape)}"
        )
    return _normed(Problem(width, epsilon, delta is not None, operand), x, weight, delta)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normed(p: Problem, x: Array, weight: Array, delta: Array | None) -> tuple[Array, Array]:
    rows = x.size // p.width
    shape = jax.ShapeDtypeStruct((rows, p.width), x.dtype)
    out = lanes.launch(
        functools.partial(_norm_row, p),
        [x.reshape(rows, p.width), weight, *([] if delta is None else [delta.reshape(rows, p.width)])],
        [shape] if delta is None else [shape, shape],
        blocks=rows,
        warpgroups=_WARPGROUPS,
        shared_bytes=4 * p.warps,
        name="rms_norm",
    )
    return (x if delta is None else out[1].reshape(x.shape)), out[0].reshape(x.shape)


@_normed.defjvp
def _derivative(p: Problem, primals: tuple, tangents: tuple) -> tuple:
    """Plain JAX's."""

    def plain(x: Array, weight: Array, delta: Array | None) -> tuple[Array, Array]:
        return reference.rms_norm(x, weight, epsilon=p.epsilon, delta=delta)

    return jax.jvp(plain, primals, tangents)


def _norm_row(p: Problem, x: Pointer, weight: Pointer, *rest: Any) -> None:
    """One row: pointers to x [R, W] and the weight, to delta if there is one, to the outputs and shared memory."""
    *arrays, shared, row = rest
    delta = arrays.pop(0) if p.adds else None
    normed, *summed = arrays
    thread, chunks = lanes.thread(), p.width // _CHUNK
    of_row = lanes.wide_product(row, 2 * p.width)
    turns = range(-(-chunks // p.threads))
    held: list[list[Reg]] = []
    squares = f32(0.0)
    for turn in turns:
        chunk = thread + turn * p.threads
        exists = chunk < chunks
        place = exists.where(chunk, thread % chunks) << 4
        words = lanes.load(at(x, of_row, place), 4)
        if delta is not None:
            words = _sum(p, words, lanes.load(at(delta, of_row, place), 4))
            with lanes.do_when(exists):
                lanes.store(at(summed[0], of_row, place), words)
        held.append(words)
        values = [value for word in words for value in lanes.widen(word, p.operand)]
        square = lanes.reduce(Reg.__add__, [value * value for value in values])
        squares = squares + exists.where(square, f32(0.0))
    inverse = lanes.rsqrt(_of_block(p, squares, shared) * (1 / p.width) + p.epsilon)
    for turn, words in zip(turns, held, strict=True):
        chunk = thread + turn * p.threads
        with lanes.do_when(chunk < chunks):
            place = chunk << 4
            factors = lanes.load(at(weight, place), 4)
            scaled = [_scaled(p, *pair, inverse) for pair in zip(words, factors, strict=True)]
            lanes.store(at(normed, of_row, place), scaled)


def _sum(p: Problem, words: list[Reg], others: list[Reg]) -> list[Reg]:
    pairs = [(lanes.widen(a, p.operand), lanes.widen(b, p.operand)) for a, b in zip(words, others, strict=True)]
    return [lanes.pack_pair(a[0] + b[0], a[1] + b[1], p.operand) for a, b in pairs]


def _scaled(p: Problem, word: Reg, factor: Reg, inverse: Reg) -> Reg:
    """Two elements times the row's factor, rounded, times their weights."""
    low, high = (value * inverse for value in lanes.widen(word, p.operand))
    rounded = lanes.widen(lanes.pack_pair(low, high, p.operand), p.operand)
    low, high = (a * b for a, b in zip(rounded, lanes.widen(factor, p.operand), strict=True))
    return lanes.pack_pair(low, high, p.operand)


def _of_block(p: Problem, value: Reg, shared: Pointer) -> Reg:
    """The sum over all threads, in each of them."""
    for distance in (1, 2, 4, 8, 16):
        value = value + lanes.exchange(value, distance)
    place = at(shared, lanes.warp() << 2)
    with lanes.do_when((lanes.thread() & (_WARP - 1)).equals(0)):
        lanes.store(place, [value])
    lanes.barrier()
    parts = [word for i in range(0, p.warps, 4) for word in lanes.load(at(shared, 4 * i), 4)]
    return lanes.reduce(Reg.__add__, [part.as_float() for part in parts])

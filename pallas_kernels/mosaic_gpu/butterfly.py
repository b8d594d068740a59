"""The Walsh-Hadamard transform of vectors whose elements 2 t and 2 t + 1 a thread t holds, 64 elements a warp."""

import math
from collections.abc import Sequence

from pallas_kernels.mosaic_gpu import lanes
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, f32, u32

_OF_WARP = 64


def within_warp(values: Sequence[Reg]) -> list[Reg]:
    """Butterflies over a lane's two elements and its warp's 64, without the norm."""
    low, high = values
    values = [low + high, low - high]
    lane = lanes.thread() & 31
    for distance in (1, 2, 4, 8, 16):
        upper = (lane & distance).differs(0)
        others = [lanes.exchange(value, distance) for value in values]
        values = [upper.where(o - v, o + v) for v, o in zip(values, others, strict=True)]
    return list(values)


def across_warps(vector: Pointer, pair: Reg, dim: int) -> list[Reg]:
    """Elements 2 pair and 2 pair + 1 of a vector of `dim`, from what `within_warp` left of all of it in shared memory
    as float32; with the norm. `dim` is 64, 128 or 256."""
    assert dim in (64, 128, 256)
    out = [f32(0.0), f32(0.0)]
    for part in range(dim // _OF_WARP):
        both = u32(part) & (pair >> 5)
        odd = ((both ^ (both >> 1)) & 1).differs(0)
        words = lanes.load(at(vector, ((pair & 31) << 3) + part * _OF_WARP * 4), 2)
        loaded = [word.as_float() for word in words]
        out = [odd.where(o - v, o + v) for o, v in zip(out, loaded, strict=True)]
    return [o * (1 / math.sqrt(dim)) for o in out]

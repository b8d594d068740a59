"""`vq_append` as one Mosaic GPU kernel, in place: a block for the key, one for the value, of every row and head."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels.mosaic_gpu import lanes
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, u32
from pallas_kernels.vq_encode import mosaic_gpu as encoding


def vq_append(
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    positions: Int32[Array, "B"],
    ring_keys: Float[Array, "B H W D"],
    ring_values: Float[Array, "B H W D"],
    key_codes: UInt8[Array, "B H S kbytes"],
    value_codes: UInt8[Array, "B H S vbytes"],
    key_codebook: Float[Array, "Hk Kk dk"],
    value_codebook: Float[Array, "Hv Kv dv"],
    *,
    sink: int = 0,
    sinks: tuple[Array, Array] | None = None,
    slots: Int32[Array, "B"] | None = None,
    mean: Float[Array, "H D"] | None = None,
    scale: Float[Array, "H D"] | None = None,
    matrix: Float[Array, "H D D"] | None = None,
    hadamard: bool = False,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """`pallas_kernels.vq_append` for the formats that `vq_encode`'s Mosaic GPU kernel serves."""
    batch, heads, dim = k.shape
    if interpret:
        raise NotImplementedError("vq_append: mosaic_gpu has no interpret mode")
    if not all(encoding.serves(dim, book) for book in (key_codebook, value_codebook)) or key_codes.shape[2] == 0:
        raise NotImplementedError(
            f"vq_append: the mosaic_gpu kernel does not serve D={dim} with codebooks {key_codebook.shape}, "
            f"{value_codebook.shape} (see vq_encode), nor a cache without a coded slot"
        )
    dtype = ring_keys.dtype
    key, key_arrays = encoding.prepare(dtype, key_codebook, mean, scale, matrix, hadamard, dim)
    value, value_arrays = encoding.prepare(dtype, value_codebook, None, None, None, False, dim)
    warpgroups = max(key.warpgroups, value.warpgroups)
    problems = tuple(encoding.with_warpgroups(p, warpgroups) for p in (key, value))
    counts = len(key_arrays), len(value_arrays)
    body = functools.partial(
        _append, problems, heads, ring_keys.shape[2], key_codes.shape[2], sink, slots is not None, *counts
    )
    # Without a window there is no ring to write, and an empty array has no address.
    rings = [ring_keys, ring_values] if ring_keys.shape[2] else []
    kept = list(sinks) if sinks and sink else []
    out = lanes.launch(
        body,
        [k.astype(dtype), v.astype(dtype), positions, *([] if slots is None else [slots]), *key_arrays, *value_arrays],
        [],
        in_place=[*rings, key_codes, value_codes, *kept],
        blocks=2 * batch * heads,
        warpgroups=warpgroups,
        shared_bytes=max(p.shared_bytes for p in problems),
        name="vq_append",
    )
    out = out if rings else [ring_keys, ring_values, *out]
    return (*out, *(sinks or ())) if not kept else tuple(out)


def _append(
    problems: Sequence[encoding.Problem],
    heads: int,
    window: int,
    slots: int,
    sink: int,
    given: bool,
    of_key: int,
    of_value: int,
    *rest: Any,
) -> None:
    """Block 2 row + side: side 0 is the key, 1 the value, of row batch * heads + head.

    rest: k, v [B, H, D]; positions [B]; the slots to encode to [B] if given; what `encode` reads for keys, then
    for values; the rings [B, H, window, D] if there are any; key and value codes [B, H, slots, bytes]; sinks
    [B, H, sink, D] if they are written; shared memory; the block.
    """
    k, v, positions, *arrays, shared, block = rest
    targets = arrays.pop(0) if given else None
    key_arrays, value_arrays = arrays[:of_key], arrays[of_key : of_key + of_value]
    written = arrays[of_key + of_value :]
    rings = [written.pop(0), written.pop(0)] if window else []
    key_codes, value_codes, *sinks = written
    row = block >> 1
    position = lanes.load(at(positions, (row // heads) << 2), 1)[0]
    leaving = position - (window + sink)
    if targets is not None:
        leaving = lanes.load(at(targets, (row // heads) << 2), 1)[0]

    def side(which: int, arrays: Sequence[Pointer], new: Pointer, codes: Pointer) -> Callable[[Reg], Reg]:
        p, ring = problems[which], rings[which] if rings else None

        def run(_: Reg) -> Reg:
            fresh = at(new, lanes.wide_product(row, p.row_bytes))
            held = fresh
            if ring is not None:
                held = at(ring, lanes.wide_product(row * window + position % window, p.row_bytes))
            # Below 0 it wraps round to far above `slots`.
            target = encoding.at_words(p, codes, row * slots + leaving.minimum(slots - 1))

            def encode(_: Reg) -> Reg:
                encoding.encode(p, held, arrays, row % heads, shared, target)
                return u32(0)

            lanes.when(leaving < slots, u32(0), encode)
            if ring is not None:  # what leaves was read by all before the first barrier of `encode`
                _copy(p, fresh, held)
            if sinks:
                slot = position.minimum(sink - 1)
                with lanes.do_when(position < sink):
                    _copy(p, fresh, at(sinks[which], lanes.wide_product(row * sink + slot, p.row_bytes)))
            return u32(0)

        return run

    either: list[tuple[int, Callable[[Reg], Reg]]] = [
        (0, side(0, key_arrays, k, key_codes)),
        (1, side(1, value_arrays, v, value_codes)),
    ]
    for which, run in either:
        lanes.when((block & 1).equals(which), u32(0), run)


def _copy(p: encoding.Problem, source: Pointer, target: Pointer) -> None:
    """A row, a word a thread."""
    thread = lanes.thread()
    with lanes.do_when(thread < p.row_bytes // 4):
        lanes.store(at(target, thread << 2), lanes.load(at(source, thread << 2), 1))

"""`group_int_append` as one Mosaic GPU kernel, in place: a block for the key and one for the value of every row and
head.

Most blocks find no whole group and copy their token into the ring. Where there is one, the block brings it into shared
memory, finds its scales and zeros and leaves them there, too, and makes the words of the codes one a thread, from the
sixteen bytes of elements or more that each stands for.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int32, UInt8

from pallas_kernels.group_int import LARGEST, TILE, Layout
from pallas_kernels.mosaic_gpu import lanes
from pallas_kernels.mosaic_gpu.decode_attention import SHARED_BYTES, dtype_of, operand_of
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg, at, f32, u32

_WARPGROUPS = 2
_CHUNK = 32  # channels of which a group of them has a whole number


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static."""

    layout: Layout
    element: str  # of the rings: "bf16", "f16" or "f32"
    heads: int
    window: int
    tokens: int  # coded slots
    sink: int
    warpgroups: int

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def pair_bytes(self) -> int:
        """Of two neighbouring elements."""
        return 8 if self.element == "f32" else 4

    @property
    def row_bytes(self) -> int:
        return self.layout.dim // 2 * self.pair_bytes

    @property
    def group_bytes(self) -> int:
        return self.layout.token_group * self.row_bytes

    @property
    def slices(self) -> int:
        """Shares of a group's tokens in which the ranges of its channels are found."""
        return self.threads // (self.layout.dim // 2)

    @property
    def shared_bytes(self) -> int:
        """The group; what codes are made with (of keys, before it, the slices' ranges), float32."""
        layout = self.layout
        return self.group_bytes + max(16 * self.threads, 8 * layout.token_group * layout.parts)


def group_int_append(
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    positions: Int32[Array, "B"],
    ring_keys: Float[Array, "B H W D"],
    ring_values: Float[Array, "B H W D"],
    key_codes: UInt8[Array, "B H tiles bytes"],
    key_scale_zero: Float16[Array, "B H groups kscales"],
    value_codes: UInt8[Array, "B H tiles bytes"],
    value_scale_zero: Float16[Array, "B H tiles vscales"],
    *,
    layout: Layout,
    sink: int = 0,
    sinks: tuple[Array, Array] | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """`pallas_kernels.group_int_append` for layouts in the order of lanes."""
    batch, heads, _ = k.shape
    if interpret:
        raise NotImplementedError("group_int_append: mosaic_gpu has no interpret mode")
    element = {"float32": "f32"}.get(jnp.dtype(ring_keys.dtype).name, operand_of(ring_keys.dtype))
    p = Problem(layout, element, heads, ring_keys.shape[2], key_codes.shape[2] * TILE, sink, _WARPGROUPS)
    served = layout.for_lanes and element in ("bf16", "f16", "f32") and p.tokens and batch * heads
    if not served or p.shared_bytes > SHARED_BYTES:
        raise NotImplementedError(
            "group_int_append: the mosaic_gpu kernel serves D of 64 or 128, 1, 2 or 4 bits, groups of whole 32 tokens "
            f"and channels that fit into shared memory, and a cache with a coded slot, not {layout}"
        )
    kept = list(sinks) if sinks and sink else []
    out = lanes.launch(
        functools.partial(_append, p),
        [k.astype(dtype_of(element)), v.astype(dtype_of(element)), positions],
        [],
        in_place=[ring_keys, ring_values, key_codes, key_scale_zero, value_codes, value_scale_zero, *kept],
        blocks=2 * batch * heads,
        warpgroups=p.warpgroups,
        shared_bytes=p.shared_bytes,
        name="group_int_append",
    )
    return tuple(out) if kept else (*out, *(sinks or ()))


def _append(p: Problem, *rest: Any) -> None:
    """Block 2 row + side: side 0 is the key, 1 the value, of row batch * heads + head."""
    k, v, positions, *written, shared, block = rest
    rings, coded, sinks = written[:2], (written[2:4], written[4:6]), written[6:]
    row = block >> 1
    position = lanes.load(at(positions, (row // p.heads) << 2), 1)[0]
    group = p.layout.token_group
    # Tokens that have left the window; below 0 it wraps round to far above `tokens`.
    count = position + 1 - (p.window - group + 1 + p.sink)
    whole = (count - 1 < p.tokens) & (count % group).equals(0)

    def side(which: int, _: Reg) -> Reg:
        fresh = at((k, v)[which], lanes.wide_product(row, p.row_bytes))
        ring = at(rings[which], lanes.wide_product(row, p.window * p.row_bytes))

        def encode(_: Reg) -> Reg:
            first = count - group
            _gather(p, ring, fresh, first + p.sink, shared)
            codes, scale_zero = coded[which]
            layout = p.layout
            if which == 0:
                _fit_keys(p, _place(p, scale_zero, row, first, group, 4 * layout.dim), shared)
            else:
                _fit_values(p, _place(p, scale_zero, row, first, TILE, 4 * TILE * layout.parts), shared)
            lanes.barrier()
            _encode(p, which == 1, _place(p, codes, row, first, TILE, layout.tile_bytes), shared)
            return u32(0)

        lanes.when(whole, u32(0), encode)
        _copy(p, fresh, at(ring, position % p.window * p.row_bytes))
        if sinks:
            with lanes.do_when(position < p.sink):
                slot = row * p.sink + position.minimum(p.sink - 1)
                _copy(p, fresh, at(sinks[which], lanes.wide_product(slot, p.row_bytes)))

        return u32(0)

    for which in (0, 1):
        lanes.when((block & 1).equals(which), u32(0), functools.partial(side, which))


def _place(p: Problem, array: Pointer, row: Reg, token: Reg, tokens: int, size: int) -> Pointer:
    """Where `token` of a row begins, of every `tokens` of which an array has `size` bytes."""
    return at(array, lanes.wide_product(row, p.tokens // tokens * size), lanes.wide_product(token // tokens, size))


def _copy(p: Problem, source: Pointer, target: Pointer) -> None:
    """A token, 16 bytes a thread."""
    thread = lanes.thread()
    with lanes.do_when(thread < p.row_bytes // 16):
        lanes.store(at(target, thread << 4), lanes.load(at(source, thread << 4), 4))


def _gather(p: Problem, ring: Pointer, fresh: Pointer, first: Reg, shared: Pointer) -> None:
    """The group of tokens from position `first` on, into shared memory."""
    thread, chunks, group = lanes.thread(), p.row_bytes // 16, p.layout.token_group
    held = group - 1 if p.window < group else group  # without a window the last one is the new token
    for i in range(-(-held * chunks // p.threads)):
        chunk = thread + i * p.threads
        with lanes.do_when(chunk < held * chunks):
            source = at(ring, (first + chunk // chunks) % p.window * p.row_bytes, chunk % chunks << 4)
            lanes.store(at(shared, chunk << 4), lanes.load(source, 4))
    if held < group:
        _copy(p, fresh, at(shared, held * p.row_bytes))
    lanes.barrier()


def _pairs(p: Problem, pointer: Pointer, count: int) -> list[list[Reg]]:
    """Elements of shared memory, two neighbours each."""
    words = count * p.pair_bytes // 4
    at_once = min(words, 4)
    held = [word for i in range(0, words, at_once) for word in lanes.load(at(pointer, 4 * i), at_once)]
    if p.element != "f32":
        return [lanes.widen(word, p.element) for word in held]
    return [[a.as_float(), b.as_float()] for a, b in zip(held[::2], held[1::2], strict=True)]


def _scaling(p: Problem, low: Reg, high: Reg) -> tuple[Reg, Reg]:
    """`group_int.fit`: scale and zero of a range, as float16 has them."""
    zero = _rounded(low.maximum(-LARGEST).minimum(LARGEST))
    step = (high - zero) * (1 / (2**p.layout.bits - 1))
    return _rounded(step.maximum(0.0).minimum(LARGEST)), zero


def _rounded(x: Reg) -> Reg:
    return lanes.widen(lanes.pack_pair(x, x, "f16"), "f16")[0]


def _fit_keys(p: Problem, target: Pointer, shared: Pointer) -> None:
    """Scales and zeros of the group's channels, two channels a thread; behind the group in shared memory, what one over
    two scales is and two zeros."""
    layout, thread = p.layout, lanes.thread()
    pairs, each = layout.dim // 2, layout.token_group // p.slices
    pair, part = thread % pairs, thread // pairs
    mine = at(shared, part * (each * p.row_bytes), pair * p.pair_bytes)
    ranges = at(shared, p.group_bytes, pair << 4)
    at_once = math.gcd(8, each)

    def widened(token: Reg, carry: list[Reg]) -> list[Reg]:
        low, high = carry[:2], carry[2:]
        for i in range(at_once):
            (held,) = _pairs(p, at(mine, (token + i) * p.row_bytes), 1)
            low = [a.minimum(x) for a, x in zip(low, held, strict=True)]
            high = [a.maximum(x) for a, x in zip(high, held, strict=True)]
        return [*low, *high]

    (first,) = _pairs(p, mine, 1)
    of_slice = lanes.loop(u32(0), u32(each), at_once, [*first, *first], widened)
    lanes.store(at(ranges, part * (16 * pairs)), of_slice)
    lanes.barrier()
    with lanes.do_when(thread < pairs):
        held = [lanes.load(at(ranges, i * 16 * pairs), 4) for i in range(p.slices)]
        low0, low1, high0, high1 = ([x.as_float() for x in each] for each in zip(*held, strict=True))
        scalings = [
            _scaling(p, lanes.reduce(Reg.minimum, low), lanes.reduce(Reg.maximum, high))
            for low, high in ((low0, high0), (low1, high1))
        ]
        (s0, z0), (s1, z1) = scalings
        # Of a quarter's pairs the even ones stand first.
        quarter, within = thread // (layout.dim // 8), thread % (layout.dim // 8)
        place = quarter * (layout.dim // 8) + (within & 1) * (layout.dim // 16) + (within >> 1)
        lanes.store(at(target, place << 2), [lanes.pack_pair(s0, s1, "f16")])
        lanes.store(at(target, 2 * layout.dim, thread << 2), [lanes.pack_pair(z0, z1, "f16")])
        lanes.store(ranges, [_inverse(s0), _inverse(s1), z0, z1])


def _fit_values(p: Problem, target: Pointer, shared: Pointer) -> None:
    """Scales and zeros of the groups of channels of the group's tokens, one a thread; behind the tokens in shared
    memory, one over a scale and a zero each."""
    layout = p.layout
    chunks, count = -(-layout.channel_group // _CHUNK), layout.token_group * layout.parts
    for i in range(-(-count // p.threads)):
        item = lanes.thread() + i * p.threads
        with lanes.do_when(item < count):
            token, part = item // layout.parts, item % layout.parts
            held = []
            for c in range(chunks):  # the last part may have fewer: then the last chunk again
                chunk = (part * chunks + c).minimum(layout.dim // _CHUNK - 1)
                start = at(shared, token * p.row_bytes, chunk * (_CHUNK // 2 * p.pair_bytes))
                held += [x for pair in _pairs(p, start, _CHUNK // 2) for x in pair]
            scale, zero = _scaling(p, lanes.reduce(Reg.minimum, held), lanes.reduce(Reg.maximum, held))
            lanes.store(at(shared, p.group_bytes, item << 3), [_inverse(scale), zero])
            # Token 8 g + 4 odd + half of a tile is that of row 2 half + odd.
            within = token % TILE
            row = ((within & 3) << 1) + ((within >> 2) & 1)
            place = (token // TILE * layout.parts + part) * (4 * TILE) + (row << 4) + ((within >> 3) << 2)
            lanes.store(at(target, place), [lanes.pack_pair(scale, zero, "f16")])


def _encode(p: Problem, values: bool, target: Pointer, shared: Pointer) -> None:
    """The words of the group's codes in the order of lanes (`group_int.Layout`)."""
    layout = p.layout
    of_tile = layout.dim * layout.bits
    at_once = min(of_tile // 32, 4)
    count = layout.token_group // TILE * of_tile
    fields = 16 // layout.bits
    for i in range(-(-count // p.threads)):
        index = lanes.thread() + i * p.threads
        with lanes.do_when(index < count):
            tile, rest = index // of_tile, index % of_tile
            lane = rest // at_once % 32
            first = (rest // (32 * at_once) * at_once + rest % at_once) * fields
            word = u32(0)
            for field in range(fields):
                token, pair = (_value_at if values else _key_at)(layout, lane, first + field)
                token = tile * TILE + token
                ((a, b),) = _pairs(p, at(shared, token * p.row_bytes, pair * p.pair_bytes), 1)
                if values:
                    part = pair // (layout.channel_group // 2)
                    held = lanes.load(at(shared, p.group_bytes, (token * layout.parts + part) << 3), 2)
                    held = [held[0], held[0], held[1], held[1]]
                else:
                    held = lanes.load(at(shared, p.group_bytes, pair << 4), 4)
                inverse0, inverse1, zero0, zero1 = (x.as_float() for x in held)
                low, high = _code(p, a, inverse0, zero0), _code(p, b, inverse1, zero1)
                word = word | (low << (field * layout.bits)) | (high << (16 + field * layout.bits))
            lanes.store(at(target, index << 2), [word])


def _inverse(scale: Reg) -> Reg:
    return lanes.divide(f32(1.0), (scale > 0.0).where(scale, f32(1.0)))


def _code(p: Problem, x: Reg, inverse: Reg, zero: Reg) -> Reg:
    """`group_int.quantise`."""
    steps = (x - zero) * inverse
    return lanes.to_integer(steps.maximum(0.0).minimum(float(2**p.layout.bits - 1)))


def _key_at(layout: Layout, lane: Reg, pair: Reg) -> tuple[Reg, Reg]:
    """Which token of a tile, and which pair of its channels, a lane's pair of codes is of."""
    r, j = lane >> 2, lane & 3
    of_token = layout.dim // 8
    return (pair // of_token << 3) + (r >> 1) + ((r & 1) << 2), j * of_token + pair % of_token


def _value_at(layout: Layout, lane: Reg, pair: Reg) -> tuple[Reg, Reg]:
    """The same of values."""
    r, j = lane >> 2, lane & 3
    run, within = pair // (layout.dim // 16), pair % (layout.dim // 16)
    return (run << 2) + j, (within >> 1 << 4) + (r << 1) + (within & 1)

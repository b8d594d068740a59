"""Runs kernels written with `pallas_kernels.mosaic_gpu.lanes` on a CPU: the same names, in numpy.

A warp is a Python thread, a register an array over its 32 lanes. What a device leaves undefined fails here: accesses
out of bounds or not aligned, warps that touch the same bytes with no barrier between (one of them writing), exchanges
between lanes that are not all there. Memory that nobody wrote holds noise. Slow, so for small shapes only.
"""

import contextlib
import functools
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import mosaic_gpu as plain
from pallas_kernels.group_int_append import mosaic_gpu as group_int_append
from pallas_kernels.group_int_decode_attention import mosaic_gpu as group_int
from pallas_kernels.mosaic_gpu import lanes
from pallas_kernels.nuq_decode_attention import mosaic_gpu as nuq
from pallas_kernels.rms_norm import mosaic_gpu as norm
from pallas_kernels.vq_append import mosaic_gpu as _append  # noqa: F401 - for `install`
from pallas_kernels.vq_decode_attention import mosaic_gpu as attention
from pallas_kernels.vq_encode import mosaic_gpu as encoding

LANES = 32
MULTIPROCESSORS = 5
_BARRIERS = 10**6  # more than a block has
_local = threading.local()


class Memory:
    """Bytes, and for each the warp that last wrote and read it, and between which barriers (-2: several warps)."""

    def __init__(self, content, writable=True):
        self.content, self.writable = content, writable
        if writable:
            self.lock = threading.Lock()
            self.wrote, self.read = (np.full((2, content.size), -1) for _ in range(2))  # fmt: skip - rows: epoch, warp

    def load(self, places):
        if self.writable:
            with self.lock:
                epoch, warp = self.wrote[:, places]
                assert not ((epoch == _local.epoch) & (warp != _local.warp)).any(), "read after a write, no barrier"
                epoch, warp = self.read[:, places]
                several = (epoch == _local.epoch) & (warp != _local.warp)
                self.read[1, places] = np.where(several, -2, _local.warp)
                self.read[0, places] = _local.epoch
        return self.content[places]

    def store(self, places, values):
        assert self.writable, "a store into an input"
        with self.lock:
            epoch, warp = self.read[:, places]
            assert not ((epoch == _local.epoch) & (warp != _local.warp)).any(), "write after a read, no barrier"
            epoch, warp = self.wrote[:, places]
            clash = (epoch == _local.epoch) & (warp != _local.warp) & (self.content[places] != values)
            assert not clash.any(), "two warps write different values, no barrier"
            self.content[places] = values
            assert (self.content[places] == values).all(), "two lanes write different values"
            self.wrote[0, places], self.wrote[1, places] = _local.epoch, _local.warp


class Pointer:
    """`offset` is an int or an int64 of each lane."""

    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory, offset


class Reg(lanes.Reg):  # annotations stay true
    def __init__(self, value):
        self.value = value

    def _with(self, other, operation):
        other = other.value if isinstance(other, Reg) else np.full(LANES, other, self.value.dtype)
        assert other.dtype == self.value.dtype, (other.dtype, self.value.dtype)
        with np.errstate(over="ignore"):
            return Reg(operation(self.value, other))

    def __add__(self, other):
        return self._with(other, np.add)

    def __sub__(self, other):
        return self._with(other, np.subtract)

    def __mul__(self, other):
        return self._with(other, np.multiply)

    def __truediv__(self, other):
        return self._with(other, np.divide)

    def __and__(self, other):
        return self._with(other, np.bitwise_and)

    def __or__(self, other):
        return self._with(other, np.bitwise_or)

    def __xor__(self, other):
        return self._with(other, np.bitwise_xor)

    def __lshift__(self, other):
        return self._with(other, np.left_shift)

    def __rshift__(self, other):
        return self._with(other, np.right_shift)

    def __floordiv__(self, other):
        return self._with(other, np.floor_divide)

    def __mod__(self, other):
        return self._with(other, np.remainder)

    def maximum(self, other):
        return self._with(other, np.maximum)

    def minimum(self, other):
        return self._with(other, np.minimum)

    def __lt__(self, other):
        return self._with(other, np.less)

    def __le__(self, other):
        return self._with(other, np.less_equal)

    def __gt__(self, other):
        return self._with(other, np.greater)

    def equals(self, other):
        return self._with(other, np.equal)

    def differs(self, other):
        return self._with(other, np.not_equal)

    def where(self, yes, no):
        return Reg(np.where(self.value, yes.value, no.value))

    def as_float(self):
        return Reg(self.value.view(np.float32))

    def as_bits(self):
        return Reg(self.value.view(np.uint32))


def u32(x):
    return Reg(np.full(LANES, x, np.uint32))


def f32(x):
    return Reg(np.full(LANES, x, np.float32))


def thread():
    return Reg((_local.warp * LANES + np.arange(LANES)).astype(np.uint32))


def warp():
    _whole_warp()  # a device asks lane 0 for it
    return u32(_local.warp)


def barrier():
    assert _local.active.all(), "a barrier where some lanes do not come"
    _local.barrier.wait(timeout=60)
    _local.epoch += 1


def _whole_warp():
    assert _local.active.all() or not _local.active.any(), "an exchange between lanes that are not all there"


# -- instructions


def _bytes(*registers):
    return np.stack([r.value for r in registers], -1).astype(np.uint32).view(np.uint8).reshape(LANES, -1)


def bytes_of(low, high, selector):
    selector = selector if isinstance(selector, Reg) else u32(selector)
    chosen = [(selector.value >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)]
    assert all((c < 8).all() for c in chosen)
    return Reg(np.take_along_axis(_bytes(low, high), np.stack(chosen, -1).astype(np.int64), 1).view(np.uint32)[:, 0])


def funnel_right(low, high, count):
    count = count.value if isinstance(count, Reg) else np.full(LANES, count)
    assert (count < 32).all()
    wide = low.value.astype(np.uint64) | high.value.astype(np.uint64) << np.uint64(32)
    return Reg((wide >> count.astype(np.uint64)).astype(np.uint32))


def exp2(x):
    with np.errstate(over="ignore", under="ignore"):
        return Reg(np.exp2(x.value))


def log2(x):
    with np.errstate(divide="ignore"):
        return Reg(np.log2(x.value))


def rsqrt(x):
    return Reg(1 / np.sqrt(x.value))


def divide(a, b):
    return a / b


def multiply_add(a, b, c):
    return a * b + c


def _half(kind):
    return {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[kind]


def multiply_add_pair(a, b, c, kind):
    x, y, z = (r.value.view(_half(kind)).astype(np.float64) for r in (a, b, c))
    return Reg((x * y + z).astype(_half(kind)).view(np.uint32))


def pack_pair(low, high, kind):
    pair = np.stack([low.value, high.value], -1).astype(_half(kind))
    return Reg(pair.view(np.uint32)[:, 0])


def widen(word, kind):
    wide = word.value.view(_half(kind)).astype(np.float32).reshape(LANES, 2)
    return [Reg(wide[:, 0].copy()), Reg(wide[:, 1].copy())]


def widen_fp8(word):
    wide = word.value.view(np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(LANES, 4).astype(np.float16).view(np.uint32)
    return [Reg(wide[:, 0].copy()), Reg(wide[:, 1].copy())]


def transpose_8x8(x):
    _whole_warp()
    return Reg(x.value.view(np.uint16).reshape(8, 8).T.copy().view(np.uint32).reshape(LANES))


def mma(c, a, b, kind):
    _whole_warp()

    def halves(register):  # [row, column]
        return register.value.view(_half(kind)).astype(np.float32).reshape(8, 8)

    left = np.block([[halves(a[0]), halves(a[2])], [halves(a[1]), halves(a[3])]])
    right = np.concatenate([halves(b[0]).T, halves(b[1]).T])
    out = left @ right
    top, bottom = out[:8].reshape(LANES, 2), out[8:].reshape(LANES, 2)
    return [Reg(old.value + new) for old, new in zip(c, (*top.T, *bottom.T), strict=True)]


def to_integer(x):
    assert (abs(x.value[_local.active]) < 2.0**31).all(), "an integer that does not fit"
    return Reg(np.rint(np.where(_local.active, x.value, 0)).astype(np.int32).view(np.uint32))


def from_integer(x):
    return Reg(x.value.view(np.int32).astype(np.float32))


def largest(x):
    _whole_warp()
    return Reg(np.full(LANES, x.value.max()))


def exchange(x, distance):
    _whole_warp()
    return Reg(x.value[np.arange(LANES) ^ distance])


def from_below(x, distance):
    _whole_warp()
    lane = np.arange(LANES)
    return Reg(x.value[np.where(lane < distance, lane, lane - distance)])


def of_lane(x, lane):
    _whole_warp()
    return Reg(np.full(LANES, x.value[lane]))


def any_lane(p):
    _whole_warp()
    return Reg(np.full(LANES, p.value.any()))


def count_lanes(p):
    _whole_warp()
    return u32(int(p.value.sum()))


# -- memory


def at(pointer, *offsets):
    for offset in offsets:
        offset = offset.value.astype(np.int64) if isinstance(offset, Reg) else offset
        pointer = Pointer(pointer.memory, pointer.offset + offset)
    return pointer


def wide_product(a, factor):
    return a.value.astype(np.int64) * factor


def _places(pointer, count):
    offsets = np.broadcast_to(np.asarray(pointer.offset, np.int64), LANES)
    active = offsets[_local.active]
    assert (active % (4 * count) == 0).all(), f"{count} words at {active}"
    size = pointer.memory.content.size
    assert (active >= 0).all() and (active + 4 * count <= size).all(), (active, size)
    return active[:, None] + np.arange(4 * count)


def load(pointer, count):
    words = np.zeros((LANES, count), np.uint32)
    words[_local.active] = pointer.memory.load(_places(pointer, count)).view(np.uint32)
    return [Reg(words[:, i].copy()) for i in range(count)]


def load_stream(pointer, offset, count):
    return load(at(pointer, offset), count)


def store(pointer, words):
    values = np.stack([word.value.view(np.uint32) for word in words], -1).view(np.uint8)
    pointer.memory.store(_places(pointer, len(words)), values[_local.active])


def add_shared(pointer, value):
    places = _places(pointer, 1)
    for place, number in zip(places, value.value[_local.active], strict=True):
        held = pointer.memory.load(place[None]).view(np.uint32)
        with np.errstate(over="ignore"):
            pointer.memory.store(place[None], (held + number).view(np.uint8))


def sync_warp():
    _whole_warp()


# -- control flow


def _same(register):
    """The value in the active lanes, which must agree; None without any."""
    values = register.value[_local.active]
    assert (values == values[:1]).all(), "a condition that differs between lanes"
    return values[0].item() if values.size else None


def loop(first, end, step, carry, body):
    first, end = _same(first), _same(end)
    for i in range(first or 0, end or 0, step):
        carry = body(u32(i), carry)
    return carry


def when(condition, carry, body):
    return body(carry) if _same(condition) else carry


@contextlib.contextmanager
def do_when(condition):
    before = _local.active
    _local.active = before & condition.value
    yield
    _local.active = before


def reduce(operation, values):
    return functools.reduce(operation, values)


# -- the launch


def launch(body, inputs, out_type, *, in_place=(), blocks, warpgroups, shared_bytes=0, name):
    kinds = [*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in in_place), *out_type]

    def run(*arrays):
        contents = [np.frombuffer(np.asarray(a).tobytes(), np.uint8).copy() for a in arrays]
        rng = np.random.default_rng(0)
        contents += [rng.integers(0, 256, kind.size * kind.dtype.itemsize, np.uint8) for kind in out_type]
        memories = [Memory(content, writable=i >= len(inputs)) for i, content in enumerate(contents)]
        for block in range(blocks):
            shared = [Memory(rng.integers(0, 256, shared_bytes, np.uint8))] if shared_bytes else []
            pointers = [Pointer(memory) for memory in (*memories, *shared)]
            _run_block(body, pointers, block, 4 * warpgroups)
        return [m.view(t.dtype).reshape(t.shape) for m, t in zip(contents[len(inputs) :], kinds, strict=True)]

    return jax.pure_callback(run, kinds, *map(jnp.asarray, (*inputs, *in_place)), vmap_method="sequential")


def _run_block(body, pointers, block, warps):
    barrier, failures = threading.Barrier(warps), []

    def run(warp):
        _local.warp, _local.barrier, _local.active = warp, barrier, np.ones(LANES, bool)
        _local.epoch = block * _BARRIERS
        try:
            body(*pointers, u32(block))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(warp,)) for warp in range(warps)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failures:
        raise failures[0]


def install(monkeypatch):
    """Makes every kernel that is written in lanes run here, as if on a device of few multiprocessors, in blocks of few
    warps: a warp more is as much again to simulate."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda: MULTIPROCESSORS)
    for kernel in (attention, plain, nuq, group_int, group_int_append, encoding, norm):
        for name in ("_WARPGROUPS", "_FEW_WARPGROUPS", "_MANY_WARPGROUPS"):
            monkeypatch.setattr(kernel, name, 1, raising=False)
    names = [name for name in globals() if hasattr(lanes, name) and name not in ("functools", "jax", "jnp", "lanes")]
    simulated = SimpleNamespace(**{name: globals()[name] for name in names})
    for kernel in list(sys.modules.values()):
        if getattr(kernel, "lanes", None) is lanes and kernel.__name__.startswith("pallas_kernels."):
            monkeypatch.setattr(kernel, "lanes", simulated)
            for name in names:
                if hasattr(kernel, name):
                    monkeypatch.setattr(kernel, name, globals()[name])

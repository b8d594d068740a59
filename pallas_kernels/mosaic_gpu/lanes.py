"""One lane's registers, memory and control flow, for kernels inside `plgpu.inline_mgpu`.

A kernel written with these says what each of a warp's 32 lanes does: `Reg` is one 32-bit register of the lane it
runs in, and the rest are the instructions that the kernels need. This is the only module that names JAX's private
modules (the MLIR builders); it was written for JAX 0.11.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, llvm, nvvm, scf
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

Pointer = Any  # an LLVM pointer, to global (address space 1) or shared (3) memory

_GLOBAL = 1
_EVERY_LANE = 0xFFFFFFFF


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _f32() -> ir.Type:
    return ir.F32Type.get()


class Reg:
    """A value of this lane: 32 bits, unsigned or float32, or a truth. Operators take another one or a number."""

    def __init__(self, value: ir.Value):
        self.value = value

    @property
    def is_float(self) -> bool:
        return isinstance(self.value.type, ir.F32Type)

    def _other(self, x: Reg | float) -> ir.Value:
        if isinstance(x, Reg):
            return x.value
        return arith.constant(self.value.type, float(x) if self.is_float else x)

    def _binary(self, other: Reg | float, integer: Callable, floating: Callable | None = None) -> Reg:
        operation = floating if self.is_float else integer
        if operation is None:
            raise TypeError("this operator is for unsigned registers")
        return Reg(operation(self.value, self._other(other)))

    def __add__(self, other):
        return self._binary(other, arith.addi, arith.addf)

    def __sub__(self, other):
        return self._binary(other, arith.subi, arith.subf)

    def __mul__(self, other):
        return self._binary(other, arith.muli, arith.mulf)

    def __truediv__(self, other):
        return Reg(arith.divf(self.value, self._other(other)))

    def __and__(self, other):
        return self._binary(other, arith.andi)

    def __or__(self, other):
        return self._binary(other, arith.ori)

    def __xor__(self, other):
        return self._binary(other, arith.xori)

    def __lshift__(self, other):
        return self._binary(other, arith.shli)

    def __rshift__(self, other):
        return self._binary(other, arith.shrui)

    def __floordiv__(self, other):
        return self._binary(other, arith.divui)

    def __mod__(self, other):
        return self._binary(other, arith.remui)

    def maximum(self, other: Reg | float) -> Reg:
        return self._binary(other, arith.maxui, arith.maxnumf)

    def minimum(self, other: Reg | float) -> Reg:
        return self._binary(other, arith.minui, arith.minnumf)

    def __lt__(self, other):
        return self._compare(other, arith.CmpIPredicate.ult, arith.CmpFPredicate.OLT)

    def __le__(self, other):
        return self._compare(other, arith.CmpIPredicate.ule, arith.CmpFPredicate.OLE)

    def __gt__(self, other):
        return self._compare(other, arith.CmpIPredicate.ugt, arith.CmpFPredicate.OGT)

    def equals(self, other: Reg | float) -> Reg:
        return self._compare(other, arith.CmpIPredicate.eq, arith.CmpFPredicate.OEQ)

    def differs(self, other: Reg | float) -> Reg:
        return self._compare(other, arith.CmpIPredicate.ne, arith.CmpFPredicate.ONE)

    def _compare(self, other, integer, floating) -> Reg:
        if self.is_float:
            return Reg(arith.cmpf(floating, self.value, self._other(other)))
        return Reg(arith.cmpi(integer, self.value, self._other(other)))

    def where(self, yes: Reg, no: Reg) -> Reg:
        """This truth value chooses."""
        return Reg(arith.select(self.value, yes.value, no.value))

    def as_float(self) -> Reg:
        """The same bits."""
        return Reg(arith.bitcast(_f32(), self.value))

    def as_bits(self) -> Reg:
        """The same bits."""
        return Reg(arith.bitcast(_i32(), self.value))


def u32(x: int) -> Reg:
    return Reg(arith.constant(_i32(), x))


def f32(x: float) -> Reg:
    return Reg(arith.constant(_f32(), x))


def thread() -> Reg:
    """This thread's number in its block."""
    return Reg(utils.thread_idx())


def warp() -> Reg:
    """This warp's number in its block; all lanes must ask for it together."""
    return Reg(utils.warp_idx())


def barrier() -> None:
    """Every thread of the block has come here, and sees what the others stored before."""
    gpu.barrier()


# -- instructions


def asm(ptx: str, constraints: str, results: Sequence[str], *args: Any, volatile: bool = False) -> Any:
    """Inline PTX with results of kinds "r" (unsigned) and "f" (float32) -> a Reg, a list of them, or None."""
    types = [_f32() if kind == "f" else _i32() for kind in results]
    if len(types) == 1:
        returned = types[0]
    else:
        returned = llvm.StructType.get_literal(types) if types else ir.Type.parse("!llvm.void")
    constraints = ",".join([*(f"={kind}" for kind in results), *filter(None, [constraints])])
    values = [arg.value if isinstance(arg, Reg) else arg for arg in args]
    out = llvm.inline_asm(returned, values, ptx, constraints, has_side_effects=volatile)
    if len(types) == 1:
        return Reg(out)
    return [Reg(llvm.extractvalue(kind, out, [i])) for i, kind in enumerate(types)] if types else None


def bytes_of(low: Reg, high: Reg, selector: Reg | int) -> Reg:
    """Four of the eight bytes of (low, high), named by the selector's nibbles, lowest first (PTX `prmt`)."""
    if isinstance(selector, int):
        return asm("prmt.b32 $0, $1, $2, $3;", "r,r,n", "r", low, high, u32(selector))
    return asm("prmt.b32 $0, $1, $2, $3;", "r,r,r", "r", low, high, selector)


def funnel_right(low: Reg, high: Reg, count: Reg | int) -> Reg:
    """The low word of (high, low) >> count, count below 32."""
    count = u32(count) if isinstance(count, int) else count
    return asm("shf.r.wrap.b32 $0, $1, $2, $3;", "r,r,r", "r", low, high, count)


def exp2(x: Reg) -> Reg:
    return asm("ex2.approx.ftz.f32 $0, $1;", "f", "f", x)


def log2(x: Reg) -> Reg:
    return asm("lg2.approx.ftz.f32 $0, $1;", "f", "f", x)


def rsqrt(x: Reg) -> Reg:
    return asm("rsqrt.approx.ftz.f32 $0, $1;", "f", "f", x)


def divide(a: Reg, b: Reg) -> Reg:
    """a / b of float32 as XLA divides on a GPU: off by two of the last bits at most."""
    return asm("div.full.f32 $0, $1, $2;", "f,f", "f", a, b)


def multiply_add(a: Reg, b: Reg | float, c: Reg) -> Reg:
    b = b if isinstance(b, Reg) else f32(b)
    return Reg(llvm.intr_fma(a.value, b.value, c.value))


def multiply_add_pair(a: Reg, b: Reg, c: Reg, kind: str) -> Reg:
    """a * b + c of two bf16 or f16 a word."""
    return asm(f"fma.rn.{kind}x2 $0, $1, $2, $3;", "r,r,r", "r", a, b, c)


def pack_pair(low: Reg, high: Reg, kind: str) -> Reg:
    """Two float32 rounded to bf16 or f16, in one word."""
    return asm(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", "f,f", "r", high, low)


def widen(word: Reg, kind: str) -> list[Reg]:
    """Two bf16 or f16 as float32, the lower half first."""
    if kind == "bf16":
        return [(word << 16).as_float(), (word & 0xFFFF0000).as_float()]
    ptx = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
    return asm(ptx, "r", "ff", word)


def widen_fp8(word: Reg) -> list[Reg]:
    """Four e4m3 numbers as two words of two f16."""
    ptx = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h;}"
    return asm(ptx, "r", "rr", word)


def transpose_8x8(x: Reg) -> Reg:
    """Of 16-bit elements: lane (row l / 4) held elements 2 (l % 4) and one more of its row, then of its column."""
    return asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "r", "r", x)


def mma(c: Sequence[Reg], a: Sequence[Reg], b: Sequence[Reg], kind: str) -> list[Reg]:
    """c + A B on the tensor cores: A 16 x 16 in four words of bf16 or f16, B 16 x 8 in two, c 16 x 8 in float32.

    Of lane l, r = l / 4, j = l % 4: a = A[r, 2j:], A[r + 8, 2j:], A[r, 2j + 8:], A[r + 8, 2j + 8:]; b = B[2j:, r],
    B[2j + 8:, r]; c = C[r, 2j:], C[r + 8, 2j:]; two neighbours each.
    """
    ptx = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};"
    )
    return asm(ptx, "r,r,r,r,r,r,f,f,f,f", "ffff", *a, *b, *c)


def to_integer(x: Reg) -> Reg:
    """A float32 rounded to a signed integer."""
    return asm("cvt.rni.s32.f32 $0, $1;", "f", "r", x)


def from_integer(x: Reg) -> Reg:
    """A signed integer as float32."""
    return asm("cvt.rn.f32.s32 $0, $1;", "r", "f", x)


def largest(x: Reg) -> Reg:
    """The largest of the warp's lanes."""
    return asm(f"redux.sync.max.u32 $0, $1, {_EVERY_LANE};", "r", "r", x, volatile=True)


def exchange(x: Reg, distance: int) -> Reg:
    """The value of lane l ^ distance."""
    return Reg(utils.shfl_bfly(x.value, distance))


def from_below(x: Reg, distance: int) -> Reg:
    """The value of lane l - distance; the lanes that have none keep theirs."""
    return asm(f"shfl.sync.up.b32 $0, $1, {distance}, 0, {_EVERY_LANE};", "r", "r", x)


def of_lane(x: Reg, lane: int) -> Reg:
    """The value of one lane."""
    return asm(f"shfl.sync.idx.b32 $0, $1, {lane}, 31, {_EVERY_LANE};", "r", "r", x)


def any_lane(p: Reg) -> Reg:
    """Whether p is true in any lane of the warp."""
    return Reg(nvvm.vote_sync(u32(_EVERY_LANE).value, p.value, nvvm.VoteSyncKind.any))


def count_lanes(p: Reg) -> Reg:
    """In how many lanes of the warp p is true."""
    ballot = nvvm.vote_sync(u32(_EVERY_LANE).value, p.value, nvvm.VoteSyncKind.ballot)
    return asm("popc.b32 $0, $1;", "r", "r", Reg(ballot))


# -- memory


def at(pointer: Pointer, *offsets: Reg | int | ir.Value) -> Pointer:
    """A pointer so many bytes further; products that pass 2**32 come from `wide_product`."""
    for offset in offsets:
        if isinstance(offset, int):
            pointer = utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))
            continue
        value = offset.value if isinstance(offset, Reg) else offset
        if pointer.type.address_space == _GLOBAL and value.type == _i32():
            value = arith.extui(_i64(), value)
        pointer = utils.getelementptr(pointer, [value], ir.IntegerType.get_signless(8))
    return pointer


def wide_product(a: Reg, factor: int) -> ir.Value:
    """a * factor in 64 bits, for `at`."""
    return arith.muli(arith.extui(_i64(), a.value), arith.constant(_i64(), factor))


def load_stream(pointer: Pointer, offset: int, count: int) -> list[Reg]:
    """1, 2 or 4 words of global memory that are read once; issued where it stands."""
    if count == 1:
        return [asm(f"ld.global.cs.b32 $0, [$1+{offset}];", "l", "r", pointer, volatile=True)]
    names = ",".join(f"${i}" for i in range(count))
    ptx = f"ld.global.cs.v{count}.b32 {{{names}}}, [${count}+{offset}];"
    return asm(ptx, "l", "r" * count, pointer, volatile=True)


def load(pointer: Pointer, count: int) -> list[Reg]:
    """1, 2 or 4 words, aligned to their size."""
    vector = llvm.load(ir.VectorType.get((count,), _i32()), pointer, alignment=4 * count)
    return [Reg(llvm.extractelement(vector, u32(i).value)) for i in range(count)]


def store(pointer: Pointer, words: Sequence[Reg]) -> None:
    """1, 2 or 4 words, aligned to their size."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(words),), words[0].value.type))
    for i, word in enumerate(words):
        vector = llvm.insertelement(vector, word.value, u32(i).value)
    llvm.store(vector, pointer, alignment=4 * len(words))


def add_shared(pointer: Pointer, value: Reg) -> None:
    """Adds an integer to one in shared memory, whatever other lanes add to it. (Of float32 it would be a slow loop.)"""
    asm("red.shared.add.u32 [$0], $1;", "r,r", "", Reg(llvm.ptrtoint(_i32(), pointer)), value, volatile=True)


def sync_warp() -> None:
    """All lanes of the warp have come here, and see what the others stored before."""
    asm(f"bar.warp.sync {_EVERY_LANE};", "", "", volatile=True)


# -- control flow; a carry is any pytree of Regs


def _is_reg(x: Any) -> bool:
    return isinstance(x, Reg)


def loop(first: Reg, end: Reg, step: int, carry: Any, body: Callable[[Reg, Any], Any]) -> Any:
    """carry = body(i, carry) for i = first, first + step, ... below end."""
    leaves, tree = jax.tree.flatten(carry, is_leaf=_is_reg)
    operation = scf.ForOp(first.value, end.value, u32(step).value, [leaf.value for leaf in leaves])
    with ir.InsertionPoint(operation.body):
        out = body(Reg(operation.induction_variable), tree.unflatten(map(Reg, operation.inner_iter_args)))
        scf.yield_([leaf.value for leaf in jax.tree.leaves(out, is_leaf=_is_reg)])
    return tree.unflatten(map(Reg, operation.results))


def when(condition: Reg, carry: Any, body: Callable[[Any], Any]) -> Any:
    """body(carry) where the condition holds, else carry."""
    leaves, tree = jax.tree.flatten(carry, is_leaf=_is_reg)
    operation = scf.IfOp(condition.value, [leaf.value.type for leaf in leaves], has_else=True)
    with ir.InsertionPoint(operation.then_block):
        scf.yield_([leaf.value for leaf in jax.tree.leaves(body(carry), is_leaf=_is_reg)])
    with ir.InsertionPoint(operation.else_block):
        scf.yield_([leaf.value for leaf in leaves])
    return tree.unflatten(map(Reg, operation.results))


def do_when(condition: Reg) -> Any:
    """A context in which what is written happens only where the condition holds."""
    return utils.when(condition.value)


def reduce(operation: Callable[[Reg, Reg], Reg], values: Sequence[Reg]) -> Reg:
    return functools.reduce(operation, values)


# -- the launch


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What distinguishes a launch but for its arrays."""

    body: Callable[..., None]
    settings: tuple[Any, ...]  # the body's first arguments
    out_type: tuple[Any, ...]
    blocks: int
    warpgroups: int
    shared_bytes: int
    name: str


def launch(
    body: functools.partial[None],
    inputs: Sequence[jax.Array],
    out_type: Sequence[Any],
    *,
    in_place: Sequence[jax.Array] = (),
    blocks: int,
    warpgroups: int,
    shared_bytes: int = 0,
    name: str,
) -> list[jax.Array]:
    """Runs body(*inputs, *in_place, *outputs, shared memory if any, block) in `blocks` blocks of `warpgroups` x 128
    threads -> the arrays of `in_place` as the body left them, and the outputs.

    The body gets pointers to global memory and to the block's shared memory. What it does not store stays as it was in
    arrays of `in_place` and undefined in outputs. XLA copies an array of `in_place` only if it is used afterwards.
    Blocks may be started while the kernel before still runs, and wait for it: that hides most of a launch.

    `body` is a `functools.partial` of a function and hashable settings: equal launches (those of a model's layers) are
    traced and lowered once.
    """
    assert not body.keywords
    key = _Launch(body.func, body.args, tuple(out_type), blocks, warpgroups, shared_bytes, name)
    return _launch(key, list(inputs), list(in_place))


@functools.partial(jax.jit, static_argnums=0)
def _launch(key: _Launch, inputs: list[jax.Array], in_place: list[jax.Array]) -> list[jax.Array]:
    references = len(inputs) + len(in_place) + len(key.out_type) + bool(key.shared_bytes)
    shared = [plgpu.SMEM((-(-key.shared_bytes // 4),), jnp.uint32)] if key.shared_bytes else []

    def kernel(*refs: Any) -> None:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()

        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * references, plgpu.Layout.WG_SPLAT))
        def run(_context: Any, *args: Any) -> None:
            pointers = [utils.memref_ptr(ref) for ref in args[:-1]]
            # A generic address would make loads slow.
            on_device = llvm.PointerType.get(_GLOBAL)
            last = references - len(shared)
            pointers[:last] = [llvm.addrspacecast(on_device, pointer) for pointer in pointers[:last]]
            key.body(*key.settings, *pointers, Reg(args[-1].registers.item()))

        # As an argument, not read inside: `vmap` then adds an axis to the grid.
        run(*refs, lax.axis_index("block"))

    changed = [jax.new_ref(array) for array in in_place]
    outputs = plgpu.kernel(
        kernel,
        out_type=key.out_type,
        scratch_types=shared,
        grid=(key.blocks,),
        grid_names=("block",),
        num_threads=key.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=key.name,
    )(*inputs, *changed)
    return [*map(jax.freeze, changed), *outputs]

"""The Walsh-Hadamard transform as a Pallas kernel for NVIDIA GPUs (Triton lowering).

A tile is R rows, loaded as D / 128 blocks of 128 columns (one block of D columns where D <= 128):

- within a block, a tensor-core product with the +-1 matrix. Its entries are exact in bfloat16, so a bfloat16
  input takes one product, and a float32 input three, over its three bfloat16 digits: every product is exact,
  and only the float32 sums round;
- between blocks, a butterfly of float32 additions: H_(a 128) = H_a (x) H_128.

Programs are persistent: each makes the +-1 matrix once and walks over the tiles with a stride.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels import dispatch

_BLOCK = 128  # columns of one tensor-core product
_SMALLEST, _LARGEST = 16, 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is shaped."""

    rows: int  # rows per tile
    programs: int  # persistent programs
    num_warps: int
    num_stages: int


def hadamard(x: Float[Array, "*rows D"], *, interpret: bool = False) -> Float[Array, "*rows D"]:
    """`pallas_kernels.hadamard` for D from 16 to 1024."""
    size = x.shape[-1]
    if not _SMALLEST <= size <= _LARGEST:
        raise NotImplementedError(f"hadamard: the triton kernel serves D {_SMALLEST} to {_LARGEST}, not {size}")
    rows = x.size // size
    if rows == 0:
        return x
    config = choose_config(rows, size)
    y = pl.pallas_call(
        functools.partial(_kernel, rows=rows, config=config),
        grid=(config.programs,),
        out_shape=jax.ShapeDtypeStruct((rows, size), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="hadamard",
    )(x.reshape(rows, size))
    return y.reshape(x.shape)


def choose_config(rows: int, size: int) -> Config:
    """About 8k elements a tile keeps the float32 sums in registers; more programs than run at once even out."""
    tile = max(16, min(64, 8192 // size))
    programs = min(pl.cdiv(rows, tile), 16 * dispatch.multiprocessors())
    return Config(rows=tile, programs=programs, num_warps=4, num_stages=2)


def signs(first: Array, second: Array) -> Array:
    """(-1)^popcount(i & j) in bfloat16, for indices first[i] and second[j]."""
    parity = lax.population_count(first[:, None] & second[None, :]) & 1
    return (1 - 2 * parity).astype(jnp.bfloat16)


def digits(x: Array) -> list[Array]:
    """bfloat16 arrays whose sum is x: x itself, or the three digits of a float32."""
    if x.dtype == jnp.bfloat16:
        return [x]
    rest, parts = x.astype(jnp.float32), []
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16))
        rest = rest - parts[-1].astype(jnp.float32)
    return parts


def dot(a: Array, b: Array) -> Array:
    """A product of bfloat16 arrays with float32 sums."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _kernel(x_ref, y_ref, *, rows: int, config: Config):
    size = x_ref.shape[1]
    block = min(size, _BLOCK)
    index = jnp.arange(block)
    matrix = signs(index, index)
    program = pl.program_id(0)

    def transform_tile(i, carry):
        start = (program + i * config.programs) * config.rows
        mask = (start + jnp.arange(config.rows) < rows)[:, None]
        at = [(pl.ds(start, config.rows), pl.ds(c * block, block)) for c in range(size // block)]
        blocks = [_within_block(plt.load(x_ref.at[a], mask=mask, other=0), matrix) for a in at]
        for a, y in zip(at, _between_blocks(blocks), strict=True):
            plt.store(y_ref.at[a], (y * (1 / math.sqrt(size))).astype(y_ref.dtype), mask=mask)
        return carry

    tiles = pl.cdiv(rows, config.rows)
    lax.fori_loop(0, (tiles - program + config.programs - 1) // config.programs, transform_tile, 0)


def _within_block(x: Float[Array, "R block"], matrix: Array) -> Float[Array, "R block"]:
    return functools.reduce(jnp.add, [dot(part, matrix) for part in reversed(digits(x))])


def _between_blocks(blocks: list[Array]) -> list[Array]:
    stride = 1
    while stride < len(blocks):
        blocks = [
            blocks[i ^ stride] - blocks[i] if i & stride else blocks[i] + blocks[i ^ stride] for i in range(len(blocks))
        ]
        stride *= 2
    return blocks

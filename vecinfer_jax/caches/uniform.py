"""Uniform quantisation by minimum and maximum, in packed codes: what the integer methods share.

x is read back as zero + code * scale, with code in 0 .. 2^bits - 1. Scale and zero take 16 bits each, as float16
whatever the model's dtype is: bfloat16 would keep 8 bits of a zero that may be many steps large. Where keys or values
exceed float16's range (65,504), scale and zero stay at its end and what is read back is wrong but finite.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, UInt8

from pallas_kernels import packing
from vecinfer_jax.errors import InputError

LARGEST = 65504.0
BITS_OF_SCALE_AND_ZERO = 32


class Scaling(NamedTuple):
    """How codes are read back; both float16, of shapes that broadcast against the codes."""

    scale: Float16[Array, "..."]
    zero: Float16[Array, "..."]


def fit(x: Float[Array, "..."], axis: int, bits: int) -> Scaling:
    """The range of x along an axis (kept, with length 1) in 2^bits - 1 steps. Where all x are equal, scale is 0."""
    x = x.astype(jnp.float32)
    zero = jnp.clip(jnp.min(x, axis=axis, keepdims=True), -LARGEST, LARGEST).astype(jnp.float16)
    span = jnp.max(x, axis=axis, keepdims=True) - zero.astype(jnp.float32)
    scale = jnp.clip(span / (2**bits - 1), 0.0, LARGEST).astype(jnp.float16)
    return Scaling(scale, zero)


def encode(x: Float[Array, "*rows n"], scaling: Scaling, bits: int) -> UInt8[Array, "*rows bytes"]:
    """Packed codes of the last axis, nearest to what they are read back as."""
    scale, zero = (part.astype(jnp.float32) for part in scaling)
    steps = (x.astype(jnp.float32) - zero) / jnp.where(scale > 0, scale, 1.0)
    codes = jnp.clip(jnp.round(steps), 0, 2**bits - 1)
    return packing.pack(codes.astype(jnp.int32), bits)


def decode(codes: UInt8[Array, "*rows bytes"], scaling: Scaling, bits: int, count: int) -> Float[Array, "*rows n"]:
    """What `encode` packed, in float32."""
    scale, zero = (part.astype(jnp.float32) for part in scaling)
    return zero + packing.unpack(codes, bits, count).astype(jnp.float32) * scale


def check_bits(method: str, bits: object, choices: tuple[int, ...]) -> None:
    """Raises `InputError` unless `bits` is one of the widths of a method."""
    if bits not in choices:
        raise InputError(f"bits={bits} is not a width of {method}; choose from {', '.join(map(str, choices))}")


def code_bits(head_dim: int, bits: int) -> float:
    """Bits an element's code takes, a token's codes in whole bytes."""
    return 8 * packing.num_bytes(head_dim, bits) / head_dim

"""Uniform quantisation by minimum and maximum (`pallas_kernels.group_int`), in codes packed token by token: what the
integer methods share."""

from jaxtyping import Array, Float, UInt8

from pallas_kernels import packing
from pallas_kernels.group_int import Scaling, dequantise, fit, quantise
from vecinfer_jax.errors import InputError

__all__ = ["BITS_OF_SCALE_AND_ZERO", "Scaling", "check_bits", "code_bits", "decode", "encode", "fit"]

BITS_OF_SCALE_AND_ZERO = 32


def encode(x: Float[Array, "*rows n"], scaling: Scaling, bits: int) -> UInt8[Array, "*rows bytes"]:
    """Packed codes of the last axis, nearest to what they are read back as."""
    return packing.pack(quantise(x, scaling, bits), bits)


def decode(codes: UInt8[Array, "*rows bytes"], scaling: Scaling, bits: int, count: int) -> Float[Array, "*rows n"]:
    """What `encode` packed, in float32."""
    return dequantise(packing.unpack(codes, bits, count), scaling)


def check_bits(method: str, bits: object, choices: tuple[int, ...]) -> None:
    """Raises `InputError` unless `bits` is one of the widths of a method."""
    if bits not in choices:
        raise InputError(f"bits={bits} is not a width of {method}; choose from {', '.join(map(str, choices))}")


def code_bits(head_dim: int, bits: int) -> float:
    """Bits an element's code takes, a token's codes in whole bytes."""
    return 8 * packing.num_bytes(head_dim, bits) / head_dim

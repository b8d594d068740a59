"""Codes of 1 to 16 bits packed into bytes.

Little-endian bit order: bit i of a token's bit string is bit i % 8 of byte i // 8, and code j occupies bits
j * bits to (j + 1) * bits - 1, lowest first. A token takes whole bytes; unused bits at its end are 0. So an
8-bit code is a byte, two 12-bit codes are three bytes and four 10-bit codes are five.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Int, Integer, UInt8

MAX_BITS = 16


def num_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    _check_bits(bits)
    return (count * bits + 7) // 8


def pack(codes: Integer[Array, "*rows codes"], bits: int) -> UInt8[Array, "*rows bytes"]:
    """Pack codes, each in 0 .. 2**bits - 1 (higher bits are dropped).

    Raises:
        ValueError: bits outside 1 .. 16, or codes that are not an integer array with at least one axis.
    """
    _check_bits(bits)
    if codes.ndim == 0 or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"pack: codes must be integers [..., codes], got {codes.dtype}{list(codes.shape)}")
    count = codes.shape[-1]
    if bits == 8:
        return codes.astype(jnp.uint8)
    group, group_bytes = _group(bits)
    codes = codes.astype(jnp.uint32) & (2**bits - 1)
    codes = _grouped(codes, math.ceil(count / group), group)
    words = [_packed_byte(codes, bits, i) for i in range(group_bytes)]
    flat = jnp.stack(words, axis=-1).astype(jnp.uint8)
    flat = flat.reshape(*flat.shape[:-2], flat.shape[-2] * group_bytes)
    return flat[..., : num_bytes(count, bits)]


def unpack(packed: UInt8[Array, "*rows bytes"], bits: int, count: int) -> Int[Array, "*rows codes"]:
    """The first `count` codes of each token, as int32.

    Raises:
        ValueError: bits outside 1 .. 16, or fewer bytes than `count` codes take.
    """
    _check_bits(bits)
    if packed.ndim == 0 or packed.shape[-1] != num_bytes(count, bits):
        raise ValueError(
            f"unpack: {count} codes of {bits} bits take {num_bytes(count, bits)} bytes a token, "
            f"got an array {list(packed.shape)}"
        )
    if bits == 8:
        return packed.astype(jnp.int32)
    group, group_bytes = _group(bits)
    packed = _grouped(packed.astype(jnp.uint32), math.ceil(count / group), group_bytes)
    codes = jnp.stack([_unpacked_code(packed, bits, j) for j in range(group)], axis=-1).astype(jnp.int32)
    codes = codes.reshape(*codes.shape[:-2], codes.shape[-2] * group)
    return codes[..., :count]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"codes have 1 to {MAX_BITS} bits, got bits={bits}")


def _group(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fill whole bytes, and how many bytes those are."""
    codes = 8 // math.gcd(bits, 8)
    return codes, codes * bits // 8


def _grouped(x: Array, groups: int, size: int) -> Array:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * size - x.shape[-1])])
    return x.reshape(*x.shape[:-1], groups, size)


def _packed_byte(codes: Array, bits: int, i: int) -> Array:
    """Byte i of every group: the bits of each code that fall into it."""
    byte = jnp.zeros(codes.shape[:-1], jnp.uint32)
    for j in range(codes.shape[-1]):
        shift = j * bits - 8 * i  # where the code starts, seen from this byte
        if -bits < shift < 8:
            byte |= codes[..., j] << shift if shift >= 0 else codes[..., j] >> -shift
    return byte & 0xFF


def _unpacked_code(packed: Array, bits: int, j: int) -> Array:
    """Code j of every group."""
    code = jnp.zeros(packed.shape[:-1], jnp.uint32)
    for i in range(packed.shape[-1]):
        shift = 8 * i - j * bits
        if -8 < shift < bits:
            code |= packed[..., i] << shift if shift >= 0 else packed[..., i] >> -shift
    return code & (2**bits - 1)

"""Codes of 1 to 16 bits in whole bytes a token, little-endian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import packing
from tests.kernels import oracle

pack = jax.jit(packing.pack, static_argnums=1)
unpack = jax.jit(packing.unpack, static_argnums=(1, 2))


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(1, 16), count=st.integers(1, 40), rows=st.integers(0, 3), seed=st.integers(0, 2**16))
def test_unpack_undoes_pack_for_every_width(bits, count, rows, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count))
    packed = pack(jnp.asarray(codes, jnp.int32), bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (rows, packing.num_bytes(count, bits))
    np.testing.assert_array_equal(packed, oracle.pack(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.int32])
def test_every_integer_dtype_packs_alike(dtype):
    codes = jnp.arange(32).reshape(2, 16) * 7 % 256
    for bits in (8, 10):
        expected = oracle.pack(np.asarray(codes), bits)
        np.testing.assert_array_equal(packing.pack(codes.astype(dtype), bits), expected)


def test_a_token_is_bytes_in_the_documented_order():
    assert packing.pack(jnp.array([0xABC, 0x123]), 12).tolist() == [0xBC, 0x3A, 0x12]
    assert packing.pack(jnp.array([1, 0, 0, 0, 0, 0, 0, 1, 1]), 1).tolist() == [0x81, 0x01]


def test_packing_works_under_jit_and_vmap():
    codes = jnp.arange(64, dtype=jnp.int32).reshape(2, 4, 8) * 61 % 1024
    packed = jax.jit(jax.vmap(lambda c: packing.pack(c, 10)))(codes)
    np.testing.assert_array_equal(jax.vmap(lambda p: packing.unpack(p, 10, 8))(packed), codes)


def test_impossible_widths_and_sizes_are_refused():
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"bits={bits}"):
            packing.pack(jnp.zeros((2, 4), jnp.int32), bits)
    with pytest.raises((ValueError, TypeError), match=r"integers|Type-check"):
        packing.pack(jnp.zeros((2, 4)), 8)
    with pytest.raises(ValueError, match="take 5 bytes"):
        packing.unpack(jnp.zeros((2, 4), jnp.uint8), 10, 4)

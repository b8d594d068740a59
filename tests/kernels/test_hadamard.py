"""The Walsh-Hadamard transform equals its float64 definition.

Bound: 1e-6 of the row's norm from float32 sums, and for 16-bit results one rounding on top (2^-8 for
bfloat16, 2^-11 for float16, relative).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hadamard
from tests.kernels import cases, oracle

ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def check(shape, dtype, **how):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    y = hadamard(x, **how)
    assert y.shape == x.shape and y.dtype == x.dtype
    exact = oracle.float64(x) @ oracle.hadamard_matrix(shape[-1])
    norm = np.linalg.norm(oracle.float64(x), axis=-1, keepdims=True)
    assert (abs(oracle.float64(y) - exact) <= 1e-6 * norm + ROUNDING[dtype] * abs(exact)).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_the_reference_equals_the_definition(size, dtype):
    check((3, 5, size), dtype, implementation="xla")


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(63, 128), (2, 64, 64), (129, 16), (5, 256), (1, 1024), (1, 1, 3, 32)])
def test_the_kernel_equals_the_definition(shape, dtype):
    check(shape, dtype, implementation="triton", interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(0, 128), (1, 16), (1000, 64), (33333, 128), (777, 256), (129, 1024)])
def test_the_kernel_equals_the_definition_on_a_device(shape, dtype):
    check(shape, dtype, implementation="triton")
    check(shape, dtype)


@pytest.mark.parametrize("how", cases.EVERYWHERE, ids=cases.NAMES)
def test_the_transform_is_its_own_inverse(how):
    x = jax.random.normal(jax.random.key(0), (7, 128))
    np.testing.assert_allclose(hadamard(hadamard(x, **how), **how), x, atol=3e-6)


@pytest.mark.parametrize("how", cases.EVERYWHERE, ids=cases.NAMES)
def test_no_rows_give_no_rows(how):
    assert hadamard(jnp.zeros((4, 0, 64), jnp.bfloat16), **how).shape == (4, 0, 64)


def test_sizes_the_kernel_does_not_serve_fall_back_to_the_reference():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    with pytest.raises(NotImplementedError, match="not 8"):
        hadamard(x, implementation="triton", interpret=True)
    np.testing.assert_array_equal(hadamard(x, interpret=True), hadamard(x, implementation="xla"))


def test_what_cannot_be_transformed_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        hadamard(jnp.zeros((2, 96)))
    with pytest.raises((ValueError, TypeError), match=r"cast it|Type-check"):
        hadamard(jnp.zeros((2, 64), jnp.int32))

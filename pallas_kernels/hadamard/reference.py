"""The Walsh-Hadamard transform in plain JAX: one or two small matrix products."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# A product with a 128 x 128 matrix suits every device's matrix unit; larger D is H_a (x) H_128.
_FACTOR = 128


def signs(size: int) -> np.ndarray:
    """The +-1 Walsh-Hadamard matrix in natural (Sylvester) order: (-1)^popcount(i & j)."""
    i = np.arange(size)
    return 1.0 - 2.0 * (np.bitwise_count(i[:, None] & i[None, :]) % 2).astype(np.float32)


def hadamard(x: Float[Array, "*rows D"], *, interpret: bool = False) -> Float[Array, "*rows D"]:
    """The meaning of `pallas_kernels.hadamard`: x @ signs(D) / sqrt(D), in float32."""
    del interpret
    size = x.shape[-1]
    inner = min(size, _FACTOR)
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], size // inner, inner)
    # H_(a b)[(i, j), (k, l)] = H_a[i, k] H_b[j, l] in natural order. Entries are +-1, so products are exact.
    y = jnp.matmul(y, signs(inner), precision=lax.Precision.HIGHEST)
    if size > inner:
        y = jnp.einsum("...il,ik->...kl", y, signs(size // inner), precision=lax.Precision.HIGHEST)
    return (y * (1.0 / math.sqrt(size))).reshape(x.shape).astype(x.dtype)

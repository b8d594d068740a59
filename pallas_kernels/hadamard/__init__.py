"""The normalised Walsh-Hadamard transform (VecInfer, section 3.2: arXiv 2510.06175)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch

_DTYPES = ("float32", "bfloat16", "float16")


def hadamard(
    x: Float[Array, "*rows D"], *, implementation: str | None = None, interpret: bool = False
) -> Float[Array, "*rows D"]:
    """x @ H along the last axis, H the normalised Walsh-Hadamard matrix in natural order (H = H^T, H H = I).

    Products and sums are float32 (or exact), the result is rounded once to x.dtype.

    Args:
        x: any leading shape, no rows included; D a power of two.
        implementation: "triton", "xla", or None for the best on the default device.
        interpret: run the Pallas kernel in interpret mode (on a CPU, for tests).

    Raises:
        ValueError: D is not a power of two, or x is not float32, bfloat16 or float16.
        NotImplementedError: the named implementation does not serve this D.
    """
    if x.ndim == 0 or x.shape[-1] < 1 or x.shape[-1] & (x.shape[-1] - 1):
        raise ValueError(f"hadamard: the last axis must be a power of two, got {x.shape}; pad it with zeros")
    if jnp.dtype(x.dtype).name not in _DTYPES:
        raise ValueError(f"hadamard: x must be one of {_DTYPES}, got {x.dtype}; cast it")
    return dispatch.call("hadamard", implementation, interpret, x)

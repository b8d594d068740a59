"""`rms_norm` in plain JAX."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*rows W"],
    weight: Float[Array, "W"],
    *,
    epsilon: float,
    delta: Float[Array, "*rows W"] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The meaning of `pallas_kernels.rms_norm`."""
    del interpret
    if delta is not None:
        x = x + delta
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return x, weight * normed.astype(x.dtype)

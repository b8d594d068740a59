"""`decode_attention` in plain jax.numpy."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import exact, split_k


def decode_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv S D"],
    values: Float[Array, "B Hkv S D"],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The meaning of `pallas_kernels.decode_attention`."""
    if not keys.shape[2]:  # nothing to take a maximum of
        return jnp.zeros(q.shape, out_dtype), jnp.full(q.shape[:2], split_k.EMPTY)
    valid = jnp.arange(keys.shape[2]) < lengths[:, None]
    output, lse = exact.attend_exactly(q, exact.ExactTokens(keys, values, valid), scale)
    return exact.rounded(output, lse, out_dtype)

"""Queries into the basis of coded keys (VecInfer, section 3.2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.exact import product
from pallas_kernels.hadamard import hadamard as apply_hadamard


def transform_queries(
    q: Float[Array, "B Hq D"],
    scale: Float[Array, "Hkv D"] | None,
    hadamard: bool,
    matrix: Float[Array, "Hkv D D"] | None = None,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B Hq D"]:
    """(q * scale) H, or q times a matrix, of each KV head's group of query heads, in float32, rounded to q's dtype."""
    if matrix is not None:
        grouped = q.astype(jnp.float32).reshape(q.shape[0], matrix.shape[0], -1, q.shape[2])
        return product("bhgi,hij->bhgj", grouped, matrix).reshape(q.shape).astype(q.dtype)
    if scale is None and not hadamard:
        return q
    x = q.astype(jnp.float32)
    if scale is not None:
        x = (x.reshape(q.shape[0], scale.shape[0], -1, q.shape[2]) * scale[:, None]).reshape(q.shape)
    if hadamard:
        x = apply_hadamard(x, implementation=implementation, interpret=interpret)
    return x.astype(q.dtype)

"""Tokens that are attended to as they are, beside the coded ones: a residual window, attention sinks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels import split_k


class ExactTokens(NamedTuple):
    """Keys and values of W tokens (of the model's dtype), and which of them count."""

    keys: Float[Array, "B Hkv W D"]
    values: Float[Array, "B Hkv W D"]
    valid: Bool[Array, "B W"]


def check(
    name: str,
    q: Float[Array, "B Hq D"],
    kv_heads: int,
    exact: Sequence[ExactTokens],
    exact_q: Float[Array, "B Hq D"] | None,
) -> None:
    """Raises ValueError where exact tokens do not belong to the queries of operation `name`."""
    batch, _, dim = q.shape
    missing, wrong = exact_q is None and bool(exact), exact_q is not None and exact_q.shape != q.shape
    if missing or wrong:
        raise ValueError(f"{name}: exact tokens need exact_q of shape {q.shape}")
    for tokens in exact:
        window = tokens.keys.shape[2:3]
        want = (batch, kv_heads, *window, dim)
        if tokens.keys.shape != want or tokens.values.shape != want or tokens.valid.shape != (batch, *window):
            raise ValueError(
                f"{name}: exact keys and values must be [{batch}, {kv_heads}, W, {dim}] and valid [{batch}, W], got "
                f"{tokens.keys.shape}, {tokens.values.shape} and {tokens.valid.shape}"
            )


def merge_exact(
    output: Float[Array, "B Hq D"],
    lse: Float[Array, "B Hq"],
    q: Float[Array, "B Hq D"] | None,
    exact: Sequence[ExactTokens],
    scale: float,
) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
    """Attention over coded tokens joined with that over exact ones: output and log-sum-exp of all, float32."""
    held = [tokens for tokens in exact if tokens.keys.shape[2]]
    if not held or q is None:
        return output, lse
    parts = [(output, lse), *(attend_exactly(q, tokens, scale) for tokens in held)]
    outputs, lses = zip(*parts, strict=True)
    return split_k.merge(jnp.stack(outputs, axis=-2), jnp.stack(lses, axis=-1))


def attend_exactly(
    q: Float[Array, "B Hq D"], tokens: ExactTokens, scale: float
) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
    """One query a sequence over those tokens that count; 0 and `split_k.EMPTY` where none does."""
    batch, query_heads, dim = q.shape
    kv_heads = tokens.keys.shape[1]
    valid = tokens.valid[:, None, None]
    grouped = q.reshape(batch, kv_heads, -1, dim)
    scores = jnp.where(valid, scale * product("bhgd,bhwd->bhgw", grouped, tokens.keys.astype(q.dtype)), split_k.EMPTY)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(valid, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    weights = (weights / safe[..., None]).astype(tokens.values.dtype)
    output = product("bhgw,bhwd->bhgd", weights, tokens.values)
    lse = jnp.where(some, top[..., 0] + jnp.log(safe), split_k.EMPTY)
    return output.reshape(q.shape), lse.reshape(batch, query_heads)


def rounded(output: Float[Array, "B Hq D"], lse: Float[Array, "B Hq"], dtype: Any) -> tuple[Array, Array]:
    """The output in `dtype`."""
    return output.astype(dtype), lse


def product(terms: str, a: Array, b: Array) -> Array:
    """An einsum summed in float32. A CPU cannot multiply all 16-bit operands so: there they are float32, too."""
    if jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(terms, a, b, precision=precision, preferred_element_type=jnp.float32)

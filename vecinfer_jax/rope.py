"""Rotary position embedding (RoPE), accurate at every position a cache can hold.

A float32 angle position * frequency is off by about 0.004 rad at position 131,072 and ten times that at a
million. Rotations compose, so the angle is never formed: cos and sin of a position come from two small tables
made in float64 on the host (position = high * BLOCK + low) and one complex product.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

BLOCK = 2048


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Half-split (rotate_half) rotary embedding of `head_dim` channels.

    `factors` divide the inverse frequencies one by one: it is how GGUF files store Llama 3.1's scaling.
    `max_position` bounds the positions `cos_sin` may be asked for.
    """

    theta: float
    head_dim: int
    scaling: Llama3Scaling | None = None
    factors: tuple[float, ...] | None = None
    max_position: int = 131072

    def inverse_frequencies(self) -> np.ndarray:
        """float64[head_dim / 2], radians per token."""
        inv = self.theta ** -(np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        if self.factors is not None:
            inv = inv / np.asarray(self.factors, np.float64)
        if self.scaling is not None:
            s = self.scaling
            wavelength = 2 * math.pi / inv
            smooth = (s.original_max_position / wavelength - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            smooth = np.clip(smooth, 0.0, 1.0)
            inv = (1 - smooth) * inv / s.factor + smooth * inv
        return inv

    def cos_sin(
        self, positions: Int[Array, "*shape"]
    ) -> tuple[Float32[Array, "*shape half"], Float32[Array, "*shape half"]]:
        """cos and sin of every channel pair at `positions` (0 <= position < max_position)."""
        (low_cos, low_sin), (high_cos, high_sin) = _tables(self)
        low, high = positions % BLOCK, positions // BLOCK
        a, b = jnp.asarray(low_cos)[low], jnp.asarray(low_sin)[low]
        c, d = jnp.asarray(high_cos)[high], jnp.asarray(high_sin)[high]
        return a * c - b * d, a * d + b * c


@functools.lru_cache(maxsize=16)
def _tables(rope: Rope) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    inv = rope.inverse_frequencies()
    low = np.arange(BLOCK)[:, None] * inv
    high = (np.arange(-(-rope.max_position // BLOCK)) * BLOCK)[:, None] * inv
    f32 = np.float32
    return (np.cos(low).astype(f32), np.sin(low).astype(f32)), (
        np.cos(high).astype(f32),
        np.sin(high).astype(f32),
    )


def apply_rope(
    x: Float[Array, "*batch heads D"],
    cos: Float[Array, "*batch half"],
    sin: Float[Array, "*batch half"],
) -> Float[Array, "*batch heads D"]:
    """Rotates each head's channel pairs (i, i + D/2); computed in float32, rounded to x's dtype."""
    x32 = x.astype(jnp.float32)
    left, right = jnp.split(x32, 2, axis=-1)
    c, s = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([left * c - right * s, right * c + left * s], axis=-1).astype(x.dtype)


def invert_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Undoes `apply_rope` (up to rounding)."""
    return apply_rope(x, cos, -sin)

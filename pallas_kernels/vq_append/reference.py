"""`vq_append` as a gather, two encodings and four scatters."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Shaped, UInt8

from pallas_kernels.vq_encode import vq_encode


def vq_append(
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    positions: Int32[Array, "B"],
    ring_keys: Float[Array, "B H W D"],
    ring_values: Float[Array, "B H W D"],
    key_codes: UInt8[Array, "B H S kbytes"],
    value_codes: UInt8[Array, "B H S vbytes"],
    key_codebook: Float[Array, "Hk Kk dk"],
    value_codebook: Float[Array, "Hv Kv dv"],
    *,
    sink: int = 0,
    sinks: tuple[Array, Array] | None = None,
    slots: Int32[Array, "B"] | None = None,
    mean: Float[Array, "H D"] | None = None,
    scale: Float[Array, "H D"] | None = None,
    matrix: Float[Array, "H D D"] | None = None,
    hadamard: bool = False,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The meaning of `pallas_kernels.vq_append`."""
    window = ring_keys.shape[2]
    leaving_k, leaving_v = k, v
    if window:
        at = (positions % window)[:, None, None, None]
        leaving_k, leaving_v = (jnp.take_along_axis(ring, at, axis=2)[:, :, 0] for ring in (ring_keys, ring_values))
        ring_keys, ring_values = (
            _write(ring, new, positions % window) for ring, new in ((ring_keys, k), (ring_values, v))
        )
    slots = positions - window - sink if slots is None else slots
    transform: dict[str, Any] = {"mean": mean, "scale": scale, "matrix": matrix, "hadamard": hadamard}
    how: dict[str, Any] = {"implementation": None if interpret else "xla", "interpret": interpret}
    new_k = vq_encode(leaving_k[:, None], key_codebook, **transform, **how)[:, :, 0]
    new_v = vq_encode(leaving_v[:, None], value_codebook, **how)[:, :, 0]
    written = [_write(held, new, positions) for held, new in zip(sinks or (), (k, v), strict=False)]
    return ring_keys, ring_values, _write(key_codes, new_k, slots), _write(value_codes, new_v, slots), *written


def _write(
    buffer: Shaped[Array, "B H S D"], rows: Shaped[Array, "B H D"], slots: Int[Array, "B"]
) -> Shaped[Array, "B H S D"]:
    """Puts rows[b] into slots[b]; slots outside the buffer are dropped."""
    slots = jnp.where(slots < 0, buffer.shape[2], slots)
    return buffer.at[jnp.arange(buffer.shape[0]), :, slots].set(rows.astype(buffer.dtype), mode="drop")

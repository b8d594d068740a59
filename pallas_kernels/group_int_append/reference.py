"""`group_int_append` as a gather, an encoding of which most is thrown away, and scatters."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int, Int32, Shaped, UInt8

from pallas_kernels.group_int import Layout


def group_int_append(
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    positions: Int32[Array, "B"],
    ring_keys: Float[Array, "B H W D"],
    ring_values: Float[Array, "B H W D"],
    key_codes: UInt8[Array, "B H tiles bytes"],
    key_scale_zero: Float16[Array, "B H groups kscales"],
    value_codes: UInt8[Array, "B H tiles bytes"],
    value_scale_zero: Float16[Array, "B H tiles vscales"],
    *,
    layout: Layout,
    sink: int = 0,
    sinks: tuple[Array, Array] | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The meaning of `pallas_kernels.group_int_append`."""
    del interpret
    window, group = ring_keys.shape[2], layout.token_group
    residual = window - group + 1
    count = positions + 1 - residual - sink  # of tokens that have left the window
    whole = (count > 0) & (count % group == 0)
    slots = count[:, None] - group + jnp.arange(group)
    at = slots + sink

    def leaving(ring: Shaped[Array, "B H W D"], new: Shaped[Array, "B H D"]) -> Shaped[Array, "B H g D"]:
        new = new[:, :, None].astype(ring.dtype)
        if not window:
            return new
        old = jnp.take_along_axis(ring, (at % window)[:, None, :, None], axis=2)
        return jnp.where((at == positions[:, None])[:, None, :, None], new, old)

    def written(held: Array, new: Array, tokens: int) -> Array:
        """`new`, whose every row is of so many tokens, in its place, or nowhere."""
        return _write(held, new, jnp.where(whole[:, None], slots[:, ::tokens] // tokens, -1))

    new_keys = layout.encode_keys(leaving(ring_keys, k))
    new_values = layout.encode_values(leaving(ring_values, v))
    coded = (
        written(key_codes, new_keys[0], layout.tile),
        written(key_scale_zero, new_keys[1], group),
        written(value_codes, new_values[0], layout.tile),
        written(value_scale_zero, new_values[1], layout.tile),
    )

    def placed(held: Any, slot: Int[Array, "B"]) -> list[Array]:
        pairs = zip(held, (k, v), strict=True)
        return [_write(x, new[:, :, None].astype(x.dtype), slot[:, None]) for x, new in pairs]

    rings = placed((ring_keys, ring_values), positions % window) if window else [ring_keys, ring_values]
    return *rings, *coded, *(placed(sinks, positions) if sinks else ())


def _write(
    buffer: Shaped[Array, "B H S W"], rows: Shaped[Array, "B H T W"], slots: Int[Array, "B T"]
) -> Shaped[Array, "B H S W"]:
    """Puts rows[b, :, t] into slots[b, t]; slots outside the buffer are dropped."""
    slots = jnp.where(slots < 0, buffer.shape[2], slots)
    return buffer.at[jnp.arange(buffer.shape[0])[:, None], :, slots].set(rows.swapaxes(1, 2), mode="drop")

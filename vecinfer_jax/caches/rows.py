"""Writing tokens into static-capacity buffers, each sequence at its own slots.

`dynamic_update_slice` clamps a start that is out of range and would silently overwrite the tail, so these are
scatters that drop what falls outside. Whether tokens fit is checked before a step is dispatched
(`vecinfer_jax.generation`).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped


def write_token(
    buffer: Shaped[Array, "B H S D"], token: Shaped[Array, "B H D"], slot: Int[Array, "B"]
) -> Shaped[Array, "B H S D"]:
    """Puts one token a sequence into slot[b]; a slot outside the buffer (-1, say) is dropped."""
    slot = jnp.where(slot < 0, buffer.shape[2], slot)
    rows = jnp.arange(buffer.shape[0])
    return buffer.at[rows, :, slot].set(token.astype(buffer.dtype), mode="drop")


def write_chunk(
    buffer: Shaped[Array, "B H S D"], tokens: Shaped[Array, "B T H D"], slots: Int[Array, "B T"]
) -> Shaped[Array, "B H S D"]:
    """Puts tokens[b, t] into slots[b, t]; slots outside the buffer (-1, say) are dropped, the others distinct."""
    slots = jnp.where(slots < 0, buffer.shape[2], slots)
    rows = jnp.arange(buffer.shape[0])[:, None]
    # Advanced indices on both sides of the head axis put (B, T) first: exactly the layout of `tokens`.
    return buffer.at[rows, :, slots].set(tokens.astype(buffer.dtype), mode="drop")


def read_slots(buffer: Shaped[Array, "B H S D"], start: Int[Array, ""], size: int) -> Shaped[Array, "B H size D"]:
    """Slots start .. start + size - 1, which must be in the buffer."""
    return buffer if size == buffer.shape[2] else lax.dynamic_slice_in_dim(buffer, start, size, axis=2)


def read_ring(size: int, lengths: Int[Array, "B"]) -> Int[Array, "B size"]:
    """Position held by each slot of a ring of the last `size` tokens (position p in slot p % size); -1: none."""
    if size == 0:
        return jnp.zeros((lengths.shape[0], 0), jnp.int32)
    slots = jnp.arange(size)[None, :]
    last = lengths[:, None] - 1
    position = last - (last - slots) % size
    return jnp.where(position >= 0, position, -1)

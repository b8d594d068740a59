"""A decoded token goes into a cache of integers in groups with a residual window (KIVI: arXiv 2402.02750)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int32, UInt8

from pallas_kernels import dispatch
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
    sinks: tuple[Float[Array, "B H sink D"], Float[Array, "B H sink D"]] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """One token a row enters a ring of W tokens; the group of g tokens that it pushes out of the window is encoded.

    The new token's position is p. The window is of the last R = W - g + 1 tokens; behind it, the ring holds those whose
    group is not whole. Where p + 1 - R - sink is a multiple of g above 0, the g tokens up to position p - R are a whole
    group: it goes, as codes, to the slots of those positions, less `sink`, if there are such slots. Then the new token
    takes ring slot p % W, in which the oldest token of such a group stood.

    Args:
        k, v: the new token's key (after RoPE) and value.
        positions: of the new token in each row, 0 or more.
        ring_keys, ring_values: the last W tokens, at least g - 1, position q in slot q % W.
        key_codes, key_scale_zero, value_codes, value_scale_zero: coded tokens as `layout` stores them.
        layout: how they are stored, and g, its `token_group`; static.
        sink: tokens at the start that are never coded.
        sinks: arrays for keys and values of these, position q in slot q, into which the new token goes if it is one.
        implementation: "mosaic_gpu" (layouts in the order of lanes), "xla", or None for the best on the default device.
        interpret: choose what runs on a CPU.

    Returns:
        The rings, codes and scales in the order of the arguments, and the sinks if they were given, with the token in
        them: in place, where the caller lets go of what it gave.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NotImplementedError: the named implementation does not serve this layout.
    """
    if k.ndim != 3 or k.shape[2] != layout.dim:
        raise ValueError(f"group_int_append: k must be [B, H, {layout.dim}], got {list(k.shape)}")
    batch, heads, dim = k.shape
    window, tokens = ring_keys.shape[2], key_codes.shape[2] * layout.tile
    if window < layout.token_group - 1 or tokens % layout.token_group:
        raise ValueError(
            f"group_int_append: a ring of {window} and {tokens} coded tokens do not hold whole groups of "
            f"{layout.token_group}"
        )
    shapes = *layout.key_shapes(tokens), *layout.value_shapes(tokens)
    kind = ring_keys.dtype
    for name, array, shape, dtype in (
        ("v", v, (dim,), v.dtype),
        ("ring_keys", ring_keys, (window, dim), kind),
        ("ring_values", ring_values, (window, dim), kind),
        ("key_codes", key_codes, shapes[0], jnp.uint8),
        ("key_scale_zero", key_scale_zero, shapes[1], jnp.float16),
        ("value_codes", value_codes, shapes[2], jnp.uint8),
        ("value_scale_zero", value_scale_zero, shapes[3], jnp.float16),
        *((f"sinks[{i}]", x, (sink, dim), kind) for i, x in enumerate(sinks or ())),
    ):
        if array.shape != (batch, heads, *shape) or array.dtype != dtype:
            raise ValueError(
                f"group_int_append: {name} must be {jnp.dtype(dtype).name}{[batch, heads, *shape]} for k "
                f"{list(k.shape)} and {layout}, got {array.dtype}{list(array.shape)}"
            )
    if positions.shape != (batch,) or positions.dtype != jnp.int32 or sink < 0:
        raise ValueError(
            f"group_int_append: positions must be int32[{batch}] and sink 0 or more, got {positions.dtype}"
            f"{list(positions.shape)} and {sink}"
        )
    return dispatch.call(
        "group_int_append", implementation, interpret,
        k, v, positions, ring_keys, ring_values, key_codes, key_scale_zero, value_codes, value_scale_zero,
        layout=layout, sink=sink, sinks=sinks,
    )  # fmt: skip

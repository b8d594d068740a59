"""A decoded token goes into a coded cache with a residual window (VecInfer, section 3.3: arXiv 2510.06175)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import dispatch, packing
from pallas_kernels.vq_encode import check


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
    sinks: tuple[Float[Array, "B H sink D"], Float[Array, "B H sink D"]] | None = None,
    slots: Int32[Array, "B"] | None = None,
    mean: Float[Array, "H D"] | None = None,
    scale: Float[Array, "H D"] | None = None,
    matrix: Float[Array, "H D D"] | None = None,
    hadamard: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """One token a row enters a window of W tokens; the token that it pushes out is encoded.

    The new token's position is p. Ring slot p % W holds the token of position p - W, which goes, as codes, to slot
    p - W - sink of the codes, if there is such a slot; then the new token takes the ring slot. With W = 0 the new
    token itself is encoded, to slot p - sink.

    Args:
        k, v: the new token's key (after RoPE) and value.
        positions: of the new token in each row, 0 or more.
        ring_keys, ring_values: the last W tokens, position q in slot q % W.
        key_codes, value_codes: coded tokens, packed as `vq_encode` packs them.
        key_codebook, value_codebook: centroids, of every head or of all (first axis 1).
        sink: tokens at the start that are never coded.
        sinks: arrays for keys and values of these, position q in slot q, into which the new token goes if it is one.
        slots: in place of p - W - sink, the slot of each row's pushed-out token; outside the codes (-1, say): it is
            dropped. For a cache that holds some of the tokens.
        mean, scale, matrix, hadamard: the keys' transform, as `vq_encode` takes it; values have none.
        implementation: "mosaic_gpu", "xla", or None for the best on the default device.
        interpret: run Pallas kernels in interpret mode (on a CPU, for tests).

    Returns:
        ring_keys, ring_values, key_codes, value_codes, and the sinks if they were given, with the token in them: in
        place, where the caller lets go of what it gave.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NotImplementedError: the named implementation does not serve this format.
    """
    if k.ndim != 3:
        raise ValueError(f"vq_append: k must be [B, H, D], got {k.shape}")
    batch, heads, dim = k.shape
    window, held = ring_keys.shape[2:3], key_codes.shape[2:3]
    row = jax.ShapeDtypeStruct((batch, 1, heads, dim), ring_keys.dtype)
    check("vq_append", row, key_codebook, None, mean, scale, matrix, hadamard)
    check("vq_append", row, value_codebook)
    pitches = [
        packing.num_bytes(dim // b.shape[2], b.shape[1].bit_length() - 1) for b in (key_codebook, value_codebook)
    ]
    for name, array, want, dtype in (
        ("v", v, (batch, heads, dim), v.dtype),
        ("ring_keys", ring_keys, (batch, heads, *window, dim), ring_keys.dtype),
        ("ring_values", ring_values, (batch, heads, *window, dim), ring_keys.dtype),
        ("key_codes", key_codes, (batch, heads, *held, pitches[0]), jnp.uint8),
        ("value_codes", value_codes, (batch, heads, *held, pitches[1]), jnp.uint8),
        ("positions", positions, (batch,), jnp.int32),
        *((("slots", slots, (batch,), jnp.int32),) if slots is not None else ()),
        *((f"sinks[{i}]", x, (batch, heads, sink, dim), ring_keys.dtype) for i, x in enumerate(sinks or ())),
    ):
        if array.shape != want or array.dtype != dtype:
            raise ValueError(
                f"vq_append: {name} must be {jnp.dtype(dtype).name}{list(want)} for k {k.shape} and ring_keys "
                f"{ring_keys.dtype}{list(ring_keys.shape)}, got {array.dtype}{list(array.shape)}"
            )
    if sink < 0:
        raise ValueError(f"vq_append: sink must be 0 or more, got {sink}")
    return dispatch.call(
        "vq_append", implementation, interpret,
        k, v, positions, ring_keys, ring_values, key_codes, value_codes, key_codebook, value_codebook,
        sink=sink, sinks=sinks, slots=slots, mean=mean, scale=scale, matrix=matrix, hadamard=hadamard,
    )  # fmt: skip
